from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.fracture.ledger import CASE_STATES, CaseStatus, Outcome, SeriesStatus, StudyState, sweep_ledger
from shared.fracture.protocol import Protocols
from shared.fracture.records import (
    Classified,
    DeadLetterNote,
    Demographics,
    FileCounts,
    NotEvaluated,
    PlannedSeries,
    Rejection,
    StudyPlan,
)

PROTOCOLS = Protocols(crop_hash="a" * 64, hcr_hash="b" * 64, dtl_hash="c" * 64, bundle_id="d" * 64)


def outcome(kind: str, case: str) -> Outcome | None:
    match kind:
        case "classified":
            return Classified(
                case_id=case, study_id="s", series_id="r", level="L1", protocols=PROTOCOLS, classification={}
            )
        case "not evaluated":
            return NotEvaluated(case_id=case, kind="guard", service="resampler", reasons=("touches the border",))
        case "rejected":
            return Rejection(service="resampler", reasons=("two masks for L1",))
        case "dead-lettered":
            return DeadLetterNote(dead_letter_id="x", queue="q", kind="bug", reason="KeyError", attempts=1)
        case _:
            return None


KINDS = ("classified", "not evaluated", "rejected", "dead-lettered", "pending", "superseded")


def study(kinds: list[str], *, series_state: str = "planned", report_written: bool = False) -> StudyState:
    planned = PlannedSeries(series_id="r", manifest_id="m", modality="CT", instances=3)
    return StudyState(
        study_id="s",
        scope="d" * 64,
        plan=StudyPlan(study_id="s", revision=1, demographics=Demographics(), series=(planned,)),
        series=(
            SeriesStatus(
                planned=planned,
                state=series_state,  # type: ignore[arg-type]
                cases=tuple(
                    CaseStatus(
                        case_id=str(n),
                        series_id="r",
                        level="L1",
                        outcome=outcome(kind, str(n)),
                        superseded=kind == "superseded",
                    )
                    for n, kind in enumerate(kinds)
                ),
            ),
        ),
        report_written=report_written,
    )


@given(st.lists(st.sampled_from(KINDS)), st.booleans())
def test_the_ledger_of_cases_adds_up_whatever_became_of_them(kinds: list[str], report_written: bool) -> None:
    state = study(kinds, report_written=report_written)

    ledger = sweep_ledger(sweep_id="w", references=[("s", "r", "m")], states={"s": state}, files=FileCounts(found=0))

    assert ledger.exact
    assert ledger.cases.found == len(kinds)
    assert set(ledger.cases.by_state) == set(CASE_STATES)
    assert state.complete == ("pending" not in kinds)


def test_a_classified_case_is_pending_until_its_report_is_written() -> None:
    before, after = study(["classified"]), study(["classified"], report_written=True)

    states = [
        sweep_ledger(sweep_id="w", references=[("s", "r", "m")], states={"s": s}, files=FileCounts()).cases.by_state
        for s in (before, after)
    ]

    assert [s["pending"] for s in states] == [1, 0]
    assert [s["reported"] for s in states] == [0, 1]


def test_a_series_that_a_newer_manifest_replaced_is_superseded_in_the_older_sweep() -> None:
    state = study(["classified", "superseded"], report_written=True)

    ledger = sweep_ledger(
        sweep_id="w", references=[("s", "r", "an older manifest")], states={"s": state}, files=FileCounts()
    )

    assert ledger.series.by_state["superseded"] == 1
    assert ledger.cases.by_state["superseded"] == 1
    assert ledger.cases.found == 1


def test_a_study_without_a_state_is_pending_not_lost() -> None:
    ledger = sweep_ledger(sweep_id="w", references=[("s", "r", "m")], states={}, files=FileCounts())

    assert ledger.pending == 1


def test_files_that_do_not_add_up_make_the_ledger_inexact() -> None:
    files = FileCounts(found=3, in_series=1, ignored={"not DICOM": 1})

    assert not sweep_ledger(sweep_id="w", references=[], states={}, files=files).exact


def test_the_report_id_changes_with_what_the_report_shows_and_with_nothing_else() -> None:
    pending, scored = study(["pending"]), study(["classified"])

    assert pending.report_id != scored.report_id
    assert scored.report_id == study(["classified"], report_written=True).report_id
