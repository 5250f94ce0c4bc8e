"""Scans with fractures of known height loss, to judge a segmenter and its gate: nothing of them is trained on.

Two kinds: an anatomy (label maps that no training used) with fractures put into it, painted and scanned as in training
but on a fine grid; and phantoms of whole spines, whose bodies are drawn. Each is scanned at several slice thicknesses.
All of it is synthetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.trainer.phantoms.cohort import SIGNS, Fracture
from services.trainer.phantoms.rendering import LABELS, SPINE_LEVELS
from services.trainer.phantoms.whole_spine import render_spine, spine_patient
from services.trainer.segmentation.anatomy import Anatomy, AnatomyBody
from services.trainer.segmentation.appearance import paint
from services.trainer.segmentation.compression import DEFORMITIES, Compression, Deformity, loss_at
from services.trainer.segmentation.scanner import OUTSIDE_HU, draw_scanner, slices_of
from services.trainer.segmentation.synthesis import Pose, places, rotation, taken
from services.trainer.segmentation.tissues import CODE
from shared.fracture.levels import ORDER
from shared.fracture.volume import Geometry, Mask, Volume

SLICES_MM: Final = (0.7, 1.0, 1.5, 3.0)
GRID_MM: Final = 0.7
LARGEST_LOSS: Final = 0.6
_SHAPE: Final = (256, 170, 138)
_FRACTURED: Final = 0.45
_MARGIN_MM: Final = 6.0
_LARGEST_OF: Final[dict[Deformity, float]] = {"wedge": 1.0, "biconcave": 1.02, "crush": 1.12}
"""A phantom's largest loss from front to back, as a multiple of its `height_loss` (rendering.py, `_plates`)."""
_STREAM: Final = 977
"""Apart from every stream of training, whatever the seed."""
_UPRIGHT: Final = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class KnownBody:
    """A body that lies whole in a scan, its label in the scan's truth, and what it has lost (0 where nothing).

    `loss`: the largest share of height that is lost anywhere from front to back, over the central half of the width.
    """

    level: str
    label: int
    loss: float
    deformity: Deformity | None


@dataclass(frozen=True, kw_only=True)
class KnownScan:
    """A scan, the true bodies on its grid, and what is known of each. `origin`: which anatomy, or phantom."""

    origin: str
    number: int
    slice_mm: float
    volume: Volume
    truth: Mask
    bodies: tuple[KnownBody, ...]


def scans_of_anatomy(
    anatomy: Anatomy, *, seed: int, number: int, slices_mm: Sequence[float] = SLICES_MM
) -> Iterator[KnownScan]:
    """One stretch of an anatomy's spine with fractures, scanned at each thickness."""
    rng = np.random.default_rng([_STREAM, seed, number])
    pose = _pose(anatomy, rng)
    fractures = tuple(_compressions(anatomy, rng))
    points = places(_SHAPE, pose, fractures, rng, spacing_mm=GRID_MM)
    tissue = taken(anatomy.tissue, points, _SHAPE, spacing_mm=anatomy.spacing_mm)
    vertebra = taken(anatomy.vertebra, points, _SHAPE, spacing_mm=anatomy.spacing_mm)
    vertebra[~np.isin(tissue, (CODE["body"], CODE["posterior"]))] = 0
    hu = paint(tissue, vertebra, rng)
    body = np.where(tissue == CODE["body"], vertebra, 0).astype(np.uint8)
    lost = {fracture.body.level: fracture for fracture in fractures}
    inside = [one.level for one in unbroken(anatomy) if _is_inside(one.level, body)]
    known = tuple(
        KnownBody(
            level=level,
            label=ORDER.index(level) + 1,
            loss=lost_in_the_middle(lost[level]) if level in lost else 0.0,
            deformity=lost[level].deformity if level in lost else None,
        )
        for level in inside
    )
    scanner_seed = int(rng.integers(2**31))
    for slice_mm in slices_mm:
        own = np.random.default_rng([scanner_seed, round(100 * slice_mm)])
        scanner = replace(draw_scanner(np.random.default_rng(scanner_seed)), slice_mm=slice_mm)
        slices, step = slices_of(hu, scanner, own, spacing_mm=GRID_MM, first=0.0)
        geometry = Geometry(
            shape_zyx=(slices.shape[0], *_SHAPE[1:]),
            spacing_zyx=(step * GRID_MM, GRID_MM, GRID_MM),
            origin_zyx=(0.0, 0.0, 0.0),
            direction_zyx=_UPRIGHT,
        )
        at = np.minimum(np.rint(np.arange(slices.shape[0]) * step).astype(int), _SHAPE[0] - 1)
        yield KnownScan(
            origin=anatomy.name,
            number=number,
            slice_mm=slice_mm,
            volume=Volume(voxels=np.clip(np.rint(slices), OUTSIDE_HU, 3071).astype(np.int16), geometry=geometry),
            truth=Mask(voxels=np.ascontiguousarray(body[at]), geometry=geometry),
            bodies=known,
        )


