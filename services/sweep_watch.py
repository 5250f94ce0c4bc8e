"""Following a sweep while it goes: bars on a terminal, else one plain line a change. Reading only; it can be left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shared.fracture.ids import short
from shared.fracture.ledger import Ledger, Tally
from shared.pipeline.errors import StoreUnavailable

EVERY_SECONDS: Final = 2.0
PACE_SECONDS: Final = 600.0
"""The rate is that of the last so many seconds."""
NOT_YET: Final = "waiting for the sweep to be read"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast cases end. None: not known yet."""

    cases_per_minute: float | None = None
    seconds_left: float | None = None
    """For the cases that are found until now."""


class PaceMeter:
    """Measures the pace from what is seen."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, ledger: Ledger, *, at: float) -> Pace:
        """The pace after so many cases have an end at this time (seconds)."""
        pending = ledger.cases.by_state.get("pending", 0)
        self._seen.append((at, ended(ledger.cases)))
        while len(self._seen) > 2 and self._seen[0][0] < at - PACE_SECONDS:
            self._seen.popleft()
        (began, before), (now, after) = self._seen[0], self._seen[-1]
        if now <= began or after <= before:
            return Pace()
        rate = (after - before) / (now - began)
        return Pace(cases_per_minute=60 * rate, seconds_left=pending / rate)


def ended(tally: Tally) -> int:
    """How many of a ledger's lines have an end."""
    return tally.found - tally.by_state.get("pending", 0)


def dead_letters(ledger: Ledger) -> int:
    """How many series and cases went to the dead letters."""
    return ledger.series.by_state.get("dead-lettered", 0) + ledger.cases.by_state.get("dead-lettered", 0)


def states(tally: Tally) -> str:
    """The states of a ledger that are not empty, in words."""
    return ", ".join(f"{count} {state}" for state, count in tally.by_state.items() if count)


def counts(ledger: Ledger) -> str:
    """A ledger in one line."""
    files = f"files {ledger.files.found}" if ledger.files.found else "files are being read"
    parts = [f"sweep {short(ledger.sweep_id)}: {files}"]
    for name, tally in (("series", ledger.series), ("cases", ledger.cases)):
        said = states(tally)
        parts.append(f"{name} {ended(tally)}/{tally.found}" + (f" ({said})" if said else ""))
    parts.append(f"reports {ledger.reports}/{ledger.studies}")
    parts.append(f"dead letters {dead_letters(ledger)}")
    return " · ".join(parts)


def pace_in_words(pace: Pace) -> str:
    """The pace in words, '' where it is not known."""
    if pace.cases_per_minute is None or pace.seconds_left is None:
        return ""
    left = f", about {duration(pace.seconds_left)} left" if pace.seconds_left > 0 else ""
    return f"{pace.cases_per_minute:.1f} cases a minute{left}"


def duration(seconds: float) -> str:
    """A length of time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Shown(Protocol):
    """Where a watch is shown."""

    def ledger(self, ledger: Ledger, pace: Pace) -> None:
        """How the sweep stands now."""

    def note(self, text: str) -> None:
        """Why there is nothing new."""


class Lines:
    """Plain lines: one whenever something changed."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._last = ""

    def ledger(self, ledger: Ledger, pace: Pace) -> None:
        """A line where the counts changed (the pace alone makes none)."""
        said = counts(ledger)
        words = pace_in_words(pace)
        self._line(said, said + (f" · {words}" if words else ""))

    def note(self, text: str) -> None:
        """A line, once."""
        self._line(text, text)

    def _line(self, said: str, line: str) -> None:
        if said != self._last:
            self._last = said
            self._write(line)


class Bars:
    """Bars for files, series and cases on a terminal, drawn in place."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._body: list[Table | Text] = []

    def ledger(self, ledger: Ledger, pace: Pace) -> None:
        """Draw it."""
        table = Table.grid(padding=(0, 1))
        files = ledger.files.found
        rows = (
            ("files", files, files, "" if files else "being read"),
            ("series", ended(ledger.series), ledger.series.found, states(ledger.series)),
            ("cases", ended(ledger.cases), ledger.cases.found, states(ledger.cases)),
            ("reports", ledger.reports, ledger.studies, ""),
        )
        for name, done, found, said in rows:
            bar = ProgressBar(total=found or None, completed=done, width=30, pulse=not found)
            table.add_row(name, bar, f"{done}/{found}", said)
        tail = [pace_in_words(pace), f"dead letters {dead_letters(ledger)}"]
        self._body = [Text(f"sweep {short(ledger.sweep_id)}"), table, Text(" · ".join(one for one in tail if one))]
        self._live.update(Group(*self._body), refresh=True)

    def note(self, text: str) -> None:
        """Draw it below what was seen last."""
        self._live.update(Group(*self._body, Text(text)), refresh=True)


def watch(
    look: Callable[[], Ledger | None],
    *,
    finished: Callable[[Ledger], bool],
    shown: Shown,
    every_seconds: float = EVERY_SECONDS,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Ledger:
    """Show the ledger that `look` reads (None: no sweep yet) until it is finished; outages of the store are waited for.

    A look at a large sweep takes its time: then the next one comes later, so that the store has other work to do.
    """
    meter = PaceMeter()
    while True:
        began = clock()
        try:
            ledger = look()
            if ledger is None:
                shown.note(NOT_YET)
            else:
                shown.ledger(ledger, meter.see(ledger, at=clock()))
                if finished(ledger):
                    return ledger
        except StoreUnavailable as error:
            shown.note(f"waiting for the store: {error}")
        sleep(max(every_seconds, 2 * (clock() - began)))
