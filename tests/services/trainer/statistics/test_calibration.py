import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from services.trainer.nomogram_fitting import fit_logistic
from services.trainer.statistics.calibration import brier, calibration, calibration_curve


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-x)))


def _cohort(seed: int, cases: int = 300) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    logit = rng.normal(0.5, 1.3, cases)
    return (rng.random(cases) < _sigmoid(logit)).astype(np.int64), logit


def test_a_model_is_calibrated_on_the_rows_that_it_was_fitted_on() -> None:
    labels, x = _cohort(1)
    intercept, slope = fit_logistic(x[:, None], labels)

    found = calibration(labels, _sigmoid(intercept + slope * x))

    assert (found.intercept, found.slope) == pytest.approx((0, 1), abs=1e-9)
    assert found.in_the_large == pytest.approx(0, abs=1e-9)


def test_too_extreme_probabilities_have_the_slope_that_takes_it_back() -> None:
    labels, logit = _cohort(2)

    plain, extreme = calibration(labels, _sigmoid(logit)), calibration(labels, _sigmoid(2 * logit + 0.4))

    assert extreme.slope == pytest.approx(plain.slope / 2, abs=1e-9)
    assert extreme.intercept == pytest.approx(plain.intercept - 0.4 * plain.slope / 2, abs=1e-9)
    assert extreme.slope_high < 1
    assert extreme.brier > plain.brier


def test_the_intercept_in_the_large_moves_with_the_logits() -> None:
    labels, logit = _cohort(3)

    plain, shifted = calibration(labels, _sigmoid(logit)), calibration(labels, _sigmoid(logit - 0.7))

    assert shifted.in_the_large == pytest.approx(plain.in_the_large + 0.7, abs=1e-9)
    assert _sigmoid(logit + plain.in_the_large).mean() == pytest.approx(labels.mean(), abs=1e-12)


def test_the_fit_is_that_of_scikit_learn_and_its_intervals_are_those_of_the_likelihood() -> None:
    labels, logit = _cohort(4, 80)
    fitted = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(logit[:, None], labels)

    found = calibration(labels, _sigmoid(logit))

    assert found.slope == pytest.approx(float(fitted.coef_[0, 0]), abs=1e-5)
    assert found.intercept == pytest.approx(float(fitted.intercept_[0]), abs=1e-5)
    step = 1e-4

    def log_likelihood(a: float, b: float) -> float:
        p = _sigmoid(found.intercept + a + (found.slope + b) * logit)
        return float(np.log(np.where(labels == 1, p, 1 - p)).sum())

    def second(first: tuple[float, float], other: tuple[float, float]) -> float:
        return sum(
            sign * log_likelihood(first[0] * s + other[0] * t, first[1] * s + other[1] * t)
            for s, t, sign in ((step, step, 1), (-step, step, -1), (step, -step, -1), (-step, -step, 1))
        ) / (4 * step**2)

    a, b = (1.0, 0.0), (0.0, 1.0)
    covariance = np.linalg.inv(-np.array([[second(a, a), second(a, b)], [second(a, b), second(b, b)]]))
    assert (found.intercept_high - found.intercept) / 1.95996 == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-3)
    assert (found.slope - found.slope_low) / 1.95996 == pytest.approx(covariance[1, 1] ** 0.5, rel=1e-3)


def test_the_brier_score_is_the_mean_squared_distance() -> None:
    assert brier(np.array([1, 0, 1, 0]), np.array([1.0, 0.0, 0.5, 0.5])) == pytest.approx(0.125)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.1, 0.4, 0.7, 1.0])), min_size=5, max_size=60))
def test_the_bins_of_the_curve_hold_every_case_once(cases: list[tuple[int, float]]) -> None:
    labels, probabilities = np.array([label for label, _ in cases]), np.array([p for _, p in cases])

    curve = calibration_curve(labels, probabilities, bins=5)

    assert sum(one.observed.of for one in curve) == len(cases)
    assert sum(one.observed.count for one in curve) == labels.sum()
    predicted = [one.predicted for one in curve]
    assert predicted == sorted(set(predicted))
    assert len(curve) <= 5


def test_the_bins_are_of_equal_size_where_no_two_probabilities_are_equal() -> None:
    labels, logit = _cohort(5, 200)

    curve = calibration_curve(labels, _sigmoid(logit), bins=10)

    assert [one.observed.of for one in curve] == [20] * 10


@pytest.mark.parametrize(
    ("labels", "probabilities", "says"),
    [
        ([1, 1, 1], [0.2, 0.3, 0.4], "at least 2 cases of each class, got 3 acute and 0 chronic"),
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], "classes fully apart"),
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9], "classes fully apart"),
        ([0, 0, 1, 1], [0.1, 0.2, 0.2, 0.9], "classes fully apart"),
        ([0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5], "two different probabilities, got one"),
        ([0, 0, 1, 1], [0.5, 0.6, 0.5, 1.2], "probabilities of 0 to 1, got 0.5 to 1.2"),
    ],
)
def test_a_calibration_slope_says_what_it_needs(labels: list[int], probabilities: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        calibration(np.array(labels), np.array(probabilities))


def test_probabilities_of_nought_and_one_are_held_inside() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1])

    found = calibration(labels, np.array([0.0, 0.2, 1.0, 0.0, 0.8, 1.0]))

    assert np.isfinite([found.slope_low, found.slope_high, found.in_the_large]).all()


def test_a_curve_needs_a_case_a_bin() -> None:
    with pytest.raises(ValueError, match="got 3 cases, 10 bins"):
        calibration_curve(np.array([0, 1, 1]), np.array([0.1, 0.2, 0.3]))
