from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.dicom_ingest.collected import CollectedSeries
from services.dicom_ingest.folder import read_one_series
from services.dicom_ingest.label_maps import TOTALSEG_MAP
from services.dicom_ingest.pairs_csv import PairsError, collect_pair, parse_pairs, read_pairs
from tests.fixtures.mask_objects import grid, write_nifti

GRID = grid()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image, masks of it in TotalSegmentator's labels, and a mask of bodies and discs."""
    rng = np.random.default_rng(3)
    write_nifti(tmp_path / "ct.nii.gz", rng.integers(-100, 900, GRID.shape_zyx).astype(np.int16), GRID)
    labels = np.zeros(GRID.shape_zyx, np.uint8)
    labels[1:3], labels[3:5], labels[0] = 31, 30, 5
    write_nifti(tmp_path / "m.nii.gz", labels, GRID)
    write_nifti(tmp_path / "upper.nii.gz", np.where(labels == 31, 31, 0).astype(np.uint8), GRID)
    write_nifti(tmp_path / "lower.nii.gz", np.where(labels == 30, 30, 0).astype(np.uint8), GRID)
    bodies = np.zeros(GRID.shape_zyx, np.uint8)
    bodies[1:5, :4], bodies[1:5, 4:6] = 1, 2
    write_nifti(tmp_path / "bodies.nii.gz", bodies, GRID)
    return tmp_path


def table(folder: Path, *lines: str, **options: Any) -> Any:
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_pairs(folder / "pairs.csv", **options)


def no_folder(path: Path) -> CollectedSeries:
    raise AssertionError(path)


def test_a_row_becomes_a_volume_with_its_mask_cut_by_bodies(folder: Path) -> None:
    (pair,) = table(
        folder,
        "image,mask,labels,roi,body,body_labels,levels,study,patient,age,sex",
        "ct.nii.gz,m.nii.gz,totalseg,vertebra,bodies.nii.gz,1,L1,S7,P7,93,F",
    )

    series = collect_pair(pair, read_folder=no_folder)

    assert series.mask is not None
    assert series.mask.body is not None
    assert series.volume is not None
    assert (pair.study, pair.patient) == ("S7", "P7")
    assert (series.demographics.age_years, series.demographics.sex) == (90, "F")
    assert list(series.mask.levels) == ["L1"]
    assert series.mask.not_chosen == ("L2",)
    assert series.mask.ignored_labels == 1
    assert int(series.mask.body.voxels.sum()) == 4 * 4 * 8
    assert series.content_sha256
    assert not series.mask_faults
    assert "ct.nii" not in series.description


def test_rows_of_one_image_are_one_series(folder: Path) -> None:
    (pair,) = table(
        folder,
        "image,mask,labels,roi",
        "ct.nii.gz,upper.nii.gz,totalseg,body",
        "./ct.nii.gz,lower.nii.gz,totalseg,body",
    )

    series = collect_pair(pair, read_folder=no_folder)

    assert series.mask is not None
    assert list(series.mask.levels) == ["L1", "L2"]
    assert len(pair.files) == 3


def test_a_list_of_masks_in_one_row_is_merged_and_a_level_twice_refused(folder: Path) -> None:
    (pair,) = table(folder, "image,mask,labels,roi", "ct.nii.gz,upper.nii.gz;m.nii.gz,totalseg,body")

    series = collect_pair(pair, read_folder=no_folder)

    assert series.mask is not None
    assert series.mask.refused == {"L1": "two masks for L1"}
    assert list(series.mask.levels) == ["L2"]


def test_defaults_hold_where_a_row_says_nothing(folder: Path) -> None:
    (pair,) = table(folder, "image,mask", "ct.nii.gz,m.nii.gz", default_labels="totalseg", default_roi="vertebra")

    assert pair.masks[0].labels is TOTALSEG_MAP
    assert pair.masks[0].roi == "vertebra"


