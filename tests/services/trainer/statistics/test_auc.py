import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.trainer.statistics.auc import (
    auc_delong,
    bootstrap_auc_differences,
    bootstrap_aucs,
    compare_aucs,
    delong_test,
    delong_test_unpaired,
    holm,
)

Cases = tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]


@pytest.fixture
def haemorrhage(shared_data: Path) -> Cases:
    """PROC's aSAH: the outcome (poor is 1) and three markers of 113 patients."""
    with (shared_data / "stats-roc" / "aSAH.csv").open() as stream:
        cases = list(csv.DictReader(stream))
    labels = np.array([case["outcome"] == "Poor" for case in cases], dtype=np.int64)
    return labels, {name: np.array([float(case[name]) for case in cases]) for name in ("wfns", "s100b", "ndka")}


@pytest.fixture
def proc(shared_data: Path) -> dict[str, Any]:
    reference: dict[str, Any] = json.loads((shared_data.parent / "reference" / "statistics.json").read_text())
    return reference["pROC_aSAH"]  # type: ignore[no-any-return]


def _classes(draw: st.DrawFn) -> NDArray[np.int64]:
    acute, chronic = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    return np.array([1] * acute + [0] * chronic)


@st.composite
def labelled_scores(draw: st.DrawFn, columns: int = 1) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    labels = _classes(draw)
    few = st.lists(st.integers(0, 6), min_size=len(labels), max_size=len(labels))
    return labels, [np.array(draw(few), dtype=np.float64) for _ in range(columns)]


@pytest.mark.shared_data
def test_auc_and_delong_agree_with_proc(shared_data: Path, haemorrhage: Cases) -> None:
    labels, scores = haemorrhage
    with (shared_data / "stats-roc" / "proc_reference.csv").open() as stream:
        reference = list(csv.DictReader(stream))

    for row in reference:
        first, what = scores[row["a"]], row["quantity"]
        if row["b"]:
            paired = delong_test(labels, first, scores[row["b"]])
            got = {
                "delong_Z": paired.z,
                "delong_p": paired.p,
                "delong_diff_ci_lo": paired.low,
                "delong_diff_ci_hi": paired.high,
            }[what]
        else:
            auc = auc_delong(labels, first)
            got = {"auc": auc.value, "ci95_lo_delong": auc.low, "ci95_hi_delong": auc.high}[what]
        assert got == pytest.approx(float(row["value"]), abs=max(float(row["tol"]), 1e-9)), row


@pytest.mark.shared_data
def test_variances_and_every_pair_agree_with_proc(haemorrhage: Cases, proc: dict[str, Any]) -> None:
    labels, scores = haemorrhage

    for name, variance in proc["var"].items():
        auc = auc_delong(labels, scores[name])
        assert auc.variance == pytest.approx(variance, abs=1e-14)
        assert (auc.low, auc.high) == pytest.approx(proc["ci95"][name], abs=1e-10)
    for pair, expected in proc["paired"].items():
        first, second = pair.split("_vs_")
        paired = delong_test(labels, scores[first], scores[second])
        assert (paired.z, paired.p) == pytest.approx((expected["Z"], expected["p"]), abs=1e-12)
        assert (paired.low, paired.high) == pytest.approx(expected["ci"], abs=1e-12)


@pytest.mark.shared_data
def test_the_unpaired_test_agrees_with_proc(haemorrhage: Cases, proc: dict[str, Any]) -> None:
    labels, scores = haemorrhage

    for pair, expected in proc["unpaired_D"].items():
        first, second = pair.split("_vs_")
        test = delong_test_unpaired(labels, scores[first], labels, scores[second])
        assert (test.d, test.p) == pytest.approx((expected["D"], expected["p"]), abs=1e-12), pair


