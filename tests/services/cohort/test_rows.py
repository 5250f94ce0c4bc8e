"""The files behind a cohort's rows: what is missing, twice, or of another kind, told with all other faults."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from services.cohort.rows import CohortImage, PairJudge, images_of, read_rows_with_files
from services.dicom_ingest import pairs_csv
from services.trainer import cohort_file
from services.trainer.cohort_file import CohortError, parse_cohort
from services.trainer.phantoms.cohort import draw_patient
from services.trainer.phantoms.dicom_writer import write_dicom
from services.trainer.phantoms.rendering import render
from services.trainer.phantoms.training_cohort import COLUMNS as WRITTEN
from tests.fixtures.small_cohort import GRID, HEADER, row, training_settings, write_cohort, write_mask, write_scan


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for number in range(6):
        write_scan(folder, str(number), seed=number, levels=("L1", "L2"))
    write_mask(folder, "again", np.ones(GRID.shape_zyx, dtype=np.uint8))
    (folder / "notes.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom study in DICOM: folder `study` with its SEG in it, and a second reader's SEG in `readers`."""
    folder = tmp_path_factory.mktemp("dicom")
    patient = draw_patient(seed=3, index=0, fractures=1)
    rendered = render(patient, readers=2, half_width_mm=30)
    written = write_dicom(
        patient, folder / "study", volume=rendered.volume, masks=rendered.masks, others=folder / "readers"
    )
    assert written.segmentation is not None
    written.segmentation.rename(folder / "study" / "SEG")
    written.other_segmentations[0].rename(folder / "readers" / "SEG2")
    return folder


SAME_PATIENT = {"patient": "P0", "levels": "L2", "age": "60", "sex": "M"}
"""For a row of another vertebra of patient 0."""


def read(folder: Path, *lines: str, **changes: Any) -> tuple[Any, PairJudge]:
    csv = write_cohort(folder, lines)
    chosen = training_settings(**changes)
    return read_rows_with_files(csv, settings=chosen, roi=chosen.roi, fitting=False)


def faults(folder: Path, *lines: str, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(CohortError) as caught:
        read(folder, *lines, **changes)
    return caught.value.faults


def images(folder: Path, *lines: str) -> list[CohortImage]:
    rows, judge = read(folder, *lines)
    return list(images_of(rows, judge, columns=("mask", "mask2", "mask3")))


def test_the_columns_are_those_of_the_csv_of_pairs_and_a_phantom_cohort_has_all() -> None:
    assert pairs_csv.COLUMNS == cohort_file.PAIR_COLUMNS
    assert set(WRITTEN) == set(cohort_file.COLUMNS) - {"level", "mask_source"}  # readers drew a phantom cohort's masks


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image": "none.nii.gz"}, "line 4, image: 'none.nii.gz' does not exist"),
        ({"mask": "none.nii.gz"}, "line 4, mask: 'none.nii.gz' does not exist"),
        ({"mask2": "none.nii.gz"}, "line 4, mask2: 'none.nii.gz' does not exist"),
        ({"mask": "notes.txt"}, "line 4, mask: 'notes.txt' is not a NIfTI file, nor a DICOM SEG or RTSTRUCT"),
        (
            {"labels": ""},
            "line 4, labels: is empty: say totalseg, verse, or a JSON file (here, or for all by --labels)",
        ),
        ({"roi": ""}, "line 4, roi: is empty: say what the mask holds, body or vertebra"),
        (
            {"roi": "vertebra"},
            "line 4, roi: the mask holds whole vertebrae, the settings train on bodies: give a body mask to",
        ),
        ({"mask2": "2-mask.nii.gz"}, "line 4, mask2: is the same as mask: a repeated reading is another file"),
        ({"mask3": "copy.nii.gz"}, "line 4, mask3: is the same as mask: a repeated reading is another file"),
    ],
)
def test_a_fault_of_a_file_has_its_line_and_column(
    scans: Path, tmp_path: Path, change: dict[str, str], sentence: str
) -> None:
    folder = Path(shutil.copytree(scans, tmp_path / "scans"))
    shutil.copy(folder / "2-mask.nii.gz", folder / "copy.nii.gz")

    (found,) = faults(folder, row(0), row(1), row(2, **change))
    assert found.startswith(sentence)


def test_faults_of_files_and_of_values_are_told_together(scans: Path) -> None:
    found = faults(scans, row(0, image="none.nii.gz", age="200"), row(1, sex="?", mask3="no.nii"), row(2, acute="3"))

    assert found == (
        "line 2, age: '200' is no age in whole years from 0 to 120",
        "line 2, image: 'none.nii.gz' does not exist",
        "line 3, mask3: 'no.nii' does not exist",
        "line 3, sex: '?' is neither F nor M",
        "line 4, acute: '3' is neither 1 (acute) nor 0 (chronic)",
    )


def test_the_same_image_under_two_ids_is_refused(scans: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scans, tmp_path / "scans"))
    shutil.copy(folder / "1.nii.gz", folder / "copy.nii.gz")

    other = faults(folder, row(0), row(1), row(7, image="copy.nii.gz", mask="2-mask.nii.gz"))
    same = faults(folder, row(0), row(1), row(1, image="copy.nii.gz", mask="2-mask.nii.gz", levels="L2"))

    assert other == ("line 4, image: holds the same files as another patient's image in line 3",)
    assert same == ("line 4, image: holds the same files as the image in line 3",)


