"""The dead letters in the store: listing them, and publishing them again once their cause is mended."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Literal

from shared.fracture import keys
from shared.fracture.ledger import SeriesStatus
from shared.fracture.messages import OfCase, OfSeries
from shared.fracture.records import DeadLetter, DeadLetterNote, Record
from shared.pipeline.broker import Broker
from shared.pipeline.envelope import MAX_PARENTS, Envelope
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.store import Store
from shared.records.archive import read_record, write_record
from shared.records.ledger import case_outcome, study_state
from shared.records.outcomes import fact_of


class Replay(Record):
    """That a dead letter was published again, as which message."""

    dead_letter_id: str
    message_id: str
    replayed_at: datetime


Replayed = Literal["replayed", "done since", "not readable"]


def letters(store: Store) -> Iterator[DeadLetter]:
    """All dead letters, in the order of their ids."""
    for key in list(store.keys(keys.DEAD_LETTERS)):
        if key.endswith("/letter.json"):
            yield read_record(store, key, DeadLetter)


def find(store: Store, beginning: str) -> DeadLetter:
    """The dead letter whose id begins so; FractureSweepError where none or several do."""
    found = [letter for letter in letters(store) if letter.dead_letter_id.startswith(beginning)]
    if len(found) != 1:
        what = "no dead letter has" if not found else f"{len(found)} dead letters have"
        raise FractureSweepError(f"{what} an id that begins with {beginning!r}: see `fracture-sweep dead-letters list`")
    return found[0]


def matching(
    candidates: Iterable[DeadLetter], *, queue: str | None = None, kind: str | None = None, reason: str | None = None
) -> Iterator[DeadLetter]:
    """The letters of a queue, of a kind, whose reason holds a text; a filter that is None lets all pass."""
    for letter in candidates:
        if queue not in (None, letter.queue) or kind not in (None, letter.kind):
            continue
        if reason is None or reason.casefold() in letter.reason.casefold():
            yield letter


def replays(store: Store, letter: DeadLetter) -> int:
    """How often a dead letter was published again."""
    prefix = keys.dead_letter_replay(letter.dead_letter_id, 0).rsplit("-", 1)[0]
    return sum(1 for _ in store.keys(prefix))


def replay(store: Store, broker: Broker, letter: DeadLetter) -> Replayed:
    """Publish a dead letter again to the queue that it came from, unless its work was done since."""
    try:
        envelope = Envelope.from_bytes(letter.envelope.encode())
    except ValueError:
        return "not readable"
    if done_since(store, envelope):
        return "done since"
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
    number = replays(store, letter) + 1
    while not write_record(store, keys.dead_letter_replay(letter.dead_letter_id, number), record):
        number += 1
    return "replayed"


def done_since(store: Store, envelope: Envelope) -> bool:
    """Whether what a message asked for has come to another end than the dead letters."""
    match fact_of(envelope):
        case OfCase() as fact:
            outcome = case_outcome(store, fact.protocols.scope, fact.case_id)
            if outcome is None or isinstance(outcome, DeadLetterNote):
                return False
            state = study_state(store, fact.study_id, fact.protocols.scope)
            return state is not None and state.report_written
        case OfSeries() as fact:
            state = study_state(store, fact.study_id, fact.protocols.scope)
            return state is not None and any(
                series.planned.series_id == fact.series_id
                and series.planned.manifest_id == fact.manifest_id
                and (series.state == "rejected" or _all_told(store, fact.protocols.scope, series))
                and state.report_written
                for series in state.series
            )
        case _:
            return False


def _all_told(store: Store, scope: str, series: SeriesStatus) -> bool:
    """Whether each planned case has an end of its own: those without were never told of before the series was lost."""
    cases = () if series.plan is None else series.plan.cases
    return bool(cases) and all(case_outcome(store, scope, case.case_id) for case in cases)
