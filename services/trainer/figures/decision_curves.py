"""What acting on a model is worth, against treating everybody as acute, or nobody."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import (
    MODEL_COLOURS,
    MODEL_LINES,
    MODEL_OF_LABEL,
    PART_TITLES,
    SOFT,
    legend_below,
    light_grid,
    new_figure,
)
from services.trainer.results import LABELS, Judged, PartName
from services.trainer.statistics import net_benefit, net_benefit_of_all

THRESHOLDS: Final = np.arange(1, 100) / 100
TREAT_ALL: Final = "treat all"
TREAT_NONE: Final = "treat none"


def decision_curves(result: Judged) -> RunFigure:
    """Figure: net benefit over the threshold probability, out of fold and held out."""
    parts: tuple[PartName, ...] = ("out_of_fold", "test")
    rows = [row for part in parts for row in _rows(result, part)]
    return RunFigure(
        name="decision-curves",
        title="Decision curves",
        caption="Net benefit = TP/n − FP/n · pt/(1 − pt) over the threshold probability pt at which one would act "
        "as for an acute fracture. A model is of use where it lies above both treat all and treat none. "
        "Net benefits below −0.05 are cut off in the drawing, not in the CSV.",
        section="performance",
        data=FigureData.of_rows(rows) if rows else FigureData(absent="no part was scored out of fold or held out"),
        draw=draw_decision_curves,
        phantom=result.phantom,
        wide=True,
    )


def draw_decision_curves(data: FigureData, *, phantom: bool) -> Figure:
    """The parts side by side with one legend."""
    parts = data.distinct("part")
    figure = new_figure(width=4.9 * len(parts) + 0.4, height=4.6, phantom=phantom)
    for place, part in enumerate(parts):
        axes = figure.add_subplot(1, len(parts), place + 1)
        panel = data.where(part=part)
        x = panel.numbers("threshold_probability")
        axes.plot(x, panel.numbers(TREAT_ALL), color=SOFT, linewidth=1, linestyle=(0, (1, 1)), label="Treat all")
        axes.plot(x, panel.numbers(TREAT_NONE), color=SOFT, linewidth=1, label="Treat none")
        for label, model in MODEL_OF_LABEL.items():
            if label in panel.columns and not np.isnan(panel.numbers(label)).all():
                axes.plot(
                    x, panel.numbers(label), color=MODEL_COLOURS[model], linestyle=MODEL_LINES[model], label=label
                )
        curves = [panel.numbers(name) for name in panel.columns if name not in ("part", "threshold_probability")]
        most = max(float(np.nanmax(curve)) for curve in curves if not np.isnan(curve).all())
        axes.set(xlim=(0, 1), ylim=(-0.05, most * 1.08 + 0.01), xlabel="Threshold probability of an acute fracture")
        axes.set_ylabel("Net benefit" if place == 0 else "")
        axes.set_title(PART_TITLES[part])  # type: ignore[index]
        light_grid(axes)
        if place == 0:
            legend_below(figure, axes, columns=6 if len(parts) > 1 else 3)
    return figure


def _rows(result: Judged, part: PartName) -> list[dict[str, Cell]]:
    scored = [one for one in result.scores if one.part == part]
    if not scored:
        return []
    curves: dict[str, NDArray[np.float64]] = {}
    for one in scored:
        curves[LABELS[one.model]] = net_benefit(np.array(one.acute), np.array(one.probability), THRESHOLDS)
    treat_all = net_benefit_of_all(np.array(scored[0].acute), THRESHOLDS)
    return [
        {
            "part": part,
            "threshold_probability": float(threshold),
            TREAT_ALL: float(treat_all[place]),
            TREAT_NONE: 0.0,
            **{label: float(curves[label][place]) if label in curves else None for label in LABELS.values()},
        }
        for place, threshold in enumerate(THRESHOLDS)
    ]
