"""The report as a page: well-formed, self-contained, and with everything that a reviewer asks for."""

from __future__ import annotations

from functools import cache
from html.parser import HTMLParser

import pytest

from services.trainer.figures.catalogue import run_figures
from services.trainer.results import RunResult
from services.trainer.run_report.page import run_page
from services.trainer.run_report.sentences import optimism_rows, summary
from services.trainer.run_report.setting_rows import setting_rows
from services.trainer.settings import TrainingSettings
from services.trainer.tripod_ai import checklist
from tests.fixtures.run_results import HOSTILE, VARIANTS, drawn, full_result, make_result

VOID = {"meta", "br", "hr", "img", "link", "input", "col", "wbr"}
ASKING = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background", "cite", "ping"}
TABLES = (
    ("table-1", "<table><caption>Table 1. Who took part</caption><tbody><tr><td>Age</td></tr></tbody></table>"),
    ("table-2", "<table><caption>Table 2. How well</caption><tbody><tr><td>AUC</td></tr></tbody></table>"),
)


class Page(HTMLParser):
    """Reads a page; every element that is opened must be closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[str] = []
        self.asked: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.asked += [value or "" for name, value in attrs if name in ASKING]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())


def html_of(result: RunResult, variant: str = "") -> str:
    return run_page(
        result,
        tables=TABLES,
        figures=run_figures(result),
        rendered=tuple(drawn(variant).values()),
        checklist=checklist(result),
    )


@cache
def full_html() -> str:
    return html_of(full_result())


@cache
def full_page() -> Page:
    return Page(full_html())


def test_the_page_asks_no_host_and_runs_nothing() -> None:
    page = full_page()

    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.asked)
    assert {address[1:] for address in page.asked if address.startswith("#")} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert not {"script", "iframe", "object", "embed", "link", "base"} & set(page.elements)
    assert "@import" not in full_html()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_page_is_well_formed_whatever_a_run_lacks(variant: str) -> None:
    result = VARIANTS[variant]()

    page = Page(html_of(result, variant))

    for figure in run_figures(result):
        assert figure.title in page.words
        assert figure.caption in page.words
        if figure.data.absent:
            assert f"Not drawn: {figure.data.absent}." in page.words
    assert ("PHANTOM" in page.words) is result.phantom


def test_hostile_text_stays_text() -> None:
    result = make_result(patients=40, folds=(), title=HOSTILE)
    changes = {
        "warnings": (HOSTILE,),
        "versions": {HOSTILE: HOSTILE},
        "machine": {"name": HOSTILE},
        "flow": (result.flow[0].model_copy(update={"left_out": {HOSTILE: 3}, "step": HOSTILE}),),
    }

    html = html_of(result.model_copy(update=changes))

    assert "<script" not in html
    assert Page(html).words.count(HOSTILE) >= 10


def test_all_settings_stand_in_the_report_and_what_differs_is_told() -> None:
    words = full_page().words

    for row in setting_rows(full_result().settings):
        assert row.name in words
        assert row.value in words
    assert "network.mode crossfit (preset: frozen)" in words
    assert "seed 1 (preset: 2023)" in words


def test_of_a_file_only_the_name_is_shown() -> None:
    settings = TrainingSettings.of("recommended", {"network": {"weights": "/home/someone/weights.pth"}})

    row = next(row for row in setting_rows(settings) if row.name == "network.weights")

    assert (row.value, row.preset) == ("weights.pth", "none")


def test_the_cohorts_way_is_drawn_with_counts_and_reasons() -> None:
    words = full_page().words

    assert "rows of the cohort file 374 patients, 518 vertebrae" in words
    assert "slice spacing above 3 mm: 7" in words
    assert "Training 292 patients, 402 vertebrae 227 acute, 175 chronic" in words
    assert "Test, held out 73 patients, 97 vertebrae 63 acute, 34 chronic" in words


def test_tables_stand_where_they_belong() -> None:
    words = full_page().words

    assert {"table-1", "table-2"} <= set(full_page().ids)
    assert words.index("Table 1. Who took part") < words.index("Architecture")
    assert words.index("Table 2. How well") > words.index("The whole grid of Fusion")


def test_grid_seeds_versions_hashes_machine_and_time_are_told() -> None:
    words = full_page().words

    assert words.count("The whole grid of") == 3
    assert "C = 1000.0" in words
    assert "depth = 4, shrink = None, bag = True" in words
    assert "cd" * 32 in words
    assert "scikit-learn 1.9.0" in words
    assert "processor two cores" in words
    assert "features 20 min 04 s" in words
    assert "Time, 1 h 31 min in all" in words


def test_the_count_of_open_items_is_said() -> None:
    still_open = sum(item.state == "open" for item in checklist(full_result()))

    assert f"and {still_open} are open: they must be filled in by a person." in full_page().words


def test_an_in_sample_number_that_flatters_is_called_so() -> None:
    result = full_result()
    rows = [one.model_copy(update={"in_sample": 0.9, "out_of_fold": 0.84}) for one in result.optimism[:1]]
    rows += [one.model_copy(update={"in_sample": 0.88, "out_of_fold": 0.84}) for one in result.optimism[1:]]

    told = optimism_rows(result.model_copy(update={"optimism": tuple(rows)}))

    assert [bool(warning) for _, warning in told] == [True, False, False, False]
    assert "Radiomics" in told[0][1]
    assert "never the in-sample one" in told[0][1]


def test_beside_the_models_stands_the_random_network() -> None:
    row = "DLR, its network random and not fitted none 0.714 0.702 none"
    variant = "no repeats, frozen network, fallback"

    assert row in full_page().words
    assert "its network random" not in Page(html_of(VARIANTS[variant](), variant)).words


def test_the_summary_names_the_held_out_results_or_says_that_there_are_none() -> None:
    assert "On 73 phantom patients that were held out, the AUC was: Radiomics 0.757" in summary(full_result())
    assert "No patients were held out" in summary(VARIANTS["no test part, perturbed masks"]())
    assert "phantom" not in summary(VARIANTS["no repeats, frozen network, fallback"]())
