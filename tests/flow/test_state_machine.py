"""Chaos in memory size: any interleaving of crashes, outages, duplicates, retries and replays keeps the ledger exact.

The real services, worker loop, recorder, records and ledger run in one thread (tests/fixtures/stepped.py); hypothesis
chooses who takes the next step and what befalls it. After every step the ledgers must add up; whenever nothing is under
way, nothing may be pending; and when everything was given time, mended and replayed, all must stand as if nothing had
happened. `CHAOS_EXAMPLES=2000 pytest tests/flow/test_state_machine.py` looks further, with new seeds each time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import services.radiomics_extractor.service as radiomics
import shared.pipeline.worker as worker_module
from services.report_generator.worklists import newest_worklist
from shared.fracture import keys, volume
from shared.fracture.bundle import Bundle
from shared.fracture.ledger import Ledger, StudyState
from shared.fracture.messages import OfCase, OfSeries
from shared.fracture.records import DeadLetter, DeadLetterNote, SweepPlan
from shared.fracture.topology import (
    DEEP_EXTRACTOR,
    FUSION_CLASSIFIER,
    QUEUES,
    RADIOMICS_EXTRACTOR,
    REPORT_GENERATOR,
    RESAMPLER,
    SEGMENTER,
    WORKLIST,
)
from shared.pipeline.envelope import SCHEMA_VERSION, Envelope
from shared.records.dead_letters import letters
from shared.records.ledger import study_state, sweep_ledger, sweep_plan, sweep_states, sweeps
from shared.records.outcomes import fact_of
from tests.fixtures.mishaps import KINDS, Mishap
from tests.fixtures.small_bundle import load_bundle, write_small_bundle
from tests.fixtures.small_studies import SMALL_CROP, SmallArchive, later_archive, small_archive
from tests.fixtures.stepped import PSEUDONYMS, WORKERS, Curse, Stepped

EXAMPLES = os.environ.get("CHAOS_EXAMPLES")
PHASES = (Phase.generate,) if os.environ.get("CHAOS_NO_SHRINK") else (Phase.generate, Phase.shrink)
CHAOS = settings(
    max_examples=int(EXAMPLES or 30),
    stateful_step_count=30,
    derandomize=EXAMPLES is None,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
ARCHIVES = {"night": small_archive, "later": later_archive}
HEARD: dict[str, tuple[str, ...]] = {
    SEGMENTER: ("series",),
    RESAMPLER: ("series",),
    RADIOMICS_EXTRACTOR: ("case",),
    DEEP_EXTRACTOR: ("case",),
    FUSION_CLASSIFIER: ("case",),
    REPORT_GENERATOR: ("study", "case"),
}
"""What the messages of each service are about."""
CURSES = ("bug", "over-budget", "retry", "kills", "kills late")
DETERMINED = (
    "volumes/",
    "masks/",
    "manifests/",
    "cases/",
    "features/",
    "outcomes/classified/",
    "outcomes/not-evaluated/",
    "reports/",
)
"""Where every writer of a key must write the same bytes."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_small_bundle(tmp_path_factory.mktemp("bundle") / "small", crop=SMALL_CROP))


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """The same few grids are read thousands of times here: their bytes are decoded once, by one thread, in memory."""
    memory = Path("/dev/shm")
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(volume, "_read_nrrd", cache(volume._read_nrrd))
        patched.setattr(radiomics, "version", cache(version))
        if memory.is_dir() and os.access(memory, os.W_OK):
            patched.setattr(tempfile, "tempdir", str(memory))
        yield
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


# -- what must hold ----------------------------------------------------------------------------------------------------


def outcomes(pipeline: Stepped) -> dict[str, Any]:
    """The terminal records by key; those with a time without it."""
    found: dict[str, Any] = {}
    for kind in ("classified", "not-evaluated", "rejected", "series-rejected"):
        for key in pipeline.store.keys(f"outcomes/{kind}/"):
            found[key] = pipeline.store.get(key)
            if kind.endswith("rejected"):
                found[key] = {k: v for k, v in json.loads(found[key]).items() if k != "recorded_at"}
    return found


