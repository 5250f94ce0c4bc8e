"""Fractures of known height loss, put into an anatomy by moving where its voxels are read from.

Each is a map from where a voxel of the fractured spine lies to where it lay before. Within a column of the body heights
shrink by the loss at its place; what lies above comes down by the mean loss, as a whole, so that neighbours keep their
heights; the arch is spared and takes up the difference; the discs take up what the end-plates lost unevenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from services.trainer.segmentation.anatomy import AnatomyBody

Array = NDArray[np.float32]
Deformity = Literal["wedge", "biconcave", "crush"]
DEFORMITIES: Final[tuple[Deformity, ...]] = ("wedge", "biconcave", "crush")
_DISC_MM: Final = 7.0
_SOFT_MM: Final = 6.0
_ARCH_ABOVE_MM: Final = 12.0


@dataclass(frozen=True, kw_only=True)
class Compression:
    """One fracture: `loss` is the largest share of height that is lost anywhere in the body."""

    body: AnatomyBody
    deformity: Deformity
    loss: float
    upper_share: float = 0.8
    """Of the loss at each place, that of the upper end-plate."""
    side: float = 0.0
    """A wedge or crush that is deeper on one side: -1 (right) to 1 (left)."""


def loss_at(compression: Compression, depth: Array, width: Array) -> Array:
    """The share of height lost at places of a body: `depth` -1 (front) to 1 (back), `width` -1 (right) to 1 (left).

    wedge: all at the front edge, none at the back. biconcave: all in the middle, little at the rim. crush: nearly the
    same everywhere, a little more in front.
    """
    front = np.clip(0.5 - depth / 2, 0, 1)
    match compression.deformity:
        case "wedge":
            shape = front
        case "biconcave":
            shape = np.clip(1 - 0.85 * (np.square(depth) + np.square(width)), 0, 1)
        case "crush":
            shape = 0.85 + 0.15 * front
    tilt = 1 - 0.25 * abs(compression.side) * (1 - np.clip(width * np.sign(compression.side or 1.0), -1, 1)) / 2
    return np.asarray(compression.loss * shape * tilt, dtype=np.float32)


def moved_back(points_zyx: Array, compression: Compression) -> None:
    """Replace points (n, 3; zyx, mm) of the fractured spine by where they lay before, in place."""
    body = compression.body
    frame = body.frame
    axes = frame.axes.astype(np.float32)
    height = np.float32(body.height_mm)
    offset = points_zyx - frame.centre_zyx.astype(np.float32)
    up = offset @ axes[0] + height / 2  # 0 at the lower end-plate
    concerned = np.flatnonzero(up > -np.float32(_DISC_MM))
    if not len(concerned):
        return
    s = up[concerned]
    back = offset[concerned] @ axes[1]
    left = offset[concerned] @ axes[2]
    depth = np.clip(back / np.float32(body.half_depth_mm), -1, 1)
    width = np.clip(left / np.float32(body.half_width_mm), -1, 1)
    lost = loss_at(compression, depth, width)
    mean = np.float32(mean_loss(compression))
    upper = np.float32(compression.upper_share)
    column = _column(s, lost, height=height, mean=mean, upper=upper)
    arch = _arch(s, height=height, mean=mean, upper=upper)
    behind = np.clip((back - np.float32(body.half_depth_mm)) / np.float32(_SOFT_MM) + np.float32(0.2), 0, 1)
    shift = column + behind * (arch - column)
    points_zyx[concerned] += shift[:, None] * axes[0]


def mean_loss(compression: Compression) -> float:
    """The mean share of height that a body loses."""
    grid = np.linspace(-1, 1, 21, dtype=np.float32)
    depth, width = np.meshgrid(grid, grid, indexing="ij")
    inside = np.square(depth) + np.square(width) <= 1
    return float(loss_at(compression, depth[inside], width[inside]).mean())


def _column(s: Array, lost: Array, *, height: np.float32, mean: np.float32, upper: np.float32) -> Array:
    """By how much points in a body's columns lay higher before, at heights `s` above the lower end-plate."""
    disc = np.float32(_DISC_MM)
    risen = (1 - upper) * lost * height  # of the lower end-plate
    sunk = height - upper * lost * height  # where the upper end-plate lies now
    above = height - upper * mean * height + disc  # from here on all has come down by the mean
    below = _between(s, -disc, risen, np.float32(-disc), np.float32(0))
    within = _between(s, risen, sunk, np.float32(0), height)
    over = _between(s, sunk, above, height, height + disc)
    beyond = s + upper * mean * height
    before = np.where(s < risen, below, np.where(s < sunk, within, np.where(s < above, over, beyond)))
    return np.asarray(before - s, dtype=np.float32)


def _arch(s: Array, *, height: np.float32, mean: np.float32, upper: np.float32) -> Array:
    """The same behind the body: the arch keeps its height, and gives way above it."""
    start, end = np.float32(0.5) * height, height + np.float32(_ARCH_ABOVE_MM)
    share = np.clip((s - start) / (end - start), 0, 1)
    return np.asarray(share * upper * mean * height, dtype=np.float32)


def _between(s: Array, low: Array | np.float32, high: Array | np.float32, to: np.float32, until: np.float32) -> Array:
    share = (s - low) / np.maximum(high - low, np.float32(1e-3))
    return np.asarray(to + share * (until - to), dtype=np.float32)
