"""Terminal records: each is stored before its fact is told, and telling it twice does no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from pydantic import BaseModel

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
from shared.pipeline.envelope import SCHEMA_VERSION, Envelope, newer_envelope, open_fact, schema_version_in
from shared.pipeline.errors import NewerSchema
from shared.pipeline.failures import kind_of, reason_of_death
from shared.pipeline.store import Store
from shared.records.archive import write_record

_DECIDED: tuple[keys.Outcome, ...] = ("classified", "not-evaluated")


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


def decided(store: Store, scope: str, case_id: str) -> bool:
    """Whether a case has its result, or the rule by which it is not scored: its features are needed no more."""
    return any(store.exists(keys.outcome(kind, scope, case_id)) for kind in _DECIDED)


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
    if failure is not None:
        kind, reason = failure.kind, failure.reason
    elif envelope is None and (version := schema_version_in(body) or 0) > SCHEMA_VERSION:
        kind, reason = "newer-schema", str(newer_envelope(version))
    else:
        kind = kind_of(death or "unreadable")
        reason = reason_of_death(kind, queue=queue, deliveries=delivery_count)
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


def fact_of(envelope: Envelope) -> Fact | None:
    """The fact in an envelope; None where this version cannot read it (a newer one told it, or it is none)."""
    try:
        fact = open_fact(envelope, FACTS)
    except (NewerSchema, ValueError):
        return None
    return fact if isinstance(fact, Fact) else None
