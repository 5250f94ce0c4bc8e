"""Rebuilding the worklist of a sweep in the store: a new numbered revision, and only when something changed.

The JSON of a revision is put first, under a condition, so that of two writers one has the number; page and CSV follow
from that JSON alone and are put by whoever comes next if their writer died.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from datetime import datetime

from services.report_generator.page import PatientShown, worklist_page
from services.report_generator.reports import read_patient
from services.report_generator.study_report import ScoringBundle
from services.report_generator.worklist import Worklist, build, to_csv
from shared.fracture import keys
from shared.fracture.records import CaseRecord, SweepPlan
from shared.fracture.research_use import RESEARCH_USE
from shared.pipeline.store import Store
from shared.records.archive import find_record, newest, write_revision
from shared.records.ledger import sweep_states


def rebuild(
    store: Store, plan: SweepPlan, *, bundle: ScoringBundle, named: bool, clock: Callable[[], datetime]
) -> tuple[Worklist, bool]:
    """The worklist of a sweep as the store stands now, and whether it is a new revision."""
    sweep_id = plan.sweep_id
    states = sweep_states(store, plan)
    closed = is_closed(store, sweep_id)
    crop_hash = bundle.manifest.crop.crop_hash

    def make(number: int, last: Worklist | None) -> Worklist | None:
        made = build(
            plan=plan,
            states=states,
            bundle=bundle,
            cases=lambda case_id: find_record(store, keys.case_record(crop_hash, case_id), CaseRecord),
            closed=closed,
            research_use=RESEARCH_USE,
            revision=number,
            made_at=clock(),
        )
        return None if last is not None and last.content_hash == made.content_hash else made

    worklist, new = write_revision(store, keys.worklists(sweep_id), Worklist, make)
    _finish(store, worklist, named=named)
    return worklist, new


def is_closed(store: Store, sweep_id: str) -> bool:
    """Whether the sweep's runner has closed it."""
    return next(iter(store.keys(keys.sweep_closed(sweep_id))), None) is not None


def newest_worklist(store: Store, sweep_id: str) -> Worklist | None:
    """The newest revision of a sweep's worklist."""
    return newest(store, keys.worklists(sweep_id), Worklist)


def worklist_key(sweep_id: str, revision: int, suffix: str, *, named: bool = False) -> str:
    """Where a rendering of a revision lies (suffix html or csv; named copies: html)."""
    prefix = keys.named_worklists(sweep_id) if named else keys.worklists(sweep_id)
    return keys.revision(prefix, revision).removesuffix("json") + suffix


def patients_of(store: Store, worklist: Worklist) -> dict[str, PatientShown]:
    """Restricted: the patients of a worklist's studies, by study id."""
    studies = {row.study_id for row in worklist.rows} | {row.study_id for row in worklist.others}
    return {study_id: read_patient(store, study_id) for study_id in sorted(studies)}


def _finish(store: Store, worklist: Worklist, *, named: bool) -> None:
    page = worklist_key(worklist.sweep_id, worklist.revision, "html")
    table = worklist_key(worklist.sweep_id, worklist.revision, "csv")
    if not store.exists(page):
        store.put(page, worklist_page(worklist, link=_link_from(page, named=False)).encode())
    if not store.exists(table):
        store.put(table, to_csv(worklist, link=_link_from(table, named=False)).encode())
    if named:
        copy = worklist_key(worklist.sweep_id, worklist.revision, "html", named=True)
        if not store.exists(copy):
            link = _link_from(copy, named=True)
            store.put(copy, worklist_page(worklist, link=link, patients=patients_of(store, worklist)).encode())


def _link_from(key: str, *, named: bool) -> Callable[[str, str], str]:
    def link(study_id: str, report_id: str) -> str:
        target = (keys.named_report if named else keys.report)(study_id, report_id, "html")
        return posixpath.relpath(target, posixpath.dirname(key))

    return link
