"""The one worker loop: receive, decode, handle, publish what follows, and only then acknowledge.

It is the one place that interprets the errors of `errors.py`. Which layer retries what: a handler never loops; a Retry
is published again here as a new message with `attempt` one higher (a requeue would use up the broker's delivery limit,
which is kept for workers that die); a store that is away or full is no fault of the message, so it has more attempts,
wider apart; a publish that the broker does not confirm is tried again with the facts at hand before the message is
given back. A message that cannot be handled goes to `<queue>.dead` with its reason, confirmed, before it is
acknowledged.

Budgets are the services' own. Behind them stands one net: a message that is under way for longer than any budget
allows makes /healthz fail, and the process finishes what else it holds and ends with 1 (Docker restarts what has ended,
not what is unhealthy). The broker delivers the message again, until the delivery limit gives it up.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, Protocol

from pydantic import BaseModel, ValidationError

from shared.pipeline.broker import Broker, Delivery, Subscription
from shared.pipeline.envelope import SCHEMA_VERSION, Envelope, Failure, faults, newer_envelope, open_fact
from shared.pipeline.envelope import schema_version_in as version_in
from shared.pipeline.errors import (
    BrokerUnavailable,
    NewerSchema,
    OverBudget,
    Reject,
    Retry,
    StoreFull,
    StoreUnavailable,
)
from shared.pipeline.failures import Kind
from shared.pipeline.health import HealthServer
from shared.pipeline.metrics import Metrics
from shared.pipeline.service import Batch, Service

LOG = logging.getLogger("fracture_sweep.worker")

_RECEIVE_SECONDS: Final = 1.0
_PUBLISH_ROUNDS: Final = 5
_PUBLISH_PAUSE_SECONDS: Final = 2.0
_REDELIVERED_TOGETHER_SECONDS: Final = 0.2
_SHORT_ID: Final = 12
STUCK_SECONDS: Final = 3600.0
"""A message under way for longer is stuck, unless a setting says otherwise."""
_WATCH_SECONDS: Final = 10.0
_STUCK_DRAIN_SECONDS: Final = 60.0
UNKNOWN: Final = "unknown"
"""The type label of a message whose type cannot be read."""


class _GivenBack(Exception):
    """What follows from a message could not be published: it must not be acknowledged."""


class _PartlyOverBudget(Exception):
    """Some of what a message asked for was done within the budget."""

    def __init__(self, told: Sequence[BaseModel], rest: OverBudget) -> None:
        super().__init__(str(rest))
        self.told = told
        self.rest = rest


class _Unreadable(Exception):
    """The message itself cannot be understood by this worker."""


def default_retry_delay(attempt: int) -> float:
    """Seconds until the attempt after this one: 5, 10, 20, … up to 300, a tenth of it at random."""
    seconds: float = min(5.0 * 2.0 ** (attempt - 1), 300.0)
    return seconds * random.uniform(0.9, 1.1)  # noqa: S311 - spreads retries, protects nothing


class Received(Protocol):
    """What takes deliveries off a subscription: one call handles one delivery, or several together."""

    def __call__(self, subscription: Subscription, delivery: Delivery, stop: threading.Event) -> None:
        """Handle the delivery, and acknowledge it or give it back."""


def consume(
    broker: Broker,
    queues: Sequence[str],
    *,
    prefetch: int,
    slots: int,
    receive: Received,
    stop: threading.Event,
    name: str,
) -> None:
    """Run `slots` threads over each queue until `stop` is set, then finish all that was prefetched, and return.

    Nothing that `receive` raises ends a thread: it is logged, and its delivery given back.
    """
    subscriptions = [broker.subscribe(queue, prefetch=prefetch) for queue in queues]
    threads = [
        threading.Thread(target=_slot, args=(subscription, receive, stop), name=f"{name}-{queue}-{slot}", daemon=True)
        for queue, subscription in zip(queues, subscriptions, strict=True)
        for slot in range(slots)
    ]
    for thread in threads:
        thread.start()
    try:
        stop.wait()
    finally:
        stop.set()
        for subscription in subscriptions:
            subscription.cancel()
        for thread in threads:
            thread.join()
        for subscription in subscriptions:
            subscription.close()


def _slot(subscription: Subscription, receive: Received, stop: threading.Event) -> None:
    while not subscription.drained:
        receive_next(subscription, receive, stop)


def receive_next(subscription: Subscription, receive: Received, stop: threading.Event) -> None:
    """Wait a little for the next delivery and have it handled; where that raises it is logged and given back."""
    delivery: Delivery | None = None
    try:
        delivery = subscription.receive(_RECEIVE_SECONDS)
        if delivery is not None:
            receive(subscription, delivery, stop)
    except BaseException as error:  # a thread that ended would leave its share of the queue unserved
        LOG.error("the worker loop failed; the message is given back", extra={"fields": {"error": places(error)}})
        stop.wait(_PUBLISH_PAUSE_SECONDS)
        if delivery is not None and not stop.is_set():
            _give_back(delivery)


def _give_back(delivery: Delivery) -> None:
    try:
        delivery.requeue()
    except Exception as error:
        LOG.error("giving a message back failed", extra={"fields": {"error": places(error)}})


def places(error: BaseException) -> str:
    """An exception's type and where it happened (file:line function), without any of its texts."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{type(error).__name__} at {where}" + (f"; from {places(cause)}" if cause is not None else "")


