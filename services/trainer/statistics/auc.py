"""How well a score tells acute from chronic: the AUC with its intervals, and whether two AUCs differ.

DeLong's interval takes the vertebrae as independent; the bootstrap beside it draws whole patients, because several
fractures of one patient are not.

Sources: DeLong, DeLong and Clarke-Pearson 1988; Sun and Xu 2014 for the ranks; pROC (Robin et al. 2011) for the
unpaired test; Holm 1979; Field and Welsh 2007 for the cluster bootstrap. Compared with pROC in the tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student_t

from services.trainer.statistics.outcomes import Labels, Scores, check_outcomes

_Z95: Final = 1.959963984540054
_AT_ONCE: Final = 256
_PERCENT: Final = (2.5, 97.5)


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


@dataclass(frozen=True, kw_only=True)
class UnpairedAuc:
    """Two AUCs on different cases: their difference, D with its degrees of freedom, and the two-sided p."""

    difference: float
    d: float
    degrees_of_freedom: float
    p: float


@dataclass(frozen=True, kw_only=True)
class ComparedPair:
    """Two named scores of the same cases, with Holm's p over all pairs that were compared with them."""

    first: str
    second: str
    test: PairedAuc
    p_holm: float


@dataclass(frozen=True, kw_only=True)
class AucBootstrap:
    """An AUC, or a difference of two, with its 95 % percentile interval over resampled patients.

    `resamples` is how many had both classes, and so an AUC.
    """

    value: float
    low: float
    high: float
    resamples: int


def _placements(labels: Labels, scores: Scores) -> tuple[Scores, Scores]:
    """For each positive the share of negatives below it, and for each negative the share of positives above it."""
    check_outcomes("an AUC with an interval", labels, scores, of_each_class=2)
    positive, negative = scores[labels == 1], scores[labels == 0]
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


def auc_if_any(labels: Labels, scores: Scores) -> Auc | None:
    """The same; None with fewer than two of a class, whose AUC has no variance."""
    return auc_delong(labels, scores) if np.bincount(labels, minlength=2).min() >= 2 else None


def delong_test(labels: Labels, first: Scores, second: Scores) -> PairedAuc:
    """Whether two scores of the same cases differ in AUC (first minus second); p is 1 where nothing varies."""
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


def delong_test_unpaired(
    first_labels: Labels, first_scores: Scores, second_labels: Labels, second_scores: Scores
) -> UnpairedAuc:
    """Whether the AUCs of two groups of different cases differ (first minus second), by Welch's t as pROC does."""
    first, second = auc_delong(first_labels, first_scores), auc_delong(second_labels, second_scores)
    difference, variance = first.value - second.value, first.variance + second.variance
    if variance <= 0:
        raise ValueError("an unpaired test needs an AUC that varies, got two whose variance is 0")
    d = difference / math.sqrt(variance)
    freedom = variance**2 / (
        first.variance**2 / (len(first_labels) - 1) + second.variance**2 / (len(second_labels) - 1)
    )
    return UnpairedAuc(
        difference=difference, d=d, degrees_of_freedom=freedom, p=float(2 * student_t.sf(abs(d), freedom))
    )


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's p of each of several tests, in their order: none is below its own p, and their order stays."""
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"a p-value lies between 0 and 1, got {list(p_values)}")
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, n in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[n]))
        adjusted[n] = largest
    return tuple(adjusted)


def compare_aucs(labels: Labels, scores: Mapping[str, Scores]) -> tuple[ComparedPair, ...]:
    """Every pair of named scores (first minus second) by the paired DeLong test, with Holm's p over all pairs."""
    pairs = list(itertools.combinations(scores, 2))
    tests = [delong_test(labels, scores[first], scores[second]) for first, second in pairs]
    adjusted = holm([test.p for test in tests])
    return tuple(
        ComparedPair(first=first, second=second, test=test, p_holm=p)
        for (first, second), test, p in zip(pairs, tests, adjusted, strict=True)
    )


