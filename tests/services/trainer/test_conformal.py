"""Prediction sets hold the true class as often as they promise, class by class."""

from __future__ import annotations

import numpy as np
import pytest

from services.trainer.conformal import fit_conformal, least_cases
from shared.fracture.bundle import Conformal
from shared.pipeline.errors import FractureSweepError


def _cases(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a model that is right more often than not, and overconfident."""
    acute = (rng.random(count) < 0.6).astype(np.int64)
    return 1 / (1 + np.exp(-2 * (rng.normal(size=count) + 2 * acute - 1))), acute


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_of_each_class_the_share_outside_its_set_is_about_alpha(alpha: float) -> None:
    rng = np.random.default_rng(1)
    covered: dict[int, list[bool]] = {0: [], 1: []}
    for _ in range(100):
        probability, acute = _cases(rng, 60)
        limits = fit_conformal(*_cases(rng, 100), alpha=alpha)
        for one, label in zip(probability, acute, strict=True):
            covered[int(label)].append(("acute" if label else "chronic") in limits.prediction_set(float(one)))

    for inside in covered.values():
        # a limit from 40 cases covers 37 of 41 in the mean; a hundred of them leave half a percent of chance
        assert 1 - alpha - 0.02 <= np.mean(inside) <= 1 - alpha + 0.04


def test_the_limit_is_the_finite_sample_quantile_of_the_nonconformity() -> None:
    acute = np.array([1] * 9 + [0] * 19, dtype=np.int64)
    probability = np.concatenate([np.linspace(0.1, 0.9, 9), np.linspace(0.05, 0.95, 19)])

    limits = fit_conformal(probability, acute, alpha=0.1)

    # of 9 the 9th: the least probability; of 19 the 18th
    assert limits == Conformal(alpha=0.1, acute=1 - 0.1, chronic=float(np.linspace(0.05, 0.95, 19)[17]))


@pytest.mark.parametrize(("alpha", "needed"), [(0.1, 9), (0.2, 4), (0.05, 19), (0.3, 3)])
def test_the_least_number_of_cases_is_just_enough(alpha: float, needed: int) -> None:
    def fit(count: int) -> Conformal:
        acute = np.array([1] * count + [0] * 40, dtype=np.int64)
        return fit_conformal(np.full(count + 40, 0.5), acute, alpha=alpha)

    assert least_cases(alpha) == needed
    assert fit(needed).acute == 0.5
    with pytest.raises(
        FractureSweepError, match=rf"need at least {needed} acute training cases, there are {needed - 1}"
    ):
        fit(needed - 1)


def test_a_class_without_a_case_is_named() -> None:
    with pytest.raises(FractureSweepError, match="at least 9 chronic training cases, there are 0"):
        fit_conformal(np.full(20, 0.5), np.ones(20, dtype=np.int64), alpha=0.1)


def test_a_set_has_none_one_or_both_of_the_classes() -> None:
    unsure = Conformal(alpha=0.1, chronic=0.7, acute=0.6)
    sure = Conformal(alpha=0.1, chronic=0.3, acute=0.4)

    assert unsure.prediction_set(0.5) == ("chronic", "acute")
    assert unsure.prediction_set(0.9) == ("acute",)
    assert unsure.prediction_set(0.2) == ("chronic",)
    assert sure.prediction_set(0.5) == ()
    # at its limit a class is still accepted
    assert sure.prediction_set(0.3) == ("chronic",)


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(ValueError, match="need probabilities"):
        fit_conformal(np.array([0.5, 1.5]), np.array([0, 1]), alpha=0.1)
