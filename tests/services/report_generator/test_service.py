from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from services.report_generator.service import build
from services.report_generator.settings import ReportGeneratorSettings
from services.report_generator.worklist import Worklist
from services.report_generator.worklists import newest_worklist, worklist_key
from shared.fracture import keys
from shared.fracture.messages import FACTS, Fact, ReportWritten, StudyRejected, SweepClosed, SweepPlanned
from shared.fracture.topology import QUEUES
from shared.pipeline.errors import Retry
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.records.archive import revisions
from shared.records.ledger import study_state
from tests.services.report_generator.sample import (
    NOON,
    End,
    SampleBundle,
    SampleCase,
    SampleStudy,
    close_sweep,
    fact_of,
    write_end,
    write_identity,
    write_study,
    write_sweep,
)

SENTINELS = ("MUSTERFRAU", "ERIKA", "Erika", "PID-4711", "ACC-0815", "20261122", "2026-11-22")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return NOON + timedelta(seconds=self.seconds)


def service_over(store: Store, bundle: SampleBundle, *, clock: Clock | None = None, **settings: Any) -> Service:
    clock = clock or Clock()
    return build(
        store=store,
        bundle=bundle,
        settings=ReportGeneratorSettings(**settings),
        monotonic=clock.monotonic,
        now=clock.now,
    )


def tell(service: Service, fact: Fact) -> list[Any]:
    followed: Iterable[Any] = service.handlers[type(fact)](fact)
    return list(followed)


def reports_in(store: Store) -> list[str]:
    return [*store.keys("reports/"), *store.keys("named/")]


def test_every_fact_of_its_queues_has_a_handler(store: Store, bundle: SampleBundle) -> None:
    service = service_over(store, bundle)

    heard = {FACTS[name] for queue in service.queues for name in QUEUES[queue]}

    assert set(service.handlers) == heard


@pytest.mark.parametrize("end", ["classified", "not-evaluated", "rejected", "dead-lettered"])
def test_the_fact_that_completes_a_study_writes_its_report(store: Store, bundle: SampleBundle, end: End) -> None:
    study = SampleStudy(cases=(SampleCase(level="L1"), SampleCase(level="L2", end=end)))
    write_study(store, study, bundle)
    service = service_over(store, bundle)

    (told,) = tell(service, fact_of(study, bundle))

    state = study_state(store, study.study_id, bundle.protocols.scope)
    assert state is not None
    assert state.report_written
    assert told == ReportWritten(study_id=study.study_id, protocols=bundle.protocols, report_id=state.report_id)
    assert store.exists(keys.report(study.study_id, state.report_id, "html"))