def test_a_byte_order_mark_and_quoted_fields_are_read(folder: Path) -> None:
    (folder / "a, b.nii.gz").write_bytes((folder / "ct.nii.gz").read_bytes())
    text = '\ufeffimage,mask,labels,roi\r\n"a, b.nii.gz","m.nii.gz",totalseg,body\r\n\r\n'
    (folder / "pairs.csv").write_text(text, encoding="utf-8", newline="")

    (pair,) = read_pairs(folder / "pairs.csv")

    assert pair.image.name == "a, b.nii.gz"


def test_all_faults_of_the_file_are_told_together_with_line_and_column(folder: Path) -> None:
    with pytest.raises(PairsError) as caught:
        table(
            folder,
            "image,mask,labels,roi,body,body_labels,levels,age,sex",
            "absent.nii,m.nii.gz,totalseg,body,,,,50,F",
            "ct.nii.gz,pairs.csv,none,bodies,,7,L9,121,X",
            "ct.nii.gz,m.nii.gz,,,bodies.nii.gz,x,,1.5,f",
            "ct.nii.gz,m.nii.gz,totalseg,body,bodies.nii.gz,1,,,",
            "ct.nii.gz,m.nii.gz,totalseg,body,,,,,,too,many",
        )

    faults = caught.value.faults
    for start in [
        "line 2, image: 'absent.nii' does not exist",
        "line 3, mask: 'pairs.csv' is not a NIfTI file",
        "line 3, labels: unknown label map 'none'",
        "line 3, roi: 'bodies' is neither",
        "line 3, body_labels: there is no body mask",
        "line 3, levels: 'L9' is no level",
        "line 3, age: '121'",
        "line 3, sex: 'X'",
        "line 4, labels: is empty",
        "line 4, roi: is empty",
        "line 4, body_labels: 'x'",
        "line 4, age: '1.5'",
        "line 4, sex: 'f'",
        "line 5, body: the mask holds bodies already",
        "line 6: 11 fields, the header has 9",
    ]:
        assert any(fault.startswith(start) for fault in faults), start
    assert len(faults) == 15
    assert all(fault in str(caught.value) for fault in faults)


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("imge,mask", "did you mean 'image'"),
        ("image,mask,Roi", "did you mean 'roi'"),
        ("image,mask,zzzz", "known: image, mask"),
        ("image,mask,mask", "column 'mask' stands twice"),
        ("image", "column 'mask' is missing"),
        ("image;mask", "separated by commas"),
        ("image\tmask", "separated by commas"),
        ("image,mask,", "a column without a name"),
    ],
)
def test_a_wrong_header_says_what_is_meant(folder: Path, header: str, fault: str) -> None:
    with pytest.raises(PairsError, match=fault):
        table(folder, header, "ct.nii.gz,m.nii.gz")


def test_what_is_no_table_is_refused_in_one_sentence(folder: Path) -> None:
    for content in [b"", b"\xff\xfe\x00bad", b"image,mask\n", b"a\0b", b'image,mask\n"ct.nii.gz,m.nii.gz\n']:
        (folder / "pairs.csv").write_bytes(content)

        with pytest.raises(PairsError):
            read_pairs(folder / "pairs.csv")
    with pytest.raises(PairsError):
        read_pairs(folder / "absent.csv")


def test_rows_of_one_image_must_agree(folder: Path) -> None:
    with pytest.raises(PairsError) as caught:
        table(
            folder,
            "image,mask,labels,roi,study,patient,age",
            "ct.nii.gz,upper.nii.gz,totalseg,body,S1,P1,50",
            "ct.nii.gz,lower.nii.gz,totalseg,vertebra,S2,P1,51",
        )

    columns = {fault.split(",")[1].split(":")[0].strip() for fault in caught.value.faults}
    assert columns == {"roi", "study", "age"}


