"""The recorder: recorded, told, then acknowledged; never given up."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
from pydantic import BaseModel

from shared.pipeline.envelope import Envelope, Failure
from shared.pipeline.memory_broker import MemoryBroker
from shared.pipeline.metrics import Metrics
from shared.pipeline.recorder import Recorder


class CaseDeadLettered(BaseModel):
    """What the recorder of the tests tells."""

    number: int


class Recorded:
    """A fake of the record function: keeps what it was given, fails as often as told."""

    def __init__(self, *, failures: int = 0) -> None:
        self.letters: list[tuple[str, Envelope | None, bytes, str, int]] = []
        self._failures = failures

    def __call__(
        self, *, queue: str, envelope: Envelope | None, body: bytes, death: str, delivery_count: int
    ) -> Iterable[BaseModel]:
        if self._failures:
            self._failures -= 1
            raise OSError("the store is away")
        self.letters.append((queue, envelope, body, death, delivery_count))
        if envelope is None or envelope.message_type.endswith("DeadLettered"):
            return []
        return [CaseDeadLettered(number=1)]


@pytest.fixture
def broker() -> MemoryBroker:
    broker = MemoryBroker()
    broker.declare({"work": ("Told",), "reports": ("CaseDeadLettered",)})
    return broker


def run(broker: MemoryBroker, record: Recorded, metrics: Metrics | None = None) -> None:
    recorder = Recorder(broker, queues=("work", "reports"), record=record, metrics=metrics, pause_seconds=0.01)
    stop = threading.Event()
    thread = threading.Thread(target=recorder.run, args=(stop,))
    thread.start()
    assert broker.wait_until_idle(10, queues=["work.dead", "reports.dead"])
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_a_letter_of_a_worker_is_recorded_with_its_failure_and_told(broker: MemoryBroker) -> None:
    letter = Envelope(message_type="Told", body={}).failed(Failure(kind="bug", reason="odd"))
    broker.publish_to_queue("work.dead", letter.to_bytes())
    record = Recorded()

    run(broker, record)

    ((queue, envelope, _, death, count),) = record.letters
    assert (queue, envelope, death, count) == ("work", letter, "", 0)
    told = broker.subscribe("reports", prefetch=1).receive(0)
    assert told is not None
    assert Envelope.from_bytes(told.body).parents == (letter.message_id,)


def test_what_the_broker_gave_up_comes_with_its_reason_and_count(broker: MemoryBroker) -> None:
    broker.publish("Told", Envelope(message_type="Told", body={}).to_bytes())
    killed = broker.subscribe("work", prefetch=1)
    for _ in range(3):
        delivery = killed.receive(1)
        assert delivery is not None
        delivery.requeue()
    record = Recorded()

    run(broker, record)

    assert [(death, count) for *_, death, count in record.letters] == [("delivery_limit", 3)]


def test_bytes_that_are_no_envelope_are_recorded_as_they_are(broker: MemoryBroker) -> None:
    broker.publish_to_queue("work.dead", b"\x00")
    record = Recorded()

    run(broker, record)

    assert [(envelope, body) for _, envelope, body, *_ in record.letters] == [(None, b"\x00")]


def test_a_letter_about_a_dead_letter_is_recorded_and_nothing_further_told(broker: MemoryBroker) -> None:
    broker.publish_to_queue("reports.dead", Envelope(message_type="CaseDeadLettered", body={"number": 1}).to_bytes())
    record = Recorded()

    run(broker, record)

    assert [queue for queue, *_ in record.letters] == ["reports"]
    assert broker.idle()


def test_a_letter_that_cannot_be_recorded_yet_comes_again_with_its_reason(broker: MemoryBroker) -> None:
    broker.publish("Told", Envelope(message_type="Told", body={}).to_bytes())
    killed = broker.subscribe("work", prefetch=1)
    for _ in range(3):
        delivery = killed.receive(1)
        assert delivery is not None
        delivery.requeue()
    record = Recorded(failures=2)
    metrics = Metrics()

    run(broker, record, metrics)

    ((_, envelope, *_),) = record.letters
    assert envelope is not None
    assert envelope.failure is not None
    assert envelope.failure.kind == "delivery-limit"
    labels = {"service": "recorder", "type": "Told", "outcome": "given-back"}
    assert metrics.value("fracture_sweep_messages_total", labels) == 2