def unbroken(anatomy: Anatomy) -> tuple[AnatomyBody, ...]:
    """The longest run of an anatomy's bodies in which none is missing."""
    there = {one.level for one in anatomy.bodies}
    spine = [level for level in ORDER if level in there or level not in ("T13", "L6")]
    runs: list[list[AnatomyBody]] = []
    for one in anatomy.bodies:
        if runs and spine.index(one.level) == spine.index(runs[-1][-1].level) + 1:
            runs[-1].append(one)
        else:
            runs.append([one])
    longest: list[AnatomyBody] = []
    for run in runs:
        longest = run if len(run) > len(longest) else longest
    return tuple(longest)


def _pose(anatomy: Anatomy, rng: np.random.Generator) -> Pose:
    """A stretch of the spine, a little turned and scaled."""
    middles = np.array([one.frame.centre_zyx for one in unbroken(anatomy)])
    place = middles[int(rng.integers(1, max(len(middles) - 1, 2)))]
    scale = np.clip(np.exp(rng.normal(0, 0.08)), 0.85, 1.15)
    mirror = np.array([1.0, 1.0, -1.0 if rng.random() < 0.5 else 1.0])
    return Pose(
        centre_zyx=place + np.array([rng.normal(0, 8), rng.normal(6, 4), rng.normal(0, 4)]),
        matrix=rotation(np.deg2rad(rng.normal(0, 5, size=3))) * (mirror / scale)[None, :],
        elastic_mm=float(rng.uniform(0, 2)),
    )


def _compressions(anatomy: Anatomy, rng: np.random.Generator) -> Iterator[Compression]:
    """Fractures of some bodies, no two of them neighbours but now and then."""
    before = False
    for one in anatomy.bodies:
        before = rng.random() < (_FRACTURED if not before else _FRACTURED / 3)
        if before:
            yield Compression(
                body=one,
                deformity=DEFORMITIES[int(rng.integers(len(DEFORMITIES)))],
                loss=float(rng.uniform(0, LARGEST_LOSS)),
                upper_share=float(rng.uniform(0.5, 1.0)),
                side=float(rng.uniform(-1, 1)),
            )


def _is_inside(level: str, body: NDArray[np.uint8]) -> bool:
    """Whether a body lies whole in the volume, with some millimetres around it."""
    index = np.argwhere(body == ORDER.index(level) + 1)
    margin = np.array([round(_MARGIN_MM / GRID_MM), 2, 2])
    if not len(index):
        return False
    return not (index.min(axis=0) < margin).any() and not (index.max(axis=0) >= np.array(_SHAPE) - margin).any()


def lost_in_the_middle(compression: Compression) -> float:
    """The largest share of height that is lost anywhere from front to back, over the central half of the width."""
    depth = np.linspace(-1, 1, 41, dtype=np.float32)
    width = np.linspace(-0.5, 0.5, 21, dtype=np.float32)
    return float(loss_at(compression, *np.meshgrid(depth, width, indexing="ij")).mean(axis=1).max())


def scans_of_phantom(*, seed: int, number: int, slices_mm: Sequence[float] = SLICES_MM) -> Iterator[KnownScan]:
    """A phantom's whole spine with fractures, scanned at each thickness."""
    patient = spine_patient(seed=seed, index=number)
    rng = patient.rng("known-loss")
    fractures: list[Fracture] = []
    levels = SPINE_LEVELS[:-1]
    before = False
    for level in levels:
        before = rng.random() < (_FRACTURED if not before else _FRACTURED / 3)
        if before:
            acute = bool(rng.random() < 0.5)
            fractures.append(
                Fracture(
                    level=level,
                    acute=acute,
                    strengths={sign: float(rng.uniform(0, 1) * (rng.random() < 0.3)) for sign in SIGNS},
                    height_loss=float(rng.uniform(0, LARGEST_LOSS)),
                    deformity=DEFORMITIES[int(rng.integers(len(DEFORMITIES)))],
                    density_shift_hu=float(rng.normal(0, 10)),
                )
            )
    lost = {fracture.level: fracture for fracture in fractures}
    for slice_mm in slices_mm:
        spacing = (slice_mm, *patient.spacing_zyx[1:])
        scanned = replace(patient, fractures=tuple(fractures), spacing_zyx=spacing, slice_thickness_mm=slice_mm)
        spine = render_spine(scanned)
        yield KnownScan(
            origin="phantom",
            number=number,
            slice_mm=slice_mm,
            volume=spine.volume,
            truth=spine.bodies,
            bodies=tuple(
                KnownBody(
                    level=level,
                    label=LABELS[level],
                    loss=_LARGEST_OF[lost[level].deformity] * lost[level].height_loss if level in lost else 0.0,
                    deformity=lost[level].deformity if level in lost else None,
                )
                for level in levels
            ),
        )
