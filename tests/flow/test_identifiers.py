"""No identifier of a patient leaves the restricted prefixes: sentinels in every attribute that can name somebody."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from services.embedded import pipeline
from shared.fracture import keys
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.logs import configure
from tests.fixtures.runs import Place, place

SENTINEL = "ZQSENTINEL"
TEXT_VRS = {"PN", "LO", "SH", "ST", "LT", "UT", "UC"}
"""Texts of these kinds are replaced wherever they stand, in nested items too."""
KEPT = {
    *("ConvolutionKernel", "Manufacturer", "SegmentLabel"),
    *("CodeMeaning", "CodeValue", "CodingSchemeDesignator", "MappingResource", "ContextIdentifier"),
}
"""What the pipeline reads and keeps: it names a machine or an anatomy, no person."""
ADDED = (
    *("OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "PatientTelephoneNumbers"),
    *("PatientComments", "AdditionalPatientHistory", "MedicalRecordLocator", "MilitaryRank", "Occupation"),
    *("EthnicGroup", "CurrentPatientLocation", "AdmissionID", "ImageComments", "OperatorsName", "PhysiciansOfRecord"),
    *("PerformingPhysicianName", "RequestingPhysician", "NameOfPhysiciansReadingStudy", "InstitutionAddress"),
    *("InstitutionalDepartmentName", "DeviceSerialNumber", "ProtocolName", "RequestedProcedureDescription"),
    *("FillerOrderNumberImagingServiceRequest", "PerformedProcedureStepDescription", "DerivationDescription"),
)
"""Identifying attributes (PS3.15, table E.1-1) that a phantom does not have."""


def sentinel_archive(source: Path, target: Path) -> list[str]:
    """A copy of an archive with sentinels in identifying attributes, private tags and file names; the sentinels."""
    uids: dict[str, str] = {}
    sentinels = [SENTINEL]
    for number, path in enumerate(sorted(source.rglob("*"))):
        if not path.is_file() or path.suffix == ".csv":
            continue
        ds = pydicom.dcmread(path)
        _mark(ds, uids)
        ds.PatientName = f"{SENTINEL}^NAME"
        ds.PatientID = f"{SENTINEL}-ID"
        for keyword in ADDED:
            setattr(ds, keyword, SENTINEL)
        ds.OtherPatientIDs = f"{SENTINEL}-OTHER"
        ds.IssuerOfPatientID = f"{SENTINEL}-ISSUER"
        ds.PatientBirthDate = "19370119"
        ds.PatientAddress = f"{SENTINEL}-STREET"
        ds.AccessionNumber = f"{SENTINEL}-ACC"
        ds.StudyID = f"{SENTINEL}-STID"
        ds.StudyDescription = f"{SENTINEL}-DESCRIPTION"
        ds.SeriesDescription = f"{SENTINEL}-SERIES"
        ds.ReferringPhysicianName = f"{SENTINEL}^DOCTOR"
        ds.InstitutionName = f"{SENTINEL}-HOSPITAL"
        ds.StationName = f"{SENTINEL}-STATION"
        block = ds.private_block(0x0099, f"{SENTINEL}-PRIVATE", create=True)
        block.add_new(0x01, "LO", f"{SENTINEL}-PRIVATE-VALUE")
        folder = target / f"{SENTINEL}-folder"
        folder.mkdir(parents=True, exist_ok=True)
        ds.save_as(folder / f"{SENTINEL}-{number}.dcm")
    return [*sentinels, "19370119", *uids.values()]


def _mark(ds: Dataset, uids: dict[str, str]) -> None:
    """New UIDs everywhere, the same for the same, so that every UID of the archive is known to the test."""
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                _mark(item, uids)
        elif element.VR in TEXT_VRS and element.keyword not in KEPT and element.value:
            element.value = SENTINEL
        elif element.VR == "UI" and "Class" not in element.keyword and element.keyword != "TransferSyntaxUID":
            for value in [element.value] if isinstance(element.value, str) else element.value:
                uids.setdefault(str(value), generate_uid())
            element.value = (
                uids[str(element.value)] if isinstance(element.value, str) else [uids[str(v)] for v in element.value]
            )
    if hasattr(ds, "file_meta") and "SOPInstanceUID" in ds:
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID


@pytest.fixture
def log() -> io.StringIO:
    stream = io.StringIO()
    configure(level="DEBUG", stream=stream, service="test", pretty=False)
    return stream


def assert_free(text: bytes, sentinels: list[str], where: str) -> None:
    for sentinel in sentinels:
        assert sentinel.encode() not in text, f"{where} holds {sentinel[:20]}"


def test_no_identifier_leaves_the_restricted_prefixes(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path, log: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    archive = tmp_path / "in"
    sentinels = sentinel_archive(phantom_archive, archive)
    broken = archive / f"{SENTINEL}-folder" / f"{SENTINEL}-broken.dcm"
    whole = next((archive / f"{SENTINEL}-folder").glob("*-1.dcm")).read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    here = place(tmp_path / "store", tiny_bundle)

    ran = here.run(archive, name=f"{SENTINEL} sweep")

    assert ran.ledger.cases.by_state["reported"] > 0
    for key in here.store.keys(""):
        assert_free(key.encode(), sentinels, "a key")
        if not key.startswith(keys.RESTRICTED):
            assert_free(here.store.get(key), sentinels, key)
    assert_free(log.getvalue().encode(), sentinels, "the log")
    assert_free(caplog.text.encode(), sentinels, "a library's log")


def test_the_restricted_prefixes_are_unreadable_without_the_key(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    archive = tmp_path / "in"
    sentinels = sentinel_archive(phantom_archive, archive)
    here = place(tmp_path / "store", tiny_bundle, report_generator__named_reports="true")

    here.run(archive)

    raw = FolderStore(tmp_path / "store")
    restricted = [key for key in raw.keys("") if key.startswith(keys.RESTRICTED)]
    assert any(key.startswith("named/") for key in restricted)
    assert any(SENTINEL.encode() in here.store.get(key) for key in restricted)
    for key in restricted:
        assert_free(raw.get(key), sentinels, key)


def test_no_identifier_is_in_a_message_or_a_metric(tmp_path: Path, tiny_bundle: Path, phantom_archive: Path) -> None:
    from prometheus_client import generate_latest

    from services.composition import teller
    from services.dicom_ingest.sweep import run_sweep
    from services.embedded import intake_of
    from services.sources import source_of
    from shared.fracture.bundle import load_bundle
    from shared.fracture.ids import Pseudonyms
    from shared.pipeline.metrics import Metrics

    archive = tmp_path / "in"
    sentinels = sentinel_archive(phantom_archive, archive)
    here: Place = place(tmp_path / "store", tiny_bundle)
    bundle = load_bundle(tiny_bundle)
    metrics = Metrics()
    bodies: list[bytes] = []
    pseudonyms = Pseudonyms(bytes(32))
    with pipeline(settings=here.settings, store=here.store, bundle=bundle, metrics=metrics) as running:
        publish = running.broker.inner.publish

        def spied(message_type: str, body: bytes) -> None:
            bodies.append(body)
            publish(message_type, body)

        running.broker.inner.publish = spied  # type: ignore[method-assign]
        run_sweep(
            source_of(archive, settings=here.settings),
            name="a sweep",
            sweep_id=pseudonyms.sweep_id("a sweep"),
            intake=intake_of(here.settings, store=here.store, pseudonyms=pseudonyms, bundle=bundle),
            store=here.store,
            protocols=bundle.manifest.protocols,
            tell=teller(running.broker),
        )
        running.wait_until_idle()

    assert len(bodies) > 10
    for body in bodies:
        assert_free(body, sentinels, "a message")
    assert_free(generate_latest(metrics.registry), sentinels, "a metric")
