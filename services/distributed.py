"""The distributed system's processes: one worker, the recorder, or dicom-ingest over the inbox."""

from __future__ import annotations

import logging
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from services.composition import (
    build_recorder,
    build_service,
    bundle_of,
    claim,
    no_such_service,
    pseudonyms_of,
    restricted,
    teller,
)
from services.dicom_ingest import inbox
from services.dicom_ingest.intake import Tell
from services.dicom_ingest.sweep import NoSource, Source, close_sweep, is_open, run_sweep
from services.embedded import intake_of
from services.settings import Settings
from services.sources import source_of
from shared.fracture.bundle import Bundle
from shared.fracture.ids import Pseudonyms, short
from shared.fracture.topology import DICOM_INGEST, QUEUES, RECORDER, SERVICES
from shared.pipeline.broker import Broker
from shared.pipeline.errors import BrokerUnavailable, FractureSweepError, StoreUnavailable
from shared.pipeline.metrics import Metrics
from shared.pipeline.minio_store import MinioStore
from shared.pipeline.rabbit_broker import RabbitBroker
from shared.pipeline.store import Store
from shared.pipeline.worker import Worker, serve
from shared.records.ledger import sweeps

LOG = logging.getLogger("fracture_sweep.ingest")

T = TypeVar("T")


def open_store(settings: Settings) -> Store:
    """The S3 store, checked: reachable, and honouring conditional puts."""
    if settings.s3 is None:
        raise FractureSweepError(
            "no store is named: set S3_ENDPOINT, S3_ACCESS_KEY and S3_SECRET_KEY (or S3_SECRET_KEY_FILE)"
        )
    store = MinioStore(settings.s3)
    store.check()
    return restricted(store, settings)


def open_broker(settings: Settings) -> Broker:
    """RabbitMQ, with every queue declared."""
    broker = RabbitBroker(settings.rabbitmq)
    broker.declare(QUEUES)
    return broker


def patiently(opened: Callable[[], T], *, seconds: float) -> T:
    """What `opened` opens, tried again while broker or store is not there yet: they may be restarting beside us."""
    end = time.monotonic() + seconds
    while True:
        try:
            return opened()
        except (BrokerUnavailable, StoreUnavailable) as error:
            if time.monotonic() >= end:
                raise
            LOG.warning("waiting for broker or store", extra={"fields": {"error": str(error)}})
            time.sleep(1.0)


def run_service(name: str, settings: Settings) -> int:
    """Run one service until SIGTERM; the exit code."""
    if name not in SERVICES:
        raise no_such_service(name)
    metrics = Metrics()
    store = patiently(lambda: open_store(settings), seconds=settings.worker.start_seconds)
    broker = patiently(lambda: open_broker(settings), seconds=settings.worker.start_seconds)
    host, port = settings.worker.health_host, settings.worker.health_port
    if name == RECORDER:
        recorder = build_recorder(store=store, broker=broker, metrics=metrics)
        return serve(
            recorder,
            broker=broker,
            checks={"store": store.check},
            metrics=metrics,
            health_host=host,
            health_port=port,
        )
    if name == DICOM_INGEST:
        inbox_worker = InboxWorker(
            settings=settings,
            store=store,
            broker=broker,
            pseudonyms=pseudonyms_of(settings),
            bundle=bundle_of(settings),
        )
        return serve(
            inbox_worker,
            broker=broker,
            checks={"store": store.check},
            metrics=metrics,
            health_host=host,
            health_port=port,
        )
    service = build_service(name, settings=settings, store=store, bundle=lambda: bundle_of(settings), metrics=metrics)
    worker = Worker(
        service,
        broker,
        max_attempts=settings.worker.max_attempts,
        stuck_seconds=settings.worker.stuck_seconds,
        metrics=metrics,
    )
    return serve(
        worker,
        broker=broker,
        checks={"store": store.check, "service": service.ready},
        metrics=metrics,
        health_host=host,
        health_port=port,
        alive=worker.alive,
        close=service.close,
    )


