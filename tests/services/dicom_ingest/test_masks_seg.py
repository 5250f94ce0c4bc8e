from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from services.dicom_ingest import masks_seg
from services.dicom_ingest.folder import read_one_series
from services.dicom_ingest.headers import quiet_pydicom
from services.dicom_ingest.level_masks import MaskRefused, ReadMask
from services.dicom_ingest.level_names import NamedLevel
from services.dicom_ingest.masks_seg import read_seg, seg_masks, segments_of
from shared.fracture.uids import OUR_MANUFACTURER
from shared.fracture.volume import Geometry
from tests.fixtures.mask_objects import FRAME_OF_REFERENCE, Frame, axial_frames, grid, save, seg, segment

GRID = grid(turned_degrees=7.0)
L1_BODY = ("61032001", "SCT", "Structure of body of first lumbar vertebra")
L2_WHOLE = ("14293000", "SCT", "L2 vertebra")


def block(low: int, high: int) -> np.ndarray[Any, Any]:
    voxels = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    voxels[low:high, 2:6, 1:5] = 1
    voxels[low, 2, 1] = 0
    return voxels


def on_grid(mask: ReadMask, level: str, geometry: Geometry = GRID) -> np.ndarray[Any, Any]:
    voxels = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    one = next(one for one in mask.levels if one.level == level)
    voxels[one.box][one.voxels] = 1
    return voxels


def read(ds: pydicom.Dataset) -> ReadMask:
    return seg_masks(ds, GRID, frame_of_reference_uid=FRAME_OF_REFERENCE)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(5)))
def test_frames_are_placed_by_position_whatever_their_order(order: list[int]) -> None:
    frames = [*axial_frames(1, block(1, 3), GRID), *axial_frames(2, block(3, 6), GRID)]
    ds = seg([frames[n] for n in order], [segment(1, type_code=L1_BODY), segment(2, label="L2 body")])

    mask = read(ds)

    assert np.array_equal(on_grid(mask, "L1"), block(1, 3))
    assert np.array_equal(on_grid(mask, "L2"), block(3, 6))
    assert {one.kind for one in mask.levels} == {"body"}


@pytest.mark.parametrize(("rows", "columns"), [(True, False), (False, True), (True, True)])
def test_frames_that_run_the_other_way_are_turned_back(rows: bool, columns: bool) -> None:
    frames = []
    for frame in axial_frames(1, block(1, 4), GRID):
        pixels, orientation, position = frame.pixels, np.array(frame.orientation), np.array(frame.position_xyz)
        if rows:
            position = position + orientation[3:] * frame.spacing[0] * (pixels.shape[0] - 1)
            orientation[3:] *= -1
            pixels = pixels[::-1]
        if columns:
            position = position + orientation[:3] * frame.spacing[1] * (pixels.shape[1] - 1)
            orientation[:3] *= -1
            pixels = pixels[:, ::-1]
        frames.append(Frame(1, position.tolist(), orientation.tolist(), frame.spacing, pixels))

    mask = read(seg(frames, [segment(1, type_code=L1_BODY)]))

    assert np.array_equal(on_grid(mask, "L1"), block(1, 4))


def test_sagittal_frames_on_the_same_voxel_centres_are_legal() -> None:
    direction = np.asarray(GRID.direction_zyx)
    frames = []
    for i in range(1, 5):
        position = GRID.world_zyx(np.array([[0.0, 0.0, float(i)]]))[0][::-1]
        orientation = [*direction[::-1, 1], *direction[::-1, 0]]
        spacing = (GRID.spacing_zyx[0], GRID.spacing_zyx[1])
        frames.append(Frame(1, position.tolist(), orientation, spacing, block(1, 4)[:, :, i]))

    mask = read(seg(frames, [segment(1, type_code=L1_BODY)]))

    assert np.array_equal(on_grid(mask, "L1"), block(1, 4))


def test_fractional_pixels_count_from_one_half_on() -> None:
    values = (block(1, 3) * 128).astype(np.uint8)
    values[2] = np.where(values[2] > 0, 127, 0)
    ds = seg(axial_frames(1, values, GRID), [segment(1, type_code=L1_BODY)], kind="FRACTIONAL")

    mask = read(ds)

    assert np.array_equal(on_grid(mask, "L1"), block(1, 2))


