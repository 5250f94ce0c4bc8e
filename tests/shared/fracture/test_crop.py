from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.fracture.crop import CropError, crop_vertebra, grid_shape_zyx, reoriented, resample_whole
from shared.fracture.protocol import CropProtocol, preset_crop
from shared.fracture.volume import (
    Geometry,
    Mask,
    Volume,
    mask_from_nrrd,
    mask_from_sitk,
    to_nrrd,
    to_sitk,
    volume_from_nrrd,
    volume_from_sitk,
)

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
SMALL = CropProtocol(roi_margin_mm=4.0)

spacings = st.sampled_from([0.7, 0.976562, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0])


def geometry(shape, spacing=(1.0, 1.0, 1.0), *, origin=(-57.25, 31.5, -120.125), direction=IDENTITY):
    return Geometry(shape_zyx=shape, spacing_zyx=spacing, origin_zyx=origin, direction_zyx=direction)


def tilt(degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return ((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0))


@st.composite
def scans(draw):
    """A scan of noise with sharp edges and a box of mask, both anywhere and in any stored order."""
    shape = tuple(draw(st.integers(8, 40)) for _ in range(3))
    spacing = tuple(draw(spacings) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    voxels = rng.integers(-300, 1300, shape).astype(np.int16)
    voxels[: shape[0] // 2, :, : shape[2] // 3] = draw(st.integers(-1000, 1500))
    inside = np.zeros(shape, dtype=bool)
    starts = [draw(st.integers(0, n - 4)) for n in shape]
    inside[tuple(slice(a, a + draw(st.integers(4, 9))) for a in starts)] = True
    grid = geometry(shape, spacing, direction=tilt(draw(st.sampled_from([0.0, 0.0, -7.5, 12.0]))))
    return Volume(voxels=voxels, geometry=grid), Mask(voxels=inside, geometry=grid)


def stored_as(grid, axes, flips):
    """The same physical grid with its axes in another order and direction."""
    corner = np.array([[n - 1 if flip else 0 for n, flip in zip(grid.geometry.shape_zyx, flips, strict=True)]])
    origin = grid.geometry.world_zyx(corner)[0]
    direction = np.asarray(grid.geometry.direction_zyx) * np.where(flips, -1.0, 1.0)
    voxels = grid.voxels[tuple(slice(None, None, -1 if flip else 1) for flip in flips)].transpose(axes)
    turned = Geometry(
        shape_zyx=voxels.shape,
        spacing_zyx=tuple(grid.geometry.spacing_zyx[a] for a in axes),
        origin_zyx=tuple(float(o) for o in origin),
        direction_zyx=tuple(tuple(float(row[a]) for a in axes) for row in direction),
    )
    return replace(grid, voxels=voxels, geometry=turned)


def resampled_by_simpleitk(volume):
    """The whole volume on the 1 mm grid in HU, unrounded, in world coordinates: nothing of our crop in it."""
    image = sitk.Cast(to_sitk(reoriented(volume)), sitk.sitkFloat64)
    size = [int(np.floor((n - 1) * s + 1e-6)) + 1 for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    whole = sitk.Resample(
        image,
        size,
        sitk.Transform(),
        sitk.sitkBSpline,
        image.GetOrigin(),
        (1.0, 1.0, 1.0),
        image.GetDirection(),
        0.0,
        sitk.sitkFloat64,
    )
    return sitk.GetArrayFromImage(whole)


def region_of(crop, volume):
    """Where a crop lies in the whole 1 mm grid."""
    grid = reoriented(volume).geometry
    start = grid.index_zyx(np.array([crop.image.geometry.origin_zyx]))[0] * np.asarray(grid.spacing_zyx)
    assert np.allclose(start, np.round(start), atol=1e-6)
    return tuple(slice(int(a), int(a) + n) for a, n in zip(np.round(start), crop.image.voxels.shape, strict=True))


@settings(max_examples=40, deadline=None)
@given(scans())
def test_a_crop_is_the_same_region_of_the_wholly_resampled_volume(scan):
    volume, roi = scan

    crop = crop_vertebra(volume, roi, SMALL)

    region = region_of(crop, volume)
    expected = resampled_by_simpleitk(volume)[region]
    assert np.array_equal(crop.image.voxels, resample_whole(volume, SMALL).voxels[region])
    assert np.array_equal(crop.image.voxels, np.floor(np.clip(expected, -250, 1250) + 0.5 + 1e-6))


@settings(max_examples=25, deadline=None)
@given(scans(), st.permutations(range(3)), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_the_same_scan_stored_in_another_axis_order_gives_the_same_crop(scan, axes, flips):
    volume, roi = scan

    crop = crop_vertebra(volume, roi, SMALL)
    other = crop_vertebra(stored_as(volume, axes, flips), stored_as(roi, axes, flips), SMALL)

    assert np.array_equal(crop.image.voxels, other.image.voxels)
    assert np.array_equal(crop.mask.voxels, other.mask.voxels)
    assert crop.image.geometry.same_grid(other.image.geometry, tolerance_mm=1e-6)
    assert crop.margins_mm_zyx == other.margins_mm_zyx


@settings(max_examples=25, deadline=None)
@given(scans())
def test_the_mask_is_the_nearest_voxel_of_the_source(scan):
    volume, roi = scan
    image, mask = reoriented(volume), reoriented(roi)

    crop = crop_vertebra(volume, roi, SMALL)

    points = np.argwhere(np.ones(crop.mask.voxels.shape, dtype=bool)).astype(float)
    index = image.geometry.index_zyx(crop.mask.geometry.world_zyx(points))
    tied = (np.abs(index - np.floor(index) - 0.5) < 1e-5).any(axis=1)
    near = np.clip(np.round(index).astype(int), 0, np.asarray(mask.voxels.shape) - 1)
    expected = mask.voxels[tuple(near.T)]
    assert np.array_equal(crop.mask.voxels.ravel()[~tied], expected[~tied])


@settings(max_examples=25, deadline=None)
@given(scans(), st.sampled_from([0.0, 3.0, 10.0]))
def test_every_margin_is_what_was_asked_or_what_the_scan_has(scan, margin):
    volume, roi = scan

    crop = crop_vertebra(volume, roi, CropProtocol(roi_margin_mm=margin))

    whole = grid_shape_zyx(reoriented(volume).geometry, spacing_mm=1.0)
    region = region_of(crop, volume)
    for axis, (before, after) in enumerate(crop.margins_mm_zyx):
        present = np.flatnonzero(crop.mask.voxels.any(axis=tuple(a for a in range(3) if a != axis)))
        assert present[0] == before
        assert crop.mask.voxels.shape[axis] - 1 - present[-1] == after
        assert before == margin or (before < margin and region[axis].start == 0)
        assert after == margin or (after < margin and region[axis].stop == whole[axis])


def test_the_grid_starts_at_the_first_voxel_and_ends_inside_the_scan():
    assert grid_shape_zyx(geometry((8, 11, 4), (0.7, 0.7, 3.0)), spacing_mm=1.0) == (5, 8, 10)
    assert grid_shape_zyx(geometry((11, 2, 1), (0.1, 1.5, 5.0)), spacing_mm=1.0) == (2, 2, 1)


def test_a_crop_is_int16_hu_inside_the_window_and_its_mask_is_0_or_1():
    grid = geometry((30, 30, 30))
    voxels = np.linspace(-2000, 4000, 27000).reshape(grid.shape_zyx)
    inside = np.zeros(grid.shape_zyx, dtype=np.uint16)
    inside[12:18, 12:18, 12:18] = 1

    crop = crop_vertebra(Volume(voxels=voxels, geometry=grid), Mask(voxels=inside, geometry=grid), CropProtocol())

    assert crop.image.voxels.dtype == np.int16
    assert (crop.image.voxels.min(), crop.image.voxels.max()) == (-250, 1250)
    assert crop.mask.voxels.dtype == np.uint8
    assert set(np.unique(crop.mask.voxels)) == {0, 1}


def test_a_scan_that_ends_near_the_region_gives_a_warning_with_the_distance():
    grid = geometry((40, 60, 60))
    inside = np.zeros(grid.shape_zyx, dtype=bool)
    inside[6:20, 20:40, 20:40] = True
    volume = Volume(voxels=np.zeros(grid.shape_zyx, dtype=np.int16), geometry=grid)

    crop = crop_vertebra(volume, Mask(voxels=inside, geometry=grid), preset_crop("recommended"))

    assert crop.margins_mm_zyx == ((6.0, 20.0), (20.0, 20.0), (20.0, 20.0))
    assert [warning.code for warning in crop.warnings] == ["margin"]
    assert "6 mm" in crop.warnings[0].sentence


def test_a_scan_with_room_gives_no_warning():
    grid = geometry((40, 60, 60))
    inside = np.zeros(grid.shape_zyx, dtype=bool)
    inside[12:20, 20:40, 20:40] = True
    volume = Volume(voxels=np.zeros(grid.shape_zyx, dtype=np.int16), geometry=grid)

    crop = crop_vertebra(volume, Mask(voxels=inside, geometry=grid), preset_crop("paper"))

    assert crop.warnings == ()
    assert crop.image.voxels.shape == (28, 40, 40)


def test_a_crop_is_the_same_after_it_was_stored():
    grid = geometry((20, 20, 20), (1.5, 0.8, 0.8), direction=tilt(9.0))
    rng = np.random.default_rng(3)
    inside = np.zeros(grid.shape_zyx, dtype=bool)
    inside[8:12, 8:12, 8:12] = True
    volume = Volume(voxels=rng.integers(-200, 900, grid.shape_zyx).astype(np.int16), geometry=grid)

    crop = crop_vertebra(volume, Mask(voxels=inside, geometry=grid), SMALL)
    image, mask = volume_from_nrrd(to_nrrd(crop.image)), mask_from_nrrd(to_nrrd(crop.mask))

    assert np.array_equal(image.voxels, crop.image.voxels)
    assert image.voxels.dtype == np.int16
    assert np.array_equal(mask.voxels, crop.mask.voxels)
    assert image.geometry.same_grid(crop.image.geometry, tolerance_mm=1e-9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v, m: (v, replace(m, geometry=geometry((12, 12, 12), origin=(0.0, 0.0, 0.0)))), "volume's grid"),
        (lambda v, m: (v, replace(m, voxels=np.zeros((12, 12, 12), dtype=bool))), "empty"),
        (lambda v, m: (replace(v, voxels=np.full((12, 12, 12), np.nan)), m), "not finite"),
    ],
)
def test_what_cannot_be_cropped_is_refused_with_a_reason(change, sentence):
    grid = geometry((12, 12, 12))
    inside = np.zeros(grid.shape_zyx, dtype=bool)
    inside[4:8, 4:8, 4:8] = True
    volume, roi = change(
        Volume(voxels=np.zeros(grid.shape_zyx, dtype=np.int16), geometry=grid), Mask(voxels=inside, geometry=grid)
    )

    with pytest.raises(CropError, match=sentence):
        crop_vertebra(volume, roi, SMALL)


def test_a_scan_of_three_slices_is_refused():
    grid = geometry((3, 12, 12))
    everything = np.ones(grid.shape_zyx, dtype=np.int16)

    with pytest.raises(CropError, match="3 voxels on an axis"):
        crop_vertebra(Volume(voxels=everything, geometry=grid), Mask(voxels=everything, geometry=grid), SMALL)


def test_a_region_between_two_points_of_the_grid_is_refused_as_too_thin():
    grid = geometry((40, 12, 12), (0.3, 1.0, 1.0))
    inside = np.zeros(grid.shape_zyx, dtype=bool)
    inside[5, 4:8, 4:8] = True
    volume = Volume(voxels=np.zeros(grid.shape_zyx, dtype=np.int16), geometry=grid)

    with pytest.raises(CropError, match="too thin"):
        crop_vertebra(volume, Mask(voxels=inside, geometry=grid), SMALL)


@pytest.mark.shared_data
def test_a_real_vertebra_has_no_voxel_that_differs_from_the_wholly_resampled_scan(shared_data):
    folder = shared_data / "tptbox-l3"
    scan = sitk.ReadImage(str(folder / "sub-ct_label-22_ct.nii.gz"))
    volume = volume_from_sitk(scan)
    parts = mask_from_sitk(sitk.ReadImage(str(folder / "sub-ct_seg-subreg_label-22_msk.nii.gz")))
    vertebrae = mask_from_sitk(sitk.ReadImage(str(folder / "sub-ct_seg-vert_label-22_msk.nii.gz")))
    body = replace(parts, voxels=np.isin(parts.voxels, (49, 50)) & (vertebrae.voxels == 22))

    crop = crop_vertebra(volume, body, preset_crop("recommended"))

    expected = resampled_by_simpleitk(volume)[region_of(crop, volume)]
    assert np.array_equal(crop.image.voxels, np.floor(np.clip(expected, -250, 1250) + 0.5))
    assert 0.98 < crop.mask.voxels.sum() / (body.voxels.sum() * 1.5**3) < 1.02
