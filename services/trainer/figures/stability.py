"""How often a feature is selected again when patients are drawn anew."""

from __future__ import annotations

from typing import Final

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from services.trainer.figures.feature_counts import BRANCH_TITLES
from services.trainer.figures.feature_names import feature_class, feature_label, is_hcr
from services.trainer.figures.figure_data import FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import DTL_COLOUR, HCR_COLOUR, INK, light_grid, new_figure
from services.trainer.results import RunResult, Selection

MOST_OFTEN: Final = 30


def stability(result: RunResult, selection: Selection) -> RunFigure:
    """Figure: the frequency of selection of one branch's features."""
    ordered = sorted(selection.stability.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ordered[:MOST_OFTEN]
    selected = set(selection.selected)
    often = sum(selection.stability.get(name, 0.0) >= 0.5 for name in selected)
    return RunFigure(
        name=f"stability-{selection.branch}",
        title=f"Stability of the selection, {BRANCH_TITLES[selection.branch]}",
        caption=f"Share of {result.settings.selection.stability_bootstraps} bootstraps of the training patients in "
        f"which a feature was selected: the {len(shown)} most frequent of {len(ordered)} that ever were. Filled: "
        f"selected by this run; hollow: not. Of {len(selected)} selected features {often} come again in at least half.",
        section=selection.branch,
        data=FigureData(
            columns={
                "feature": tuple(name for name, _ in shown),
                "class": tuple(feature_class(name) for name, _ in shown),
                "frequency": tuple(value for _, value in shown),
                "selected": tuple(name in selected for name, _ in shown),
            }
        )
        if shown
        else FigureData(absent="this run counted no bootstraps of the selection"),
        draw=draw_stability,
        phantom=result.phantom,
    )


def draw_stability(data: FigureData, *, phantom: bool) -> Figure:
    """One bar a feature, the most frequent on top; filled where the run selected it."""
    names, values, selected = data.texts("feature"), data.numbers("frequency"), data.flags("selected")
    colours = [HCR_COLOUR if is_hcr(name) else DTL_COLOUR for name in names]
    figure = new_figure(width=5.9, height=1.7 + 0.2 * len(names), phantom=phantom)
    axes = figure.add_subplot()
    axes.barh(
        range(len(names)),
        values * 100,
        height=0.7,
        color=[colour if flag else "white" for colour, flag in zip(colours, selected, strict=True)],
        edgecolor=colours,
        linewidth=1,
    )
    axes.set_yticks(range(len(names)), [feature_label(name) for name in names], fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 102)
    axes.set_xlabel("Selected in this share of the bootstraps (%)")
    light_grid(axes, "x")
    kinds = [("HCR", HCR_COLOUR)] if any(map(is_hcr, names)) else []
    kinds += [("DTL", DTL_COLOUR)] if not all(map(is_hcr, names)) else []
    figure.legend(
        handles=[
            *(Patch(color=colour, label=kind) for kind, colour in kinds),
            Patch(facecolor="white", edgecolor=INK, label="not selected by this run"),
        ],
        loc="outside lower center",
        ncols=3,
    )
    return figure
