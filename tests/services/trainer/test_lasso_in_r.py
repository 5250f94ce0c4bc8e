"""LASSO as it is done here (scikit-learn, on standardised columns) against glmnet's own printed coefficients."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Lasso, LogisticRegression

from services.trainer.selection import standardisation
from tests.fixtures.r_workspace import read_workspace

# glmnet's vignette ("An Introduction to glmnet", 2023), intercept and V1 to V7 of QuickStartExample: coef(cvfit, s =
# "lambda.min") with lambda.min = 0.06284188, a point of its path; and coef(fit, s = 0.1), between two points
_VIGNETTE = {
    0.06284188: (0.145832036, 1.340981414, 0, 0.708347140, 0, -0.848087765, 0.554823782, 0.038519738),
    0.1: (0.150928072, 1.320597195, 0, 0.675110234, 0, -0.817411518, 0.521436671, 0.004829335),
}


@pytest.mark.shared_data
@pytest.mark.parametrize("lambda_", _VIGNETTE)
def test_the_lasso_of_scikit_learn_is_that_of_glmnet(shared_data: Path, lambda_: float) -> None:
    example = read_workspace(shared_data / "stats-lasso" / "QuickStartExample.rda")["QuickStartExample"]
    x, y = example["x"], example["y"][:, 0]
    mean, deviation = standardisation(x)

    fitted = Lasso(alpha=lambda_, tol=1e-10, max_iter=100_000).fit((x - mean) / deviation, y)

    coefficients = fitted.coef_ / deviation
    intercept = float(fitted.intercept_ - coefficients @ mean)
    # glmnet stops at its default threshold of 1e-7 of the deviance: four digits
    assert [intercept, *coefficients[:7]] == pytest.approx(_VIGNETTE[lambda_], abs=2e-4)
    assert (coefficients[:7] != 0).tolist() == [value != 0 for value in _VIGNETTE[lambda_][1:]]


@pytest.mark.shared_data
@pytest.mark.parametrize("lambda_", [0.05, 0.02])
def test_the_logistic_lasso_solves_what_glmnet_minimises(shared_data: Path, lambda_: float) -> None:
    example = read_workspace(shared_data / "stats-lasso" / "BinomialExample.rda")["BinomialExample"]
    x, y = example["x"], example["y"].astype(np.int64)
    mean, deviation = standardisation(x)
    z = (x - mean) / deviation

    fitted = LogisticRegression(l1_ratio=1, C=1 / (len(y) * lambda_), solver="saga", tol=1e-10, max_iter=100_000).fit(
        z, y
    )

    # the conditions of a minimum of mean log loss + lambda * sum |coefficient|, the intercept free
    residual = y - fitted.predict_proba(z)[:, 1]
    gradient, coefficients = z.T @ residual / len(y), fitted.coef_[0]
    kept = coefficients != 0
    assert abs(residual.mean()) < 1e-6
    assert gradient[kept] == pytest.approx(lambda_ * np.sign(coefficients[kept]), abs=1e-6)
    assert np.abs(gradient[~kept]).max() <= lambda_ + 1e-6
    assert 0 < kept.sum() < x.shape[1]