def test_the_same_dicom_series_in_two_folders_is_refused(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study, tmp_path / "a")
    shutil.copytree(study / "study", tmp_path / "b")
    (tmp_path / "b" / "SEG").unlink()
    dicom = {"labels": "", "levels": "L1"}
    first = row(1, image="a/study", mask="a/study/SEG", **dicom)

    found = faults(tmp_path, first, row(2, image="b", mask="a/readers/SEG2", **dicom))

    assert found == ("line 3, image: holds the same files as another patient's image in line 2",)


def test_rows_of_one_image_must_have_masks_of_one_kind(scans: Path) -> None:
    found = faults(
        scans,
        row(0),
        row(1, roi="vertebra", body="", levels="L1"),
        row(1, roi="body", levels="L2", mask="again.nii.gz"),
        roi="vertebra",
    )

    assert "line 4, roi: differs in kind from line 3, which names the same image" in found


def test_rows_of_an_image_are_read_once_with_all_levels_of_their_mask(scans: Path) -> None:
    found = images(scans, row(0), row(1), row(1, levels="L2"), row(2, mask2="again.nii.gz"))

    assert [(image.column, len(image.rows), sorted(image.levels)) for image in found] == [
        ("mask", 1, ["L1"]),
        ("mask", 2, ["L1", "L2"]),
        ("mask", 1, ["L1"]),
        ("mask2", 1, ["L1"]),
    ]
    assert [len(image.pair.masks) for image in found] == [1, 1, 1, 1]
    assert all(mask.levels == () for image in found for mask in image.pair.masks)
    assert found[1].pair.demographics.age_years == 61
    assert found[3].pair.masks[0].masks[0].name == "again.nii.gz"


def test_an_image_is_named_anew_when_a_file_or_a_value_changes(scans: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scans, tmp_path / "scans"))
    lines = row(0), row(1)

    before = [image.content for image in images(folder, *lines)]
    same = [image.content for image in images(folder, *lines)]
    older = [image.content for image in images(folder, row(0), row(1, age="80"))]
    write_scan(folder, "0", seed=99)
    other = [image.content for image in images(folder, *lines)]

    assert before == same
    assert (older[0] == before[0], older[1] != before[1]) == (True, True)
    assert (other[0] != before[0], other[1] == before[1]) == (True, True)


def test_a_dicom_mask_needs_neither_labels_nor_roi_but_an_image_in_dicom(study: Path, scans: Path) -> None:
    dicom = {"image": "study", "mask": "study/SEG", "labels": "", "roi": ""}
    (study / "1.nii.gz").write_bytes((scans / "1.nii.gz").read_bytes())

    rows, judge = read(
        study, row(0, **dicom), row(1, **{**dicom, "patient": "P0", "levels": "L2", "age": "60", "sex": "M"})
    )
    refused = faults(study, row(0, **dicom), row(1, mask="study/SEG"), row(2, **dicom))

    (image,) = images_of(rows, judge, columns=("mask",))
    assert image.pair.masks[0].dicom
    assert "line 3, mask: is DICOM, the image is not: give a NIfTI mask" in refused


def test_a_dicom_mask_gives_the_mask_that_a_sweep_would_take(study: Path) -> None:
    from services.dicom_ingest.folder import read_one_series, scan_folder
    from services.dicom_ingest.folder_source import FolderSource
    from services.dicom_ingest.pairs_csv import collect_pair
    from services.dicom_ingest.settings import IngestSettings

    dicom = {"image": "study", "mask": "study/SEG", "labels": "", "roi": ""}
    rows, judge = read(
        study, row(0, **dicom), row(1, **{**dicom, "patient": "P0", "levels": "L2", "age": "60", "sex": "M"})
    )
    (image,) = images_of(rows, judge, columns=("mask",))
    swept = next(iter(FolderSource(scan_folder(study / "study"), IngestSettings()).studies()))

    ours = collect_pair(image.pair, read_folder=read_one_series)

    (theirs,) = swept.series
    assert ours.mask is not None
    assert theirs.mask is not None
    assert np.array_equal(ours.mask.labels.voxels, theirs.mask.labels.voxels)
    assert (ours.mask.levels, ours.mask.roi_kind) == (theirs.mask.levels, theirs.mask.roi_kind)


def test_an_image_named_as_its_own_mask_is_a_fault_of_its_row_alone(study: Path) -> None:
    from services.dicom_ingest.folder import read_one_series
    from services.dicom_ingest.pairs_csv import collect_pair

    first = next(path for path in sorted((study / "study").iterdir()) if path.name != "SEG")
    dicom = {"image": "study", "mask": f"study/{first.name}", "labels": "", "roi": ""}
    rows, judge = read(
        study, row(0, **dicom), row(1, **{**dicom, "patient": "P0", "levels": "L2", "age": "60", "sex": "M"})
    )
    (image,) = images_of(rows, judge, columns=("mask",))

    series = collect_pair(image.pair, read_folder=read_one_series)

    assert series.mask is None
    assert series.mask_faults == ("the mask is an image, neither DICOM SEG nor RTSTRUCT",)


CELL = st.sampled_from(
    ["", "0.nii.gz", "1.nii.gz", "0-mask.nii.gz", "notes.txt", "..", "/", "\x01", "verse", "body", "a;b"]
)


@given(lines=st.lists(st.lists(CELL, min_size=1, max_size=13).map(",".join), max_size=4), good=st.booleans())
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_any_rows_are_a_table_or_faults(scans: Path, lines: list[str], good: bool) -> None:
    text = "\n".join([HEADER, *([row(0), row(1)] if good else []), *lines])
    judge = PairJudge(base=scans, roi="body")

    try:
        rows = parse_cohort(text, settings=training_settings(), judge_files=judge, fitting=False)
    except CohortError as error:
        told = error.faults
    else:
        told = tuple(image.content for image in images_of(rows, judge, columns=("mask",)))

    assert told
