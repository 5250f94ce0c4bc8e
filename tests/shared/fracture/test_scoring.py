"""What a bundle says of a case, against numbers worked out by hand from the small bundle."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from shared.fracture.bundle import Bundle
from shared.fracture.features import FeatureVector
from shared.fracture.records import Acquisition
from shared.fracture.scoring import DEMO_FLAG, Classification, acquisition_warnings, score
from tests.fixtures.small_bundle import HCR_NAMES, load_small_bundle, small_vectors


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("bundle") / "small"
    return load_small_bundle(folder)


def _score(bundle: Bundle, *, age: int | None = 60, sex: str | None = "M", **values: float) -> Classification:
    hcr, dtl = small_vectors(bundle, **values)
    return score(bundle, hcr=hcr, dtl=dtl, age=age, sex=sex)


def test_the_scores_and_probabilities_are_those_worked_out_by_hand(bundle: Bundle) -> None:
    result = _score(bundle, mean=1.5, first=0.5)

    # Mean 1.5 → z 0.25; Median 3 → z 0.25; pca_000 = (0.5 - 0.25) / 0.5 = 0.5; pca_001 = 0
    assert result.hcr_score == pytest.approx(0.25 + 0.25 - 0.5 * 0.25)
    assert result.dtl_score == pytest.approx(-0.125 + 0.5 * 0.5)
    assert result.score == pytest.approx(0.5 + 0.25 + 0.25)
    assert result.hcr_probability == pytest.approx(1 / (1 + math.exp(-result.hcr_score)))
    assert result.probability == pytest.approx(1 / (1 + math.exp(-(0.8 * 1.0 + 0.1))))
    assert result.predicted == "acute"


def test_a_probability_at_the_threshold_is_acute_and_below_is_chronic(bundle: Bundle) -> None:
    low = _score(bundle, mean=-6.0)

    assert low.probability < low.threshold
    assert low.predicted == "chronic"


def test_the_contributions_are_ordered_by_strength_and_add_up(bundle: Bundle) -> None:
    result = _score(bundle, mean=3.0, first=0.5)

    assert [c.feature for c in result.contributions] == [HCR_NAMES[1], "pca_000", "pca_001"]
    assert result.contributions[0].contribution == pytest.approx(1.0)
    assert sum(c.contribution for c in result.contributions) + 0.5 == pytest.approx(result.score)


def test_selected_features_outside_the_training_range_are_named_and_counted(bundle: Bundle) -> None:
    result = _score(bundle, mean=50.0)

    assert [o.feature for o in result.outside_range] == [HCR_NAMES[1]]
    assert result.selected_features == 4
    assert result.outside_fraction == pytest.approx(0.25)
    assert "1 of 4 selected features lie outside the range seen in training" in result.flags


def test_the_nomogram_uses_the_fusion_score(bundle: Bundle) -> None:
    result = _score(bundle, age=60, sex="M")

    assert result.nomogram is not None
    assert result.nomogram_absent is None
    assert result.nomogram.probability == pytest.approx(
        1 / (1 + math.exp(-(1.0 - 0.05 * 60 + 0.2 + 1.5 * result.score)))
    )


@pytest.mark.parametrize(
    ("age", "sex", "says"),
    [
        (None, "F", "the patient's age is not known"),
        (70, None, "the patient's sex is not known"),
        (70, "O", "the patient's sex is not known"),
        (None, None, "the patient's age and sex are not known"),
    ],
)
def test_without_age_or_sex_the_fusion_stands_and_the_nomogram_says_why_not(
    bundle: Bundle, age: int | None, sex: str | None, says: str
) -> None:
    result = _score(bundle, age=age, sex=sex)

    assert result.nomogram is None
    assert result.nomogram_absent == says
    assert result.probability == _score(bundle).probability


def test_a_demonstration_bundle_is_marked_in_every_result(bundle: Bundle) -> None:
    assert DEMO_FLAG in _score(bundle).flags
    assert _score(bundle).bundle_kind == "DEMO"


def test_an_age_that_training_never_saw_is_marked(bundle: Bundle) -> None:
    assert "the patient's age lies outside the range seen in training" in _score(bundle, age=90).flags
    assert "the patient's age lies outside the range seen in training" not in _score(bundle, age=80).flags


def test_features_of_another_protocol_are_refused(bundle: Bundle) -> None:
    hcr, dtl = small_vectors(bundle)
    other = FeatureVector(kind="dtl", names=dtl.names, values=dtl.values, protocol_hash="0" * 64)

    with pytest.raises(ValueError, match="another protocol"):
        score(bundle, hcr=hcr, dtl=other, age=None, sex=None)


def test_features_in_another_order_are_refused(bundle: Bundle) -> None:
    hcr, dtl = small_vectors(bundle)
    turned = FeatureVector(kind="hcr", names=hcr.names[::-1], values=hcr.values, protocol_hash=hcr.protocol_hash)

    with pytest.raises(ValueError, match="another order"):
        score(bundle, hcr=turned, dtl=dtl, age=None, sex=None)


def test_a_classification_survives_its_json(bundle: Bundle) -> None:
    result = _score(bundle)

    assert Classification.model_validate_json(result.model_dump_json()) == result


def test_the_same_case_gives_the_same_bits(bundle: Bundle) -> None:
    assert _score(bundle).model_dump_json() == _score(bundle).model_dump_json()


def test_a_kernel_or_tube_voltage_that_training_never_saw_is_a_warning(bundle: Bundle) -> None:
    seen = acquisition_warnings(bundle, Acquisition(kvp=120.0, convolution_kernel="B60"))
    unseen = acquisition_warnings(bundle, Acquisition(kvp=80.0, convolution_kernel="Br32"))
    unknown = acquisition_warnings(bundle, Acquisition())

    assert seen == unknown == ()
    assert [warning.code for warning in unseen] == ["kernel", "kvp"]


def test_values_of_vectors_are_used_in_full_precision(bundle: Bundle) -> None:
    near = _score(bundle, mean=1.5 + 1e-12)

    assert near.score != _score(bundle, mean=1.5).score
    assert near.score == pytest.approx(_score(bundle, mean=1.5).score, abs=1e-11)
    assert np.isfinite(near.score)
