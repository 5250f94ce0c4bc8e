from __future__ import annotations

from pathlib import Path

import pytest

from services.composition import WORKERS, build_service, bundle_of, claim, key_of, pseudonyms_of
from services.distributed import patiently
from services.settings import Settings
from shared.fracture.ids import Pseudonyms
from shared.fracture.topology import SERVICES
from shared.pipeline.errors import BrokerUnavailable, FractureSweepError
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.metrics import Metrics
from tests.fixtures.runs import settings_with


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.mark.parametrize("name", WORKERS)
def test_every_worker_is_built_with_the_queues_of_the_topology(
    name: str, store: FolderStore, tiny_bundle: Path
) -> None:
    settings = settings_with(tiny_bundle)

    service = build_service(name, settings=settings, store=store, bundle=lambda: bundle_of(settings), metrics=Metrics())

    try:
        assert service.name == name
        assert service.queues == SERVICES[name]
        service.ready()
    finally:
        service.close()


def test_a_name_that_is_no_service_is_refused_with_those_there_are(store: FolderStore, tiny_bundle: Path) -> None:
    settings = settings_with(tiny_bundle)

    with pytest.raises(FractureSweepError, match="there are dicom-ingest, segmenter"):
        build_service("x", settings=settings, store=store, bundle=lambda: bundle_of(settings), metrics=Metrics())


def test_a_store_refuses_another_pseudonym_key(store: FolderStore) -> None:
    claim(store, Pseudonyms(bytes(32)))
    claim(store, Pseudonyms(bytes(32)))

    with pytest.raises(FractureSweepError, match="another pseudonym key"):
        claim(store, Pseudonyms(bytes(range(32))))


@pytest.mark.parametrize("text", ["", "xyz", "ab" * 31, "ab" * 33])
def test_a_key_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(FractureSweepError, match="64 hexadecimal digits"):
        key_of(text, what="pseudonym key")


def test_without_a_pseudonym_key_nothing_is_named() -> None:
    with pytest.raises(FractureSweepError, match="no pseudonym key"):
        pseudonyms_of(Settings())


def test_a_starting_worker_waits_for_a_broker_that_comes_back() -> None:
    tries: list[int] = []

    def opened() -> str:
        tries.append(1)
        if len(tries) < 2:
            raise BrokerUnavailable("not there yet")
        return "open"

    assert patiently(opened, seconds=30) == "open"


def test_a_starting_worker_gives_up_after_its_time() -> None:
    def opened() -> str:
        raise BrokerUnavailable("nothing listens there")

    with pytest.raises(BrokerUnavailable, match="nothing listens"):
        patiently(opened, seconds=0)
