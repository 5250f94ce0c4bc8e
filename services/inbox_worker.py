"""dicom-ingest in the distributed system: reads the inbox, sweeps what was submitted, closes the sweeps that are done.

Apart from `distributed.py`, since it alone needs what reads DICOM: another worker's image does not hold that.
"""

from __future__ import annotations

import logging
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from services.composition import claim, teller
from services.dicom_ingest import inbox
from services.dicom_ingest.intake import Tell
from services.dicom_ingest.pressure import Gate, PatientStore, Stopped
from services.dicom_ingest.sweep import NoSource, Source, close_sweep, run_sweep
from services.embedded import intake_of
from services.settings import Settings
from services.sources import source_of
from shared.fracture.bundle import Bundle
from shared.fracture.ids import Pseudonyms, short
from shared.pipeline.broker import Broker
from shared.pipeline.errors import BrokerUnavailable, FractureSweepError, StoreFull, StoreUnavailable
from shared.pipeline.metrics import Metrics
from shared.pipeline.spool import PREFIX
from shared.pipeline.store import Store
from shared.records.ledger import is_open, sweeps

LOG = logging.getLogger("fracture_sweep.ingest")


class InboxWorker:
    """dicom-ingest over the inbox: reads what was submitted, sweeps it, empties it, and closes sweeps that are done."""

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        broker: Broker,
        pseudonyms: Pseudonyms,
        bundle: Bundle,
        metrics: Metrics | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._broker = broker
        self._metrics = Metrics() if metrics is None else metrics
        self._tell: Tell = teller(broker)
        self._pseudonyms = pseudonyms
        self._bundle = bundle
        self._owner = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        claim(store, pseudonyms)

    def run(self, stop: threading.Event) -> None:
        """Look after the inbox until `stop` is set; a submission under way is left for its next reader."""
        closer = threading.Thread(target=self._close_sweeps, args=(stop,), name="sweep-closer", daemon=True)
        closer.start()
        gate = Gate(
            settings=self._settings.pressure,
            depths=self._broker.depths,
            free_bytes=self._store.free_bytes,
            metrics=self._metrics,
            stop=stop,
        )
        while not stop.is_set():
            self._guarded(lambda: self._read_inbox(stop, gate))
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
        except Stopped:
            LOG.info("stopped while waiting; the submission is left for its next reader")
        except (BrokerUnavailable, StoreUnavailable, StoreFull) as error:
            LOG.warning("waiting for broker or store", extra={"fields": {"error": str(error)}})
        except Exception as error:
            LOG.error("looking after the inbox failed", extra={"fields": {"error": type(error).__name__}})

    def _read_inbox(self, stop: threading.Event, gate: Gate) -> None:
        for submission in inbox.waiting(self._store):
            if stop.is_set():
                return
            gate.admit()  # before it is leased and fetched: the next worker may have room sooner
            now = datetime.now(UTC)
            lease = self._settings.inbox.lease_seconds
            if inbox.take_lease(self._store, submission.submission_id, owner=self._owner, now=now, seconds=lease):
                with self._holding(submission.submission_id):
                    read = self._sweep(submission, stop, gate)
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

    def _sweep(self, submission: inbox.Submission, stop: threading.Event, gate: Gate) -> bool:
        """Sweep a submission; whether all of it was read."""
        patient = PatientStore(self._store, gate)
        sweep_id = self._pseudonyms.sweep_id(submission.name)
        with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
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
                intake=intake_of(self._settings, store=patient, pseudonyms=self._pseudonyms, bundle=self._bundle),
                store=patient,
                protocols=self._bundle.manifest.protocols,
                tell=self._tell,
                stopped=stop.is_set,
                admit=gate.admit,
            )
        if stop.is_set():
            return False
        LOG.info("submission read", extra={"fields": {"sweep_id": short(sweep_id), "files": len(submission.files)}})
        return True