@settings(deadline=None)
@given(labelled_scores(columns=2))
def test_delong_is_the_brute_force_form_of_its_placements(
    drawn: tuple[NDArray[np.int64], list[NDArray[np.float64]]],
) -> None:
    labels, (first, second) = drawn
    acute, chronic = labels == 1, labels == 0
    won = [
        (one[acute][:, None] > one[chronic]) + 0.5 * (one[acute][:, None] == one[chronic]) for one in (first, second)
    ]

    auc = auc_delong(labels, first)
    paired = delong_test(labels, first, second)

    assert auc.value == pytest.approx(won[0].mean(), abs=1e-12)
    variance = won[0].mean(axis=1).var(ddof=1) / acute.sum() + won[0].mean(axis=0).var(ddof=1) / chronic.sum()
    assert auc.variance == pytest.approx(variance, abs=1e-12)
    apart = won[0] - won[1]
    of_difference = apart.mean(axis=1).var(ddof=1) / acute.sum() + apart.mean(axis=0).var(ddof=1) / chronic.sum()
    assert paired.difference == pytest.approx(apart.mean(), abs=1e-12)
    assert ((paired.high - paired.low) / (2 * 1.959963984540054)) ** 2 == pytest.approx(of_difference, abs=1e-9)


@settings(deadline=None)
@given(labelled_scores())
def test_the_sign_of_a_score_mirrors_its_auc(drawn: tuple[NDArray[np.int64], list[NDArray[np.float64]]]) -> None:
    labels, (scores,) = drawn

    assert auc_delong(labels, -scores).value == pytest.approx(1 - auc_delong(labels, scores).value, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers_a_p(p_values: list[float]) -> None:
    adjusted = holm(p_values)

    assert all(p <= own <= 1 for p, own in zip(p_values, adjusted, strict=True))
    in_order = [own for _, own in sorted(zip(p_values, adjusted, strict=True))]
    assert in_order == sorted(in_order)
    assert min(adjusted) == pytest.approx(min(1.0, len(p_values) * min(p_values)))


def test_holm_gives_the_numbers_of_r() -> None:
    # p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))


def test_four_models_give_six_pairs_with_holms_p() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 40)
    scores = {
        name: labels * effect + rng.standard_normal(80) for name, effect in zip("abcd", (0, 1, 2, 3), strict=True)
    }

    pairs = compare_aucs(labels, scores)

    assert [(pair.first, pair.second) for pair in pairs] == [
        tuple(pair) for pair in ("ab", "ac", "ad", "bc", "bd", "cd")
    ]
    assert [pair.p_holm for pair in pairs] == list(holm([pair.test.p for pair in pairs]))


@settings(deadline=None)
@given(labelled_scores(), st.integers(0, 1000))
def test_a_resample_is_the_auc_of_the_drawn_rows(
    drawn: tuple[NDArray[np.int64], list[NDArray[np.float64]]], seed: int
) -> None:
    labels, (scores,) = drawn
    patient = np.arange(len(labels)) % 5
    number = len(np.unique(patient))
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number))
    rows = np.repeat(np.arange(len(labels)), counts[patient])
    assume(min((labels[rows] == 0).sum(), (labels[rows] == 1).sum()) >= 2)

    found = bootstrap_aucs(labels, {"one": scores}, patient, resamples=1, seed=seed)["one"]

    assert found.low == found.high == pytest.approx(auc_delong(labels[rows], scores[rows]).value, abs=1e-12)
    assert found.value == pytest.approx(auc_delong(labels, scores).value, abs=1e-12)


def _cohort(seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 120)
    return labels, labels + rng.standard_normal(120), labels / 2 + rng.standard_normal(120)


def test_copies_of_a_patients_rows_narrow_delongs_interval_and_not_that_over_patients() -> None:
    labels, scores, _ = _cohort(2)
    patient = np.arange(120)

    once = bootstrap_aucs(labels, {"one": scores}, patient, resamples=500, seed=3)["one"]
    copied = bootstrap_aucs(
        np.tile(labels, 4), {"one": np.tile(scores, 4)}, np.tile(patient, 4), resamples=500, seed=3
    )["one"]

    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-12)
    delong, of_copies = auc_delong(labels, scores), auc_delong(np.tile(labels, 4), np.tile(scores, 4))
    assert of_copies.high - of_copies.low < 0.6 * (delong.high - delong.low)


