"""Any mix of ages, any state of sweeps and studies: the ledgers that are left say what they said before."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.fracture import keys
from shared.fracture.ledger import Ledger
from shared.fracture.messages import CaseReady
from shared.fracture.protocol import Protocols
from shared.fracture.records import (
    Classified,
    Demographics,
    FileCounts,
    NotEvaluated,
    PlannedCase,
    PlannedSeries,
    Rejection,
    SeriesPlan,
    StudyPlan,
    SweepClosing,
    SweepPlan,
    SweepSeries,
)
from shared.pipeline.envelope import Envelope
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.folder_store import FolderStore
from shared.records.archive import write_record
from shared.records.garbage import collect, decisions, explained
from shared.records.ledger import study_state, sweep_ledger, sweeps
from shared.records.outcomes import record_dead_letter
from shared.records.retention import Ages

NOW = datetime(2027, 1, 1, tzinfo=UTC)
EVERYTHING = Ages(
    **dict.fromkeys(("derived", "features", "results", "ledger", "identities", "inbox"), timedelta(days=1))
)
OUTCOMES = ("classified", "not-evaluated", "rejected", "dead-lettered", "")


@pytest.fixture(scope="module", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Nothing here survives a power cut, and each of thousands of objects need not wait for the disk."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield


def an_id(kind: str, *numbers: int) -> str:
    return (kind.encode().hex() + "".join(f"{number:02x}" for number in numbers)).ljust(64, "0")


def protocols(bundle: int) -> Protocols:
    return Protocols(
        crop_hash=an_id("crop"), hcr_hash=an_id("hcr"), dtl_hash=an_id("dtl", bundle), bundle_id=an_id("bundle", bundle)
    )


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study of one series. `outcomes` by bundle and case, '' while pending. `newer`: a later state superseded it."""

    number: int
    outcomes: tuple[tuple[str, ...], tuple[str, ...]]
    reported: tuple[bool, bool]
    newer: bool

    @property
    def study_id(self) -> str:
        return an_id("study", self.number)

    @property
    def series_id(self) -> str:
        return an_id("series", self.number)

    def case_id(self, case: int) -> str:
        return an_id("case", self.number, case, self.newer)

    def manifest_id(self, *, newer: bool) -> str:
        return an_id("manifest", self.number, newer)

    def pending(self, bundle: int) -> bool:
        done = self.outcomes[bundle]
        return "" in done or ("classified" in done and not self.reported[bundle])


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep over some studies. `sees_newer`: it planned the newest state of each."""

    number: int
    studies: frozenset[int]
    bundle: int
    planned: bool
    closed: bool
    sees_newer: bool

    @property
    def sweep_id(self) -> str:
        return an_id("sweep", self.number)


@dataclass(frozen=True, kw_only=True)
class World:
    """What lies in a store."""

    studies: tuple[Study, ...]
    sweeps: tuple[Sweep, ...]
    seed: int

    def studies_under_way(self) -> frozenset[str]:
        """By the description alone, not by the code under test."""
        found = set()
        for sweep in self.sweeps:
            for study in self.studies:
                if study.number not in sweep.studies:
                    continue
                current = sweep.sees_newer or not study.newer
                if not sweep.planned or not sweep.closed or (current and study.pending(sweep.bundle)):
                    found.add(study.study_id)
        return frozenset(found)


def write_study(store: FolderStore, study: Study) -> None:
    for newer in (False, True)[: 1 + study.newer]:
        line = PlannedSeries(
            series_id=study.series_id, manifest_id=study.manifest_id(newer=newer), modality="CT", instances=9
        )
        number = 1 + newer
        write_record(
            store,
            keys.revision(keys.study_plans(study.study_id), number),
            StudyPlan(study_id=study.study_id, revision=number, demographics=Demographics(), series=(line,)),
        )
        case_ids = [an_id("case", study.number, case, newer) for case in range(len(study.outcomes[0]))]
        write_record(
            store,
            keys.revision(keys.series_plans(study.series_id), number),
            SeriesPlan(
                study_id=study.study_id,
                series_id=study.series_id,
                manifest_id=line.manifest_id,
                mask_hash=an_id("mask", number),
                revision=number,
                cases=tuple(PlannedCase(case_id=case_id, level=f"L{n + 1}") for n, case_id in enumerate(case_ids)),
            ),
        )
        store.put(keys.volume(study.series_id, an_id("image", number)), b"voxels")
        store.put(keys.volume_record(study.series_id, an_id("image", number)), b"{}")
        store.put(keys.mask(study.series_id, an_id("mask", number)), b"labels")
        store.put(keys.mask_record(study.series_id, an_id("mask", number)), b"{}")
        store.put(keys.manifest(study.series_id, line.manifest_id), b"{}")
        store.put(keys.series_instances(study.series_id, an_id("image", number)), b"uids")
        for case_id in case_ids:
            store.put(keys.case_record(an_id("crop"), case_id), b"{}")
            store.put(keys.case_image(an_id("crop"), case_id), b"crop")
            store.put(keys.case_mask(an_id("crop"), case_id), b"mask")
            store.put(keys.hcr_features(an_id("hcr"), case_id), b"{}")
    store.put(keys.study_identity(study.study_id, an_id("who")), b"name")
    store.put(keys.report(study.study_id, an_id("superseded"), "json"), b"{}")
    for bundle in (0, 1):
        write_outcomes(store, study, bundle)


def write_outcomes(store: FolderStore, study: Study, bundle: int) -> None:
    asked = protocols(bundle)
    for case, outcome in enumerate(study.outcomes[bundle]):
        case_id = study.case_id(case)
        record = {
            "classified": Classified(
                case_id=case_id,
                study_id=study.study_id,
                series_id=study.series_id,
                level=f"L{case + 1}",
                protocols=asked,
                classification={"probability": 0.5},
            ),
            "not-evaluated": NotEvaluated(case_id=case_id, kind="guard", service="resampler", reasons=("too coarse",)),
            "rejected": Rejection(service="resampler", reasons=("too thin",)),
            "": None,
        }
        if outcome == "dead-lettered":
            ready = CaseReady(study_id=study.study_id, series_id=study.series_id, case_id=case_id, protocols=asked)
            envelope = Envelope.of(ready).model_copy(update={"message_id": f"{study.number}-{bundle}-{case}"})
            record_dead_letter(
                store,
                queue="deep-extractor",
                envelope=envelope,
                body=envelope.to_bytes(),
                death="delivery_limit",
                delivery_count=3,
            )
        elif record[outcome] is not None:
            kind: keys.Outcome = outcome  # type: ignore[assignment]
            write_record(store, keys.outcome(kind, asked.scope, case_id), record[outcome])  # type: ignore[arg-type]
    state = study_state(store, study.study_id, asked.scope)
    if study.reported[bundle] and state is not None and state.complete:
        store.put(keys.report(study.study_id, state.report_id, "html"), b"<p>")
        store.put(keys.named_report(study.study_id, state.report_id, "html"), b"<p>name")
        store.put(keys.report(study.study_id, state.report_id, "json"), b"{}")


def write_sweep(store: FolderStore, sweep: Sweep, studies: tuple[Study, ...]) -> None:
    held = [study for study in studies if study.number in sweep.studies]
    store.put(keys.sweep_identity(sweep.sweep_id), b"its name")
    for study in held:
        store.put(keys.sweep_of_study(study.study_id, sweep.sweep_id), b"")
    if not sweep.planned:
        return
    for revision in (1, 2):
        write_record(
            store,
            keys.revision(keys.sweep_plans(sweep.sweep_id), revision),
            SweepPlan(
                sweep_id=sweep.sweep_id,
                revision=revision,
                protocols=protocols(sweep.bundle),
                series=tuple(
                    SweepSeries(
                        study_id=study.study_id,
                        series_id=study.series_id,
                        manifest_id=study.manifest_id(newer=study.newer and sweep.sees_newer),
                    )
                    for study in held
                ),
                files=FileCounts(found=2, in_series=1, ignored={"not DICOM": 1}),
                planned_at=NOW - timedelta(days=200),
            ),
        )
        for suffix in ("json", "html", "csv"):
            store.put(f"{keys.worklists(sweep.sweep_id)}{revision:08d}.{suffix}", b"{}")
        store.put(f"{keys.named_worklists(sweep.sweep_id)}{revision:08d}.html", b"names")
    if sweep.closed:
        closing = SweepClosing(sweep_id=sweep.sweep_id, revision=1, closed_at=NOW - timedelta(days=199), pending=0)
        write_record(store, keys.revision(keys.sweep_closed(sweep.sweep_id), 1), closing)
        store.put(keys.sweep_closing_told(sweep.sweep_id, 1), b"")


def written(folder: Path, world: World, *, oldest_days: int = 100) -> FolderStore:
    """The world in a store, every object with an age of its own."""
    store = FolderStore(folder)
    for study in world.studies:
        write_study(store, study)
    for sweep in world.sweeps:
        write_sweep(store, sweep, world.studies)
    store.put(keys.PSEUDONYM_FINGERPRINT, b"{}")
    store.put("something/of-a-newer-version", b"")
    store.put(keys.inbox_file(an_id("whole"), 0), b"file")
    store.put(keys.inbox_submission(an_id("whole")), b"{}")
    store.put(keys.inbox_file(an_id("half"), 0), b"file")
    chance = random.Random(world.seed)
    for key in store.keys(""):
        age(store, key, days=chance.uniform(1.01, oldest_days))
    return store


def age(store: FolderStore, key: str, *, days: float) -> None:
    at = (NOW - timedelta(days=days)).timestamp()
    os.utime(store.root / key, (at, at))


def ledgers(store: FolderStore) -> dict[str, Ledger | None]:
    return {sweep_id: sweep_ledger(store, sweep_id) for sweep_id in sweeps(store)}


def objects_of(store: FolderStore, study_id: str) -> dict[str, bytes]:
    """All that names a study, its series or its cases (the mark of a sweep is the sweep's)."""
    number = study_id[len(b"study".hex()) :][:2]
    ids = tuple(kind.encode().hex() + number for kind in ("study", "series", "case"))
    found = (key for key in store.keys("") if not key.startswith(keys.SWEEPS_OF_STUDY))
    return {key: store.get(key) for key in found if any(name in key for name in ids)}


CASES = st.integers(1, 2)


@st.composite
def studies(draw: st.DrawFn, number: int) -> Study:
    count = draw(CASES)
    outcome = st.sampled_from(OUTCOMES)
    return Study(
        number=number,
        outcomes=(
            tuple(draw(st.lists(outcome, min_size=count, max_size=count))),
            tuple(draw(st.lists(outcome, min_size=count, max_size=count))),
        ),
        reported=(draw(st.integers(0, 3)) > 0, draw(st.integers(0, 3)) > 0),
        newer=draw(st.booleans()),
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    count = draw(st.integers(1, 3))
    found = tuple(draw(studies(number)) for number in range(1, count + 1))
    sweep_count = draw(st.integers(0, 3))
    return World(
        studies=found,
        sweeps=tuple(
            Sweep(
                number=number,
                studies=draw(st.frozensets(st.integers(1, count), min_size=1)),
                bundle=draw(st.integers(0, 1)),
                planned=draw(st.integers(0, 4)) > 0,
                closed=draw(st.integers(0, 3)) > 0,
                sees_newer=draw(st.booleans()),
            )
            for number in range(1, sweep_count + 1)
        ),
        seed=draw(st.integers(0, 2**16)),
    )


DAYS = st.none() | st.integers(1, 110).map(lambda days: timedelta(days=days))
AGES = st.builds(Ages, derived=DAYS, features=DAYS, results=DAYS, ledger=DAYS, identities=DAYS, inbox=DAYS)


@settings(max_examples=30, deadline=None)
@given(world=worlds(), ages=AGES | st.just(EVERYTHING))
def test_whatever_the_ages_the_ledgers_that_are_left_are_unchanged_and_nothing_under_way_is_touched(
    tmp_path_factory: pytest.TempPathFactory, world: World, ages: Ages
) -> None:
    store = written(tmp_path_factory.mktemp("world") / "store", world)
    before, all_keys = ledgers(store), set(store.keys(""))
    under_way = {study_id: objects_of(store, study_id) for study_id in world.studies_under_way()}

    collected = collect(store, decisions(store, ages=ages, now=NOW))

    after = ledgers(store)
    assert collected.left == ()
    assert all(after[sweep_id] == before[sweep_id] for sweep_id in after)
    assert all(ledger is None or ledger.exact for ledger in after.values())
    assert {study_id: objects_of(store, study_id) for study_id in under_way} == under_way
    gone = all_keys - set(store.keys(""))
    for sweep_id in before.keys() - after.keys():
        assert not [key for key in store.keys("") if sweep_id in key and not key.startswith("identities/")]
    assert not [key for key in gone if key.startswith(("site/", "something/")) or an_id("whole") in key]
    assert not [key for key in gone if key.endswith(".nrrd")] or ages.derived is not None
    assert not [key for key in gone if key.startswith(("plans/", "outcomes/", "sweeps"))] or ages.unit is not None
    # a report that only a sweep of tonight counted goes with the next run; then there is nothing more
    second = collect(store, decisions(store, ages=ages, now=NOW)).deleted
    assert [one.key for one in second if not one.key.startswith(("reports/", "named/reports/"))] == []
    assert collect(store, decisions(store, ages=ages, now=NOW)).deleted == ()


class Stopped(Exception):
    pass


class BreakingStore(FolderStore):
    """A folder store whose process is killed at a deletion."""

    deletions = 0

    def delete(self, key: str) -> None:
        if self.deletions == 0:
            raise Stopped
        self.deletions -= 1
        super().delete(key)


@settings(max_examples=20, deadline=None)
@given(world=worlds(), ages=AGES | st.just(EVERYTHING), stops_after=st.integers(0, 60))
def test_a_collector_that_is_killed_leaves_exact_ledgers_and_the_next_one_ends_where_it_would_have(
    tmp_path_factory: pytest.TempPathFactory, world: World, ages: Ages, stops_after: int
) -> None:
    folder = tmp_path_factory.mktemp("world")
    undisturbed = written(folder / "undisturbed", world)
    for _ in range(2):
        collect(undisturbed, decisions(undisturbed, ages=ages, now=NOW))
    written(folder / "killed", world)
    store = BreakingStore(folder / "killed")
    before = ledgers(store)
    store.deletions = stops_after

    with suppress(Stopped):
        collect(store, decisions(store, ages=ages, now=NOW))

    left = {sweep_id: ledger for sweep_id, ledger in ledgers(store).items() if ledger is not None}
    assert all(ledger == before[sweep_id] for sweep_id, ledger in left.items())
    store.deletions = -1
    for _ in range(2):
        collect(store, decisions(store, ages=ages, now=NOW))
    assert list(store.keys("")) == list(undisturbed.keys(""))


ONE = Study(number=1, outcomes=(("classified",), ("classified",)), reported=(True, True), newer=False)


def done(number: int, **more: object) -> Sweep:
    values: dict[str, object] = {
        "number": number, "studies": frozenset({1}), "bundle": 0, "planned": True, "closed": True, "sees_newer": True
    }  # fmt: skip
    return Sweep(**{**values, **more})  # type: ignore[arg-type]


def world_of(*sweeps_of_it: Sweep, study: Study = ONE) -> World:
    return World(studies=(study,), sweeps=sweeps_of_it, seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_of_a_world_that_is_over_nothing_is_left_but_what_is_not_ours_to_delete(folder: Path) -> None:
    store = written(folder, world_of(done(1)))

    collect(store, decisions(store, ages=EVERYTHING, now=NOW))

    assert list(store.keys("")) == [
        *sorted((keys.inbox_file(an_id("whole"), 0), keys.inbox_submission(an_id("whole")))),
        keys.PSEUDONYM_FINGERPRINT,
        "something/of-a-newer-version",
    ]


def test_a_study_that_a_younger_sweep_holds_stays_whole_when_the_older_sweep_goes(folder: Path) -> None:
    store = written(folder, world_of(done(1), done(2)), oldest_days=2)
    for key in list(store.keys("")):
        age(store, key, days=10 if an_id("sweep", 2) in key else 90)
    ages = Ages(results=timedelta(days=30), ledger=timedelta(days=30))
    before = sweep_ledger(store, an_id("sweep", 2))

    collect(store, decisions(store, ages=ages, now=NOW))

    assert list(sweeps(store)) == [an_id("sweep", 2)]
    assert sweep_ledger(store, an_id("sweep", 2)) == before
    assert not list(store.keys(keys.worklists(an_id("sweep", 1))))


def test_a_result_that_a_ledger_counts_outlives_its_own_age(folder: Path) -> None:
    store = written(folder, world_of(done(1)))

    collect(store, decisions(store, ages=Ages(results=timedelta(days=1)), now=NOW))

    ledger = sweep_ledger(store, an_id("sweep", 1))
    assert ledger is not None
    assert ledger.cases.by_state["reported"] == 1
    assert not store.exists(keys.report(ONE.study_id, an_id("superseded"), "json"))
    assert not store.exists(keys.revision(keys.worklists(an_id("sweep", 1)), 1))
    assert store.exists(keys.revision(keys.worklists(an_id("sweep", 1)), 2))


def test_identities_go_at_their_own_age_and_the_ledger_stays(folder: Path) -> None:
    store = written(folder, world_of(done(1)))
    before = ledgers(store)

    collect(store, decisions(store, ages=Ages(identities=timedelta(days=1)), now=NOW))

    assert ledgers(store) == before
    assert not list(store.keys("identities/"))
    assert not list(store.keys("named/"))


@pytest.mark.parametrize(
    ("sweep", "study", "why"),
    [
        (done(1, closed=False), ONE, "it is open"),
        (done(1, planned=False), ONE, "no plan yet"),
        (done(1), Study(number=1, outcomes=(("",), ("",)), reported=(True, True), newer=False), "pending"),
        (done(1), Study(number=1, outcomes=(("classified",), ("",)), reported=(False, True), newer=False), "pending"),
    ],
)
def test_what_is_under_way_is_explained(folder: Path, sweep: Sweep, study: Study, why: str) -> None:
    store = written(folder, world_of(sweep, study=study))

    decision = explained(store, keys.volume(study.series_id, an_id("image", 1)), ages=EVERYTHING, now=NOW)

    assert not decision.delete
    assert decision.reason == "its study is under way"
    assert why in decision.detail


def test_a_study_that_was_written_to_today_is_left_alone(folder: Path) -> None:
    store = written(folder, world_of(done(1)))
    age(store, keys.revision(keys.study_plans(ONE.study_id), 1), days=0.1)

    decision = explained(store, keys.volume(ONE.series_id, an_id("image", 1)), ages=EVERYTHING, now=NOW)

    assert (decision.delete, decision.reason) == (False, "something of its study was written within a day")


def test_a_key_that_is_not_there_is_one_sentence(folder: Path) -> None:
    store = written(folder, world_of(done(1)))

    with pytest.raises(FractureSweepError, match="no object lies under this key"):
        explained(store, "volumes/nothing", ages=EVERYTHING, now=NOW)


def test_a_sweep_that_begins_between_the_decision_and_the_deletion_keeps_its_study(folder: Path) -> None:
    store = written(folder, world_of(done(1)))
    decided = list(decisions(store, ages=EVERYTHING, now=NOW))
    before = objects_of(store, ONE.study_id)
    store.put(keys.sweep_of_study(ONE.study_id, an_id("sweep", 9)), b"")

    collected = collect(store, decided)

    assert (
        ("study", ONE.study_id),
        f"sweep {an_id('sweep', 9)[:12]}: it was begun and has no plan yet",
    ) in collected.left
    kept = objects_of(store, ONE.study_id)
    assert kept == before
    assert not list(store.keys(keys.sweep_plans(an_id("sweep", 1))))


def test_a_half_upload_that_somebody_goes_on_with_is_left(folder: Path) -> None:
    store = written(folder, world_of(done(1)))
    decided = list(decisions(store, ages=EVERYTHING, now=NOW))
    store.put(keys.inbox_file(an_id("half"), 1), b"the next file")

    collect(store, decided)

    assert store.exists(keys.inbox_file(an_id("half"), 0))


def test_a_letter_that_can_be_replayed_stays_with_its_study(folder: Path) -> None:
    study = Study(number=1, outcomes=(("dead-lettered",), ("dead-lettered",)), reported=(True, True), newer=False)
    store = written(folder, world_of(done(1), study=study))
    letters = list(store.keys(keys.DEAD_LETTERS))

    collect(store, decisions(store, ages=Ages(ledger=timedelta(days=1)), now=NOW))

    assert list(store.keys(keys.DEAD_LETTERS)) == letters
    assert explained(store, letters[0], ages=Ages(ledger=timedelta(days=1)), now=NOW).reason.startswith(
        "its study is kept"
    )


def test_a_letter_about_no_study_goes_at_the_age_of_the_ledger(folder: Path) -> None:
    store = written(folder, world_of(done(1)))
    record_dead_letter(store, queue="worklist", envelope=None, body=b"not JSON", death="", delivery_count=1)
    for key in store.keys(keys.DEAD_LETTERS):
        age(store, key, days=50)

    collect(store, decisions(store, ages=Ages(ledger=timedelta(days=40)), now=NOW))

    assert not list(store.keys(keys.DEAD_LETTERS))


class ListingOnce(FolderStore):
    """A folder store that counts how many records were read."""

    read = 0

    def get(self, key: str) -> bytes:
        type(self).read += key.startswith(("outcomes/", "reports/"))
        return super().get(key)


def test_where_nothing_is_old_no_outcome_is_read(folder: Path) -> None:
    written(folder, world_of(done(1)), oldest_days=20)
    store = ListingOnce(folder)

    found: Iterator[object] = decisions(store, ages=Ages(derived=timedelta(days=30)), now=NOW)

    assert all(not decision.delete for decision in found)  # type: ignore[attr-defined]
    assert store.read == 0