def _short(filename: str) -> str:
    return "/".join(filename.replace("\\", "/").split("/")[-3:])


class Worker:
    """A service at work on a broker.

    `retry_delay` gives the seconds before the attempt after the given one. `max_attempts` counts the first one too;
    while the store is away or full a message has `outage_attempts`. A message is stuck when it is under way for more
    than `stuck_seconds`.
    """

    def __init__(
        self,
        service: Service,
        broker: Broker,
        *,
        max_attempts: int = 5,
        outage_attempts: int = 60,
        retry_delay: Callable[[int], float] = default_retry_delay,
        metrics: Metrics | None = None,
        stuck_seconds: float = STUCK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.service = service
        self.broker = broker
        self.metrics = Metrics() if metrics is None else metrics
        self._max_attempts = max_attempts
        self._outage_attempts = max(outage_attempts, max_attempts)
        self._retry_delay = retry_delay
        self._stuck_seconds = stuck_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way: set[_Work] = set()
        self._turns = _Turns()
        self._suspects: list[_Work] = []
        self.metrics.oldest_in_flight(service.name, self.oldest_in_flight_seconds)

    @property
    def prefetch(self) -> int:
        """How many messages of one queue are taken at once: one a slot, or one batch a slot."""
        return self.service.slots * max([1, *(batch.size for batch in self.service.batches.values())])

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; then take nothing new, finish all that was prefetched, and return."""
        consume(
            self.broker,
            self.service.queues,
            prefetch=self.prefetch,
            slots=self.service.slots,
            receive=self.receive,
            stop=stop,
            name=self.service.name,
        )

    def receive(self, subscription: Subscription, delivery: Delivery, stop: threading.Event) -> None:
        """Handle one delivery, and those that its batch gathers; what follows is told, then each is acknowledged."""
        first = _Work(self, delivery, stop)
        works = [first, *self._gather(subscription, first, stop)]
        fresh = [work for work in works if work.delivery.delivery_count == 0]
        batched: dict[type[BaseModel], list[_Work]] = {}
        for work in fresh:
            if work.fact is not None and type(work.fact) in self.service.batches:
                batched.setdefault(type(work.fact), []).append(work)
        if fresh:
            with self._turns.beside_others():
                for fact_class, together in batched.items():
                    self._together(together, self.service.batches[fact_class])
                for work in fresh:
                    if type(work.fact) not in batched:
                        self._alone(work)
        suspects = [work for work in works if work.delivery.delivery_count > 0]
        if suspects:
            self._suspected(suspects, stop)

    def _suspected(self, works: Sequence[_Work], stop: threading.Event) -> None:
        """Handle redelivered messages one by one, those of the other slots among them, while nothing else runs.

        One of them may kill this process once more, and would count a delivery for whatever is under way beside it.
        """
        with self._lock:
            self._suspects.extend(works)
        with self._turns.alone():
            if self.service.slots > 1:
                stop.wait(_REDELIVERED_TOGETHER_SECONDS)  # until the other slots have handed in theirs
            with self._lock:
                handed_in, self._suspects = self._suspects, []
            for work in suspects_in_order(handed_in):
                self._alone(work)

    def _gather(self, subscription: Subscription, first: _Work, stop: threading.Event) -> list[_Work]:
        batch = None if first.fact is None else self.service.batches.get(type(first.fact))
        if batch is None or batch.size == 1:
            return []
        redelivered = first.delivery.delivery_count > 0
        wait_seconds = _REDELIVERED_TOGETHER_SECONDS if redelivered else batch.wait_seconds
        works: list[_Work] = []
        while len(works) + 1 < batch.size:
            delivery = subscription.receive(wait_seconds)
            if delivery is None:
                break
            works.append(_Work(self, delivery, stop))
        return works

    def _alone(self, work: _Work) -> None:
        work.start()
        if work.fact is None:
            work.finish(work.unreadable)
            return
        try:
            facts = self._follow(work.fact)
        except BaseException as error:  # also a SystemExit out of a handler is one message's failure
            work.finish(error)
        else:
            work.finish(facts)

    def _follow(self, fact: BaseModel) -> Sequence[BaseModel]:
        handler = self.service.handlers.get(type(fact))
        if handler is not None:
            return _told(handler(fact))
        (result,) = _run_batch(self.service.batches[type(fact)], [fact])
        if isinstance(result, BaseException):
            raise result
        return result

    def _together(self, works: Sequence[_Work], batch: Batch) -> None:
        self.metrics.batch(self.service.name, works[0].message_type, size=len(works))
        if len(works) == 1:
            self._alone(works[0])
            return
        for work in works:
            work.start()
        try:
            results = _run_batch(batch, [work.fact for work in works if work.fact is not None])
        except BaseException as error:  # one message's fault must not cost its neighbours: each alone
            LOG.warning(
                "a batch failed as a whole; its messages are handled one by one",
                extra={"fields": {"type": works[0].message_type, "size": len(works), "error": places(error)}},
            )
            for work in works:
                work.pause()
            for work in works:
                self._alone(work)
            return
        for work, result in zip(works, results, strict=True):
            work.finish(result)

    def interpret(self, work: _Work, result: Sequence[BaseModel] | BaseException) -> str:
        """Publish what follows from a result (facts, or an exception by its class): the outcome's name."""
        match result:
            case StoreFull():  # nobody makes room within the minute that other retries take
                return self._again(work, result, limit=self._outage_attempts)
            case Retry():
                return self._again(work, result, limit=self._max_attempts)
            case StoreUnavailable():
                return self._again(work, Retry(str(result)), limit=self._outage_attempts)
            case Reject():
                return self._reject(work, result)
            case OverBudget():
                return self._dead_letter(work, "over-budget", str(result))
            case _PartlyOverBudget():
                self.interpret(work, result.told)
                return self.interpret(work, result.rest)
            case NewerSchema():
                return self._dead_letter(work, "newer-schema", str(result))
            case _Unreadable():
                return self._dead_letter(work, "unreadable", str(result))
            case BaseException():
                return self._dead_letter(work, "bug", *self._bug(result))
            case _:
                for fact in result:
                    self._publish(work, fact)
                return "done"

    def _reject(self, work: _Work, refusal: Reject) -> str:
        if work.fact is None:
            raise AssertionError("only a fact that was read can be refused")
        for fact in list(self.service.rejected(work.fact, refusal.reasons)):
            self._publish(work, fact)
        work.reason = "; ".join(refusal.reasons)
        return "rejected"

    def _again(self, work: _Work, retry: Retry, *, limit: int) -> str:
        if work.envelope is None:
            raise AssertionError("only a message that was read can be tried again")
        attempt = work.envelope.attempt
        if attempt >= limit:
            reason = f"retries exhausted after {attempt} attempts: {retry.reason}"
            return self._dead_letter(work, retry.exhausted, reason)
        delay = self._retry_delay(attempt) if retry.after_seconds is None else retry.after_seconds
        body = work.envelope.again().to_bytes()
        confirmed(lambda: self.broker.publish_to_queue(work.delivery.queue, body, delay_seconds=delay), stop=work.stop)
        self.metrics.retry(self.service.name, work.message_type)
        work.reason = retry.reason
        return "retried"

    def _bug(self, error: BaseException) -> tuple[str, str]:
        """The reason and the traceback of what nobody foresaw."""
        if self.service.sees_identifiers:
            return type(error).__name__, places(error)
        return f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))

    def _dead_letter(self, work: _Work, kind: Kind, reason: str, trace: str = "") -> str:
        failure = Failure(kind=kind, reason=reason, traceback=trace, service=self.service.name)
        body = work.delivery.body if work.envelope is None else work.envelope.failed(failure).to_bytes()
        confirmed(lambda: self.broker.publish_to_queue(f"{work.delivery.queue}.dead", body), stop=work.stop)
        self.metrics.dead_letter(self.service.name, work.message_type, kind=failure.kind)
        work.reason = failure.reason
        work.traceback = failure.traceback
        return "dead-lettered"

    def _publish(self, work: _Work, fact: BaseModel) -> None:
        envelope = Envelope.of(fact, parent=work.envelope)
        body = envelope.to_bytes()
        confirmed(lambda: self.broker.publish(envelope.message_type, body), stop=work.stop)

    def now(self) -> float:
        """The clock that handling is timed with."""
        return self._clock()

    def begin(self, work: _Work) -> None:
        """A message is under way from now on."""
        with self._lock:
            self._under_way.add(work)
        self.metrics.start(self.service.name)

    def end(self, work: _Work) -> None:
        """It no longer is."""
        with self._lock:
            self._under_way.discard(work)

    def oldest_in_flight_seconds(self) -> float:
        """For how long the message that is longest under way is so; 0 where none is."""
        now = self._clock()
        with self._lock:
            return max((now - work.started for work in self._under_way), default=0.0)

    def alive(self) -> bool:
        """Whether no message is stuck; the first time that one is found so, the log names it."""
        now = self._clock()
        with self._lock:
            stuck = [work for work in self._under_way if now - work.started > self._stuck_seconds]
        for work in stuck:
            work.log_stuck(now - work.started)
        return not stuck


