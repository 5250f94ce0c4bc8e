"""From label maps to a chain of measured vertebral bodies, for masks of every origin alike.

Three kinds of maps come here: bodies with the network's probabilities and posterior elements, given masks of bodies
alone, and given masks of whole vertebrae, which are cut first. All are on a grid whose axes go towards superior,
posterior and left (shared.fracture.crop.reoriented).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shared.fracture.crop import Box
from shared.fracture.spine.body_cut import STEP_MM, canal_hole, cut_body
from shared.fracture.spine.frames import POSTERIOR, BodyFrame, Vector, frame_of, tangents
from shared.fracture.spine.grading import ChainBody
from shared.fracture.spine.heights import MeasuredBody, SoftBody, measure, smoothed

CUT_OFF: Final = "cut off by the end of the scan"
FINEST_MM: Final = 0.8
"""Given masks on a finer grid are read at every second voxel, every third, …: heights gain nothing below."""
_MARGIN: Final = 3
_REACH_MM: Final = 4.5
_CANAL_REACH_MM: Final = 45.0


@dataclass(frozen=True, kw_only=True)
class BodyMap:
    """Bodies numbered from 1, head to foot; `behind`, on the same grid, is their posterior elements, where known."""

    labels: NDArray[np.uint8]
    spacing_zyx: tuple[float, float, float]
    share: NDArray[np.float32] | None = None
    """The probability of "body" in each voxel; None where the labels are all that is known."""
    behind: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True)
class Vertebra:
    """One body of a chain."""

    frame: BodyFrame
    measured: MeasuredBody | None
    volume_ml: float
    cut_off: bool
    step_mm: float

    def moved(self, by_zyx_mm: Vector) -> Vertebra:
        """The same vertebra where the grid's first voxel lies elsewhere."""
        frame = self.frame
        there = frame_of(frame.centre_zyx + by_zyx_mm, up=frame.up, back=frame.back)
        return replace(self, frame=there)

    def chain_body(self) -> ChainBody:
        """What grade and gate need of it."""
        return ChainBody(measured=self.measured, step_mm=self.step_mm, fault=CUT_OFF if self.cut_off else "")


def measured_chain(
    bodies: BodyMap, *, source_spacing_zyx: tuple[float, float, float] | None = None, rim: int = 0
) -> list[Vertebra]:
    """The bodies of a map, measured, from head to foot.

    `source_spacing_zyx`: of the scan, where the map was made on another grid; heights cannot be finer than that. `rim`:
    how many voxels from the map's end a body counts as cut off.
    """
    boxes = _boxes(bodies.labels)
    found = [boxes[number] for number in sorted(boxes)]
    if sorted(boxes) != list(range(1, len(boxes) + 1)):
        raise ValueError("bodies have to be numbered without gaps from 1")
    centres = [_centre(bodies, number, box) for number, box in enumerate(found, start=1)]
    steps = np.asarray(bodies.spacing_zyx if source_spacing_zyx is None else source_spacing_zyx)
    vertebrae = []
    for number, (box, centre, up) in enumerate(zip(found, centres, tangents(centres) if found else [], strict=True), 1):
        rough = frame_of(centre, up=up, back=np.array(POSTERIOR))
        canal = None if bodies.behind is None else _canal(bodies, number, box, rough)
        frame = rough if canal is None else frame_of(centre, up=up, back=canal - centre)
        inside = bodies.labels[_slices(box)] == number
        vertebrae.append(
            Vertebra(
                frame=frame,
                measured=measure(_soft(bodies, number, box), frame),
                volume_ml=float(inside.sum() * np.prod(bodies.spacing_zyx) / 1000),
                cut_off=_near_end(box, bodies.labels.shape, rim),
                step_mm=float(np.linalg.norm(frame.up * steps)),
            )
        )
    return vertebrae


def _near_end(box: Box, shape: tuple[int, ...], rim: int) -> bool:
    return any(low <= rim or high >= n - rim for (low, high), n in zip(box, shape, strict=True))


