"""Ingest waits while too much is under way or the store is short of room, and loses nothing by it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from services.composition import bundle_of, restricted
from services.dicom_ingest.collected import CollectedSeries
from services.dicom_ingest.inbox import submit
from services.dicom_ingest.sweep import CollectedFile, CollectedStudy, Source, run_sweep
from services.embedded import Ran, intake_of, run
from services.inbox_worker import InboxWorker
from services.sources import source_of
from shared.fracture.ids import Pseudonyms
from shared.fracture.records import SeriesPlan
from shared.fracture.topology import QUEUES, SEGMENTER
from shared.fracture.under_way import COUNTED, cases_under_way
from shared.pipeline.errors import StoreFull
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.memory_broker import MemoryBroker
from shared.pipeline.metrics import Metrics
from shared.pipeline.store import Store
from shared.records.archive import read_record
from shared.records.ledger import case_outcome, sweep_ledger
from tests.fixtures.cluster import Cluster
from tests.fixtures.rabbitmq import until
from tests.fixtures.runs import PSEUDONYM_KEY, Place, place, settings_with

COMPARED = ("features/", "outcomes/classified/", "cases/")
PSEUDONYMS = Pseudonyms(bytes.fromhex(PSEUDONYM_KEY))
QUICK = {"pressure__poll_seconds": "0.05"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, phantom_archive: Path) -> Place:
    """A run of the phantom archive that nothing held back."""
    here = place(tmp_path_factory.mktemp("undisturbed") / "store", tiny_bundle)
    assert here.run(phantom_archive).ledger.pending == 0
    return here


def assert_all_done(ran: Ran, store: Store, undisturbed: Place) -> None:
    expected = sweep_ledger(undisturbed.store, ran.sweep_id)
    assert expected is not None
    assert ran.ledger.exact
    assert ran.ledger.as_json() == expected.as_json()
    assert Place(store=store, settings=undisturbed.settings).objects(*COMPARED) == undisturbed.objects(*COMPARED)


class Watched:
    """A source that looks at the store before each series is read."""

    def __init__(self, inner: Source, store: Store, scope: str) -> None:
        self._inner = inner
        self._store = store
        self._scope = scope
        self.under_way: list[int] = []

    @property
    def total(self) -> int:
        return self._inner.total

    def studies(self) -> Iterator[CollectedStudy]:
        for study in self._inner.studies():
            yield replace(study, series=self._looking(study.series))

    def files(self) -> tuple[CollectedFile, ...]:
        return self._inner.files()

    def _looking(self, series: object) -> Iterator[CollectedSeries]:
        for one in series:  # type: ignore[attr-defined]
            self.under_way.append(self._pending())
            yield one

    def _pending(self) -> int:
        plans = [read_record(self._store, key, SeriesPlan) for key in self._store.keys("plans/series/")]
        cases = {case.case_id for plan in plans for case in plan.cases}
        return sum(case_outcome(self._store, self._scope, case) is None for case in cases)


def test_with_a_limit_of_one_a_series_is_taken_only_when_the_one_before_is_done(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path, undisturbed: Place
) -> None:
    here = place(tmp_path / "store", tiny_bundle, pressure__max_cases_under_way="1", **QUICK)
    bundle = bundle_of(here.settings)
    source = Watched(source_of(phantom_archive, settings=here.settings), here.store, bundle.manifest.protocols.scope)
    metrics = Metrics()

    ran = run(
        source,
        name="a sweep",
        settings=here.settings,
        store=here.store,
        pseudonyms=PSEUDONYMS,
        bundle=bundle,
        metrics=metrics,
    )

    assert len(source.under_way) == 4
    assert set(source.under_way) == {0}
    assert metrics.value("fracture_sweep_ingest_paused", {"reason": "cases"}) == 0
    assert_all_done(ran, here.store, undisturbed)


def test_each_series_is_admitted_before_it_is_read_and_before_it_is_told(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    here = place(tmp_path / "store", tiny_bundle)
    bundle = bundle_of(here.settings)
    events: list[str] = []

    run_sweep(
        source_of(phantom_archive, settings=here.settings),
        name="n",
        sweep_id=PSEUDONYMS.sweep_id("n"),
        intake=intake_of(here.settings, store=here.store, pseudonyms=PSEUDONYMS, bundle=bundle),
        store=here.store,
        protocols=bundle.manifest.protocols,
        tell=lambda fact: events.append(type(fact).__name__),
        admit=lambda: events.append("admitted"),
    )

    told = [number for number, event in enumerate(events) if event == "SeriesStored"]
    assert len(told) == 4
    assert {events[number - 1] for number in told} == {"admitted"}
    assert events[0] == "admitted"


class Disk(FolderStore):
    """A store on a disk whose room a test sets."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.free: int | None = None
        self.full = False
        self.fill_at = ""
        self.refused: list[str] = []

    def free_bytes(self) -> int | None:
        return super().free_bytes() if self.free is None else self.free

    def put(self, key: str, data: bytes) -> bool:
        if self.fill_at and key.startswith(self.fill_at):
            self.fill_at = ""
            self.full = True
        if self.full:
            self.refused.append(key)
            raise StoreFull("the disk is full")
        return super().put(key, data)


class Making:
    """Progress that makes room on the disk after it was shown so often."""

    def __init__(self, disk: Disk, shown: int) -> None:
        self._disk = disk
        self._left = shown
        self.volumes_while_short: set[str] = set()

    def studies(self, done: int, total: int) -> None:
        """Nothing."""

    def cases(self, done: int, found: int) -> None:
        """Once more."""
        if self._disk.free == 0 or self._disk.full:
            self.volumes_while_short |= set(self._disk.keys("volumes/"))
            self._left -= 1
            if self._left == 0:
                self._disk.free, self._disk.full = None, False


