from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from shared.fracture import keys
from shared.fracture.messages import CaseDeadLettered, CaseReady, MasksReady, SweepClosed
from shared.fracture.protocol import Protocols
from shared.fracture.records import (
    Classified,
    DeadLetter,
    DeadLetterNote,
    Demographics,
    PlannedCase,
    PlannedSeries,
    SeriesPlan,
    StudyPlan,
)
from shared.pipeline.envelope import Envelope, Failure
from shared.pipeline.errors import FractureSweepError, NewerSchema
from shared.pipeline.folder_store import FolderStore
from shared.records.archive import newest, read_record, revisions, write_record, write_revision
from shared.records.ledger import case_outcome, study_state
from shared.records.outcomes import record_dead_letter, reject_case

A, B, C = "a" * 64, "b" * 64, "c" * 64
PROTOCOLS = Protocols(crop_hash=A, hcr_hash=B, dtl_hash=C, bundle_id="d" * 64)
FACT = CaseReady(study_id=A, series_id=B, case_id=C, protocols=PROTOCOLS)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def plan(number: int, last: StudyPlan | None) -> StudyPlan:
    return StudyPlan(
        study_id=A,
        revision=number,
        supersedes=None if last is None else last.revision,
        demographics=Demographics(),
        series=(),
    )


def test_a_revision_names_what_it_supersedes_and_overwrites_nothing(store: FolderStore) -> None:
    prefix = keys.study_plans(A)

    write_revision(store, prefix, StudyPlan, plan)
    write_revision(store, prefix, StudyPlan, plan)

    assert [(p.revision, p.supersedes) for p in revisions(store, prefix, StudyPlan)] == [(1, None), (2, 1)]
    assert newest(store, prefix, StudyPlan) == plan(2, plan(1, None))


def test_nothing_is_written_when_nothing_changed(store: FolderStore) -> None:
    prefix = keys.study_plans(A)
    write_revision(store, prefix, StudyPlan, plan)

    kept, new = write_revision(store, prefix, StudyPlan, lambda number, last: None)

    assert (kept.revision, new) == (1, False)


