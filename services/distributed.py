"""The distributed system's processes: one worker, the recorder, or dicom-ingest over the inbox.

What only one service needs is imported when that service is built: its image holds nothing else.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from services.composition import (
    build_recorder,
    build_service,
    bundle_of,
    no_such_service,
    pseudonyms_of,
    restricted,
)
from services.settings import Settings
from shared.fracture.topology import DICOM_INGEST, QUEUES, RECORDER, SERVICES
from shared.pipeline.broker import Broker
from shared.pipeline.errors import BrokerUnavailable, FractureSweepError, StoreUnavailable
from shared.pipeline.metrics import Metrics
from shared.pipeline.minio_store import MinioStore
from shared.pipeline.rabbit_broker import RabbitBroker
from shared.pipeline.spool import remove_abandoned
from shared.pipeline.store import Store
from shared.pipeline.worker import Worker, serve

LOG = logging.getLogger("fracture_sweep.distributed")

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
    abandoned = remove_abandoned(Path(tempfile.gettempdir()))
    if abandoned:
        LOG.info("temporary folders that a killed process left were removed", extra={"fields": {"folders": abandoned}})
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
        from services.inbox_worker import InboxWorker

        inbox_worker = InboxWorker(
            settings=settings,
            store=store,
            broker=broker,
            pseudonyms=pseudonyms_of(settings),
            bundle=bundle_of(settings),
            metrics=metrics,
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
