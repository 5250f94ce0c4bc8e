"""What changed between two bundles is said in words, all of it and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.fracture.bundle import Bundle, Models, load_bundle, model_bytes
from shared.fracture.bundle_diff import description, differences, summary
from shared.fracture.protocol import CropProtocol
from tests.fixtures.small_bundle import (
    NOMOGRAM,
    reseal,
    small_models,
    small_network,
    stump,
    write_classifier_bundle,
    write_small_bundle,
)

SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "bundles" / "demo"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_small_bundle(tmp_path_factory.mktemp("bundles") / "small"))


def _of(tmp_path: Path, **changes: Any) -> Bundle:
    return load_bundle(write_small_bundle(tmp_path / "other", **changes))


def _models(**changes: Any) -> Models:
    fusion = small_models().fusion
    return small_models().model_copy(update={"fusion": fusion.model_copy(update=changes)})


def _without_golden(lines: tuple[str, ...]) -> list[str]:
    """Other numbers have other golden vectors; what is asked here is the rest."""
    return [line for line in lines if not line.startswith("golden vectors")]


def test_the_same_bundle_twice_has_no_difference(small: Bundle) -> None:
    assert differences(small, load_bundle(small.folder)) == ()


def test_a_threshold_alone_is_one_line(small: Bundle, tmp_path: Path) -> None:
    assert differences(small, _of(tmp_path, threshold=0.45)) == ("threshold of the fusion model: 0.5 → 0.45",)


def test_a_coefficient_is_named_with_both_values(small: Bundle, tmp_path: Path) -> None:
    other = _of(tmp_path, models=_models(coef=(1.0, 0.25, -2.0), intercept=0.75))

    assert _without_golden(differences(small, other)) == [
        "fusion model, coefficients of 1 feature changed: pca_000: 0.5 → 0.25",
        "fusion model, intercept: 0.5 → 0.75",
    ]


def test_numbers_that_six_digits_do_not_tell_apart_stand_in_full(small: Bundle, tmp_path: Path) -> None:
    other = _of(tmp_path, models=_models(intercept=0.5 + 1e-12))

    assert f"fusion model, intercept: 0.5 → {0.5 + 1e-12!r}" in differences(small, other)


def test_selected_features_that_came_and_went_are_named(small: Bundle, tmp_path: Path) -> None:
    names = (small.hcr_features[2], "pca_000", "pca_001")

    lines = _without_golden(differences(small, _of(tmp_path, models=_models(inputs=names))))

    assert lines == [
        f"fusion model, selected features: 1 added: {small.hcr_features[2]}",
        f"fusion model, selected features: 1 removed: {small.hcr_features[1]}",
    ]


def test_another_crop_says_that_no_feature_stays(small: Bundle, tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "other", crop=CropProtocol(roi_margin_mm=10.0))

    lines = differences(small, load_bundle(folder))

    assert lines[0] == "another crop protocol: no feature of the old bundle is one of the new"
    assert "crop roi_margin_mm: 25 → 10" in lines


def test_another_network_is_said_by_its_hash(small: Bundle, tmp_path: Path) -> None:
    other = _of(tmp_path, network=small_network(seed=9))

    lines = differences(small, other)

    before, after = (one.manifest.dtl.network_sha256[:12] for one in (small, other))
    assert f"network: {before} → {after}" in lines
    assert "another DTL protocol: deep features are computed again" in lines
    assert not any("HCR" in line for line in lines)


def test_what_schema_2_brought_is_said(small: Bundle, tmp_path: Path) -> None:
    other = load_bundle(write_classifier_bundle(tmp_path / "other"))

    lines = differences(small, other)

    assert "weights of 1 component changed: pca_001" in lines
    assert "HCR model, classifier: the linear score → svm" in lines
    assert "fusion model, linear score: logistic → lasso" in lines
    assert "conformal limits: none → alpha 0.1, chronic 0.4, acute 0.6" in lines
    assert "thresholds of each model: none → hcr 0.4, dtl 0.5, fusion 0.5, nomogram 0.6" in lines
    assert "files: 2 added: classifier-fusion.onnx, classifier-hcr.onnx" in lines


def test_limits_taken_away_are_said(tmp_path: Path) -> None:
    old = load_bundle(write_classifier_bundle(tmp_path / "old"))
    new = load_bundle(write_classifier_bundle(tmp_path / "new", conformal=None))

    assert differences(old, new) == ("conformal limits: alpha 0.1, chronic 0.4, acute 0.6 → none",)


def test_a_classifier_fitted_anew_is_said_by_its_hash(tmp_path: Path) -> None:
    old = load_bundle(write_classifier_bundle(tmp_path / "old"))
    folder = write_classifier_bundle(tmp_path / "new")
    (folder / "classifier-fusion.onnx").write_bytes(stump(width=3, feature=1, left=0.0, right=1.0))
    new = load_bundle(reseal(folder))

    before, after = (one.manifest.files["classifier-fusion.onnx"].sha256[:12] for one in (old, new))
    assert differences(old, new) == (f"fusion model, classifier: random-forest, fitted anew ({before} → {after})",)


def _json(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = json.loads((folder / name).read_bytes())
        change(held)
        (folder / name).write_text(json.dumps(held))

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            _json("metrics.json", lambda held: held.update(auc=0.8, held_out={"fusion": {"auc": 0.7}})),
            ["metric auc: 0.9 → 0.8", "metric held_out.fusion.auc: none → 0.7"],
        ),
        (
            _json("distribution.json", lambda held: held["features"]["pca_000"].update(high=11.0)),
            ["training range of 1 selected feature changed: pca_000"],
        ),
        (lambda folder: (folder / "MODEL_CARD.md").write_text("# new"), ["model card: changed (MODEL_CARD.md)"]),
        (
            lambda folder: (folder / "nomogram.json").write_bytes(
                model_bytes(NOMOGRAM.model_copy(update={"score_range": (-5.0, 4.0)}))
            ),
            ["nomogram score_range: (-4, 4) → (-5, 4)"],
        ),
        (lambda folder: (folder / "NOTICE").write_text("x"), ["files: 1 added: NOTICE"]),
    ],
)
def test_each_file_has_its_words(
    small: Bundle, tmp_path: Path, edit: Callable[[Path], object], says: list[str]
) -> None:
    folder = write_small_bundle(tmp_path / "other")
    edit(folder)

    assert list(differences(small, load_bundle(reseal(folder)))) == says


def test_two_bundles_that_share_little_are_compared_to_the_end(small: Bundle) -> None:
    lines = differences(load_bundle(SHIPPED), small)

    assert "name: phantom-demonstration → small" in lines
    assert any(line.startswith("list of HCR features: ") and line.endswith(" more") for line in lines)
    assert "fitted on other training cases (their fingerprint differs)" in lines
    assert any(line.startswith("count patients: ") and line.endswith(" → 4") for line in lines)
    assert any(line.startswith("and ") and line.endswith(" more metrics") for line in lines)


def test_a_description_names_protocols_models_limits_and_files(tmp_path: Path) -> None:
    bundle = load_bundle(write_classifier_bundle(tmp_path / "bundle"))

    lines = description(bundle)

    assert lines[0] == summary(bundle)
    assert "schema 2" in lines[0]
    assert "classifiers: hcr svm, fusion random-forest" in lines[0]
    assert f"bundle_id: {bundle.bundle_id}" in lines
    assert (
        "HCR model: 2 features, logistic score, intercept 0.25; probability by svm (classifier-hcr.onnx), "
        in "".join(line for line in lines if line.startswith("HCR model"))
    )
    assert "conformal limits: alpha 0.1, chronic 0.4, acute 0.6" in lines
    assert "metric auc: 0.9" in lines
    assert sum(line.startswith("file ") for line in lines) == len(bundle.manifest.files)


def test_a_bundle_of_linear_models_says_so(small: Bundle) -> None:
    assert summary(small).endswith("classifiers: linear")
    assert "conformal limits: none" in description(small)
