"""The report-generator's two queues: facts that may complete a study, and facts that change a sweep's worklist.

A fact is only a call to look: what a report says is read from the store each time, so a fact told twice, late or out
of order does no harm. ReportWritten is told again when the report is there already, because its first teller may have
died before the broker confirmed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock
from typing import Final

from pydantic import BaseModel

from services.report_generator.reports import write_report
from services.report_generator.settings import ReportGeneratorSettings
from services.report_generator.study_report import ScoringBundle
from services.report_generator.worklists import is_closed, rebuild
from shared.fracture import keys
from shared.fracture.ids import short
from shared.fracture.messages import (
    FACTS,
    CaseDeadLettered,
    CaseNotEvaluated,
    CaseRejected,
    FractureClassified,
    OfStudy,
    ReportWritten,
    SeriesDeadLettered,
    SeriesRejected,
    StudyRejected,
    SweepClosed,
    SweepPlanned,
)
from shared.fracture.protocol import Protocols
from shared.fracture.topology import REPORT_GENERATOR, SERVICES
from shared.pipeline.errors import Retry
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.records.ledger import study_state, sweep_plan
from shared.records.outcomes import rejecting

REBUILD_SHARE: Final = 5.0
"""A worklist that took t seconds is not rebuilt for t times this, so that a big sweep does not starve the reports."""


def build(
    *,
    store: Store,
    bundle: ScoringBundle,
    settings: ReportGeneratorSettings | None = None,
    monotonic: Callable[[], float] = time.monotonic,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Service:
    """The service, over a store and the bundle whose results it reports."""
    chosen = settings or ReportGeneratorSettings()
    studies = _Studies(store=store, bundle=bundle, named=chosen.named_reports)
    worklists = _Worklists(
        store=store,
        bundle=bundle,
        named=chosen.named_reports,
        every_seconds=chosen.worklist_every_seconds,
        monotonic=monotonic,
        now=now,
    )
    return Service(
        name=REPORT_GENERATOR,
        queues=SERVICES[REPORT_GENERATOR],
        messages=FACTS,
        handlers={
            **dict.fromkeys(
                (
                    StudyRejected,
                    SeriesRejected,
                    SeriesDeadLettered,
                    CaseNotEvaluated,
                    CaseRejected,
                    CaseDeadLettered,
                    FractureClassified,
                ),
                studies.look,
            ),
            SweepPlanned: worklists.sweep_changed,
            SweepClosed: worklists.sweep_changed,
            ReportWritten: worklists.report_written,
        },
        rejected=rejecting(store, REPORT_GENERATOR),
        slots=chosen.slots,
        sees_identifiers=chosen.named_reports,
    )


def _check_bundle(protocols: Protocols, bundle: ScoringBundle) -> None:
    if protocols.bundle_id != bundle.manifest.bundle_id:
        raise Retry(
            f"these results are of bundle {short(protocols.bundle_id or 'none')}, this report-generator has bundle "
            f"{short(bundle.manifest.bundle_id)}; start one with the other bundle, or replay the message later"
        )


@dataclass(frozen=True, kw_only=True)
class _Studies:
    store: Store
    bundle: ScoringBundle
    named: bool

    def look(self, fact: BaseModel) -> Iterator[BaseModel]:
        if not isinstance(fact, OfStudy):
            raise TypeError(f"{type(fact).__name__} is about no study")
        if fact.protocols.bundle_id is None:
            return
        _check_bundle(fact.protocols, self.bundle)
        state = study_state(self.store, fact.study_id, fact.protocols.scope)
        if state is None or not state.complete:
            return
        write_report(self.store, state, bundle=self.bundle, named=self.named)
        yield ReportWritten(study_id=fact.study_id, protocols=fact.protocols, report_id=state.report_id)


@dataclass(kw_only=True)
class _Worklists:
    store: Store
    bundle: ScoringBundle
    named: bool
    every_seconds: float
    monotonic: Callable[[], float]
    now: Callable[[], datetime]
    not_before: dict[str, float] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def sweep_changed(self, fact: BaseModel) -> Iterable[BaseModel]:
        if not isinstance(fact, SweepPlanned | SweepClosed):
            raise TypeError(f"{type(fact).__name__} is about no sweep")
        plan = sweep_plan(self.store, fact.sweep_id)
        if plan is not None and plan.protocols.bundle_id is not None:
            _check_bundle(plan.protocols, self.bundle)
            self._rebuild(fact.sweep_id)
        return ()

    def report_written(self, fact: BaseModel) -> Iterable[BaseModel]:
        if not isinstance(fact, ReportWritten):
            raise TypeError(f"{type(fact).__name__} tells of no report")
        prefix = keys.sweeps_of_study(fact.study_id)
        for sweep_id in [key.removeprefix(prefix) for key in self.store.keys(prefix)]:
            if not is_closed(self.store, sweep_id) and not self._due(sweep_id):
                continue
            plan = sweep_plan(self.store, sweep_id)
            if plan is not None and plan.protocols.bundle_id == fact.protocols.bundle_id:
                _check_bundle(plan.protocols, self.bundle)
                self._rebuild(sweep_id)
        return ()

    def _due(self, sweep_id: str) -> bool:
        with self.lock:
            return self.monotonic() >= self.not_before.get(sweep_id, float("-inf"))

    def _rebuild(self, sweep_id: str) -> None:
        plan = sweep_plan(self.store, sweep_id)
        if plan is None:
            return
        begun = self.monotonic()
        rebuild(self.store, plan, bundle=self.bundle, named=self.named, clock=self.now)
        ended = self.monotonic()
        with self.lock:
            self.not_before[sweep_id] = begun + max(self.every_seconds, REBUILD_SHARE * (ended - begun))