def test_an_incomplete_study_writes_nothing(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(cases=(SampleCase(level="L1"), SampleCase(level="L2", end="pending")))
    write_study(store, study, bundle)

    told = tell(service_over(store, bundle), fact_of(study, bundle, level="L1", end="classified"))

    assert told == []
    assert reports_in(store) == []


def test_a_study_that_nobody_planned_writes_nothing(store: Store, bundle: SampleBundle) -> None:
    assert tell(service_over(store, bundle), fact_of(SampleStudy(), bundle)) == []


def test_a_fact_told_twice_writes_one_report_and_tells_it_again(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    service = service_over(store, bundle)

    first = tell(service, fact_of(study, bundle))
    written = {key: store.get(key) for key in reports_in(store)}
    second = tell(service, fact_of(study, bundle))

    assert first == second
    assert {key: store.get(key) for key in reports_in(store)} == written
    assert len(written) == 2


def test_a_page_whose_writer_died_is_finished_by_the_next_fact(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    service = service_over(store, bundle)
    tell(service, fact_of(study, bundle))
    written = {key: store.get(key) for key in reports_in(store)}

    store.delete(next(key for key in written if key.endswith(".json")))
    tell(service, fact_of(study, bundle))

    assert {key: store.get(key) for key in reports_in(store)} == written


def test_a_replay_that_succeeds_makes_a_new_revision_beside_the_old(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(cases=(SampleCase(level="L1", end="dead-lettered"),))
    write_study(store, study, bundle)
    service = service_over(store, bundle)
    (before,) = tell(service, fact_of(study, bundle))

    write_end(store, study, SampleCase(level="L1"), bundle)
    (after,) = tell(service, fact_of(study, bundle, end="classified"))

    assert before.report_id != after.report_id
    assert len([key for key in reports_in(store) if key.endswith(".json")]) == 2


def test_a_rejected_study_has_a_report_with_its_reasons(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(cases=())
    write_study(store, study, bundle)

    (told,) = tell(service_over(store, bundle), StudyRejected(study_id=study.study_id, protocols=bundle.protocols))

    page = store.get(keys.report(study.study_id, told.report_id, "html")).decode()
    assert "not an axial stack: a localiser" in page


def test_results_of_another_bundle_wait_for_a_worker_that_has_it(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    other = SampleBundle(manifest=bundle.manifest.model_copy(update={"bundle_id": "e" * 64}))

    with pytest.raises(Retry, match="has bundle eeeeeeeeeeee"):
        tell(service_over(store, other), fact_of(study, bundle))

    assert reports_in(store) == []


def test_features_made_for_training_make_no_report(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    training = fact_of(study, bundle).model_copy(
        update={"protocols": bundle.protocols.model_copy(update={"bundle_id": None})}
    )

    assert tell(service_over(store, bundle), training) == []


def test_names_lie_under_the_restricted_prefix_alone(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    write_identity(store, study)
    sweep_id = write_sweep(store, "night", [study], bundle, closed=True)
    service = service_over(store, bundle, named_reports=True)

    (written,) = tell(service, fact_of(study, bundle))
    tell(service, SweepClosed(sweep_id=sweep_id))

    open_keys = [key for key in store.keys("") if not key.startswith(keys.RESTRICTED)]
    assert not [key for key in open_keys if any(name.encode() in store.get(key) for name in SENTINELS)]
    named = json.loads(store.get(keys.named_report(study.study_id, written.report_id, "json")))
    assert named["patient_name"] == "MUSTERFRAU, ERIKA DR"
    assert (named["patient_id"], named["accession_number"]) == ("PID-4711", "ACC-0815")
    for key in (
        keys.named_report(study.study_id, written.report_id, "html"),
        worklist_key(sweep_id, 1, "html", named=True),
    ):
        page = store.get(key).decode()
        assert all(value in page for value in ("MUSTERFRAU, ERIKA DR", "PID-4711", "ACC-0815", "2026-11-22"))
    assert service.sees_identifiers


def test_without_the_setting_nothing_is_named(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    write_identity(store, study)

    tell(service_over(store, bundle), fact_of(study, bundle))

    assert list(store.keys("named/")) == []


def test_named_copies_are_added_when_the_setting_comes_later(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    write_identity(store, study)
    tell(service_over(store, bundle), fact_of(study, bundle))

    tell(service_over(store, bundle, named_reports=True), fact_of(study, bundle))

    assert len(list(store.keys("named/reports/"))) == 2


def test_identities_that_disagree_are_all_shown(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    write_identity(store, study)
    write_identity(store, study, patient_id="PID-OTHER")

    (written,) = tell(service_over(store, bundle, named_reports=True), fact_of(study, bundle))

    named = json.loads(store.get(keys.named_report(study.study_id, written.report_id, "json")))
    assert named["patient_id"] == "PID-4711 / PID-OTHER"
    assert named["patient_name"] == "MUSTERFRAU, ERIKA DR"


# worklists ------------------------------------------------------------------------------------------------------------
def worklists(store: Store, sweep_id: str) -> list[Worklist]:
    return revisions(store, keys.worklists(sweep_id), Worklist)


def two_studies(store: Store, bundle: SampleBundle) -> tuple[SampleStudy, SampleStudy, str]:
    first, second = SampleStudy(name="first"), SampleStudy(name="second")
    for study in (first, second):
        write_study(store, study, bundle)
    return first, second, write_sweep(store, "night", [first, second], bundle)


def test_a_planned_sweep_has_a_worklist_at_once(store: Store, bundle: SampleBundle) -> None:
    _, _, sweep_id = two_studies(store, bundle)

    assert tell(service_over(store, bundle), SweepPlanned(sweep_id=sweep_id)) == []

    (made,) = worklists(store, sweep_id)
    assert made.revision == 1
    assert made.made_at == NOON
    assert not made.closed
    assert store.exists(worklist_key(sweep_id, 1, "html"))
    assert store.exists(worklist_key(sweep_id, 1, "csv"))


def test_a_worklist_in_which_nothing_changed_makes_no_revision(store: Store, bundle: SampleBundle) -> None:
    _, _, sweep_id = two_studies(store, bundle)
    clock = Clock()
    service = service_over(store, bundle, clock=clock)
    tell(service, SweepPlanned(sweep_id=sweep_id))

    clock.seconds = 3600
    tell(service, SweepPlanned(sweep_id=sweep_id))

    assert len(worklists(store, sweep_id)) == 1


def test_a_running_sweep_is_rebuilt_once_in_the_set_time(store: Store, bundle: SampleBundle) -> None:
    first, second, sweep_id = two_studies(store, bundle)
    clock = Clock()
    service = service_over(store, bundle, clock=clock, worklist_every_seconds=30)
    (one,) = tell(service, fact_of(first, bundle))
    (two,) = tell(service, fact_of(second, bundle))
    store_of_reports = {study.study_id for study in (first, second)}
    store.delete(keys.report(second.study_id, two.report_id, "json"))

    tell(service, one)
    clock.seconds = 29.9
    tell(service, fact_of(second, bundle))
    tell(service, two)
    within = worklists(store, sweep_id)
    clock.seconds = 30.0
    tell(service, two)

    assert [set(made.reports) for made in within] == [{first.study_id}]
    assert [set(made.reports) for made in worklists(store, sweep_id)] == [{first.study_id}, store_of_reports]


def test_a_closed_sweep_is_rebuilt_at_every_report(store: Store, bundle: SampleBundle) -> None:
    first, second, sweep_id = two_studies(store, bundle)
    service = service_over(store, bundle)
    (one,) = tell(service, fact_of(first, bundle))
    tell(service, one)
    close_sweep(store, sweep_id)

    (two,) = tell(service, fact_of(second, bundle))
    tell(service, two)

    newest = newest_worklist(store, sweep_id)
    assert newest is not None
    assert newest.closed
    assert set(newest.reports) == {first.study_id, second.study_id}


def test_a_closing_always_rebuilds(store: Store, bundle: SampleBundle) -> None:
    first, second, sweep_id = two_studies(store, bundle)
    service = service_over(store, bundle)
    tell(service, SweepPlanned(sweep_id=sweep_id))
    for study in (first, second):
        tell(service, fact_of(study, bundle))
    close_sweep(store, sweep_id)

    tell(service, SweepClosed(sweep_id=sweep_id))

    newest = newest_worklist(store, sweep_id)
    assert newest is not None
    assert (newest.revision, newest.supersedes, newest.closed) == (2, 1, True)


def test_a_worklist_that_took_long_is_rebuilt_less_often(store: Store, bundle: SampleBundle) -> None:
    first, second, sweep_id = two_studies(store, bundle)
    clock = Clock()

    def slow_now() -> datetime:
        clock.seconds += 100.0
        return datetime(2026, 11, 23, tzinfo=UTC)

    service = build(
        store=store, bundle=bundle, settings=ReportGeneratorSettings(), monotonic=clock.monotonic, now=slow_now
    )
    (one,) = tell(service, fact_of(first, bundle))
    tell(service, one)
    (two,) = tell(service, fact_of(second, bundle))

    clock.seconds = 499.0
    tell(service, two)
    early = len(worklists(store, sweep_id))
    clock.seconds = 501.0
    tell(service, two)

    assert (early, len(worklists(store, sweep_id))) == (1, 2)


def test_a_worklist_whose_page_was_lost_with_its_writer_gets_it_back(store: Store, bundle: SampleBundle) -> None:
    _, _, sweep_id = two_studies(store, bundle)
    service = service_over(store, bundle)
    tell(service, SweepPlanned(sweep_id=sweep_id))
    page = store.get(worklist_key(sweep_id, 1, "html"))

    store.delete(worklist_key(sweep_id, 1, "html"))
    tell(service, SweepPlanned(sweep_id=sweep_id))

    assert store.get(worklist_key(sweep_id, 1, "html")) == page


def test_a_study_in_two_sweeps_stands_in_both_worklists(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    sweeps = [write_sweep(store, name, [study], bundle) for name in ("monday", "tuesday")]
    service = service_over(store, bundle)

    (written,) = tell(service, fact_of(study, bundle))
    tell(service, written)

    assert [len(worklists(store, sweep_id)) for sweep_id in sweeps] == [1, 1]