def confirmed(publish: Callable[[], None], *, stop: threading.Event) -> None:
    """Publish, and again while the broker is away (not for ever): _GivenBack when it was never confirmed."""
    for round_left in reversed(range(_PUBLISH_ROUNDS)):
        try:
            publish()
        except BrokerUnavailable as error:
            LOG.warning("the broker did not confirm", extra={"fields": {"error": str(error)}})
            if round_left == 0 or stop.wait(_PUBLISH_PAUSE_SECONDS):
                raise _GivenBack from error
        else:
            return


def _run_batch(batch: Batch, facts: Sequence[BaseModel]) -> list[Sequence[BaseModel] | BaseException]:
    results = list(batch.handler(facts))
    if len(results) != len(facts):
        raise RuntimeError(f"a batch handler returned {len(results)} results for {len(facts)} facts")
    return [_listed(result) for result in results]


def _listed(result: Iterable[BaseModel] | Exception) -> Sequence[BaseModel] | BaseException:
    if isinstance(result, BaseException):
        return result
    try:
        return _told(result)
    except Exception as error:
        return error


def _told(facts: Iterable[BaseModel]) -> list[BaseModel]:
    """What a handler yields; _PartlyOverBudget where it yielded something before it went over its budget."""
    told: list[BaseModel] = []
    try:
        for fact in facts:
            told.append(fact)
    except OverBudget as error:
        if told:
            raise _PartlyOverBudget(told, error) from error
        raise
    return told


