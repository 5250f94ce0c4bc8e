"""The nomogram (DLRN) to read by hand: points for age, sex and score, their total, and its probability."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import INK, SOFT, new_figure
from services.trainer.results import RunResult
from shared.fracture.nomogram import MAX_POINTS, NomogramModel, layout

POINTS: Final = "Points"
TOTAL: Final = "Total points"
PROBABILITY: Final = "P(acute)"
MINUS: Final = "\N{MINUS SIGN}"
_LETTER: Final = 0.0085
"""Width of a letter of a tick's label, as a share of the axis."""


def nomogram(result: RunResult) -> RunFigure:
    """Figure: the axes of the nomogram as R's rms draws them."""
    axes = layout(result.nomogram)
    rows: list[dict[str, Cell]] = [
        {"axis": POINTS, "label": f"{value:g}", "points": float(value), "scale": "points"}
        for value in np.arange(0, MAX_POINTS + 1, 10)
    ]
    for title, axis, scale in (
        ("Age (years)", axes.age, "points"),
        ("Sex", axes.sex, "points"),
        ("Fusion score", axes.score, "points"),
        (TOTAL, axes.total, "total"),
        (PROBABILITY, axes.probability, "total"),
    ):
        rows += [
            {"axis": title, "label": label, "points": points, "scale": scale}
            for label, points in zip(axis.labels, axis.points, strict=True)
        ]
    return RunFigure(
        name="nomogram",
        title="Nomogram (DLRN)",
        caption="Read the points of age, sex and fusion score on the top axis, add them, find the sum on the axis of "
        "total points, and read the probability of an acute fracture under it. Logistic regression on the out-of-fold "
        f"fusion score: {formula(result.nomogram)}. Axes as R's rms::nomogram draws them. It holds for fractured "
        "vertebrae.",
        section="performance",
        data=FigureData.of_rows(rows),
        draw=draw_nomogram,
        phantom=result.phantom,
        wide=True,
    )


def formula(model: NomogramModel) -> str:
    """The logistic regression behind a nomogram, in words."""
    terms = ((model.beta_age, "age"), (model.beta_male, "male"), (model.beta_score, "fusion score"))
    sides = "".join(f" {'+' if beta >= 0 else MINUS} {abs(beta):.4g} · {name}" for beta, name in terms)
    return f"log odds = {model.intercept:.4g}".replace("-", MINUS) + sides


def draw_nomogram(data: FigureData, *, phantom: bool) -> Figure:
    """Aligned axes one under the other: the upper ones on the scale of points, the lower on that of total points."""
    figure = new_figure(width=10, height=4.9, phantom=phantom)
    axes = figure.add_subplot()
    titles = data.distinct("axis")
    ends = {
        scale: (rows.numbers("points").min(), rows.numbers("points").max())
        for scale in data.distinct("scale")
        for rows in [data.where(scale=scale)]
    }
    for row, title in enumerate(titles):
        axis = data.where(axis=title)
        low, high = ends[axis.texts("scale")[0]]
        _draw_axis(axes, title, row, (axis.numbers("points") - low) / (high - low), axis.texts("label"))
    for tenth in range(11):
        axes.plot([tenth / 10] * 2, [0.1, titles.index(TOTAL) - 0.45], color="#e6eaee", linewidth=0.6, zorder=0)
    axes.set(xlim=(-0.2, 1.03), ylim=(len(titles) - 0.3, -0.55))
    axes.set_axis_off()
    return figure


def _draw_axis(axes: Axes, title: str, row: int, places: NDArray[np.float64], labels: tuple[str, ...]) -> None:
    axes.annotate(title, (-0.045, row), ha="right", va="center", fontweight="bold", fontsize=9.5)
    if not len(places):
        return
    axes.plot([places.min(), places.max()], [row, row], color=INK, linewidth=1)
    taken = {False: -1.0, True: -1.0}
    for place in np.argsort(places, kind="stable"):
        x, label = float(places[place]), labels[place]
        half = len(label) * _LETTER / 2
        above = title == "Sex" and x - half < taken[False]
        axes.plot([x, x], [row, row - 0.1 if above else row + 0.1], color=INK, linewidth=0.9)
        if x - half >= taken[above]:
            taken[above] = x + half + _LETTER / 2
            axes.annotate(
                label.replace("-", MINUS),
                (x, row - 0.15 if above else row + 0.15),
                ha="center",
                va="bottom" if above else "top",
                fontsize=8.5,
                color=SOFT,
            )