@cache
def undisturbed(bundle_id: str) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """What all records say when nothing happens, and the ids of all cases, series and studies of the first archive."""
    pipeline = Stepped(Chaos.bundle)
    states: list[StudyState] = []
    for name, archive in ARCHIVES.items():
        assert pipeline.sweep(archive(), name)
        pipeline.drain()
        states += list(sweep_states(pipeline.store, plan_of(pipeline, PSEUDONYMS.sweep_id(name))).values())
    assert not list(letters(pipeline.store))
    ids = {
        "study": {state.study_id for state in states},
        "series": {series.planned.series_id for state in states for series in state.series},
        "case": {case.case_id for state in states for case in state.cases},
    }
    return outcomes(pipeline), {kind: tuple(sorted(found)) for kind, found in ids.items()}


def plan_of(pipeline: Stepped, sweep_id: str) -> SweepPlan:
    """The newest plan of a sweep that there is."""
    plan = sweep_plan(pipeline.store, sweep_id)
    assert plan is not None
    return plan


def ledger_of(pipeline: Stepped, sweep_id: str) -> Ledger:
    """The ledger of a sweep that there is."""
    ledger = sweep_ledger(pipeline.store, sweep_id)
    assert ledger is not None
    return ledger


def check_exact(pipeline: Stepped) -> None:
    """At any time: every planned case stands once in its ledger, and all lines add up."""
    assert not [key for key in pipeline.store.disagreements if key.startswith(DETERMINED)]
    for sweep_id in sweeps(pipeline.store):
        plan, ledger = plan_of(pipeline, sweep_id), ledger_of(pipeline, sweep_id)
        assert ledger.exact
        assert ledger.series.found == len(plan.series)
        found = 0
        for reference in plan.series:
            planned = planned_cases(pipeline, reference.series_id)
            state = study_state(pipeline.store, reference.study_id, plan.protocols.scope)
            assert state is not None
            series = next(s for s in state.series if s.planned.series_id == reference.series_id)
            listed = [case.case_id for case in series.cases]
            assert sorted(listed) == sorted(planned)
            current = series.planned.manifest_id == reference.manifest_id
            found += sum(current or case.superseded for case in series.cases)
        assert ledger.cases.found == found


def planned_cases(pipeline: Stepped, series_id: str) -> set[str]:
    """The ids of all cases that any plan of a series names, read without the ledger's code."""
    plans = [json.loads(pipeline.store.get(key)) for key in pipeline.store.keys(keys.series_plans(series_id))]
    return {case["case_id"] for plan in plans for case in plan["cases"]}


def check_settled(pipeline: Stepped) -> None:
    """When nothing is under way: nothing is pending, every loss has its letter, and no other case is touched."""
    assert pipeline.idle
    check_exact(pipeline)
    given_up = list(letters(pipeline.store))
    by_id = {letter.dead_letter_id: letter for letter in given_up}
    lost = {id_ for letter in given_up for id_ in ids_of(letter)}
    reference, _ = undisturbed(pipeline.bundle.bundle_id)
    found = outcomes(pipeline)
    assert {key: reference.get(key) for key in found} == found
    assert all(letter.reason and letter.kind for letter in given_up)
    for sweep_id in sweeps(pipeline.store):
        plan, ledger = plan_of(pipeline, sweep_id), ledger_of(pipeline, sweep_id)
        assert ledger.pending == 0, ledger.as_json()
        states = sweep_states(pipeline.store, plan)
        for state in states.values():
            check_study(pipeline, state, by_id=by_id, lost=lost, reference=reference)
        if not any(letter.queue == WORKLIST for letter in given_up):
            check_worklist(pipeline, sweep_id, states)


def check_study(
    pipeline: Stepped, state: StudyState, *, by_id: dict[str, DeadLetter], lost: set[str], reference: dict[str, Any]
) -> None:
    """A study with nothing under way."""
    assert state.complete
    report_lost = any(
        letter.queue == REPORT_GENERATOR and state.study_id in letter.envelope for letter in by_id.values()
    )
    assert state.report_written or report_lost
    for series in state.series:
        assert series.state != "dead-lettered" or series.planned.series_id in lost
        for case in series.cases:
            where = case.state(report_written=state.report_written)
            assert where != "pending"
            if case.superseded or where == "reported":
                continue
            if where == "dead-lettered":
                letter_note = case.unreported if case.unreported is not None else case.outcome
                assert isinstance(letter_note, DeadLetterNote)
                assert by_id[letter_note.dead_letter_id].reason == letter_note.reason
                assert {case.case_id, case.series_id} & lost or report_lost
            else:
                kind = {"not evaluated": "not-evaluated", "rejected": "rejected"}[where]
                assert keys.outcome(kind, state.scope, case.case_id) in reference