class _Work:
    """One delivery on its way through the worker: read, started, finished once."""

    def __init__(self, worker: Worker, delivery: Delivery, stop: threading.Event) -> None:
        self._worker = worker
        self.delivery = delivery
        self.stop = stop
        self.envelope: Envelope | None = None
        self.fact: BaseModel | None = None
        self.unreadable: _Unreadable | NewerSchema = _Unreadable()
        self.message_type = UNKNOWN
        self.reason = ""
        self.traceback = ""
        self.started = 0.0
        self._stuck_logged = False
        try:
            self.envelope = read_envelope(delivery.body)
            if self.envelope.message_type in worker.service.messages:
                self.message_type = self.envelope.message_type
            self.fact = _read_fact(self.envelope, worker.service)
        except (_Unreadable, NewerSchema) as error:
            self.unreadable = error

    def start(self) -> None:
        self.started = self._worker.now()
        self._worker.begin(self)

    def pause(self) -> None:
        """Back to before `start`: it will be started again, alone."""
        self._worker.end(self)
        self._worker.metrics.start(self._worker.service.name, -1)

    def finish(self, result: Sequence[BaseModel] | BaseException) -> None:
        """Publish what follows, then acknowledge; what cannot be published is given back."""
        try:
            self._finish(result)
        finally:
            self._worker.end(self)

    def _finish(self, result: Sequence[BaseModel] | BaseException) -> None:
        try:
            outcome = self._settle(result)
        except _GivenBack:
            outcome = "given-back"
            self.reason = "the broker did not confirm what follows from it"
        seconds = self._worker.now() - self.started
        self._worker.metrics.finish(
            self._worker.service.name, self.message_type, outcome=outcome, seconds=max(seconds, 0.0)
        )
        self._log(outcome, seconds)
        if outcome != "given-back":
            self.delivery.ack()
        elif not self.stop.is_set():
            self.delivery.requeue()
        # Else it returns when the subscription closes: given back now, it would come to this worker again.

    def _settle(self, result: Sequence[BaseModel] | BaseException) -> str:
        try:
            return self._worker.interpret(self, result)
        except _GivenBack:
            raise
        except BaseException as error:  # publishing or `rejected` failed: that too is this message's
            kind = error if not isinstance(error, Reject) else RuntimeError("a refusal was itself refused")
            return self._worker.interpret(self, kind)

    def log_stuck(self, seconds: float) -> None:
        """Say once that this message is stuck."""
        if not self._stuck_logged:
            self._stuck_logged = True
            fields = {"type": self.message_type, "seconds": round(seconds, 3), **self._ids()}
            LOG.error("%s is stuck: this worker is to be restarted", self.message_type, extra={"fields": fields})

    def _ids(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"delivery_count": self.delivery.delivery_count}
        if self.envelope is not None:
            fields |= {"message_id": self.envelope.message_id, "attempt": self.envelope.attempt}
            fields |= short_ids(self.envelope.body) if self.fact is not None else {}
        return fields

    def _log(self, outcome: str, seconds: float) -> None:
        fields: dict[str, Any] = {
            "type": self.message_type,
            "outcome": outcome,
            "seconds": round(seconds, 3),
            **self._ids(),
        }
        if self.reason:
            fields["reason"] = self.reason
        if self.traceback:
            fields["traceback"] = self.traceback
        level = logging.ERROR if outcome == "dead-lettered" else logging.INFO
        if outcome in {"given-back", "retried"}:
            level = logging.WARNING
        LOG.log(level, "%s %s", self.message_type, outcome, extra={"fields": fields})


