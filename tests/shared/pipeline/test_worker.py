"""The worker loop: what becomes of a message after each way a handler can end."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from pydantic import BaseModel, ConfigDict

from shared.pipeline.broker import Depth
from shared.pipeline.envelope import Envelope
from shared.pipeline.errors import (
    BrokerUnavailable,
    NewerSchema,
    OverBudget,
    Reject,
    Retry,
    StoreFull,
    StoreUnavailable,
)
from shared.pipeline.memory_broker import MemoryBroker
from shared.pipeline.metrics import Metrics
from shared.pipeline.service import Batch, Service
from shared.pipeline.worker import Worker, default_retry_delay, watch

SECRET = "DOE^JANE"


class Asked(BaseModel):
    """A fact of the tests."""

    model_config = ConfigDict(extra="forbid")

    number: int = 0
    case_id: str = "c" * 64


class Answered(BaseModel):
    """What follows from it."""

    number: int


MESSAGES = {"Asked": Asked, "Answered": Answered}


def nothing(fact: BaseModel, reasons: tuple[str, ...]) -> Iterable[BaseModel]:
    return []


def service(handler: Callable[[Asked], Iterable[BaseModel]], **more: object) -> Service:
    arguments: dict[str, object] = {
        "name": "answerer",
        "queues": ("questions",),
        "messages": MESSAGES,
        "handlers": {Asked: handler},
        "rejected": nothing,
    }
    return Service(**(arguments | more))  # type: ignore[arg-type]


@pytest.fixture
def broker() -> MemoryBroker:
    broker = MemoryBroker()
    broker.declare({"questions": ("Asked",), "answers": ("Answered",)})
    return broker


@contextmanager
def working(worker: Worker) -> Iterator[threading.Event]:
    stop = threading.Event()
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def ask(broker: MemoryBroker, *numbers: int) -> None:
    for number in numbers:
        broker.publish("Asked", Envelope.of(Asked(number=number)).to_bytes())


def run(broker: MemoryBroker, of: Service, metrics: Metrics | None = None, **more: object) -> None:
    worker = Worker(of, broker, metrics=metrics, retry_delay=lambda attempt: 0.01, **more)  # type: ignore[arg-type]
    with working(worker):
        assert broker.wait_until_idle(10, queues=["questions"])


def taken(broker: MemoryBroker, queue: str) -> list[Envelope]:
    subscription = broker.subscribe(queue, prefetch=100)
    found = []
    while (delivery := subscription.receive(0)) is not None:
        found.append(Envelope.from_bytes(delivery.body))
        delivery.ack()
    subscription.close()
    return found


def dead(broker: MemoryBroker) -> Envelope:
    (letter,) = taken(broker, "questions.dead")
    assert letter.failure is not None
    return letter


def test_what_follows_is_published_as_a_child_of_the_message(broker: MemoryBroker) -> None:
    ask(broker, 1)

    run(broker, service(lambda fact: [Answered(number=fact.number)]))

    (answer,) = taken(broker, "answers")
    assert answer.body == {"number": 1}
    assert len(answer.parents) == 1
    assert broker.idle()


def test_a_retry_is_a_new_publish_with_the_attempt_counted(broker: MemoryBroker) -> None:
    attempts: list[int] = []

    def handler(fact: Asked) -> Iterable[BaseModel]:
        attempts.append(fact.number)
        if len(attempts) < 3:
            raise Retry("busy")
        return [Answered(number=len(attempts))]

    ask(broker, 1)
    metrics = Metrics()
    run(broker, service(handler), metrics)

    assert len(taken(broker, "answers")) == 1
    assert metrics.value("fracture_sweep_retries_total", {"service": "answerer", "type": "Asked"}) == 2


def test_after_the_last_attempt_the_reason_is_in_the_dead_letter(broker: MemoryBroker) -> None:
    def handler(fact: Asked) -> Iterable[BaseModel]:
        raise Retry("the archive is busy")

    ask(broker, 1)
    run(broker, service(handler), max_attempts=3)

    letter = dead(broker)
    assert letter.failure is not None
    assert letter.failure.kind == "retries-exhausted"
    assert letter.failure.reason == "retries exhausted after 3 attempts: the archive is busy"
    assert letter.attempt == 3


def test_a_retry_that_knows_better_names_the_kind_of_its_dead_letter(broker: MemoryBroker) -> None:
    def handler(fact: Asked) -> Iterable[BaseModel]:
        raise Retry("the process died (signal 9: out of memory?)", exhausted="over-budget")

    ask(broker, 1)
    run(broker, service(handler), max_attempts=2)

    failure = dead(broker).failure
    assert failure is not None
    assert failure.kind == "over-budget"
    assert failure.reason == "retries exhausted after 2 attempts: the process died (signal 9: out of memory?)"


def test_what_kept_within_the_budget_is_told_before_the_rest_is_given_up(broker: MemoryBroker) -> None:
    def handler(fact: Asked) -> Iterable[BaseModel]:
        yield Answered(number=1)
        yield Answered(number=2)
        raise OverBudget("the third wanted more than 16 GiB")

    ask(broker, 1)
    run(broker, service(handler))

    failure = dead(broker).failure
    assert failure is not None
    assert (failure.kind, failure.reason) == ("over-budget", "the third wanted more than 16 GiB")
    assert [answer.body["number"] for answer in taken(broker, "answers")] == [1, 2]


def test_nothing_is_told_of_what_a_retry_or_a_bug_broke_off(broker: MemoryBroker) -> None:
    def handler(fact: Asked) -> Iterable[BaseModel]:
        yield Answered(number=1)
        raise ValueError("half-way")

    ask(broker, 1)
    run(broker, service(handler))

    assert taken(broker, "answers") == []
    assert dead(broker).failure is not None


def test_a_store_that_is_away_has_more_attempts_than_a_retry(broker: MemoryBroker) -> None:
    calls: list[int] = []

    def handler(fact: Asked) -> Iterable[BaseModel]:
        calls.append(1)
        if len(calls) < 8:
            raise StoreUnavailable("no route")
        return []

    ask(broker, 1)
    run(broker, service(handler), max_attempts=2)

    assert len(calls) == 8
    assert broker.idle()


def test_a_full_store_has_as_many_attempts_as_one_that_is_away(broker: MemoryBroker) -> None:
    calls: list[int] = []

    def handler(fact: Asked) -> Iterable[BaseModel]:
        calls.append(1)
        if len(calls) < 8:
            raise StoreFull("no room")
        return []

    ask(broker, 1)
    run(broker, service(handler), max_attempts=2)

    assert len(calls) == 8
    assert broker.idle()


def test_a_refused_input_gets_its_terminal_record_and_is_told(broker: MemoryBroker) -> None:
    refused: list[tuple[str, ...]] = []

    def handler(fact: Asked) -> Iterable[BaseModel]:
        raise Reject("two slices at one position", "spacing of 5 mm")

    def rejected(fact: BaseModel, reasons: tuple[str, ...]) -> Iterable[BaseModel]:
        refused.append(reasons)
        return [Answered(number=-1)]

    ask(broker, 1)
    run(broker, service(handler, rejected=rejected))

    assert refused == [("two slices at one position", "spacing of 5 mm")]
    assert [answer.body["number"] for answer in taken(broker, "answers")] == [-1]
    assert broker.idle()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OverBudget("600 s"), "over-budget"), (ValueError("odd"), "bug"), (SystemExit(3), "bug"), (MemoryError(), "bug")],
)
def test_what_cannot_be_handled_is_dead_lettered_and_the_next_one_goes_on(
    broker: MemoryBroker, error: BaseException, kind: str
) -> None:
    def handler(fact: Asked) -> Iterable[BaseModel]:
        if fact.number == 1:
            raise error
        return [Answered(number=fact.number)]

    ask(broker, 1, 2)
    run(broker, service(handler))

    letter = dead(broker)
    assert letter.failure is not None
    assert (letter.failure.kind, letter.failure.service) == (kind, "answerer")
    assert len(taken(broker, "answers")) == 1


def test_a_bug_keeps_its_traceback(broker: MemoryBroker) -> None:
    def handler(fact: Asked) -> Iterable[BaseModel]:
        raise ValueError("odd number")

    ask(broker, 1)
    run(broker, service(handler))

    failure = dead(broker).failure
    assert failure is not None
    assert failure.reason == "ValueError: odd number"
    assert "in handler" in failure.traceback


def test_where_identifiers_are_seen_a_bug_keeps_type_and_place_alone(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    def handler(fact: Asked) -> Iterable[BaseModel]:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"no patient {SECRET}") from error

    ask(broker, 1)
    with caplog.at_level(logging.DEBUG):
        run(broker, service(handler, sees_identifiers=True))

    letter = dead(broker)
    logged = "".join(str(vars(record)) for record in caplog.records)
    assert letter.failure is not None
    assert letter.failure.reason == "ValueError"
    assert "test_worker.py" in letter.failure.traceback
    assert SECRET not in letter.to_bytes().decode() + logged


@pytest.mark.parametrize(
    "newer",
    [
        Envelope.of(Asked()).model_copy(update={"schema_version": 99}),
        Envelope.of(Asked()).model_copy(update={"fact_version": 2}),
        Envelope(message_type="Asked", body={"number": 1, "tone": SECRET}),
        Envelope(message_type="Whispered", body={"number": 1}),
        Envelope(message_type="Answered", body={"number": 1}),
    ],
    ids=["envelope", "fact", "unknown field", "unknown type", "no handler"],
)
def test_what_a_newer_version_told_is_never_guessed_at_and_says_what_to_do(
    broker: MemoryBroker, newer: Envelope
) -> None:
    handled: list[Asked] = []
    broker.publish_to_queue("questions", newer.to_bytes())

    run(broker, service(lambda fact: handled.append(fact) or []))

    letter = dead(broker)
    assert letter.failure is not None
    assert letter.failure.kind == "newer-schema"
    assert "upgrade" in letter.failure.reason
    assert "replay" in letter.failure.reason
    assert SECRET not in letter.failure.reason
    assert letter.body == newer.body
    assert handled == []


def test_a_record_of_a_newer_version_is_a_newer_schema_too_and_no_bug(broker: MemoryBroker) -> None:
    def handler(fact: Asked) -> Iterable[BaseModel]:
        raise NewerSchema("the record cases/x was written by a newer version")

    ask(broker, 1)
    run(broker, service(handler))

    failure = dead(broker).failure
    assert failure is not None
    assert (failure.kind, failure.traceback) == ("newer-schema", "")


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope(message_type="Asked", body={"number": SECRET}),
        Envelope(message_type="Asked", body={"number": SECRET, "tone": "high"}),
    ],
)
def test_a_message_that_is_not_understood_is_unreadable(broker: MemoryBroker, envelope: Envelope) -> None:
    broker.publish_to_queue("questions", envelope.to_bytes())

    run(broker, service(lambda fact: []))

    failure = dead(broker).failure
    assert failure is not None
    assert failure.kind == "unreadable"
    assert SECRET not in failure.reason


def test_bytes_that_are_no_envelope_go_to_the_dead_letters_as_they_are(broker: MemoryBroker) -> None:
    broker.publish_to_queue("questions", b"\xff not json")

    run(broker, service(lambda fact: []))

    delivery = broker.subscribe("questions.dead", prefetch=1).receive(0)
    assert delivery is not None
    assert delivery.body == b"\xff not json"


def answer_all(sizes: list[list[int]]) -> Callable[[Sequence[BaseModel]], Sequence[Iterable[BaseModel] | Exception]]:
    def handler(facts: Sequence[BaseModel]) -> Sequence[Iterable[BaseModel] | Exception]:
        numbers = [fact.number for fact in facts if isinstance(fact, Asked)]
        sizes.append(numbers)
        if 13 in numbers and len(numbers) > 1:
            raise RuntimeError("a poison case")
        if 13 in numbers:
            raise ValueError("alone too")
        return [ValueError("bad") if number == 7 else [Answered(number=number)] for number in numbers]

    return handler


def test_a_batch_is_gathered_and_one_bad_case_fails_alone(broker: MemoryBroker) -> None:
    sizes: list[list[int]] = []
    ask(broker, 1, 7, 3)

    batches = {Asked: Batch(handler=answer_all(sizes), size=3, wait_seconds=0.2)}
    run(broker, service(lambda fact: [], handlers={}, batches=batches))

    assert sizes == [[1, 7, 3]]
    assert dead(broker).body["number"] == 7
    assert sorted(answer.body["number"] for answer in taken(broker, "answers")) == [1, 3]


def test_a_batch_that_fails_as_a_whole_is_handled_one_by_one(broker: MemoryBroker) -> None:
    sizes: list[list[int]] = []
    ask(broker, 1, 13, 3)

    batches = {Asked: Batch(handler=answer_all(sizes), size=3, wait_seconds=0.2)}
    run(broker, service(lambda fact: [], handlers={}, batches=batches))

    assert sizes == [[1, 13, 3], [1], [13], [3]]
    assert dead(broker).body["number"] == 13


def test_redelivered_messages_are_never_in_a_batch_and_come_backwards_first(broker: MemoryBroker) -> None:
    sizes: list[list[int]] = []
    ask(broker, 1, 2, 3)
    died = broker.subscribe("questions", prefetch=3)
    died.close()

    batches = {Asked: Batch(handler=answer_all(sizes), size=3, wait_seconds=0.2)}
    run(broker, service(lambda fact: [], handlers={}, batches=batches))

    assert sizes == [[3], [2], [1]]


@pytest.mark.parametrize(("deaths", "order"), [(1, [3, 2, 1]), (2, [1, 2, 3])])
def test_redelivered_messages_of_all_slots_are_handled_one_by_one_in_opposite_orders(
    broker: MemoryBroker, deaths: int, order: list[int]
) -> None:
    """Whatever lies beside a message that kills is done before it in one of the two orders."""
    handled: list[int] = []
    at_once: list[int] = []

    def handler(fact: Asked) -> Iterable[BaseModel]:
        at_once.append(fact.number)
        time.sleep(0.05)
        handled.append(fact.number)
        assert at_once == [fact.number]
        at_once.clear()
        return []

    ask(broker, 1, 2, 3)
    for _ in range(deaths):
        broker.subscribe("questions", prefetch=3).close()
    run(broker, service(handler, slots=3))

    assert handled == order
    assert broker.idle()


def test_a_fresh_message_waits_while_a_suspect_runs_alone(broker: MemoryBroker) -> None:
    seen: list[str] = []

    def handler(fact: Asked) -> Iterable[BaseModel]:
        seen.append(f"{fact.number} begins")
        time.sleep(0.1)
        seen.append(f"{fact.number} ends")
        return []

    ask(broker, 1)
    broker.subscribe("questions", prefetch=1).close()
    ask(broker, 2)
    run(broker, service(handler, slots=2))

    assert seen in (["1 begins", "1 ends", "2 begins", "2 ends"], ["2 begins", "2 ends", "1 begins", "1 ends"])


def test_on_stop_all_that_was_prefetched_is_finished(broker: MemoryBroker) -> None:
    started, go_on = threading.Event(), threading.Event()

    def handler(fact: Asked) -> Iterable[BaseModel]:
        started.set()
        assert go_on.wait(10)
        return [Answered(number=fact.number)]

    ask(broker, *range(6))
    with working(Worker(service(handler, slots=2), broker)) as stop:
        assert started.wait(10)
        stop.set()
        go_on.set()

    done = len(taken(broker, "answers"))
    assert done >= 2
    assert broker.depths(["questions"])["questions"] == Depth(ready=6 - done, unacknowledged=0)


class Deaf(MemoryBroker):
    """A broker that does not confirm."""

    def publish(self, message_type: str, body: bytes) -> None:
        """Refuse what follows from a question."""
        if message_type == "Answered":
            raise BrokerUnavailable("no confirm")
        super().publish(message_type, body)


def test_a_message_whose_facts_are_not_confirmed_is_not_acknowledged() -> None:
    broker = Deaf()
    broker.declare({"questions": ("Asked",), "answers": ("Answered",)})
    handled = threading.Event()

    def handler(fact: Asked) -> Iterable[BaseModel]:
        handled.set()
        return [Answered(number=1)]

    ask(broker, 1)
    with working(Worker(service(handler), broker)) as stop:
        assert handled.wait(10)
        stop.set()

    assert broker.depths(["questions"])["questions"].ready == 1


def test_each_handling_is_one_line_with_short_ids(broker: MemoryBroker, caplog: pytest.LogCaptureFixture) -> None:
    broker.publish("Asked", Envelope.of(Asked(number=1, case_id="d" * 64)).to_bytes())

    with caplog.at_level(logging.INFO):
        run(broker, service(lambda fact: []))

    (line,) = [record for record in caplog.records if record.name == "fracture_sweep.worker"]
    fields = vars(line)["fields"]
    assert fields["type"] == "Asked"
    assert fields["outcome"] == "done"
    assert fields["case_id"] == "d" * 12
    assert {"message_id", "attempt", "seconds"} <= set(json.loads(json.dumps(fields)))


def test_retries_come_ever_later_up_to_five_minutes() -> None:
    delays = [default_retry_delay(attempt) for attempt in (1, 2, 3, 20)]

    assert delays == sorted(delays)
    assert 4.5 <= delays[0] <= 5.5
    assert delays[-1] <= 330


class Clock:
    """A clock that stands until it is put forward."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_worker_with_a_stuck_message_is_not_alive_and_says_which_once(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    clock, begun, go_on = Clock(), threading.Event(), threading.Event()

    def handler(fact: Asked) -> Iterable[BaseModel]:
        begun.set()
        assert go_on.wait(10)
        return []

    broker.publish("Asked", Envelope.of(Asked(number=1, case_id="d" * 64)).to_bytes())
    metrics = Metrics()
    worker = Worker(service(handler), broker, metrics=metrics, stuck_seconds=60.0, clock=clock)
    oldest = "fracture_sweep_oldest_in_flight_seconds"
    with caplog.at_level(logging.ERROR), working(worker):
        assert begun.wait(10)
        clock.seconds += 60.0
        alive_in_time = worker.alive()
        clock.seconds += 1.0
        alive_after = [worker.alive(), worker.alive()]
        age = metrics.value(oldest, {"service": "answerer"})
        go_on.set()
        assert broker.wait_until_idle(10, queues=["questions"])
        alive_again = worker.alive()

    assert alive_in_time
    assert alive_after == [False, False]
    assert age == 61.0
    assert alive_again
    assert metrics.value(oldest, {"service": "answerer"}) == 0.0
    (line,) = [record for record in caplog.records if "stuck" in record.getMessage()]
    assert vars(line)["fields"]["case_id"] == "d" * 12
    assert {"message_id", "delivery_count", "seconds"} <= set(vars(line)["fields"])


def test_a_worker_without_work_is_alive(broker: MemoryBroker) -> None:
    clock = Clock()
    worker = Worker(service(lambda fact: []), broker, stuck_seconds=60.0, clock=clock)
    ask(broker, 1)
    with working(worker):
        assert broker.wait_until_idle(10, queues=["questions"])
        clock.seconds += 1000.0

        assert worker.alive()


def test_a_process_whose_worker_stays_stuck_ends_itself_after_the_rest_was_drained() -> None:
    stop, ended = threading.Event(), threading.Event()
    codes: list[int] = []

    watch(lambda: False, stop=stop, ended=ended, end=codes.append, every_seconds=0.01, drain_seconds=0.01)

    assert stop.is_set()
    assert codes == [1]


def test_a_process_whose_worker_lives_ends_when_the_worker_has() -> None:
    stop, ended = threading.Event(), threading.Event()
    codes: list[int] = []

    def alive() -> bool:
        ended.set()
        return True

    watch(alive, stop=stop, ended=ended, end=codes.append, every_seconds=0.01)

    assert not stop.is_set()
    assert codes == []
