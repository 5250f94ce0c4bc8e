"""The nomogram's regression: the plain maximum where there is one, Firth's where the classes are apart."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from services.trainer.nomogram_fitting import SEPARATED, SeparatedError, fit_firth, fit_logistic, fit_nomogram

pytestmark = pytest.mark.trainer
Cases = tuple[NDArray[np.float64], NDArray[np.int64]]


def cases(seed: int, count: int = 60) -> Cases:
    rng = np.random.default_rng(seed)
    values = np.column_stack([rng.normal(70, 9, count), rng.normal(0, 1, count), rng.random(count) < 0.4])
    logit = 0.4 - 0.03 * (values[:, 0] - 70) + 1.1 * values[:, 1] + 0.3 * values[:, 2]
    return values.astype(np.float64), (rng.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int64)


def apart(seed: int) -> Cases:
    """The second input tells the classes apart without an error."""
    values, _ = cases(seed)
    return values, (values[:, 1] > 0.1).astype(np.int64)


def test_the_plain_regression_is_that_of_scikit_learn() -> None:
    values, outcome = cases(1)

    theirs = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(values, outcome)

    assert fit_logistic(values, outcome) == pytest.approx([theirs.intercept_[0], *theirs.coef_[0]], abs=1e-6)


@pytest.mark.parametrize("drawn", [cases, apart])
def test_firth_s_answer_is_the_maximum_of_the_penalised_likelihood(drawn: object) -> None:
    values, outcome = drawn(2)  # type: ignore[operator]
    x = np.column_stack([np.ones(len(values)), (values - values.mean(axis=0)) / values.std(axis=0)])

    def loss(beta: NDArray[np.float64]) -> float:
        linear = x @ beta
        p = 1 / (1 + np.exp(-linear))
        likelihood = float((outcome * linear - np.logaddexp(0, linear)).sum())
        return -likelihood - 0.5 * float(np.linalg.slogdet((x * (p * (1 - p))[:, None]).T @ x)[1])

    best = minimize(loss, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20_000})

    found = fit_firth(values, outcome)
    slopes = best.x[1:] / values.std(axis=0)
    assert found == pytest.approx([best.x[0] - slopes @ values.mean(axis=0), *slopes], abs=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_firth_has_an_answer_for_few_cases_that_are_far_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcome = rng.permutation(np.arange(16 + seed % 9) % 2)
    score = (2 * outcome - 1) * rng.uniform(1, 1 + seed, len(outcome))
    values = np.column_stack([rng.normal(70, 9, len(outcome)), score, rng.permutation(np.arange(len(outcome)) < 3)])

    found = fit_firth(values.astype(np.float64), outcome)

    assert np.isfinite(found).all()
    assert found[2] > 0


def test_classes_that_are_apart_have_a_nomogram_and_it_says_so() -> None:
    values, outcome = apart(3)
    with pytest.raises(SeparatedError):
        fit_logistic(values, outcome)

    found = fit_nomogram(acute=outcome, age=values[:, 0], male=values[:, 2], score=values[:, 1])

    assert found.notes == (SEPARATED,)
    assert 0 < found.model.beta_score < 100


def test_a_cohort_of_one_sex_has_a_nomogram_that_does_not_read_it() -> None:
    values, outcome = cases(4)

    found = fit_nomogram(acute=outcome, age=values[:, 0], male=np.zeros(len(outcome)), score=values[:, 1])

    assert found.model.beta_male == 0
    plain = fit_logistic(values[:, :2], outcome)
    assert (found.model.intercept, found.model.beta_age, found.model.beta_score) == pytest.approx(tuple(plain))
    assert found.notes == ("All training cases are of one sex, which the nomogram therefore does not read.",)


def test_one_score_for_all_has_no_nomogram() -> None:
    values, outcome = cases(5)

    with pytest.raises(ValueError, match="constant column"):
        fit_nomogram(acute=outcome, age=values[:, 0], male=values[:, 2], score=np.ones(len(outcome)))
