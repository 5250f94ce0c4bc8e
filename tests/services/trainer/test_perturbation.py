from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.perturbation import (
    SHIFT_MM,
    TURN_DEGREES,
    Perturbation,
    draw,
    noise_hu,
    perturbed,
    perturbed_rows,
)
from shared.fracture.volume import Geometry, Mask, Volume

GEOMETRY = Geometry(
    shape_zyx=(24, 30, 30),
    spacing_zyx=(1.0, 1.0, 1.0),
    origin_zyx=(0.0, 0.0, 0.0),
    direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
)
WINDOW = (-250, 1250)
STILL = Perturbation(shift_mm=(0.0, 0.0, 0.0), turn_degrees=0.0, growth=1, noise_seed=1)


def crop() -> tuple[Volume, Mask]:
    voxels = np.full(GEOMETRY.shape_zyx, 200, dtype=np.int16)
    voxels += np.random.default_rng(1).normal(0, 20, voxels.shape).astype(np.int16)
    inside = np.zeros(GEOMETRY.shape_zyx, dtype=np.uint8)
    inside[8:16, 8:20, 9:21] = 1
    return Volume(voxels=voxels, geometry=GEOMETRY), Mask(voxels=inside, geometry=GEOMETRY)


@given(seed=st.integers(0, 500))
def test_a_perturbed_crop_stays_a_crop(seed: int) -> None:
    image, mask = crop()
    change = draw(np.random.default_rng(seed))

    other, drawn = perturbed(image, mask, change, window_hu=WINDOW)

    assert max(map(abs, change.shift_mm)) <= SHIFT_MM
    assert abs(change.turn_degrees) <= TURN_DEGREES
    assert other.geometry.same_grid(image.geometry)
    assert drawn.geometry.same_grid(mask.geometry)
    assert (other.voxels.dtype, drawn.voxels.dtype) == (np.int16, np.uint8)
    assert WINDOW[0] <= other.voxels.min() <= other.voxels.max() <= WINDOW[1]
    assert 0.5 < drawn.voxels.sum() / mask.voxels.sum() < 1.7
    assert not np.array_equal(drawn.voxels, mask.voxels)


def test_the_mask_is_moved_turned_and_grown_as_drawn() -> None:
    image, mask = crop()

    _, moved = perturbed(image, mask, replace(STILL, shift_mm=(1.0, 0.0, -1.0)), window_hu=WINDOW)
    _, grown = perturbed(image, mask, STILL, window_hu=WINDOW)
    _, shrunk = perturbed(image, mask, replace(STILL, growth=-1), window_hu=WINDOW)

    def centre(one: Mask) -> np.ndarray:
        return np.argwhere(one.voxels).mean(axis=0)

    assert np.allclose(centre(moved) - centre(grown), [1, 0, -1])
    assert shrunk.voxels.sum() == 6 * 10 * 10
    assert grown.voxels.sum() == 8 * 12 * 12 + 2 * (8 * 12 + 8 * 12 + 12 * 12)


def test_noise_is_as_strong_as_the_image_shows() -> None:
    image, mask = crop()

    other, _ = perturbed(image, mask, STILL, window_hu=WINDOW)

    assert noise_hu(image.voxels) == pytest.approx(20, rel=0.05)
    assert (other.voxels - image.voxels).std() == pytest.approx(noise_hu(image.voxels), rel=0.05)


def test_a_mask_of_which_nothing_stays_is_refused() -> None:
    image, mask = crop()
    thin = np.zeros_like(mask.voxels)
    thin[10, 10, 10] = 1

    with pytest.raises(ValueError, match="nothing is left"):
        perturbed(image, replace(mask, voxels=thin), replace(STILL, growth=-1), window_hu=WINDOW)


def test_rows_of_as_many_patients_as_there_are_come_first() -> None:
    patient = np.repeat(np.arange(10), 3)
    training = patient < 8

    rows = perturbed_rows(patient, training, count=8, seed=1)

    assert sorted(patient[rows]) == list(range(8))
    assert rows == sorted(rows) == perturbed_rows(patient, training, count=8, seed=1)
    assert rows != perturbed_rows(patient, training, count=8, seed=2)
    assert len(perturbed_rows(patient, training, count=100, seed=1)) == 24
