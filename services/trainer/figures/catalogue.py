"""All figures of a run, in the order of the report."""

from __future__ import annotations

from pathlib import Path

from services.trainer.figures.calibration import calibration
from services.trainer.figures.conformal_sets import conformal_sets
from services.trainer.figures.decision_curves import decision_curves
from services.trainer.figures.feature_counts import feature_counts
from services.trainer.figures.icc_scatter import icc_scatter
from services.trainer.figures.importance import importance
from services.trainer.figures.lasso import lasso_error, lasso_path
from services.trainer.figures.nomogram import nomogram
from services.trainer.figures.roc import roc
from services.trainer.figures.run_figure import RenderedFigure, RunFigure
from services.trainer.figures.spearman_clusters import spearman_clusters
from services.trainer.figures.stability import stability
from services.trainer.figures.training_curves import training_curves
from services.trainer.results import Evaluation, RunResult


def run_figures(result: RunResult) -> tuple[RunFigure, ...]:
    """Every figure, also those that have nothing to draw (their `data.absent` says why)."""
    of_branches = [
        figure(result, selection)
        for selection in result.selections
        for figure in (spearman_clusters, lasso_path, lasso_error, importance, stability)
    ]
    return (
        training_curves(result),
        feature_counts(result),
        icc_scatter(result),
        *of_branches,
        roc(result),
        calibration(result),
        decision_curves(result),
        nomogram(result),
        conformal_sets(result),
    )


def evaluation_figures(found: Evaluation) -> tuple[RunFigure, ...]:
    """Those that an external validation has."""
    return (roc(found), calibration(found), decision_curves(found))


def write_figures(figures: tuple[RunFigure, ...], folder: Path) -> tuple[RenderedFigure, ...]:
    """Draw all that have something to draw, and write NAME.svg, NAME.png and NAME.csv of each into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rendered = []
    for figure in figures:
        if figure.data.absent:
            continue
        done = figure.rendered()
        (folder / f"{figure.name}.svg").write_text(done.svg, encoding="utf-8")
        (folder / f"{figure.name}.png").write_bytes(done.png)
        (folder / f"{figure.name}.csv").write_text(done.csv, encoding="utf-8")
        rendered.append(done)
    return tuple(rendered)
