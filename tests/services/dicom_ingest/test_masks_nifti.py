from __future__ import annotations

import gzip
import itertools
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from services.dicom_ingest.folder import read_one_series
from services.dicom_ingest.label_maps import TOTALSEG_MAP, VERSE_MAP
from services.dicom_ingest.masks_nifti import (
    NiftiRefused,
    content_sha256,
    index_map,
    read_header,
    read_label_values,
    read_nifti_mask,
    read_nifti_volume,
)
from shared.fracture.volume import Geometry
from tests.fixtures.mask_objects import grid, write_nifti

GRID = grid(turned_degrees=11.0)


def labels() -> np.ndarray[Any, Any]:
    voxels = np.zeros(GRID.shape_zyx, dtype=np.uint8)
    voxels[1:3, 2:5, 1:4] = 31
    voxels[3:5, 2:6, 1:5] = 30
    voxels[0, 0, 0] = 5
    return voxels


def rearranged(
    voxels: np.ndarray[Any, Any], geometry: Geometry, order: tuple[int, ...], flips: tuple[bool, ...]
) -> tuple[np.ndarray[Any, Any], Geometry]:
    """The same voxels at the same places, stored with other axes."""
    direction = np.asarray(geometry.direction_zyx)[:, list(order)] * np.where(flips, -1.0, 1.0)
    shape = [geometry.shape_zyx[axis] for axis in order]
    spacing = [geometry.spacing_zyx[axis] for axis in order]
    corner = np.zeros(3)
    for axis, flip in zip(order, flips, strict=True):
        corner[axis] = geometry.shape_zyx[axis] - 1 if flip else 0
    origin = geometry.world_zyx(corner[None])[0]
    stored = np.transpose(voxels, order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    moved = Geometry(
        shape_zyx=tuple(shape),  # type: ignore[arg-type]
        spacing_zyx=tuple(spacing),  # type: ignore[arg-type]
        origin_zyx=tuple(float(v) for v in origin),  # type: ignore[arg-type]
        direction_zyx=tuple(tuple(float(v) for v in row) for row in direction),  # type: ignore[arg-type]
    )
    return stored, moved


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_mask_with_permuted_and_flipped_axes_lands_on_the_volumes_grid(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    for n, flips in enumerate(itertools.product([False, True], repeat=3)):
        stored, geometry = rearranged(labels(), GRID, order, flips)
        path = write_nifti(tmp_path / f"{n}.nii.gz", stored, geometry)

        values, warnings = read_label_values(path, GRID)

        assert np.array_equal(values, labels())
        assert not warnings


def test_levels_are_named_others_counted_and_boxes_kept(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "m.nii", labels(), GRID)

    mask = read_nifti_mask(path, GRID, label_map=TOTALSEG_MAP, roi="vertebra")

    assert {one.level: int(one.voxels.sum()) for one in mask.levels} == {"L1": 18, "L2": 32}
    assert {one.level: one.start_zyx for one in mask.levels} == {"L1": (1, 2, 1), "L2": (3, 2, 1)}
    assert mask.ignored_labels == 1


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (grid(shape=(6, 9, 9), turned_degrees=11.0), "6 × 9 × 9 voxels"),
        (grid(spacing=(2.5, 0.8, 0.75), turned_degrees=11.0), "voxels of 2.5 × 0.8 × 0.75 mm"),
        (grid(origin=(-120.5, -33.0, 17.5), turned_degrees=11.0), "it lies up to 0.25 mm beside"),
        (grid(turned_degrees=0.0), "it lies up to"),
    ],
)
def test_another_geometry_is_refused_with_what_differs(tmp_path: Path, other: Geometry, reason: str) -> None:
    path = write_nifti(tmp_path / "m.nii.gz", np.ones(other.shape_zyx, dtype=np.uint8), other)

    with pytest.raises(NiftiRefused, match="a mask in another geometry: ") as caught:
        read_label_values(path, GRID)

    assert reason in str(caught.value)


def test_rounded_headers_are_the_same_geometry(tmp_path: Path) -> None:
    rounded = grid(spacing=(2.5, 0.8004, 0.7), origin=(-120.52, -33.0, 17.25), turned_degrees=11.0)
    path = write_nifti(tmp_path / "m.nii.gz", labels(), rounded)

    assert index_map(read_header(path), GRID) == ((0, 1, 2), (False, False, False))


