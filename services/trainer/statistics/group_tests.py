"""The tests of Table 1: whether two groups differ in age, or in how they fall into categories.

Each answer names the test that was done, since which one is chosen depends on the counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, chi2_contingency, fisher_exact, random_table
from scipy.stats import t as student_t

_LEAST_EXPECTED: Final = 5
_SIMULATED: Final = 9_999


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A group of numbers as papers print it: how many, mean, and sample SD (divided by n - 1)."""

    count: int
    mean: float
    deviation: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Summary:
        """The summary of values (n,); ValueError under two values."""
        if len(values) < 2:
            raise ValueError(f"a standard deviation needs at least 2 values, got {len(values)}")
        return cls(count=len(values), mean=float(values.mean()), deviation=float(values.std(ddof=1)))


@dataclass(frozen=True, kw_only=True)
class GroupTest:
    """What was tested with which test, its statistic, degrees of freedom (where it has them), and two-sided p."""

    name: str
    statistic: float | None
    degrees_of_freedom: float | None
    p: float


def welch_from_summaries(first: Summary, second: Summary) -> GroupTest:
    """Welch's t test (unequal variances) of two means from what a paper prints."""
    for one in (first, second):
        if one.count < 2:
            raise ValueError(f"Welch's t test needs at least 2 values in each group, got {one.count}")
    parts = [one.deviation**2 / one.count for one in (first, second)]
    if sum(parts) <= 0:
        raise ValueError("Welch's t test needs values that differ, got two groups without spread")
    t = (first.mean - second.mean) / math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(part**2 / (one.count - 1) for part, one in zip(parts, (first, second), strict=True))
    return GroupTest(
        name="Welch's t test", statistic=t, degrees_of_freedom=freedom, p=float(2 * student_t.sf(abs(t), freedom))
    )


def welch(first: NDArray[np.float64], second: NDArray[np.float64]) -> GroupTest:
    """Welch's t test (unequal variances) of two groups of numbers."""
    return welch_from_summaries(Summary.of(first), Summary.of(second))


def chi_square(counts: NDArray[np.int64], *, yates: bool) -> GroupTest:
    """Pearson's chi-square test of a table of counts, for two by two on request with Yates' correction."""
    found = chi2_contingency(_checked(counts), correction=yates)
    corrected = yates and counts.shape == (2, 2)
    return GroupTest(
        name="chi-square test with Yates' correction" if corrected else "chi-square test",
        statistic=float(found.statistic),
        degrees_of_freedom=float(found.dof),
        p=float(chi2.sf(found.statistic, found.dof)),
    )


def fisher(counts: NDArray[np.int64]) -> GroupTest:
    """Fisher's exact test of two by two counts."""
    if counts.shape != (2, 2):
        raise ValueError(f"Fisher's exact test is done here for two by two counts, got {counts.shape}")
    return GroupTest(
        name="Fisher's exact test",
        statistic=None,
        degrees_of_freedom=None,
        p=min(1.0, float(fisher_exact(_checked(counts)).pvalue)),
    )


def simulated_chi_square(counts: NDArray[np.int64], *, seed: int, tables: int = _SIMULATED) -> GroupTest:
    """The chi-square statistic against that of random tables of the same margins, p = (1 + as large) / (1 + tables).

    For small counts in more than two categories, as R's chisq.test(simulate.p.value = TRUE).
    """
    table = _checked(counts)
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    expected = np.outer(rows, columns) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    drawn = random_table(rows, columns, seed=seed).rvs(size=tables)
    others = ((drawn - expected) ** 2 / expected).sum(axis=(1, 2))
    as_large = int((others >= statistic * (1 - 1e-9)).sum())
    return GroupTest(
        name=f"chi-square test, p from {tables} simulated tables",
        statistic=statistic,
        degrees_of_freedom=None,
        p=(1 + as_large) / (1 + tables),
    )


def counts_test(counts: NDArray[np.int64], *, seed: int) -> GroupTest:
    """The test that fits a table of counts (categories, groups); empty rows and columns are left out.

    Two by two: chi-square with Yates' correction (R's default), Fisher's exact test where a count under 5 is expected.
    Larger: chi-square, with a simulated p where a count under 5 is expected.
    """
    filled = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if min(filled.shape, default=0) < 2:
        raise ValueError(
            f"a test of counts needs at least 2 categories and 2 groups that are not empty, got {filled.shape}"
        )
    expected = np.outer(filled.sum(axis=1), filled.sum(axis=0)) / filled.sum()
    small = bool(expected.min() < _LEAST_EXPECTED)
    if filled.shape == (2, 2):
        return fisher(filled) if small else chi_square(filled, yates=True)
    return simulated_chi_square(filled, seed=seed) if small else chi_square(filled, yates=False)


def _checked(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    if counts.ndim != 2 or min(counts.shape) < 2 or (counts < 0).any():
        raise ValueError(f"a test of counts needs a table of at least 2 by 2 counts, got shape {counts.shape}")
    if (counts.sum(axis=0) == 0).any() or (counts.sum(axis=1) == 0).any():
        raise ValueError("a test of counts needs at least 1 case in each row and column")
    return counts
