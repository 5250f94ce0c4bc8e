"""Where a dead letter stands is read from the store: what wants somebody, and what is best left alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shared.fracture import keys
from shared.fracture.messages import (
    CaseDeadLettered,
    CaseReady,
    Fact,
    FractureClassified,
    MasksReady,
    ReportWritten,
    SeriesDeadLettered,
    SeriesStored,
    StudyRejected,
    SweepClosed,
    SweepPlanned,
)
from shared.fracture.protocol import Protocols
from shared.fracture.records import (
    Classified,
    Demographics,
    FileCounts,
    PlannedCase,
    PlannedSeries,
    SeriesPlan,
    StudyPlan,
    SweepClosing,
    SweepPlan,
    SweepSeries,
)
from shared.pipeline.envelope import Envelope, Failure
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.failures import KINDS, WHAT_TO_DO
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.memory_broker import MemoryBroker
from shared.records.archive import write_record, write_revision
from shared.records.dead_letters import Filter, Standing, Survey, moment, replay
from shared.records.ledger import study_state, sweep_ledger
from shared.records.outcomes import record_dead_letter

NOW = datetime(2026, 11, 27, 3, 0, tzinfo=UTC)
STUDY, SERIES, CASE, OTHER_CASE = "5a" * 32, "5b" * 32, "ca" * 32, "cb" * 32
MANIFEST, LATER_MANIFEST, SWEEP, HASH = "11" * 32, "22" * 32, "77" * 32, "00" * 32
PROTOCOLS = Protocols(crop_hash=HASH, hcr_hash=HASH, dtl_hash=HASH, bundle_id="d0" * 32)
OF_CASE = {"study_id": STUDY, "series_id": SERIES, "case_id": CASE, "protocols": PROTOCOLS}
OF_SERIES = {"study_id": STUDY, "series_id": SERIES, "manifest_id": MANIFEST, "protocols": PROTOCOLS}
READY = CaseReady(**OF_CASE)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def broker() -> MemoryBroker:
    broker = MemoryBroker()
    broker.declare({"deep-extractor": ("CaseReady",), "report-generator": (), "worklist": (), "resampler": ()})
    return broker


def plan(store: FolderStore, *, manifest_id: str = MANIFEST) -> None:
    series = PlannedSeries(series_id=SERIES, manifest_id=manifest_id, modality="CT", instances=9)
    write_revision(
        store,
        keys.study_plans(STUDY),
        StudyPlan,
        lambda number, last: StudyPlan(study_id=STUDY, revision=number, demographics=Demographics(), series=(series,)),
    )


def plan_cases(store: FolderStore, *case_ids: str) -> None:
    cases = tuple(PlannedCase(case_id=case_id, level=f"L{n}") for n, case_id in enumerate(case_ids, start=1))
    write_revision(
        store,
        keys.series_plans(SERIES),
        SeriesPlan,
        lambda number, last: SeriesPlan(
            study_id=STUDY, series_id=SERIES, manifest_id=MANIFEST, mask_hash=HASH, revision=number, cases=cases
        ),
    )


def give_up(store: FolderStore, fact: Fact, *, queue: str = "deep-extractor", kind: str = "bug") -> Envelope:
    envelope = Envelope.of(fact).failed(Failure(kind=kind, reason=f"a {kind}"))
    record(store, envelope, queue=queue)
    return envelope


def record(store: FolderStore, envelope: Envelope | None, *, queue: str = "deep-extractor", body: bytes = b"") -> None:
    data = body if envelope is None else envelope.to_bytes()
    list(record_dead_letter(store, queue=queue, envelope=envelope, body=data, death="", delivery_count=0))


def classify(store: FolderStore, case_id: str = CASE) -> None:
    result = Classified(
        case_id=case_id, study_id=STUDY, series_id=SERIES, level="L1", protocols=PROTOCOLS, classification={}
    )
    write_record(store, keys.outcome("classified", PROTOCOLS.scope, case_id), result)


def report(store: FolderStore) -> str:
    state = study_state(store, STUDY, PROTOCOLS.scope)
    assert state is not None
    store.put(keys.report(STUDY, state.report_id, "json"), b"{}")
    return state.report_id


def only(store: FolderStore) -> Standing:
    (standing,) = Survey(store).matching()
    return standing


def test_a_case_that_was_given_up_is_open_though_its_report_says_so(store: FolderStore) -> None:
    plan(store)
    plan_cases(store, CASE)
    give_up(store, READY)
    report(store)

    assert only(store).state == "open"


def test_a_case_is_done_when_the_report_that_shows_its_result_is_there(store: FolderStore) -> None:
    plan(store)
    plan_cases(store, CASE)
    give_up(store, READY)

    classify(store)
    before = only(store).state
    report(store)

    assert (before, only(store).state) == ("open", "done since")


def test_a_case_that_was_superseded_is_nobodys_any_more(store: FolderStore, broker: MemoryBroker) -> None:
    plan(store)
    plan_cases(store, CASE)
    give_up(store, READY)
    plan(store, manifest_id=LATER_MANIFEST)

    standing = only(store)

    assert standing.state == "superseded"
    assert replay(store, broker, standing) == "superseded"
    assert broker.idle()


def test_a_case_whose_series_returns_to_its_state_is_open_again(store: FolderStore) -> None:
    plan(store)
    plan_cases(store, CASE)
    give_up(store, READY)
    plan(store, manifest_id=LATER_MANIFEST)

    plan(store)

    assert only(store).state == "open"


def test_a_series_of_a_manifest_that_a_newer_one_replaced_is_superseded(store: FolderStore) -> None:
    plan(store)
    give_up(store, SeriesStored(**OF_SERIES))

    plan(store, manifest_id=LATER_MANIFEST)

    assert only(store).state == "superseded"


def test_a_series_given_up_half_way_is_open_while_a_case_is_left_to_its_dead_letter(store: FolderStore) -> None:
    """Found here: it counted as done, because the series had a plan and the study a report."""
    plan(store)
    plan_cases(store, CASE, OTHER_CASE)
    classify(store)
    give_up(store, MasksReady(**OF_SERIES, mask_hash=HASH), queue="resampler")
    report(store)
    half_way = only(store).state

    classify(store, OTHER_CASE)
    report(store)

    assert (half_way, only(store).state) == ("open", "done since")


@pytest.mark.parametrize(
    "fact",
    [
        CaseDeadLettered(**OF_CASE),
        SeriesDeadLettered(**OF_SERIES),
        StudyRejected(study_id=STUDY, protocols=PROTOCOLS),
    ],
)
def test_news_of_a_study_is_done_when_the_report_of_its_state_is_there(store: FolderStore, fact: Fact) -> None:
    plan(store)
    plan_cases(store, CASE)
    give_up(store, fact, queue="report-generator")
    before = only(store).state

    report(store)

    assert (before, only(store).state) == ("open", "done since")


def sweep(store: FolderStore) -> None:
    write_record(
        store,
        keys.revision(keys.sweep_plans(SWEEP), 1),
        SweepPlan(
            sweep_id=SWEEP,
            revision=1,
            protocols=PROTOCOLS,
            series=(SweepSeries(study_id=STUDY, series_id=SERIES, manifest_id=MANIFEST),),
            files=FileCounts(),
            planned_at=NOW,
        ),
    )
    store.put(keys.sweep_of_study(STUDY, SWEEP), b"")


def show(store: FolderStore, *, number: int, closed: bool, reports: dict[str, str]) -> None:
    """A worklist revision, as far as it is looked at."""
    ledger = sweep_ledger(store, SWEEP)
    assert ledger is not None
    shown = {"closed": closed, "reports": reports, "ledger": ledger.as_json(), "rows": []}
    store.put(keys.revision(keys.worklists(SWEEP), number), json.dumps(shown).encode())


@pytest.mark.parametrize("fact", [SweepPlanned(sweep_id=SWEEP), SweepClosed(sweep_id=SWEEP)])
def test_news_of_a_sweep_is_done_when_its_worklist_shows_it_as_it_is(store: FolderStore, fact: Fact) -> None:
    plan(store)
    plan_cases(store, CASE)
    sweep(store)
    give_up(store, fact, queue="worklist")
    show(store, number=1, closed=False, reports={})
    shown = only(store).state

    classify(store)
    report(store)
    closing = SweepClosing(sweep_id=SWEEP, revision=1, closed_at=NOW, pending=0)
    write_record(store, keys.revision(keys.sweep_closed(SWEEP), 1), closing)
    behind = only(store).state
    show(store, number=2, closed=True, reports={})

    assert (shown, behind, only(store).state) == ("done since", "open", "done since")


def test_a_report_is_done_when_the_worklists_of_its_sweeps_show_the_newest_one(store: FolderStore) -> None:
    plan(store)
    plan_cases(store, CASE)
    classify(store)
    sweep(store)
    written = report(store)
    give_up(store, ReportWritten(study_id=STUDY, protocols=PROTOCOLS, report_id=written), queue="worklist")
    show(store, number=1, closed=False, reports={})
    before = only(store).state

    show(store, number=2, closed=True, reports={STUDY: written})

    assert (before, only(store).state) == ("open", "done since")


def test_a_replay_given_up_again_is_stood_for_by_the_newer_letter(store: FolderStore, broker: MemoryBroker) -> None:
    plan(store)
    plan_cases(store, CASE)
    give_up(store, READY)
    replay(store, broker, only(store))
    replayed = only(store)
    again = broker.subscribe("deep-extractor", prefetch=1).receive(1)
    assert again is not None

    record(store, Envelope.from_bytes(again.body).again().failed(Failure(kind="over-budget", reason="slow")))

    old, new = Survey(store).matching()
    assert replayed.state == "replayed"
    assert (old.state, new.state) == ("given up again", "open")
    assert old.again == new.letter.dead_letter_id
    assert old.letter.message_id in new.letter.parents
    assert replay(store, broker, old) == "given up again"


def test_a_replay_begins_at_the_first_attempt_without_the_failure(store: FolderStore, broker: MemoryBroker) -> None:
    plan(store)
    plan_cases(store, CASE)
    record(store, Envelope.of(READY).again().again().failed(Failure(kind="bug", reason="odd", traceback="here")))

    assert replay(store, broker, only(store)) == "replayed"

    delivery = broker.subscribe("deep-extractor", prefetch=1).receive(1)
    assert delivery is not None
    envelope = Envelope.from_bytes(delivery.body)
    assert (envelope.attempt, envelope.failure) == (1, None)
    assert [one.message_id for one in only(store).replays] == [envelope.message_id]


def test_what_is_no_message_cannot_be_replayed(store: FolderStore, broker: MemoryBroker) -> None:
    record(store, None, body=b"\xff no JSON")

    standing = only(store)

    assert (standing.state, standing.letter.kind) == ("not readable", "unreadable")
    assert replay(store, broker, standing) == "not readable"


def test_an_envelope_of_a_newer_version_is_recorded_as_that(store: FolderStore) -> None:
    record(store, None, body=b'{"schema_version": 2, "fact": {}}')

    assert only(store).letter.kind == "newer-schema"


def test_a_message_of_a_newer_version_is_open_and_found_by_its_ids(store: FolderStore) -> None:
    newer = Envelope.of(READY).model_copy(update={"fact_version": 2})
    record(store, newer.failed(Failure(kind="newer-schema", reason="newer")))

    (standing,) = Survey(store).matching(Filter(case=CASE[:8], study=STUDY[:3]))

    assert (standing.state, standing.ids["case_id"]) == ("open", CASE)


def test_letters_are_chosen_by_all_filters_at_once(store: FolderStore) -> None:
    give_up(store, READY, kind="over-budget")
    give_up(store, FractureClassified(**OF_CASE), queue="report-generator")
    survey = Survey(store)

    def kinds(**more: object) -> list[str]:
        return [one.letter.kind for one in survey.matching(Filter(**more))]  # type: ignore[arg-type]

    assert kinds() == ["over-budget", "bug"]
    assert kinds(queue="report-generator") == ["bug"]
    assert kinds(kind="over-budget") == ["over-budget"]
    assert kinds(reason="A BUG") == ["bug"]
    assert kinds(queue="report-generator", kind="over-budget") == []
    assert kinds(study=STUDY[:6].upper()) == ["over-budget", "bug"]
    assert kinds(study="00") == []
    assert kinds(since=datetime.now(UTC) + timedelta(hours=1)) == []
    assert [one.letter.kind for one in survey.matching(states=("replayed",))] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90m", NOW - timedelta(minutes=90)),
        ("12h", NOW - timedelta(hours=12)),
        ("7d", NOW - timedelta(days=7)),
        ("2026-11-23", datetime(2026, 11, 23, tzinfo=UTC)),
        ("2026-11-23T04:00", datetime(2026, 11, 23, 4, tzinfo=UTC)),
        ("2026-11-23T04:00+01:00", datetime(2026, 11, 23, 3, tzinfo=UTC)),
    ],
)
def test_a_time_is_an_age_or_a_date_in_utc(text: str, expected: datetime) -> None:
    assert moment(text, now=NOW) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "3", "-3d", "9999999d"])
def test_what_is_no_time_is_one_sentence(text: str) -> None:
    with pytest.raises(FractureSweepError, match="is no time: give an age"):
        moment(text, now=NOW)


def test_every_kind_says_what_to_do() -> None:
    assert set(WHAT_TO_DO) == set(KINDS)
