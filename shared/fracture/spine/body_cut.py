"""Vertebral body and canal of a whole vertebra's mask.

The vertebra is looked at along its axis: its arch then closes around the canal, a hole in the picture. What lies in
front of the hole's front edge is the body; what reaches farther to the side than the body's front, and what hangs on
it by less than an opening's width, is taken off. The cut is straight, so a millimetre or two at the corners behind are
lost, which the heights do not read (they end at 92 % of the depth).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shared.fracture.spine.frames import BodyFrame, Vector

STEP_MM: Final = 1.0
MIN_CANAL_MM2: Final = 40.0
"""A hole smaller than this is no canal."""
OPENING_MM: Final = 2.5
_FRONT_SHARE: Final = 0.05
_FRONT_PART: Final = 0.6
_SIDE_MM: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class BodyCut:
    """The body of one vertebra (on the grid of the vertebra's mask), and the canal's centre at its height (zyx, mm)."""

    body: NDArray[np.bool_]
    canal_zyx: Vector


def canal_hole(vertebra: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """The canal (back, left) of a vertebra in its own frame (up, back, left); None where nothing closes around one.

    Seen through the whole vertebra; where the arch hides the canal so, through its slices one by one.
    """
    through = vertebra.any(axis=0)
    for picture in (through, None):
        if picture is not None:
            holes = ndimage.binary_fill_holes(picture) & ~picture
        else:
            holes = np.zeros_like(through)
            for plane in vertebra:
                holes |= ndimage.binary_fill_holes(plane) & ~plane
        labels, count = ndimage.label(holes)
        if count:
            sizes = np.bincount(labels.ravel())[1:]
            if float(sizes.max()) * STEP_MM**2 >= MIN_CANAL_MM2:
                found: NDArray[np.bool_] = labels == int(sizes.argmax()) + 1
                return found
    return None


def cut_body(
    vertebra: NDArray[np.bool_], *, frame: BodyFrame, spacing_zyx: tuple[float, float, float], start_zyx_mm: Vector
) -> BodyCut | None:
    """The body of a whole vertebra, given on a box of a grid that begins at `start_zyx_mm`.

    `frame` is centred in the vertebra, its back only roughly right. None where no canal is found, or no body before it.
    """
    index = np.argwhere(vertebra)
    if len(index) == 0:
        return None
    local = frame.local(np.asarray(start_zyx_mm) + index * np.asarray(spacing_zyx))
    low = local.min(axis=0) - 2 * STEP_MM
    shape = np.ceil((local.max(axis=0) - low) / STEP_MM).astype(int) + 3
    points = np.stack(np.meshgrid(*[low[a] + STEP_MM * np.arange(shape[a]) for a in range(3)], indexing="ij"), axis=-1)
    at = (frame.world(points.reshape(-1, 3)) - start_zyx_mm) / np.asarray(spacing_zyx)
    sampled = ndimage.map_coordinates(
        vertebra.astype(np.float32), at.T, order=1, mode="constant", cval=0.0, prefilter=False
    )
    picture = sampled.reshape(tuple(int(n) for n in shape)) > 0.5
    hole = canal_hole(picture)
    if hole is None:
        return None
    columns = np.flatnonzero(hole.any(axis=0))
    middle = columns[len(columns) // 4 : max(-(-3 * len(columns) // 4), len(columns) // 4 + 1)]
    front = float(np.quantile([np.flatnonzero(hole[:, c])[0] for c in middle], _FRONT_SHARE))
    cut_at = low[1] + STEP_MM * (front - 0.5)
    inside = local[:, 1] < cut_at
    if not inside.any():
        return None
    body = np.zeros(vertebra.shape, dtype=bool)
    body[tuple(index[inside & _not_beside(local, inside)].T)] = True
    opened = _opened(body, spacing_zyx)
    if opened is None:
        return None
    centre_back, centre_left = (float(np.mean(axis)) for axis in np.nonzero(hole))
    of_body = frame.local(np.asarray(start_zyx_mm) + np.argwhere(opened) * np.asarray(spacing_zyx))
    up_of_body = float(of_body[:, 0].mean())
    canal = frame.world(np.array([[up_of_body, low[1] + STEP_MM * centre_back, low[2] + STEP_MM * centre_left]]))[0]
    return BodyCut(body=opened, canal_zyx=canal)


def _not_beside(local: Vector, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether voxels lie no farther to the side than the front of the body reaches: L5's transverse processes do."""
    depth = local[inside, 1]
    first, last = float(depth.min()), float(depth.max())
    front = local[inside & (local[:, 1] <= first + _FRONT_PART * (last - first)), 2]
    kept: NDArray[np.bool_] = (local[:, 2] >= front.min() - _SIDE_MM) & (local[:, 2] <= front.max() + _SIDE_MM)
    return kept


def _opened(body: NDArray[np.bool_], spacing_zyx: tuple[float, float, float]) -> NDArray[np.bool_] | None:
    """The body without what hangs on it by less than the opening's width; its largest part."""
    padded = np.pad(body, 1)
    inner = ndimage.distance_transform_edt(padded, sampling=spacing_zyx) > OPENING_MM
    if not inner.any():
        return None
    near = ndimage.distance_transform_edt(~inner, sampling=spacing_zyx) <= OPENING_MM
    labels, count = ndimage.label((near & padded)[1:-1, 1:-1, 1:-1])
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    largest: NDArray[np.bool_] = labels == int(sizes.argmax()) + 1
    return largest