def _boxes(labels: NDArray[np.uint8]) -> dict[int, Box]:
    """The box of each label that is there."""
    found = ndimage.find_objects(labels)
    return {
        number: ((k.start, k.stop), (j.start, j.stop), (i.start, i.stop))
        for number, (k, j, i) in ((n, box) for n, box in enumerate(found, start=1) if box is not None)
    }


def _slices(box: Box, margin: int = 0) -> tuple[slice, slice, slice]:
    k, j, i = (slice(max(low - margin, 0), high + margin) for low, high in box)
    return k, j, i


def _start(where: Sequence[slice], spacing_zyx: tuple[float, float, float]) -> Vector:
    start: Vector = np.array([side.start for side in where], dtype=np.float64) * np.asarray(spacing_zyx)
    return start


def _centre(bodies: BodyMap, number: int, box: Box) -> Vector:
    where = _slices(box)
    middle = np.argwhere(bodies.labels[where] == number).mean(axis=0)
    found: Vector = _start(where, bodies.spacing_zyx) + np.asarray(middle) * np.asarray(bodies.spacing_zyx)
    return found


def _soft(bodies: BodyMap, number: int, box: Box) -> SoftBody:
    """One body with soft edges: the network's own where it is known, else the mask with its stairs taken off."""
    where = _slices(box, _MARGIN)
    labels = bodies.labels[where]
    if bodies.share is None:
        return smoothed(
            labels == number, spacing_zyx=bodies.spacing_zyx, start_zyx_mm=_start(where, bodies.spacing_zyx)
        )
    far, nearest = ndimage.distance_transform_edt(labels == 0, sampling=bodies.spacing_zyx, return_indices=True)
    mine = (labels[tuple(nearest)] == number) & (far <= _REACH_MM)
    return SoftBody(
        share=np.where(mine, bodies.share[where], np.float32(0)).astype(np.float32),
        spacing_zyx=bodies.spacing_zyx,
        start_zyx_mm=_start(where, bodies.spacing_zyx),
    )


def _canal(bodies: BodyMap, number: int, box: Box, frame: BodyFrame) -> Vector | None:
    """The canal's centre beside a body: the hole that body and arch close, else the middle of the arch."""
    if bodies.behind is None:
        return None
    reach = [round(_CANAL_REACH_MM / s) for s in bodies.spacing_zyx]
    grown = tuple(
        slice(max(low - r, 0), min(high + r, n))
        for (low, high), r, n in zip(box, reach, bodies.labels.shape, strict=True)
    )
    start = _start(grown, bodies.spacing_zyx)
    behind = bodies.behind[grown]
    own = bodies.labels[grown] == number
    index = np.argwhere(behind | own)
    local = frame.local(start + index * np.asarray(bodies.spacing_zyx))
    up = frame.local(start + np.argwhere(own) * np.asarray(bodies.spacing_zyx))[:, 0]
    level = (local[:, 0] >= up.min() - 2) & (local[:, 0] <= up.max() + 2) & (local[:, 1] > 0)
    beside = np.abs(local[:, 2]) <= _CANAL_REACH_MM / 1.5
    arch = local[level & beside & behind[tuple(index.T)]]
    if len(arch) < 20:
        return None
    low = np.array([up.min() - 2, -_CANAL_REACH_MM, -_CANAL_REACH_MM])
    cells = np.floor((local[level & beside] - low) / STEP_MM).astype(int)
    shape = np.floor((np.array([up.max() + 2, _CANAL_REACH_MM, _CANAL_REACH_MM]) - low) / STEP_MM).astype(int) + 2
    picture = np.zeros(tuple(shape), dtype=bool)
    inside = np.all((cells >= 0) & (cells < shape), axis=1)
    picture[tuple(cells[inside].T)] = True
    picture = ndimage.binary_closing(np.pad(picture, 2), iterations=2)[2:-2, 2:-2, 2:-2]
    hole = canal_hole(picture)
    if hole is not None:
        back, left = (float(np.mean(axis)) for axis in np.nonzero(hole))
        place = low[1:] + STEP_MM * (np.array([back, left]) + 0.5)
    else:
        place = np.array([arch[:, 1].mean(), arch[:, 2].mean()])
    found: Vector = frame.world(np.array([[float(up.mean()), place[0], place[1]]]))[0]
    return found


