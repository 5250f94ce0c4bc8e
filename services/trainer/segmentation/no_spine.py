"""Volumes without a spine: limbs, a head, a test object. What is bone and no spine has to be seen as background."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.trainer.segmentation.anatomy import SPACING_MM
from services.trainer.segmentation.tissues import CODE

Array = NDArray[np.float32]
_BONE: Final = CODE["other-bone"]
_INSERTS: Final = ("other-bone", "cartilage", "artery", "fluid", "gland", "fat", "air")


def no_spine(shape: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A map of tissues (z, y, x; 1.5 mm) of soft parts with long bones, shells of bone, or inserts in them."""
    axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * np.float32(SPACING_MM) for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    tissue = np.zeros(shape, dtype=np.uint8)
    outline = _along_axis(grid, _axis(rng, spread=0.2), _place(rng, 10), round_by=float(rng.uniform(0.6, 1.6)))
    tissue[outline < rng.uniform(45, 95)] = CODE["fat"]
    tissue[outline < rng.uniform(30, 75)] = CODE[str(rng.choice(["muscle", "fluid", "gland"]))]
    match int(rng.integers(3)):
        case 0:
            _limb(tissue, grid, rng)
        case 1:
            _head(tissue, grid, rng)
        case _:
            _inserts(tissue, grid, rng)
    return tissue


def _limb(tissue: NDArray[np.uint8], grid: Array, rng: np.random.Generator) -> None:
    """One to three long bones, each with a marrow cavity and thick ends."""
    for _ in range(int(rng.integers(1, 4))):
        axis, place = _axis(rng, spread=0.25), _place(rng, 25)
        across = _along_axis(grid, axis, place, round_by=float(rng.uniform(0.8, 1.25)))
        along = np.abs((grid - place) @ axis)
        length, radius = rng.uniform(30, 140), rng.uniform(5, 16)
        thick = radius * (1 + rng.uniform(0, 1.2) * np.clip((along - length + 30) / 30, 0, 1))
        bone = (across < thick) & (along < length)
        tissue[bone] = _BONE
        tissue[bone & (across < radius * rng.uniform(0.3, 0.75)) & (along < length - 15)] = CODE["fat"]


def _head(tissue: NDArray[np.uint8], grid: Array, rng: np.random.Generator) -> None:
    """A shell of bone with something soft in it, holes through it, and lumps of bone below."""
    place = _place(rng, 20)
    radii = rng.uniform(45, 100, size=3)
    depth = np.sqrt(np.sum(np.square((grid - place) / radii), axis=-1))
    wall = rng.uniform(0.04, 0.14)
    tissue[depth < 1] = _BONE
    tissue[depth < 1 - wall] = CODE["gland"]
    for _ in range(int(rng.integers(2, 9))):
        _ellipsoid(tissue, grid, _place(rng, 60), rng.uniform(4, 22, size=3), CODE[str(rng.choice(_INSERTS))])


def _inserts(tissue: NDArray[np.uint8], grid: Array, rng: np.random.Generator) -> None:
    """Rods and balls of many densities, as test objects have them."""
    for _ in range(int(rng.integers(3, 12))):
        value = CODE[str(rng.choice(_INSERTS))]
        place = _place(rng, 45)
        if rng.random() < 0.5:
            axis = _axis(rng, spread=0.05 if rng.random() < 0.7 else 1.5)
            rod = _along_axis(grid, axis, place, round_by=1.0) < rng.uniform(3, 18)
            tissue[rod & (np.abs((grid - place) @ axis) < rng.uniform(10, 150))] = value
        else:
            _ellipsoid(tissue, grid, place, rng.uniform(4, 25, size=3), value)


def _axis(rng: np.random.Generator, *, spread: float) -> Array:
    direction = np.array([1.0, 0.0, 0.0]) + rng.normal(0, spread, size=3)
    return np.asarray(direction / max(float(np.linalg.norm(direction)), 1e-6), dtype=np.float32)


def _place(rng: np.random.Generator, spread_mm: float) -> Array:
    return np.asarray(rng.normal(0, spread_mm, size=3) * (2.0, 1.0, 0.8), dtype=np.float32)


def _along_axis(grid: Array, axis: Array, place: Array, *, round_by: float) -> Array:
    """Distance (mm) from a line through `place`; front to back it counts `round_by` times."""
    offset = grid - place
    across = offset - (offset @ axis)[..., None] * axis
    across[..., 1] *= round_by
    return np.asarray(np.sqrt(np.sum(np.square(across), axis=-1)), dtype=np.float32)


def _ellipsoid(tissue: NDArray[np.uint8], grid: Array, place: Array, radii: NDArray[np.floating], value: int) -> None:
    tissue[np.sum(np.square((grid - place) / radii.astype(np.float32)), axis=-1) < 1] = value
