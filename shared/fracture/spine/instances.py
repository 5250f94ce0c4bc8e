"""Single vertebral bodies out of a map of "this is vertebral body": one label each, numbered from head to foot.

Bodies that touch are parted by a watershed on the distance from their surface; pieces of one body that lie side by side
are put together again; of all pieces the heaviest chain down the trunk is kept, so that a femoral head or a calcified
vessel that looks like a body is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

MIN_PIECE_ML: Final = 1.0
"""A smaller piece is no body (a thoracic body has 6 mL and more; one that is cut off by the scan has less)."""
WATERSHED_MM: Final = 1.2
"""How much deeper a body has to be than the bridge to its neighbour."""
SIDE_BY_SIDE_MM: Final = 7.0
"""Pieces whose centres differ by less along the spine belong to one body."""
GAP_MM: Final = (9.0, 45.0)
"""Distance between the centres of two neighbours."""
MOST_SIDEWAYS: Final = 0.85
"""Of the way from one centre to the next, how much may go across the trunk's axis (sine)."""
_SMOOTHING_MM: Final = 1.2
_WEIGHT_ML: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A connected piece of the map: its label, its centre (mm from the grid's first voxel), its volume."""

    label: int
    centre_zyx: NDArray[np.float64]
    volume_ml: float


def separated(body: NDArray[np.bool_], *, spacing_mm: float) -> NDArray[np.int32]:
    """Labels of pieces of a map on an isotropic grid: bodies that touch are parted. 0 outside."""
    opened = ndimage.binary_opening(body, structure=ndimage.generate_binary_structure(3, 1))
    if not opened.any():
        return np.zeros(body.shape, dtype=np.int32)
    depth = ndimage.distance_transform_edt(opened, sampling=(spacing_mm,) * 3).astype(np.float32)
    depth = ndimage.gaussian_filter(depth, _SMOOTHING_MM / spacing_mm, truncate=3)
    basins = sitk.MorphologicalWatershed(
        sitk.GetImageFromArray(-depth), level=WATERSHED_MM, markWatershedLine=False, fullyConnected=False
    )
    labels: NDArray[np.int32] = sitk.GetArrayFromImage(basins).astype(np.int32)
    labels[~opened] = 0
    return labels


def pieces_of(labels: NDArray[np.int32], *, spacing_mm: float) -> list[Piece]:
    """The pieces of a label map, by label."""
    values = np.flatnonzero(np.bincount(labels.ravel()))
    values = values[values != 0]
    if not len(values):
        return []
    centres = ndimage.center_of_mass(labels > 0, labels, values)
    sizes = np.bincount(labels.ravel())
    return [
        Piece(
            label=int(value),
            centre_zyx=np.asarray(centre) * spacing_mm,
            volume_ml=float(sizes[value]) * spacing_mm**3 / 1000,
        )
        for value, centre in zip(values, centres, strict=True)
    ]


def joined(labels: NDArray[np.int32], *, spacing_mm: float) -> NDArray[np.int32]:
    """The label map with touching pieces of one body put together, the nearest first."""
    found = labels.copy()
    touching = _touching(found)
    while True:
        pieces = {piece.label: piece for piece in pieces_of(found, spacing_mm=spacing_mm)}
        best: tuple[float, int, int] | None = None
        for one, two in touching:
            a, b = pieces.get(one), pieces.get(two)
            if a is None or b is None:
                continue
            along = abs(float(a.centre_zyx[0] - b.centre_zyx[0]))
            if along < SIDE_BY_SIDE_MM and (best is None or along < best[0]):
                best = (along, one, two)
        if best is None:
            return found
        _, kept, gone = best
        found[found == gone] = kept
        touching = {
            (min(x, y), max(x, y))
            for x, y in ((kept if p == gone else p, kept if q == gone else q) for p, q in touching)
            if x != y
        }


def _touching(labels: NDArray[np.int32]) -> set[tuple[int, int]]:
    pairs: set[tuple[int, int]] = set()
    for axis in range(3):
        one = np.moveaxis(labels, axis, 0)[:-1]
        two = np.moveaxis(labels, axis, 0)[1:]
        differ = (one != two) & (one != 0) & (two != 0)
        found = np.unique(np.sort(np.stack([one[differ], two[differ]], axis=1), axis=1), axis=0)
        pairs |= {(int(a), int(b)) for a, b in found}
    return pairs


def chain_of(pieces: list[Piece]) -> list[Piece]:
    """The heaviest chain of pieces from head to foot with plausible distances between neighbours."""
    ordered = sorted((p for p in pieces if p.volume_ml >= MIN_PIECE_ML), key=lambda p: -float(p.centre_zyx[0]))
    best: list[tuple[float, int]] = []
    for n, piece in enumerate(ordered):
        weight, before = min(piece.volume_ml, _WEIGHT_ML), -1
        for m in range(n):
            way = ordered[m].centre_zyx - piece.centre_zyx
            length = float(np.linalg.norm(way))
            across = float(np.hypot(way[1], way[2])) / max(length, 1e-6)
            if GAP_MM[0] <= length <= GAP_MM[1] and across <= MOST_SIDEWAYS:
                together = best[m][0] + min(piece.volume_ml, _WEIGHT_ML)
                if together > weight:
                    weight, before = together, m
        best.append((weight, before))
    if not best:
        return []
    at = max(range(len(best)), key=lambda n: best[n][0])
    chain = []
    while at >= 0:
        chain.append(ordered[at])
        at = best[at][1]
    return chain[::-1]


def bodies_of(body: NDArray[np.bool_], *, spacing_mm: float) -> NDArray[np.uint8]:
    """Label map of the bodies in a map of an isotropic grid whose first axis goes to the head: 1 is the highest.

    Voxels that the opening took from a body's surface are given back to it; a body is solid, whatever (cement, gas in
    a cleft) the map was unsure of inside.
    """
    labels = joined(separated(body, spacing_mm=spacing_mm), spacing_mm=spacing_mm)
    chain = chain_of(pieces_of(labels, spacing_mm=spacing_mm))
    numbered = np.zeros(int(labels.max()) + 1, dtype=np.uint8)
    for number, piece in enumerate(chain, start=1):
        numbered[piece.label] = number
    found: NDArray[np.uint8] = numbered[labels]
    if not chain:
        return found
    far, nearest = ndimage.distance_transform_edt(found == 0, sampling=(spacing_mm,) * 3, return_indices=True)
    given_back = body & (far > 0) & (far <= 2 * spacing_mm) & (labels == 0)
    found[given_back] = found[tuple(nearest[:, given_back])]
    for number, box in enumerate(ndimage.find_objects(found), start=1):
        mine = found[box] == number
        found[box][ndimage.binary_fill_holes(mine) & ~mine] = number
    return found