def test_the_pixels_of_a_label_map_are_its_segments() -> None:
    values = block(1, 3) * 1 + block(3, 5) * 7
    ds = seg(
        axial_frames(0, values, GRID),
        [segment(0, label="Background"), segment(1, type_code=L1_BODY), segment(7, type_code=L2_WHOLE)],
        kind="LABELMAP",
    )

    mask = read(ds)

    assert np.array_equal(on_grid(mask, "L1"), block(1, 3))
    assert np.array_equal(on_grid(mask, "L2"), block(3, 5))
    assert mask.ignored_labels == 0


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (segment(1, type_code=L1_BODY), NamedLevel(level="L1", kind="body")),
        (segment(1, type_code=L2_WHOLE), NamedLevel(level="L2", kind="vertebra")),
        (segment(1, type_code=L2_WHOLE, label="L2 body"), NamedLevel(level="L2", kind="body")),
        (segment(1, type_code=("T-117C0", "SRT", "T12 vertebra")), NamedLevel(level="T12", kind="vertebra")),
        (
            segment(1, type_code=("3572006", "SCT", "Body of vertebra"), region=L2_WHOLE),
            NamedLevel(level="L2", kind="body"),
        ),
        (segment(1, type_code=("51282000", "SCT", "Vertebra"), label="L3"), NamedLevel(level="L3", kind=None)),
        (segment(1, label="vertebrae_L4"), NamedLevel(level="L4", kind=None)),
        (segment(1, type_code=("V1", "99LOCAL", "L5 vertebra")), NamedLevel(level="L5", kind=None)),
        (segment(1, type_code=("108369006", "SCT", "Neoplasm"), region=L2_WHOLE), None),
        (segment(1, type_code=("10200004", "SCT", "Liver"), label="Liver"), None),
    ],
)
def test_a_segments_level_comes_from_its_codes_else_from_its_label(
    item: pydicom.Dataset, expected: NamedLevel | None
) -> None:
    ds = seg(axial_frames(1, block(1, 3), GRID), [item])

    assert segments_of(ds)[0].level == expected


def test_a_doubtful_segment_is_named_by_its_number_and_never_by_its_text() -> None:
    items = [
        segment(1, type_code=L1_BODY, label="L2"),
        segment(2, type_code=("51282000", "SCT", "Vertebra"), label="SENTINEL"),
    ]

    mask = read(seg(axial_frames(1, block(1, 3), GRID), items))

    assert not mask.levels
    assert len(mask.unknown_labels) == 2
    assert "segment 1 (its code and its label" in mask.unknown_labels[0]
    assert "SENTINEL" not in str(mask)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ds: setattr(ds, "FrameOfReferenceUID", "1.2.3"), "another frame of reference"),
        (lambda ds: setattr(ds, "FrameOfReferenceUID", ""), "another frame of reference"),
        (lambda ds: delattr(ds, "PixelData"), "no pixel data"),
        (lambda ds: setattr(ds, "PixelData", b"\0\0"), "truncated"),
        (lambda ds: setattr(ds, "Rows", 60000), "another geometry"),
        (lambda ds: setattr(ds, "NumberOfFrames", 9), "does not describe each of its frames"),
        (lambda ds: setattr(ds, "SegmentationType", "OTHER"), "neither BINARY"),
        (lambda ds: setattr(ds, "SegmentSequence", []), "no segments"),
        (lambda ds: setattr(ds.file_meta, "TransferSyntaxUID", "1.2.840.10008.1.2.8.1"), "Deflated Image Frame"),
        (lambda ds: delattr(ds.PerFrameFunctionalGroupsSequence[0], "PlanePositionSequence"), "is missing"),
        (
            lambda ds: delattr(ds.PerFrameFunctionalGroupsSequence[0].PixelMeasuresSequence[0], "PixelSpacing"),
            "damaged",
        ),
    ],
)
def test_a_broken_or_foreign_seg_is_refused_with_its_reason(change: Any, reason: str) -> None:
    ds = seg(axial_frames(1, block(1, 3), GRID), [segment(1, type_code=L1_BODY)])
    change(ds)

    with pytest.raises(MaskRefused, match=reason):
        read(ds)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (grid(spacing=(2.5, 0.9, 0.7), turned_degrees=7.0), "pixels of 0.9 × 0.7 mm"),
        (grid(turned_degrees=12.0), "turned against"),
        (grid(spacing=(2.0, 0.8, 0.7), turned_degrees=7.0), "mm beside the volume's voxels"),
        (grid(origin=(-120.5, -33.0, 17.5), turned_degrees=7.0), "mm beside the volume's voxels"),
    ],
)
def test_a_seg_in_another_geometry_says_what_differs(other: Geometry, reason: str) -> None:
    ds = seg(axial_frames(1, block(1, 3), other), [segment(1, type_code=L1_BODY)])

    with pytest.raises(MaskRefused, match=f"another geometry: .*{reason}"):
        read(ds)


def test_a_seg_that_reaches_beyond_the_volume_is_refused() -> None:
    longer = Geometry(
        shape_zyx=(9, 9, 8),
        spacing_zyx=GRID.spacing_zyx,
        origin_zyx=GRID.origin_zyx,
        direction_zyx=GRID.direction_zyx,
    )
    voxels = np.zeros(longer.shape_zyx, np.uint8)
    voxels[5:8, 3, 3] = 1

    with pytest.raises(MaskRefused, match="reaches beyond the volume"):
        read(seg(axial_frames(1, voxels, longer), [segment(1, type_code=L1_BODY)]))


