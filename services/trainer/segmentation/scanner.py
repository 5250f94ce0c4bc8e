"""What a scanner does to HU: blur, kernel, slices, noise, a limited field of view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from services.trainer.segmentation.anatomy import SPACING_MM
from services.trainer.segmentation.appearance import noise

Array = NDArray[np.float32]
OUTSIDE_HU: Final = -1024
_THICKNESS_MM: Final = (0.7, 5.0)
_NOISE_HU: Final = (4.0, 110.0)
_LIMITED_SHARE: Final = 0.25
_SMALL_SHARE: Final = 0.25


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """One way to scan. `slice_mm` is thickness and spacing alike."""

    slice_mm: float
    blur_mm: float
    sharpening: float
    noise_hu: float
    noise_sigma: float


def draw_scanner(rng: np.random.Generator, *, slice_mm: float | None = None) -> Scanner:
    """A scanner; `slice_mm` where it is given."""
    thickness = float(np.exp(rng.uniform(*np.log(_THICKNESS_MM)))) if slice_mm is None else slice_mm
    return Scanner(
        slice_mm=thickness,
        blur_mm=float(rng.uniform(0.4, 1.0)),
        sharpening=float(rng.uniform(0, 1.2) if rng.random() < 0.5 else 0.0),
        noise_hu=float(np.exp(rng.uniform(*np.log(_NOISE_HU)))) / max(thickness / 2, 0.7) ** 0.5,
        noise_sigma=float(rng.uniform(0.3, 0.9)),
    )


def scanned(hu: Array, scanner: Scanner, rng: np.random.Generator) -> Array:
    """The HU as the scanner gives them, back on the grid of 1.5 mm."""
    slices, step = slices_of(hu, scanner, rng, spacing_mm=SPACING_MM)
    return _at(slices, (np.arange(hu.shape[0]) - rng.uniform(0, 0.2)) / step)


def slices_of(
    hu: Array, scanner: Scanner, rng: np.random.Generator, *, spacing_mm: float, first: float | None = None
) -> tuple[Array, float]:
    """The slices that a scanner makes of an isotropic grid, and their distance in voxels of it.

    `first`: where the first slice lies, in voxels; drawn where it is not given.
    """
    blur = scanner.blur_mm / spacing_mm
    image = gaussian_filter(hu, (0.0, blur, blur), truncate=3)
    if scanner.sharpening:
        edge = 1.2 * SPACING_MM / spacing_mm
        image += scanner.sharpening * (image - gaussian_filter(image, (0, edge, edge), truncate=3))
    step = max(scanner.slice_mm / spacing_mm, 1.0)
    thick = gaussian_filter1d(image, 0.4 * scanner.slice_mm / spacing_mm, axis=0, truncate=3)
    count = max(int((hu.shape[0] - 1) / step) + 1, 2)
    start = rng.uniform(0, 0.9) * (step - 1) if first is None else first
    slices = _at(thick, np.arange(count) * step + start)
    grain = scanner.noise_sigma * SPACING_MM / spacing_mm
    slices += scanner.noise_hu * noise(rng, slices.shape, (0.0, grain, grain))
    return slices, step


def _at(volume: Array, places: NDArray[np.floating]) -> Array:
    """Slices at fractional places along axis 0, linear; the ends repeat."""
    inside = np.clip(places, 0, volume.shape[0] - 1)
    low = np.floor(inside).astype(int)
    high = np.minimum(low + 1, volume.shape[0] - 1)
    share = (inside - low).astype(np.float32)[:, None, None]
    found: Array = volume[low] * (1 - share) + volume[high] * share
    return found


def outside_view(shape: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which voxels no scan shows: nothing, what lies beyond a circle, or all but a small box around the spine."""
    hidden = np.zeros(shape, dtype=bool)
    draw = rng.random()
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    if draw < _LIMITED_SHARE:
        radius = rng.uniform(0.35, 0.6) * shape[1]
        cy, cx = rng.uniform(0.35, 0.6) * shape[1], rng.uniform(0.35, 0.65) * shape[2]
        hidden |= np.broadcast_to(np.hypot(y - cy, x - cx) > radius, shape)
    elif draw < _LIMITED_SHARE + _SMALL_SHARE:
        low_y, high_y = rng.uniform(0.0, 0.25) * shape[1], rng.uniform(0.65, 1.0) * shape[1]
        low_z, high_z = rng.uniform(0.0, 0.3) * shape[0], rng.uniform(0.7, 1.0) * shape[0]
        hidden |= np.broadcast_to((y < low_y) | (y > high_y) | (z < low_z) | (z > high_z), shape)
    return hidden
