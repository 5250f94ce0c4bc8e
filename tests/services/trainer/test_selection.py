import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.selection import lasso, spearman_filter, varying


def _correlated(seed: int, rows: int = 40) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    roots = rng.standard_normal((rows, 4))
    columns = [roots[:, n % 4] + rng.uniform(0.01, 0.8) * rng.standard_normal(rows) for n in range(14)]
    return np.column_stack([*columns, columns[0], np.round(columns[1])]), [f"f{n:02d}" for n in range(16)]


@given(seed=st.integers(0, 1000), order=st.permutations(range(16)))
@settings(max_examples=40, deadline=None)
def test_the_spearman_filter_does_not_depend_on_the_order_of_the_columns(seed: int, order: list[int]) -> None:
    values, names = _correlated(seed)

    kept = spearman_filter(values, names)
    shuffled = spearman_filter(values[:, order], [names[n] for n in order])

    assert set(kept) == set(shuffled)


def test_no_two_of_the_kept_features_are_correlated_above_the_limit() -> None:
    values, names = _correlated(3)

    kept = spearman_filter(values, names)

    ranks = np.argsort(np.argsort(values[:, [names.index(name) for name in kept]], axis=0), axis=0)
    rho = np.abs(np.corrcoef(ranks, rowvar=False)) - np.eye(len(kept))
    assert rho.max() <= 0.9 + 0.02
    assert 0 < len(kept) < len(names)


def test_of_two_equal_features_the_earlier_name_stays() -> None:
    column = np.random.default_rng(0).standard_normal(20)

    assert spearman_filter(np.column_stack([column, column]), ["b", "a"]) == ("a",)


def test_constant_columns_go() -> None:
    values = np.column_stack([np.arange(10.0), np.full(10, 1e11), np.full(10, 0.1)])

    assert varying(values, ["moves", "large", "small"]) == ("moves",)


def test_lasso_keeps_what_tells_the_classes_apart() -> None:
    rng = np.random.default_rng(5)
    acute = np.repeat([0, 1], 60)
    values = rng.standard_normal((120, 12))
    values[:, 4] += 1.5 * acute
    patient = rng.permutation(np.arange(120) // 2)

    kept = lasso(values, [f"f{n}" for n in range(12)], acute, patient)

    assert "f4" in kept


def test_lasso_keeps_one_feature_of_pure_noise() -> None:
    rng = np.random.default_rng(6)

    kept = lasso(rng.standard_normal((60, 3)), ["a", "b", "c"], np.arange(60) % 2, np.arange(60))

    assert len(kept) >= 1
