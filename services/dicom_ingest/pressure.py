"""Back-pressure: ingest waits while too many cases are under way or the store is short of room, then goes on by itself.

Asked before each series. Three things close the gate: so many cases under way, free space under the watermark, and a
broker or store that does not answer (what cannot be judged is not taken for room). It opens a little below the limit
that closed it, so that it does not flap at every case. Nothing is lost by waiting: what is not taken yet lies where it
came from.

A store that is really full in the middle of an intake is waited for too (`PatientStore`), at the write that failed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Literal

from services.dicom_ingest.settings import GIB, PressureSettings
from shared.fracture.under_way import COUNTED, cases_under_way
from shared.pipeline.broker import Depth
from shared.pipeline.errors import FractureSweepError, StoreFull
from shared.pipeline.metrics import Metrics
from shared.pipeline.store import Entry, Store

LOG = logging.getLogger("fracture_sweep.ingest")

Reason = Literal["cases", "space", "outage"]
REASONS: Final[tuple[Reason, ...]] = ("cases", "space", "outage")

REOPEN_CASES: Final = 0.9
"""Share of the limit of cases at which a gate that they closed opens again."""
REOPEN_SPACE: Final = 1.1
"""Multiple of the watermark from which on a gate that it closed opens again."""
_LONGEST_WAIT_FOR_ROOM: Final = 60.0


class Stopped(Exception):
    """Ingest was told to stop while it waited."""


def too_many(cases: int, *, limit: int, closed: bool) -> bool:
    """Whether so many cases close the gate, or keep it closed. A limit of 0 is none."""
    if limit == 0:
        return False
    return cases > limit * REOPEN_CASES if closed else cases >= limit


def too_little(free_bytes: int | None, *, watermark: int, closed: bool) -> bool:
    """Whether so little room closes the gate, or keeps it closed. A watermark of 0 is none; unknown room is enough."""
    if watermark == 0 or free_bytes is None:
        return False
    return free_bytes < watermark * (REOPEN_SPACE if closed else 1.0)


class Gate:
    """Lets one series after another pass while there is room for it. `depths` asks the broker, `free_bytes` the store.

    Of one thread; `stop` ends its waiting.
    """

    def __init__(
        self,
        *,
        settings: PressureSettings,
        depths: Callable[[Sequence[str]], Mapping[str, Depth]],
        free_bytes: Callable[[], int | None],
        metrics: Metrics,
        stop: threading.Event,
        while_waiting: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._depths = depths
        self._free_bytes = free_bytes
        self._stop = stop
        self._while_waiting = while_waiting
        self._clock = clock
        self._closed: frozenset[Reason] = frozenset()
        self._free: int | None = None
        self._asked_at: float | None = None
        self._paused = metrics.gauge(
            "fracture_sweep_ingest_paused", "1 while ingest takes no new series, by reason.", ("reason",)
        )
        self._cases_gauge = metrics.gauge(
            "fracture_sweep_cases_under_way", "Cases under way as ingest counted them last, from the queues' depths."
        )
        self._free_gauge = metrics.gauge(
            "fracture_sweep_store_free_bytes", "Free space of the store as ingest asked last (NaN: not known)."
        )
        self._free_gauge.set(float("nan"))
        for reason in REASONS:
            self._paused.labels(reason=reason).set(0)

    def admit(self) -> None:
        """Return when one more series may be taken; Stopped where `stop` is set while it waits."""
        while self._judged():
            self._wait(self._settings.poll_seconds)

    def wait_for_room(self, failures: int) -> None:
        """Wait before a write that failed so often for want of room is tried again; Stopped as above."""
        if failures == 1:
            self._become(self._closed | {"space"}, {"space": "the store has no room left: make some, or give it more"})
        self._wait(min(self._settings.poll_seconds * 2.0 ** min(failures - 1, 10), _LONGEST_WAIT_FOR_ROOM))

    def has_room(self) -> None:
        """A write that waited for room went through."""
        self._become(self._closed - {"space"}, {})

    def _wait(self, seconds: float) -> None:
        self._while_waiting()
        if self._stop.wait(seconds):
            raise Stopped

    def _judged(self) -> frozenset[Reason]:
        said: dict[Reason, str] = {}
        try:
            cases, free = self._cases(), self._room()
        except FractureSweepError as error:  # its text is about the server
            self._become(self._closed | {"outage"}, {"outage": f"waiting for broker or store: {error}"})
            return self._closed
        limit, watermark = self._settings.max_cases_under_way, self._settings.min_free_bytes
        if too_many(cases, limit=limit, closed="cases" in self._closed):
            said["cases"] = f"{cases} cases are under way, the limit is {limit} (pressure.max_cases_under_way)"
        if too_little(free, watermark=watermark, closed="space" in self._closed):
            said["space"] = (
                f"the store has {(free or 0) / GIB:.2f} GiB left, the watermark is {watermark / GIB:g} GiB "
                "(pressure.min_free_gib): make room, or set it lower"
            )
        self._become(frozenset(said), said)
        return self._closed

    def _cases(self) -> int:
        if self._settings.max_cases_under_way == 0:
            return 0
        depths = self._depths(COUNTED)
        cases = cases_under_way({queue: depth.ready + depth.unacknowledged for queue, depth in depths.items()})
        self._cases_gauge.set(cases)
        return cases

    def _room(self) -> int | None:
        if self._settings.min_free_bytes == 0:
            return None
        now = self._clock()
        if self._asked_at is None or self._closed or now - self._asked_at >= self._settings.poll_seconds:
            self._free = self._free_bytes()
            self._asked_at = now
            self._free_gauge.set(float("nan") if self._free is None else self._free)
        return self._free

    def _become(self, closed: frozenset[Reason], said: Mapping[Reason, str]) -> None:
        """Log what changes, once: a crowded queue is everyday, want of room or an outage is not."""
        before, self._closed = self._closed, closed
        for reason in REASONS:
            self._paused.labels(reason=reason).set(reason in closed)
            if reason in closed and reason not in before:
                LOG.log(
                    logging.INFO if reason == "cases" else logging.WARNING,
                    "ingest takes no new series for now: %s",
                    said[reason],
                    extra={"fields": {"paused": reason}},
                )
        if before and not closed:
            LOG.log(
                logging.INFO if before == {"cases"} else logging.WARNING,
                "ingest goes on",
                extra={"fields": {"was_paused": ", ".join(sorted(before))}},
            )


class PatientStore:
    """A store whose writes wait for room where there is none, instead of failing (of one thread, as its gate)."""

    def __init__(self, inner: Store, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate

    def put(self, key: str, data: bytes) -> bool:
        """As the inner store, however long it takes to have room; Stopped where ingest is told to stop meanwhile."""
        failures = 0
        while True:
            try:
                written = self._inner.put(key, data)
            except StoreFull:
                failures += 1
                self._gate.wait_for_room(failures)
                continue
            if failures:
                self._gate.has_room()
            return written

    def get(self, key: str) -> bytes:
        """As the inner store."""
        return self._inner.get(key)

    def exists(self, key: str) -> bool:
        """As the inner store."""
        return self._inner.exists(key)

    def keys(self, prefix: str) -> Iterator[str]:
        """As the inner store."""
        return self._inner.keys(prefix)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """As the inner store."""
        return self._inner.entries(prefix)

    def delete(self, key: str) -> None:
        """As the inner store."""
        self._inner.delete(key)

    def free_bytes(self) -> int | None:
        """As the inner store."""
        return self._inner.free_bytes()

    def check(self) -> None:
        """As the inner store."""
        self._inner.check()
