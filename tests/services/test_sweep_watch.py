from __future__ import annotations

from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.live import Live

from services.sweep_watch import NOT_YET, Bars, Lines, Pace, PaceMeter, counts, duration, pace_in_words, watch
from shared.fracture.ledger import CASE_STATES, SERIES_STATES, Ledger, tally
from shared.fracture.records import FileCounts
from shared.pipeline.errors import StoreUnavailable


def ledger(*, done: int, pending: int, dead: int = 0, files: int = 12) -> Ledger:
    cases = [("reported", ())] * done + [("pending", ())] * pending + [("dead-lettered", ("bug",))] * dead
    return Ledger(
        sweep_id="ab" * 32,
        files=FileCounts(found=files, in_series=files, ignored={}),
        series=tally([("planned", ())] * 2, SERIES_STATES),
        cases=tally(cases, CASE_STATES),
        studies=2,
        reports=1 if pending else 2,
    )


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def followed(looks: list[Ledger | Exception | None], clock: Clock) -> tuple[Ledger, list[str]]:
    """What a watch returns and the lines that it writes, when it sees this."""
    coming: Iterator[Ledger | Exception | None] = iter(looks)
    lines: list[str] = []

    def look() -> Ledger | None:
        seen = next(coming)
        if isinstance(seen, Exception):
            raise seen
        return seen

    last = watch(
        look,
        finished=lambda now: not now.pending and now.files.found > 0,
        shown=Lines(lines.append),
        every_seconds=60,
        sleep=clock.sleep,
        clock=clock,
    )
    return last, lines


def test_a_line_says_all_three_ledgers_reports_and_dead_letters() -> None:
    said = counts(ledger(done=3, pending=4, dead=1))

    assert said == (
        "sweep abababababab: files 12 · series 2/2 (2 planned) · "
        "cases 4/8 (3 reported, 1 dead-lettered, 4 pending) · reports 1/2 · dead letters 1"
    )
    assert "files are being read" in counts(ledger(done=0, pending=1, files=0))


def test_a_watch_writes_one_line_a_change_and_ends_when_nothing_is_pending() -> None:
    looks = [None, None, ledger(done=1, pending=3), ledger(done=1, pending=3), ledger(done=2, pending=2)]

    last, lines = followed([*looks, ledger(done=4, pending=0)], Clock())

    assert last.pending == 0
    assert lines[0] == NOT_YET
    assert [line.split(" · ")[2] for line in lines[1:]] == [
        "cases 1/4 (1 reported, 3 pending)",
        "cases 2/4 (2 reported, 2 pending)",
        "cases 4/4 (4 reported)",
    ]
    assert lines[2].endswith("0.5 cases a minute, about 4 min left")


def test_a_sweep_whose_files_are_still_read_is_not_finished() -> None:
    last, _ = followed([ledger(done=2, pending=0, files=0), ledger(done=2, pending=0)], Clock())

    assert last.files.found == 12


def test_an_outage_of_the_store_is_waited_for_and_said_once() -> None:
    away = StoreUnavailable("the S3 server cannot be reached")

    _, lines = followed([ledger(done=1, pending=1), away, away, ledger(done=2, pending=0)], Clock())

    assert lines[1] == "waiting for the store: the S3 server cannot be reached"
    assert len(lines) == 3


def test_a_slow_look_is_followed_by_a_longer_pause() -> None:
    clock = Clock()

    def look() -> Ledger:
        clock.now += 100
        return ledger(done=1, pending=0 if clock.slept else 1)

    watch(
        look,
        finished=lambda now: not now.pending,
        shown=Lines(lambda line: None),
        every_seconds=2,
        sleep=clock.sleep,
        clock=clock,
    )

    assert clock.slept == [200]


def test_the_pace_is_that_of_the_last_minutes() -> None:
    meter = PaceMeter()
    assert meter.see(ledger(done=0, pending=1000), at=0) == Pace()
    assert meter.see(ledger(done=0, pending=1000), at=60) == Pace()

    fast = meter.see(ledger(done=100, pending=900), at=120)
    for minute in range(3, 20):
        slow = meter.see(ledger(done=100 + minute, pending=900 - minute), at=60 * minute)

    assert fast.cases_per_minute == pytest.approx(50)
    assert slow.cases_per_minute == pytest.approx(1)
    assert slow.seconds_left == pytest.approx(60 * 881)
    assert pace_in_words(Pace()) == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (7200, "2.0 h")]
)
def test_a_length_of_time_is_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_bars_show_counts_states_pace_and_what_is_waited_for() -> None:
    console = Console(record=True, width=120, force_terminal=True)
    with Live(console=console, auto_refresh=False) as live:
        bars = Bars(live)
        bars.ledger(ledger(done=3, pending=4, dead=1), Pace(cases_per_minute=2, seconds_left=120))
        bars.note("waiting for the store")

    text = console.export_text()
    assert "4/8" in text
    assert "3 reported, 1 dead-lettered, 4 pending" in text
    assert "2.0 cases a minute, about 2 min left · dead letters 1" in text
    assert "waiting for the store" in text
