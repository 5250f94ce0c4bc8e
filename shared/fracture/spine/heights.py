"""Anterior, middle and posterior height of a vertebral body, in its own frame.

Columns run along the body's axis, every millimetre, over the central half of its width. A column's height is the
distance of the outermost crossings of one half, so that a cleft inside does not cut it in two. The three heights are
medians over 8 to 22 % and 78 to 92 % of the depth, and for the middle the lowest of such medians between 27 and 73 %: a
biconcave body need not be lowest in its very middle. How far they can be trusted is read from the same body
with its frame tilted and its surface moved a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shared.fracture.spine.frames import BodyFrame, Vector

UP_STEP_MM: Final = 0.5
ACROSS_STEP_MM: Final = 1.0
ANTERIOR_WINDOW: Final = (0.08, 0.22)
POSTERIOR_WINDOW: Final = (0.78, 0.92)
MIDDLE_WINDOWS: Final[tuple[tuple[float, float], ...]] = tuple((0.27 + 0.05 * n, 0.43 + 0.05 * n) for n in range(7))
"""Shares of the depth, from the front; of the middle windows the lowest counts."""
WIDTH_SHARE: Final = 0.5
HALF: Final = 0.5
PERTURBED_SURFACES: Final = (0.35, 0.65)
PERTURBED_TILTS: Final[tuple[tuple[float, float], ...]] = ((-3.0, 0.0), (3.0, 0.0), (0.0, -5.0), (0.0, 5.0))
"""(pitch, turn) in degrees."""
_MIN_COLUMNS: Final = 6
"""Fewer columns in a window give no height."""


@dataclass(frozen=True, kw_only=True)
class Heights:
    """The three heights of one body in mm, with how much the width and depth it was read over were."""

    anterior: float
    middle: float
    posterior: float
    width_mm: float
    depth_mm: float

    @property
    def least(self) -> float:
        """The smallest of the three."""
        return min(self.anterior, self.middle, self.posterior)


@dataclass(frozen=True, kw_only=True)
class MeasuredBody:
    """The heights of a body, and those that small changes of frame and surface give."""

    heights: Heights
    perturbed: tuple[Heights, ...]


@dataclass(frozen=True, kw_only=True)
class SoftBody:
    """One body as a share of each voxel (0 to 1), on a box of a grid that begins at `start_zyx_mm`."""

    share: NDArray[np.float32]
    spacing_zyx: tuple[float, float, float]
    start_zyx_mm: Vector

    def extent(self, frame: BodyFrame) -> tuple[Vector, Vector]:
        """The corners of the body in a frame, in mm."""
        index = np.argwhere(self.share > HALF)
        local = frame.local(self.start_zyx_mm + index * np.asarray(self.spacing_zyx))
        low: Vector = local.min(axis=0)
        high: Vector = local.max(axis=0)
        return low, high

    def sampled(self, points_zyx: Vector) -> NDArray[np.float32]:
        """The share at points (n, 3), zyx in mm; 0 outside the box."""
        at = (points_zyx - self.start_zyx_mm) / np.asarray(self.spacing_zyx)
        found: NDArray[np.float32] = ndimage.map_coordinates(
            self.share, at.T, order=1, mode="constant", cval=0.0, prefilter=False
        )
        return found


def smoothed(mask: NDArray[np.bool_], *, spacing_zyx: tuple[float, float, float], start_zyx_mm: Vector) -> SoftBody:
    """A binary mask with its stairs taken off: a Gaussian of half a voxel, which leaves flat faces where they are."""
    share = ndimage.gaussian_filter(np.pad(mask, 2).astype(np.float32), 0.5, truncate=4.0)
    return SoftBody(
        share=np.asarray(share, dtype=np.float32),
        spacing_zyx=spacing_zyx,
        start_zyx_mm=np.asarray(start_zyx_mm, dtype=np.float64) - 2 * np.asarray(spacing_zyx),
    )


def measure(body: SoftBody, frame: BodyFrame) -> MeasuredBody | None:
    """The heights of a body; None where it is too small for its columns to be read."""
    columns = _columns(body, frame)
    main = heights_of(columns, surface=HALF)
    if main is None:
        return None
    others = [heights_of(columns, surface=surface) for surface in PERTURBED_SURFACES]
    others += [
        heights_of(_columns(body, frame.tilted(pitch_degrees=pitch, turn_degrees=turn)), surface=HALF)
        for pitch, turn in PERTURBED_TILTS
    ]
    return MeasuredBody(heights=main, perturbed=tuple(found for found in others if found is not None))


def _columns(body: SoftBody, frame: BodyFrame) -> NDArray[np.float32]:
    """The body on the grid of its frame (up, back, left), with a rim of air all round."""
    low, high = body.extent(frame)
    steps = (UP_STEP_MM, ACROSS_STEP_MM, ACROSS_STEP_MM)
    rim = 2.0 + np.asarray(body.spacing_zyx).max()
    axes = [np.arange(low[a] - rim, high[a] + rim + steps[a], steps[a]) for a in range(3)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return body.sampled(frame.world(points.reshape(-1, 3))).reshape(points.shape[:3])


def heights_of(columns: NDArray[np.float32], *, surface: float) -> Heights | None:
    """The heights of a body on the grid of its frame (up, back, left; UP_STEP_MM, ACROSS_STEP_MM)."""
    inside = columns > surface
    footprint: NDArray[np.bool_] = np.asarray(inside.any(axis=0))
    width = np.flatnonzero(footprint.sum(axis=0) >= 3)
    if len(width) < 4:
        return None
    whole, offset = int(width[-1] - width[0] + 1), width[0]
    cut = round(whole * (1 - WIDTH_SHARE) / 2)
    central = np.arange(offset + cut, offset + whole - cut)
    height = column_heights(columns[:, :, central], surface=surface)
    here = footprint[:, central]
    first = np.where(here.any(axis=0), here.argmax(axis=0), 0)
    last = here.shape[0] - 1 - here[::-1].argmax(axis=0)
    depth = np.maximum(last - first, 1)
    place = (np.arange(here.shape[0])[:, None] - first[None, :]) / depth[None, :]

    def median(window: tuple[float, float]) -> float | None:
        chosen = here & (place >= window[0]) & (place <= window[1]) & np.isfinite(height)
        return float(np.median(height[chosen])) if int(chosen.sum()) >= _MIN_COLUMNS else None

    anterior, posterior = median(ANTERIOR_WINDOW), median(POSTERIOR_WINDOW)
    middle = [found for found in map(median, MIDDLE_WINDOWS) if found is not None]
    if anterior is None or posterior is None or not middle:
        return None
    return Heights(
        anterior=anterior,
        middle=min(middle),
        posterior=posterior,
        width_mm=whole * ACROSS_STEP_MM,
        depth_mm=float(np.median(depth)) * ACROSS_STEP_MM,
    )


def column_heights(columns: NDArray[np.float32], *, surface: float) -> NDArray[np.float64]:
    """From the lowest to the highest crossing of `surface` of each column (up, …), in mm; NaN where there is none."""
    inside = columns > surface
    some = inside.any(axis=0)
    low = inside.argmax(axis=0)
    high = columns.shape[0] - 1 - inside[::-1].argmax(axis=0)

    def crossing(at: NDArray[np.intp], beside: NDArray[np.intp]) -> NDArray[np.float64]:
        within = np.take_along_axis(columns, at[None], axis=0)[0].astype(np.float64)
        without = np.take_along_axis(columns, np.clip(beside, 0, columns.shape[0] - 1)[None], axis=0)[0]
        step = within - without
        share: NDArray[np.float64] = np.zeros_like(within)
        np.divide(within - surface, step, out=share, where=step > 0)
        return share.clip(0.0, 1.0)

    extent = (high - low) + crossing(low, low - 1) + crossing(high, high + 1)
    heights: NDArray[np.float64] = np.where(some, extent * UP_STEP_MM, np.nan)
    return heights
