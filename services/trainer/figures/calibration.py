"""Whether of the fractures that are given 70 % about 70 % are acute."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import (
    DROPPED_COLOUR,
    MODEL_COLOURS,
    MODEL_OF_LABEL,
    PART_TITLES,
    SOFT,
    light_grid,
    new_figure,
)
from services.trainer.results import LABELS, Judged, Scored
from services.trainer.statistics import brier, wilson

BINS: Final = 10
LEAST_CASES: Final = 10
"""Cases of a bin; with fewer there are fewer bins."""
_Z95: Final = 1.959963984540054


def calibration(result: Judged) -> RunFigure:
    """Figure: observed share of acute fractures against the mean probability, out of fold and held out."""
    rows = [row for one in result.scores if one.part != "train" for row in _rows(one)]
    return RunFigure(
        name="calibration",
        title="Calibration",
        caption=f"Cases sorted by probability and cut into at most {BINS} groups of equal size: mean probability "
        "against the observed share of acute fractures, with Wilson's 95 % interval. On the diagonal the two agree. "
        "Small bars below: how many cases lie where. Brier: mean squared difference, the smaller the better.",
        section="performance",
        data=FigureData.of_rows(rows) if rows else FigureData(absent="no part was scored out of fold or held out"),
        draw=draw_calibration,
        phantom=result.phantom,
        wide=True,
    )


def draw_calibration(data: FigureData, *, phantom: bool) -> Figure:
    """One row of panels a part, one panel a model."""
    parts, models = data.distinct("part"), data.distinct("model")
    figure = new_figure(width=2.65 * len(models), height=3.0 * len(parts) + 0.5, phantom=phantom)
    for row, part in enumerate(parts):
        for column, label in enumerate(models):
            axes = figure.add_subplot(len(parts), len(models), row * len(models) + column + 1)
            panel = data.where(part=part, model=label)
            colour = MODEL_COLOURS[MODEL_OF_LABEL[label]]
            x, y = panel.numbers("probability"), panel.numbers("observed")
            axes.plot([0, 1], [0, 1], color=DROPPED_COLOUR, linewidth=0.9)
            axes.errorbar(
                x,
                y,
                yerr=[y - panel.numbers("low"), panel.numbers("high") - y],
                color=colour,
                marker="o",
                markersize=4,
                linewidth=0.9,
                elinewidth=0.9,
                capsize=0,
            )
            cases = panel.numbers("cases")
            width = panel.numbers("most") - panel.numbers("least")
            density = cases / np.maximum(width, 0.01)
            axes.bar(
                panel.numbers("least"),
                density / density.max() * 0.1,
                width=np.maximum(width, 0.01),
                bottom=-0.14,
                align="edge",
                color=colour,
                alpha=0.35,
                linewidth=0,
            )
            axes.set(xlim=(-0.03, 1.03), ylim=(-0.15, 1.03), aspect="equal")
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
            axes.annotate(
                f"Brier {float(panel.numbers('brier')[0]):.3f}",
                (0.03, 0.97),
                xycoords="axes fraction",
                va="top",
                fontsize=8.5,
                color=SOFT,
            )
            light_grid(axes)
            axes.set_title(label, fontsize=9.5)
            if row == len(parts) - 1:
                axes.set_xlabel("Mean probability of acute")
            if column == 0:
                axes.set_ylabel(f"{PART_TITLES[part]}\nObserved share acute")  # type: ignore[index]
    return figure


def _rows(one: Scored) -> list[dict[str, Cell]]:
    labels = np.array(one.acute, dtype=np.int64)
    scores = np.array(one.probability, dtype=np.float64)
    score = brier(labels, scores)
    rows: list[dict[str, Cell]] = []
    for number, places in enumerate(_equal_groups(scores)):
        acute, cases = int(labels[places].sum()), len(places)
        interval = wilson(acute, cases)
        rows.append(
            {
                "part": one.part,
                "model": LABELS[one.model],
                "group": number + 1,
                "cases": cases,
                "acute": acute,
                "least": float(scores[places].min()),
                "most": float(scores[places].max()),
                "probability": float(scores[places].mean()),
                "observed": acute / cases,
                "low": interval.low,
                "high": interval.high,
                "brier": score,
            }
        )
    return rows


def _equal_groups(scores: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """The places of the scores in groups of about equal size, from the smallest score on."""
    groups = max(1, min(BINS, len(scores) // LEAST_CASES))
    order = np.argsort(scores, kind="stable").astype(np.int64)
    return [part for part in np.array_split(order, groups) if len(part)]
