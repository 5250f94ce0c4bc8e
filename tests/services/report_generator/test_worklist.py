from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.report_generator.reports import write_report
from services.report_generator.study_report import DEMONSTRATION
from services.report_generator.worklist import COLUMNS, Worklist, to_csv
from services.report_generator.worklists import rebuild
from shared.fracture.records import GIVEN_BASIS
from shared.pipeline.store import Store
from shared.records.ledger import study_state, sweep_plan
from tests.services.report_generator.sample import SampleBundle, SampleCase, SampleStudy, write_study, write_sweep

STUDIES = (
    SampleStudy(
        name="a",
        cases=(
            SampleCase(level="L1", score=0.4),
            SampleCase(level="L3", score=-0.2),
            SampleCase(level="S1", end="not-evaluated", reason="the method answers for T1 to L5, not for S1"),
            SampleCase(level="T12", end="dead-lettered", reason="its worker died"),
        ),
    ),
    SampleStudy(
        name="b",
        age=None,
        left_out=None,
        cases=(SampleCase(level="L2", score=3.0), SampleCase(level="L4", score=-4.0)),
    ),
)


def link(study_id: str, report_id: str) -> str:
    return f"reports/{study_id[:12]}/report.html"


def made_of(store: Store, studies: tuple[SampleStudy, ...], bundle: SampleBundle, *, named: bool = False) -> Worklist:
    for study in studies:
        write_study(store, study, bundle)
        state = study_state(store, study.study_id, bundle.protocols.scope)
        assert state is not None
        if state.complete:
            write_report(store, state, bundle=bundle, named=named)
    plan = sweep_plan(store, write_sweep(store, "night", studies, bundle, closed=True))
    assert plan is not None
    worklist, _ = rebuild(store, plan, bundle=bundle, named=named, clock=lambda: datetime(2026, 11, 23, tzinfo=UTC))
    return worklist


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_acute_stand_first_and_the_likeliest_of_them_on_top(store: Store, bundle: SampleBundle) -> None:
    worklist = made_of(store, STUDIES, bundle)

    assert [row.level for row in worklist.rows] == ["L2", "L1", "L3", "L4"]
    assert [row.predicted for row in worklist.rows] == ["acute", "acute", "chronic", "chronic"]
    probabilities = [row.probability for row in worklist.rows]
    assert probabilities == sorted(probabilities, reverse=True)


def test_every_row_with_a_probability_names_its_basis(store: Store, bundle: SampleBundle) -> None:
    worklist = made_of(store, STUDIES, bundle)

    assert {row.fracture_basis for row in worklist.rows} == {GIVEN_BASIS}
    for row in rows_of(to_csv(worklist, link=link)):
        assert bool(row["acute_probability"]) == bool(row["fracture_basis"])


def test_what_has_no_result_follows_with_its_reason(store: Store, bundle: SampleBundle) -> None:
    worklist = made_of(store, STUDIES, bundle)

    said = {(row.level, row.state): row.reasons for row in worklist.others}
    assert said["S1", "not evaluated"] == ("the method answers for T1 to L5, not for S1",)
    assert said["T12", "dead-lettered"][0].endswith("its worker died")
    assert said[None, "series rejected"] == ("not an axial stack: a localiser",)
    assert len(said) == 3


def test_the_ledgers_stand_in_it_and_add_up(store: Store, bundle: SampleBundle) -> None:
    ledger = made_of(store, STUDIES, bundle).ledger

    assert ledger["exact"] is True
    assert ledger["pending"] == 0
    assert ledger["cases"]["by_state"] == {
        "reported": 4,
        "not evaluated": 1,
        "rejected": 0,
        "dead-lettered": 1,
        "superseded": 0,
        "pending": 0,
    }
    assert ledger["series"]["reasons"] == {"rejected": {"not an axial stack: a localiser": 1}}
    assert ledger["files"] == {"found": 130, "in_series": 122, "ignored": {"not a DICOM file": 8}}


def test_a_scored_case_of_a_study_still_under_way_stands_without_a_report(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(cases=(SampleCase(level="L1"), SampleCase(level="L2", end="pending")))

    worklist = made_of(store, (study,), bundle)

    scored, pending = rows_of(to_csv(worklist, link=link))[:2]
    assert (scored["level"], scored["state"], scored["report"]) == ("L1", "pending", "")
    assert (pending["level"], pending["state"]) == ("L2", "pending")
    assert worklist.ledger["cases"]["by_state"]["pending"] == 2


def test_an_absent_nomogram_says_why(store: Store, bundle: SampleBundle) -> None:
    worklist = made_of(store, STUDIES, bundle)

    (row,) = [row for row in rows_of(to_csv(worklist, link=link)) if row["level"] == "L2"]
    assert row["nomogram_probability"] == ""
    assert row["reasons"] == "no nomogram: the patient's age is not known"
    assert row["age"] == ""


def test_the_csv_is_for_people_and_the_json_has_floats_in_full(store: Store, bundle: SampleBundle) -> None:
    worklist = made_of(store, STUDIES, bundle)

    first = rows_of(to_csv(worklist, link=link))[0]
    assert tuple(first) == COLUMNS
    assert first["acute_probability"] == f"{worklist.rows[0].probability:.4f}"
    assert first["report"].startswith("reports/")
    assert DEMONSTRATION in first["research_use"]
    assert Worklist.model_validate_json(worklist.to_bytes()).rows[0].probability == worklist.rows[0].probability


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "  ="])
def test_no_cell_starts_a_formula(store: Store, bundle: SampleBundle, start: str) -> None:
    hostile = start + 'HYPERLINK("x")'
    study = SampleStudy(left_out=hostile, cases=(SampleCase(level="S1", end="rejected", reason=hostile),))

    text = to_csv(made_of(store, (study,), bundle), link=link)

    cells = [cell for row in rows_of(text) for cell in row.values()]
    assert not [cell for cell in cells if cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert "'" + hostile in cells


def test_the_pages_of_a_worklist_link_to_the_reports_where_they_lie(
    store: Store, bundle: SampleBundle, tmp_path: Path
) -> None:
    worklist = made_of(store, STUDIES, bundle)

    page_key = next(key for key in store.keys("worklists/") if key.endswith(".html"))
    page = store.get(page_key).decode()

    for study_id, report_id in worklist.reports.items():
        assert f'href="../../reports/{study_id}/{report_id}.html"' in page


def test_an_indeterminate_row_says_so_in_model_and_csv(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(
        cases=(SampleCase(level="L1", prediction_set=("chronic", "acute")), SampleCase(level="L2", score=-2.0))
    )

    worklist = made_of(store, (study,), bundle)

    rows = rows_of(to_csv(worklist, link=link))
    assert [row.indeterminate for row in worklist.rows] == [True, False]
    assert [row["indeterminate"] for row in rows if row["decision"]] == ["yes", ""]
    assert "indeterminate: MRI recommended" in rows[0]["warnings"]
