"""The planner alone: data in, decisions out."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime, timedelta

import pytest

from shared.fracture import keys
from shared.pipeline.store import Entry
from shared.records.retention import (
    Ages,
    Belongings,
    Decision,
    Letter,
    Standing,
    due,
    in_order,
    place_of,
    plan,
    survey,
)

NOW = datetime(2027, 1, 1, tzinfo=UTC)
STUDY, SERIES, CASE, SWEEP, OTHER = "1" * 64, "2" * 64, "3" * 64, "4" * 64, "5" * 64
HERE = Belongings(
    study_of_series={SERIES: STUDY}, study_of_case={CASE: STUDY}, sweeps_of_study={STUDY: frozenset({SWEEP})}
)
PLAN, SWEEP_PLAN = f"plans/studies/{STUDY}/00000001.json", f"sweeps/{SWEEP}/plan/00000001.json"


def days(number: float) -> timedelta:
    return timedelta(days=number)


def decided(
    entries: dict[str, float], *, ages: Ages, belongings: Belongings = HERE, standing: Standing | None = None
) -> dict[str, Decision]:
    """Decisions by key about objects of these ages in days."""
    listed = [Entry(key, 10, NOW - days(entries[key])) for key in sorted(entries)]
    made = plan(
        lambda: listed,
        belongings=belongings,
        surveyed=survey(listed, belongings),
        standing=standing or Standing(reports_that_count={STUDY: frozenset({"current"})}),
        ages=ages,
        now=NOW,
    )
    return {decision.key: decision for decision in made}


ARGUMENTS = {
    "revision": 3,
    "kind": "classified", "suffix": "json", "number": 7, "prefix": "plans/studies/x/", "scope": "f" * 64
}  # fmt: skip


def test_every_kind_of_key_has_a_class() -> None:
    made = []
    for name, function in inspect.getmembers(keys, inspect.isfunction):
        wanted = {part: ARGUMENTS.get(part, "e" * 64) for part in inspect.signature(function).parameters}
        key = function(**wanted)
        made.append((name, key if not key.endswith("/") else keys.revision(key, 3)))

    assert [name for name, key in made if place_of(key).name == "fixed"] == []
    assert len({place_of(key).rank for _, key in made}) > 15
    assert place_of(keys.PSEUDONYM_FINGERPRINT).name == "fixed"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (keys.volume(SERIES, OTHER), "derived"),
        (keys.volume_record(SERIES, OTHER), "ledger"),
        (keys.mask(SERIES, OTHER), "derived"),
        (keys.body_mask(SERIES, OTHER), "derived"),
        (keys.mask_record(SERIES, OTHER), "ledger"),
        (keys.spine(SERIES, OTHER), "ledger"),
        (keys.spine_picture(SERIES, OTHER, "coronal"), "derived"),
        (keys.case_image(OTHER, CASE), "derived"),
        (keys.case_record(OTHER, CASE), "results"),
        (keys.hcr_features(OTHER, CASE), "features"),
        (keys.series_rejected(SERIES, OTHER), "ledger"),
        (keys.named_report(STUDY, OTHER, "html"), "identities"),
        (keys.inbox_file(OTHER, 0), "inbox"),
        ("volumes/x", "fixed"),
        ("new-prefix/x.json", "fixed"),
    ],
)
def test_a_key_is_of_the_class_that_the_documentation_says(key: str, name: str) -> None:
    assert place_of(key).name == name


def test_without_ages_everything_is_kept_for_ever() -> None:
    entries = dict.fromkeys((keys.volume(SERIES, OTHER), keys.hcr_features(OTHER, CASE), PLAN, SWEEP_PLAN), 9000.0)

    found = decided(entries, ages=Ages())

    assert not any(decision.delete for decision in found.values())
    assert all("kept for ever" in decision.reason for decision in found.values())


def test_a_derived_volume_goes_at_its_age_and_says_by_which_setting() -> None:
    old, young = keys.volume(SERIES, OTHER), keys.case_image(OTHER, CASE)

    found = decided({old: 31, young: 29}, ages=Ages(derived=days(30)))

    assert (found[old].delete, found[young].delete) == (True, False)
    assert found[old].reason.startswith("older than retention.derived_days = 30")
    assert found[young].reason == "younger than retention.derived_days = 30"


def test_what_is_under_way_stays_whatever_its_age() -> None:
    standing = Standing(studies_under_way={STUDY: "sweep x: open"}, sweeps_under_way={SWEEP: "open"})
    entries = dict.fromkeys((keys.volume(SERIES, OTHER), keys.study_identity(STUDY, OTHER), PLAN, SWEEP_PLAN), 9000.0)
    all_ages = Ages(derived=days(1), results=days(1), ledger=days(1), identities=days(1))

    found = decided(entries, ages=all_ages, standing=standing)

    assert not any(decision.delete for decision in found.values())
    assert {decision.detail for decision in found.values()} == {"sweep x: open", "open"}


def test_a_ledger_goes_as_a_unit_when_the_youngest_of_it_and_both_ages_have_passed() -> None:
    outcome = keys.outcome("classified", OTHER, CASE)
    entries = {PLAN: 100, outcome: 100, SWEEP_PLAN: 100}

    for results, ledger, youngest, goes in ((50, 80, 100, True), (50, 120, 100, False), (50, 80, 70, False)):
        found = decided({**entries, outcome: youngest}, ages=Ages(results=days(results), ledger=days(ledger)))

        assert {found[PLAN].delete, found[outcome].delete} == {goes}


def test_a_study_stays_while_a_sweep_that_stays_holds_it() -> None:
    found = decided({PLAN: 100, SWEEP_PLAN: 10}, ages=Ages(results=days(50), ledger=days(50)))

    assert not found[PLAN].delete
    assert found[PLAN].reason.startswith("a sweep that is kept holds it")
    assert found[PLAN].detail == f"sweeps {SWEEP[:12]}"


def test_only_a_report_that_no_ledger_counts_goes_at_the_age_of_results() -> None:
    current, older = keys.report(STUDY, "current", "json"), keys.report(STUDY, "older", "json")

    found = decided({current: 100, older: 100, PLAN: 100}, ages=Ages(results=days(50)))

    assert (found[current].delete, found[older].delete) == (False, True)


def test_no_report_of_a_study_that_was_not_looked_at_is_taken_for_superseded() -> None:
    report = keys.report(STUDY, "older", "json")

    assert not decided({report: 100}, ages=Ages(results=days(50)), standing=Standing())[report].delete


def test_the_named_copy_of_a_worklist_goes_with_its_sweep() -> None:
    named, listed = f"{keys.named_worklists(SWEEP)}00000001.html", f"{keys.worklists(SWEEP)}00000001.html"
    identity = keys.sweep_identity(SWEEP)

    found = decided(
        dict.fromkeys((named, listed, identity, SWEEP_PLAN), 100), ages=Ages(results=days(9), ledger=days(9))
    )

    assert (found[named].delete, found[listed].delete, found[identity].delete) == (True, True, False)


def test_a_complete_submission_is_under_way_and_a_half_one_is_not() -> None:
    whole, half = keys.inbox_file("a" * 64, 0), keys.inbox_file("b" * 64, 0)

    found = decided({whole: 99, keys.inbox_submission("a" * 64): 99, half: 99}, ages=Ages(inbox=days(30)))

    assert (found[whole].delete, found[half].delete) == (False, True)


def test_a_half_upload_is_as_old_as_its_youngest_file() -> None:
    first, last = keys.inbox_file("b" * 64, 0), keys.inbox_file("b" * 64, 1)

    found = decided({first: 99, last: 2}, ages=Ages(inbox=days(30)))

    assert not found[first].delete


def test_a_letter_whose_work_was_done_since_goes_at_the_age_of_the_ledger() -> None:
    key = keys.dead_letter("7" * 64)

    for done in (True, False):
        standing = Standing(letters={"7" * 64: Letter(study_id=STUDY, done=done)})
        found = decided({key: 100, PLAN: 100}, ages=Ages(ledger=days(50)), standing=standing)

        assert found[key].delete is done


def test_what_belongs_to_nothing_any_more_goes_at_its_own_age() -> None:
    orphans = (keys.volume(OTHER, OTHER), keys.hcr_features(OTHER, OTHER), keys.outcome("rejected", OTHER, OTHER))

    found = decided(dict.fromkeys(orphans, 100), ages=Ages(derived=days(50), results=days(50)))

    assert [found[key].delete for key in orphans] == [True, False, True]


def test_whole_sweeps_go_before_studies_and_a_plan_goes_last_of_its_study() -> None:
    mask, image = keys.case_mask(OTHER, CASE), keys.case_image(OTHER, CASE)
    outcome, mark = keys.outcome("classified", OTHER, CASE), keys.sweep_of_study(STUDY, SWEEP)
    entries = dict.fromkeys((PLAN, mask, image, outcome, mark, SWEEP_PLAN), 100.0)

    found = decided(entries, ages=Ages(derived=days(1), results=days(1), ledger=days(1)))

    assert [one.key for one in in_order(found.values())] == [mark, SWEEP_PLAN, mask, image, outcome, PLAN]


def test_only_what_has_something_old_has_to_be_looked_at() -> None:
    listed = [Entry(keys.volume(SERIES, OTHER), 1, NOW - days(40)), Entry(SWEEP_PLAN, 1, NOW - days(40))]

    sweeps, studies, letters = due(listed, belongings=HERE, ages=Ages(derived=days(30)), now=NOW)

    assert (sweeps, studies, letters) == (frozenset(), frozenset({STUDY}), frozenset())
