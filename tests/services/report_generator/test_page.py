from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.report_generator.export import export_sweep
from services.report_generator.page import PatientShown, study_page
from services.report_generator.reports import read_report, read_views
from services.report_generator.service import build
from services.report_generator.settings import ReportGeneratorSettings
from services.report_generator.study_report import DEMONSTRATION
from shared.fracture.bundle import ClassName
from shared.fracture.messages import SweepClosed
from shared.fracture.records import GIVEN_BASIS, Warned
from shared.pipeline.store import Store
from shared.records.ledger import study_state
from tests.services.report_generator.pages import Page
from tests.services.report_generator.sample import (
    SampleBundle,
    SampleCase,
    SampleStudy,
    fact_of,
    write_study,
    write_sweep,
)

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(1)>"


def page_of(store: Store, study: SampleStudy, bundle: SampleBundle, *, patient: PatientShown | None = None) -> str:
    write_study(store, study, bundle)
    state = study_state(store, study.study_id, bundle.protocols.scope)
    assert state is not None
    report = read_report(store, state, bundle=bundle)
    return study_page(report, views=read_views(store, report), patient=patient)


def hostile_study() -> SampleStudy:
    return SampleStudy(
        left_out=HOSTILE,
        description=HOSTILE,
        cases=(
            SampleCase(level="L1", warnings=(Warned(code="x", sentence=HOSTILE),)),
            SampleCase(level="L2", end="rejected", reason=HOSTILE),
            SampleCase(level=HOSTILE, end="not-evaluated", reason=HOSTILE, with_crop=False),
        ),
    )


def worklist_page_of(store: Store, study: SampleStudy, bundle: SampleBundle, out: Path) -> str:
    write_study(store, study, bundle)
    sweep_id = write_sweep(store, "night", [study], bundle, closed=True)
    service = build(store=store, bundle=bundle, settings=ReportGeneratorSettings())
    fact = fact_of(study, bundle)
    list(service.handlers[type(fact)](fact))
    list(service.handlers[SweepClosed](SweepClosed(sweep_id=sweep_id)))
    return export_sweep(store, sweep_id, out).worklist_html.read_text()


def test_the_report_asks_no_host_for_anything(store: Store, bundle: SampleBundle) -> None:
    html = page_of(store, SampleStudy(), bundle)

    page = Page(html)
    assert page.asked
    assert all(value.startswith(("data:image/png;base64,", "#")) for _, _, value in page.asked)
    assert not re.search(r"https?://|//[a-z]|url\(|@import", html)
    assert "script" not in page.elements
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_the_worklist_asks_no_host_for_anything(store: Store, bundle: SampleBundle, tmp_path: Path) -> None:
    html = worklist_page_of(store, SampleStudy(), bundle, tmp_path / "out")

    page = Page(html)
    assert [value for _, _, value in page.asked if value.startswith("reports/")]
    assert all(re.fullmatch(r"reports/[0-9a-f]{12}/report\.html|#.*", value) for _, _, value in page.asked)
    assert not re.search(r"https?://|url\(|@import", html)


def test_the_page_forbids_a_browser_to_load_anything_else(store: Store, bundle: SampleBundle) -> None:
    html = page_of(store, SampleStudy(), bundle)

    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html


def test_hostile_texts_stay_texts(store: Store, bundle: SampleBundle) -> None:
    patient = PatientShown(name=HOSTILE, patient_id=HOSTILE, accession_number=HOSTILE, study_date=HOSTILE)

    html = page_of(store, hostile_study(), bundle, patient=patient)

    page = Page(html)
    assert "script" not in page.elements
    assert "img" not in page.elements
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.words.count("<script>alert(1)</script>") >= 6


def test_hostile_texts_stay_texts_in_the_worklist(store: Store, bundle: SampleBundle, tmp_path: Path) -> None:
    html = worklist_page_of(store, hostile_study(), bundle, tmp_path / "out")

    page = Page(html)
    assert "script" not in page.elements
    assert "img" not in page.elements
    assert "<script>alert(1)</script>" in page.words


def test_a_demonstration_model_is_marked_at_the_head_of_the_page_and_on_every_card(
    store: Store, bundle: SampleBundle
) -> None:
    page = Page(page_of(store, SampleStudy(cases=(SampleCase(level="L1"), SampleCase(level="L2"))), bundle))

    assert page.words.index(DEMONSTRATION) < page.words.index("Vertebral compression fractures: acute or chronic")
    assert page.words.count("demonstration model, no clinical meaning") == 2
    assert "Research use only" in page.words


def test_a_sites_own_model_carries_no_demonstration_mark(store: Store, bundle: SampleBundle) -> None:
    own = SampleBundle(manifest=bundle.manifest.model_copy(update={"kind": "SITE"}))

    page = Page(page_of(store, SampleStudy(), own))

    assert DEMONSTRATION not in page.words
    assert "Research use only" in page.words


def test_every_probability_of_a_card_stands_beside_its_basis(store: Store, bundle: SampleBundle) -> None:
    html = page_of(store, SampleStudy(), bundle)

    rows = re.findall(r'<div class="label">(.*?)</div>', html, flags=re.S)
    assert len(rows) == 4
    assert all(GIVEN_BASIS in row and "%" in row for row in rows)


