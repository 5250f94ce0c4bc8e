"""Over RabbitMQ and S3: the same numbers as embedded, and nothing lost when workers and broker die."""

from __future__ import annotations

import csv
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.settings import DEMO_BUNDLE
from services.trainer.phantoms.archive import write_archive
from shared.fracture.ledger import Ledger
from shared.fracture.topology import QUEUES, SERVICES
from shared.pipeline.rabbit_broker import RabbitBroker
from tests.fixtures.cluster import Cluster
from tests.fixtures.rabbitmq import until
from tests.fixtures.runs import place

pytestmark = [pytest.mark.rabbitmq, pytest.mark.s3, pytest.mark.timeout(900)]


def done(ledger: Ledger) -> bool:
    return ledger.pending == 0 and ledger.files.found > 0


@pytest.fixture
def cluster(
    tmp_path: Path, rabbitmq_environ: dict[str, str], s3_environ: dict[str, str], tiny_bundle: Path
) -> Iterator[Cluster]:
    environ = {**rabbitmq_environ, **s3_environ, "FRACTURE_SWEEP_BUNDLE_PATH": str(tiny_bundle)}
    with Cluster(environ, tmp_path / "logs") as running:
        yield running


def test_embedded_and_distributed_give_identical_features_and_probabilities(
    cluster: Cluster, tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    here = place(tmp_path / "store", tiny_bundle)
    alone = here.run(phantom_archive)
    cluster.start()

    submitted = cluster.command("submit", str(phantom_archive))

    assert submitted.returncode == 0, submitted.stderr
    ledger = cluster.wait(done, seconds=240)
    store = cluster.store()
    assert ledger.cases.by_state == alone.ledger.cases.by_state
    for prefix in ("features/", "outcomes/classified/", "cases/"):
        theirs = {key: store.get(key) for key in store.keys(prefix)}
        assert theirs == here.objects(prefix)
    assert list(store.keys("inbox/")) == []


@pytest.mark.shared_data
def test_real_scans_give_the_same_numbers_embedded_and_distributed(
    cluster: Cluster, tmp_path: Path, shared_data: Path
) -> None:
    """With the demonstration bundle: all 1,648 radiomics features and the ResNet50."""
    example, tptbox = shared_data / "totalseg-example", shared_data / "tptbox-l3"
    dicom = shared_data / "totalseg-ct-dicom"
    report = example / "spine_report" / "example_ct_report"
    table = tmp_path / "pairs.csv"
    table.write_text(
        "image,mask,labels,roi,body,body_labels,age,sex\n"
        f"{example / 'example_ct.nii.gz'},{report / 'totalseg.nii.gz'},totalseg,vertebra,"
        f"{report / 'totalseg_vertebrae_body.nii.gz'},1,70,F\n"
        f"{tptbox / 'sub-ct_label-22_ct.nii.gz'},{tptbox / 'sub-ct_seg-vert_label-22_msk.nii.gz'},verse,vertebra,"
        f"{tptbox / 'sub-ct_seg-subreg_label-22_msk.nii.gz'},49;50,80,M\n"
        f"{dicom / 'example_ct_dicom'},{dicom / 'example_seg_dicom.nii.gz'},totalseg,vertebra,,,,\n"
    )
    with tarfile.open(shared_data / "crlm-1004-dicom" / "CRLM-CT-1004.tar.xz") as tar:
        tar.extractall(tmp_path / "crlm", filter="data")
    cluster.environ["FRACTURE_SWEEP_BUNDLE_PATH"] = str(DEMO_BUNDLE)
    here = place(tmp_path / "store", DEMO_BUNDLE)
    alone = {"real": here.run(table, name="real"), "crlm": here.run(tmp_path / "crlm", name="crlm")}
    cluster.start()

    for name, path in (("real", table), ("crlm", tmp_path / "crlm")):
        submitted = cluster.command("submit", str(path), "--sweep", name)
        assert submitted.returncode == 0, submitted.stderr

    ledgers = {name: cluster.wait(done, seconds=400, sweep=name) for name in alone}
    store = cluster.store()
    assert {name: ledger.as_json() for name, ledger in ledgers.items()} == {
        name: ran.ledger.as_json() for name, ran in alone.items()
    }
    assert ledgers["real"].cases.by_state["reported"] == 6
    assert ledgers["crlm"].series.by_state["rejected"] == 1
    for prefix in ("features/", "outcomes/classified/", "cases/"):
        assert {key: store.get(key) for key in store.keys(prefix)} == here.objects(prefix)


def test_sigterm_drains_and_exits_0(cluster: Cluster, phantom_archive: Path) -> None:
    cluster.start()
    cluster.command("submit", str(phantom_archive))
    cluster.wait(lambda ledger: ledger.cases.found > 0, seconds=120, every=0.2)

    codes = [code for name in list(cluster.processes) for code in cluster.terminate(name)]

    assert set(codes) == {0}
    cluster.start()
    ledger = cluster.wait(done, seconds=240)
    assert ledger.cases.by_state["dead-lettered"] == 0


@pytest.fixture(scope="session")
def fifty_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom archive of at least fifty cases."""
    folder = tmp_path_factory.mktemp("fifty")
    write_archive(folder, patients=36, seed=17)
    with (folder / "truth.csv").open() as table:
        assert sum(1 for _ in csv.DictReader(table)) >= 50
    return folder


def test_every_case_of_fifty_ends_once_though_workers_and_broker_die(
    tmp_path: Path, private_rabbitmq: object, s3_environ: dict[str, str], tiny_bundle: Path, fifty_cases: Path
) -> None:
    alone = place(tmp_path / "store", tiny_bundle).run(fifty_cases)
    node = private_rabbitmq
    environ = {
        **node.environ,  # type: ignore[attr-defined]
        **s3_environ,
        "FRACTURE_SWEEP_BUNDLE_PATH": str(tiny_bundle),
    }
    with Cluster(environ, tmp_path / "logs") as cluster:
        cluster.start()
        assert cluster.command("submit", str(fifty_cases)).returncode == 0
        store = cluster.store()

        def results() -> int:
            return sum(1 for _ in store.keys("outcomes/classified/"))

        until(lambda: results() > 0, 180, "a first result")
        for number, name in enumerate(SERVICES):
            time.sleep(1.5)
            cluster.kill(name)
            cluster.start(name)
            if number == 3:
                node.restart()  # type: ignore[attr-defined]
        in_the_middle = results()

        ledger = cluster.wait(done, seconds=400)

        assert in_the_middle < alone.ledger.cases.found
        assert ledger.exact
        assert ledger.cases.found == alone.ledger.cases.found
        assert ledger.cases.found == sum(ledger.cases.by_state.values())
        assert ledger.cases.by_state == alone.ledger.cases.by_state
        broker = RabbitBroker(cluster.settings.rabbitmq)

        def left() -> dict[str, int]:
            depths = broker.depths([*QUEUES, *(f"{queue}.dead" for queue in QUEUES)])
            return {queue: depth.ready for queue, depth in depths.items() if depth.ready}

        # the ledger is whole before the last worklists are made
        until(lambda: left() == {}, 120, "the queues to be empty")
        broker.close()
