"""Every sentence of shared/pipeline/broker.py's contract, for each broker; then what only RabbitMQ can get wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import pytest
from pydantic import BaseModel, SecretStr

from shared.pipeline.broker import Broker, Delivery, Subscription
from shared.pipeline.envelope import Envelope
from shared.pipeline.errors import BrokerUnavailable, FractureSweepError, Unroutable
from shared.pipeline.memory_broker import MemoryBroker
from shared.pipeline.rabbit_broker import BrokerSettings, RabbitBroker
from shared.pipeline.service import Service
from shared.pipeline.worker import Worker
from tests.fixtures.mishaps import Life, MortalBroker
from tests.fixtures.rabbitmq import RabbitNode, until

ROOT = Path(__file__).resolve().parents[2]
QUEUES = {"work": ("Told", "Heard"), "other": ("Told",)}
WAIT = 5.0
SHORT = 0.3


class Told(BaseModel):
    """A fact of the tests."""

    number: int


@pytest.fixture(params=["memory", "mortal", pytest.param("rabbit", marks=pytest.mark.rabbitmq)])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[[], Broker]]:
    """Opens the broker; over RabbitMQ each call is a connection of its own."""
    opened: list[Broker] = []
    if request.param == "memory":
        opened.append(MemoryBroker())
        yield lambda: opened[0]
    elif request.param == "mortal":
        opened.append(MortalBroker(MemoryBroker(), Life()))
        yield lambda: opened[0]
    else:
        settings = request.getfixturevalue("rabbitmq")

        def new() -> Broker:
            opened.append(RabbitBroker(settings))
            return opened[-1]

        yield new
    for broker in opened:
        broker.close()


@pytest.fixture
def broker(connect: Callable[[], Broker]) -> Broker:
    """A broker with the queues of the tests."""
    broker = connect()
    broker.declare(QUEUES)
    return broker


def received(subscription: Subscription) -> Delivery:
    """The next message, which must come."""
    delivery = subscription.receive(WAIT)
    assert delivery is not None
    return delivery


def test_the_depth_of_the_retry_queue_is_what_waits_for_its_retry(broker: Broker) -> None:
    broker.publish_to_queue("work", b"later", delay_seconds=60)
    broker.publish_to_queue("work", b"later", delay_seconds=60)

    until(lambda: broker.depths(["work.retry"])["work.retry"].ready == 2, WAIT, "two delayed messages")
    depths = broker.depths(["work", "work.retry", "other.retry"])

    assert {name: depth.ready for name, depth in depths.items()} == {"work": 0, "work.retry": 2, "other.retry": 0}


def test_a_fact_reaches_every_queue_bound_to_its_type(broker: Broker) -> None:
    work, other = broker.subscribe("work", prefetch=5), broker.subscribe("other", prefetch=5)

    broker.publish("Told", b"to both")
    broker.publish("Heard", b"to one")

    assert [received(work).body, received(work).body] == [b"to both", b"to one"]
    assert received(other).body == b"to both"
    assert other.receive(SHORT) is None


def test_declaring_again_changes_nothing(broker: Broker) -> None:
    broker.publish("Heard", b"kept")

    broker.declare(QUEUES)

    assert broker.depths(["work"])["work"].ready == 1


def test_a_fact_that_nobody_hears_is_unroutable(broker: Broker) -> None:
    with pytest.raises(Unroutable, match="Whispered"):
        broker.publish("Whispered", b"")


def test_a_queue_that_is_not_there_is_named(broker: Broker) -> None:
    with pytest.raises(FractureSweepError, match="nowhere"):
        broker.publish_to_queue("nowhere", b"")
    with pytest.raises(FractureSweepError, match="nowhere"):
        broker.subscribe("nowhere", prefetch=1)
    with pytest.raises(FractureSweepError, match="nowhere"):
        broker.depths(["nowhere"])


def test_after_a_refused_publish_the_next_one_works(broker: Broker) -> None:
    with pytest.raises(Unroutable):
        broker.publish("Whispered", b"")

    broker.publish("Heard", b"loud")

    assert broker.depths(["work"])["work"].ready == 1


def test_an_acknowledged_message_does_not_come_back(broker: Broker) -> None:
    broker.publish("Heard", b"once")
    subscription = broker.subscribe("work", prefetch=1)

    delivery = received(subscription)
    delivery.ack()
    subscription.close()

    assert (delivery.queue, delivery.delivery_count, delivery.death) == ("work", 0, "")
    assert broker.subscribe("work", prefetch=1).receive(SHORT) is None


def test_what_a_closed_subscription_held_is_delivered_again_with_a_count_one_higher(broker: Broker) -> None:
    broker.publish("Heard", b"held")
    first = broker.subscribe("work", prefetch=1)
    lost = received(first)

    first.close()
    again = received(broker.subscribe("work", prefetch=1))
    lost.ack()

    assert (again.body, again.delivery_count) == (b"held", 1)


def test_the_third_delivery_is_the_last_and_the_others_go_on(broker: Broker) -> None:
    for body in (b"poison", b"good"):
        broker.publish("Heard", body)
    subscription = broker.subscribe("work", prefetch=1)

    counts = []
    done = []
    for _ in range(4):
        delivery = received(subscription)
        if delivery.body == b"poison":
            counts.append(delivery.delivery_count)
            delivery.requeue()
        else:
            done.append(delivery.body)
            delivery.ack()
    dead = received(broker.subscribe("work.dead", prefetch=1))

    assert counts == [0, 1, 2]
    assert done == [b"good"]
    assert (dead.body, dead.death, dead.queue) == (b"poison", "delivery_limit", "work.dead")
    assert subscription.receive(SHORT) is None


def test_a_dead_letter_that_a_worker_published_has_no_death_of_the_broker(broker: Broker) -> None:
    broker.publish_to_queue("work.dead", b"given up")

    dead = received(broker.subscribe("work.dead", prefetch=1))

    assert (dead.body, dead.death) == (b"given up", "")


def test_a_dead_letter_that_is_given_back_often_is_not_lost(broker: Broker) -> None:
    broker.publish_to_queue("work.dead", b"kept")
    subscription = broker.subscribe("work.dead", prefetch=1)

    for _ in range(25):
        received(subscription).requeue()

    assert received(subscription).body == b"kept"


def test_a_delayed_message_returns_to_its_queue_and_counts_as_new(broker: Broker) -> None:
    subscription = broker.subscribe("work", prefetch=2)

    broker.publish_to_queue("work", b"later", delay_seconds=0.4)
    broker.publish_to_queue("work", b"now")

    first, second = received(subscription), received(subscription)
    assert (first.body, second.body) == (b"now", b"later")
    assert (second.delivery_count, second.death) == (0, "")


def test_prefetch_bounds_what_is_unacknowledged(broker: Broker) -> None:
    for number in range(4):
        broker.publish("Heard", b"%d" % number)
    subscription = broker.subscribe("work", prefetch=2)

    held = [received(subscription), received(subscription)]
    third_too_early = subscription.receive(SHORT)
    held[0].ack()
    third = received(subscription)

    assert third_too_early is None
    assert third.body == b"2"
    assert broker.depths(["work"])["work"].ready == 1


def test_after_cancel_what_was_prefetched_is_still_received_and_nothing_is_redelivered(broker: Broker) -> None:
    for number in range(5):
        broker.publish("Heard", b"%d" % number)
    subscription = broker.subscribe("work", prefetch=3)
    bodies = [received(subscription)]
    until(lambda: broker.depths(["work"])["work"].ready == 2, WAIT, "the prefetch")

    subscription.cancel()
    while not subscription.drained:
        bodies.append(received(subscription))
    for delivery in bodies:
        delivery.ack()
    subscription.close()
    rest = broker.subscribe("work", prefetch=5)

    assert [delivery.body for delivery in bodies] == [b"0", b"1", b"2"]
    assert subscription.receive(SHORT) is None
    assert [(one.body, one.delivery_count) for one in (received(rest), received(rest))] == [(b"3", 0), (b"4", 0)]


def test_several_threads_publish_and_acknowledge_at_once(broker: Broker) -> None:
    subscription = broker.subscribe("work", prefetch=4)
    seen: list[bytes] = []

    def publish(thread: int) -> None:
        for number in range(20):
            broker.publish("Heard", b"%d-%d" % (thread, number))

    def take() -> None:
        while len(seen) < 80:
            delivery = subscription.receive(SHORT)
            if delivery is not None:
                seen.append(delivery.body)
                delivery.ack()

    threads = [threading.Thread(target=publish, args=(thread,)) for thread in range(4)]
    threads += [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(seen) == sorted(b"%d-%d" % (thread, number) for thread in range(4) for number in range(20))


def test_a_closed_broker_says_so(connect: Callable[[], Broker]) -> None:
    broker = connect()
    broker.declare(QUEUES)
    broker.check()

    broker.close()

    with pytest.raises(BrokerUnavailable):
        broker.check()
    with pytest.raises(BrokerUnavailable):
        broker.publish("Heard", b"")


# -- RabbitMQ alone ----------------------------------------------------------------------------------------------------


@pytest.mark.rabbitmq
def test_queues_are_quorum_with_explicit_limit_and_dead_letter_exchange(rabbitmq: BrokerSettings) -> None:
    broker = RabbitBroker(rabbitmq)
    broker.declare(QUEUES)
    broker.close()

    arguments = broker.queue_arguments("work")
    connection = pika.BlockingConnection(rabbitmq.parameters())
    channel = connection.channel()
    for name, declared in arguments.items():
        channel.queue_declare(rabbitmq.prefix + name, durable=True, arguments=dict(declared))

    assert arguments["work"]["x-queue-type"] == "quorum"
    assert arguments["work"]["x-delivery-limit"] == 2
    assert arguments["work"]["x-dead-letter-exchange"] == f"{rabbitmq.prefix}fracture"
    assert arguments["work"]["x-dead-letter-routing-key"] == f"{rabbitmq.prefix}work.dead"
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="inequivalent arg"):
        channel.queue_declare(
            rabbitmq.prefix + "work", durable=True, arguments={**arguments["work"], "x-delivery-limit": 3}
        )
    connection.close()


@pytest.mark.rabbitmq
def test_a_queue_declared_otherwise_is_named_with_what_to_do(rabbitmq: BrokerSettings) -> None:
    connection = pika.BlockingConnection(rabbitmq.parameters())
    connection.channel().queue_declare(rabbitmq.prefix + "work", durable=True)
    connection.close()

    with pytest.raises(BrokerUnavailable, match=r"queue test-.*work was declared before with other arguments.*delete"):
        RabbitBroker(rabbitmq).declare(QUEUES)


@pytest.mark.rabbitmq
def test_refused_credentials_and_a_closed_port_are_one_sentence_without_the_password(rabbitmq: BrokerSettings) -> None:
    port = rabbitmq.parameters().port
    wrong = {"url": None, "host": "127.0.0.1", "port": port, "username": "nobody", "password": SecretStr("hush-hush")}

    with pytest.raises(BrokerUnavailable, match=rf"127.0.0.1:{port}.*password") as refused:
        RabbitBroker(rabbitmq.model_copy(update=wrong)).declare(QUEUES)
    with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1:1: nothing listens there") as closed:
        RabbitBroker(rabbitmq.model_copy(update={**wrong, "port": 1})).declare(QUEUES)

    assert "hush-hush" not in f"{refused.value}{closed.value}"


@pytest.mark.rabbitmq
def test_a_handler_that_runs_for_three_heartbeats_still_acknowledges(rabbitmq: BrokerSettings) -> None:
    broker = RabbitBroker(rabbitmq.model_copy(update={"heartbeat_seconds": 1}))
    broker.declare(QUEUES)
    broker.publish("Heard", b"long")
    subscription = broker.subscribe("work", prefetch=1)

    delivery = received(subscription)
    time.sleep(3.5)
    delivery.ack()
    broker.close()

    after = RabbitBroker(rabbitmq)
    assert after.subscribe("work", prefetch=1).receive(SHORT) is None
    after.close()


WORKER = textwrap.dedent(
    """
    import os, sys, threading, time
    from pydantic import BaseModel
    from shared.pipeline.metrics import Metrics
    from shared.pipeline.rabbit_broker import BrokerSettings, RabbitBroker
    from shared.pipeline.service import Service
    from shared.pipeline.worker import Worker, serve

    class Told(BaseModel):
        number: int

    def handle(fact):
        print("took", fact.number, flush=True)
        if fact.number == 13:
            os._exit(1)
        time.sleep(float(os.environ["SECONDS"]))
        print("done", fact.number, flush=True)
        return []

    settings = BrokerSettings.model_validate_json(sys.stdin.read())
    broker = RabbitBroker(settings)
    service = Service(name="s", queues=("work",), messages={"Told": Told}, handlers={Told: handle},
                      rejected=lambda fact, reasons: [], slots=int(os.environ["SLOTS"]))
    metrics = Metrics()
    sys.exit(serve(Worker(service, broker, metrics=metrics), broker=broker, checks={}, metrics=metrics,
                   health_host="127.0.0.1", health_port=0))
    """
)


def process(settings: BrokerSettings, *, seconds: float, slots: int) -> subprocess.Popen[str]:
    """A worker in a process of its own."""
    document = settings.model_dump()
    document["password"] = settings.password.get_secret_value()
    document["url"] = None if settings.url is None else settings.url.get_secret_value()

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SECONDS": str(seconds), "SLOTS": str(slots)}
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(document, default=str))
    worker.stdin.close()
    return worker


@pytest.mark.rabbitmq
def test_a_case_that_kills_its_worker_is_dead_lettered_after_the_limit_and_the_others_go_on(
    rabbitmq: BrokerSettings,
) -> None:
    broker = RabbitBroker(rabbitmq)
    broker.declare({"work": ("Told",)})
    for number in (1, 13, 2, 3):
        broker.publish("Told", Envelope.of(Told(number=number)).to_bytes())

    taken: Counter[str] = Counter()
    for _ in range(3):
        worker = process(rabbitmq, seconds=0.0, slots=1)
        assert worker.stdout is not None
        taken.update(worker.stdout.read().split("\n"))
        assert worker.wait(30) == 1
    dead = received(broker.subscribe("work.dead", prefetch=1))
    last = process(rabbitmq, seconds=0.0, slots=1)
    assert last.stdout is not None
    taken.update([last.stdout.readline().strip() for _ in range(4)])
    last.send_signal(signal.SIGTERM)

    assert last.wait(30) == 0
    assert (dead.death, Envelope.from_bytes(dead.body).body) == ("delivery_limit", {"number": 13})
    assert taken["took 13"] == 3
    assert [taken[f"done {number}"] for number in (1, 2, 3)] == [1, 1, 1]
    broker.close()


@pytest.mark.rabbitmq
def test_on_sigterm_all_that_was_prefetched_is_finished_and_nothing_is_redelivered(rabbitmq: BrokerSettings) -> None:
    broker = RabbitBroker(rabbitmq)
    broker.declare({"work": ("Told",)})
    for number in range(6):
        broker.publish("Told", Envelope.of(Told(number=number)).to_bytes())
    worker = process(rabbitmq, seconds=1.0, slots=2)
    assert worker.stdout is not None
    worker.stdout.readline()

    worker.send_signal(signal.SIGTERM)
    output = worker.stdout.read()
    code = worker.wait(30)
    rest = broker.subscribe("work", prefetch=10)
    left = []
    while (delivery := rest.receive(SHORT)) is not None:
        left.append(delivery)

    assert code == 0
    assert output.count("done") + len(left) == 6
    assert [delivery.delivery_count for delivery in left] == [0] * len(left)
    assert output.count("done") >= 2
    broker.close()


@pytest.mark.rabbitmq
@pytest.mark.timeout(180)
def test_a_broker_that_restarts_under_load_loses_nothing(private_rabbitmq: RabbitNode) -> None:
    broker = RabbitBroker(private_rabbitmq.settings.model_copy(update={"confirm_timeout_seconds": 90.0}))
    broker.declare({"work": ("Told",)})
    done: Counter[int] = Counter()
    stop = threading.Event()

    def handle(fact: BaseModel) -> list[BaseModel]:
        assert isinstance(fact, Told)
        time.sleep(0.02)
        done[fact.number] += 1
        return []

    def publish() -> None:
        for number in range(150):
            broker.publish("Told", Envelope.of(Told(number=number)).to_bytes())

    service = Service(
        name="s",
        queues=("work",),
        messages={"Told": Told},
        handlers={Told: handle},
        rejected=lambda fact, reasons: [],
        slots=2,
    )
    worker = threading.Thread(target=Worker(service, broker).run, args=(stop,))
    publisher = threading.Thread(target=publish)
    worker.start()
    publisher.start()
    until(lambda: len(done) > 20, 30, "the first messages")

    private_rabbitmq.restart()
    publisher.join(90)
    until(lambda: len(done) == 150, 60, "all messages")
    stop.set()
    worker.join(30)

    assert not worker.is_alive()
    assert sorted(done) == list(range(150))
    assert broker.depths(["work", "work.dead"])["work.dead"].ready == 0
    broker.close()
