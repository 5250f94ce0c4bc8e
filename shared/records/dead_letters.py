"""The dead letters in the store: listing them with where each stands now, and publishing them again.

Where a letter stands is read from the store each time, never noted down: a case that was done since needs nothing, one
that was superseded is nobody's any more (and is somebody's again if its series returns to that state). A letter whose
replay was given up again is left alone too: the newer letter stands for it, or each replay of all would double them.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict

from shared.fracture import keys
from shared.fracture.ledger import Outcome, SeriesStatus, StudyState
from shared.fracture.messages import (
    CaseDeadLettered,
    Fact,
    OfCase,
    OfSeries,
    OfStudy,
    ReportWritten,
    SeriesDeadLettered,
    SweepClosed,
    SweepPlanned,
)
from shared.fracture.records import DeadLetter, DeadLetterNote, Record, SweepPlan
from shared.pipeline.broker import Broker
from shared.pipeline.envelope import MAX_PARENTS, Envelope
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.failures import WHAT_TO_DO
from shared.pipeline.store import Store
from shared.records.archive import find_record, newest, read_record, write_record
from shared.records.ledger import study_state, sweep_ledger, sweep_plan
from shared.records.outcomes import fact_of

State = Literal["open", "replayed", "given up again", "done since", "superseded", "not readable"]
STATES: Final[tuple[State, ...]] = get_args(State)
"""`open`: wants somebody. `replayed`: published again, its end not yet in the store. `given up again`: its replay is a
newer letter, which stands for it. `done since` and `superseded` want nothing. `not readable`: no message at all."""

UNITS: Final = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Replay(Record):
    """That a dead letter was published again, as which message."""

    dead_letter_id: str
    message_id: str
    replayed_at: datetime


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A dead letter and where it stands now."""

    letter: DeadLetter
    state: State
    replays: tuple[Replay, ...] = ()
    """Earlier replays, the oldest first."""
    again: str = ""
    """The id of the letter that its last replay became."""

    @cached_property
    def ids(self) -> dict[str, str]:
        """What the message is about: `study_id`, `series_id`, `case_id`, `sweep_id`, as far as it names them."""
        return ids_of(self.letter)

    @property
    def what_to_do(self) -> str:
        """One line for the operator."""
        match self.state:
            case "done since":
                return "nothing: what it asked for was done since"
            case "superseded":
                return "nothing: a newer state of its series stands in its place"
            case "replayed":
                return "wait for its end; replay it once more (--again) only where nothing is under way"
            case "given up again":
                return f"see the newer letter {self.again[:12]}"
            case _:
                return WHAT_TO_DO.get(self.letter.kind, "see docs/runbook.md")

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values; the message's own JSON as text."""
        return {
            **self.letter.model_dump(mode="json"),
            **self.ids,
            "state": self.state,
            "what_to_do": self.what_to_do,
            "given_up_again_as": self.again or None,
            "replays": [replay.model_dump(mode="json", exclude={"dead_letter_id"}) for replay in self.replays],
        }


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which dead letters are meant; what is None lets all pass."""

    queue: str | None = None
    kind: str | None = None
    reason: str | None = None
    """A text that the reason holds, in upper or lower case."""
    study: str | None = None
    """The beginning of a study's id; `case` likewise."""
    case: str | None = None
    since: datetime | None = None

    @property
    def chooses(self) -> bool:
        """Whether anything is filtered at all."""
        return self != Filter()

    def passes(self, letter: DeadLetter) -> bool:
        """Whether a letter is meant."""
        ids = ids_of(letter) if self.study is not None or self.case is not None else {}
        return (
            self.queue in (None, letter.queue)
            and self.kind in (None, letter.kind)
            and (self.reason is None or self.reason.casefold() in letter.reason.casefold())
            and (self.study is None or ids.get("study_id", "").startswith(self.study.lower()))
            and (self.case is None or ids.get("case_id", "").startswith(self.case.lower()))
            and (self.since is None or letter.recorded_at >= self.since)
        )


