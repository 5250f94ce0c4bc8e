"""The user's own run: everything in one process tree, over a folder, with progress, and files to open at the end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.composition import WORKERS, build_recorder, build_service, claim, teller
from services.dicom_ingest.intake import Intake, Tell
from services.dicom_ingest.pressure import Gate, PatientStore
from services.dicom_ingest.sweep import Source, close_sweep, run_sweep
from services.settings import Settings
from shared.fracture.bundle import Bundle
from shared.fracture.ids import Pseudonyms
from shared.fracture.ledger import Ledger
from shared.fracture.topology import QUEUES, RECORDER
from shared.pipeline.embedded import Counted, Embedded
from shared.pipeline.memory_broker import MemoryBroker
from shared.pipeline.metrics import Metrics
from shared.pipeline.store import Store
from shared.pipeline.worker import Runs, Worker
from shared.records.ledger import sweep_ledger

LOG = logging.getLogger("fracture_sweep.embedded")

ENDED = ("FractureClassified", "CaseNotEvaluated", "CaseRejected", "CaseDeadLettered")


class Progress(Protocol):
    """Something that shows how far a run is."""

    def studies(self, done: int, total: int) -> None:
        """So many studies of so many were read."""

    def cases(self, done: int, found: int) -> None:
        """So many cases have an end, of so many found until now."""


class Silent:
    """Progress that nobody sees."""

    def studies(self, done: int, total: int) -> None:
        """Nothing."""

    def cases(self, done: int, found: int) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a run did."""

    sweep_id: str
    ledger: Ledger
    computed: bool
    """Whether anything was computed that was not there before."""


@contextmanager
def pipeline(
    *,
    settings: Settings,
    store: Store,
    bundle: Bundle,
    metrics: Metrics | None = None,
    held: Callable[[Store, str], Store] = lambda store, service: store,
) -> Iterator[Embedded]:
    """All services at work on one MemoryBroker, until the block ends.

    `held` may give each service another view of the store, as a user of its own has on a server.
    """
    measured = Metrics() if metrics is None else metrics
    broker = Counted(MemoryBroker())
    broker.declare(QUEUES)
    with ExitStack() as stack:
        workers: list[Runs] = []
        for name in WORKERS:
            own = held(store, name)
            service = build_service(name, settings=settings, store=own, bundle=lambda: bundle, metrics=measured)
            stack.callback(service.close)
            workers.append(Worker(service, broker, max_attempts=settings.worker.max_attempts, metrics=measured))
        workers.append(build_recorder(store=held(store, RECORDER), broker=broker, metrics=measured))
        yield stack.enter_context(Embedded(broker, workers))


def cases_of(published: Mapping[str, int]) -> tuple[int, int]:
    """How many cases have an end, and how many were found, from the counts of facts told."""
    ended = sum(published.get(fact, 0) for fact in ENDED)
    return ended, max(ended, published.get("CaseReady", 0) + published.get("CaseNotEvaluated", 0))


def run(
    source: Source,
    *,
    name: str,
    settings: Settings,
    store: Store,
    pseudonyms: Pseudonyms,
    bundle: Bundle,
    progress: Progress | None = None,
    metrics: Metrics | None = None,
) -> Ran:
    """Sweep a source into a store and wait until nothing is under way; the ledger says how it ended."""
    shown = Silent() if progress is None else progress
    claim(store, pseudonyms)
    protocols = bundle.manifest.protocols
    sweep_id = pseudonyms.sweep_id(name)
    before = _outcome_keys(store)
    measured = Metrics() if metrics is None else metrics
    with pipeline(settings=settings, store=store, bundle=bundle, metrics=measured) as running:
        tell: Tell = teller(running.broker)

        def tick() -> None:
            shown.cases(*cases_of(running.broker.published()))

        def while_waiting() -> None:
            running.check()
            tick()

        gate = Gate(
            settings=settings.pressure,
            depths=running.broker.depths,
            free_bytes=store.free_bytes,
            metrics=measured,
            stop=threading.Event(),
            while_waiting=while_waiting,
        )
        patient = PatientStore(store, gate)

        def read(done: int, total: int) -> None:
            shown.studies(done, total)
            tick()

        run_sweep(
            source,
            name=name,
            sweep_id=sweep_id,
            intake=intake_of(settings, store=patient, pseudonyms=pseudonyms, bundle=bundle),
            store=patient,
            protocols=protocols,
            tell=tell,
            progress=read,
            admit=gate.admit,
        )
        running.wait_until_idle(tick)
        close_sweep(patient, sweep_id, tell=tell)
        running.wait_until_idle(tick)
    ledger = sweep_ledger(store, sweep_id)
    if ledger is None:
        raise RuntimeError("the sweep that was just planned is not in the store")
    return Ran(sweep_id=sweep_id, ledger=ledger, computed=_outcome_keys(store) != before)


def _outcome_keys(store: Store) -> int:
    """How many results, outcomes and reports a store holds."""
    return sum(1 for prefix in ("cases/", "features/", "outcomes/", "reports/") for _ in store.keys(prefix))


def intake_of(settings: Settings, *, store: Store, pseudonyms: Pseudonyms, bundle: Bundle) -> Intake:
    """The intake under these settings."""
    return Intake(
        store=store,
        pseudonyms=pseudonyms,
        protocols=bundle.manifest.protocols,
        judged_by=settings.dicom_ingest.model_dump(mode="json"),
        masks_by="" if settings.segmenter.source == "off" else settings.segmenter.source,
    )


def default_key_folder(environ: Mapping[str, str]) -> Path:
    """Where a user's own keys lie unless a setting says otherwise."""
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(environ.get("HOME", "."), ".config")
    return Path(base) / "fracture-sweep"
