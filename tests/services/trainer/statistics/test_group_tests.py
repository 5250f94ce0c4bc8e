import itertools

import numpy as np
import pytest

from services.trainer.statistics.group_tests import (
    Summary,
    chi_square,
    counts_test,
    fisher,
    simulated_chi_square,
    welch,
    welch_from_summaries,
)


def test_welchs_t_is_that_of_r_from_values_and_from_what_is_printed() -> None:
    # t.test(extra ~ group, data = sleep): t = -1.8608, df = 17.776, p-value = 0.07939
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])

    found = welch(first, second)

    assert found.statistic == pytest.approx(-1.8608, abs=5e-5)
    assert found.degrees_of_freedom == pytest.approx(17.776, abs=5e-4)
    assert found.p == pytest.approx(0.07939, abs=5e-6)
    assert welch_from_summaries(Summary.of(first), Summary.of(second)) == found


def test_fishers_test_is_that_of_r() -> None:
    # fisher.test(matrix(c(3, 1, 1, 3), 2)), the lady tasting tea: p-value = 0.4857
    assert fisher(np.array([[3, 1], [1, 3]])).p == pytest.approx(0.485714, abs=1e-6)


def test_chi_square_is_that_of_r_with_and_without_yates() -> None:
    # M <- rbind(c(762, 327, 468), c(484, 239, 477)); chisq.test(M): X-squared = 30.07, df = 2, p-value = 2.954e-07
    large = chi_square(np.array([[762, 327, 468], [484, 239, 477]]), yates=True)
    two = np.array([[12, 5], [7, 7]])

    plain, corrected = chi_square(two, yates=False), chi_square(two, yates=True)

    assert (large.statistic, large.degrees_of_freedom) == pytest.approx((30.07, 2), abs=5e-3)
    assert large.p == pytest.approx(2.954e-7, abs=5e-11)
    assert large.name == "chi-square test"
    n, cross = 31, 12 * 7 - 5 * 7
    margins = 17 * 14 * 19 * 12
    assert plain.statistic == pytest.approx(n * cross**2 / margins)
    assert corrected.statistic == pytest.approx(n * (cross - n / 2) ** 2 / margins)
    assert corrected.name == "chi-square test with Yates' correction"


def test_the_simulated_p_comes_near_that_of_all_tables_and_repeats() -> None:
    counts = np.array([[4, 1], [2, 3], [0, 5]])
    labels = np.repeat([0, 1, 2], 5)
    expected = np.array([[2.0, 3.0]] * 3)
    statistic = ((counts - expected) ** 2 / expected).sum()
    # every way to give 6 of the 15 cases to the first group
    ways = [np.bincount(labels[list(first)], minlength=3) for first in itertools.combinations(range(15), 6)]
    columns = np.array(ways)
    others = ((columns - 2) ** 2 / 2).sum(axis=1) + ((5 - columns - 3) ** 2 / 3).sum(axis=1)

    found = simulated_chi_square(counts, seed=1)

    assert found.statistic == pytest.approx(statistic)
    assert found.p == pytest.approx((others >= statistic - 1e-9).mean(), abs=0.015)
    assert found == simulated_chi_square(counts, seed=1)


@pytest.mark.parametrize(
    ("counts", "name"),
    [
        ([[20, 30], [25, 15]], "chi-square test with Yates' correction"),
        ([[20, 30], [0, 0], [25, 15]], "chi-square test with Yates' correction"),
        ([[2, 3], [25, 15]], "Fisher's exact test"),
        ([[20, 30], [25, 15], [30, 30]], "chi-square test"),
        ([[2, 3], [25, 15], [30, 30]], "chi-square test, p from 9999 simulated tables"),
    ],
)
def test_the_test_follows_from_the_counts(counts: list[list[int]], name: str) -> None:
    found = counts_test(np.array(counts), seed=3)

    assert found.name == name
    assert 0 < found.p <= 1


def test_groups_that_are_not_there_are_said() -> None:
    with pytest.raises(ValueError, match=r"at least 2 categories and 2 groups that are not empty, got \(2, 1\)"):
        counts_test(np.array([[3, 0], [4, 0]]), seed=0)
    with pytest.raises(ValueError, match="at least 2 values, got 1"):
        welch(np.array([1.0]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="two groups without spread"):
        welch(np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    with pytest.raises(ValueError, match="two by two"):
        fisher(np.ones((3, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="at least 1 case in each row and column"):
        chi_square(np.array([[0, 0], [1, 2]]), yates=False)