def read_envelope(body: bytes) -> Envelope:
    """The envelope in a delivery's bytes; the reason why there is none holds nothing of what stood in it."""
    try:
        return Envelope.from_bytes(body)
    except ValidationError as error:
        version = version_in(body)
        if version is not None and version > SCHEMA_VERSION:
            raise newer_envelope(version) from None
        raise _Unreadable(f"not an envelope: {faults(error)}") from None


def _read_fact(envelope: Envelope, service: Service) -> BaseModel:
    try:
        fact = open_fact(envelope, service.messages)
    except ValueError as error:
        raise _Unreadable(str(error)) from None
    if type(fact) not in service.handlers and type(fact) not in service.batches:
        raise NewerSchema(
            f"{service.name} has no handler for {envelope.message_type}: upgrade this service, then replay the dead "
            "letter"
        )
    return fact


def short_ids(body: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a fact that are ids, shortened for the log."""
    return {name: value[:_SHORT_ID] for name, value in body.items() if name.endswith("_id") and isinstance(value, str)}


def suspects_in_order(works: Sequence[_Work]) -> list[_Work]:
    """The order in which redelivered messages are handled, each alone, so that only the one that kills is lost.

    They died together, and one of them is the reason. In one order the second time, those behind it are done before it
    kills again; in the opposite order the third time, those before it are done too. The order is that of their bytes,
    since slots may receive them in another one each time.
    """
    ordered = sorted(works, key=lambda work: work.delivery.body)
    second = [work for work in ordered if work.delivery.delivery_count == 1]
    later = [work for work in ordered if work.delivery.delivery_count > 1]
    return [*reversed(second), *later]


class _Turns:
    """Many at once, or one alone; who waits to be alone goes before those who come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._waiting = 0
        self._taken = False

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """A turn beside others of its kind."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken and not self._waiting)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A turn while nobody else has one."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._taken and not self._together)
            self._waiting -= 1
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


class Runs(Protocol):
    """A worker or recorder: works until told to stop, then drains."""

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, finish what was prefetched, return."""


def watch(
    alive: Callable[[], bool],
    *,
    stop: threading.Event,
    ended: threading.Event,
    end: Callable[[int], object] = os._exit,
    every_seconds: float = _WATCH_SECONDS,
    drain_seconds: float = _STUCK_DRAIN_SECONDS,
) -> None:
    """Until the worker has ended: once it is no longer alive, stop it, and end the process where that does not help."""
    while not ended.wait(every_seconds):
        if not alive():
            stop.set()
            if not ended.wait(drain_seconds):
                LOG.error("what is stuck does not end: the process ends without it")
                end(1)
            return


def serve(
    worker: Runs,
    *,
    broker: Broker,
    checks: Mapping[str, Callable[[], None]],
    metrics: Metrics,
    health_host: str = "0.0.0.0",  # noqa: S104 - probes and Prometheus come from outside of the container
    health_port: int = 8080,
    alive: Callable[[], bool] = lambda: True,
    close: Callable[[], None] = lambda: None,
) -> int:
    """Run one worker as a process: health server, SIGTERM and SIGINT drain it; the exit code (0).

    A worker that is no longer alive ends the process with 1.

    Call it on the main thread, after the broker's queues were declared. `checks` are what /readyz asks, by name, and
    `alive` what /healthz asks.
    """
    stop, ended = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    health = HealthServer(checks={"broker": broker.check, **checks}, registry=metrics.registry, alive=alive)
    try:
        health.start(host=health_host, port=health_port)
        LOG.info("ready to work", extra={"fields": {"health_port": health.port}})
        watching = threading.Thread(target=watch, args=(alive,), kwargs={"stop": stop, "ended": ended}, daemon=True)
        watching.start()
        worker.run(stop)
        LOG.info("drained: all that was prefetched is finished")
        return 0
    finally:
        ended.set()
        health.stop()
        broker.close()
        close()
        for number, handler in previous.items():
            signal.signal(number, handler)
