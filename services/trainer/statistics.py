"""How well a score tells acute from chronic: AUC with DeLong's interval, the paired test, and Youden's threshold.

Sources: DeLong, DeLong and Clarke-Pearson 1988; Sun and Xu 2014 for the ranks. Compared with pROC in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

_Z95: Final = 1.959963984540054

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Auc:
    """An area under the ROC curve with its 95 % interval, cut to [0, 1]."""

    value: float
    low: float
    high: float
    variance: float


@dataclass(frozen=True, kw_only=True)
class PairedAuc:
    """Two AUCs on the same cases: their difference with its 95 % interval, Z, and the two-sided p."""

    difference: float
    low: float
    high: float
    z: float
    p: float


def _placements(labels: Labels, scores: Scores) -> tuple[Scores, Scores]:
    """For each positive the share of negatives below it, and for each negative the share of positives above it."""
    if labels.shape != scores.shape or not np.isfinite(scores).all():
        raise ValueError("labels and scores must be of one length, and the scores finite")
    positive, negative = scores[labels == 1], scores[labels == 0]
    if len(positive) < 2 or len(negative) < 2:
        raise ValueError("an AUC with an interval needs at least two cases of each class")
    together = rankdata(np.concatenate([positive, negative]))
    of_positive = (together[: len(positive)] - rankdata(positive)) / len(negative)
    of_negative = 1 - (together[len(positive) :] - rankdata(negative)) / len(positive)
    return of_positive, of_negative


def auc_delong(labels: Labels, scores: Scores) -> Auc:
    """The AUC of scores (n,) for labels (n,) of 0 and 1, with DeLong's interval."""
    of_positive, of_negative = _placements(labels, scores)
    value = float(of_positive.mean())
    variance = float(of_positive.var(ddof=1) / len(of_positive) + of_negative.var(ddof=1) / len(of_negative))
    reach = _Z95 * math.sqrt(variance)
    return Auc(value=value, low=max(value - reach, 0.0), high=min(value + reach, 1.0), variance=variance)


def delong_test(labels: Labels, first: Scores, second: Scores) -> PairedAuc:
    """Whether two scores of the same cases differ in AUC (first minus second)."""
    pairs = [_placements(labels, scores) for scores in (first, second)]
    over_positive = np.cov(pairs[0][0], pairs[1][0], ddof=1) / len(pairs[0][0])
    over_negative = np.cov(pairs[0][1], pairs[1][1], ddof=1) / len(pairs[0][1])
    covariance = over_positive + over_negative
    difference = float(pairs[0][0].mean() - pairs[1][0].mean())
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    if variance <= 0:
        return PairedAuc(difference=difference, low=difference, high=difference, z=0.0, p=1.0)
    deviation = math.sqrt(variance)
    z = difference / deviation
    return PairedAuc(
        difference=difference,
        low=difference - _Z95 * deviation,
        high=difference + _Z95 * deviation,
        z=z,
        p=math.erfc(abs(z) / math.sqrt(2)),
    )


def youden_threshold(labels: Labels, scores: Scores) -> float:
    """The threshold of largest sensitivity + specificity - 1, half-way between two neighbouring scores.

    Of equal ones the lowest, which is the more sensitive.
    """
    values = np.unique(scores)
    if len(values) < 2:
        raise ValueError("a threshold needs at least two different scores")
    candidates = (values[:-1] + values[1:]) / 2
    called = scores[None, :] >= candidates[:, None]
    sensitivity = (called & (labels == 1)).sum(axis=1) / (labels == 1).sum()
    specificity = (~called & (labels == 0)).sum(axis=1) / (labels == 0).sum()
    return float(candidates[int(np.argmax(np.round(sensitivity + specificity, 12)))])


def confusion(labels: Labels, called: NDArray[np.bool_]) -> dict[str, int]:
    """How many are right and wrong: tp, fn, tn, fp."""
    positive = labels == 1
    return {
        "tp": int((positive & called).sum()),
        "fn": int((positive & ~called).sum()),
        "tn": int((~positive & ~called).sum()),
        "fp": int((~positive & called).sum()),
    }
