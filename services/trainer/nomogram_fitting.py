"""The nomogram's regression: acute ~ age + sex + fusion score, without penalty (METHOD 6).

The score must be out-of-fold: with in-sample scores the calibration slope on new patients was 0.57 instead of one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.fracture.nomogram import NomogramModel

_STEPS = 100


def fit_logistic(values: NDArray[np.float64], outcome: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intercept and coefficients of an unpenalised logistic regression, by Newton's method.

    `values` (n, inputs). ValueError where it does not converge (the classes are separable, or a column is constant).
    """
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    if not (deviation > 0).all():
        raise ValueError("a regression on a constant column has no answer")
    design = np.column_stack([np.ones(len(values)), (values - mean) / deviation])
    beta = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        probability = 1 / (1 + np.exp(-np.clip(design @ beta, -30, 30)))
        weight = np.maximum(probability * (1 - probability), 1e-12)
        step = np.linalg.solve((design * weight[:, None]).T @ design, design.T @ (outcome - probability))
        beta = beta + step
        if np.abs(step).max() < 1e-12:
            break
    else:
        raise ValueError("the regression does not converge; can one input tell the classes apart alone?")
    slopes = beta[1:] / deviation
    return np.concatenate([[beta[0] - float(slopes @ mean)], slopes])


def fit_nomogram(
    *,
    acute: NDArray[np.int64],
    age: NDArray[np.float64],
    male: NDArray[np.float64],
    score: NDArray[np.float64],
) -> NomogramModel:
    """The nomogram of training cases (n,) with their out-of-fold fusion scores."""
    beta = fit_logistic(np.column_stack([age, male, score]), acute)
    return NomogramModel(
        intercept=float(beta[0]),
        beta_age=float(beta[1]),
        beta_male=float(beta[2]),
        beta_score=float(beta[3]),
        age_range=(float(age.min()), float(age.max())),
        score_range=(float(score.min()), float(score.max())),
    )
