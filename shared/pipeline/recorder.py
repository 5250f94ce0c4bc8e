"""The worker of the dead letters: what every queue gave up is recorded, then told, then acknowledged.

What the broker dead-letters on its own (a worker that died) leaves no fact behind; this loop makes one. It never
gives a letter up: a letter that cannot be recorded goes back to the end of its queue after a pause, so that it does not
hold up the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from pydantic import BaseModel

from shared.pipeline.broker import DELIVERY_LIMIT, Broker, Delivery, Subscription
from shared.pipeline.envelope import Envelope, Failure
from shared.pipeline.failures import kind_of, reason_of_death
from shared.pipeline.metrics import Metrics
from shared.pipeline.worker import UNKNOWN, confirmed, consume, places, read_envelope, short_ids

LOG = logging.getLogger("fracture_sweep.recorder")

DEAD: Final = ".dead"


class Record(Protocol):
    """Stores one dead letter and returns the facts that tell of it; may be called twice with the same letter."""

    def __call__(
        self, *, queue: str, envelope: Envelope | None, body: bytes, death: str, delivery_count: int
    ) -> Iterable[BaseModel]:
        """`queue` is the queue that gave the letter up (without `.dead`); `envelope` None where the body is none.

        `death` is the broker's reason, '' where a worker published the letter (`envelope.failure` has its reason);
        `delivery_count` is how often the queue had delivered it, 0 where that is not known.
        """


class Recorder:
    """Consumes `<queue>.dead` of each queue and has every letter recorded."""

    def __init__(
        self,
        broker: Broker,
        *,
        queues: Sequence[str],
        record: Record,
        metrics: Metrics | None = None,
        name: str = "recorder",
        known_types: Sequence[str] | None = None,
        pause_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.broker = broker
        self.queues = tuple(queue if queue.endswith(DEAD) else queue + DEAD for queue in queues)
        self.metrics = Metrics() if metrics is None else metrics
        self._record = record
        self._name = name
        self._known_types = None if known_types is None else frozenset(known_types)
        self._pause_seconds = pause_seconds
        self._clock = clock

    def run(self, stop: threading.Event) -> None:
        """Record until `stop` is set; then finish what was prefetched, and return."""
        consume(self.broker, self.queues, prefetch=1, slots=1, receive=self.receive, stop=stop, name=self._name)

    def receive(self, subscription: Subscription, delivery: Delivery, stop: threading.Event) -> None:
        """Have one dead letter recorded and told, then acknowledge it; else it goes to the end of its queue."""
        started = self._clock()
        self.metrics.start(self._name)
        envelope = _readable(delivery.body)
        message_type = self._label(envelope)
        outcome = "recorded"
        try:
            for fact in self._recorded(delivery, envelope):
                told = Envelope.of(fact, parent=envelope)
                _publish(self.broker, told, stop)
        except BaseException as error:
            LOG.error(
                "a dead letter could not be recorded; it is tried again",
                extra={"fields": _about(delivery, envelope) | {"error": places(error)}},
            )
            outcome = "given-back"
            stop.wait(self._pause_seconds)
            self._to_the_end(delivery, envelope, stop)
        else:
            delivery.ack()
            LOG.info("%s recorded", message_type, extra={"fields": _about(delivery, envelope)})
        self.metrics.finish(self._name, message_type, outcome=outcome, seconds=max(self._clock() - started, 0.0))

    def _recorded(self, delivery: Delivery, envelope: Envelope | None) -> Sequence[BaseModel]:
        return list(
            self._record(
                queue=delivery.queue.removesuffix(DEAD),
                envelope=envelope,
                body=delivery.body,
                death=delivery.death,
                delivery_count=_deliveries(delivery),
            )
        )

    def _to_the_end(self, delivery: Delivery, envelope: Envelope | None, stop: threading.Event) -> None:
        if stop.is_set():
            return  # it returns when the subscription closes
        if envelope is None:
            delivery.requeue()
            return
        letter = envelope
        if envelope.failure is None:
            # The broker's reason lies in headers, which a new publish does not carry.
            kind = kind_of(delivery.death or "unreadable")
            reason = reason_of_death(kind, queue=delivery.queue.removesuffix(DEAD), deliveries=_deliveries(delivery))
            letter = envelope.failed(Failure(kind=kind, reason=reason))
        confirmed(lambda: self.broker.publish_to_queue(delivery.queue, letter.to_bytes()), stop=stop)
        delivery.ack()

    def _label(self, envelope: Envelope | None) -> str:
        if envelope is None or (self._known_types is not None and envelope.message_type not in self._known_types):
            return UNKNOWN
        return envelope.message_type


def _deliveries(delivery: Delivery) -> int:
    """How often a letter's own queue had delivered it: known where the broker gave it up at the limit."""
    return DELIVERY_LIMIT + 1 if delivery.death == "delivery_limit" else 0


def _readable(body: bytes) -> Envelope | None:
    try:
        return read_envelope(body)
    except Exception:
        return None


def _publish(broker: Broker, told: Envelope, stop: threading.Event) -> None:
    confirmed(lambda: broker.publish(told.message_type, told.to_bytes()), stop=stop)


def _about(delivery: Delivery, envelope: Envelope | None) -> dict[str, object]:
    fields: dict[str, object] = {"queue": delivery.queue, "death": delivery.death}
    if envelope is None:
        return fields
    failure = {} if envelope.failure is None else {"kind": envelope.failure.kind}
    return (
        fields | {"message_id": envelope.message_id, "attempt": envelope.attempt} | failure | short_ids(envelope.body)
    )
