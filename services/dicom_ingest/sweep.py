"""Runs one sweep over one source: stores and plans study by study, tells of each, and keeps the ledger of files.

A sweep is a list of references to series in the store; it is written while it grows, so that a run that is stopped
half-way shows what it had reached, and the next run goes on from there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal, Protocol

from services.dicom_ingest.collected import CollectedSeries, PatientIdentity
from services.dicom_ingest.intake import Intake, Tell
from services.dicom_ingest.pressure import Stopped
from shared.fracture import keys
from shared.fracture.ids import digest
from shared.fracture.messages import SeriesStored, SweepClosed, SweepPlanned
from shared.fracture.protocol import Protocols
from shared.fracture.records import (
    FileCounts,
    FileLine,
    FilesLedger,
    Record,
    SweepClosing,
    SweepPlan,
    SweepSeries,
)
from shared.pipeline.store import Store
from shared.records.archive import newest, write_record, write_revision
from shared.records.ledger import sweep_ledger, sweep_plan

WRITE_EVERY_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class CollectedFile:
    """One file of a source: part of a series, or ignored with a reason."""

    path: str
    role: Literal["image", "mask", "ignored"]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CollectedStudy:
    """One study of a source; its series are read only while they are iterated, one in memory at a time."""

    identity: PatientIdentity
    series: Iterable[CollectedSeries]


class Source(Protocol):
    """Where studies come from."""

    @property
    def total(self) -> int:
        """How many studies it holds."""

    def studies(self) -> Iterator[CollectedStudy]:
        """The studies, in an order of the source's own."""

    def files(self) -> tuple[CollectedFile, ...]:
        """Every file and what became of it; complete after the studies were iterated."""


class NoSource:
    """A submission that cannot be read at all: its files stand in the ledger, each ignored with the reason."""

    total = 0

    def __init__(self, paths: Iterable[str], reason: str) -> None:
        self._files = tuple(CollectedFile(path=path, role="ignored", reason=reason) for path in paths)

    def studies(self) -> Iterator[CollectedStudy]:
        """None."""
        return iter(())

    def files(self) -> tuple[CollectedFile, ...]:
        """All that was submitted."""
        return self._files


class SweepName(Record):
    """Restricted: a sweep's name as its owner gave it."""

    sweep_id: str
    name: str


def file_counts(files: Iterable[CollectedFile]) -> FileCounts:
    """The ledger of files in numbers."""
    ignored: Counter[str] = Counter()
    found = used = 0
    for file in files:
        found += 1
        if file.role == "ignored":
            ignored[file.reason] += 1
        else:
            used += 1
    return FileCounts(found=found, in_series=used, ignored=dict(sorted(ignored.items())))