def run_on(disk: Disk, making: Making, archive: Path, bundle: Path) -> Ran:
    settings = settings_with(bundle, **QUICK)
    return run(
        source_of(archive, settings=settings),
        name="a sweep",
        settings=settings,
        store=restricted(disk, settings),
        pseudonyms=PSEUDONYMS,
        bundle=bundle_of(settings),
        progress=making,
    )


def test_a_store_short_of_room_takes_nothing_until_there_is_room(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path, undisturbed: Place
) -> None:
    disk = Disk(tmp_path / "store")
    disk.free = 0
    making = Making(disk, shown=3)

    ran = run_on(disk, making, phantom_archive, tiny_bundle)

    assert disk.free is None
    assert making.volumes_while_short == set()
    assert_all_done(ran, disk, undisturbed)


@pytest.mark.parametrize("fill_at", ["volumes/", "plans/studies/", "sweeps/"])
def test_a_store_that_fills_up_in_the_middle_of_an_intake_costs_nothing(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path, undisturbed: Place, fill_at: str
) -> None:
    disk = Disk(tmp_path / "store")
    disk.fill_at = fill_at
    making = Making(disk, shown=3)

    ran = run_on(disk, making, phantom_archive, tiny_bundle)

    assert disk.refused[0].startswith(fill_at)
    assert len(disk.refused) >= 3
    assert ran.ledger.cases.by_state["dead-lettered"] == 0
    assert_all_done(ran, disk, undisturbed)


# over an inbox ------------------------------------------------------------------------------------------------------
class Inbox:
    """dicom-ingest over an inbox, on a thread of this test, without any worker behind it until `finish`."""

    def __init__(self, disk: Disk, bundle: Path, **more: str) -> None:
        self.settings = settings_with(
            bundle, **QUICK, inbox__poll_seconds="0.05", inbox__close_seconds="0.2", inbox__lease_seconds="1", **more
        )
        self.store = restricted(disk, self.settings)
        self.broker = MemoryBroker()
        self.broker.declare(QUEUES)
        self.metrics = Metrics()
        self.worker = InboxWorker(
            settings=self.settings,
            store=self.store,
            broker=self.broker,
            pseudonyms=PSEUDONYMS,
            bundle=bundle_of(self.settings),
            metrics=self.metrics,
        )
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.worker.run, args=(self.stop,), daemon=True)

    def told(self) -> int:
        return self.broker.depths([SEGMENTER])[SEGMENTER].ready

    def paused(self, reason: str) -> bool:
        return self.metrics.value("fracture_sweep_ingest_paused", {"reason": reason}) == 1

    def submitted(self, archive: Path) -> None:
        submit(archive, name="a sweep", store=self.store, pseudonyms=PSEUDONYMS)

    def inbox(self) -> Sequence[str]:
        return list(self.store.keys("inbox/"))

    def ended(self) -> bool:
        self.stop.set()
        self.thread.join(20)
        return not self.thread.is_alive()


def test_ingest_holds_a_submission_at_the_limit_and_leaves_it_whole_when_it_is_stopped(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    here = Inbox(Disk(tmp_path / "store"), tiny_bundle, pressure__max_cases_under_way="2")
    here.submitted(phantom_archive)
    submitted = {key for key in here.inbox() if "/leases/" not in key}

    here.thread.start()
    until(lambda: here.paused("cases"), 60, "the limit of cases")

    assert here.told() == 2
    assert cases_under_way({q: d.ready for q, d in here.broker.depths(COUNTED).items()}) == 2
    assert here.ended()
    assert here.told() == 2
    assert submitted <= set(here.inbox())


def test_a_store_that_fills_up_while_a_submission_is_read_loses_nothing_of_it(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    disk = Disk(tmp_path / "store")
    here = Inbox(disk, tiny_bundle)
    here.submitted(phantom_archive)
    disk.fill_at = "volumes/"

    here.thread.start()
    until(lambda: here.paused("space"), 60, "the full store")
    assert here.told() == 0
    disk.full = False

    until(lambda: here.told() == 4, 60, "all four series")
    until(lambda: here.inbox() == [], 20, "an empty inbox")
    assert here.ended()
    assert not here.paused("space")


@pytest.mark.rabbitmq
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_a_distributed_sweep_with_a_limit_of_one_ends_as_one_without(
    tmp_path: Path,
    rabbitmq_environ: dict[str, str],
    s3_environ: dict[str, str],
    tiny_bundle: Path,
    phantom_archive: Path,
    undisturbed: Place,
) -> None:
    environ = {
        **rabbitmq_environ,
        **s3_environ,
        "FRACTURE_SWEEP_BUNDLE_PATH": str(tiny_bundle),
        "FRACTURE_SWEEP_PRESSURE_MAX_CASES_UNDER_WAY": "1",
        "FRACTURE_SWEEP_PRESSURE_POLL_SECONDS": "0.2",
    }
    with Cluster(environ, tmp_path / "logs") as cluster:
        cluster.start()

        submitted = cluster.command("submit", str(phantom_archive))

        assert submitted.returncode == 0, submitted.stderr
        ledger = cluster.wait(lambda now: now.pending == 0 and now.files.found > 0, seconds=240)
        log = (tmp_path / "logs" / "dicom-ingest.log").read_text()
        assert "ingest takes no new series for now" in log
        assert "ingest goes on" in log
        assert ledger.exact
        store = cluster.store()
        assert {k: store.get(k) for p in COMPARED for k in store.keys(p)} == undisturbed.objects(*COMPARED)