def check_worklist(pipeline: Stepped, sweep_id: str, states: dict[str, StudyState]) -> None:
    """The newest worklist shows every study and the ledger as it is."""
    worklist = newest_worklist(pipeline.store, sweep_id)
    ledger = ledger_of(pipeline, sweep_id)
    assert worklist is not None
    assert worklist.closed
    shown = {row.study_id for row in (*worklist.rows, *worklist.others)}
    assert shown == set(states)
    assert worklist.ledger["cases"] == ledger.as_json()["cases"]
    assert worklist.reports == {s.study_id: s.report_id for s in states.values() if s.report_written}


def ids_of(letter: DeadLetter) -> set[str]:
    """The case or series that a letter is about (none where nobody can read it)."""
    try:
        fact = fact_of(Envelope.from_bytes(letter.envelope.encode()))
    except ValueError:
        return set()
    match fact:
        case OfCase():
            return {fact.case_id}
        case OfSeries():
            return {fact.series_id}
        case _:
            return set()


# -- any interleaving --------------------------------------------------------------------------------------------------

mishaps = st.none() | st.builds(Mishap, kind=st.sampled_from(KINDS), after=st.integers(0, 12), times=st.integers(1, 6))
early_mishaps = st.none() | st.builds(
    Mishap, kind=st.sampled_from(KINDS), after=st.integers(0, 3), times=st.integers(1, 3)
)
ingest_mishaps = st.none() | st.builds(
    Mishap, kind=st.sampled_from(KINDS), after=st.integers(0, 50), times=st.integers(1, 10)
)
numbers = st.integers(0, 10_000)
poisons = st.tuples(numbers, st.sampled_from(tuple(HEARD)), st.sampled_from(CURSES))


