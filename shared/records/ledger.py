"""Reads the state of studies and sweeps out of the store (the ledgers themselves are pure: shared.fracture.ledger)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime

from shared.fracture import keys
from shared.fracture.ledger import CaseStatus, Ledger, Outcome, SeriesState, SeriesStatus, StudyState, reason_of
from shared.fracture.ledger import sweep_ledger as ledger_of
from shared.fracture.records import (
    Classified,
    DeadLetterNote,
    NotEvaluated,
    PlannedSeries,
    Rejection,
    SeriesPlan,
    StudyPlan,
    SweepClosing,
    SweepPlan,
)
from shared.pipeline.store import Store
from shared.records.archive import find_record, newest, revisions

_OUTCOMES: tuple[tuple[keys.Outcome, type[Classified | NotEvaluated | Rejection | DeadLetterNote]], ...] = (
    ("classified", Classified),
    ("not-evaluated", NotEvaluated),
    ("rejected", Rejection),
    ("dead-lettered", DeadLetterNote),
)


def case_outcome(store: Store, scope: str, case_id: str) -> Outcome | None:
    """The terminal record of a case that counts, or None while it is pending."""
    for kind, model in _OUTCOMES:
        record = find_record(store, keys.outcome(kind, scope, case_id), model)
        if record is not None:
            return record
    return None


def series_status(store: Store, planned: PlannedSeries, scope: str) -> SeriesStatus:
    """Where one series of a study's plan stands under a bundle."""
    plans = revisions(store, keys.series_plans(planned.series_id), SeriesPlan)
    plan = next((p for p in reversed(plans) if p.manifest_id == planned.manifest_id), None)
    if planned.rejected:
        plan = None
    current = {case.case_id for case in plan.cases} if plan else set()
    key = keys.series_dead_lettered(scope, planned.series_id, planned.manifest_id)
    note = find_record(store, key, DeadLetterNote)
    rejection = find_record(store, keys.series_rejected(planned.series_id, planned.manifest_id), Rejection)
    cases = [
        CaseStatus(
            case_id=case.case_id,
            series_id=planned.series_id,
            level=case.level,
            # the rest of a series whose message was refused or given up half-way will never be told
            outcome=case_outcome(store, scope, case.case_id) or rejection or note,
        )
        for case in (plan.cases if plan else ())
    ]
    seen = set(current)
    for older in plans:
        for case in older.cases:
            if case.case_id not in seen:
                seen.add(case.case_id)
                cases.append(
                    CaseStatus(case_id=case.case_id, series_id=planned.series_id, level=case.level, superseded=True)
                )
    state: SeriesState
    reasons: tuple[str, ...] = ()
    if plan is not None:
        state = "planned"
    elif rejection is not None:
        state, reasons = "rejected", rejection.reasons
    else:
        state = "pending" if note is None else "dead-lettered"
        reasons = () if note is None else (reason_of(note),)
    return SeriesStatus(planned=planned, state=state, reasons=reasons, plan=plan, cases=tuple(cases))


def study_state(store: Store, study_id: str, scope: str) -> StudyState | None:
    """A study under a bundle as the store shows it now; None where it has no plan."""
    plan = newest(store, keys.study_plans(study_id), StudyPlan)
    if plan is None:
        return None
    state = StudyState(
        study_id=study_id,
        scope=scope,
        plan=plan,
        series=tuple(series_status(store, series, scope) for series in plan.series),
    )
    if store.exists(keys.report(study_id, state.report_id, "json")):
        return replace(state, report_written=True)
    # nobody is called to write the report of a complete study once the last call for it was given up
    given_up = None
    if state.complete:
        given_up = find_record(store, keys.report_dead_lettered(scope, study_id), DeadLetterNote)
    return replace(state, series=tuple(_unreported(store, scope, series, given_up) for series in state.series))