def test_writers_at_the_same_time_each_get_a_revision_of_their_own(store: FolderStore) -> None:
    prefix = keys.study_plans(A)
    threads = [threading.Thread(target=write_revision, args=(store, prefix, StudyPlan, plan)) for _ in range(12)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [p.revision for p in revisions(store, prefix, StudyPlan)] == list(range(1, 13))


def test_a_record_of_another_version_is_one_clear_sentence(store: FolderStore) -> None:
    store.put("plans/studies/x/00000001.json", b'{"schema_version": 1, "study_id": 7}')

    with pytest.raises(FractureSweepError, match="another version"):
        read_record(store, "plans/studies/x/00000001.json", StudyPlan)


@pytest.mark.parametrize(
    "record",
    [
        plan(1, None).model_copy(update={"schema_version": 2}).to_bytes(),
        json.dumps({**plan(1, None).model_dump(mode="json"), "priority": "high"}).encode(),
        json.dumps({**plan(1, None).model_dump(mode="json"), "schema_version": 2, "series": {}}).encode(),
    ],
    ids=["newer meaning", "unknown field", "newer shape"],
)
def test_a_record_of_a_newer_version_is_never_guessed_at(store: FolderStore, record: bytes) -> None:
    store.put("plans/studies/x/00000001.json", record)

    with pytest.raises(NewerSchema, match="newer version than this one's StudyPlan: upgrade"):
        read_record(store, "plans/studies/x/00000001.json", StudyPlan)


def test_a_rejected_case_is_recorded_before_it_is_told(store: FolderStore) -> None:
    told = reject_case(store, FACT, service="resampler", reasons=("two masks for L1",))

    found = case_outcome(store, PROTOCOLS.scope, told.case_id)
    assert found is not None
    assert found.reasons == ("two masks for L1",)  # type: ignore[union-attr]


def dead(store: FolderStore, envelope: Envelope | None, *, death: str = "", body: bytes = b"{}") -> list[object]:
    return list(
        record_dead_letter(
            store,
            queue="deep-extractor",
            envelope=envelope,
            body=body if envelope is None else envelope.to_bytes(),
            death=death,
            delivery_count=3,
        )
    )


def test_a_case_that_killed_its_worker_is_recorded_and_told(store: FolderStore) -> None:
    facts = dead(store, Envelope.of(FACT), death="delivery_limit")

    note = case_outcome(store, PROTOCOLS.scope, C)
    assert facts == [CaseDeadLettered(study_id=A, series_id=B, case_id=C, protocols=PROTOCOLS)]
    assert isinstance(note, DeadLetterNote)
    assert note.kind == "delivery-limit"


def test_the_same_dead_letter_twice_is_one_record(store: FolderStore) -> None:
    envelope = Envelope.of(FACT).failed(Failure(kind="bug", reason="KeyError", traceback="here"))

    dead(store, envelope)
    dead(store, envelope)

    letters = list(store.keys(keys.DEAD_LETTERS))
    assert len(letters) == 1
    assert read_record(store, letters[0], DeadLetter).traceback == "here"


def test_nothing_is_told_of_a_dead_letter_about_a_dead_letter(store: FolderStore) -> None:
    told = CaseDeadLettered(study_id=A, series_id=B, case_id=C, protocols=PROTOCOLS)

    assert dead(store, Envelope.of(told)) == []
    assert len(list(store.keys(keys.DEAD_LETTERS))) == 1


@pytest.mark.parametrize("envelope", [None, Envelope.of(SweepClosed(sweep_id=A))])
def test_a_dead_letter_about_no_case_is_kept_all_the_same(store: FolderStore, envelope: Envelope | None) -> None:
    assert dead(store, envelope, body=b"not even JSON") == []
    assert len(list(store.keys(keys.DEAD_LETTERS))) == 1


def test_a_case_that_was_dead_lettered_and_then_refused_counts_as_refused(store: FolderStore) -> None:
    dead(store, Envelope.of(FACT))
    reject_case(store, FACT, service="resampler", reasons=("empty",))

    assert not isinstance(case_outcome(store, PROTOCOLS.scope, C), DeadLetterNote)


def planned_study(store: FolderStore) -> None:
    series = PlannedSeries(series_id=B, manifest_id=A, modality="CT", instances=9)
    write_revision(
        store,
        keys.study_plans(A),
        StudyPlan,
        lambda number, last: StudyPlan(study_id=A, revision=number, demographics=Demographics(), series=(series,)),
    )
    write_revision(
        store,
        keys.series_plans(B),
        SeriesPlan,
        lambda number, last: SeriesPlan(
            study_id=A,
            series_id=B,
            manifest_id=A,
            mask_hash=A,
            revision=number,
            cases=(PlannedCase(case_id=C, level="L1"), PlannedCase(case_id=A, level="L2")),
        ),
    )


def test_the_rest_of_a_series_that_was_given_up_half_way_is_not_pending_for_ever(store: FolderStore) -> None:
    planned_study(store)
    reject_case(store, FACT, service="resampler", reasons=("empty",))
    given_up = MasksReady(study_id=A, series_id=B, manifest_id=A, mask_hash=A, protocols=PROTOCOLS)

    dead(store, Envelope.of(given_up), death="delivery_limit")

    state = study_state(store, A, PROTOCOLS.scope)
    assert state is not None
    assert state.complete
    assert [case.state(report_written=False) for case in state.cases] == ["rejected", "dead-lettered"]


def test_a_classified_case_whose_report_was_given_up_is_dead_lettered(store: FolderStore) -> None:
    planned_study(store)
    result = Classified(
        case_id=C, study_id=A, series_id=B, level="L1", protocols=PROTOCOLS, classification={"probability": 0.5}
    )
    write_record(store, keys.outcome("classified", PROTOCOLS.scope, C), result)

    dead(store, Envelope.of(FACT))

    state = study_state(store, A, PROTOCOLS.scope)
    assert state is not None
    assert [case.state(report_written=state.report_written) for case in state.cases] == ["dead-lettered", "pending"]