@pytest.mark.parametrize(
    ("voxels", "reason"),
    [
        (np.zeros(GRID.shape_zyx, np.uint8), "the mask is empty"),
        (np.full(GRID.shape_zyx, -1, np.int16), "negative"),
        (np.full(GRID.shape_zyx, 1.5, np.float32), "no whole numbers"),
        (np.full(GRID.shape_zyx, np.nan, np.float32), "NaN"),
        (np.full(GRID.shape_zyx, np.inf, np.float32), "no whole numbers"),
        (np.full(GRID.shape_zyx, 70000, np.int32), "above 65535"),
        (np.full((2, *GRID.shape_zyx), 1, np.uint8), "4 dimensions"),
    ],
)
def test_what_is_no_label_map_is_refused_with_its_reason(
    tmp_path: Path, voxels: np.ndarray[Any, Any], reason: str
) -> None:
    path = write_nifti(tmp_path / "m.nii.gz", voxels, GRID)

    with pytest.raises(NiftiRefused, match=reason):
        read_label_values(path, GRID)


def test_an_image_given_as_a_mask_is_refused_for_its_many_values(tmp_path: Path) -> None:
    big = grid(shape=(10, 10, 10))
    path = write_nifti(tmp_path / "m.nii.gz", np.arange(1000, dtype=np.int16).reshape(10, 10, 10), big)

    with pytest.raises(NiftiRefused, match="999 different values"):
        read_label_values(path, big)


def test_whole_numbers_stored_as_floats_with_a_slope_are_labels(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "m.nii.gz", labels().astype(np.float64), GRID)

    values, _ = read_label_values(path, GRID)

    assert np.array_equal(values, labels())


def test_an_image_becomes_hounsfield_units_in_lps(tmp_path: Path) -> None:
    voxels = np.arange(6 * 9 * 8, dtype=np.int16).reshape(GRID.shape_zyx)
    path = write_nifti(tmp_path / "ct.nii.gz", voxels, GRID)

    volume, warnings = read_nifti_volume(path)

    assert np.array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype == np.int16
    assert volume.geometry.same_grid(GRID, tolerance_mm=1e-3)
    assert not warnings


def test_slope_and_intercept_of_the_header_are_honoured(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4))
    path = tmp_path / "ct.nii"
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<ff", 2.0, -1000.0)
    path.write_bytes(bytes(content))

    volume, _ = read_nifti_volume(path)

    assert sorted(volume.voxels.ravel()) == list(range(-1000, -984, 2))


def test_equal_content_has_one_hash_and_another_place_another(tmp_path: Path) -> None:
    voxels = np.ones(GRID.shape_zyx, np.int16)
    first, _ = read_nifti_volume(write_nifti(tmp_path / "a.nii", voxels, GRID))
    again, _ = read_nifti_volume(write_nifti(tmp_path / "b.nii.gz", voxels, GRID, descrip=b"SENTINEL"))
    moved, _ = read_nifti_volume(write_nifti(tmp_path / "c.nii", voxels, grid()))

    assert content_sha256(first) == content_sha256(again) != content_sha256(moved)


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_an_image_with_values_that_are_no_hu_is_refused(tmp_path: Path, value: float) -> None:
    voxels = np.zeros(GRID.shape_zyx, np.float32)
    voxels[3, 3, 3] = value

    with pytest.raises(NiftiRefused, match=r"NaN|no HU"):
        read_nifti_volume(write_nifti(tmp_path / "ct.nii.gz", voxels, GRID))


def test_a_sheared_image_is_refused(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[1, 2] = 0.3

    with pytest.raises(NiftiRefused, match="right angles"):
        read_nifti_volume(write_nifti(tmp_path / "ct.nii", np.zeros((3, 3, 3), np.int16), GRID, affine=affine))


def test_a_file_without_a_place_is_refused_and_two_places_are_warned_of(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((3, 3, 3), np.int16), np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "nowhere.nii")
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.diag([2.0, 2, 2, 1]), 1)
    nib.save(image, tmp_path / "two.nii")

    with pytest.raises(NiftiRefused, match="neither qform nor sform"):
        read_nifti_volume(tmp_path / "nowhere.nii")
    assert [w.code for w in read_nifti_volume(tmp_path / "two.nii")[1]] == ["nifti-two-places"]


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "ct.nii", np.zeros((3, 3, 3), np.int16), GRID)
    content = bytearray(path.read_bytes())
    content[40:48] = struct.pack("<4h", 3, 32000, 32000, 32000)
    path.write_bytes(bytes(content))
    smaller = bytearray(content)
    smaller[40:48] = struct.pack("<4h", 3, 900, 900, 900)
    (tmp_path / "gz.nii.gz").write_bytes(gzip.compress(bytes(smaller)))

    with pytest.raises(NiftiRefused, match="more than the 1000000000 allowed"):
        read_nifti_volume(path)
    with pytest.raises(NiftiRefused, match="promises more voxels than the file can hold"):
        read_nifti_volume(tmp_path / "gz.nii.gz")


