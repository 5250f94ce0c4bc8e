"""The arithmetic of docs/paper-notes.md, from the numbers that the paper prints; results are looked up in the page."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from services.trainer.settings import TrainingSettings
from services.trainer.statistics.group_tests import Summary, chi_square, fisher, welch_from_summaries
from services.trainer.statistics.performance import ConfusionTable, performance

Z95 = 1.959963984540054
PAGE = re.sub(r"\s+", " ", (Path(__file__).parents[3] / "docs" / "paper-notes.md").read_text(encoding="utf-8"))

ROWS = {
    # Table 2: model, part → acute, chronic vertebrae; ACC, SEN, SPE in %, F1
    ("Radiomics", "training"): (252, 164, 92.3, 95.2, 92.0, 0.950),
    ("DLR", "training"): (252, 164, 94.9, 94.4, 96.1, 0.958),
    ("Features Fusion", "training"): (252, 164, 97.1, 96.0, 98.1, 0.973),
    ("DLRN", "training"): (252, 164, 98.2, 95.3, 97.0, 0.975),
    ("Radiomics", "test"): (63, 41, 84.6, 77.8, 75.1, 0.802),
    ("DLR", "test"): (63, 41, 81.7, 88.9, 70.7, 0.855),
    ("Features Fusion", "test"): (63, 41, 88.5, 93.6, 82.9, 0.914),
    ("DLRN", "test"): (63, 41, 90.1, 92.6, 85.2, 0.925),
}


def _p_of(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _error(low: float, high: float) -> float:
    return (high - low) / (2 * Z95)


def test_the_features_by_class_are_41_and_the_fused_ones_74() -> None:
    assert 19 + 2 + 15 + 4 + 1 == 41
    assert 30 + 44 == 74
    assert 14 + 19 * (18 + 22 + 16 + 16 + 14) == 1648
    assert 14 + 19 * (18 + 22 + 16 + 16 + 14 + 5) == 1743
    assert "= 41" in PAGE
    assert "14 + 19 × 86 = 1648" in PAGE
    assert "14 + 19 × 91 = 1743" in PAGE


def test_welchs_t_on_the_printed_ages() -> None:
    acute, chronic = Summary(count=253, mean=59.3, deviation=18.1), Summary(count=112, mean=71.1, deviation=11.9)
    nearer = (
        Summary(count=253, mean=59.35, deviation=18.15),
        Summary(count=112, mean=71.05, deviation=11.95),
    )

    found = welch_from_summaries(acute, chronic)

    assert found.statistic is not None
    assert (
        f"t = −{-found.statistic:.2f} with {found.degrees_of_freedom:.1f} degrees of freedom, p = {found.p:.1e}" in PAGE
    )
    assert found.p == pytest.approx(1.5e-12, abs=5e-14)
    assert welch_from_summaries(*nearer).p < 1e-11


def test_the_mean_age_of_all_follows_from_the_two_groups() -> None:
    mean = (253 * 59.3 + 112 * 71.1) / 365

    assert f"/ 365 = {mean:.1f}" in PAGE
    assert abs(mean - 61.7) > 0.05 + 0.05


@pytest.mark.parametrize(
    ("counts", "printed"), [([[164, 78], [89, 34]], 0.812), ([[111, 88], [204, 117]], 0.956)], ids=["sex", "region"]
)
def test_no_common_test_gives_the_printed_p_of_the_counts(counts: list[list[int]], printed: float) -> None:
    table = np.array(counts)

    plain, yates, exact = (
        test.p for test in (chi_square(table, yates=False), chi_square(table, yates=True), fisher(table))
    )

    assert f"gives p = {plain:.3f} (chi-square), {yates:.3f} (" in PAGE
    assert f", {exact:.3f} (Fisher)" in PAGE
    assert all(abs(p - printed) > 0.3 for p in (plain, yates, exact))


def test_the_sexes_of_the_table_are_not_those_of_the_text() -> None:
    assert (164 + 78, 89 + 34) == (242, 123)
    assert 242 + 123 == 216 + 149 == 365
    assert "they differ by 26" in PAGE
    assert 242 - 216 == 26


def test_a_split_by_patient_seldom_gives_exactly_eight_tenths_of_each_class() -> None:
    rng = np.random.default_rng(1)
    hits, draws = 0, 4000

    for _ in range(draws):
        acute = 1 + rng.multinomial(315 - 253, np.full(253, 1 / 253))
        chronic = 1 + rng.multinomial(205 - 112, np.full(112, 1 / 112))
        hits += acute[:51].sum() == 63 and chronic[:22].sum() == 41

    assert 0.005 < hits / draws < 0.025
    assert "1.3 % when the 62 and 93 vertebrae beyond one a patient fall on patients at random" in PAGE


def test_accuracy_lies_outside_sensitivity_and_specificity_in_two_rows() -> None:
    outside = {
        (model, part): (sen * acute + spe * chronic) / (acute + chronic)
        for (model, part), (acute, chronic, acc, sen, spe, _) in ROWS.items()
        if not min(sen, spe) - 0.05 <= acc <= max(sen, spe) + 0.05
    }

    assert set(outside) == {("Radiomics", "test"), ("DLRN", "training")}
    for (model, part), weighted in outside.items():
        acute, chronic, acc, sen, spe, _ = ROWS[model, part]
        assert f"| {model}, {part} ({acute}, {chronic}) | {acc} | {sen} | {spe} | {weighted:.1f} |" in PAGE


def test_one_row_alone_can_be_counted_again() -> None:
    def counted(acute: int, chronic: int, acc: float, sen: float, spe: float, f1: float) -> list[ConfusionTable]:
        tables = [
            ConfusionTable(tp=tp, fn=acute - tp, tn=tn, fp=chronic - tn)
            for tp, tn in itertools.product(range(acute + 1), range(chronic + 1))
            if abs(100 * tp / acute - sen) <= 0.05 + 1e-9 and abs(100 * tn / chronic - spe) <= 0.05 + 1e-9
        ]
        shown = [(table, performance(table)) for table in tables]
        return [
            table
            for table, found in shown
            if abs(100 * found.accuracy.value - acc) <= 0.05 + 1e-9 and abs(found.f1.value - f1) <= 0.0005 + 1e-9
        ]

    again = {row: counted(*numbers) for row, numbers in ROWS.items()}

    assert {row for row, tables in again.items() if tables} == {("DLR", "test")}
    assert again["DLR", "test"] == [ConfusionTable(tp=56, fn=7, tn=29, fp=12)]
    assert "TP 56, FN 7, TN 29, FP 12" in PAGE


def test_the_shares_that_the_page_calls_impossible_are() -> None:
    def possible(percent: float, of: int) -> bool:
        return any(abs(100 * count / of - percent) <= 0.05 + 1e-9 for count in range(of + 1))

    assert not possible(75.1, 41)
    assert f"30 of 41 = {3000 / 41:.1f}, 31 of 41 = {3100 / 41:.1f}" in PAGE
    assert f"59 of 63 = {5900 / 63:.2f}" in PAGE
    assert f"59 + 34 = 93 right answers give ACC {9300 / 104:.1f}, printed is {9200 / 104:.1f}" in PAGE
    assert not any((possible(92.6, 63), possible(85.2, 41), possible(90.1, 104)))


def test_the_p_of_fusion_against_nomogram_is_above_the_largest_that_its_intervals_allow() -> None:
    fusion, nomogram = _error(0.855, 0.974), _error(0.906, 0.987)
    largest = _p_of((0.946 - 0.915) / (fusion + nomogram))
    half = 0.0005
    in_favour = _p_of(
        (0.946 - 0.915 - 2 * half) / (_error(0.855 - half, 0.974 + half) + _error(0.906 - half, 0.987 + half))
    )
    training = _p_of((0.998 - 0.997) / (_error(0.994, 0.999) + _error(0.996, 0.999)))

    assert f"SE = {fusion:.4f} and {nomogram:.4f}" in PAGE
    assert (
        f"= {fusion + nomogram:.4f}; then Z = 0.031 / {fusion + nomogram:.4f} = {0.031 / (fusion + nomogram):.2f}"
        in PAGE
    )
    assert f"and p = {largest:.3f}" in PAGE
    assert f"in favour of the paper, p = {in_favour:.3f}" in PAGE
    assert largest < in_favour < 0.668
    assert f"p = 0.794 stands against {training:.3f}" in PAGE


def test_radiomics_against_dlr_would_need_nearly_the_same_scores() -> None:
    radiomics, dlr, difference = _error(0.773, 0.934), _error(0.805, 0.938), 0.871 - 0.854
    needed = difference / Z95
    correlation = (radiomics**2 + dlr**2 - needed**2) / (2 * radiomics * dlr)
    half = _p_of(difference / math.sqrt(radiomics**2 + dlr**2 - radiomics * dlr))

    assert f"needs SE ≤ {needed:.4f}, which needs a correlation of the two AUCs of at least {correlation:.3f}" in PAGE
    assert f"p = {half:.3f}. The test is not corrected" in PAGE


def test_the_printed_alphas_are_points_of_the_grid_cut_to_three_decimals() -> None:
    grid = np.logspace(-3, 0, 50)

    assert [math.floor(1000 * grid[n]) / 1000 for n in (18, 19)] == [0.012, 0.014]
    assert f"points 18 and 19 ({grid[18]:.5f}, {grid[19]:.5f})" in PAGE


def test_the_table_of_presets_says_what_the_settings_say() -> None:
    paper, recommended = TrainingSettings.of("paper"), TrainingSettings.of("recommended")

    assert (paper.network.mode, recommended.network.mode) == ("in_sample", "frozen")
    assert (paper.selection.post_lasso_spearman, recommended.selection.post_lasso_spearman) == (0.5, None)
    assert (paper.classifiers.score, recommended.classifiers.score) == ("lasso", "logistic")
    assert "| `in_sample`, with its optimism beside the result | `frozen` (or `crossfit`) |" in PAGE
