"""What the commands write with: consoles, progress bars, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

EXIT_UNUSABLE = 2
EXIT_LOOK = 1
EXIT_STOPPED = 130

out_console = Console(soft_wrap=True)
err_console = Console(stderr=True, soft_wrap=True)


def plain(text: str) -> str:
    """A text that may come from anywhere, without what would steer a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


class Bars:
    """Progress on a terminal: studies read, and cases that have an end."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._studies = progress.add_task("studies read", total=None)
        self._cases = progress.add_task("cases done", total=None)

    def studies(self, done: int, total: int) -> None:
        """So many studies of so many were read."""
        self._progress.update(self._studies, completed=done, total=total)

    def cases(self, done: int, found: int) -> None:
        """So many cases have an end, of so many found until now."""
        self._progress.update(self._cases, completed=done, total=found or None)


@contextmanager
def bars(*, of_bytes: bool = False, time_left: bool = False) -> Iterator[Progress]:
    """Progress bars on standard error (nothing where it is no terminal)."""
    measures: tuple[ProgressColumn, ...] = (
        (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
        if of_bytes
        else (MofNCompleteColumn(), TimeElapsedColumn(), *((TimeRemainingColumn(),) if time_left else ()))
    )
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<14}"),
        BarColumn(),
        *measures,
        console=err_console,
        transient=True,
        disable=not err_console.is_terminal,
    ) as progress:
        yield progress


def log_at(level: str) -> None:
    """Log to standard error from this level on, readable where that is a terminal.

    The services' INFO is too much beside what a command prints itself: it is taken as WARNING.
    """
    from shared.pipeline.logs import configure

    configure(
        level="WARNING" if level == "INFO" else level,
        stream=sys.stderr,
        service="fracture-sweep",
        pretty=sys.stderr.isatty(),
    )
