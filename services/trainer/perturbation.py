"""A crop as another reader, another position and another noise would have made it: repeatability without repeat masks.

After Zwanenburg et al. 2019 (doi:10.1038/s41598-018-36938-4): the mask is moved, turned, and grown or shrunk by a
voxel, the image gets noise of the strength that it shows already. One perturbation a case, drawn from its own seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform, binary_dilation, binary_erosion

from shared.fracture.volume import Mask, Volume

VERSION: Final = 1
"""To be raised with every change that changes a voxel."""
SHIFT_MM: Final = 1.0
TURN_DEGREES: Final = 4.0


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """A change of one case: shift (z, y, x) in mm, turn about the head–foot axis, a voxel more or less, and noise."""

    shift_mm: tuple[float, float, float]
    turn_degrees: float
    growth: Literal[-1, 1]
    noise_seed: int


def draw(rng: np.random.Generator) -> Perturbation:
    """A perturbation at random: shifts within ±1 mm an axis, turns within ±4 degrees."""
    z, y, x = (float(v) for v in rng.uniform(-SHIFT_MM, SHIFT_MM, 3))
    return Perturbation(
        shift_mm=(z, y, x),
        turn_degrees=float(rng.uniform(-TURN_DEGREES, TURN_DEGREES)),
        growth=1 if rng.random() < 0.5 else -1,
        noise_seed=int(rng.integers(2**31)),
    )


def perturbed_rows(patient: NDArray[np.int64], training: NDArray[np.bool_], *, count: int, seed: int) -> list[int]:
    """Which training rows are perturbed: `count` at random, of as many patients as there are; in ascending order."""
    order = np.random.default_rng([seed, 8]).permutation(np.flatnonzero(training))
    seen: dict[int, int] = {}
    turns: list[tuple[int, int, int]] = []
    for row in order:
        turn = seen.get(int(patient[row]), 0)
        seen[int(patient[row])] = turn + 1
        turns.append((turn, len(turns), int(row)))
    return sorted(row for _, _, row in sorted(turns)[:count])


def perturbed(image: Volume, mask: Mask, change: Perturbation, *, window_hu: tuple[int, int]) -> tuple[Volume, Mask]:
    """The crop (int16 HU within the window) and its mask (uint8) after the change. ValueError: no mask is left."""
    inside = mask.voxels != 0
    if not inside.any():
        raise ValueError("the mask of the crop is empty")
    moved = _moved(inside, change, spacing_zyx=mask.geometry.spacing_zyx)
    changed = binary_dilation(moved) if change.growth > 0 else binary_erosion(moved)
    if not changed.any():
        raise ValueError("nothing is left of the mask when a voxel is taken from its border")
    noise = np.random.default_rng(change.noise_seed).standard_normal(image.voxels.shape) * noise_hu(image.voxels)
    voxels = np.clip(np.rint(image.voxels.astype(np.float64) + noise), *window_hu).astype(np.int16)
    return Volume(voxels=voxels, geometry=image.geometry), Mask(voxels=changed.astype(np.uint8), geometry=mask.geometry)


def noise_hu(voxels: NDArray[Any]) -> float:
    """The noise that a crop (z, y, x) shows in its slices: robust SD of the diagonal differences of 2 × 2 voxels."""
    even = voxels[:, : voxels.shape[1] // 2 * 2, : voxels.shape[2] // 2 * 2].astype(np.float64)
    diagonal = (even[:, ::2, ::2] - even[:, 1::2, ::2] - even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 2
    return float(np.median(np.abs(diagonal)) / 0.6745)


def _moved(
    inside: NDArray[np.bool_], change: Perturbation, *, spacing_zyx: tuple[float, float, float]
) -> NDArray[np.bool_]:
    """The mask turned about its centroid and shifted; a voxel is inside where half of it or more is."""
    spacing = np.asarray(spacing_zyx)
    angle = np.deg2rad(change.turn_degrees)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    back = np.diag(1 / spacing) @ turn.T @ np.diag(spacing)
    centre = np.argwhere(inside).mean(axis=0)
    offset = centre - back @ (centre + np.asarray(change.shift_mm) / spacing)
    soft = affine_transform(inside.astype(np.float32), back, offset=offset, order=1, mode="constant", cval=0.0)
    return np.asarray(soft >= 0.5, dtype=np.bool_)
