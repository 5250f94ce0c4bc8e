"""Whether a second reading gives a feature again: the intraclass correlation of a single reading (METHOD 4).

ICC(2,1) asks for absolute agreement: a reader who draws every mask a tenth larger counts as disagreement. ICC(3,1)
forgives such a shift, and stands here to show the difference. Forms and intervals as R's `psych::ICC` has them
(Shrout and Fleiss 1979; McGraw and Wong 1996), for all features at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as fisher_f

Values = NDArray[np.float64]
_CONSTANT = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Icc:
    """An intraclass correlation of each feature (p,) with its interval; nan where a feature is constant."""

    value: Values
    low: Values
    high: Values


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanSquares:
    """Of the two-way layout of n cases and k readings, for each feature (p,): of cases, of readings, and the rest."""

    cases: Values
    readings: Values
    error: Values


def mean_squares(readings: Values) -> MeanSquares:
    """The two-way analysis of variance of `readings` (n cases, k readings, p features), one value a cell."""
    if readings.ndim != 3:
        raise ValueError(f"an ICC needs an array of cases, readings and features, got {readings.ndim} axes")
    cases, times, _ = readings.shape
    if cases < 2 or times < 2:
        raise ValueError(
            f"an ICC needs at least 2 cases with at least 2 readings each, got {cases} cases with {times} readings"
        )
    if not np.isfinite(readings).all():
        raise ValueError(f"an ICC needs finite values, got {int((~np.isfinite(readings)).sum())} that are not")
    centred = readings - readings.mean(axis=(0, 1))
    of_case, of_reading = centred.mean(axis=1), centred.mean(axis=0)
    rest = centred - of_case[:, None, :] - of_reading[None, :, :]
    return MeanSquares(
        cases=times * (of_case**2).sum(axis=0) / (cases - 1),
        readings=cases * (of_reading**2).sum(axis=0) / (times - 1),
        error=(rest**2).sum(axis=(0, 1)) / ((cases - 1) * (times - 1)),
    )


def _scaled(readings: Values) -> tuple[Values, NDArray[np.bool_]]:
    """The readings with each feature's spread brought to 1, and which features are constant to twelve digits."""
    largest = np.abs(readings).max(axis=(0, 1), initial=0.0)
    spread = readings.std(axis=(0, 1))
    constant = spread <= _CONSTANT * largest
    return (readings - readings.mean(axis=(0, 1))) / np.where(constant, 1.0, spread), constant


def icc_agreement(readings: Values, *, confidence: float = 0.95) -> Icc:
    """ICC(2,1), absolute agreement of a single reading, of `readings` (n cases, k readings, p features)."""
    mean_squares(readings)
    scaled, constant = _scaled(readings)
    n, k, _ = readings.shape
    found = mean_squares(scaled)
    rows, columns, error = found.cases, found.readings, found.error
    tail = 1 - (1 - confidence) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (rows - error) / (rows + (k - 1) * error + k * (columns - error) / n)
        # Satterthwaite's degrees of freedom, both parts times the error's mean square so that it may be 0
        shift = n * (1 + (k - 1) * value) - k * value
        above = (k - 1) * (n - 1) * (k * value * columns + shift * error) ** 2
        freedom = above / ((n - 1) * (k * value * columns) ** 2 + (shift * error) ** 2)
        upper_f = fisher_f.ppf(tail, n - 1, freedom)
        lower_f = fisher_f.ppf(tail, freedom, n - 1)
        others = k * columns + (k * n - k - n) * error
        # both parts of the lower end over its F, which may be infinite
        low = n * (rows / upper_f - error) / (others + n * rows / upper_f)
        high = n * (lower_f * rows - error) / (others + n * lower_f * rows)
    same = ~constant & (columns + error <= _CONSTANT**2)
    return _shaped(value, low, high, constant=constant, same=same)


def icc_consistency(readings: Values, *, confidence: float = 0.95) -> Icc:
    """ICC(3,1), consistency of a single reading: blind to a shift between readers; shapes as `icc_agreement`."""
    mean_squares(readings)
    scaled, constant = _scaled(readings)
    n, k, _ = readings.shape
    found = mean_squares(scaled)
    tail = 1 - (1 - confidence) / 2
    freedom = (n - 1, (n - 1) * (k - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (found.cases - found.error) / (found.cases + (k - 1) * found.error)
        ratio = found.cases / found.error
        low_f = ratio / fisher_f.ppf(tail, *freedom)
        high_f = ratio * fisher_f.ppf(tail, *reversed(freedom))
        low, high = (low_f - 1) / (low_f + k - 1), (high_f - 1) / (high_f + k - 1)
    same = ~constant & (found.error <= _CONSTANT**2)
    return _shaped(value, low, high, constant=constant, same=same)


def _shaped(value: Values, low: Values, high: Values, *, constant: NDArray[np.bool_], same: NDArray[np.bool_]) -> Icc:
    """nan where there is nothing to correlate, 1 where the readings are the same."""

    def of(values: Values) -> Values:
        return np.where(constant, np.nan, np.where(same, 1.0, values))

    return Icc(value=of(value), low=of(low), high=of(high))
