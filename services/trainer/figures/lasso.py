"""The LASSO of one branch: how its coefficients shrink, and where its cross-validated error is least."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from services.trainer.figures.feature_counts import BRANCH_TITLES
from services.trainer.figures.feature_names import is_hcr
from services.trainer.figures.figure_data import FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import (
    DROPPED_COLOUR,
    DTL_COLOUR,
    HCR_COLOUR,
    LIMIT_COLOUR,
    SOFT,
    light_grid,
    new_figure,
)
from services.trainer.results import RunResult, Selection

_LEAST_COEFFICIENT: Final = 1e-6


def lasso_path(result: RunResult, selection: Selection) -> RunFigure:
    """Figure: each coefficient of one branch's LASSO over alpha."""
    path = selection.lasso
    ever = [place for place in range(len(path.names)) if any(row[place] for row in path.coefficients)]
    data = FigureData(
        columns={
            "alpha": path.alphas,
            "chosen": tuple(place == path.chosen for place in range(len(path.alphas))),
            **{path.names[place]: tuple(row[place] for row in path.coefficients) for place in ever},
        }
    )
    return RunFigure(
        name=f"lasso-path-{selection.branch}",
        title=f"LASSO path, {BRANCH_TITLES[selection.branch]}",
        caption=f"Coefficients on standardised columns over the penalty α, all training rows. {len(ever)} of "
        f"{len(path.names)} features ever differ from 0. Dashed: the α that was taken "
        f"({path.alphas[path.chosen]:.4g}); coloured: not 0 there; grey: 0 there."
        + (" LASSO kept nothing there, and what enters the path first was taken." if selection.fallback else ""),
        section=selection.branch,
        data=data if ever else FigureData(absent="no coefficient of this LASSO ever differs from 0"),
        draw=draw_lasso_path,
        phantom=result.phantom,
    )


def draw_lasso_path(data: FigureData, *, phantom: bool) -> Figure:
    """One line a feature; blue hand-crafted, orange from the network, grey where it is dropped at the chosen alpha."""
    figure = new_figure(width=5.9, height=4.4, phantom=phantom)
    axes = figure.add_subplot()
    alphas, chosen = data.numbers("alpha"), int(np.argmax(data.flags("chosen")))
    names = [name for name in data.columns if name not in ("alpha", "chosen")]
    lines: dict[str, list[NDArray[np.float64]]] = {"HCR": [], "DTL": [], "dropped": []}
    for name in names:
        values = data.numbers(name)
        stays = abs(values[chosen]) > _LEAST_COEFFICIENT
        lines["dropped" if not stays else "HCR" if is_hcr(name) else "DTL"].append(np.column_stack([alphas, values]))
    for kind, curves in lines.items():
        if curves:
            axes.add_collection(
                LineCollection(
                    curves,
                    color={"dropped": DROPPED_COLOUR, "HCR": HCR_COLOUR, "DTL": DTL_COLOUR}[kind],
                    linewidth=0.7 if kind == "dropped" else 1.0,
                    alpha=0.6 if kind == "dropped" else 0.85,
                    label=kind,
                    zorder=1 if kind == "dropped" else 2,
                )
            )
    axes.autoscale_view()
    _log_axis(axes, alphas, alphas[chosen])
    axes.set_ylabel("Coefficient (per SD of the feature)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def lasso_error(result: RunResult, selection: Selection) -> RunFigure:
    """Figure: the cross-validated error of one branch's LASSO over alpha."""
    path = selection.lasso
    rule = "least mean error" if result.settings.selection.rule == "min" else "one standard error from the least"
    return RunFigure(
        name=f"lasso-error-{selection.branch}",
        title=f"LASSO cross-validation, {BRANCH_TITLES[selection.branch]}",
        caption=f"{path.error[0].upper()}{path.error[1:]}, mean over at most {result.settings.selection.folds} folds "
        f"of patients, ± one standard error. Dashed: the α that was taken ({path.alphas[path.chosen]:.4g}; rule: "
        f"{rule}). On top: how many coefficients are not 0.",
        section=selection.branch,
        data=FigureData(
            columns={
                "alpha": path.alphas,
                "error_mean": path.error_mean,
                "error_se": path.error_se,
                "features": tuple(sum(abs(value) > _LEAST_COEFFICIENT for value in row) for row in path.coefficients),
                "chosen": tuple(place == path.chosen for place in range(len(path.alphas))),
                "error": (path.error,) * len(path.alphas),
            }
        ),
        draw=draw_lasso_error,
        phantom=result.phantom,
    )


def draw_lasso_error(data: FigureData, *, phantom: bool) -> Figure:
    """Mean and standard error at each alpha."""
    figure = new_figure(width=5.9, height=4.4, phantom=phantom)
    axes = figure.add_subplot()
    alphas, chosen = data.numbers("alpha"), int(np.argmax(data.flags("chosen")))
    axes.errorbar(
        alphas,
        data.numbers("error_mean"),
        yerr=data.numbers("error_se"),
        color=HCR_COLOUR,
        ecolor=DROPPED_COLOUR,
        marker="o",
        markersize=3,
        linewidth=0,
        elinewidth=1,
        capsize=1.5,
    )
    _log_axis(axes, alphas, alphas[chosen])
    error = data.texts("error")[0]
    axes.set_ylabel(error[0].upper() + error[1:])
    counts = data.numbers("features")
    for place in np.unique(np.linspace(0, len(alphas) - 1, min(9, len(alphas))).round().astype(int)):
        axes.annotate(
            f"{counts[place]:.0f}",
            (alphas[place], 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=SOFT,
        )
    axes.set_title("Features that are not 0", fontsize=8.5, fontweight="normal", color=SOFT, loc="center", pad=16)
    return figure


def _log_axis(axes: Axes, alphas: NDArray[np.float64], chosen: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(alphas.min() / 1.15, alphas.max() * 1.15)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("Penalty α (log scale)")
    axes.axvline(chosen, color=LIMIT_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"α = {chosen:.3g}",
        (chosen, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
        color=LIMIT_COLOUR,
        fontsize=8.5,
    )
    light_grid(axes, "y")
