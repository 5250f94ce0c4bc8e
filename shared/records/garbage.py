"""The garbage collector's hands: reads what `retention` judges by, and deletes what it has decided, unit by unit.

A unit is looked at once more right before the first of its keys goes, because a sweep may have begun meanwhile. A
collector that is stopped half-way leaves nothing that a ledger could be wrong by, and the next one goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from shared.fracture import keys
from shared.fracture.ids import short
from shared.fracture.ledger import StudyState
from shared.fracture.ledger import sweep_ledger as ledger_of
from shared.fracture.messages import OfStudy
from shared.fracture.records import DeadLetter, FileCounts, SeriesPlan, StudyPlan, SweepPlan
from shared.pipeline.envelope import Envelope
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.store import Entry, Store
from shared.records.archive import find_record
from shared.records.dead_letters import done_since
from shared.records.ledger import closed_since, is_open, study_state, sweep_ledger, sweep_plan, sweeps
from shared.records.outcomes import fact_of
from shared.records.retention import (
    Ages,
    Belongings,
    Decision,
    Letter,
    Standing,
    Unit,
    due,
    in_order,
    plan,
    survey,
)

NO_PLAN = "it was begun and has no plan yet"
OPEN = "it is open: not closed since it was planned"
PENDING = "something of it is pending"


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collector did: what it deleted, and the units that it left because they came into use meanwhile."""

    deleted: tuple[Decision, ...]
    left: tuple[tuple[Unit, str], ...]


def decisions(store: Store, *, ages: Ages, now: datetime) -> Iterator[Decision]:
    """One decision for each object of the store, in the order of the keys. The store is listed three times."""

    def entries() -> Iterator[Entry]:
        return store.entries("")

    store.entries(keys.RESTRICTED[0])  # closed to us, what lies there could not go with what it belongs to
    belongings = read_belongings(store)
    surveyed = survey(entries(), belongings)
    standing = read_standing(store, belongings, *due(entries(), belongings=belongings, ages=ages, now=now))
    return plan(entries, belongings=belongings, surveyed=surveyed, standing=standing, ages=ages, now=now)


def explained(store: Store, key: str, *, ages: Ages, now: datetime) -> Decision:
    """The decision about one key; FractureSweepError where nothing lies under it."""
    found = next((one for one in decisions(store, ages=ages, now=now) if one.key == key), None)
    if found is None:
        raise FractureSweepError("no object lies under this key: see the keys of `fracture-sweep gc --dry-run --json`")
    return found


def collect(
    store: Store, decided: Iterable[Decision], *, progress: Callable[[int], None] = lambda done: None
) -> Collected:
    """Delete what was decided, in a safe order, after a last look at each unit."""
    deleted: list[Decision] = []
    left: list[tuple[Unit, str]] = []
    plans = _Sweeps(store)
    for unit, group in itertools.groupby(in_order(decided), key=lambda decision: decision.unit):
        together = list(group)
        why = _in_use(store, plans, unit, together)
        if why is not None:
            left.append((unit, why))
            continue
        for decision in together:
            store.delete(decision.key)
            deleted.append(decision)
            progress(len(deleted))
    return Collected(deleted=tuple(deleted), left=tuple(left))


# reading -------------------------------------------------------------------------------------------------------------
def read_belongings(store: Store) -> Belongings:
    """Which study each series and case is of, and which sweeps hold each study."""
    of_series: dict[str, str] = {}
    of_case: dict[str, str] = {}
    holding: dict[str, set[str]] = {}
    for key in store.keys(keys.STUDY_PLANS):
        study = find_record(store, key, StudyPlan)
        if study is not None:
            of_series.update((series.series_id, study.study_id) for series in study.series)
    for key in store.keys(keys.SERIES_PLANS):
        series_plan = find_record(store, key, SeriesPlan)
        if series_plan is not None:
            of_series[series_plan.series_id] = series_plan.study_id
            of_case.update((case.case_id, series_plan.study_id) for case in series_plan.cases)
    for key in store.keys(keys.SWEEPS_OF_STUDY):
        study_id, sweep_id = key.removeprefix(keys.SWEEPS_OF_STUDY).split("/", 1)
        holding.setdefault(study_id, set()).add(sweep_id)
    for sweep_id in sweeps(store):
        planned = sweep_plan(store, sweep_id)
        for line in () if planned is None else planned.series:
            holding.setdefault(line.study_id, set()).add(sweep_id)
    return Belongings(
        study_of_series=of_series,
        study_of_case=of_case,
        sweeps_of_study={study_id: frozenset(found) for study_id, found in holding.items()},
    )


