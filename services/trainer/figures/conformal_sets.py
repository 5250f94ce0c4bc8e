"""How often the fusion model may say acute, chronic, or only that it cannot tell."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.figure import Figure

from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import DTL_COLOUR, HCR_COLOUR, LIMIT_COLOUR, PART_TITLES, SOFT, new_figure
from services.trainer.results import PartName, RunResult

SETS: Final = ("acute", "chronic", "both", "neither")
SET_TITLES: Final = {
    "acute": "acute alone",
    "chronic": "chronic alone",
    "both": "both: indeterminate",
    "neither": "neither: unlike training",
}
_COLOURS: Final = {"acute": LIMIT_COLOUR, "chronic": HCR_COLOUR, "both": DTL_COLOUR, "neither": SOFT}


def conformal_sets(result: RunResult) -> RunFigure:
    """Figure: sizes of the four conformal sets by true class, fusion model."""
    limits = result.conformal
    parts: tuple[PartName, ...] = ("out_of_fold", "test")
    missing = sorted({"alpha", "acute", "chronic"} - set(limits))
    if missing:
        data = FigureData(absent=f"the run has no conformal limit named {', '.join(missing)}")
    else:
        rows = [row for part in parts for row in _rows(result, part)]
        data = FigureData.of_rows(rows) if rows else FigureData(absent="the fusion model was not scored")
    return RunFigure(
        name="conformal-sets",
        title="Conformal sets",
        caption="Share of the cases of each true class that the fusion model calls acute alone, chronic alone, both "
        "(indeterminate, MRI recommended) or neither. A class is in the set where 1 − its probability is at most the "
        "class's limit"
        + (
            ""
            if missing
            else f" (acute {limits['acute']:.3f}, chronic {limits['chronic']:.3f}; split conformal by class, "
            f"α {limits['alpha']:g}, limits from out-of-fold training scores)"
        )
        + ".",
        section="performance",
        data=data,
        draw=draw_conformal_sets,
        phantom=result.phantom,
        wide=True,
    )


def draw_conformal_sets(data: FigureData, *, phantom: bool) -> Figure:
    """One stacked bar a part and true class."""
    bars = [(part, true) for part in data.distinct("part") for true in ("acute", "chronic")]
    figure = new_figure(width=7.6, height=1.6 + 0.5 * len(bars), phantom=phantom)
    axes = figure.add_subplot()
    for place, (part, true) in enumerate(bars):
        left = 0.0
        for kind in SETS:
            rows = data.where(part=part, true=true, set=kind)
            share = float(rows.numbers("share")[0]) * 100
            axes.barh(place, share, left=left, height=0.66, color=_COLOURS[kind])
            if share > 5:
                axes.annotate(
                    f"{rows.numbers('cases')[0]:.0f}",
                    (left + share / 2, place),
                    ha="center",
                    va="center",
                    color="white",
                    fontweight="bold",
                    fontsize=8.5,
                )
            left += share
    axes.set_yticks(
        range(len(bars)),
        [f"{PART_TITLES[part]}\ntruly {true}" for part, true in bars],  # type: ignore[index]
    )
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Share of the cases (%); in the bars: number of cases")
    for kind in SETS:
        axes.barh(0, 0, color=_COLOURS[kind], label=SET_TITLES[kind])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _rows(result: RunResult, part: PartName) -> list[dict[str, Cell]]:
    scored = next((one for one in result.scores if (one.model, one.part) == ("fusion", part)), None)
    if scored is None:
        return []
    labels, scores = np.array(scored.acute), np.array(scored.probability)
    acute, chronic = 1 - scores <= result.conformal["acute"], scores <= result.conformal["chronic"]
    sets = {
        "acute": acute & ~chronic,
        "chronic": chronic & ~acute,
        "both": acute & chronic,
        "neither": ~acute & ~chronic,
    }
    rows: list[dict[str, Cell]] = []
    for true, value in (("acute", 1), ("chronic", 0)):
        of = int((labels == value).sum())
        for kind in SETS:
            cases = int((sets[kind] & (labels == value)).sum())
            rows.append({"part": part, "true": true, "set": kind, "cases": cases, "share": cases / of if of else 0.0})
    return rows
