"""The network's picture: slice, box, resampling and orientation, against PIL, torch's rule and numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from shared.fracture.sagittal import OUTSIDE_HU, SagittalBox, resize, sagittal_box, sagittal_hu, sagittal_image
from shared.fracture.volume import Geometry, Mask, Volume

UPRIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def _geometry(shape: tuple[int, int, int]) -> Geometry:
    return Geometry(shape_zyx=shape, spacing_zyx=(1.0, 1.0, 1.0), origin_zyx=(0.0, 0.0, 0.0), direction_zyx=UPRIGHT)


def _crop(shape: tuple[int, int, int], inside: tuple[slice, slice, slice]) -> tuple[Volume, Mask]:
    voxels = np.random.default_rng(0).integers(-250, 1250, size=shape).astype(np.int16)
    mask = np.zeros(shape, dtype=np.uint8)
    mask[inside] = 1
    return Volume(voxels=voxels, geometry=_geometry(shape)), Mask(voxels=mask, geometry=_geometry(shape))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(0, 1000))
def test_resizing_equals_the_antialiased_bilinear_filter_of_pil(height: int, width: int, seed: int) -> None:
    picture = np.random.default_rng(seed).uniform(-250, 1250, size=(height, width))

    got = resize(picture, size=64)

    expected = np.asarray(Image.fromarray(picture.astype(np.float32)).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_enlarging_a_step_gives_the_numbers_made_by_hand() -> None:
    picture = np.array([[0.0, 100.0], [0.0, 100.0]])

    got = resize(picture, size=4)

    # half-pixel centres: targets lie at -0.25, 0.25, 0.75, 1.25 of the source's pixel centres, edges are repeated
    np.testing.assert_allclose(got, [[0.0, 25.0, 75.0, 100.0]] * 4)


def test_shrinking_takes_every_source_pixel_into_account() -> None:
    picture = np.array([[0.0, 0.0, 80.0, 0.0]] * 4)

    got = resize(picture, size=2)

    # step 2, triangle of half-width 2 about 1.0 and 3.0: weights 0.75 0.75 0.25 and 0.25 0.75 0.75, over 1.75
    np.testing.assert_allclose(got, [[80 * 0.25 / 1.75, 80 * 0.75 / 1.75]] * 2)


def test_the_golden_picture_has_not_changed() -> None:
    z, y, _ = np.meshgrid(np.arange(6), np.arange(5), np.arange(3), indexing="ij")
    voxels = (100 * z + 10 * y).astype(np.int16)
    mask = np.zeros((6, 5, 3), dtype=np.uint8)
    mask[1:5, 0:4, 1] = 1

    got = sagittal_image(
        Volume(voxels=voxels, geometry=_geometry((6, 5, 3))),
        Mask(voxels=mask, geometry=_geometry((6, 5, 3))),
        box="tight",
        box_margin_mm=0.0,
        size=4,
    )

    # rows are z = 4, 3, 2, 1 and columns y = 0, 1, 2, 3: mean 265, variance 12500 + 125
    rows = np.array([[400.0], [300.0], [200.0], [100.0]]) + np.array([[0.0, 10.0, 20.0, 30.0]])
    np.testing.assert_array_equal(got, ((rows - 265.0) / np.sqrt(12625.0)).astype(np.float32))


def test_superior_is_up_and_anterior_is_left() -> None:
    image, mask = _crop((8, 6, 3), (slice(2, 6), slice(1, 5), slice(0, 3)))

    picture = sagittal_hu(image, sagittal_box(mask, box="tight", box_margin_mm=0.0))

    assert picture[0, 0] == image.voxels[5, 1, 1]
    assert picture[-1, -1] == image.voxels[2, 4, 1]


def test_the_slice_of_largest_area_is_taken() -> None:
    image, mask = _crop((10, 10, 7), (slice(3, 5), slice(3, 5), slice(1, 7)))
    mask.voxels[2:8, 2:8, 5] = 1

    place = sagittal_box(mask, box="tight", box_margin_mm=0.0)

    assert place == SagittalBox(x=5, z_start=2, z_stop=8, y_start=2, y_stop=8)
    assert sagittal_hu(image, place).shape == (6, 6)


def test_of_equal_slices_the_one_nearest_the_centroid_is_taken() -> None:
    _, mask = _crop((6, 6, 11), (slice(1, 4), slice(1, 4), slice(2, 9)))

    assert sagittal_box(mask, box="tight", box_margin_mm=0.0).x == 5


def test_of_two_equally_near_slices_the_lower_index_is_taken() -> None:
    _, mask = _crop((6, 6, 10), (slice(1, 4), slice(1, 4), slice(2, 8)))

    assert sagittal_box(mask, box="tight", box_margin_mm=0.0).x == 4


def test_the_square_box_is_the_longer_side_and_the_margin() -> None:
    _, mask = _crop((60, 80, 3), (slice(20, 40), slice(25, 55), slice(0, 3)))

    place = sagittal_box(mask, box="square", box_margin_mm=10.0)

    assert (place.z_stop - place.z_start, place.y_stop - place.y_start) == (40, 40)
    assert (place.z_start, place.y_start) == (10, 20)


def test_outside_the_scan_lies_the_lower_end_of_the_window() -> None:
    image, mask = _crop((20, 40, 3), (slice(0, 10), slice(10, 40), slice(0, 3)))

    place = sagittal_box(mask, box="square", box_margin_mm=10.0)
    picture = sagittal_hu(image, place)

    assert picture.shape == (40, 40)
    rows_below = -place.z_start
    assert rows_below > 0
    assert (picture[-rows_below:] == OUTSIDE_HU).all()
    assert (picture[:, place.y_stop - place.y_start - 5 :] == OUTSIDE_HU).all()
    row = place.z_stop - 1 - 5
    assert picture[row, -place.y_start if place.y_start < 0 else 0] == image.voxels[5, max(place.y_start, 0), place.x]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_picture_has_mean_nought_and_deviation_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(8, 40, size=3))
    image, mask = _crop((shape[0], shape[1], shape[2]), (slice(2, 7), slice(1, 6), slice(0, 4)))

    picture = sagittal_image(image, mask, box="square", box_margin_mm=10.0)

    assert picture.shape == (64, 64)
    assert picture.dtype == np.float32
    assert float(picture.mean(dtype=np.float64)) == pytest.approx(0.0, abs=1e-6)
    assert float(picture.std(dtype=np.float64)) == pytest.approx(1.0, abs=1e-6)


def test_a_constant_picture_is_refused() -> None:
    shape = (10, 10, 10)
    image = Volume(voxels=np.full(shape, -250, dtype=np.int16), geometry=_geometry(shape))
    _, mask = _crop(shape, (slice(2, 8), slice(2, 8), slice(2, 8)))

    with pytest.raises(ValueError, match="constant"):
        sagittal_image(image, mask, box="square", box_margin_mm=10.0)


def test_an_empty_mask_is_refused() -> None:
    image, mask = _crop((5, 5, 5), (slice(0, 0), slice(0, 0), slice(0, 0)))

    with pytest.raises(ValueError, match="empty"):
        sagittal_image(image, mask, box="tight", box_margin_mm=0.0)


def test_a_mask_on_another_grid_is_refused() -> None:
    image, _ = _crop((5, 5, 5), (slice(1, 4), slice(1, 4), slice(1, 4)))
    _, mask = _crop((5, 5, 6), (slice(1, 4), slice(1, 4), slice(1, 4)))

    with pytest.raises(ValueError, match="one grid"):
        sagittal_image(image, mask, box="tight", box_margin_mm=0.0)


def _turned(direction: NDArray[np.float64]) -> Mask:
    rows = [(float(r[0]), float(r[1]), float(r[2])) for r in direction]
    geometry = Geometry(
        shape_zyx=(5, 5, 5),
        spacing_zyx=(1.0, 1.0, 1.0),
        origin_zyx=(0.0, 0.0, 0.0),
        direction_zyx=(rows[0], rows[1], rows[2]),
    )
    return Mask(voxels=np.ones((5, 5, 5), dtype=np.uint8), geometry=geometry)


def test_a_crop_with_turned_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="LPS"):
        sagittal_box(_turned(np.diag([1.0, -1.0, 1.0])), box="tight", box_margin_mm=0.0)


def test_the_small_rotation_of_an_oblique_scan_is_allowed() -> None:
    cos, sin = np.cos(0.2), np.sin(0.2)

    place = sagittal_box(
        _turned(np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])), box="tight", box_margin_mm=0.0
    )

    assert place.x == 2
