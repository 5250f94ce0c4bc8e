"""The real services on small cohorts: from COHORT.csv to a table, resumed, and beside a sweep over the same archive."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.cohort.assembly import GUARDS, READ, Cohort
from services.cohort.deep import deep_features
from services.cohort.image_pass import ImagePass
from services.cohort.protocols import extraction_of, extraction_of_bundle
from services.cohort.table import cohort_table
from services.composition import bundle_of, pseudonyms_of, restricted
from services.settings import Settings
from services.trainer.cohort_file import CohortError
from services.trainer.phantoms.training_cohort import PhantomCohort, write_training_cohort
from services.trainer.settings import TrainingSettings
from services.trainer.tiny_bundle import tiny_features, tiny_network
from shared.fracture import keys
from shared.fracture.faults import group_of
from shared.fracture.features import FeatureVector
from shared.fracture.ids import sha256_hex
from shared.fracture.protocol import preset_box
from shared.fracture.sagittal import sagittal_image
from shared.fracture.volume import mask_from_nrrd, volume_from_nrrd
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.store import Store
from tests.fixtures.runs import place
from tests.fixtures.small_cohort import GRID, app_settings, row, training_settings, write_cohort, write_mask, write_scan

PATIENTS = 6


def run(
    csv: Path,
    out: Path,
    *,
    app: Settings | None = None,
    store: Store | None = None,
    fitting: bool = True,
    **changes: Any,
) -> Cohort:
    chosen = app or app_settings()
    return cohort_table(
        csv,
        changes.pop("settings", None) or training_settings(**changes),
        app=chosen,
        pseudonyms=pseudonyms_of(chosen),
        store=store or restricted(FolderStore(out / "store"), chosen),
        out=out,
        fitting=fitting,
    )


def written(store: Store, *prefixes: str) -> Mapping[str, object]:
    """When each object under the prefixes was written."""
    return {entry.key: entry.modified_at for prefix in prefixes for entry in store.entries(prefix)}


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of six patients with masks of three readings; of patient 2 the masks of two vertebrae."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(PATIENTS):
        levels = ("L1", "L2") if number == 2 else ("L1",)
        write_scan(folder, str(number), seed=number, levels=levels)
        for reader in (2, 3):
            shifted = folder / f"reader-{reader}"
            shifted.mkdir(exist_ok=True)
            write_scan(shifted, str(number), seed=number, levels=levels, shift=reader - 1)
    return folder


@pytest.fixture
def folder(scans: Path, tmp_path: Path) -> Path:
    """A folder of its own with the scans in it."""
    return Path(shutil.copytree(scans, tmp_path / "cohort"))


def test_rows_become_features_pictures_and_what_the_scans_say(folder: Path, tmp_path: Path) -> None:
    lines = [row(number) for number in range(PATIENTS)]
    csv = write_cohort(folder, [*lines, row(2, levels="L2", acute="1")])

    found = run(csv, tmp_path / "out")

    table = found.table
    assert table.patient.tolist() == [0, 1, 2, 3, 4, 5, 2]
    assert table.level == ("L1",) * 6 + ("L2",)
    assert table.acute.tolist() == [0, 1, 0, 1, 0, 1, 1]
    assert table.age.tolist() == [60, 61, 62, 63, 64, 65, 62]
    assert table.male.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert table.split == ("test", "test", "train", "train", "train", "train", "train")
    assert table.hcr.shape == (7, len(table.hcr_names)) == (7, 100)
    assert np.isfinite(table.hcr).all()
    assert table.images.shape == (7, 64, 64)
    assert np.allclose(table.images.mean(axis=(1, 2)), 0, atol=1e-5)
    assert [(step.patients, step.cases, step.acute, step.chronic) for step in found.flow] == [(6, 7, 4, 3)] * 5
    assert (found.left_out, dict(table.repeats), table.perturbed) == ((), {}, False)
    assert len(set(found.image)) == len(set(found.study)) == PATIENTS


def test_a_refused_row_costs_only_itself_and_stands_in_the_flow(folder: Path, tmp_path: Path) -> None:
    labels = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    labels[0:5, 6:12, 6:13] = 20
    write_mask(folder, "1-mask", labels)
    (folder / "5.nii.gz").write_bytes((folder / "5.nii.gz").read_bytes()[:600])
    lines = [row(number) for number in range(PATIENTS)]
    csv = write_cohort(folder, [*lines, row(3, levels="T12"), row(2, levels="L2")])

    found = run(csv, tmp_path / "out", fitting=False)

    reasons = {one.line: (one.step, one.reason) for one in found.left_out}
    assert found.table.patient.tolist() == [0, 2, 3, 4, 2]
    assert set(reasons) == {3, 7, 8}
    assert reasons[3] == (GUARDS, "the mask touches the border of the scan: the vertebra may be cut off")
    assert reasons[7][0] == READ
    assert reasons[8] == (READ, "the mask does not hold the level of the row")
    rows, read, guards, *_ = found.flow
    assert (rows.cases, read.cases, guards.cases) == (8, 6, 5)
    assert guards.left_out == {"the mask touches the border of the scan: the vertebra may be cut off": 1}
    assert sum(read.left_out.values()) == 2


def test_a_cohort_that_is_too_small_after_refusals_says_why(folder: Path, tmp_path: Path) -> None:
    (folder / "3.nii.gz").write_bytes((folder / "3.nii.gz").read_bytes()[:600])
    csv = write_cohort(folder, [row(number) for number in range(PATIENTS)])

    with pytest.raises(CohortError) as caught:
        run(csv, tmp_path / "out")

    assert any("patients with acute fractures: the classifiers' folds" in one for one in caught.value.faults)
    assert caught.value.faults[0].startswith("1 rows were left out: the image")


def test_a_run_again_reads_and_computes_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = write_cohort(folder, [row(number) for number in range(PATIENTS)])
    store = restricted(FolderStore(tmp_path / "store"), app_settings())
    first = run(csv, tmp_path / "out", store=store)
    before = written(store, "")
    monkeypatch.setattr(ImagePass, "_taken", None)

    again = run(csv, tmp_path / "out", store=store)

    assert written(store, "") == before
    assert sum(key.endswith("/case.json") for key in before) == PATIENTS  # of patient 2 one level of two
    assert np.array_equal(again.table.hcr, first.table.hcr)
    assert np.array_equal(again.table.images, first.table.images)
    assert (again.table.case_id, again.flow, again.fingerprint) == (first.table.case_id, first.flow, first.fingerprint)


def test_cases_that_were_given_up_are_told_and_tried_again(folder: Path, tmp_path: Path) -> None:
    csv = write_cohort(folder, [row(number) for number in range(PATIENTS)])
    hasty = app_settings(radiomics_extractor__case_seconds="0.001")
    store = restricted(FolderStore(tmp_path / "store"), hasty)

    with pytest.raises(FractureSweepError, match=r"no vertebra of the cohort has features: the extraction took more"):
        run(csv, tmp_path / "out", app=hasty, store=store)
    found = run(csv, tmp_path / "out", store=store)

    assert (len(found.table), found.left_out) == (PATIENTS, ())


def test_an_interrupted_run_goes_on_with_what_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = write_cohort(folder, [row(number) for number in range(PATIENTS)])
    store = restricted(FolderStore(tmp_path / "store"), app_settings())
    taken = ImagePass._taken
    calls: list[int] = []

    def until_the_third(self: Any, image: Any, *rest: Any, **more: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return taken(self, image, *rest, **more)

    monkeypatch.setattr(ImagePass, "_taken", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(csv, tmp_path / "out", store=store)
    before = written(store, "features/", "volumes/")

    whole = run(csv, tmp_path / "out", store=store)

    assert len(whole.table) == PATIENTS
    assert before.items() <= written(store, "features/", "volumes/").items()
    assert len(calls) <= 4 + PATIENTS
    assert np.array_equal(whole.table.hcr, run(csv, tmp_path / "other").table.hcr)


def test_other_features_are_extracted_from_the_crops_that_are_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv = write_cohort(folder, [row(number) for number in range(PATIENTS)])
    store = restricted(FolderStore(tmp_path / "store"), app_settings())
    run(csv, tmp_path / "out", store=store)
    before = written(store, "cases/", "volumes/")
    monkeypatch.setattr(ImagePass, "_taken", None)

    found = run(csv, tmp_path / "out", store=store, hcr={"image_types": ["Original", "LoG:3"]})

    assert found.table.hcr.shape == (PATIENTS, 186)
    assert written(store, "cases/", "volumes/") == before


def test_repeated_masks_are_cases_of_their_own(folder: Path, tmp_path: Path) -> None:
    number = {"repeatability": {"method": "masks"}}
    lines = []
    for one in range(2, PATIENTS):
        lines.append(row(one, mask2=f"reader-2/{one}-mask.nii.gz", mask3=f"reader-3/{one}-mask.nii.gz", split="train"))
    lines.append(row(2, levels="L2", mask2="reader-2/2-mask.nii.gz"))
    lines += [row(0), row(1)]
    csv = write_cohort(folder, lines)

    with pytest.raises(CohortError, match="too few rows with mask3: repeatability needs 5 training rows, there are 4"):
        run(csv, tmp_path / "out", **number)
    lines[4] = row(2, levels="L2", mask2="reader-2/2-mask.nii.gz", mask3="reader-3/2-mask.nii.gz")
    store = restricted(FolderStore(tmp_path / "store"), app_settings())
    found = run(write_cohort(folder, lines), tmp_path / "out", store=store, **number)

    intra, inter = found.table.repeats["intra"], found.table.repeats["inter"]
    assert intra.rows.tolist() == inter.rows.tolist() == [0, 1, 2, 3, 4]
    assert intra.hcr.shape == (5, 100)
    volume = found.table.hcr_names.index("original_firstorder_Mean")
    assert (intra.hcr[:, volume] < found.table.hcr[:5, volume]).all()
    assert (inter.hcr[:, volume] < intra.hcr[:, volume]).all()
    assert not found.table.perturbed
    assert not written(store, "plans/")  # no sweep's ledger counts them


def test_without_repeated_masks_training_rows_are_perturbed(folder: Path, tmp_path: Path) -> None:
    lines = [row(number, split="test" if number < 2 else "train") for number in range(PATIENTS)]
    csv = write_cohort(folder, [*lines, row(2, levels="L2", acute="1")])
    perturbation = {"repeatability": {"method": "auto", "perturbed_cases": 5}}
    store = restricted(FolderStore(tmp_path / "store"), app_settings())

    found = run(csv, tmp_path / "out", store=store, **perturbation)
    before = written(store, "features/")
    again = run(csv, tmp_path / "out", store=store, **perturbation)

    repeat = found.table.repeats["intra"]
    assert found.table.perturbed
    assert repeat.rows.tolist() == [2, 3, 4, 5, 6]
    assert np.isfinite(repeat.hcr).all()
    assert not np.allclose(repeat.hcr, found.table.hcr[repeat.rows])
    assert written(store, "features/") == before
    assert np.array_equal(again.table.repeats["intra"].hcr, repeat.hcr)
    assert len(before) == 7 + 5


def test_deep_features_come_of_the_pictures_and_are_kept(folder: Path, tmp_path: Path) -> None:
    csv = write_cohort(folder, [row(number) for number in range(PATIENTS)])
    store = restricted(FolderStore(tmp_path / "store"), app_settings())
    found = run(csv, tmp_path / "out", store=store)
    network = tiny_network(seed=3)
    protocol = found.extraction.dtl(sha256_hex(network))

    values = deep_features(store, found.ready, network=network, protocol=protocol, app=app_settings())
    before = written(store, "features/dtl/")
    again = deep_features(store, found.ready, network=network, protocol=protocol, app=app_settings())

    expected = np.stack([tiny_features(picture, seed=3) for picture in found.table.images])
    assert values.dtype == np.float64
    assert np.allclose(values, expected, atol=1e-5)
    assert len(before) == PATIENTS
    assert written(store, "features/dtl/") == before
    assert np.array_equal(again, values)


def test_deep_features_of_a_case_without_a_crop_are_an_error(folder: Path, tmp_path: Path) -> None:
    csv = write_cohort(folder, [row(number) for number in range(PATIENTS)])
    store = restricted(FolderStore(tmp_path / "store"), app_settings())
    found = run(csv, tmp_path / "out", store=store)
    store.delete(keys.case_image(found.extraction.crop.crop_hash, found.ready[2].case_id))
    network = tiny_network(seed=3)

    with pytest.raises(FractureSweepError, match="the deep features of a case cannot be had"):
        deep_features(
            store, found.ready, network=network, protocol=found.extraction.dtl(sha256_hex(network)), app=app_settings()
        )


def test_one_image_stored_twice_under_other_bytes_is_refused_after_it_was_read(folder: Path, tmp_path: Path) -> None:
    import gzip

    for name in ("1", "1-mask"):
        data = gzip.decompress((folder / f"{name}.nii.gz").read_bytes())
        (folder / f"copy-{name}.nii.gz").write_bytes(gzip.compress(data, compresslevel=1, mtime=7))
    lines = [row(number) for number in range(PATIENTS)]
    twice = row(1, image="copy-1.nii.gz", mask="copy-1-mask.nii.gz", patient="P9", split="train")
    csv = write_cohort(folder, [*lines, twice])

    with pytest.raises(CohortError) as caught:
        run(csv, tmp_path / "out")

    assert "line 8, image: is the image of another patient in line 3" in caught.value.faults


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantom patients in DICOM, one acute and one chronic, one of them with masks of three readers."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_training_cohort(folder, PhantomCohort(patients=2, seed=13, readers=1), processes=1)
    return folder


def test_what_a_sweep_over_the_archive_extracted_is_not_extracted_again(
    phantoms: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    nightly = place(tmp_path / "store", tiny_bundle)
    nightly.run(phantoms / "studies")
    before = written(nightly.store, "features/", "cases/", "volumes/", "masks/", "plans/", "manifests/")
    settings = TrainingSettings.of("recommended", {"hcr": {"image_types": ["Original"]}})

    found = run(
        phantoms / "COHORT.csv",
        tmp_path / "out",
        app=nightly.settings,
        store=nightly.store,
        settings=settings,
        fitting=False,
    )

    bundle = bundle_of(nightly.settings)
    assert found.left_out == ()
    assert written(nightly.store, "features/", "cases/", "volumes/", "masks/", "plans/", "manifests/") == before
    assert extraction_of_bundle(bundle) == extraction_of(settings) == found.extraction
    swept = [FeatureVector.from_bytes(nightly.store.get(key)) for key in before if key.startswith("features/hcr/")]
    assert sorted(map(tuple, found.table.hcr)) == sorted(tuple(vector.values) for vector in swept)
    assert set(found.table.kernel) <= {"B30f", "B45f", "B70f"}
    assert np.isfinite(found.table.kvp).all()
    assert all(found.accession)


def test_a_sweep_after_the_cohort_extracts_nothing_again_and_reports(
    phantoms: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    nightly = place(tmp_path / "store", tiny_bundle)
    settings = TrainingSettings.of("recommended", {"hcr": {"image_types": ["Original"]}})
    csv = phantoms / "COHORT.csv"
    run(csv, tmp_path / "out", app=nightly.settings, store=nightly.store, settings=settings, fitting=False)
    before = written(nightly.store, "features/hcr/", "cases/", "volumes/")

    ran = nightly.run(phantoms / "studies")

    assert written(nightly.store, "features/hcr/", "cases/", "volumes/") == before
    assert ran.ledger.exact
    assert ran.ledger.cases.by_state["reported"] == ran.ledger.cases.found == 2
    assert ran.ledger.reports == ran.ledger.studies == 2


def test_pictures_are_those_of_the_preset(folder: Path, tmp_path: Path) -> None:
    csv = write_cohort(folder, [row(number) for number in range(PATIENTS)])
    app = app_settings()
    store = restricted(FolderStore(tmp_path / "store"), app)
    settings = TrainingSettings.of(
        "paper",
        {
            **training_settings().model_dump(include={"hcr", "split", "selection", "repeatability"}),
            "classifiers": {"folds": 2, "out_of_fold": 2, "conformal_alpha": 0.45},
            "network": {"image_size": 48},
        },
    )

    found = run(csv, tmp_path / "out", app=app, store=store, settings=settings)

    box, margin = preset_box("paper")
    crop_hash, case_id = found.extraction.crop.crop_hash, found.table.case_id[0]
    image = volume_from_nrrd(store.get(keys.case_image(crop_hash, case_id)))
    mask = mask_from_nrrd(store.get(keys.case_mask(crop_hash, case_id)))
    expected = sagittal_image(image, mask, box=box, box_margin_mm=margin, size=48)
    assert np.array_equal(found.table.images[0], expected)


def test_reasons_are_counted_without_their_numbers() -> None:
    assert group_of("the mask has 3.2 mL, below the limit of 5 mL") == "the mask has … mL, below the limit of … mL"
    assert group_of("the method answers for T1 to L5, not for S1") == "the method answers for T1 to L5, not for S1"


def test_image_types_that_there_are_not_are_one_sentence() -> None:
    with pytest.raises(FractureSweepError, match=r"hcr.image_types: unknown image type 'Orginal'"):
        extraction_of(training_settings(hcr={"image_types": ["Orginal"]}))
