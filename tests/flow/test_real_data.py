"""Real CT end to end: what is scored, what is not, and why (METHOD 1 and 10; data/MANIFEST.md)."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from services.segmenter.service import built_in_of
from services.segmenter.settings import SegmenterSettings
from services.trainer.tiny_bundle import write_tiny_bundle
from shared.fracture.ledger import CaseStatus, StudyState
from shared.fracture.records import CaseRecord, MaskRecord
from shared.records.archive import read_record
from shared.records.ledger import sweep_plan, sweep_states
from tests.fixtures.runs import Place, place

pytestmark = pytest.mark.shared_data


@pytest.fixture
def here(tmp_path: Path, tiny_bundle: Path) -> Place:
    return place(tmp_path / "store", tiny_bundle)


def study(here: Place, sweep_id: str) -> StudyState:
    plan = sweep_plan(here.store, sweep_id)
    assert plan is not None
    (state,) = sweep_states(here.store, plan).values()
    return state


def by_level(state: StudyState) -> dict[str, CaseStatus]:
    return {case.level: case for case in state.cases}


def pairs(tmp_path: Path, **columns: object) -> Path:
    table = tmp_path / "pairs.csv"
    table.write_text(",".join(columns) + "\n" + ",".join(f'"{value}"' for value in columns.values()) + "\n")
    return table


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


def states(state: StudyState) -> dict[str, str]:
    return {case.level: case.state(report_written=state.report_written) for case in state.cases}


def case_record(here: Place, case: CaseStatus) -> CaseRecord:
    (key,) = [key for key in here.store.keys("cases/") if key.endswith(f"/{case.case_id}/case.json")]
    return read_record(here.store, key, CaseRecord)


def test_totalseg_example_scores_the_lumbar_bodies(here: Place, tmp_path: Path, shared_data: Path) -> None:
    example = shared_data / "totalseg-example"
    report = example / "spine_report" / "example_ct_report"
    image, labels = example / "example_ct.nii.gz", report / "totalseg.nii.gz"
    bodies = report / "totalseg_vertebrae_body.nii.gz"

    ran = here.run(
        pairs(tmp_path, image=image, mask=labels, labels="totalseg", roi="vertebra", body=bodies, body_labels=1)
    )

    state = study(here, ran.sweep_id)
    cases = by_level(state)
    found = states(state)
    assert {level for level, one in found.items() if one == "reported"} == {"L1", "L2", "L3", "L4", "L5"}
    assert found["T12"] == found["T11"] == found["S1"] == "not evaluated"
    assert any("border" in reason for reason in cases["T12"].reasons)
    assert any("body" in reason or "mask" in reason for reason in cases["T11"].reasons)
    assert any("T1" in reason and "L5" in reason for reason in cases["S1"].reasons)
    assert any("coarsest axis has 3 mm" in warning.sentence for warning in case_record(here, cases["L3"]).warnings)


def test_totalseg_example_with_all_organs_counts_the_ignored_labels(
    here: Place, tmp_path: Path, shared_data: Path
) -> None:
    example = shared_data / "totalseg-example"
    image, mask = example / "example_ct_sm.nii.gz", example / "example_seg.nii.gz"

    ran = here.run(pairs(tmp_path, image=image, mask=mask, labels="totalseg", roi="vertebra"))

    records = [read_record(here.store, key, MaskRecord) for key in here.store.keys("masks/") if key.endswith(".json")]
    assert ran.ledger.exact
    assert records[0].ignored_labels > 20


def test_tptbox_scores_l3_with_a_margin_warning(here: Place, tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "tptbox-l3"
    image = folder / "sub-ct_label-22_ct.nii.gz"
    vertebra = folder / "sub-ct_seg-vert_label-22_msk.nii.gz"
    subregions = folder / "sub-ct_seg-subreg_label-22_msk.nii.gz"

    ran = here.run(
        pairs(
            tmp_path, image=image, mask=vertebra, labels="verse", roi="vertebra", body=subregions, body_labels="49;50"
        )
    )

    state = study(here, ran.sweep_id)
    found = states(state)
    assert found["L3"] == "reported"
    assert {found["L2"], found["L4"]} == {"not evaluated"}
    assert any("border" in reason for reason in by_level(state)["L2"].reasons)
    assert any(
        "margin" in warning.code or "margin" in warning.sentence
        for warning in case_record(here, by_level(state)["L3"]).warnings
    )


def test_totalseg_dicom_has_both_levels_at_the_border(here: Place, tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "totalseg-ct-dicom"
    mask, series = folder / "example_seg_dicom.nii.gz", folder / "example_ct_dicom"

    ran = here.run(pairs(tmp_path, image=series, mask=mask, labels="totalseg", roi="vertebra"))

    state = study(here, ran.sweep_id)
    assert states(state) == {"T11": "not evaluated", "T12": "not evaluated"}
    for case in state.cases:
        assert any("border" in reason for reason in case.reasons)


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("crlm-1004-dicom/CRLM-CT-1004.tar.xz", "5.0 mm"),
        ("lidc-0314-dicom/LIDC-0314_55slices.tar.xz", None),
    ],
)
def test_a_real_series_without_masks_is_rejected_with_that_reason(
    here: Place, tmp_path: Path, shared_data: Path, name: str, second: str | None
) -> None:
    ran = here.run(unpacked(shared_data / name, tmp_path / "series"))

    state = study(here, ran.sweep_id)
    (series,) = state.series
    assert series.state == "rejected"
    assert "no vertebra mask" in series.reasons[0]
    assert len(series.reasons) == (1 if second is None else 2)
    assert second is None or second in series.reasons[1]
    assert ran.ledger.reports == 1


# masks of our own ----------------------------------------------------------------------------------------------------
@pytest.fixture
def alone(tmp_path: Path) -> Place:
    """Nobody sends masks: the built-in network makes them, and the bundle knows them."""
    note = built_in_of(SegmenterSettings()).note
    write_tiny_bundle(tmp_path / "bundle", image_types="original", mask_sources=(note.source,))
    return place(tmp_path / "store", tmp_path / "bundle", segmenter__source="built-in", segmenter__threads="2")


def page_of(here: Place, state: StudyState) -> str:
    return here.store.get(f"reports/{state.study_id}/{state.report_id}.html").decode()


def test_a_real_abdominal_ct_of_five_millimetres_shows_its_bodies_and_reads_no_heights(
    alone: Place, tmp_path: Path, shared_data: Path
) -> None:
    ran = alone.run(unpacked(shared_data / "crlm-1004-dicom" / "CRLM-CT-1004.tar.xz", tmp_path / "series"))

    state = study(alone, ran.sweep_id)
    assert ran.ledger.exact
    assert ran.ledger.reports == 1
    # seven bodies, the first and the last cut off; no sacrum, and the ribs do not say which are the last
    assert states(state) == dict.fromkeys([f"B0{n}" for n in range(1, 8)], "not evaluated")
    assert sum("heights are not read from steps of" in case.reasons[0] for case in state.cases) == 5
    page = page_of(alone, state)
    assert page.count('<img src="data:image/png;base64,') == 2
    assert "the scan shows neither the sacrum nor which ribs are the last" in page


def test_a_real_chest_ct_of_one_millimetre_has_its_whole_body_gated(
    alone: Place, tmp_path: Path, shared_data: Path
) -> None:
    ran = alone.run(unpacked(shared_data / "lidc-0314-dicom" / "LIDC-0314_55slices.tar.xz", tmp_path / "series"))

    state = study(alone, ran.sweep_id)
    assert ran.ledger.exact
    assert ran.ledger.reports == 1
    reasons = {level: case.reasons[0] for level, case in by_level(state).items()}
    assert set(reasons) == {"B01", "B02", "B03"}
    assert reasons["B02"].startswith("height loss")
    assert reasons["B01"] == reasons["B03"] == "cut off by the end of the scan"
    assert page_of(alone, state).count('<img src="data:image/png;base64,') == 2


def test_a_contrast_phantom_gets_no_masks(alone: Place, tmp_path: Path, shared_data: Path) -> None:
    ran = alone.run(unpacked(shared_data / "dcmqa-ct" / "Philips_tilt.tar.xz", tmp_path / "series"))

    plan = sweep_plan(alone.store, ran.sweep_id)
    assert plan is not None
    found = sweep_states(alone.store, plan).values()
    series = [one for state in found for one in state.series]
    assert series
    assert {one.state for one in series} == {"rejected"}
    assert all(one.reasons for one in series)
    assert ran.ledger.exact
    assert not [key for key in alone.store.keys("masks/") if key.endswith(".nrrd")]


@pytest.mark.parametrize("folder", ["dcmqa-ct/S21610", "dicom2nifti-ct", "pydicom-odd", "highdicom-seg-sr"])
def test_odd_and_tiny_series_never_get_a_mask_that_is_scored(alone: Place, shared_data: Path, folder: str) -> None:
    ran = alone.run(shared_data / folder)

    assert ran.ledger.exact
    assert ran.ledger.pending == 0
    assert not list(alone.store.keys("outcomes/classified/"))
    records = [
        read_record(alone.store, key, MaskRecord)
        for key in alone.store.keys("masks/")
        if key.endswith(".json") and not key.endswith(".spine.json")
    ]
    assert not [record for record in records if record.source == "automatic"]