def moment(text: str, *, now: datetime) -> datetime:
    """The time that a text names: an age before now (90m, 12h, 7d, 2w), or a date or time in ISO 8601 (UTC)."""
    age = re.fullmatch(r"(\d{1,6})([mhdw])", text.strip())
    if age:
        return now - timedelta(**{UNITS[age.group(2)]: int(age.group(1))})
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        raise FractureSweepError(
            f"{text!r} is no time: give an age (90m, 12h, 7d, 2w) or a date or time in UTC (2026-11-23, "
            "2026-11-23T04:00)"
        ) from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def letters(store: Store) -> Iterator[DeadLetter]:
    """All dead letters, in the order of their ids."""
    for key in list(store.keys(keys.DEAD_LETTERS)):
        if key.endswith("/letter.json"):
            yield read_record(store, key, DeadLetter)


def ids_of(letter: DeadLetter) -> dict[str, str]:
    """The ids that a letter's message names, also where this version cannot read the fact itself."""
    envelope = _envelope(letter)
    body = {} if envelope is None else envelope.body
    names = ("study_id", "series_id", "case_id", "sweep_id")
    return {name: value for name in names if isinstance(value := body.get(name), str)}


def done_since(store: Store, fact: Fact) -> bool:
    """Whether what a fact asks for has come to another end than the dead letters, or is nobody's any more."""
    return Survey(store, found=()).end_of(fact) is not None


class Survey:
    """All dead letters of a store as they stand at one moment; make another one to look again.

    `found`: the letters, where they were read already.
    """

    def __init__(self, store: Store, *, found: Iterable[DeadLetter] | None = None) -> None:
        self._store = store
        self.letters = sorted(
            letters(store) if found is None else found, key=lambda letter: (letter.recorded_at, letter.dead_letter_id)
        )
        self._by_message = {(letter.queue, letter.message_id): letter for letter in self.letters if letter.message_id}
        self._studies: dict[tuple[str, str], StudyState | None] = {}

    def find(self, beginning: str) -> Standing:
        """The dead letter whose id begins so; FractureSweepError where none or several do."""
        found = [letter for letter in self.letters if letter.dead_letter_id.startswith(beginning.lower())]
        if len(found) != 1:
            what = "no dead letter has" if not found else f"{len(found)} dead letters have"
            raise FractureSweepError(
                f"{what} an id that begins with {beginning!r}: see `fracture-sweep dead-letters list`"
            )
        return self.standing(found[0])

    def matching(self, wanted: Filter | None = None, *, states: Iterable[State] = STATES) -> list[Standing]:
        """The letters that a filter lets pass and that stand so, the oldest first."""
        among = frozenset(states)
        chosen = wanted or Filter()
        standings = (self.standing(letter) for letter in self.letters if chosen.passes(letter))
        return [standing for standing in standings if standing.state in among]

    def standing(self, letter: DeadLetter) -> Standing:
        """Where a letter stands."""
        replays = tuple(_replays(self._store, letter))
        envelope = _envelope(letter)
        if envelope is None:
            return Standing(letter=letter, state="not readable", replays=replays)
        fact = fact_of(envelope)
        end = None if fact is None else self.end_of(fact)
        if end is not None:
            return Standing(letter=letter, state=end, replays=replays)
        if not replays:
            return Standing(letter=letter, state="open")
        again = self._by_message.get((letter.queue, replays[-1].message_id))
        if again is None:
            return Standing(letter=letter, state="replayed", replays=replays)
        return Standing(letter=letter, state="given up again", replays=replays, again=again.dead_letter_id)

    def end_of(self, fact: Fact) -> State | None:
        """To which end, other than the dead letters, what a fact asks for has come since; None while it has not."""
        match fact:
            case SweepPlanned() | SweepClosed():
                return self._end_of_sweep(fact.sweep_id)
            case ReportWritten():
                return self._end_of_report(fact)
            case OfStudy():
                state = self._study(fact.study_id, fact.protocols.scope)
                return None if state is None else self._end_in_study(fact, state)
            case _:
                return None

    def _end_in_study(self, fact: OfStudy, state: StudyState) -> State | None:
        match fact:
            case OfCase():
                case = next((case for case in state.cases if case.case_id == fact.case_id), None)
                if case is None:
                    return None
                if case.superseded:
                    return "superseded"
                # of a fact that tells of a dead letter, the report is all that was asked for
                done = isinstance(fact, CaseDeadLettered) or _reached(case.outcome)
            case OfSeries():
                series = next((s for s in state.series if s.planned.series_id == fact.series_id), None)
                if series is None:
                    return None
                if series.planned.manifest_id != fact.manifest_id:
                    return "superseded"
                done = isinstance(fact, SeriesDeadLettered) or self._reached_by_all(fact, series)
            case _:
                done = True
        return "done since" if done and state.report_written else None

    def _reached_by_all(self, fact: OfSeries, series: SeriesStatus) -> bool:
        """Whether a series has its end, and none of its cases was left to the series' own dead letter."""
        key = keys.series_dead_lettered(fact.protocols.scope, fact.series_id, fact.manifest_id)
        note = find_record(self._store, key, DeadLetterNote)
        ended = [case.outcome for case in series.cases if not case.superseded]
        return series.state in ("planned", "rejected") and (note is None or note not in ended)

    def _end_of_report(self, fact: ReportWritten) -> State | None:
        """A report is done where the worklists of its study's sweeps show the newest one."""
        state = self._study(fact.study_id, fact.protocols.scope)
        if state is None or not state.report_written:
            return None
        prefix = keys.sweeps_of_study(fact.study_id)
        for sweep_id in [key.removeprefix(prefix) for key in self._store.keys(prefix)]:
            plan = sweep_plan(self._store, sweep_id)
            if plan is None or plan.protocols.bundle_id != fact.protocols.bundle_id:
                continue
            shown = newest(self._store, keys.worklists(sweep_id), _Shown)
            if shown is None or shown.reports.get(fact.study_id) != state.report_id:
                return None
        return "done since"

    def _end_of_sweep(self, sweep_id: str) -> State | None:
        """A sweep's news is done where its newest worklist shows the sweep as it is."""
        plan: SweepPlan | None = sweep_plan(self._store, sweep_id)
        if plan is None:
            return None
        if plan.protocols.bundle_id is None:
            return "done since"  # features for training: there is no worklist
        shown = newest(self._store, keys.worklists(sweep_id), _Shown)
        ledger = sweep_ledger(self._store, sweep_id)
        closed = next(iter(self._store.keys(keys.sweep_closed(sweep_id))), None) is not None
        if shown is None or ledger is None:
            return None
        return "done since" if (shown.closed, shown.ledger) == (closed, ledger.as_json()) else None

    def _study(self, study_id: str, scope: str) -> StudyState | None:
        key = (study_id, scope)
        if key not in self._studies:
            self._studies[key] = study_state(self._store, study_id, scope)
        return self._studies[key]