def run_sweep(
    source: Source,
    *,
    name: str,
    sweep_id: str,
    intake: Intake,
    store: Store,
    protocols: Protocols,
    tell: Tell,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stopped: Callable[[], bool] = lambda: False,
    admit: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> SweepPlan:
    """Store, plan and tell everything of a source. Safe to run again: what is there is told again, not made again.

    `admit` is asked before a series is read and before it is told; it returns when there is room for one more, and
    raises Stopped when the sweep is to end instead.
    """
    write_record(store, keys.sweep_identity(sweep_id), SweepName(sweep_id=sweep_id, name=name))
    last = sweep_plan(store, sweep_id)
    if last is not None and last.protocols != protocols:
        # opens the sweep again before its first fact is told, so that retention leaves its studies alone
        _write_plan(store, sweep_id, protocols, (), FileCounts(), growing=True)
    references: dict[tuple[str, str], SweepSeries] = {}
    series_of_file: dict[str, str] = {}
    unjoined: dict[str, str] = {}
    written_at = clock()
    interrupted = False
    try:
        for done, study in enumerate(source.studies(), start=1):
            if stopped():
                break
            paths: list[tuple[str, ...]] = []
            if study.identity.study_instance_uid:
                # before its objects: a study that a sweep holds is not collected while it is being stored
                store.put(keys.sweep_of_study(intake.study_id(study.identity), sweep_id), b"")
            stored = intake.store_study(study.identity, _noting_files(_admitted(study.series, admit), paths))
            store.put(keys.sweep_of_study(stored.study_id, sweep_id), b"")
            for line, files_of_series in zip(stored.series, paths, strict=True):
                series_of_file.update(dict.fromkeys(files_of_series, line.series_id))
                if line.series_id in stored.unjoined:
                    unjoined.update(dict.fromkeys(files_of_series, stored.unjoined[line.series_id]))
                references[(stored.study_id, line.series_id)] = SweepSeries(
                    study_id=stored.study_id, series_id=line.series_id, manifest_id=line.manifest_id
                )
            for fact in stored.facts:
                if isinstance(fact, SeriesStored):
                    admit()
                tell(fact)
            if clock() - written_at > WRITE_EVERY_SECONDS:
                _write_plan(store, sweep_id, protocols, references.values(), FileCounts(), growing=True)
                written_at = clock()
            progress(done, source.total)
    except Stopped:  # also in the middle of a study, which then has no plan yet: the next reader makes it
        interrupted = True
    if interrupted or stopped():
        return _write_plan(store, sweep_id, protocols, references.values(), FileCounts(), growing=True)
    files = tuple(
        replace(file, role="ignored", reason=unjoined[file.path]) if file.path in unjoined else file
        for file in source.files()
    )
    plan = _write_plan(store, sweep_id, protocols, references.values(), file_counts(files), growing=False)
    _write_files(store, sweep_id, files, series_of_file)
    tell(SweepPlanned(sweep_id=sweep_id))
    return plan


def _write_plan(
    store: Store,
    sweep_id: str,
    protocols: Protocols,
    references: Iterable[SweepSeries],
    files: FileCounts,
    *,
    growing: bool,
) -> SweepPlan:
    """The next revision of the plan; while it grows, what an earlier run planned stays in it."""
    now = {(s.study_id, s.series_id): s for s in references}

    def make(number: int, last: SweepPlan | None) -> SweepPlan | None:
        merged = {(s.study_id, s.series_id): s for s in last.series} if last is not None and growing else {}
        merged.update(now)
        series = tuple(merged[key] for key in sorted(merged))
        counts = last.files if growing and last is not None else files
        if last is not None and (last.series, last.files, last.protocols) == (series, counts, protocols):
            return None
        return SweepPlan(
            sweep_id=sweep_id,
            revision=number,
            supersedes=None if last is None else last.revision,
            protocols=protocols,
            series=series,
            files=counts,
            planned_at=datetime.now(UTC),
        )

    return write_revision(store, keys.sweep_plans(sweep_id), SweepPlan, make)[0]


def _admitted(series: Iterable[CollectedSeries], admit: Callable[[], None]) -> Iterator[CollectedSeries]:
    """The series, each read only once it is admitted."""
    waiting = iter(series)
    while True:
        admit()
        try:
            one = next(waiting)
        except StopIteration:
            return
        yield one


def _noting_files(series: Iterable[CollectedSeries], paths: list[tuple[str, ...]]) -> Iterator[CollectedSeries]:
    for one in series:
        paths.append(one.files)
        yield one


def _write_files(
    store: Store, sweep_id: str, files: tuple[CollectedFile, ...], series_of_file: Mapping[str, str]
) -> None:
    record = FilesLedger(
        sweep_id=sweep_id,
        files=tuple(
            FileLine(path=file.path, role=file.role, reason=file.reason, series_id=series_of_file.get(file.path))
            for file in files
        ),
    )
    prefix = keys.sweep_files(sweep_id)
    last = newest(store, prefix, FilesLedger)
    if last is None or digest(last.model_dump(mode="json")) != digest(record.model_dump(mode="json")):
        number = 1 + sum(1 for _ in store.keys(prefix))
        while not write_record(store, keys.revision(prefix, number), record):
            number += 1


def close_sweep(store: Store, sweep_id: str, *, tell: Tell) -> SweepClosing | None:
    """Close a sweep when nothing of it is pending; returns the closing, or None while something is.

    A sweep that was planned again after it was closed is closed again. It stays open until its closing was told.
    """
    plan = sweep_plan(store, sweep_id)
    ledger = sweep_ledger(store, sweep_id)
    if plan is None or ledger is None or ledger.pending:
        return None

    def make(number: int, last: SweepClosing | None) -> SweepClosing | None:
        if last is not None and last.closed_at > plan.planned_at:
            return None
        return SweepClosing(
            sweep_id=sweep_id,
            revision=number,
            supersedes=None if last is None else last.revision,
            closed_at=datetime.now(UTC),
            pending=ledger.pending,
        )

    closing, _ = write_revision(store, keys.sweep_closed(sweep_id), SweepClosing, make)
    tell(SweepClosed(sweep_id=sweep_id))
    store.put(keys.sweep_closing_told(sweep_id, closing.revision), b"")
    return closing
