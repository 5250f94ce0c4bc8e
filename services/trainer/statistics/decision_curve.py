"""Whether acting on a model does more good than acting on everybody or on nobody: decision curves.

Net benefit = TP/n - FP/n * pt/(1-pt), where pt is the probability from which one acts (Vickers and Elkin 2006).
Compared with R's dcurves in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.trainer.statistics.outcomes import Labels, Scores, check_outcomes, check_probabilities


@dataclass(frozen=True, kw_only=True, eq=False)
class DecisionCurve:
    """Net benefit (m,) at each threshold (m,) of acting by the model, on all, and on none (0)."""

    thresholds: Scores
    model: Scores
    treat_all: Scores
    treat_none: Scores


def _odds(thresholds: Scores) -> Scores:
    if not ((thresholds >= 0) & (thresholds < 1)).all():
        raise ValueError("net benefit needs threshold probabilities from 0 to below 1")
    return np.asarray(thresholds / (1 - thresholds))


def net_benefit(labels: Labels, probabilities: Scores, thresholds: Scores) -> Scores:
    """Net benefit (m,) of acting where the probability reaches the threshold; `thresholds` (m,) in [0, 1)."""
    check_outcomes("net benefit", labels, probabilities, of_each_class=0)
    check_probabilities("net benefit", probabilities)
    if len(labels) == 0:
        raise ValueError("net benefit needs at least 1 case, got none")
    odds = _odds(thresholds)
    positive, negative = np.sort(probabilities[labels == 1]), np.sort(probabilities[labels == 0])
    tp = len(positive) - np.searchsorted(positive, thresholds, side="left")
    fp = len(negative) - np.searchsorted(negative, thresholds, side="left")
    return np.asarray((tp - fp * odds) / len(labels))


def net_benefit_of_all(labels: Labels, thresholds: Scores) -> Scores:
    """Net benefit (m,) of acting on every case."""
    return net_benefit(labels, np.ones(len(labels)), thresholds)


def decision_curve(labels: Labels, probabilities: Scores, *, thresholds: Scores | None = None) -> DecisionCurve:
    """The decision curve of a model; without `thresholds` from 0.00 to 0.99 in steps of 0.01."""
    at = np.arange(100) / 100 if thresholds is None else thresholds
    return DecisionCurve(
        thresholds=at,
        model=net_benefit(labels, probabilities, at),
        treat_all=net_benefit_of_all(labels, at),
        treat_none=np.zeros(len(at)),
    )
