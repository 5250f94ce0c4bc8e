"""How many features of each class are left after each step of the selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from matplotlib.figure import Figure

from services.trainer.figures.feature_names import CLASS_TITLES, DTL, feature_class
from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import DTL_COLOUR, HCR_COLOUR, new_figure
from services.trainer.results import Branch, RunResult, Selection

BRANCH_TITLES: Final[dict[Branch, str]] = {"hcr": "HCR", "dtl": "DTL", "fusion": "Fusion"}


def feature_counts(result: RunResult) -> RunFigure:
    """Figure: features by class at each step, for HCR, DTL and their fusion."""
    rows = [row for selection in result.selections for row in _branch_rows(selection)]
    data = FigureData.of_rows(rows) if rows else FigureData(absent="the run selected no features")
    return RunFigure(
        name="feature-counts",
        title="Features by class at each selection step",
        caption="Number of features of each pyradiomics class that were left after each step, training rows only; "
        "features of the network (DTL) apart. Every panel of several classes has its own "
        "scale; the counts are written at the bars.",
        section="selection",
        data=data,
        draw=draw_feature_counts,
        phantom=result.phantom,
        wide=True,
    )


def draw_feature_counts(data: FigureData, *, phantom: bool) -> Figure:
    """One row of panels a branch, one panel a step, one bar a class."""
    branches = data.distinct("branch")
    steps = {branch: data.where(branch=branch).distinct("step") for branch in branches}
    classes = {branch: data.where(branch=branch).distinct("class") for branch in branches}
    heights = [0.8 + 0.24 * len(classes[branch]) for branch in branches]
    figure = new_figure(width=10.4, height=sum(heights) + 0.8, phantom=phantom)
    grid = figure.add_gridspec(len(branches), max(len(each) for each in steps.values()), height_ratios=heights)
    for row, branch in enumerate(branches):
        for column, step in enumerate(steps[branch]):
            axes = figure.add_subplot(grid[row, column])
            panel = data.where(branch=branch, step=step)
            counts = panel.numbers("features")
            kinds = panel.texts("class")
            axes.barh(
                range(len(kinds)),
                counts,
                height=0.72,
                color=[DTL_COLOUR if kind == DTL else HCR_COLOUR for kind in kinds],
            )
            for place, count in enumerate(counts):
                axes.annotate(
                    f"{count:,.0f}",
                    (count, place),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8.5,
                )
            most = data.where(branch=branch).numbers("features").max() if len(kinds) == 1 else counts.max()
            axes.set_xlim(0, max(most, 1) * 1.35)
            axes.set_ylim(len(kinds) - 0.4, -0.6)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.set_yticks(range(len(kinds)), [CLASS_TITLES.get(kind, kind) for kind in kinds] if column == 0 else [])
            heading = f"{BRANCH_TITLES[branch]}: {step}" if column == 0 else f"→ {step}"  # type: ignore[index]
            axes.set_title(
                f"{heading}\n{counts.sum():,.0f} {'feature' if counts.sum() == 1 else 'features'}", fontsize=9
            )
    return figure


def _branch_rows(selection: Selection) -> list[dict[str, Cell]]:
    counted = [(one.step, _by_class(one.features)) for one in selection.steps]
    seen = {kind for _, counts in counted for kind in counts}
    return [
        {"branch": selection.branch, "step": step, "class": kind, "features": counts.get(kind, 0)}
        for step, counts in counted
        for kind in CLASS_TITLES
        if kind in seen
    ]


def _by_class(names: Sequence[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[feature_class(name)] = counts.get(feature_class(name), 0) + 1
    return counts
