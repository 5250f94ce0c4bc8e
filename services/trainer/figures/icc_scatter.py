"""Which features a second reading gives again: ICC within a reader against ICC between readers."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.figure import Figure

from services.trainer.figures.feature_names import feature_class
from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import DROPPED_COLOUR, KEPT_COLOUR, LIMIT_COLOUR, light_grid, new_figure
from services.trainer.results import IccValue, Repeatability, RunResult

HOW: Final = {
    "masks": "a second and a third mask of the same vertebrae",
    "perturbation": "masks and images that were perturbed by computer, not by a second reader",
    "none": "no repeated reading",
}


def icc_scatter(result: RunResult) -> RunFigure:
    """Figure: ICC(2,1) of every feature, intra against inter, or in order of size where one kind is there."""
    found = result.repeatability
    cases = ", ".join(f"{count} {kind}" for kind, count in found.cases.items())
    undefined = sum(
        any(values and values[place] is None for values in (found.intra, found.inter))
        for place in range(len(found.features))
    )
    return RunFigure(
        name="icc",
        title="Repeatability of the hand-crafted features",
        caption=f"ICC(2,1), absolute agreement, of each hand-crafted feature from {HOW[found.method]} "
        f"(repeated cases: {cases or 'none'}); a feature is kept at {found.limit:g} and above in every reading that "
        f"there is. {len(found.kept):,} of {len(found.features):,} are kept. "
        f"{undefined:,} have no ICC and are not drawn.",
        section="selection",
        data=_data(found),
        draw=draw_icc_scatter,
        phantom=result.phantom,
    )


def draw_icc_scatter(data: FigureData, *, phantom: bool) -> Figure:
    """A dot a feature, kept ones in blue, lines at the limit."""
    figure = new_figure(width=5.6, height=5.2, phantom=phantom)
    axes = figure.add_subplot()
    intra, inter, kept = data.numbers("intra"), data.numbers("inter"), data.flags("kept")
    limit = float(data.numbers("limit")[0])
    both = not np.isnan(intra).all() and not np.isnan(inter).all()
    if both:
        x, y = intra, inter
        axes.axvline(limit, color=LIMIT_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("ICC(2,1), same reader again (intra-observer)")
        axes.set_ylabel("ICC(2,1), another reader (inter-observer)")
    else:
        y = inter if np.isnan(intra).all() else intra
        order = np.argsort(np.argsort(-np.nan_to_num(y, nan=-9.0), kind="stable"), kind="stable")
        x = order.astype(np.float64) + 1
        axes.set_xlabel("Features in order of their ICC")
        axes.set_ylabel("ICC(2,1)")
    axes.axhline(limit, color=LIMIT_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
    drawn = ~(np.isnan(x) | np.isnan(y))
    for flag, colour, label in ((False, DROPPED_COLOUR, "dropped"), (True, KEPT_COLOUR, "kept")):
        rows = drawn & (kept == flag)
        axes.plot(
            x[rows],
            y[rows],
            linestyle="none",
            marker="o" if flag else "x",
            markersize=3,
            markeredgewidth=0.8,
            markerfacecolor=colour,
            markeredgecolor=colour if not flag else "none",
            alpha=0.6,
            label=f"{label} ({int(rows.sum()):,})",
        )
    axes.annotate(
        f"limit {limit:g}",
        (0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color=LIMIT_COLOUR,
        fontsize=8.5,
    )
    light_grid(axes)
    if both:
        least = min(0.0, float(np.nanmin(x)), float(np.nanmin(y))) - 0.03
        axes.set(xlim=(least, 1.03), ylim=(least, 1.03), aspect="equal")
    else:
        axes.set_ylim(min(0.0, float(np.nanmin(y))) - 0.03, 1.03)
    legend_handles = axes.get_legend_handles_labels()
    figure.legend(*legend_handles, loc="outside lower center", ncols=2, markerscale=2)
    return figure


def _data(found: Repeatability) -> FigureData:
    if not found.intra and not found.inter:
        return FigureData(absent="this run has no repeated reading, so no feature was dropped for its repeatability")
    kept = set(found.kept)
    rows: list[dict[str, Cell]] = []
    for place, name in enumerate(found.features):
        row: dict[str, Cell] = {"feature": name, "class": feature_class(name)}
        for kind, values in (("intra", found.intra), ("inter", found.inter)):
            icc: IccValue | None = values[place] if values else None
            row |= {
                kind: None if icc is None else icc.value,
                f"{kind}_low": None if icc is None else icc.low,
                f"{kind}_high": None if icc is None else icc.high,
            }
        rows.append(row | {"limit": found.limit, "kept": name in kept})
    return FigureData.of_rows(rows)