def test_over_single_vertebrae_the_bootstrap_comes_near_delong() -> None:
    labels, first, second = _cohort(4)
    scores = {"first": first, "second": second}

    alone = bootstrap_aucs(labels, scores, np.arange(120), resamples=2000, seed=5)["first"]
    apart = bootstrap_auc_differences(labels, scores, np.arange(120), resamples=2000, seed=5)["first", "second"]

    delong, paired = auc_delong(labels, first), delong_test(labels, first, second)
    assert (alone.low, alone.high) == pytest.approx((delong.low, delong.high), abs=0.02)
    assert (apart.low, apart.high) == pytest.approx((paired.low, paired.high), abs=0.03)
    assert apart.value == pytest.approx(paired.difference)


def test_the_same_seed_draws_the_same_patients_whatever_the_order_of_the_rows() -> None:
    labels, scores, _ = _cohort(6)
    patient = np.arange(120) // 3
    shuffled = np.random.default_rng(7).permutation(120)

    once = bootstrap_aucs(labels, {"one": scores}, patient, resamples=300, seed=1)
    again = bootstrap_aucs(labels[shuffled], {"one": scores[shuffled]}, patient[shuffled], resamples=300, seed=1)
    other = bootstrap_aucs(labels, {"one": scores}, patient, resamples=300, seed=2)

    assert again["one"].low == pytest.approx(once["one"].low, abs=1e-12)
    assert other["one"].low != once["one"].low


@pytest.mark.parametrize(
    ("labels", "scores", "says"),
    [
        ([0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], "at least 2 cases of each class, got 1 acute and 3 chronic"),
        ([0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], "got 0 acute and 4 chronic"),
        ([0, 0, 1, 1], [0.1, 0.2, np.nan, 0.4], "finite scores, got 1 that are not"),
        ([0, 0, 1, 2], [0.1, 0.2, 0.3, 0.4], r"labels of 0 and 1, got \[0, 1, 2\]"),
        ([0, 0, 1, 1], [0.1, 0.2, 0.3], "of one length"),
    ],
)
def test_an_auc_says_what_it_needs_and_what_there_is(labels: list[int], scores: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        auc_delong(np.array(labels), np.array(scores))


def test_a_bootstrap_says_what_it_needs_and_what_there_is() -> None:
    labels, scores = np.array([1, 1, *[0] * 18]), np.arange(20.0)

    with pytest.raises(ValueError, match="2 with acute and 2 with chronic vertebrae, got 1 and 9"):
        bootstrap_aucs(labels, {"one": scores}, np.arange(20) // 2, resamples=10, seed=0)
    with pytest.raises(ValueError, match="at least 1 resample, got 0"):
        bootstrap_aucs(labels, {"one": scores}, np.arange(20), resamples=0, seed=0)
    with pytest.raises(ValueError, match="one for each case"):
        bootstrap_aucs(labels, {"one": scores}, np.arange(19), resamples=10, seed=0)


def test_resamples_without_both_classes_are_left_out_and_not_counted() -> None:
    labels, scores = np.array([1, 1, 0, 0]), np.array([0.4, 0.9, 0.1, 0.5])

    found = bootstrap_aucs(labels, {"one": scores}, np.arange(4), resamples=1000, seed=1)["one"]

    # one class alone: 2 * (1/2)^4 of all draws
    assert 840 < found.resamples < 910


def test_an_unpaired_test_needs_an_auc_that_varies() -> None:
    apart = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])

    with pytest.raises(ValueError, match="two whose variance is 0"):
        delong_test_unpaired(*apart, *apart)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_p_value_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, p])
