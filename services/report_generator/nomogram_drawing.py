"""Where the lines, ticks and this patient's marks of a nomogram stand on paper.

The points come from shared.fracture.nomogram alone; here they only become places. A patient beyond an axis is drawn
beyond it, on a scale that is stretched to hold the mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shared.fracture.nomogram import Axis, NomogramModel, NomogramReading, layout

WIDTH: Final = 950.0
LEFT: Final = 130.0
RIGHT: Final = 715.0
TOP: Final = 40.0
ROW: Final = 54.0
LETTER: Final = 6.6
"""Width of a letter of a tick's label, for leaving out labels that would run into each other."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One tick; an empty label where there is no room for it."""

    x: float
    label: str
    above: bool = False


@dataclass(frozen=True, kw_only=True)
class DrawnAxis:
    """One axis with this patient's mark on it (None: no mark)."""

    title: str
    y: float
    ticks: tuple[Tick, ...]
    mark_x: float | None = None
    mark_text: str = ""
    beyond: bool = False
    """The mark lies beyond the axis: extrapolated."""

    @property
    def x0(self) -> float:
        """The axis's left end."""
        return min(tick.x for tick in self.ticks)

    @property
    def x1(self) -> float:
        """The axis's right end."""
        return max(tick.x for tick in self.ticks)


@dataclass(frozen=True, kw_only=True)
class NomogramDrawing:
    """Everything of a nomogram in the units of one SVG view box."""

    width: float
    height: float
    points: DrawnAxis
    axes: tuple[DrawnAxis, ...]
    """Age, sex, score: a mark on each is carried up to the points."""
    total: DrawnAxis
    probability: DrawnAxis


def draw(model: NomogramModel, reading: NomogramReading, *, score: float) -> NomogramDrawing:
    """The drawing of one patient's reading; `score` is the fusion score that was read."""
    axes = layout(model)
    marks = (reading.age_points, reading.sex_points, reading.score_points)
    points_scale = _Scale(low=min(0.0, *marks), high=max(100.0, *marks))
    total_scale = _Scale(
        low=min(axes.total.points[0], reading.total_points), high=max(axes.total.points[-1], reading.total_points)
    )
    tens = tuple(float(value) for value in range(0, 101, 10))
    points = Axis(name="total", labels=tuple(f"{value:g}" for value in tens), values=tens, points=tens)
    rows = (
        ("Age, years", axes.age, reading.age_points, f"{reading.age:g} y → {reading.age_points:.1f} points"),
        (
            "Sex",
            axes.sex,
            reading.sex_points,
            f"{'male' if reading.sex == 'M' else 'female'} → {reading.sex_points:.1f} points",
        ),
        ("Fusion score", axes.score, reading.score_points, f"{score:.2f} → {reading.score_points:.1f} points"),
    )
    return NomogramDrawing(
        width=WIDTH,
        height=TOP + 5 * ROW + 34,
        points=DrawnAxis(title="Points", y=TOP, ticks=_ticks(points, points_scale)),
        axes=tuple(
            _drawn(title, axis, points_scale, y=TOP + (n + 1) * ROW, mark=mark, text=text)
            for n, (title, axis, mark, text) in enumerate(rows)
        ),
        total=_drawn(
            "Total points",
            axes.total,
            total_scale,
            y=TOP + 4 * ROW,
            mark=reading.total_points,
            text=f"{reading.total_points:.1f} points",
        ),
        probability=_drawn(
            "P(acute)",
            axes.probability,
            total_scale,
            y=TOP + 5 * ROW,
            mark=reading.total_points,
            text=f"{reading.probability:.1%}",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Scale:
    low: float
    high: float

    def x(self, points: float) -> float:
        return LEFT + (points - self.low) / (self.high - self.low) * (RIGHT - LEFT)


def _drawn(title: str, axis: Axis, scale: _Scale, *, y: float, mark: float, text: str) -> DrawnAxis:
    ticks = _ticks(axis, scale) or (Tick(x=LEFT, label=""), Tick(x=RIGHT, label=""))
    least, most = min(axis.points, default=mark), max(axis.points, default=mark)
    beyond = not least - 1e-9 <= mark <= most + 1e-9
    return DrawnAxis(title=title, y=y, ticks=ticks, mark_x=scale.x(mark), mark_text=text, beyond=beyond)


def _ticks(axis: Axis, scale: _Scale) -> tuple[Tick, ...]:
    placed = sorted((scale.x(points), label) for points, label in zip(axis.points, axis.labels, strict=True))
    ticks: list[Tick] = []
    taken = {False: float("-inf"), True: float("-inf")}
    for x, label in placed:
        half = len(label) * LETTER / 2
        above = axis.name == "sex" and x - half < taken[False]
        fits = x - half >= taken[above]
        ticks.append(Tick(x=x, label=label if fits else "", above=above))
        if fits:
            taken[above] = x + half + LETTER
    return tuple(ticks)