def test_empty_segments_are_warned_of_and_an_empty_seg_refused() -> None:
    frames = axial_frames(1, block(1, 3), GRID)
    items = [segment(1, type_code=L1_BODY), segment(2, type_code=L2_WHOLE)]
    nothing = Frame(1, frames[0].position_xyz, frames[0].orientation, frames[0].spacing, frames[0].pixels * 0)

    mask = read(seg(frames, items))

    assert [w.code for w in mask.warnings] == ["empty-segments"]
    with pytest.raises(MaskRefused, match="the mask is empty"):
        read(seg([nothing], items))


def test_a_file_of_ours_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    ds = seg(axial_frames(1, block(1, 3), GRID), [segment(1, type_code=L1_BODY)])
    good = save(ds, tmp_path / "good.dcm")
    ds.Manufacturer = OUR_MANUFACTURER
    ours = save(ds, tmp_path / "ours.dcm")
    (tmp_path / "junk.dcm").write_bytes(b"junk")

    assert read_seg(good, GRID, frame_of_reference_uid=FRAME_OF_REFERENCE).levels
    with pytest.raises(MaskRefused, match="made by this pipeline"):
        read_seg(ours, GRID, frame_of_reference_uid=FRAME_OF_REFERENCE)
    with pytest.raises(MaskRefused, match="cannot be read"):
        read_seg(tmp_path / "junk.dcm", GRID, frame_of_reference_uid=FRAME_OF_REFERENCE)


def _as_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the segments of public SEGs, which are no vertebrae, pass as L1, L2, … so that their voxels are read."""

    def level(item: pydicom.Dataset) -> tuple[NamedLevel, str]:
        return NamedLevel(level=f"L{item.SegmentNumber}", kind="body"), ""

    monkeypatch.setattr(masks_seg, "_level_of", level)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["liver", "partial_overlaps"])
def test_dcmqis_segs_hold_the_voxels_of_their_nrrd_truth(
    shared_data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared_data / "dcmqi-seg-sr" / "segmentations"
    series = read_one_series(folder / "ct-3slice")
    assert series.volume is not None
    with pytest.raises(StopIteration):
        next(iter(_read(folder / f"{name}.dcm", series).levels))
    _as_levels(monkeypatch)

    mask = _read(folder / f"{name}.dcm", series)

    truth = ["liver_seg"] if name == "liver" else [f"partial_overlaps-{n}" for n in (1, 2, 3)]
    found = 0
    for file in truth:
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{file}.nrrd")))
        for value in np.unique(values[values > 0]):
            voxels = on_grid(mask, f"L{value}", series.volume.geometry)
            assert np.array_equal(voxels, values == value)
            found += 1
    assert found == len(mask.levels)


def _read(path: Path, series: Any) -> ReadMask:
    return read_seg(path, series.volume.geometry, frame_of_reference_uid=series.frame_of_reference_uid)


@pytest.mark.shared_data
@pytest.mark.parametrize("encoding", ["expb", "j2k", "nonbyte_aligned", "nonbyte_aligned_j2k"])
def test_one_seg_in_several_encodings_has_the_same_voxels(
    shared_data: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = read_one_series(shared_data / "dcmqi-seg-sr" / "segmentations" / "ct-3slice")
    _as_levels(monkeypatch)

    mask = _read(shared_data / "pydicom-odd" / f"liver_{encoding}.dcm", series)

    assert [int(one.voxels.sum()) for one in mask.levels] == [107098]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("encoding", "reason"), [("deflate", "Deflated Image Frame"), ("rle", "RLE"), ("1frame", "each of its frames")]
)
def test_what_cannot_be_decoded_is_refused_by_name(
    shared_data: Path, encoding: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = read_one_series(shared_data / "dcmqi-seg-sr" / "segmentations" / "ct-3slice")
    _as_levels(monkeypatch)

    with pytest.raises(MaskRefused, match=reason):
        _read(shared_data / "pydicom-odd" / f"liver_{encoding}.dcm", series)


@pytest.mark.shared_data
def test_public_segs_without_vertebrae_are_read_and_counted(shared_data: Path) -> None:
    paths = [
        *sorted((shared_data / "highdicom-seg-sr").glob("seg_*.dcm")),
        *sorted((shared_data / "dcmqi-seg-sr" / "segmentations").glob("*.dcm")),
    ]

    for path in paths:
        with quiet_pydicom():
            frame = str(pydicom.dcmread(path, stop_before_pixels=True).FrameOfReferenceUID)
        mask = read_seg(path, GRID, frame_of_reference_uid=frame)
        assert not mask.levels
        assert mask.ignored_labels + len(mask.unknown_labels) > 0
    assert len(paths) == 9
