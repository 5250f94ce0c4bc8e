"""How the features that went into the LASSO correlate, with similar ones beside each other."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from services.trainer.figures.feature_counts import BRANCH_TITLES
from services.trainer.figures.feature_names import feature_label
from services.trainer.figures.figure_data import FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import SOFT, new_figure
from services.trainer.results import Correlations, RunResult, Selection


def spearman_clusters(result: RunResult, selection: Selection) -> RunFigure:
    """Figure: Spearman's rho among features of one branch, in the order of their clusters."""
    correlations = selection.correlations
    shown = 0 if correlations is None else len(correlations.names)
    of = len(selection.lasso.names)
    return RunFigure(
        name=f"spearman-{selection.branch}",
        title=f"Correlation clusters, {BRANCH_TITLES[selection.branch]}",
        caption=f"Spearman's ρ among {'the' if shown == of else f'{shown} of the'} {of} features that went into the "
        "LASSO, training rows only, ordered by average-linkage clustering on the distance 1 − |ρ| (tree on top).",
        section=selection.branch,
        data=_data(correlations),
        draw=draw_spearman_clusters,
        phantom=result.phantom,
        wide=True,
    )


def draw_spearman_clusters(data: FigureData, *, phantom: bool) -> Figure:
    """The tree above the map of rho; red is positive, blue negative."""
    names = data.texts("feature")
    rho = np.stack([data.numbers(f"rho {name}") for name in names])
    tree = _tree(rho)
    order = tree["leaves"]
    side = float(np.clip(0.115 * len(names), 2.2, 6.9))
    figure = new_figure(width=side + 3.4, height=side + 1.6, phantom=phantom)
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 6), hspace=0.0)
    above, axes = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    joints = [np.column_stack([np.array(x) / 10 - 0.5, y]) for x, y in zip(tree["icoord"], tree["dcoord"], strict=True)]
    above.add_collection(LineCollection(joints, color=SOFT, linewidth=0.8))
    above.set(xlim=(-0.5, len(names) - 0.5), ylim=(0, 1.02), xticks=[], ylabel="1 − |ρ|")
    above.spines["bottom"].set_visible(False)
    image = axes.imshow(rho[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", interpolation="none")
    small = float(np.clip(560 / max(len(names), 1) / 1.55, 5.2, 8.5))
    axes.set_yticks(range(len(names)), [feature_label(names[place]) for place in order], fontsize=small)
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30, pad=0.02)
    bar.set_label("Spearman's ρ")
    bar.outline.set_visible(False)
    return figure


def _data(correlations: Correlations | None) -> FigureData:
    if correlations is None or len(correlations.names) < 2:
        return FigureData(absent="fewer than two features went into the LASSO, so there are no correlations to show")
    rho = np.array(correlations.rho, dtype=np.float64)
    leaves: list[int] = _tree(rho)["leaves"]
    return FigureData(
        columns={
            "feature": correlations.names,
            "place": tuple(leaves.index(place) + 1 for place in range(len(leaves))),
            **{f"rho {name}": tuple(correlations.rho[place]) for place, name in enumerate(correlations.names)},
        }
    )


def _tree(rho: NDArray[np.float64]) -> dict[str, Any]:
    """The tree of average linkage; `leaves` are the rows from left to right."""
    distance = 1 - np.clip(np.abs((rho + rho.T) / 2), 0, 1)
    np.fill_diagonal(distance, 0)
    tree: dict[str, Any] = dendrogram(linkage(squareform(distance, checks=False), method="average"), no_plot=True)
    return tree
