"""What was given up is kept with its reason, can be published again, and is left alone once it is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.composition import bundle_of
from services.embedded import pipeline
from shared.records.dead_letters import letters, matching, replay, replays
from shared.records.ledger import sweep_ledger
from tests.fixtures.runs import place

pytestmark = pytest.mark.timeout(300)


def test_cases_over_their_budget_are_dead_lettered_and_replayed_once_it_is_raised(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    hasty = place(tmp_path / "store", tiny_bundle, radiomics_extractor__case_seconds="0.001")
    ran = hasty.run(phantom_archive)
    given_up = list(letters(hasty.store))
    cases = ran.ledger.cases

    assert ran.ledger.exact
    assert cases.by_state["dead-lettered"] == cases.found
    assert {letter.kind for letter in given_up} == {"over-budget"}
    assert ran.ledger.reports == ran.ledger.studies

    patient = place(tmp_path / "store", tiny_bundle)
    with pipeline(settings=patient.settings, store=patient.store, bundle=bundle_of(patient.settings)) as running:
        first = [replay(patient.store, running.broker, letter) for letter in given_up]
        running.wait_until_idle()
        second = [replay(patient.store, running.broker, letter) for letter in given_up]
        running.wait_until_idle()

    ledger = sweep_ledger(patient.store, ran.sweep_id)
    assert ledger is not None
    assert set(first) == {"replayed"}
    assert set(second) == {"done since"}
    assert ledger.cases.by_state["reported"] == cases.found
    assert ledger.cases.by_state["dead-lettered"] == 0
    assert [replays(patient.store, letter) for letter in given_up] == [1] * len(given_up)


def test_dead_letters_are_chosen_by_queue_kind_and_reason(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    hasty = place(tmp_path / "store", tiny_bundle, radiomics_extractor__case_seconds="0.001")
    hasty.run(phantom_archive)
    everything = list(letters(hasty.store))

    assert list(matching(everything, queue="radiomics-extractor", kind="over-budget")) == everything
    assert list(matching(everything, queue="resampler")) == []
    assert list(matching(everything, reason="no such reason")) == []
