"""The ledgers of series and cases, from records alone (DESIGN, "Ledger"). Pure; `shared.records.ledger` reads.

Cases: found = reported + not evaluated + rejected + dead-lettered + superseded + pending. Of two states the earlier in
this order counts. A classified case is *reported* only when the report that shows it lies in the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from shared.fracture.ids import digest
from shared.fracture.records import (
    Classified,
    DeadLetterNote,
    FileCounts,
    NotEvaluated,
    PlannedSeries,
    Rejection,
    SeriesPlan,
    StudyPlan,
)

CaseState = Literal["reported", "not evaluated", "rejected", "dead-lettered", "superseded", "pending"]
CASE_STATES: tuple[CaseState, ...] = (
    "reported",
    "not evaluated",
    "rejected",
    "dead-lettered",
    "superseded",
    "pending",
)
SeriesState = Literal["planned", "rejected", "dead-lettered", "superseded", "pending"]
SERIES_STATES: tuple[SeriesState, ...] = ("planned", "rejected", "dead-lettered", "superseded", "pending")

Outcome = Classified | NotEvaluated | Rejection | DeadLetterNote


@dataclass(frozen=True, kw_only=True)
class CaseStatus:
    """One case and where it stands. `outcome` is its terminal record; None while pending or superseded."""

    case_id: str
    series_id: str
    level: str
    outcome: Outcome | None = None
    superseded: bool = False
    unreported: DeadLetterNote | None = None
    """Of a classified case without its report: the dead letter that may have cost it the report."""

    @property
    def terminal(self) -> bool:
        """Whether nothing more is to come for this case."""
        return self.superseded or self.outcome is not None

    def state(self, *, report_written: bool) -> CaseState:
        """Its line of the ledger."""
        if self.superseded:
            return "superseded"
        match self.outcome:
            case Classified():
                if report_written:
                    return "reported"
                return "pending" if self.unreported is None else "dead-lettered"
            case NotEvaluated():
                return "not evaluated"
            case Rejection():
                return "rejected"
            case DeadLetterNote():
                return "dead-lettered"
            case None:
                return "pending"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it was not scored, the leading reason first."""
        match self.outcome:
            case NotEvaluated(reasons=reasons) | Rejection(reasons=reasons):
                return reasons
            case DeadLetterNote() as note:
                return (reason_of(note),)
            case _:
                return ()


def reason_of(note: DeadLetterNote) -> str:
    """A dead letter in one line."""
    return f"{note.kind} in {note.queue}: {note.reason}"


@dataclass(frozen=True, kw_only=True)
class SeriesStatus:
    """One series of a study's newest plan and where it stands."""

    planned: PlannedSeries
    state: SeriesState
    reasons: tuple[str, ...] = ()
    plan: SeriesPlan | None = None
    cases: tuple[CaseStatus, ...] = ()
    """Those of the newest plan first, then those that it superseded."""

    @property
    def complete(self) -> bool:
        """Rejected, dead-lettered, or all its cases terminal."""
        if self.state == "planned":
            return all(case.terminal for case in self.cases)
        return self.state != "pending"


@dataclass(frozen=True, kw_only=True)
class StudyState:
    """A study under one bundle, as the store shows it now."""

    study_id: str
    scope: str
    plan: StudyPlan
    series: tuple[SeriesStatus, ...]
    report_written: bool = False
    """Whether the report with this `report_id` lies in the store."""

    @property
    def complete(self) -> bool:
        """Whether every series of the newest plan is rejected, dead-lettered, or has all its cases terminal."""
        return all(series.complete for series in self.series)

    @property
    def report_id(self) -> str:
        """The hash of the plan revisions and terminal records that a report of this state shows."""
        return report_id_of(self)

    @property
    def cases(self) -> tuple[CaseStatus, ...]:
        """All cases of the study."""
        return tuple(case for series in self.series for case in series.cases)