def read_standing(
    store: Store,
    belongings: Belongings,
    due_sweeps: frozenset[str],
    due_studies: frozenset[str],
    letters: frozenset[str],
) -> Standing:
    """Where the sweeps, studies and letters stand that have something old."""
    marked = {sweep_id for held in belongings.sweeps_of_study.values() for sweep_id in held}
    under_way: dict[str, str] = {}
    for sweep_id in sorted(due_sweeps):
        why = _sweep_under_way(store, sweep_id, marked=sweep_id in marked)
        if why is not None:
            under_way[sweep_id] = why
    plans = _Sweeps(store)
    studies: dict[str, str] = {}
    reports: dict[str, frozenset[str]] = {}
    for study_id in sorted(due_studies):
        why, counting = plans.stands(study_id, belongings.sweeps_of_study.get(study_id, frozenset()))
        reports[study_id] = counting
        if why is not None:
            studies[study_id] = why
    found = {letter_id: _letter(store, letter_id) for letter_id in sorted(letters)}
    about = {letter.study_id for letter in found.values() if letter is not None and letter.study_id is not None}
    for study_id in sorted(about - due_studies):
        why, _ = plans.stands(study_id, belongings.sweeps_of_study.get(study_id, frozenset()))
        if why is not None:
            studies[study_id] = why
    return Standing(
        sweeps_under_way=under_way,
        studies_under_way=studies,
        reports_that_count=reports,
        letters={letter_id: letter for letter_id, letter in found.items() if letter is not None},
    )


def _sweep_under_way(store: Store, sweep_id: str, *, marked: bool) -> str | None:
    if sweep_plan(store, sweep_id) is None:
        return NO_PLAN if marked else None
    if is_open(store, sweep_id):
        return OPEN
    ledger = sweep_ledger(store, sweep_id)
    return PENDING if ledger is not None and ledger.pending else None


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """The newest plan of a sweep: the revision that it was read from, and its references by study."""

    key: str
    scope: str
    planned_at: datetime
    references: Mapping[str, tuple[tuple[str, str, str], ...]]


class _Sweeps:
    """The plans of sweeps, each read once a revision: a sweep has many studies, and each of them asks for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, _Planned] = {}

    def planned(self, sweep_id: str) -> _Planned | None:
        """The newest plan; None while there is none."""
        key = max(self._store.keys(keys.sweep_plans(sweep_id)), default=None)
        if key is None:
            return None
        if sweep_id not in self._read or self._read[sweep_id].key != key:
            plan_of_it = find_record(self._store, key, SweepPlan)
            if plan_of_it is None:  # another collector was faster
                return None
            references: dict[str, list[tuple[str, str, str]]] = {}
            for line in plan_of_it.series:
                references.setdefault(line.study_id, []).append((line.study_id, line.series_id, line.manifest_id))
            self._read[sweep_id] = _Planned(
                key=key,
                scope=plan_of_it.protocols.scope,
                planned_at=plan_of_it.planned_at,
                references={study_id: tuple(lines) for study_id, lines in references.items()},
            )
        return self._read[sweep_id]

    def stands(self, study_id: str, held_by: frozenset[str]) -> tuple[str | None, frozenset[str]]:
        """Why a study is under way (None: it is not), and the reports of it that a ledger counts."""
        why: str | None = None
        counting: set[str] = set()
        states: dict[str, StudyState | None] = {}
        for sweep_id in sorted(held_by):
            planned = self.planned(sweep_id)
            if planned is None:
                why = f"sweep {short(sweep_id)}: {NO_PLAN}"
                continue
            if not closed_since(self._store, sweep_id, planned.planned_at):
                why = f"sweep {short(sweep_id)}: {OPEN}"
            if planned.scope not in states:
                states[planned.scope] = study_state(self._store, study_id, planned.scope)
            state = states[planned.scope]
            if state is not None:
                counting.add(state.report_id)
            ledger = ledger_of(
                sweep_id=sweep_id,
                references=planned.references.get(study_id, ()),
                states={} if state is None else {study_id: state},
                files=FileCounts(),
            )
            if ledger.pending:
                why = f"sweep {short(sweep_id)}: {PENDING}"
        return why, frozenset(counting)


def _letter(store: Store, letter_id: str) -> Letter | None:
    letter = find_record(store, keys.dead_letter(letter_id), DeadLetter)
    if letter is None:
        return None
    try:
        envelope = Envelope.from_bytes(letter.envelope.encode())
    except ValueError:
        return Letter(study_id=None, done=False)
    fact = fact_of(envelope)
    if not isinstance(fact, OfStudy):
        return Letter(study_id=None, done=False)
    return Letter(study_id=fact.study_id, done=done_since(store, fact))


# deleting ------------------------------------------------------------------------------------------------------------
def _in_use(store: Store, plans: _Sweeps, unit: Unit, together: list[Decision]) -> str | None:
    """Why a unit is to be left after all: it came into use since it was decided about."""
    kind, name = unit
    if kind == "sweep":
        return _sweep_under_way(store, name, marked=False)
    if kind == "study":
        prefix = keys.sweeps_of_study(name)
        held_by = frozenset(key.removeprefix(prefix) for key in store.keys(prefix))
        why, _ = plans.stands(name, held_by)
        whole = any(decision.key.startswith(keys.STUDY_PLANS) for decision in together)
        return why or ("a sweep holds it again" if whole and held_by else None)
    if kind == "submission":
        there = {entry.key for entry in store.entries(f"{keys.INBOX}{name}/")}
        return None if there <= {decision.key for decision in together} else "something of it came meanwhile"
    return None
