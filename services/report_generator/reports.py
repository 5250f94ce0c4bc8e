"""Writing a study's report: read its records, draw it, and put each copy under its key once.

Order of writing: the page, the named copies, and last the JSON, which is the mark that the report exists. All bytes
follow from stored records alone, so two workers that write one report at the same time write the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from services.report_generator.page import PatientShown, study_page
from services.report_generator.sagittal_view import SagittalView, sagittal_view
from services.report_generator.study_report import ScoringBundle, StudyReport, build
from shared.fracture import keys
from shared.fracture.crop import MAX_CROP_VOXELS
from shared.fracture.ids import short
from shared.fracture.ledger import StudyState
from shared.fracture.records import (
    CaseRecord,
    MaskRecord,
    Record,
    SeriesIdentity,
    SeriesManifest,
    StudyIdentity,
)
from shared.fracture.sagittal import sagittal_box
from shared.fracture.spine.record import SpineRecord
from shared.fracture.volume import mask_from_nrrd, volume_from_nrrd
from shared.pipeline.errors import NotInStore
from shared.pipeline.store import Store
from shared.records.archive import find_record, read_record

NOT_STATED: Final = ""
LOG = logging.getLogger("fracture_sweep.report_generator")


def write_report(store: Store, state: StudyState, *, bundle: ScoringBundle, named: bool) -> bool:
    """Write the report of a complete study's state: True when something was written now.

    `named`: also the restricted copies with name, id, accession number and study date.
    """
    wanted = [keys.report(state.study_id, state.report_id, "html")]
    if named:
        wanted += [keys.named_report(state.study_id, state.report_id, suffix) for suffix in ("html", "json")]
    mark = keys.report(state.study_id, state.report_id, "json")
    if all(store.exists(key) for key in (*wanted, mark)):
        return False
    report = read_report(store, state, bundle=bundle)
    views = read_views(store, report)
    spines = read_spine_pictures(store, state)
    store.put(wanted[0], study_page(report, views=views, spines=spines).encode())
    if named:
        patient = read_patient(store, state.study_id)
        page = study_page(report, views=views, spines=spines, patient=patient)
        store.put(keys.named_report(state.study_id, state.report_id, "html"), page.encode())
        store.put(keys.named_report(state.study_id, state.report_id, "json"), named_json(report, patient))
        write_segmentations(store, state, report)
    store.put(mark, report.to_bytes())
    return True


def read_report(store: Store, state: StudyState, *, bundle: ScoringBundle) -> StudyReport:
    """The report of a state, with what the store knows of its cases, series and masks."""
    crop_hash = bundle.manifest.crop.crop_hash
    cases: dict[str, CaseRecord] = {}
    for status in state.cases:
        record = find_record(store, keys.case_record(crop_hash, status.case_id), CaseRecord)
        if record is not None:
            cases[status.case_id] = record
    manifests: dict[str, SeriesManifest] = {}
    masks: dict[str, MaskRecord] = {}
    spines: dict[str, SpineRecord] = {}
    for series in state.series:
        series_id = series.planned.series_id
        manifest = find_record(store, keys.manifest(series_id, series.planned.manifest_id), SeriesManifest)
        if manifest is not None:
            manifests[series_id] = manifest
        if series.plan is not None:
            mask = find_record(store, keys.mask_record(series_id, series.plan.mask_hash), MaskRecord)
            if mask is not None:
                masks[series_id] = mask
            if series.plan.spine_hash is not None:
                spine = find_record(store, keys.spine(series_id, series.plan.spine_hash), SpineRecord)
                if spine is not None:
                    spines[series_id] = spine
    return build(state, bundle=bundle, cases=cases, manifests=manifests, masks=masks, spines=spines)


def read_spine_pictures(store: Store, state: StudyState) -> dict[str, dict[keys.SpineView, bytes]]:
    """The pictures (PNG) of the whole spine by series id and view; one that retention dropped is left out."""
    found: dict[str, dict[keys.SpineView, bytes]] = {}
    for series in state.series:
        spine_hash = None if series.plan is None else series.plan.spine_hash
        for view in () if spine_hash is None else keys.SPINE_VIEWS:
            try:
                png = store.get(keys.spine_picture(series.planned.series_id, spine_hash or "", view))
            except NotInStore:
                continue
            found.setdefault(series.planned.series_id, {})[view] = png
    return found


def read_views(store: Store, report: StudyReport) -> dict[str, SagittalView]:
    """The pictures of the scored cases, by case id; a crop that is missing, unreadable or too large has none."""
    views: dict[str, SagittalView] = {}
    for case in report.scored:
        view = _view(store, crop_hash=report.protocols.crop_hash, case_id=case.case_id)
        if view is not None:
            views[case.case_id] = view
    return views


def _view(store: Store, *, crop_hash: str, case_id: str) -> SagittalView | None:
    try:
        image = volume_from_nrrd(store.get(keys.case_image(crop_hash, case_id)), max_voxels=MAX_CROP_VOXELS)
        mask = mask_from_nrrd(store.get(keys.case_mask(crop_hash, case_id)), max_voxels=MAX_CROP_VOXELS)
        place = sagittal_box(mask, box="tight", box_margin_mm=0.0)
        return sagittal_view(image, mask, slice_index=place.x)
    except (NotInStore, ValueError, RuntimeError):
        # A result whose crop is lost is still a result; SimpleITK raises RuntimeError for bytes that are no NRRD.
        return None


def write_segmentations(store: Store, state: StudyState, report: StudyReport) -> None:
    """Restricted: the automatic masks of a study's series as DICOM SEG, where they can be made."""
    from services.report_generator.dicom_seg import segmentation  # highdicom: for named copies alone

    identities = [read_record(store, key, StudyIdentity) for key in store.keys(keys.study_identities(state.study_id))]
    for series in report.series:
        spine = series.spine
        if spine is None or spine.segmenter.kind == "given" or not identities:
            continue
        masks = find_record(store, keys.mask_record(series.series_id, spine.mask_hash), MaskRecord)
        manifest = find_record(store, keys.manifest(series.series_id, series.manifest_id), SeriesManifest)
        if masks is None or manifest is None:
            continue
        known = find_record(store, keys.series_instances(series.series_id, manifest.image_hash), SeriesIdentity)
        if known is None:
            continue
        try:
            seg = segmentation(
                mask_from_nrrd(store.get(keys.mask(series.series_id, spine.mask_hash))),
                masks.levels,
                study=identities[-1],
                series=known,
                grid=manifest.grid,
                made_by=spine.segmenter,
            )
        except Exception as error:  # headers of the wild: whatever is wrong with them costs the SEG, not the report
            fields = {"series_id": short(series.series_id), "reason": type(error).__name__}
            LOG.warning("no DICOM SEG of a series' masks could be made", extra={"fields": fields})
            continue
        store.put(keys.named_segmentation(state.study_id, state.report_id, series.series_id), seg)


