"""More than sixty cases on the real stack, a disturbance in the middle, and the same four things at the end of each.

The ledger is exact and equal to the undisturbed run's; each result is there once; its numbers are the undisturbed
run's, byte for byte; the queues are empty. CI runs those marked `ci_chaos`; `make chaos` runs all.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pika
import pytest

from shared.fracture.ledger import Ledger
from shared.fracture.messages import FACTS
from shared.pipeline.envelope import Envelope
from shared.pipeline.errors import BrokerUnavailable, StoreUnavailable
from shared.records.dead_letters import letters
from tests.compose.conftest import CASES, Undisturbed
from tests.compose.stack import WORKERS, Stack, objects, run, until

pytestmark = pytest.mark.chaos
in_ci = pytest.mark.ci_chaos

BEGUN = 5
"""Results that are there when the disturbance begins: the work is in full course."""
COMPARED = ("cases/", "features/", "outcomes/classified/")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table in docs/reliability.md, in seconds."""

    disturbance: str
    undone_before: int
    disturbed: float
    recovery: float
    whole: float


@pytest.fixture
def disturbed(
    stack: Stack, many: Undisturbed, chaos_table: list[Measured]
) -> Iterator[Callable[[str, Callable[[], None]], Ledger]]:
    """Submits the sixty cases to an empty stack, disturbs in the middle, waits for the end, looks at what is there."""
    stack.wait_ready()
    stack.empty()
    assert stack.depths() == {}

    def go(name: str, disturb: Callable[[], None], *, poisoned: str = "") -> Ledger:
        sweep = f"chaos {name}"
        started = time.monotonic()
        uploading = threading.Thread(target=stack.submit, args=(many.archive, sweep))
        uploading.start()
        until(lambda: stack.results() >= BEGUN, 300, f"{BEGUN} results")
        uploading.join()
        before = time.monotonic()
        disturb()
        after = time.monotonic()
        there = results(stack)
        assert there < many.ran.ledger.cases.found, "the disturbance came too late to disturb anything"
        until(lambda: stack.results() > there, 600, "the next result")
        recovered = time.monotonic()
        ledger = stack.finished(sweep, seconds=900)
        row = Measured(
            disturbance=name,
            undone_before=many.ran.ledger.cases.found - there,
            disturbed=after - before,
            recovery=recovered - after,
            whole=time.monotonic() - started,
        )
        holds(stack, many, ledger, poisoned=poisoned)
        chaos_table.append(row)
        return ledger

    yield go  # type: ignore[misc]
    stack.wait_ready()


def results(stack: Stack) -> int:
    """How many results there are, once the store answers."""
    found: list[int] = []

    def counted() -> bool:
        found.append(stack.results())
        return True

    until(counted, 300, "the store to answer")
    return found[-1]


def holds(stack: Stack, many: Undisturbed, ledger: Ledger, *, poisoned: str = "") -> None:
    """The four invariants; of a poisoned case: that it alone went to the dead letters."""
    wanted = many.ran.ledger
    lost = 1 if poisoned else 0
    assert wanted.cases.found >= CASES
    # 1: the ledger is exact, and each case ended as it does undisturbed
    assert ledger.exact
    assert ledger.pending == 0
    assert ledger.cases.found == wanted.cases.found == sum(ledger.cases.by_state.values())
    assert ledger.cases.by_state["dead-lettered"] == lost
    assert ledger.cases.by_state["reported"] == wanted.cases.by_state["reported"] - lost
    assert ledger.series.by_state == wanted.series.by_state
    assert ledger.reports == wanted.reports
    # 2 and 3: each result is there once, with the undisturbed run's numbers
    store = stack.store()
    mine, theirs = objects(store, *COMPARED), objects(many.store, *COMPARED)
    if poisoned:
        theirs = {key: data for key, data in theirs.items() if poisoned not in key or key in mine}
    assert sorted(mine) == sorted(theirs)
    assert [key for key in mine if mine[key] != theirs[key]] == []
    # 4: nothing is left over
    until(lambda: stack.depths() == {}, 60, "the queues to be empty")
    assert list(store.keys("inbox/")) == []
    assert len([letter for letter in letters(store) if letter.message_type in ("CaseReady",)]) == lost


