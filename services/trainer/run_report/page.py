"""The page: everything of a run in one HTML file without script, drawn from RunResult and what is passed in.

A page asks no host for anything: drawings are inline SVG, and a content security policy in the page itself forbids the
rest. Jinja2 escapes every value; the HTML of the tables and the SVG of the figures are our own and stand as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from services.trainer.figures.feature_counts import BRANCH_TITLES
from services.trainer.figures.run_figure import RenderedFigure, RunFigure
from services.trainer.results import FLATTERING, LABELS, MODEL_OF_BRANCH, Evaluation, GridPoint, RunResult
from services.trainer.run_report.cohort_flow import cohort_flow, sites
from services.trainer.run_report.sentences import evaluation_summary, optimism_rows, summary
from services.trainer.run_report.setting_rows import setting_rows
from services.trainer.tripod_ai import OPEN, SOURCE, Item, count_sentence

PHANTOM_BANNER: Final = "PHANTOM DATA. Every image, number and figure here comes from computer-made phantoms."
RESEARCH_USE: Final = "For research. Not a medical device."
COHORT_TABLES: Final = ("table-1",)
"""Anchors of the tables that stand with the cohort; all others stand with the results."""


@dataclass(frozen=True, kw_only=True)
class FigureShown:
    """One figure on the page; without SVG where there was nothing to draw."""

    number: int
    figure: RunFigure
    svg: Markup | None


def run_page(
    result: RunResult,
    *,
    tables: Sequence[tuple[str, str]],
    figures: Sequence[RunFigure],
    rendered: Sequence[RenderedFigure],
    checklist: Sequence[Item],
) -> str:
    """The report as HTML. `tables`: (anchor, HTML of our own making), in the order of the report."""
    trusted = _trusted(tables)
    return (
        _templates()
        .get_template("run_report.html.j2")
        .render(
            result=result,
            summary=summary(result),
            flow=cohort_flow(result),
            sites=sites(result),
            cohort_tables=[table for table in trusted if table[0] in COHORT_TABLES],
            result_tables=[table for table in trusted if table[0] not in COHORT_TABLES],
            sections=_sections(figures, rendered),
            branch_titles=BRANCH_TITLES,
            labels=LABELS,
            model_of_branch=MODEL_OF_BRANCH,
            optimism=optimism_rows(result),
            flattering=FLATTERING,
            settings=setting_rows(result.settings),
            checklist=checklist,
            checklist_count=count_sentence(tuple(checklist)),
            checklist_source=SOURCE,
            open_words=OPEN,
            phantom_banner=PHANTOM_BANNER,
            research_use=RESEARCH_USE,
            seconds=sum(result.seconds.values()),
        )
    )


def evaluation_page(
    found: Evaluation,
    *,
    tables: Sequence[tuple[str, str]],
    figures: Sequence[RunFigure],
    rendered: Sequence[RenderedFigure],
) -> str:
    """The report of an external validation as HTML."""
    return (
        _templates()
        .get_template("evaluation_report.html.j2")
        .render(
            result=found,
            summary=evaluation_summary(found),
            flow=cohort_flow(found),
            sites=sites(found),
            tables=_trusted(tables),
            sections=_sections(figures, rendered),
            phantom_banner=PHANTOM_BANNER,
            research_use=RESEARCH_USE,
        )
    )


def _trusted(tables: Sequence[tuple[str, str]]) -> list[tuple[str, Markup]]:
    return [(anchor, Markup(html)) for anchor, html in tables]  # noqa: S704 - tables.py escapes their cells


def _sections(figures: Sequence[RunFigure], rendered: Sequence[RenderedFigure]) -> dict[str, list[FigureShown]]:
    """The figures by the section they stand in, numbered through."""
    drawn = {each.figure.name: each for each in rendered}
    sections: dict[str, list[FigureShown]] = {}
    for number, figure in enumerate(figures, start=1):
        # the SVG is matplotlib's, which escapes its texts
        svg = Markup(drawn[figure.name].inline_svg) if figure.name in drawn else None  # noqa: S704
        sections.setdefault(figure.section, []).append(FigureShown(number=number, figure=figure, svg=svg))
    return sections


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("services.trainer.run_report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": _duration, "parameters": _parameters, "by_auc": _by_auc}
    return environment


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _parameters(point: GridPoint) -> str:
    return ", ".join(f"{name} = {value}" for name, value in point.parameters.items()) or "defaults"


def _by_auc(grid: Sequence[GridPoint]) -> list[GridPoint]:
    return sorted(grid, key=lambda point: (-point.auc_mean, point.classifier, _parameters(point)))
