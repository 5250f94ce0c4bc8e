"""Terminal records: each is stored before its fact is told, and telling it twice does no harm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from pydantic import BaseModel, ValidationError

from shared.fracture import keys
from shared.fracture.ids import digest, sha256_hex
from shared.fracture.messages import (
    FACTS,
    CaseDeadLettered,
    CaseNotEvaluated,
    CaseRejected,
    Fact,
    OfCase,
    OfSeries,
    SeriesDeadLettered,
    SeriesRejected,
)
from shared.fracture.records import DeadLetter, DeadLetterNote, NotEvaluated, Rejection
from shared.pipeline.envelope import Envelope
from shared.pipeline.store import Store
from shared.records.archive import write_record


def _series_ids(fact: OfSeries) -> dict[str, object]:
    return {
        "study_id": fact.study_id,
        "series_id": fact.series_id,
        "manifest_id": fact.manifest_id,
        "protocols": fact.protocols,
    }


def case_ids(fact: OfCase) -> dict[str, object]:
    """The ids of a case, for another fact about it."""
    return {
        "study_id": fact.study_id,
        "series_id": fact.series_id,
        "case_id": fact.case_id,
        "protocols": fact.protocols,
    }


def reject_series(store: Store, fact: OfSeries, *, service: str, reasons: tuple[str, ...]) -> SeriesRejected:
    """Record why a series is refused, and the fact that tells it."""
    record = Rejection(service=service, reasons=reasons, recorded_at=datetime.now(UTC))
    write_record(store, keys.series_rejected(fact.series_id, fact.manifest_id), record)
    return SeriesRejected.model_validate(_series_ids(fact))


def reject_case(store: Store, fact: OfCase, *, service: str, reasons: tuple[str, ...]) -> CaseRejected:
    """Record why a case is refused, and the fact that tells it."""
    record = Rejection(service=service, reasons=reasons, recorded_at=datetime.now(UTC))
    write_record(store, keys.outcome("rejected", fact.protocols.scope, fact.case_id), record)
    return CaseRejected.model_validate(case_ids(fact))


def case_not_evaluated(store: Store, fact: OfCase, record: NotEvaluated) -> CaseNotEvaluated:
    """Record by which rule a case is not scored, and the fact that tells it. `fact` names the case."""
    write_record(store, keys.outcome("not-evaluated", fact.protocols.scope, fact.case_id), record)
    return CaseNotEvaluated.model_validate(case_ids(fact))


def rejecting(store: Store, service: str) -> Callable[[BaseModel, tuple[str, ...]], Iterable[BaseModel]]:
    """What a Service does with a Reject of its handlers (pipeline.service.Service.rejected)."""

    def rejected(fact: BaseModel, reasons: tuple[str, ...]) -> Iterable[BaseModel]:
        match fact:
            case OfCase():
                return (reject_case(store, fact, service=service, reasons=reasons),)
            case OfSeries():
                return (reject_series(store, fact, service=service, reasons=reasons),)
            case _:
                raise TypeError(f"{type(fact).__name__} is about no series and no case: it cannot be rejected")

    return rejected


def dead_letter_id(queue: str, envelope: Envelope | None, body: bytes) -> str:
    """The id of a dead letter: the same letter recorded twice is one record."""
    if envelope is None:
        return digest({"queue": queue, "body": sha256_hex(body)})
    return digest({"queue": queue, "message": envelope.message_id, "attempt": envelope.attempt})


def record_dead_letter(
    store: Store, *, queue: str, envelope: Envelope | None, body: bytes, death: str, delivery_count: int
) -> Iterable[BaseModel]:
    """Store a dead letter and the terminal note of its series or case; returns the fact that tells it.

    Nothing is told of a letter that itself was about a dead letter, or the report-generator could be called for ever:
    a note says that the report of its study was given up.
    """
    queue = queue.removesuffix(".dead")
    letter_id = dead_letter_id(queue, envelope, body)
    failure = None if envelope is None else envelope.failure
    kind = failure.kind if failure else (death.replace("_", "-") or "unreadable")
    reason = failure.reason if failure else _reason_of_death(kind, delivery_count)
    attempts = 0 if envelope is None else envelope.attempt
    write_record(
        store,
        keys.dead_letter(letter_id),
        DeadLetter(
            dead_letter_id=letter_id,
            queue=queue,
            kind=kind,
            reason=reason,
            service=failure.service if failure else "",
            traceback=failure.traceback if failure else "",
            message_type="" if envelope is None else envelope.message_type,
            message_id="" if envelope is None else envelope.message_id,
            parents=() if envelope is None else envelope.parents,
            attempts=attempts,
            delivery_count=delivery_count,
            recorded_at=datetime.now(UTC),
            envelope=body.decode("utf-8", errors="replace"),
        ),
    )
    fact = None if envelope is None else fact_of(envelope)
    note = DeadLetterNote(dead_letter_id=letter_id, queue=queue, kind=kind, reason=reason, attempts=attempts)
    match fact:
        case CaseDeadLettered() | SeriesDeadLettered():
            write_record(store, keys.report_dead_lettered(fact.protocols.scope, fact.study_id), note)
            return ()
        case OfCase():
            write_record(store, keys.outcome("dead-lettered", fact.protocols.scope, fact.case_id), note)
            return (CaseDeadLettered.model_validate(case_ids(fact)),)
        case OfSeries():
            scope = fact.protocols.scope
            write_record(store, keys.series_dead_lettered(scope, fact.series_id, fact.manifest_id), note)
            return (SeriesDeadLettered.model_validate(_series_ids(fact)),)
        case _:
            return ()


def _reason_of_death(kind: str, delivery_count: int) -> str:
    match kind:
        case "delivery-limit":
            return f"its worker died or let it go each time it was delivered ({delivery_count or 'all'} deliveries)"
        case "unreadable":
            return "the message is not readable"
        case _:
            return f"the broker gave it up ({kind})"


def fact_of(envelope: Envelope) -> Fact | None:
    """The fact in an envelope; None where its type or body is unknown to this version."""
    model = FACTS.get(envelope.message_type)
    if model is None:
        return None
    try:
        return model.model_validate_json(json.dumps(envelope.body))
    except ValidationError:
        return None