def report_id_of(state: StudyState) -> str:
    """The report's id of a state; equal states give equal ids, whatever happened on the way.

    Fields at their defaults do not count, so that a record's new field leaves the ids of what was reported alone.
    """
    return digest(
        {
            "study": state.study_id,
            "scope": state.scope,
            "plan": state.plan.model_dump(mode="json", exclude_defaults=True),
            "series": [
                {
                    "series": series.planned.series_id,
                    "state": series.state,
                    "reasons": list(series.reasons),
                    "plan": None if series.plan is None else series.plan.model_dump(mode="json", exclude_defaults=True),
                    "cases": [
                        [
                            case.case_id,
                            case.superseded,
                            type(case.outcome).__name__,
                            None
                            if case.outcome is None
                            else case.outcome.model_dump(mode="json", exclude_defaults=True),
                        ]
                        for case in series.cases
                    ],
                }
                for series in state.series
            ],
        }
    )


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts by state, and reasons by state."""

    found: int
    by_state: Mapping[str, int]
    reasons: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the states add up to what was found."""
        return self.found == sum(self.by_state.values())


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The three ledgers of a sweep."""

    sweep_id: str
    files: FileCounts
    series: Tally
    cases: Tally
    studies: int
    reports: int

    @property
    def pending(self) -> int:
        """Series and cases that something is still to come for."""
        return self.series.by_state.get("pending", 0) + self.cases.by_state.get("pending", 0)

    @property
    def exact(self) -> bool:
        """Whether all three ledgers add up."""
        files = self.files.found == self.files.in_series + sum(self.files.ignored.values())
        return files and self.series.exact and self.cases.exact

    def as_json(self) -> dict[str, object]:
        """The ledgers as JSON values."""
        return {
            "sweep_id": self.sweep_id,
            "exact": self.exact,
            "pending": self.pending,
            "studies": self.studies,
            "reports": self.reports,
            "files": self.files.model_dump(mode="json"),
            "series": _tally_json(self.series),
            "cases": _tally_json(self.cases),
        }


def _tally_json(tally: Tally) -> dict[str, object]:
    return {
        "found": tally.found,
        "by_state": dict(tally.by_state),
        "reasons": {state: dict(reasons) for state, reasons in tally.reasons.items()},
    }


def tally(lines: Iterable[tuple[str, tuple[str, ...]]], states: tuple[str, ...]) -> Tally:
    """Counts (state, reasons) lines; under each state only the leading reason is counted."""
    by_state: Counter[str] = Counter(dict.fromkeys(states, 0))
    reasons: dict[str, Counter[str]] = {}
    found = 0
    for state, why in lines:
        found += 1
        by_state[state] += 1
        if why:
            reasons.setdefault(state, Counter())[why[0]] += 1
    return Tally(found=found, by_state=dict(by_state), reasons={key: dict(value) for key, value in reasons.items()})


def sweep_ledger(
    *, sweep_id: str, references: Iterable[tuple[str, str, str]], states: Mapping[str, StudyState], files: FileCounts
) -> Ledger:
    """The ledgers of a sweep: `references` are its (study_id, series_id, manifest_id), `states` its studies.

    A reference to a manifest that a newer one replaced counts as superseded, and so do its cases.
    """
    series_lines: list[tuple[str, tuple[str, ...]]] = []
    case_lines: list[tuple[str, tuple[str, ...]]] = []
    studies: set[str] = set()
    for study_id, series_id, manifest_id in references:
        studies.add(study_id)
        state = states.get(study_id)
        status = None if state is None else next((s for s in state.series if s.planned.series_id == series_id), None)
        if state is None or status is None:
            series_lines.append(("pending", ()))
            continue
        if status.planned.manifest_id != manifest_id:
            series_lines.append(("superseded", ()))
            case_lines.extend(("superseded", ()) for case in status.cases if case.superseded)
            continue
        series_lines.append((status.state, status.reasons))
        for case in status.cases:
            where = case.state(report_written=state.report_written)
            why = (reason_of(case.unreported),) if where == "dead-lettered" and case.unreported else case.reasons
            case_lines.append((where, why))
    return Ledger(
        sweep_id=sweep_id,
        files=files,
        series=tally(series_lines, SERIES_STATES),
        cases=tally(case_lines, CASE_STATES),
        studies=len(studies),
        reports=sum(1 for study in studies if study in states and states[study].report_written),
    )