def from_bodies(
    labels: NDArray[np.generic], values: Sequence[int], *, spacing_zyx: tuple[float, float, float]
) -> tuple[BodyMap, tuple[int, ...]]:
    """The map of given bodies, and which of `values` (their labels, from head to foot) it holds."""
    thin, spacing = thinned(labels, spacing_zyx)
    there = set(np.unique(thin).tolist())
    kept = tuple(value for value in values if value in there)
    return BodyMap(labels=_numbered(thin, kept), spacing_zyx=spacing), kept


def from_vertebrae(
    labels: NDArray[np.generic], values: Sequence[int], *, spacing_zyx: tuple[float, float, float]
) -> tuple[BodyMap, tuple[int, ...]]:
    """The map of the bodies that given whole vertebrae are cut into, and which of `values` it holds.

    `values` are the labels from head to foot. Vertebrae that cannot be cut are left out of the map.
    """
    thin, spacing = thinned(labels, spacing_zyx)
    whole = _numbered(thin, values)
    bodies = whole
    uncut: set[int] = set()
    for _ in range(2):  # the second time along the curve of the bodies that the first time found
        numbers = [n for n in range(1, len(values) + 1) if n not in uncut]
        at = BodyMap(labels=bodies, spacing_zyx=spacing)
        of_bodies, boxes = _boxes(bodies), _boxes(whole)
        uncut |= {n for n in numbers if n not in of_bodies or n not in boxes}
        numbers = [n for n in numbers if n not in uncut]
        centres = [_centre(at, n, of_bodies[n]) for n in numbers]
        cut_map = np.zeros_like(whole)
        for n, up in zip(numbers, tangents(centres) if centres else [], strict=True):
            where = _slices(boxes[n], 1)
            start = _start(where, spacing)
            mine = whole[where] == n
            middle = start + np.argwhere(mine).mean(axis=0) * np.asarray(spacing)
            frame = frame_of(middle, up=up, back=np.array(POSTERIOR))
            cut = cut_body(mine, frame=frame, spacing_zyx=spacing, start_zyx_mm=start)
            if cut is None:
                uncut.add(n)
                continue
            cut_map[where][cut.body] = n
        bodies = cut_map
    kept = [n for n in range(1, len(values) + 1) if n not in uncut]
    renumber = np.zeros(len(values) + 1, dtype=np.uint8)
    for number, n in enumerate(kept, start=1):
        renumber[n] = number
    labels_of_bodies: NDArray[np.uint8] = renumber[bodies]
    behind = (whole != 0) & (bodies == 0)
    return (
        BodyMap(labels=labels_of_bodies, spacing_zyx=spacing, behind=behind),
        tuple(values[n - 1] for n in kept),
    )


def thinned(
    labels: NDArray[np.generic], spacing_zyx: tuple[float, float, float]
) -> tuple[NDArray[np.generic], tuple[float, float, float]]:
    """A label map without needless voxels: see FINEST_MM. The first voxel stays the first."""
    every = [max(int(FINEST_MM / s), 1) for s in spacing_zyx]
    spacing = [s * e for s, e in zip(spacing_zyx, every, strict=True)]
    return labels[:: every[0], :: every[1], :: every[2]], (spacing[0], spacing[1], spacing[2])


def spread(thin: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A map that was thinned (`thinned`) on the grid that it was thinned from, by the nearest voxel."""
    every = [-(-n // m) for n, m in zip(shape, thin.shape, strict=True)]
    places = [np.minimum((np.arange(n) + e // 2) // e, m - 1) for n, e, m in zip(shape, every, thin.shape, strict=True)]
    found: NDArray[np.uint8] = thin[np.ix_(*places)]
    return found


def _numbered(labels: NDArray[np.generic], values: Sequence[int]) -> NDArray[np.uint8]:
    table = np.zeros(max(int(np.max(labels, initial=0)), *values, 0) + 1, dtype=np.uint8)
    for number, value in enumerate(values, start=1):
        table[value] = number
    found: NDArray[np.uint8] = table[labels.astype(np.int64)]
    return found