class Chaos(RuleBasedStateMachine):
    """The pipeline, and everything that can befall it."""

    bundle: ClassVar[Bundle]

    @initialize(
        delays=st.lists(st.sampled_from([1.0, 5.0, 30.0, 600.0]), min_size=1, max_size=4),
        mishap=ingest_mishaps,
        poisons=st.lists(poisons, max_size=2),
    )
    def a_sweep_begins(self, delays: list[float], mishap: Mishap | None, poisons: list[tuple[int, str, str]]) -> None:
        self.pipeline = Stepped(self.bundle, delays=delays)
        self.unread: set[str] = set()
        for poison in poisons:
            self.something_is_poison(poison)
        self.read("night", mishap)

    def read(self, name: str, mishap: Mishap | None) -> None:
        """Ingest reads an archive; what stopped half-way is read again at the end."""
        self.unread.discard(name)
        if not self.pipeline.sweep(ARCHIVES[name](), name, mishap):
            self.unread.add(name)

    @rule(name=st.sampled_from(tuple(ARCHIVES)), mishap=ingest_mishaps)
    def an_archive_is_swept_again(self, name: str, mishap: Mishap | None) -> None:
        self.read(name, mishap)

    @rule(which=numbers, mishap=mishaps)
    def one_step(self, which: int, mishap: Mishap | None) -> None:
        waiting = self.pipeline.waiting()
        if waiting:
            self.pipeline.step(*waiting[which % len(waiting)], mishap)

    @rule(order=st.lists(numbers, min_size=1, max_size=12))
    def some_steps(self, order: list[int]) -> None:
        for which in order:
            self.one_step(which, None)

    @rule()
    def all_that_can_be_done_is_done(self) -> None:
        self.pipeline.run_out()

    @rule(seconds=st.sampled_from([2.0, 20.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.pipeline.now += seconds

    @rule(name=st.sampled_from(WORKERS))
    def a_worker_is_killed(self, name: str) -> None:
        self.pipeline.kill(name)

    @rule(name=st.sampled_from(WORKERS[:-1]))
    def another_worker_starts(self, name: str) -> None:
        self.pipeline.start(f"{name}/2")

    @rule(which=numbers)
    def an_old_message_is_delivered_again(self, which: int) -> None:
        if self.pipeline.told:
            queue, body = self.pipeline.told[which % len(self.pipeline.told)]
            self.pipeline.broker.publish_to_queue(queue, body)

    @rule(which=numbers)
    def a_newer_service_tells_a_fact(self, which: int) -> None:
        if self.pipeline.told:
            queue, body = self.pipeline.told[which % len(self.pipeline.told)]
            newer = json.loads(body) | {"schema_version": SCHEMA_VERSION + 1, "since_then": True}
            self.pipeline.broker.publish_to_queue(queue, json.dumps(newer).encode())

    @rule(queue=st.sampled_from(tuple(QUEUES)))
    def nobody_can_read_a_message(self, queue: str) -> None:
        self.pipeline.broker.publish_to_queue(queue, b"\xff{")

    @rule(mishap=early_mishaps)
    def done_sweeps_are_closed(self, mishap: Mishap | None) -> None:
        self.pipeline.close(mishap)

    @rule(which=numbers, mishap=early_mishaps)
    def a_dead_letter_is_replayed(self, which: int, mishap: Mishap | None) -> None:
        given_up = list(letters(self.pipeline.store))
        if given_up:
            self.pipeline.replay(given_up[which % len(given_up)], mishap)

    @rule(poison=poisons)
    def something_is_poison(self, poison: tuple[int, str, str]) -> None:
        which, service, how = poison
        _, ids = undisturbed(self.bundle.bundle_id)
        ids_heard = [id_ for kind in HEARD[service] for id_ in ids[kind]]
        self.pipeline.curses.add(Curse(service=service, id=ids_heard[which % len(ids_heard)], how=how))

    @precondition(lambda self: self.pipeline.curses)
    @rule()
    def the_poison_is_mended(self) -> None:
        self.pipeline.curses.clear()

    @invariant()
    def the_ledger_is_exact(self) -> None:
        check_exact(self.pipeline)
        if self.pipeline.idle and not self.unread and all_closed(self.pipeline):
            check_settled(self.pipeline)

    def teardown(self) -> None:
        if not hasattr(self, "pipeline"):
            return
        for name in sorted(self.unread):
            self.read(name, None)
        self.pipeline.drain()
        check_settled(self.pipeline)
        note("mended and replayed")
        check_mended(self.pipeline)


def all_closed(pipeline: Stepped) -> bool:
    """Whether the closer has nothing more to do."""
    told = len(pipeline.told)
    pipeline.close()
    return len(pipeline.told) == told


def check_mended(pipeline: Stepped) -> None:
    """Once mended and replayed, all stands as in the undisturbed run, and a second replay does nothing."""
    pipeline.curses.clear()
    with pytest.MonkeyPatch.context() as upgraded:
        upgraded.setattr(worker_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        for letter in list(letters(pipeline.store)):
            pipeline.replay(letter)
        pipeline.drain()
        check_settled(pipeline)
        reference, _ = undisturbed(pipeline.bundle.bundle_id)
        for sweep_id in sweeps(pipeline.store):
            states = sweep_states(pipeline.store, plan_of(pipeline, sweep_id))
            for state in states.values():
                assert state.report_written
                for case in state.cases:
                    assert case.state(report_written=True) != "dead-lettered"
                assert {s.state for s in state.series} <= {"planned", "rejected"}
            check_worklist(pipeline, sweep_id, states)
        before = len(pipeline.told)
        for letter in list(letters(pipeline.store)):
            current = ids_of(letter) & current_ids(pipeline)
            answer = pipeline.replay(letter) if current else None
            assert answer in (None, "done since")
        assert pipeline.idle
        assert len(pipeline.told) == before
    assert {key: reference.get(key) for key in outcomes(pipeline)} == outcomes(pipeline)


def current_ids(pipeline: Stepped) -> set[str]:
    """The ids of the series and cases of the newest plans."""
    ids: set[str] = set()
    for sweep_id in sweeps(pipeline.store):
        for state in sweep_states(pipeline.store, plan_of(pipeline, sweep_id)).values():
            ids |= {case.case_id for case in state.cases if not case.superseded}
    return ids


@pytest.mark.timeout(0)
def test_any_interleaving_of_crash_outage_duplicate_and_retry_keeps_the_ledger_exact(bundle: Bundle) -> None:
    Chaos.bundle = bundle

    run_state_machine_as_test(Chaos, settings=CHAOS)


@settings(parent=CHAOS, max_examples=int(EXAMPLES or 12))
@given(
    which=numbers,
    service=st.sampled_from([RADIOMICS_EXTRACTOR, DEEP_EXTRACTOR, FUSION_CLASSIFIER]),
    how=st.sampled_from(CURSES),
    order=st.lists(numbers, max_size=60),
)
def test_in_any_order_a_poison_case_costs_only_itself(
    bundle: Bundle, which: int, service: str, how: str, order: list[int]
) -> None:
    Chaos.bundle = bundle
    pipeline = Stepped(bundle)
    pipeline.sweep(later_archive(), "later")
    scored = sorted(scored_cases(later_archive))
    poison = scored[which % len(scored)]
    pipeline.curses.add(Curse(service=service, id=poison, how=how))

    for step in order:
        waiting = pipeline.waiting()
        if waiting:
            pipeline.step(*waiting[step % len(waiting)])
    pipeline.drain()

    given_up = list(letters(pipeline.store))
    ends = {key.rsplit("/", 1)[1].removesuffix(".json") for key in pipeline.store.keys("outcomes/classified/")}
    assert {id_ for letter in given_up for id_ in ids_of(letter)} == {poison}
    assert set(scored) - {poison} <= ends
    check_settled(pipeline)


@cache
def scored_cases(archive: Callable[[], SmallArchive]) -> frozenset[str]:
    """The cases of an archive that end with a result when nothing happens."""
    pipeline = Stepped(Chaos.bundle)
    pipeline.sweep(archive(), "night")
    pipeline.drain()
    return frozenset(key.rsplit("/", 1)[1].removesuffix(".json") for key in pipeline.store.keys("outcomes/classified/"))


# -- what it found, and what it must not lose sight of -----------------------------------------------------------------


@pytest.fixture
def pipeline(bundle: Bundle) -> Stepped:
    Chaos.bundle = bundle
    return Stepped(bundle)


def case_of(level: str) -> str:
    """The id of a case of the first study of the small archive."""
    pipeline = Stepped(Chaos.bundle)
    pipeline.sweep(small_archive(), "night")
    pipeline.drain()
    plan = plan_of(pipeline, PSEUDONYMS.sweep_id("night"))
    state = sweep_states(pipeline.store, plan)[PSEUDONYMS.study_id("1.1")]
    return next(case.case_id for case in state.cases if case.level == level)


def test_a_report_that_cannot_be_written_leaves_no_case_of_its_study_pending(pipeline: Stepped) -> None:
    late = case_of("L2")
    pipeline.curses |= {
        Curse(service=FUSION_CLASSIFIER, id=late, how="retry"),
        Curse(service=REPORT_GENERATOR, id=late, how="bug"),
    }

    pipeline.sweep(small_archive(), "night")
    pipeline.drain()

    assert ledger_of(pipeline, PSEUDONYMS.sweep_id("night")).cases.by_state["dead-lettered"] == 2
    check_settled(pipeline)
    check_mended(pipeline)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_sweep_whose_closer_dies_is_closed_by_the_next_one(pipeline: Stepped, after: int) -> None:
    pipeline.sweep(small_archive(), "night")
    pipeline.run_out()

    pipeline.close(Mishap(kind="killed", after=after))
    pipeline.drain()

    check_settled(pipeline)


def test_a_series_that_was_given_up_after_its_plan_can_be_replayed(pipeline: Stepped) -> None:
    pipeline.curses.add(Curse(service=RESAMPLER, id=PSEUDONYMS.series_id("1.1.1"), how="kills late"))
    pipeline.sweep(small_archive(), "night")
    pipeline.drain()
    (letter,) = letters(pipeline.store)
    before = ledger_of(pipeline, PSEUDONYMS.sweep_id("night")).cases.by_state

    pipeline.curses.clear()
    answer = pipeline.replay(letter)
    pipeline.drain()

    after = ledger_of(pipeline, PSEUDONYMS.sweep_id("night")).cases.by_state
    assert (before["dead-lettered"], before["reported"]) == (2, 1)
    assert answer == "replayed"
    assert (after["dead-lettered"], after["reported"]) == (0, 3)
    check_settled(pipeline)


def test_a_series_refused_after_its_plan_was_written_leaves_no_case_pending(pipeline: Stepped) -> None:
    series_id = PSEUDONYMS.series_id("1.1.1")
    pipeline.sweep(small_archive(), "night")
    while not list(pipeline.store.keys(keys.series_plans(series_id))):
        name, queue = pipeline.waiting()[0]
        pipeline.step(name, queue, Mishap(kind="killed", after=1) if name == RESAMPLER else None)
    (stored,) = (key for key in pipeline.store.keys(f"volumes/{series_id}/") if key.endswith(".nrrd"))
    pipeline.store.delete(stored)
    pipeline.store.put(stored, b"the disk lost it")

    pipeline.drain()

    ledger = ledger_of(pipeline, PSEUDONYMS.sweep_id("night"))
    assert ledger.exact
    assert ledger.pending == 0
    assert "the stored volume or mask cannot be read" in str(ledger.cases.reasons["rejected"])
