"""Which features carry a branch's linear score: their LASSO coefficients on standardised columns."""

from __future__ import annotations

from typing import Final

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from services.trainer.figures.feature_counts import BRANCH_TITLES
from services.trainer.figures.feature_names import DTL, feature_class, feature_label, is_hcr
from services.trainer.figures.figure_data import FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import DTL_COLOUR, HCR_COLOUR, INK, light_grid, new_figure
from services.trainer.results import RunResult, Selection

LARGEST: Final = 30


def importance(result: RunResult, selection: Selection) -> RunFigure:
    """Figure: the largest coefficients of one branch."""
    ordered = sorted(
        zip(selection.selected, selection.coefficients, strict=True), key=lambda pair: (-abs(pair[1]), pair[0])
    )[:LARGEST]
    return RunFigure(
        name=f"importance-{selection.branch}",
        title=f"Feature importance, {BRANCH_TITLES[selection.branch]}",
        caption=f"LASSO coefficients on standardised columns, the {len(ordered)} largest of {len(selection.selected)} "
        "selected features. A bar to the right speaks for an acute fracture, one to the left for a chronic one.",
        section=selection.branch,
        data=FigureData(
            columns={
                "feature": tuple(name for name, _ in ordered),
                "class": tuple(feature_class(name) for name, _ in ordered),
                "coefficient": tuple(value for _, value in ordered),
            }
        )
        if ordered
        else FigureData(absent="no feature was selected"),
        draw=draw_importance,
        phantom=result.phantom,
    )


def draw_importance(data: FigureData, *, phantom: bool) -> Figure:
    """One bar a feature, the largest on top; blue hand-crafted, orange from the network."""
    names, values = data.texts("feature"), data.numbers("coefficient")
    figure = new_figure(width=5.9, height=1.9 + 0.2 * len(names), phantom=phantom)
    axes = figure.add_subplot()
    axes.barh(range(len(names)), values, color=[HCR_COLOUR if is_hcr(name) else DTL_COLOUR for name in names])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [feature_label(name) for name in names], fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Coefficient (per SD of the feature)\n← chronic | acute →")
    axes.margins(x=0.08)
    light_grid(axes, "x")
    classes = data.texts("class")
    kinds = [kind for kind, there in (("HCR", any(c != DTL for c in classes)), (DTL, DTL in classes)) if there]
    figure.legend(
        handles=[Patch(color=HCR_COLOUR if kind == "HCR" else DTL_COLOUR, label=kind) for kind in kinds],
        loc="outside lower center",
        ncols=2,
    )
    return figure
