import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.cohort_table import TooSmall
from services.trainer.results import SelectionStep
from services.trainer.selection import (
    Columns,
    alphas_of,
    fit_lasso,
    recorded,
    select,
    spearman_filter,
    stability,
    varying,
    without_correlated,
)
from services.trainer.settings import SelectionSettings

QUICK = SelectionSettings(alphas=(-2.5, 0.0, 12), folds=4, stability_bootstraps=5)


def _correlated(seed: int, rows: int = 40) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    roots = rng.standard_normal((rows, 4))
    columns = [roots[:, n % 4] + rng.uniform(0.01, 0.8) * rng.standard_normal(rows) for n in range(14)]
    return np.column_stack([*columns, columns[0], np.round(columns[1])]), [f"f{n:02d}" for n in range(16)]


def _cohort(seed: int = 5, *, strength: float = 1.5) -> tuple[Columns, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    acute = np.repeat([0, 1], 60)
    values = rng.standard_normal((120, 12))
    values[:, 4] += strength * acute
    values[:, 7] = values[:, 4] + 0.05 * rng.standard_normal(120)
    return Columns(names=tuple(f"f{n:02d}" for n in range(12)), values=values), acute, rng.permutation(120) // 2


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


@pytest.mark.parametrize("family", ["gaussian", "logistic"])
def test_lasso_keeps_what_tells_the_classes_apart(family: str) -> None:
    columns, acute, patient = _cohort()

    selected = select("hcr", columns, acute, patient, QUICK.model_copy(update={"lasso": family}))

    assert {"f04", "f07"} & set(selected.names)
    assert [one.step for one in selected.steps] == ["all", "not constant", "Spearman", "LASSO"]
    assert selected.steps[2].left == 11  # of the two that are nearly equal one went


def test_the_alpha_of_one_standard_error_is_not_smaller_and_keeps_no_more() -> None:
    columns, acute, patient = _cohort(strength=0.8)

    least = select("dtl", columns, acute, patient, QUICK)
    one_se = select("dtl", columns, acute, patient, QUICK.model_copy(update={"rule": "1se"}))

    assert one_se.lasso.alphas[one_se.lasso.chosen] >= least.lasso.alphas[least.lasso.chosen]
    assert len(one_se.names) <= len(least.names)
    assert one_se.lasso.chosen < least.lasso.chosen


def test_where_lasso_keeps_nothing_the_first_of_its_path_is_taken_and_said() -> None:
    rng = np.random.default_rng(6)
    z = rng.standard_normal((60, 3))
    z[:, 1] += 0.2 * (np.arange(60) % 2)

    fit = fit_lasso(
        z, ["a", "b", "c"], np.arange(60) % 2, np.arange(60), QUICK.model_copy(update={"alphas": (0.0, 1.0, 3)})
    )

    assert fit.fallback
    assert len(fit.kept) == 1
    largest = np.abs(z.T @ (np.arange(60) % 2 - 0.5)).argmax()
    assert fit.kept == ("abc"[largest],)


@given(order=st.permutations(range(12)))
@settings(max_examples=8, deadline=None)
def test_a_shuffled_column_order_leaves_the_whole_selection_identical(order: list[int]) -> None:
    columns, acute, patient = _cohort()
    shuffled = Columns(names=tuple(columns.names[n] for n in order), values=columns.values[:, order])

    mine = recorded(select("hcr", columns, acute, patient, QUICK), columns, acute, patient, QUICK, seed=3)
    theirs = recorded(select("hcr", shuffled, acute, patient, QUICK), shuffled, acute, patient, QUICK, seed=3)

    assert mine == theirs


def test_the_step_after_lasso_keeps_the_larger_coefficient_of_a_correlated_pair() -> None:
    rng = np.random.default_rng(2)
    first, other = rng.standard_normal(80), rng.standard_normal(80)
    values = np.column_stack([first, first + 0.3 * rng.standard_normal(80), other])

    kept = without_correlated(values, ["a", "b", "c"], {"a": 0.1, "b": -0.4, "c": 0.01}, limit=0.5)

    assert kept == ("b", "c")


def test_the_paper_step_stands_among_the_steps() -> None:
    columns, acute, patient = _cohort()

    selected = select("hcr", columns, acute, patient, QUICK.model_copy(update={"post_lasso_spearman": 0.5}))

    assert selected.steps[-1] == SelectionStep(step="Spearman 0.5 after LASSO", features=selected.names)


def test_the_recorded_path_ends_where_the_fit_does() -> None:
    columns, acute, patient = _cohort()
    selected = select("dtl", columns, acute, patient, QUICK)

    record = recorded(selected, columns, acute, patient, QUICK, seed=1)

    path = record.lasso
    at = dict(zip(path.names, path.coefficients[path.chosen], strict=True))
    assert record.selected == selected.names
    for name, coefficient in zip(record.selected, record.coefficients, strict=True):
        assert at[name] == pytest.approx(coefficient, abs=2e-3)
    assert path.alphas == tuple(sorted(path.alphas, reverse=True))
    assert path.error_mean[path.chosen] == min(path.error_mean)
    assert all(abs(value) < 1e-12 for value in path.coefficients[0])  # at alpha 1 nothing is left


def test_a_strong_feature_is_selected_in_every_bootstrap_and_noise_rarely() -> None:
    columns, acute, patient = _cohort(strength=3.0)
    kept = columns.of([name for name in columns.names if name != "f07"])

    found = stability(
        kept,
        [name for name in columns.names if name != "f07"],
        acute,
        patient,
        alpha=0.1,
        bootstraps=20,
        seed=1,
    )

    assert found["f04"] == 1.0
    assert all(share < 0.6 for name, share in found.items() if name != "f04")


def test_fewer_patients_than_folds_says_which_step_what_it_needs_and_what_there_is() -> None:
    columns, acute, _ = _cohort()

    with pytest.raises(TooSmall, match="the step LASSO: it needs 4 patients, one a fold, and there is 3"):
        select("dtl", columns, acute, np.arange(120) % 3, QUICK)


def test_the_alphas_are_those_of_the_paper_s_grid() -> None:
    alphas = alphas_of(SelectionSettings())[::-1]

    assert alphas[18] == pytest.approx(0.012648552168552958)
    assert alphas[19] == pytest.approx(0.014563484775012436)
