"""Each service does its whole work with its rights alone: a key that it touches beyond them is a failure here."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.composition import bundle_of, claim, teller
from services.dicom_ingest import inbox
from services.dicom_ingest.sweep import close_sweep, run_sweep
from services.embedded import intake_of, pipeline
from services.retention import ages_of
from services.sources import source_of
from shared.fracture.access import COLLECTOR, OPERATOR, STORE_RIGHTS, SUBMITTER
from shared.fracture.ids import Pseudonyms
from shared.fracture.topology import DICOM_INGEST, SERVICES
from shared.pipeline.store import Entry, Store
from shared.records.dead_letters import Survey, replay
from shared.records.garbage import collect, decisions
from shared.records.ledger import sweep_ledger
from tests.fixtures.broken_dicom import make_broken_inputs
from tests.fixtures.runs import PSEUDONYM_KEY, place

pytestmark = pytest.mark.timeout(300)


class HeldToItsRights:
    """A store as one user of a server with our policies has it; notes what a server would have refused."""

    def __init__(self, inner: Store, user: str, refused: set[str]) -> None:
        self._inner, self._user, self._refused = inner, user, refused
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes) -> bool:
        self._need("put", key)
        return self._inner.put(key, data)

    def get(self, key: str) -> bytes:
        self._need("get", key)
        return self._inner.get(key)

    def exists(self, key: str) -> bool:
        self._need("get", key)
        return self._inner.exists(key)

    def keys(self, prefix: str) -> Iterator[str]:
        self._need("list", prefix)
        return self._inner.keys(prefix)

    def entries(self, prefix: str) -> Iterator[Entry]:
        self._need("list", prefix)
        return self._inner.entries(prefix)

    def delete(self, key: str) -> None:
        self._need("delete", key)
        self._inner.delete(key)

    def check(self) -> None:
        self._inner.check()

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def _need(self, action: str, key: str) -> None:
        if not STORE_RIGHTS[self._user].allows(action, key):
            with self._lock:
                self._refused.add(f"{self._user}: {action} {'/'.join(key.split('/')[:2])}")


def test_the_whole_pipeline_runs_with_each_services_rights(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    archive = tmp_path / "archive"
    shutil.copytree(phantom_archive, archive / "good")
    make_broken_inputs(archive / "broken")
    here = place(tmp_path / "store", tiny_bundle, report_generator__named_reports="true")
    bundle, pseudonyms = bundle_of(here.settings), Pseudonyms(bytes.fromhex(PSEUDONYM_KEY))
    refused: set[str] = set()

    def held(store: Store, user: str) -> Store:
        return HeldToItsRights(store, user, refused)

    ingest, submitter = held(here.store, DICOM_INGEST), held(here.store, SUBMITTER)
    inbox.submit(archive, name="a sweep", store=submitter, pseudonyms=pseudonyms)
    with pipeline(settings=here.settings, store=here.store, bundle=bundle, held=held) as running:
        claim(ingest, pseudonyms)
        (submission,) = inbox.waiting(ingest)
        path = inbox.fetch(submission, store=ingest, into=tmp_path / "spool")
        sweep_id = pseudonyms.sweep_id(submission.name)
        run_sweep(
            source_of(path, settings=here.settings),
            name=submission.name,
            sweep_id=sweep_id,
            intake=intake_of(here.settings, store=ingest, pseudonyms=pseudonyms, bundle=bundle),
            store=ingest,
            protocols=bundle.manifest.protocols,
            tell=teller(running.broker),
        )
        running.wait_until_idle()
        close_sweep(ingest, sweep_id, tell=teller(running.broker))
        inbox.empty(submission, store=ingest)
        running.wait_until_idle()
    ledger = sweep_ledger(held(here.store, OPERATOR), sweep_id)

    assert ledger is not None
    assert ledger.pending == 0
    assert ledger.cases.by_state["reported"] > 0
    assert ledger.series.by_state["rejected"] > 0
    assert sorted(refused) == []


def test_dead_letters_are_made_and_replayed_with_the_rights_of_recorder_and_operator(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    hasty = place(tmp_path / "store", tiny_bundle, radiomics_extractor__case_seconds="0.001")
    hasty.run(phantom_archive)
    refused: set[str] = set()

    def held(store: Store, user: str) -> Store:
        return HeldToItsRights(store, user, refused)

    patient = place(tmp_path / "store", tiny_bundle)
    operator = held(patient.store, OPERATOR)
    bundle = bundle_of(patient.settings)
    with pipeline(settings=patient.settings, store=patient.store, bundle=bundle, held=held) as running:
        done = [replay(operator, running.broker, standing) for standing in Survey(operator).matching()]
        running.wait_until_idle()

    assert set(done) == {"replayed"}
    assert sorted(refused) == []


def test_what_is_past_its_age_is_explained_and_removed_with_the_collectors_rights(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    here = place(
        tmp_path / "store",
        tiny_bundle,
        report_generator__named_reports="true",
        retention__derived_days="30",
        retention__features_days="30",
        retention__results_days="60",
        retention__ledger_days="90",
        retention__identities_days="30",
    )
    here.run(phantom_archive)
    refused: set[str] = set()
    collector = HeldToItsRights(here.store, COLLECTOR, refused)
    ages, later = ages_of(here.settings.retention), datetime.now(UTC) + timedelta(days=40_000)

    decided = list(decisions(collector, ages=ages, now=later))
    done = collect(collector, [one for one in decided if one.delete])

    assert done.deleted
    assert len(decided) > len(done.deleted)
    assert sorted(refused) == []


def test_every_service_is_held_to_something() -> None:
    assert all(STORE_RIGHTS[service].writes for service in SERVICES)