def read_patient(store: Store, study_id: str) -> PatientShown:
    """Restricted: whom a study is about. Where its identities disagree, every value is shown."""
    found = [read_record(store, key, StudyIdentity) for key in store.keys(keys.study_identities(study_id))]
    return PatientShown(
        name=_joined(_in_reading_order(identity.patient_name) for identity in found),
        patient_id=_joined(identity.patient_id for identity in found),
        accession_number=_joined(identity.accession_number for identity in found),
        study_date=_joined(identity.study_date for identity in found),
    )


def _joined(values: Iterable[str]) -> str:
    return " / ".join(sorted({value for value in values if value})) or NOT_STATED


def _in_reading_order(person_name: str) -> str:
    """ "Family^Given^Middle^Prefix^Suffix" (PS3.5 6.2.1.1) as "Family, Given Middle"; the alphabetic group alone."""
    family, _, rest = person_name.split("=", 1)[0].partition("^")
    given = " ".join(part for part in rest.split("^") if part)
    return ", ".join(part for part in (family.strip(), given.strip()) if part)


class NamedReport(Record):
    """Restricted: a report with the identifiers of its patient."""

    patient_name: str
    patient_id: str
    accession_number: str
    study_date: str
    report: StudyReport


def named_json(report: StudyReport, patient: PatientShown) -> bytes:
    """Restricted: the report's JSON beside the patient's identifiers."""
    return NamedReport(
        patient_name=patient.name,
        patient_id=patient.patient_id,
        accession_number=patient.accession_number,
        study_date=patient.study_date,
        report=report,
    ).to_bytes()