@in_ci
def test_kill_9_of_each_worker_in_turn(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    def kill_each() -> None:
        for service in WORKERS:
            stack.kill(service)
            time.sleep(1.5)

    disturbed("kill -9 of each worker in turn", kill_each)

    assert [service for service in WORKERS if restarts(stack, service) == 0] == []


def restarts(stack: Stack, service: str) -> int:
    """How often the engine started a container again."""
    return int(str(stack.inspect(service)["RestartCount"]))


@in_ci
def test_a_worker_runs_out_of_memory_under_its_limit(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    code = (Path(__file__).parent / "faults" / "hog.py").read_text()
    killed: list[int] = []

    def exhaust() -> None:
        before = restarts(stack, "deep-extractor")
        stack.inside("deep-extractor", code, check=False)
        until(lambda: restarts(stack, "deep-extractor") > before, 120, "the worker to be killed and started again")
        killed.append(restarts(stack, "deep-extractor") - before)

    disturbed("a worker out of memory under its limit", exhaust)

    assert killed == [1]


@in_ci
def test_the_broker_is_restarted(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    disturbed("RabbitMQ restarted", lambda: (stack.compose("restart", "rabbitmq"), None)[1])


def test_the_broker_is_away_for_a_minute(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    disturbed("RabbitMQ stopped for 60 s", lambda: stopped(stack, "rabbitmq", 60))


def test_the_store_is_restarted(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    disturbed("the S3 server restarted", lambda: (stack.compose("restart", "-t", "10", "s3"), None)[1])


@in_ci
def test_the_store_is_away_for_a_minute(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    disturbed("the S3 server stopped for 60 s", lambda: stopped(stack, "s3", 60))


def stopped(stack: Stack, service: str, seconds: float) -> None:
    """Stop a service for so long."""
    stack.compose("kill", service)
    time.sleep(seconds)
    stack.compose("start", service)


def test_a_worker_is_cut_from_the_network_and_joined_again(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    def cut() -> None:
        network, container = f"{stack.project}_workers", stack.container("radiomics-extractor")
        run("docker", "network", "disconnect", network, container)
        time.sleep(90)  # longer than two heartbeats: the broker takes it for dead
        run("docker", "network", "connect", "--alias", "radiomics-extractor", network, container)

    disturbed("a worker cut from the network for 90 s", cut)


def test_sigterm_drains_every_worker_and_no_redelivery_is_counted(
    stack: Stack, disturbed: Callable[..., Ledger]
) -> None:
    codes: dict[str, object] = {}

    def drain() -> None:
        stack.compose("stop", *WORKERS)
        for service in WORKERS:
            state = stack.inspect(service)["State"]
            assert isinstance(state, dict)
            codes[service] = state["ExitCode"]
        stack.compose("start", *WORKERS)

    since = time.time()
    disturbed("SIGTERM to every worker", drain)

    assert codes == dict.fromkeys(WORKERS, 0)
    assert redelivered(stack, since) == []


def redelivered(stack: Stack, since: float) -> list[str]:
    """The log lines of messages that were delivered before."""
    found = []
    for service in WORKERS:
        log = run("docker", "logs", "--since", str(int(since)), stack.container(service))
        for line in (log.stdout + log.stderr).splitlines():
            if line.startswith("{") and json.loads(line).get("delivery_count", 0):
                found.append(line)
    return found


def test_the_store_has_no_space(stack: Stack, disturbed_without_space: Callable[..., Ledger]) -> None:
    def fill() -> None:
        stack.inside("s3", FILL, check=False)
        with pytest.raises(StoreUnavailable):
            put_until_refused(stack)
        time.sleep(30)
        stack.inside("s3", "import os; os.remove('/data/filler')")
        store = stack.store()
        for key in list(store.keys("probes/")):
            store.delete(key)

    disturbed_without_space("the store without space for 30 s", fill)


def put_until_refused(stack: Stack) -> None:
    """Write until the store refuses."""
    store = stack.store()
    for number in range(200):
        store.put(f"probes/full-{number}", bytes(4 << 20))


FILL = """
with open('/data/filler', 'wb') as file:
    while True:
        file.write(bytes(1 << 20))
        file.flush()
"""


@pytest.fixture
def disturbed_without_space(stack: Stack, request: pytest.FixtureRequest) -> Iterator[Callable[..., Ledger]]:
    """As `disturbed`, over a store whose whole disk is a small one in memory."""
    stack.more_files.append(Path(__file__).parent / "no_space.yml")
    try:
        with_this_store(stack)
        yield request.getfixturevalue("disturbed")
    finally:
        stack.more_files.pop()
        with_this_store(stack)


def with_this_store(stack: Stack) -> None:
    """Put the S3 server on the disk that the files say, and the workers on it."""
    stack.compose("up", "-d", "--wait", "s3")
    stack.compose("up", "-d", "prepare-store")
    stack.compose("restart", *WORKERS)


def test_every_message_comes_twice(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    with doubling(stack) as doubled:
        disturbed("every message delivered twice", lambda: time.sleep(1))

    assert len(doubled) > 4 * CASES  # of each case: ready, two vectors, classified


@contextmanager
def doubling(stack: Stack) -> Iterator[list[str]]:
    """Every fact is told once more, by somebody who hears all of them.

    What follows from the second telling is the same fact again, and is not doubled anew: else each stage would double
    what the one before it doubled, and the last one would hear each fact thirty times.
    """
    settings = stack.broker_settings("admin")
    connection = pika.BlockingConnection(settings.parameters())
    channel = connection.channel()
    queue = channel.queue_declare("", exclusive=True).method.queue
    for fact in FACTS:
        channel.queue_bind(queue, "fracture", fact)
    done: list[str] = []
    stop = threading.Event()

    def double() -> None:
        for method, _, body in channel.consume(queue, inactivity_timeout=0.2):
            if stop.is_set():
                return
            if method is None:
                continue
            fact = json.dumps([method.routing_key, Envelope.from_bytes(body).body], sort_keys=True)
            if fact not in done:
                done.append(fact)
                channel.basic_publish("fracture", method.routing_key, body)
            channel.basic_ack(method.delivery_tag)

    thread = threading.Thread(target=double)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()
        connection.close()


@in_ci
def test_a_poison_case_costs_only_itself(stack: Stack, many: Undisturbed, disturbed: Callable[..., Ledger]) -> None:
    case_id = sorted(key.rpartition("/")[2].removesuffix(".json") for key in many.store.keys("features/hcr/"))[
        CASES // 2
    ]

    with stack.poison(case_id):
        disturbed("a poison case that kills its worker", lambda: None, poisoned=case_id)

    (letter,) = [letter for letter in letters(stack.store()) if letter.message_type == "CaseReady"]
    assert letter.kind == "delivery-limit"
    assert json.loads(letter.envelope)["body"]["case_id"] == case_id


def test_a_consumer_is_slower_than_its_timeout(stack: Stack, disturbed: Callable[..., Ledger]) -> None:
    def too_slow() -> None:
        policy = ("set_policy", "--apply-to", "queues", "slow", "^radiomics-extractor$", '{"consumer-timeout": 60000}')
        rabbitmqctl(stack, *policy)
        stack.inside("radiomics-extractor", STOP_CHILDREN)
        time.sleep(150)  # RabbitMQ looks once a minute
        stack.inside("radiomics-extractor", STOP_CHILDREN.replace("SIGSTOP", "SIGCONT"))
        rabbitmqctl(stack, "clear_policy", "slow")

    since = time.time()
    disturbed("a consumer slower than its timeout", too_slow)

    assert redelivered(stack, since) != []


def rabbitmqctl(stack: Stack, *arguments: str) -> None:
    """RabbitMQ's own command line, inside its container."""
    path = "PATH=/usr/lib/rabbitmq/bin:/opt/rabbitmq/sbin:/usr/sbin:/usr/bin:/bin"
    run("docker", "exec", stack.container("rabbitmq"), "env", path, "rabbitmqctl", "-q", *arguments)


STOP_CHILDREN = """
import os, signal
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        command = open(f'/proc/{pid}/cmdline').read()
    except OSError:
        continue
    if 'forkserver' in command and 'resource_tracker' not in command:
        os.kill(int(pid), signal.SIGSTOP)
"""
"""Stops the processes that extract; the worker itself goes on sending heartbeats."""


@in_ci
def test_the_stack_is_taken_down_in_the_middle_and_brought_up_again(
    stack: Stack, disturbed: Callable[..., Ledger]
) -> None:
    def down_and_up() -> None:
        stack.compose("down", "--timeout", "60")
        with pytest.raises((BrokerUnavailable, StoreUnavailable)):
            stack.depths()
        stack.compose("up", "-d", "--wait")

    disturbed("the stack down and up again", down_and_up)
