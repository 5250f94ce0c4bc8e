"""ROC curves of the four models on the rows they were fitted on, out of fold, and held out."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import (
    DROPPED_COLOUR,
    MODEL_COLOURS,
    MODEL_LINES,
    MODEL_OF_LABEL,
    PART_TITLES,
    light_grid,
    new_figure,
)
from services.trainer.results import LABELS, Judged, Scored


def roc(result: Judged) -> RunFigure:
    """Figure: one panel a part, one curve a model, AUC with DeLong's interval in the legend."""
    rows = [row for one in result.scores for row in _rows(one)]
    return RunFigure(
        name="roc",
        title="ROC curves",
        caption="Sensitivity against 1 − specificity of the four models. In brackets the 95 % interval of the AUC "
        "after DeLong, which takes vertebrae as independent. In-sample: on the rows that the models were fitted on, "
        "which flatters them. Out-of-fold: training patients, scored by models that never saw them.",
        section="performance",
        data=FigureData.of_rows(rows) if rows else FigureData(absent="no part has both classes"),
        draw=draw_roc,
        phantom=result.phantom,
        wide=True,
    )


def draw_roc(data: FigureData, *, phantom: bool) -> Figure:
    """The panels side by side, each with its own legend below."""
    parts = data.distinct("part")
    figure = new_figure(width=max(3.55 * len(parts), 4.2), height=5.6, phantom=phantom)
    grid = figure.add_gridspec(2, len(parts), height_ratios=(2.3, 1))
    for place, part in enumerate(parts):
        axes, below = figure.add_subplot(grid[0, place]), figure.add_subplot(grid[1, place])
        axes.plot([0, 1], [0, 1], color=DROPPED_COLOUR, linewidth=0.9)
        panel = data.where(part=part)
        for label in panel.distinct("model"):
            curve = panel.where(model=label)
            model = MODEL_OF_LABEL[label]
            auc, low, high = (float(curve.numbers(name)[0]) for name in ("auc", "auc_low", "auc_high"))
            axes.plot(
                curve.numbers("false_positive_rate"),
                curve.numbers("sensitivity"),
                color=MODEL_COLOURS[model],
                linestyle=MODEL_LINES[model],
                label=f"{label}\nAUC {auc:.3f}" + ("" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"),
            )
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="1 − specificity")
        axes.set_ylabel("Sensitivity" if place == 0 else "")
        first = panel.where(model=panel.distinct("model")[0])
        axes.set_title(
            f"{PART_TITLES[part]}\n"  # type: ignore[index]
            f"{first.numbers('acute')[0]:.0f} acute, {first.numbers('chronic')[0]:.0f} chronic",
            fontsize=9.5,
        )
        light_grid(axes)
        below.set_axis_off()
        below.legend(*axes.get_legend_handles_labels(), loc="upper center", handlelength=2.6, labelspacing=0.55)
    return figure


def _rows(one: Scored) -> list[dict[str, Cell]]:
    labels = np.array(one.acute, dtype=np.int64)
    scores = np.array(one.probability, dtype=np.float64)
    acute, chronic = int((labels == 1).sum()), int((labels == 0).sum())
    if not acute or not chronic:
        return []
    false_positive, sensitivity, thresholds = _roc_points(labels, scores)
    area = float(np.trapezoid(sensitivity, false_positive))
    low: float | None = None
    high: float | None = None
    if (auc := one.auc()) is not None:
        area, low, high = auc.value, auc.low, auc.high
    return [
        {
            "part": one.part,
            "model": LABELS[one.model],
            "threshold": None if math.isinf(threshold) else float(threshold),
            "false_positive_rate": float(x),
            "sensitivity": float(y),
            "auc": area,
            "auc_low": low,
            "auc_high": high,
            "acute": acute,
            "chronic": chronic,
        }
        for threshold, x, y in zip(thresholds, false_positive, sensitivity, strict=True)
    ]


def _roc_points(
    labels: NDArray[np.int64], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """1 - specificity, sensitivity and threshold at each corner of the curve, from (0, 0) on."""
    thresholds, place = np.unique(-scores, return_inverse=True)
    positives = np.bincount(place, weights=labels == 1, minlength=len(thresholds)).cumsum()
    negatives = np.bincount(place, weights=labels == 0, minlength=len(thresholds)).cumsum()
    y = np.concatenate([[0.0], positives / positives[-1]])
    x = np.concatenate([[0.0], negatives / negatives[-1]])
    at = np.concatenate([[np.inf], -thresholds])
    straight = np.zeros(len(x), dtype=bool)
    straight[1:-1] = np.isclose(np.diff(x)[:-1] * np.diff(y)[1:], np.diff(x)[1:] * np.diff(y)[:-1], rtol=0, atol=1e-15)
    return x[~straight], y[~straight], at[~straight]
