"""What the network went through: its loss, the loss on patients that it did not see, and the learning rates."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.figure import Figure

from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.run_figure import RunFigure
from services.trainer.figures.style import DTL_COLOUR, HCR_COLOUR, LIMIT_COLOUR, SOFT, light_grid, new_figure
from services.trainer.results import RunResult

ALL: Final = "all"


def training_curves(result: RunResult) -> RunFigure:
    """Figure: the fine-tuning of the network, epoch by epoch."""
    network = result.network
    folds = sorted({epoch.fold for epoch in network.epochs} - {ALL})
    rows: list[dict[str, Cell]] = [
        {
            "fold": epoch.fold,
            "epoch": epoch.epoch,
            "loss": epoch.loss,
            "inner_loss": epoch.inner_loss,
            "inner_auc": epoch.inner_auc,
            "head_rate": epoch.head_rate,
            "backbone_rate": epoch.backbone_rate,
        }
        for epoch in network.epochs
    ]
    return RunFigure(
        name="training-curves",
        title="Fine-tuning of the network",
        caption=f"{network.architecture}, start: {network.weights}; mode {network.mode}. Cross-entropy on the training "
        "rows and on an inner fold of patients, AUC on that inner fold, and the two learning rates (the backbone "
        "stands still while its rate is 0)."
        + (f" Thick: the network fitted on all training patients; thin: {len(folds)} folds." if folds else ""),
        section="network",
        data=FigureData.of_rows(rows)
        if rows
        else FigureData(absent=f"the network was not fine-tuned in this run (mode {network.mode})"),
        draw=draw_training_curves,
        phantom=result.phantom,
        wide=True,
    )


def draw_training_curves(data: FigureData, *, phantom: bool) -> Figure:
    """Loss, inner AUC and learning rates side by side."""
    figure = new_figure(width=10.4, height=3.9, phantom=phantom)
    panels = (
        ("Loss", "Cross-entropy", (("loss", "training rows", HCR_COLOUR), ("inner_loss", "inner fold", DTL_COLOUR))),
        ("AUC", "AUC on the inner fold", (("inner_auc", "inner fold", DTL_COLOUR),)),
        ("Learning rates", "Rate", (("head_rate", "head", LIMIT_COLOUR), ("backbone_rate", "backbone", SOFT))),
    )
    folds = [fold for fold in data.distinct("fold") if fold != ALL]
    order = [*folds, ALL] if ALL in data.distinct("fold") else folds
    thick = order[-1]
    for place, (title, unit, curves) in enumerate(panels):
        axes = figure.add_subplot(1, 3, place + 1)
        for column, label, colour in curves:
            for fold in order:
                rows = data.where(fold=fold)
                y = rows.numbers(column)
                if np.isnan(y).all():
                    continue
                main = fold == thick
                axes.plot(
                    rows.numbers("epoch"),
                    y,
                    color=colour,
                    linewidth=1.8 if main else 0.8,
                    alpha=1.0 if main else 0.5,
                    linestyle=(0, (4, 2)) if column == "backbone_rate" else "solid",
                    marker="o" if len(rows) == 1 else None,
                    label=label if main else None,
                )
        axes.set(xlabel="Epoch", ylabel=unit, title=title)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        else:
            axes.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color=SOFT)
        light_grid(axes)
    return figure
