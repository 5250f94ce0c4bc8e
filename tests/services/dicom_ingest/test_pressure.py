from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dicom_ingest.pressure import Gate, PatientStore, Stopped, too_little, too_many
from services.dicom_ingest.settings import GIB, IngestSettings, PressureSettings
from shared.pipeline.broker import Depth
from shared.pipeline.errors import BrokerUnavailable, StoreFull, StoreUnavailable
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.metrics import Metrics


class World:
    """What a gate asks, as a test sets it; after so many waits the next of `later` happens."""

    def __init__(self, **settings: float) -> None:
        self.cases = 0
        self.free: int | None = 100 * GIB
        self.error: Exception | None = None
        self.waits = 0
        self.outages_seen: list[float] = []
        self.asked_for_room = 0
        self.now = 0.0
        self.later: list[Mapping[str, object]] = []
        self.metrics = Metrics()
        self.stop = threading.Event()
        self.gate = Gate(
            settings=PressureSettings.model_validate({"poll_seconds": 0.001, **settings}),
            depths=self.depths,
            free_bytes=self.free_bytes,
            metrics=self.metrics,
            stop=self.stop,
            while_waiting=self.while_waiting,
            clock=lambda: self.now,
        )

    def depths(self, queues: Sequence[str]) -> Mapping[str, Depth]:
        if self.error is not None:
            raise self.error
        return {"radiomics-extractor": Depth(ready=self.cases, unacknowledged=0)}

    def free_bytes(self) -> int | None:
        self.asked_for_room += 1
        return self.free

    def while_waiting(self) -> None:
        self.waits += 1
        self.outages_seen.append(self.paused("outage"))
        assert self.later, "nothing would ever open the gate"
        for name, value in self.later.pop(0).items():
            setattr(self, name, value)

    def paused(self, reason: str) -> float:
        return self.metrics.value("fracture_sweep_ingest_paused", {"reason": reason})


@given(st.integers(0, 5000), st.integers(1, 3000))
def test_a_gate_that_cases_closed_opens_only_below_the_limit(cases: int, limit: int) -> None:
    if too_many(cases, limit=limit, closed=False):
        assert cases >= limit
        assert too_many(cases, limit=limit, closed=True)
    assert not too_many(0, limit=limit, closed=True)


@given(st.integers(0, 10**12), st.integers(1, 10**12))
def test_a_gate_that_want_of_room_closed_opens_only_above_the_watermark(free: int, watermark: int) -> None:
    if too_little(free, watermark=watermark, closed=False):
        assert free < watermark
        assert too_little(free, watermark=watermark, closed=True)
    assert not too_little(2 * watermark, watermark=watermark, closed=True)


def test_no_limit_no_watermark_and_unknown_room_close_nothing() -> None:
    assert not too_many(10**9, limit=0, closed=True)
    assert not too_little(0, watermark=0, closed=True)
    assert not too_little(None, watermark=1, closed=True)


def test_while_there_is_room_nothing_waits() -> None:
    world = World(max_cases_under_way=3)
    world.cases = 2

    world.gate.admit()

    assert world.waits == 0
    assert world.metrics.value("fracture_sweep_cases_under_way") == 2
    assert world.metrics.value("fracture_sweep_store_free_bytes") == 100 * GIB
    assert world.paused("cases") == world.paused("space") == world.paused("outage") == 0


def test_too_many_cases_are_waited_for_and_said_once_each_way(caplog: pytest.LogCaptureFixture) -> None:
    world = World(max_cases_under_way=10)
    world.cases = 12
    world.later = [{"cases": 11}, {"cases": 10}, {"cases": 9}]

    with caplog.at_level(logging.INFO):
        world.gate.admit()
        world.gate.admit()

    assert world.waits == 3
    assert [record.getMessage() for record in caplog.records] == [
        "ingest takes no new series for now: 12 cases are under way, the limit is 10 (pressure.max_cases_under_way)",
        "ingest goes on",
    ]
    assert world.paused("cases") == 0


def test_a_store_short_of_room_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    world = World(min_free_gib=2)
    world.free = GIB
    world.later = [{}, {"free": 2 * GIB}, {"free": 3 * GIB}]

    with caplog.at_level(logging.WARNING):
        world.gate.admit()

    assert world.waits == 3
    assert "1.00 GiB left, the watermark is 2 GiB (pressure.min_free_gib)" in caplog.text
    assert "ingest goes on" in caplog.text


@pytest.mark.parametrize("error", [BrokerUnavailable("no broker"), StoreUnavailable("no store")])
def test_what_does_not_answer_keeps_the_gate_closed_until_it_does(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    world.error = error
    world.later = [{}, {"error": None}]

    world.gate.admit()

    assert world.outages_seen == [1, 1]
    assert world.paused("outage") == 0
    assert str(error) in caplog.text


def test_stop_ends_the_waiting() -> None:
    world = World(max_cases_under_way=1)
    world.cases = 1
    world.later = [{}]
    world.stop.set()

    with pytest.raises(Stopped):
        world.gate.admit()


def test_an_answer_about_room_holds_for_a_while() -> None:
    world = World(poll_seconds=5)

    for world.now in (0.0, 1.0, 4.9, 5.0, 6.0):
        world.gate.admit()

    assert world.asked_for_room == 2


def test_without_limits_neither_broker_nor_store_is_asked() -> None:
    world = World(max_cases_under_way=0, min_free_gib=0)
    world.error = BrokerUnavailable("no broker")

    world.gate.admit()

    assert world.asked_for_room == 0
    assert math.isnan(world.metrics.value("fracture_sweep_store_free_bytes"))


class FullFor(FolderStore):
    """A store whose next so many writes find no room."""

    def __init__(self, root: Path, failures: int) -> None:
        super().__init__(root)
        self.failures = failures

    def put(self, key: str, data: bytes) -> bool:
        if self.failures:
            self.failures -= 1
            raise StoreFull("no room")
        return super().put(key, data)


def test_a_write_waits_until_a_full_store_has_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    inner = FullFor(tmp_path / "store", failures=3)
    world.later = [{}, {}, {}]
    store = PatientStore(inner, world.gate)

    with caplog.at_level(logging.INFO):
        written = store.put("a", b"one")

    assert written is True
    assert store.put("a", b"two") is False
    assert store.get("a") == b"one"
    assert world.waits == 3
    assert [record.getMessage() for record in caplog.records] == [
        "ingest takes no new series for now: the store has no room left: make some, or give it more",
        "ingest goes on",
    ]


def test_stop_ends_a_write_that_waits_for_room(tmp_path: Path) -> None:
    world = World()
    world.later = [{}]
    world.stop.set()
    inner = FullFor(tmp_path / "store", failures=1)

    with pytest.raises(Stopped):
        PatientStore(inner, world.gate).put("a", b"one")

    assert list(inner.keys("")) == []


def test_back_pressure_is_no_part_of_what_a_series_is() -> None:
    assert not set(PressureSettings.model_fields) & set(IngestSettings.model_fields)