class _Shown(BaseModel):
    """What a worklist shows, of all that it says (report_generator.worklist.Worklist)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    closed: bool
    reports: dict[str, str]
    ledger: dict[str, Any]


def _reached(outcome: Outcome | None) -> bool:
    return outcome is not None and not isinstance(outcome, DeadLetterNote)


def _envelope(letter: DeadLetter) -> Envelope | None:
    try:
        return Envelope.from_bytes(letter.envelope.encode())
    except ValueError:
        return None


def _replays(store: Store, letter: DeadLetter) -> Iterator[Replay]:
    prefix = keys.dead_letter_replay(letter.dead_letter_id, 0).rsplit("-", 1)[0]
    for key in list(store.keys(prefix)):
        yield read_record(store, key, Replay)


def replay(store: Store, broker: Broker, standing: Standing) -> State:
    """Publish a dead letter again to the queue that it came from; anything but `replayed` says why it was left alone.

    Published first, then noted: a replay that is interrupted between the two is at worst published twice.
    """
    envelope = _envelope(standing.letter)
    if envelope is None or standing.state not in ("open", "replayed"):
        return standing.state
    letter = standing.letter
    again = envelope.model_copy(
        update={
            "message_id": uuid.uuid4().hex,
            "parents": (*envelope.parents, envelope.message_id)[-MAX_PARENTS:],
            "attempt": 1,
            "failure": None,
            "published_at": datetime.now(UTC),
        }
    )
    broker.publish_to_queue(letter.queue, again.to_bytes())
    record = Replay(dead_letter_id=letter.dead_letter_id, message_id=again.message_id, replayed_at=datetime.now(UTC))
    number = len(standing.replays) + 1
    while not write_record(store, keys.dead_letter_replay(letter.dead_letter_id, number), record):
        number += 1
    return "replayed"