class InboxWorker:
    """dicom-ingest over the inbox: reads what was submitted, sweeps it, empties it, and closes sweeps that are done."""

    def __init__(
        self, *, settings: Settings, store: Store, broker: Broker, pseudonyms: Pseudonyms, bundle: Bundle
    ) -> None:
        self._settings = settings
        self._store = store
        self._tell: Tell = teller(broker)
        self._pseudonyms = pseudonyms
        self._bundle = bundle
        self._owner = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        claim(store, pseudonyms)

    def run(self, stop: threading.Event) -> None:
        """Look after the inbox until `stop` is set; a submission under way is left for its next reader."""
        closer = threading.Thread(target=self._close_sweeps, args=(stop,), name="sweep-closer", daemon=True)
        closer.start()
        while not stop.is_set():
            self._guarded(lambda: self._read_inbox(stop))
            stop.wait(self._settings.inbox.poll_seconds)
        closer.join()

    def _close_sweeps(self, stop: threading.Event) -> None:
        while not stop.wait(self._settings.inbox.close_seconds):
            self._guarded(self._close_done)

    def _close_done(self) -> None:
        for sweep_id in sweeps(self._store):
            if is_open(self._store, sweep_id) and close_sweep(self._store, sweep_id, tell=self._tell):
                LOG.info("sweep closed", extra={"fields": {"sweep_id": short(sweep_id)}})

    def _guarded(self, work: Callable[[], object]) -> None:
        """Outages are waited for; anything else costs one round, and is logged without its text."""
        try:
            work()
        except (BrokerUnavailable, StoreUnavailable) as error:
            LOG.warning("waiting for broker or store", extra={"fields": {"error": str(error)}})
        except Exception as error:
            LOG.error("looking after the inbox failed", extra={"fields": {"error": type(error).__name__}})

    def _read_inbox(self, stop: threading.Event) -> None:
        for submission in inbox.waiting(self._store):
            if stop.is_set():
                return
            now = datetime.now(UTC)
            lease = self._settings.inbox.lease_seconds
            if inbox.take_lease(self._store, submission.submission_id, owner=self._owner, now=now, seconds=lease):
                with self._holding(submission.submission_id):
                    read = self._sweep(submission, stop)
                if read:
                    inbox.empty(submission, store=self._store)

    @contextmanager
    def _holding(self, submission_id: str) -> Iterator[None]:
        """Renew the lease of a submission until the block ends."""
        ended = threading.Event()
        seconds = self._settings.inbox.lease_seconds

        def renew() -> None:
            while not ended.wait(seconds / 3):
                self._guarded(
                    lambda: inbox.take_lease(
                        self._store, submission_id, owner=self._owner, now=datetime.now(UTC), seconds=seconds
                    )
                )

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _sweep(self, submission: inbox.Submission, stop: threading.Event) -> bool:
        """Sweep a submission; whether all of it was read."""
        sweep_id = self._pseudonyms.sweep_id(submission.name)
        with tempfile.TemporaryDirectory(prefix="fracture-sweep-") as folder:
            path = inbox.fetch(submission, store=self._store, into=Path(folder))
            source: Source
            try:
                source = source_of(
                    path,
                    settings=self._settings,
                    default_labels=submission.default_labels,
                    default_roi=submission.default_roi,
                )
            except (BrokerUnavailable, StoreUnavailable):
                raise
            except FractureSweepError as error:
                # its text names files; `submit` and `run` show it to the user who has them
                reason = f"the submission cannot be read ({type(error).__name__}): `fracture-sweep run` says why"
                LOG.error("a submission cannot be read", extra={"fields": {"error": type(error).__name__}})
                source = NoSource((file.path for file in submission.files), reason)
            run_sweep(
                source,
                name=submission.name,
                sweep_id=sweep_id,
                intake=intake_of(self._settings, store=self._store, pseudonyms=self._pseudonyms, bundle=self._bundle),
                store=self._store,
                protocols=self._bundle.manifest.protocols,
                tell=self._tell,
                stopped=stop.is_set,
            )
        if stop.is_set():
            return False
        LOG.info("submission read", extra={"fields": {"sweep_id": short(sweep_id), "files": len(submission.files)}})
        return True
