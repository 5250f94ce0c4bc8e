from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from services.report_generator.reports import read_report
from services.report_generator.study_report import DEMONSTRATION, StudyReport, report_schema_bytes
from shared.fracture import keys
from shared.fracture.records import GIVEN_BASIS, Warned
from shared.pipeline.errors import NewerSchema
from shared.pipeline.store import Store
from shared.records.ledger import study_state
from tests.services.report_generator.sample import SampleBundle, SampleCase, SampleStudy, write_study

SCHEMA = Path(__file__).resolve().parents[3] / "docs" / "report.schema.json"

MIXED = SampleStudy(
    cases=(
        SampleCase(level="L3", score=-1.2),
        SampleCase(level="L1", score=1.1),
        SampleCase(level="T12", score=2.2, warnings=(Warned(code="spacing", sentence="slices of 2 mm"),)),
        SampleCase(level="S1", end="not-evaluated", reason="the method answers for T1 to L5, not for S1"),
        SampleCase(level="L4", end="rejected", reason="the picture is constant"),
        SampleCase(level="L5", end="dead-lettered", reason="its worker died"),
    )
)


def report_of(store: Store, study: SampleStudy, bundle: SampleBundle) -> StudyReport:
    write_study(store, study, bundle)
    state = study_state(store, study.study_id, bundle.protocols.scope)
    assert state is not None
    return read_report(store, state, bundle=bundle)


def test_the_published_schema_is_that_of_the_model() -> None:
    assert SCHEMA.read_bytes() == report_schema_bytes(), (
        "write docs/report.schema.json anew with services.report_generator.study_report.report_schema_bytes"
    )


def test_a_report_validates_against_the_published_schema(store: Store, bundle: SampleBundle) -> None:
    schema = json.loads(SCHEMA.read_bytes())
    report = report_of(store, MIXED, bundle)

    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(report.to_bytes()), schema, cls=jsonschema.Draft202012Validator)
    assert StudyReport.model_validate_json(report.to_bytes()) == report


def test_a_probability_without_its_basis_does_not_validate(store: Store, bundle: SampleBundle) -> None:
    schema = json.loads(SCHEMA.read_bytes())
    found = json.loads(report_of(store, MIXED, bundle).to_bytes())
    scored = next(case for case in found["cases"] if case["result"])

    del scored["result"]["fusion"]["fracture_basis"]

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema, cls=jsonschema.Draft202012Validator)


def _with_probability(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        own = [value] if "probability" in value else []
        return own + [found for key, item in value.items() if key != "reading" for found in _with_probability(item)]
    if isinstance(value, list):
        return [found for item in value for found in _with_probability(item)]
    return []


def test_the_basis_stands_beside_every_probability(store: Store, bundle: SampleBundle) -> None:
    report = report_of(store, MIXED, bundle)

    shown = _with_probability(json.loads(report.to_bytes()))

    assert len(shown) == 3 * 4
    assert all(found["fracture_basis"] == GIVEN_BASIS for found in shown)


def test_scored_vertebrae_stand_with_the_likeliest_acute_first_and_the_others_from_head_to_foot(
    store: Store, bundle: SampleBundle
) -> None:
    report = report_of(store, MIXED, bundle)

    assert [case.level for case in report.scored] == ["T12", "L1", "L3"]
    assert [case.level for case in report.not_scored] == ["L4", "L5", "S1"]


def test_what_was_not_scored_stands_with_its_state_its_reason_and_who_said_so(
    store: Store, bundle: SampleBundle
) -> None:
    report = report_of(store, MIXED, bundle)

    said = {case.level: (case.state, case.reasons[0], case.service) for case in report.not_scored}
    assert said["S1"] == ("not evaluated", "the method answers for T1 to L5, not for S1", "resampler")
    assert said["L4"] == ("rejected", "the picture is constant", "deep-extractor")
    assert said["L5"][0] == "dead-lettered"
    assert "its worker died" in said["L5"][1]
    assert report.counts["reported"] == 3
    assert sum(report.counts.values()) == 6


def test_a_series_left_out_stands_with_its_reason_and_the_used_one_with_its_notes(
    store: Store, bundle: SampleBundle
) -> None:
    report = report_of(store, MIXED, bundle)

    used, left_out = report.series
    assert used.state == "planned"
    assert used.notes == ("3 labels that are no vertebra were ignored",)
    assert left_out.state == "rejected"
    assert left_out.reasons == ("not an axial stack: a localiser",)


def test_without_an_age_the_fusion_stands_and_the_nomogram_says_why_it_is_absent(
    store: Store, bundle: SampleBundle
) -> None:
    report = report_of(store, SampleStudy(age=None), bundle)

    result = report.scored[0].result
    assert result is not None
    assert result.nomogram is None
    assert result.nomogram_absent == "the patient's age is not known"
    assert 0 < result.fusion.probability < 1


def test_a_report_of_a_demonstration_bundle_says_so(store: Store, bundle: SampleBundle) -> None:
    report = report_of(store, MIXED, bundle)

    assert report.demonstration == DEMONSTRATION
    assert "Research use only" in report.research_use


def test_a_result_of_another_bundle_is_not_shown_as_this_ones(store: Store, bundle: SampleBundle) -> None:
    write_study(store, MIXED, bundle)
    other = SampleBundle(manifest=bundle.manifest.model_copy(update={"bundle_id": "f" * 64}))
    state = study_state(store, MIXED.study_id, bundle.protocols.scope)
    assert state is not None

    with pytest.raises(ValueError, match="cannot be shown with bundle ffffffffffff"):
        read_report(store, state, bundle=other)


def test_a_result_shows_its_prediction_set_and_what_its_score_is(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(
        cases=(SampleCase(level="L1", prediction_set=(), score_kind="lasso", classifier="svm"), SampleCase(level="L2"))
    )
    schema = json.loads(SCHEMA.read_bytes())

    report = report_of(store, study, bundle)

    of = {case.level: case.result for case in report.scored}
    first, second = of["L1"], of["L2"]
    assert first is not None
    assert second is not None
    assert (first.prediction_set, first.indeterminate, first.score_kind, first.classifier) == ((), True, "lasso", "svm")
    assert (second.prediction_set, second.indeterminate, second.classifier) == (None, False, None)
    jsonschema.validate(json.loads(report.to_bytes()), schema, cls=jsonschema.Draft202012Validator)


def test_a_result_of_a_newer_version_waits_for_the_upgrade(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy()
    write_study(store, study, bundle)
    key = keys.outcome("classified", bundle.protocols.scope, study.case_id("L1"))
    record = json.loads(store.get(key))
    store.delete(key)
    record["classification"]["colour"] = "red"
    store.put(key, json.dumps(record).encode())
    state = study_state(store, study.study_id, bundle.protocols.scope)
    assert state is not None

    with pytest.raises(NewerSchema, match="upgrade the report-generator"):
        read_report(store, state, bundle=bundle)