def test_values_that_would_take_too_much_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.dicom_ingest.masks_nifti.MAX_BYTES", 1000)
    path = write_nifti(tmp_path / "ct.nii.gz", np.zeros((9, 9, 9), np.int16), GRID)

    with pytest.raises(NiftiRefused, match="of memory"):
        read_nifti_volume(path)


def test_files_that_are_broken_or_something_else_are_refused(tmp_path: Path) -> None:
    whole = write_nifti(
        tmp_path / "ok.nii.gz", np.random.default_rng(1).integers(0, 9, (20, 30, 30), dtype=np.int16), grid()
    )
    cases = {
        "cut.nii.gz": whole.read_bytes()[:2000],
        "text.nii": b"this is no image",
        "empty.nii.gz": b"",
        "not_gz.nii.gz": b"\x1f\x8bjunk",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)

        with pytest.raises(NiftiRefused):
            read_nifti_volume(tmp_path / name)
    with pytest.raises(NiftiRefused, match="does not exist"):
        read_nifti_volume(tmp_path / "absent.nii")


@pytest.mark.shared_data
def test_a_mask_flipped_against_its_dicom_series_is_legal(shared_data: Path) -> None:
    folder = shared_data / "totalseg-ct-dicom"
    series = read_one_series(folder / "example_ct_dicom")
    assert series.volume is not None

    mask = read_nifti_mask(
        folder / "example_seg_dicom.nii.gz", series.volume.geometry, label_map=TOTALSEG_MAP, roi="vertebra"
    )

    levels = {one.level: one for one in mask.levels}
    assert set(levels) == {"T11", "T12"}
    bone = [float(series.volume.voxels[one.box][one.voxels].mean()) for one in levels.values()]
    assert min(bone) > 100


@pytest.mark.shared_data
def test_tptbox_axes_and_totalsegs_organs(shared_data: Path) -> None:
    volume, _ = read_nifti_volume(shared_data / "tptbox-l3" / "sub-ct_label-22_ct.nii.gz")
    path = shared_data / "tptbox-l3" / "sub-ct_seg-vert_label-22_msk.nii.gz"
    small, _ = read_nifti_volume(shared_data / "totalseg-example" / "example_ct_sm.nii.gz")

    mask = read_nifti_mask(path, volume.geometry, label_map=VERSE_MAP, roi="vertebra")
    organs = read_nifti_mask(
        shared_data / "totalseg-example" / "example_seg.nii.gz", small.geometry, label_map=TOTALSEG_MAP, roi="vertebra"
    )

    assert sorted(one.level for one in mask.levels) == ["L2", "L3", "L4"]
    assert organs.ignored_labels == 37
    assert not organs.unknown_labels


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("file", "levels"),
    [
        ("verse004/sub-verse004_seg-vert_msk.nii.gz", ["T9", "T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5"]),
        (
            "healthy-ref-mask/healthy_ref_mask.nii.gz",
            ["C7", "T1", "T3", "T4", "T6", "T7", "T8", "T9", "T10", "T11", "T12", "L1", "L2", "L3", "L4", "L5"],
        ),
    ],
)
def test_real_masks_with_gaps_in_their_labels(shared_data: Path, file: str, levels: list[str]) -> None:
    header = read_header(shared_data / file)
    spacing = np.linalg.norm(header.matrix_zyx, axis=0)
    direction = header.matrix_zyx / spacing
    own = Geometry(
        shape_zyx=header.shape_zyx,
        spacing_zyx=tuple(float(v) for v in spacing),  # type: ignore[arg-type]
        origin_zyx=tuple(float(v) for v in header.origin_zyx),  # type: ignore[arg-type]
        direction_zyx=tuple(tuple(float(v) for v in row) for row in direction),  # type: ignore[arg-type]
    )

    mask = read_nifti_mask(shared_data / file, own, label_map=VERSE_MAP, roi="vertebra")

    assert sorted(one.level for one in mask.levels) == sorted(levels)
    assert not mask.unknown_labels
