"""One service at a time becomes the next version while studies come in: nothing is lost, in whichever order.

Real processes over RabbitMQ and S3; the next version is `tests.fixtures.next_version` (docs/decisions/0012).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from services.composition import pseudonyms_of
from services.dicom_ingest.inbox import submit
from shared.fracture.ledger import Ledger
from shared.fracture.topology import QUEUES
from shared.pipeline.rabbit_broker import RabbitBroker
from shared.pipeline.store import Store
from shared.records.dead_letters import Survey
from tests.fixtures.cluster import Cluster
from tests.fixtures.next_version import EDITION, FIELD
from tests.fixtures.rabbitmq import until
from tests.fixtures.runs import Place, place

pytestmark = [pytest.mark.rabbitmq, pytest.mark.s3, pytest.mark.timeout(600)]

NEXT = "tests.fixtures.next_version"
CONSUMERS_FIRST = (
    "report-generator",
    "recorder",
    "fusion-classifier",
    "deep-extractor",
    "radiomics-extractor",
    "resampler",
    "segmenter",
    "dicom-ingest",
)
SWEEPS = ("first", "second", "third", "fourth")


@pytest.fixture
def cluster(
    tmp_path: Path, rabbitmq_environ: dict[str, str], s3_environ: dict[str, str], tiny_bundle: Path
) -> Iterator[Cluster]:
    environ = {
        **rabbitmq_environ,
        **s3_environ,
        "FRACTURE_SWEEP_BUNDLE_PATH": str(tiny_bundle),
        "FRACTURE_SWEEP_RADIOMICS_EXTRACTOR_PROCESSES": "1",
    }
    with Cluster(environ, tmp_path / "logs") as running:
        running.start()
        yield running


@pytest.fixture(scope="module")
def studies(phantom_archive: Path) -> list[Path]:
    """Four studies, each a sweep of its own."""
    return sorted(path for path in phantom_archive.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, studies: list[Path]
) -> tuple[Place, dict[str, Ledger]]:
    """The same sweeps, embedded, in one version."""
    here = place(tmp_path_factory.mktemp("undisturbed"), tiny_bundle)
    return here, {name: here.run(path, name=name).ledger for name, path in zip(SWEEPS, studies, strict=True)}


def upgrade(cluster: Cluster, *names: str) -> None:
    for name in names:
        log = cluster.logs / f"{name}.log"
        until(lambda log=log: "ready to work" in log.read_text(errors="replace"), 120, f"the {name}")
        assert cluster.terminate(name) == [0]
        cluster.start(name, program=NEXT)


def submitter(cluster: Cluster, studies: Sequence[Path]) -> Callable[[], None]:
    """Each call submits the next study."""
    left = iter(zip(SWEEPS, studies, strict=True))

    def submit_next() -> None:
        name, path = next(left)
        submit(path, name=name, store=cluster.store(), pseudonyms=pseudonyms_of(cluster.settings))

    return submit_next


def without_edition(store: Store, prefix: str) -> dict[str, Any]:
    """The JSON records under a prefix, without what the next version added."""
    found = {key: json.loads(store.get(key)) for key in store.keys(prefix) if key.endswith(".json")}
    return {key: {name: value for name, value in record.items() if name != FIELD} for key, record in found.items()}


def assert_as_undisturbed(cluster: Cluster, undisturbed: tuple[Place, dict[str, Ledger]]) -> None:
    """The ledgers are exact, every result is there once with the same numbers, and the queues are empty."""
    here, ledgers = undisturbed
    for name, alone in ledgers.items():
        ledger = cluster.wait(lambda one: one.pending == 0 and one.files.found > 0, seconds=200, sweep=name)
        assert ledger.exact
        assert ledger.as_json() == alone.as_json()
    store = cluster.store()
    for prefix in ("features/", "outcomes/classified/"):
        assert {key: store.get(key) for key in store.keys(prefix)} == here.objects(prefix)
    assert without_edition(store, "cases/") == without_edition(here.store, "cases/")
    assert any(json.loads(store.get(k)).get(FIELD) == EDITION for k in store.keys("cases/") if k.endswith(".json"))
    broker = RabbitBroker(cluster.settings.rabbitmq)
    queues = [*QUEUES, *(f"{queue}.dead" for queue in QUEUES)]
    until(lambda: not any(depth.ready for depth in broker.depths(queues).values()), 60, "empty queues")
    broker.close()


def test_consumers_first_not_one_message_is_given_up(
    cluster: Cluster, studies: list[Path], undisturbed: tuple[Place, dict[str, Ledger]]
) -> None:
    submit_next = submitter(cluster, studies)

    for number, name in enumerate(CONSUMERS_FIRST):
        if number % 2 == 0:
            submit_next()
        upgrade(cluster, name)

    assert_as_undisturbed(cluster, undisturbed)
    assert Survey(cluster.store()).letters == []


def test_producers_first_what_was_given_up_as_newer_is_finished_by_a_replay(
    cluster: Cluster, studies: list[Path], undisturbed: tuple[Place, dict[str, Ledger]]
) -> None:
    store = cluster.store()
    submit_next = submitter(cluster, studies)

    def given_up() -> set[tuple[str, str]]:
        return {(letter.queue, letter.kind) for letter in Survey(store).letters}

    for names, stuck in (
        (("dicom-ingest",), "segmenter"),
        (("segmenter", "resampler"), "radiomics-extractor"),
        (("radiomics-extractor", "deep-extractor"), "fusion-classifier"),
        (("fusion-classifier",), "report-generator"),
    ):
        upgrade(cluster, *names)
        submit_next()
        until(lambda queue=stuck: (queue, "newer-schema") in given_up(), 120, f"a newer schema at the {stuck}")
    upgrade(cluster, "report-generator", "recorder")
    pending = sum(ledger.pending for name in SWEEPS if (ledger := cluster.ledger(name)))
    kinds = {kind for _, kind in given_up()}

    replayed = cluster.command("dead-letters", "replay", "--kind", "newer-schema", program=NEXT)

    assert pending > 0
    assert kinds == {"newer-schema"}
    assert replayed.returncode == 0, replayed.stderr
    assert_as_undisturbed(cluster, undisturbed)

    def standings() -> set[str]:
        listed = cluster.command("dead-letters", "list", "--json", program=NEXT)
        return {letter["state"] for letter in json.loads(listed.stdout)}

    until(lambda: standings() == {"done since"}, 60, "every letter done since")