def _unreported(store: Store, scope: str, series: SeriesStatus, given_up: DeadLetterNote | None) -> SeriesStatus:
    """The series with the dead letters of its classified cases, whose report is not there."""

    def looked_up(case: CaseStatus) -> CaseStatus:
        if case.superseded or not isinstance(case.outcome, Classified):
            return case
        note = find_record(store, keys.outcome("dead-lettered", scope, case.case_id), DeadLetterNote)
        return replace(case, unreported=note or given_up)

    return replace(series, cases=tuple(looked_up(case) for case in series.cases))


def sweep_plan(store: Store, sweep_id: str) -> SweepPlan | None:
    """The newest plan of a sweep."""
    return newest(store, keys.sweep_plans(sweep_id), SweepPlan)


def is_open(store: Store, sweep_id: str) -> bool:
    """Whether a sweep was planned and not closed since, or nobody was told that it was."""
    plan = sweep_plan(store, sweep_id)
    return plan is not None and not closed_since(store, sweep_id, plan.planned_at)


def closed_since(store: Store, sweep_id: str, planned_at: datetime) -> bool:
    """Whether a sweep was closed after it was planned, and that was told."""
    closing = newest(store, keys.sweep_closed(sweep_id), SweepClosing)
    if closing is None or closing.closed_at <= planned_at:
        return False
    return store.exists(keys.sweep_closing_told(sweep_id, closing.revision))


def sweep_states(store: Store, plan: SweepPlan) -> dict[str, StudyState]:
    """The state of every study of a sweep, by study id."""
    states: dict[str, StudyState] = {}
    for study_id in sorted({series.study_id for series in plan.series}):
        state = study_state(store, study_id, plan.protocols.scope)
        if state is not None:
            states[study_id] = state
    return states


def sweep_ledger(store: Store, sweep_id: str) -> Ledger | None:
    """The three ledgers of a sweep, exact at this moment; None where there is no such sweep."""
    plan = sweep_plan(store, sweep_id)
    return None if plan is None else _ledger(plan, sweep_states(store, plan))


def _ledger(plan: SweepPlan, states: Mapping[str, StudyState]) -> Ledger:
    references = [(s.study_id, s.series_id, s.manifest_id) for s in plan.series]
    return ledger_of(sweep_id=plan.sweep_id, references=references, states=states, files=plan.files)


class FollowedSweep:
    """A sweep whose ledger is read again and again: studies that are done and reported are not read anew.

    So it may be behind where such a study was revised meanwhile; `sweep_ledger` is exact.
    """

    def __init__(self, store: Store, sweep_id: str) -> None:
        self._store = store
        self._sweep_id = sweep_id
        self._scope = ""
        self._done: dict[str, StudyState] = {}

    def ledger(self) -> Ledger | None:
        """The ledgers as they stand now; None where there is no such sweep."""
        plan = sweep_plan(self._store, self._sweep_id)
        if plan is None:
            return None
        if plan.protocols.scope != self._scope:
            self._scope, self._done = plan.protocols.scope, {}
        states = dict(self._done)
        for study_id in sorted({series.study_id for series in plan.series} - set(states)):
            state = study_state(self._store, study_id, self._scope)
            if state is not None:
                states[study_id] = state
                if state.complete and state.report_written:
                    self._done[study_id] = state
        return _ledger(plan, states)


def newest_sweep(store: Store) -> str | None:
    """The sweep that was planned last; None where there is none."""
    plans = [plan for plan in (sweep_plan(store, sweep_id) for sweep_id in sweeps(store)) if plan is not None]
    return max(plans, key=lambda plan: plan.planned_at).sweep_id if plans else None


def sweeps(store: Store) -> Iterable[str]:
    """The ids of all sweeps of a store."""
    seen: set[str] = set()
    for key in store.keys(keys.SWEEPS):
        sweep_id = key.removeprefix(keys.SWEEPS).split("/", 1)[0]
        if sweep_id not in seen:
            seen.add(sweep_id)
            yield sweep_id
