"""Where a vertebral body stands: its axis, its back, its left, from the chain of its neighbours.

Positions are millimetres along the axes of a reoriented grid (array axis 0 towards superior, 1 towards posterior, 2
towards left; shared.fracture.crop.reoriented), from its first voxel. A global z axis or the principal axes of a body
are wrong in kyphosis and for crushed bodies, so the axis is the tangent of the curve through the bodies' centres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

SUPERIOR: Final = (1.0, 0.0, 0.0)
POSTERIOR: Final = (0.0, 1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class BodyFrame:
    """A right-angled frame in a body: unit vectors (zyx) towards head, back and left, from its centre (mm)."""

    centre_zyx: Vector
    up: Vector
    back: Vector
    left: Vector

    def local(self, points_zyx: Vector) -> Vector:
        """Positions (n, 3) of points (n, 3) in mm along (up, back, left) from the centre."""
        offset = np.atleast_2d(np.asarray(points_zyx, dtype=np.float64)) - self.centre_zyx
        found: Vector = offset @ self.axes.T
        return found

    def world(self, local: Vector) -> Vector:
        """Points (n, 3), zyx in mm, of positions (n, 3) along (up, back, left)."""
        found: Vector = self.centre_zyx + np.asarray(local, dtype=np.float64) @ self.axes
        return found

    @property
    def axes(self) -> Vector:
        """The unit vectors as rows: up, back, left."""
        return np.stack([self.up, self.back, self.left])

    def tilted(self, *, pitch_degrees: float = 0.0, turn_degrees: float = 0.0) -> BodyFrame:
        """The frame turned about its left axis (pitch) and its up axis (turn)."""
        turned = frame_of(
            self.centre_zyx,
            up=self.up + np.tan(np.deg2rad(pitch_degrees)) * self.back,
            back=self.back + np.tan(np.deg2rad(turn_degrees)) * self.left,
        )
        return turned


def frame_of(centre_zyx: Vector, *, up: Vector, back: Vector) -> BodyFrame:
    """The frame of an axis and a direction roughly to the back, which is made orthogonal to it."""
    along = _unit(np.asarray(up, dtype=np.float64))
    behind = np.asarray(back, dtype=np.float64)
    behind = behind - along * float(behind @ along)
    if float(np.linalg.norm(behind)) < 1e-6:  # the back lies along the axis: a spine across the grid
        behind = np.array([0.0, 0.0, 1.0]) if abs(along[2]) < 0.9 else np.array(POSTERIOR)
        behind = behind - along * float(behind @ along)
    behind = _unit(behind)
    return BodyFrame(
        centre_zyx=np.asarray(centre_zyx, dtype=np.float64), up=along, back=behind, left=_left(along, behind)
    )


def _left(up: Vector, back: Vector) -> Vector:
    # zyx components: superior x posterior has to come out as left
    return np.array(
        [
            up[1] * back[2] - up[2] * back[1],
            up[2] * back[0] - up[0] * back[2],
            up[0] * back[1] - up[1] * back[0],
        ]
    )


def _unit(vector: Vector) -> Vector:
    length = float(np.linalg.norm(vector))
    if not length > 0:
        raise ValueError("a direction of length zero")
    found: Vector = vector / length
    return found


def tangents(centres_zyx: Sequence[Vector]) -> list[Vector]:
    """Unit tangents (towards the head) of the curve through centres that go from head to foot.

    Each is the derivative of the parabola through a centre and its two neighbours, at the ends through the two next
    ones, there turned by half the bend only: one crushed body must not turn the end of the spine. Two centres give
    their chord, one alone the grid's own axis.
    """
    points = [np.asarray(centre, dtype=np.float64) for centre in centres_zyx]
    if len(points) == 1:
        return [np.array(SUPERIOR)]
    chords = [_unit(upper - lower) for upper, lower in pairwise(points)]
    lengths = [float(np.linalg.norm(u - v)) for u, v in pairwise(points)]
    found = []
    for n in range(len(points)):
        if n == 0:
            bend = chords[1] - chords[0] if len(chords) > 1 else np.zeros(3)
            found.append(_unit(chords[0] - 0.25 * bend))
        elif n == len(points) - 1:
            bend = chords[-1] - chords[-2] if len(chords) > 1 else np.zeros(3)
            found.append(_unit(chords[-1] + 0.25 * bend))
        else:
            above, below = lengths[n - 1], lengths[n]
            found.append(_unit((chords[n - 1] * below + chords[n] * above) / (above + below)))
    return found
