"""One synthetic CT of a spine with its labels, from an anatomy and a number; the same number gives the same volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.trainer.segmentation.anatomy import SPACING_MM, Anatomy
from services.trainer.segmentation.appearance import paint
from services.trainer.segmentation.compression import DEFORMITIES, Compression, moved_back
from services.trainer.segmentation.no_spine import no_spine
from services.trainer.segmentation.scanner import OUTSIDE_HU, draw_scanner, outside_view, scanned
from services.trainer.segmentation.tissues import CODE, class_of_tissue

Array = NDArray[np.float32]

SHAPE_ZYX: Final = (176, 112, 64)
GENERATOR_VERSION: Final = 2
FRACTURE_CHANCE: Final = 0.22
NO_SPINE_CHANCE: Final = 0.06
_ROTATION_SD_DEGREES: Final = 7.5
_SCALE_SD: Final = 0.15
_AXIS_SCALE_SD: Final = 0.08
_ELASTIC_MM: Final = 7.0
_ELASTIC_KNOTS: Final = (7, 5, 4)
_CLASS_OF: Final = np.array(class_of_tissue(), dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A volume of SHAPE_ZYX at 1.5 mm, axes towards superior, posterior and left."""

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    """The network's classes."""
    vertebra: NDArray[np.uint8]
    """Place of each vertebra in ORDER + 1."""
    compressions: tuple[Compression, ...]


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How a spine lies in its volume."""

    centre_zyx: NDArray[np.float64]
    """The place of the anatomy (mm) that lies in the volume's middle."""
    matrix: NDArray[np.float64]
    """From the volume's axes to the anatomy's."""
    elastic_mm: float


def draw_pose(anatomy: Anatomy, rng: np.random.Generator) -> Pose:
    """A pose around a random place of the spine."""
    middles = np.array([body.frame.centre_zyx for body in anatomy.bodies])
    place = rng.uniform(-1.5, len(middles) + 0.5)  # a little beyond both ends: skull base and sacrum
    low = int(np.clip(np.floor(place), 0, len(middles) - 2))
    centre = middles[low] + (place - low) * (middles[low + 1] - middles[low])
    centre = centre + np.array([rng.normal(0, 10), rng.normal(0, 12), rng.normal(0, 7)])
    angles = np.deg2rad(rng.normal(0, _ROTATION_SD_DEGREES, size=3))
    scale = np.clip(np.exp(rng.normal(0, _SCALE_SD)), 0.7, 1.4) * np.exp(rng.normal(0, _AXIS_SCALE_SD, size=3))
    mirror = np.array([1.0, 1.0, -1.0 if rng.random() < 0.5 else 1.0])
    return Pose(
        centre_zyx=centre,
        matrix=rotation(angles) * (mirror / scale)[None, :],
        elastic_mm=float(rng.uniform(0, _ELASTIC_MM)),
    )


def rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """A rotation by three angles about the axes, in their order."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def draw_compressions(anatomy: Anatomy, rng: np.random.Generator) -> tuple[Compression, ...]:
    """Some fractures, each with its own loss."""
    return tuple(
        Compression(
            body=body,
            deformity=DEFORMITIES[int(rng.integers(len(DEFORMITIES)))],
            loss=float(rng.uniform(0.15, 0.65)),
            upper_share=float(rng.uniform(0.5, 1.0)),
            side=float(rng.uniform(-1, 1)),
        )
        for body in anatomy.bodies
        if rng.random() < FRACTURE_CHANCE
    )


def places(
    shape: tuple[int, int, int],
    pose: Pose,
    compressions: Sequence[Compression],
    rng: np.random.Generator,
    *,
    spacing_mm: float = SPACING_MM,
) -> Array:
    """Where each voxel of a volume lies in the anatomy (mm), shape (n, 3)."""
    middle = (np.array(shape) - 1) / 2
    axes = [(np.arange(n, dtype=np.float32) - m) * np.float32(spacing_mm) for n, m in zip(shape, middle, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    if pose.elastic_mm:
        grid += elastic(shape, rng, pose.elastic_mm).reshape(-1, 3)
    points: Array = grid @ pose.matrix.T.astype(np.float32) + pose.centre_zyx.astype(np.float32)
    # what lies above a fracture comes down: the lowest one is undone first, at the place where it was made
    for compression in sorted(compressions, key=lambda c: float(c.body.frame.centre_zyx[0])):
        moved_back(points, compression)
    return points


def elastic(shape: tuple[int, int, int], rng: np.random.Generator, largest_mm: float) -> Array:
    """A smooth random displacement (z, y, x, 3) in mm: cubic B-splines over a few knots, none farther than told."""
    knots = rng.standard_normal((*_ELASTIC_KNOTS, 3)).astype(np.float32)
    bases = [_bspline(n, k) for n, k in zip(shape, _ELASTIC_KNOTS, strict=True)]
    field: Array = np.einsum("zk,klmc->zlmc", bases[0], knots, optimize=True)
    field = np.einsum("yl,zlmc->zymc", bases[1], field, optimize=True)
    field = np.einsum("xm,zymc->zyxc", bases[2], field, optimize=True)
    field *= np.float32(largest_mm) / max(float(np.abs(field).max()), 1e-6)
    return field


def _bspline(points: int, knots: int) -> Array:
    """Weights (points, knots) of uniform cubic B-splines."""
    place = np.linspace(0, knots - 1, points)[:, None] - np.arange(knots)[None, :]
    away = np.abs(place)
    near, far = 2 / 3 - away**2 + away**3 / 2, (2 - away) ** 3 / 6
    return np.where(away < 1, near, np.where(away < 2, far, 0)).astype(np.float32)


def taken(
    maps: NDArray[np.uint8], points: Array, shape: tuple[int, int, int], *, spacing_mm: float
) -> NDArray[np.uint8]:
    """The values of a map of a spacing at the nearest voxels of points (mm); 0 outside of it."""
    index = np.rint(points / np.float32(spacing_mm)).astype(np.int32)
    inside = np.all((index >= 0) & (index < np.array(maps.shape, dtype=np.int32)), axis=1)
    flat = np.zeros(len(points), dtype=np.uint8)
    flat[inside] = maps[tuple(index[inside].T)]
    return flat.reshape(shape)


def synthesise(
    anatomy: Anatomy,
    *,
    seed: int,
    index: int,
    shape: tuple[int, int, int] = SHAPE_ZYX,
    pose: Pose | None = None,
    compressions: Sequence[Compression] | None = None,
    slice_mm: float | None = None,
) -> Synthetic:
    """Volume number `index` of a seed. Pose, fractures and slice thickness are drawn where they are not given.

    Where neither pose nor fractures are given, a few volumes show no spine at all.
    """
    rng = np.random.default_rng([GENERATOR_VERSION, seed, index])
    if pose is None and compressions is None and rng.random() < NO_SPINE_CHANCE:
        return _without_spine(shape, rng, slice_mm=slice_mm)
    held = draw_pose(anatomy, rng) if pose is None else pose
    fractures = draw_compressions(anatomy, rng) if compressions is None else tuple(compressions)
    points = places(shape, held, fractures, rng)
    tissue = taken(anatomy.tissue, points, shape, spacing_mm=anatomy.spacing_mm)
    vertebra = taken(anatomy.vertebra, points, shape, spacing_mm=anatomy.spacing_mm)
    vertebra[~np.isin(tissue, (CODE["body"], CODE["posterior"]))] = 0
    hu = scanned(paint(tissue, vertebra, rng), draw_scanner(rng, slice_mm=slice_mm), rng)
    labels = _CLASS_OF[tissue]
    if compressions is None:
        hidden = outside_view(shape, rng)
        hu[hidden], labels[hidden], vertebra[hidden] = OUTSIDE_HU, 0, 0
    return Synthetic(
        hu=_stored(hu),
        labels=labels,
        vertebra=vertebra,
        compressions=fractures,
    )


def _without_spine(shape: tuple[int, int, int], rng: np.random.Generator, *, slice_mm: float | None) -> Synthetic:
    tissue = no_spine(shape, rng)
    nothing = np.zeros(shape, dtype=np.uint8)
    hu = scanned(paint(tissue, nothing, rng), draw_scanner(rng, slice_mm=slice_mm), rng)
    return Synthetic(hu=_stored(hu), labels=nothing, vertebra=nothing, compressions=())


def _stored(hu: Array) -> NDArray[np.int16]:
    return np.clip(np.rint(hu), OUTSIDE_HU, 3071).astype(np.int16)