@pytest.mark.parametrize(
    ("mask", "options", "reason"),
    [
        (np.zeros(GRID.shape_zyx, np.uint8), "", "the mask is empty"),
        (np.full(GRID.shape_zyx, np.nan, np.float32), "", "NaN"),
        (np.full(GRID.shape_zyx, 250, np.uint8), "", "a mask label without a level: 250"),
        (np.full(GRID.shape_zyx, 5, np.uint8), "", "the mask holds no vertebra"),
        (np.full(GRID.shape_zyx, 31, np.uint8), "L4", "none of the levels"),
        (np.full((3, 3, 3), 31, np.uint8), "", "a mask in another geometry"),
    ],
)
def test_a_mask_that_cannot_be_used_says_why_and_the_image_stays(
    folder: Path, mask: np.ndarray[Any, Any], options: str, reason: str
) -> None:
    write_nifti(folder / "bad.nii.gz", mask, GRID)
    (pair,) = table(folder, "image,mask,labels,roi,levels", f"ct.nii.gz,bad.nii.gz,totalseg,body,{options}")

    series = collect_pair(pair, read_folder=no_folder)

    assert series.volume is not None
    assert series.mask is None
    assert reason in series.mask_faults[0]
    assert "bad.nii" not in str(series.mask_faults)


def test_an_image_that_cannot_be_read_is_a_rejected_series(folder: Path) -> None:
    (folder / "ct.nii.gz").write_bytes((folder / "ct.nii.gz").read_bytes()[:300])
    (pair,) = table(folder, "image,mask,labels,roi", "ct.nii.gz,m.nii.gz,totalseg,body")

    series = collect_pair(pair, read_folder=no_folder)

    assert series.volume is None
    assert "truncated" in series.reasons[0]


def test_body_labels_that_the_body_mask_lacks_are_a_fault(folder: Path) -> None:
    (pair,) = table(
        folder, "image,mask,labels,roi,body,body_labels", "ct.nii.gz,m.nii.gz,totalseg,vertebra,bodies.nii.gz,9"
    )

    series = collect_pair(pair, read_folder=no_folder)

    assert series.mask is None
    assert "body_labels" in series.mask_faults[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=80), st.text(alphabet='image,mask\n";ct.ni', max_size=60)))
def test_any_text_is_read_or_refused_and_never_crashes(text: str, tmp_path: Path) -> None:
    with pytest.raises(PairsError):
        parse_pairs(text, base=tmp_path, default_labels=TOTALSEG_MAP, default_roi="body")


@pytest.mark.shared_data
def test_the_real_pairs_of_the_public_data(shared_data: Path, tmp_path: Path) -> None:
    total, box = shared_data / "totalseg-example", shared_data / "tptbox-l3"
    report = total / "spine_report" / "example_ct_report"
    dicom = shared_data / "totalseg-ct-dicom"
    (tmp_path / "pairs.csv").write_text(
        "image,mask,labels,roi,body,body_labels,levels\n"
        f"{total}/example_ct.nii.gz,{report}/totalseg.nii.gz,totalseg,vertebra,"
        f"{report}/totalseg_vertebrae_body.nii.gz,1,\n"
        f"{box}/sub-ct_label-22_ct.nii.gz,{box}/sub-ct_seg-vert_label-22_msk.nii.gz,verse,vertebra,"
        f"{box}/sub-ct_seg-subreg_label-22_msk.nii.gz,49;50,L3\n"
        f"{dicom}/example_ct_dicom,{dicom}/example_seg_dicom.nii.gz,totalseg,vertebra,,,\n"
    )

    spine, crop, flipped = (
        collect_pair(pair, read_folder=read_one_series) for pair in read_pairs(tmp_path / "pairs.csv")
    )

    assert spine.mask is not None
    assert crop.mask is not None
    assert flipped.mask is not None
    assert list(spine.mask.levels) == ["T11", "T12", "L1", "L2", "L3", "L4", "L5", "S1"]
    assert spine.mask.body is not None
    assert list(crop.mask.levels) == ["L3"]
    assert crop.mask.not_chosen == ("L2", "L4")
    assert list(flipped.mask.levels) == ["T11", "T12"]
    assert not (*spine.mask_faults, *crop.mask_faults, *flipped.mask_faults)