def _drawn_patients(patient: NDArray[np.int64], *, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each row was drawn (some resamples, n), when whole patients are drawn with replacement."""
    patients, place = np.unique(patient, return_inverse=True)
    rng = np.random.default_rng(seed)
    chances = np.full(len(patients), 1 / len(patients))
    for start in range(0, resamples, _AT_ONCE):
        drawn = rng.multinomial(len(patients), chances, size=min(_AT_ONCE, resamples - start))
        yield drawn[:, place].astype(np.float64)


def _weighted_auc(labels: Labels, scores: Scores, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """The AUC under row weights (b, n); nan where a class has no weight."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
    ordered, positive = weight[:, order], labels[order] == 1
    above = np.add.reduceat(ordered * positive, starts, axis=1)
    below = np.add.reduceat(ordered * ~positive, starts, axis=1)
    won = above * (np.cumsum(below, axis=1) - below / 2)
    with np.errstate(invalid="ignore"):
        return np.asarray(won.sum(axis=1) / (above.sum(axis=1) * below.sum(axis=1)))


def _resampled(
    labels: Labels, scores: Sequence[Scores], patient: NDArray[np.int64], *, resamples: int, seed: int
) -> NDArray[np.float64]:
    """AUCs (scores, resamples that have both classes), each column of the same drawn patients."""
    check_outcomes("a bootstrap of an AUC", labels, *scores)
    if patient.shape != labels.shape:
        raise ValueError(f"a bootstrap of patients needs one for each case, got {patient.shape} for {labels.shape}")
    if resamples < 1:
        raise ValueError(f"a bootstrap needs at least 1 resample, got {resamples}")
    acute, chronic = (len(np.unique(patient[labels == one])) for one in (1, 0))
    if min(acute, chronic) < 2:
        raise ValueError(
            "a bootstrap of patients needs at least 2 with acute and 2 with chronic vertebrae, "
            f"got {acute} and {chronic}"
        )
    parts = [
        np.stack([_weighted_auc(labels, one, weight) for one in scores])
        for weight in _drawn_patients(patient, resamples=resamples, seed=seed)
    ]
    values = np.concatenate(parts, axis=1)
    values = values[:, np.isfinite(values[0])]
    if values.shape[1] == 0:
        raise ValueError(f"none of {resamples} resamples has both classes; a bootstrap needs more resamples")
    return values


def _interval(value: float, resampled: NDArray[np.float64]) -> AucBootstrap:
    low, high = np.percentile(resampled, _PERCENT)
    return AucBootstrap(value=value, low=float(low), high=float(high), resamples=len(resampled))


def _plain(labels: Labels, scores: Scores) -> float:
    return float(_weighted_auc(labels, scores, np.ones((1, len(labels))))[0])


def bootstrap_aucs(
    labels: Labels, scores: Mapping[str, Scores], patient: NDArray[np.int64], *, resamples: int, seed: int
) -> dict[str, AucBootstrap]:
    """The AUC of each named score with its interval over patients drawn with replacement, the same for all.

    `patient` (n,) numbers the patients; a drawn patient brings all of their rows. Resamples without both classes are
    left out and not counted. ValueError under two patients with acute or under two with chronic vertebrae.
    """
    values = _resampled(labels, list(scores.values()), patient, resamples=resamples, seed=seed)
    return {name: _interval(_plain(labels, one), values[place]) for place, (name, one) in enumerate(scores.items())}


def bootstrap_auc_differences(
    labels: Labels, scores: Mapping[str, Scores], patient: NDArray[np.int64], *, resamples: int, seed: int
) -> dict[tuple[str, str], AucBootstrap]:
    """For each pair of named scores the difference of their AUCs (first minus second), as `bootstrap_aucs`."""
    values = _resampled(labels, list(scores.values()), patient, resamples=resamples, seed=seed)
    place = {name: n for n, name in enumerate(scores)}
    return {
        (first, second): _interval(
            _plain(labels, scores[first]) - _plain(labels, scores[second]), values[place[first]] - values[place[second]]
        )
        for first, second in itertools.combinations(scores, 2)
    }