def test_a_card_shows_picture_outline_nomogram_features_and_versions(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(cases=(SampleCase(level="L1", warnings=(Warned(code="s", sentence="slices of 2 mm"),)),))

    html = page_of(store, study, bundle)

    words = Page(html).words
    assert html.count("data:image/png;base64,") == 1
    assert html.count('stroke="#ffe04a"') == 1
    for said in (
        "10 mm",
        "bone window W 1500 / L 500 HU",
        "Total points",
        "71 y →",
        "GLCM: correlation, wavelet HLL",
        "slices of 2 mm",
        "Shape: flatness (0.57; training 0.61 to 0.93)",
        bundle.manifest.bundle_id[:12],
        bundle.protocols.hcr_hash[:12],
        bundle.protocols.dtl_hash[:12],
    ):
        assert said in words, said


def test_without_age_the_page_says_why_there_is_no_nomogram(store: Store, bundle: SampleBundle) -> None:
    words = Page(page_of(store, SampleStudy(age=None), bundle)).words

    assert "No nomogram: the patient's age is not known." in words
    assert re.search("Age *not known", words)


def test_a_lost_crop_costs_the_picture_alone(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(cases=(SampleCase(level="L1", with_crop=False), SampleCase(level="L2")))

    html = page_of(store, study, bundle)

    assert "The picture of this vertebra cannot be drawn" in Page(html).words
    assert html.count("data:image/png;base64,") == 1


def test_ids_in_the_page_are_unique_and_every_reference_meets_one(store: Store, bundle: SampleBundle) -> None:
    page = Page(page_of(store, SampleStudy(cases=(SampleCase(level="L1"), SampleCase(level="L2"))), bundle))

    wanted = {value[1:] for _, _, value in page.asked if value.startswith("#")}
    wanted |= {value for _, name, value in page.attributes if name == "aria-labelledby"}
    assert len(page.ids) == len(set(page.ids))
    assert wanted <= set(page.ids)


def test_a_study_without_a_result_says_so_and_why(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(cases=(SampleCase(level="S1", end="not-evaluated", reason="not for S1", with_crop=False),))

    words = Page(page_of(store, study, bundle)).words

    assert "No vertebra of this study was scored" in words
    assert "not evaluated (guard) not for S1" in words
    assert "not an axial stack: a localiser" in words


@pytest.mark.parametrize("named", [False, True])
def test_names_stand_in_a_named_copy_alone(store: Store, bundle: SampleBundle, named: bool) -> None:
    patient = PatientShown(name="Musterfrau, Erika", patient_id="4711", accession_number="A1", study_date="20261122")

    words = Page(page_of(store, SampleStudy(), bundle, patient=patient if named else None)).words

    assert ("Musterfrau, Erika" in words) is named
    assert ("2026-11-22" in words) is named


def test_an_indeterminate_vertebra_is_marked_in_summary_card_and_warnings(
    store: Store, bundle: SampleBundle, tmp_path: Path
) -> None:
    study = SampleStudy(cases=(SampleCase(level="L1", prediction_set=("chronic", "acute")), SampleCase(level="L2")))

    html = page_of(store, study, bundle)

    words = Page(html).words
    assert html.count('<span class="call indeterminate">indeterminate</span>') == 1
    assert words.count("indeterminate: MRI recommended") >= 3
    assert "Prediction set: chronic or acute. Neither class is ruled out at the error rate" in words
    assert words.count("Prediction set:") == 1


@pytest.mark.parametrize(
    ("prediction_set", "says"),
    [
        ((), "Prediction set: empty. Neither class fits at the error rate that the model was given: MRI recommended."),
        (("acute",), "Prediction set: acute. The other class is ruled out at the error rate"),
    ],
)
def test_a_prediction_set_is_put_into_words(
    store: Store, bundle: SampleBundle, prediction_set: tuple[ClassName, ...], says: str
) -> None:
    words = Page(
        page_of(store, SampleStudy(cases=(SampleCase(level="L1", prediction_set=prediction_set),)), bundle)
    ).words

    assert says in words


def test_pushes_are_in_log_odds_unless_the_score_is_a_lassos(store: Store, bundle: SampleBundle) -> None:
    study = SampleStudy(
        cases=(SampleCase(level="L1", score_kind="lasso", classifier="xgboost"), SampleCase(level="L2"))
    )

    words = Page(page_of(store, study, bundle)).words

    assert words.count("In log odds") == 1
    assert words.count("Shares of the LASSO's linear score, which is not in log odds") == 1
    assert words.count("the fusion probability comes from the classifier (XGBoost), not from this linear score") == 1
    assert words.count("The fusion probability is that of the classifier XGBoost.") == 1


def test_the_worklist_marks_what_is_indeterminate(store: Store, bundle: SampleBundle, tmp_path: Path) -> None:
    study = SampleStudy(cases=(SampleCase(level="L1", prediction_set=()), SampleCase(level="L2")))

    words = Page(worklist_page_of(store, study, bundle, tmp_path / "out")).words

    assert len(re.findall(r"acute *indeterminate", words)) == 1
    assert "indeterminate: MRI recommended" in words
