import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.statistics.performance import (
    ConfusionTable,
    confusion,
    performance,
    wilson,
    youden_threshold,
)


def test_the_row_of_the_paper_that_can_be_counted_again() -> None:
    # Table 2, DLR, test cohort: ACC 81.7, SEN 88.9, SPE 70.7, F1 0.855
    found = performance(ConfusionTable(tp=56, fn=7, tn=29, fp=12))

    assert found.accuracy.value == pytest.approx(0.8173, abs=5e-5)
    assert found.sensitivity.value == pytest.approx(0.8889, abs=5e-5)
    assert found.specificity.value == pytest.approx(0.7073, abs=5e-5)
    assert found.f1.value == pytest.approx(0.8550, abs=5e-5)
    assert found.ppv is not None
    assert found.ppv.value == 56 / 68
    assert found.npv is not None
    assert found.npv.value == 29 / 36


def test_every_case_is_counted_once() -> None:
    counts = confusion(np.array([1, 1, 0, 0, 0]), np.array([True, False, True, False, False]))

    assert counts == ConfusionTable(tp=1, fn=1, tn=2, fp=1)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_accuracy_lies_between_sensitivity_and_specificity_and_every_share_in_its_interval(
    tp: int, fn: int, tn: int, fp: int
) -> None:
    if tp + fn == 0 or tn + fp == 0:
        return

    found = performance(ConfusionTable(tp=tp, fn=fn, tn=tn, fp=fp))

    low, high = sorted((found.sensitivity.value, found.specificity.value))
    assert low - 1e-12 <= found.accuracy.value <= high + 1e-12
    for share in (found.accuracy, found.sensitivity, found.specificity, found.f1, found.ppv, found.npv):
        if share is not None:
            assert 0 <= share.low <= share.value + 1e-12
            assert share.value - 1e-12 <= share.high <= 1
    assert (found.ppv is None) == (tp + fp == 0)
    assert (found.npv is None) == (tn + fn == 0)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [
        # prop.test(count, of, correct = FALSE)$conf.int
        (81, 263, 0.2552895, 0.3662072),
        (0, 20, 0.0, 0.1611252),
        (1, 29, 0.006113213, 0.171755219),
    ],
)
def test_wilsons_interval_is_that_of_newcombe_1998(count: int, of: int, low: float, high: float) -> None:
    share = wilson(count, of)

    assert (share.low, share.high) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.integers(1, 400), st.data())
def test_wilsons_ends_are_where_the_score_test_just_rejects(of: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, of - 1)) if of > 1 else 1

    share = wilson(count, of)

    ends = [end for end in (share.low, share.high) if 0 < end < 1]
    for end in ends:
        assert abs(share.value - end) / math.sqrt(end * (1 - end) / of) == pytest.approx(1.959963984540054, rel=1e-6)


@pytest.mark.shared_data
def test_youdens_threshold_is_that_of_proc(shared_data: Path) -> None:
    with (shared_data / "stats-roc" / "aSAH.csv").open() as stream:
        cases = list(csv.DictReader(stream))
    labels = np.array([case["outcome"] == "Poor" for case in cases], dtype=np.int64)
    reference: dict[str, Any] = json.loads((shared_data.parent / "reference" / "statistics.json").read_text())

    for name, expected in reference["pROC_aSAH"]["youden"].items():
        scores = np.array([float(case[name]) for case in cases])
        threshold = youden_threshold(labels, scores)
        found = performance(confusion(labels, scores >= threshold))
        assert threshold == pytest.approx(expected["threshold"], abs=1e-9)
        assert found.sensitivity.value == pytest.approx(expected["sens"], abs=1e-9)
        assert found.specificity.value == pytest.approx(expected["spec"], abs=1e-9)
        if "acc" in expected:
            assert found.accuracy.value == pytest.approx(expected["acc"], abs=1e-9)


def test_the_threshold_lies_halfway_between_the_classes_when_they_are_apart() -> None:
    labels = np.array([0, 0, 1, 1])

    threshold = youden_threshold(labels, np.array([0.1, 0.2, 0.6, 0.9]))

    assert threshold == pytest.approx(0.4)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1)), min_size=4, max_size=40))
def test_no_other_threshold_does_better_in_the_table_of_right_and_wrong(cases: list[tuple[int, float]]) -> None:
    labels, scores = np.array([label for label, _ in cases]), np.array([score for _, score in cases])
    if len(np.unique(labels)) < 2 or len(np.unique(scores)) < 2:
        return

    def youden(threshold: float) -> float:
        found = performance(confusion(labels, scores >= threshold))
        return found.sensitivity.value + found.specificity.value - 1

    threshold = youden_threshold(labels, scores)

    best = max(youden(float(value)) for value in np.unique(scores)[1:])
    assert youden(threshold) == pytest.approx(best, abs=1e-11)
    assert 0 < (scores >= threshold).sum() < len(scores)


def test_what_cannot_be_counted_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="at least 1 case of each class, got 3 acute and 0 chronic"):
        youden_threshold(np.array([1, 1, 1]), np.array([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="two different scores, got 1"):
        youden_threshold(np.array([0, 1]), np.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="at least 1 case of each class, got 2 acute and 0 chronic"):
        performance(ConfusionTable(tp=1, fn=1, tn=0, fp=0))
    with pytest.raises(ValueError, match="at least 1 case, got 0 of 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="one call for each label"):
        confusion(np.array([0, 1]), np.array([True]))
