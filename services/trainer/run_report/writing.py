"""Writes the report of a run into a folder: report.html, the figures with their data, and the checklist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from services.trainer.figures.catalogue import evaluation_figures, run_figures, write_figures
from services.trainer.results import Evaluation, RunResult
from services.trainer.run_report.page import evaluation_page, run_page
from services.trainer.tripod_ai import checklist, checklist_csv, checklist_markdown

REPORT: Final = "report.html"
FIGURES: Final = "figures"
CHECKLIST: Final = "tripod-ai.csv"
CHECKLIST_TEXT: Final = "tripod-ai.md"


def write_run_report(result: RunResult, tables: Sequence[tuple[str, str]], out: Path) -> Path:
    """Write out/report.html, out/figures/*.svg, *.png, *.csv, out/tripod-ai.csv and .md; the path of the report.

    `tables`: (anchor such as "table-1", HTML that is safe to stand in a page). The same result and tables give the
    same bytes with the same matplotlib.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = run_figures(result)
    rendered = write_figures(figures, out / FIGURES)
    items = checklist(result)
    page = run_page(result, tables=tables, figures=figures, rendered=rendered, checklist=items)
    (out / CHECKLIST).write_text(checklist_csv(items), encoding="utf-8")
    (out / CHECKLIST_TEXT).write_text(checklist_markdown(items), encoding="utf-8")
    report = out / REPORT
    report.write_text(page, encoding="utf-8")
    return report


def write_evaluation_report(found: Evaluation, tables: Sequence[tuple[str, str]], out: Path) -> Path:
    """The same of an external validation: out/report.html and out/figures; the path of the report."""
    out.mkdir(parents=True, exist_ok=True)
    figures = evaluation_figures(found)
    rendered = write_figures(figures, out / FIGURES)
    report = out / REPORT
    report.write_text(evaluation_page(found, tables=tables, figures=figures, rendered=rendered), encoding="utf-8")
    return report
