"""Whether a probability means what it says: recalibration by logistic regression, Brier score, and a binned curve.

Sources: Cox 1958; Van Calster et al. 2019 ("Calibration: the Achilles heel of predictive analytics"); Brier 1950.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from services.trainer.nomogram_fitting import fit_logistic
from services.trainer.statistics.outcomes import Labels, Scores, check_outcomes, check_probabilities
from services.trainer.statistics.performance import Proportion, wilson

_Z95: Final = 1.959963984540054
_LEAST: Final = 1e-9
_STEPS: Final = 100


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The fit logit P(acute) = intercept + slope * logit(p), with Wald's 95 % intervals.

    Perfect: intercept 0, slope 1. A slope under 1: the probabilities are too extreme. `in_the_large` is the intercept
    with the slope held at 1: over 0 where the probabilities are too low on the whole.
    """

    intercept: float
    intercept_low: float
    intercept_high: float
    slope: float
    slope_low: float
    slope_high: float
    in_the_large: float
    brier: float


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Cases of neighbouring probabilities: the mean probability, and the observed share of acute ones."""

    predicted: float
    observed: Proportion


def brier(labels: Labels, probabilities: Scores) -> float:
    """The mean squared distance of probabilities (n,) from labels (n,) of 0 and 1."""
    check_outcomes("a Brier score", labels, probabilities, of_each_class=0)
    check_probabilities("a Brier score", probabilities)
    if len(labels) == 0:
        raise ValueError("a Brier score needs at least 1 case, got none")
    return float(np.mean((probabilities - labels) ** 2))


def calibration(labels: Labels, probabilities: Scores) -> Calibration:
    """Intercept, slope and Brier score of probabilities (n,) for labels (n,) of 0 and 1.

    Probabilities are held within 1e-9 of 0 and 1 for the logit. ValueError where the fit has no answer: one class
    alone, one probability for all, or probabilities that part the classes without a mistake (the slope is infinite).
    """
    what = "a calibration slope"
    check_outcomes(what, labels, probabilities, of_each_class=2)
    check_probabilities(what, probabilities)
    held = np.clip(probabilities, _LEAST, 1 - _LEAST)
    logit = np.log(held / (1 - held))
    acute, chronic = logit[labels == 1], logit[labels == 0]
    if logit.min() == logit.max():
        raise ValueError(f"{what} needs at least two different probabilities, got one")
    if chronic.max() <= acute.min() or acute.max() <= chronic.min():
        raise ValueError(f"{what} needs probabilities of the two classes that overlap, got classes fully apart")
    intercept, slope = (float(one) for one in fit_logistic(logit[:, None], labels))
    p = 1 / (1 + np.exp(-(intercept + slope * logit)))
    design = np.column_stack([np.ones(len(logit)), logit])
    covariance = np.linalg.inv((design * (p * (1 - p))[:, None]).T @ design)
    reach = [_Z95 * math.sqrt(covariance[n, n]) for n in (0, 1)]
    return Calibration(
        intercept=intercept,
        intercept_low=intercept - reach[0],
        intercept_high=intercept + reach[0],
        slope=slope,
        slope_low=slope - reach[1],
        slope_high=slope + reach[1],
        in_the_large=_in_the_large(labels, logit),
        brier=brier(labels, probabilities),
    )


def _in_the_large(labels: Labels, logit: Scores) -> float:
    """The shift of all logits that makes the mean probability the share of acute cases, by halving its bracket."""
    low, high = -float(np.abs(logit).max()) - 40, float(np.abs(logit).max()) + 40
    for _ in range(_STEPS):
        middle = (low + high) / 2
        with np.errstate(over="ignore"):
            expected = (1 / (1 + np.exp(-(logit + middle)))).sum()
        low, high = (middle, high) if expected < labels.sum() else (low, middle)
    return (low + high) / 2


def calibration_curve(labels: Labels, probabilities: Scores, *, bins: int = 10) -> tuple[CalibrationBin, ...]:
    """Predicted against observed in at most `bins` groups of about equal size; equal probabilities stay together."""
    what = "a calibration curve"
    check_outcomes(what, labels, probabilities, of_each_class=0)
    check_probabilities(what, probabilities)
    if bins < 2 or len(labels) < bins:
        raise ValueError(
            f"{what} needs at least 2 bins and as many cases as bins, got {len(labels)} cases, {bins} bins"
        )
    edges = np.unique(np.quantile(probabilities, np.arange(1, bins) / bins, method="inverted_cdf"))
    group = np.searchsorted(edges, probabilities, side="left")
    return tuple(
        CalibrationBin(
            predicted=float(probabilities[group == one].mean()),
            observed=wilson(int(labels[group == one].sum()), int((group == one).sum())),
        )
        for one in np.unique(group)
    )
