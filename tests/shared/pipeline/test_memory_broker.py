"""What MemoryBroker has beyond the contract: knowing when all is done."""

from __future__ import annotations

import threading

import pytest

from shared.pipeline.memory_broker import MemoryBroker


@pytest.fixture
def broker() -> MemoryBroker:
    broker = MemoryBroker()
    broker.declare({"work": ("Told",), "other": ()})
    return broker


def test_ready_unacknowledged_and_delayed_messages_keep_it_from_being_idle() -> None:
    now = [0.0]
    broker = MemoryBroker(clock=lambda: now[0])
    broker.declare({"work": ("Told",)})
    subscription = broker.subscribe("work", prefetch=1)
    states = [broker.idle()]

    broker.publish("Told", b"")
    states.append(broker.idle())
    delivery = subscription.receive(0)
    assert delivery is not None
    states.append(broker.idle())
    broker.publish_to_queue("work", b"", delay_seconds=10)
    delivery.ack()
    states.append(broker.idle())
    now[0] = 10.0
    later = subscription.receive(0)
    assert later is not None
    later.ack()
    states.append(broker.idle())

    assert states == [True, False, False, False, True]


def test_only_the_queues_asked_for_count(broker: MemoryBroker) -> None:
    broker.publish_to_queue("work.dead", b"")

    assert broker.idle(["work", "other"])
    assert not broker.idle()


def test_waiting_ticks_and_ends_when_the_last_message_is_acknowledged(broker: MemoryBroker) -> None:
    broker.publish("Told", b"")
    delivery = broker.subscribe("work", prefetch=1).receive(0)
    assert delivery is not None
    ticks: list[int] = []
    ticked = threading.Event()

    def tick() -> None:
        ticks.append(1)
        ticked.set()

    def finish() -> None:
        assert ticked.wait(10)
        delivery.ack()

    thread = threading.Thread(target=finish)
    thread.start()
    idle = broker.wait_until_idle(10, tick=tick, tick_seconds=0.01)
    thread.join()

    assert idle
    assert ticks


def test_waiting_gives_up_when_the_time_is_over(broker: MemoryBroker) -> None:
    broker.publish("Told", b"")

    assert not broker.wait_until_idle(0.05, tick_seconds=0.01)
