"""Limits for prediction sets, class by class, from out-of-fold training probabilities (METHOD 10).

The finite-sample quantile of split conformal prediction: of n cases of a class the ceil((n + 1)(1 - alpha))-th smallest
nonconformity. Out-of-fold probabilities stand for a calibration set of its own, and several fractures of one patient
for independent cases; both make the coverage approximate. Source: Vovk, Gammerman and Shafer 2005, chapter 4.5.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from shared.fracture.bundle import ClassName, Conformal, nonconformities
from shared.pipeline.errors import FractureSweepError


def fit_conformal(probability: NDArray[np.float64], acute: NDArray[np.int64], *, alpha: float) -> Conformal:
    """The limits of both classes; `probability` (n,) out-of-fold P(acute) of the fusion model, `acute` (n,) 0 or 1.

    FractureSweepError where a class has too few cases for this alpha.
    """
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("conformal limits need probabilities")
    return Conformal(
        alpha=alpha,
        chronic=_limit("chronic", probability[acute == 0], alpha),
        acute=_limit("acute", probability[acute == 1], alpha),
    )


def least_cases(alpha: float) -> int:
    """How many cases of a class a limit at this alpha needs."""
    return math.ceil(round((1 - alpha) / alpha, 9))


def _limit(name: ClassName, probability: NDArray[np.float64], alpha: float) -> float:
    count, needed = len(probability), least_cases(alpha)
    if count < needed:
        raise FractureSweepError(
            f"conformal limits at alpha {alpha:g} need at least {needed} {name} training cases, there are {count}"
        )
    ordered = sorted(nonconformities(float(value))[name] for value in probability)
    # rounded, so that 10 · 0.9 is not a hair above 9
    return ordered[math.ceil(round((count + 1) * (1 - alpha), 9)) - 1]
