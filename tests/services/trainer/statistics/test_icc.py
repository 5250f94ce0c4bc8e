import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.statistics.icc import icc_agreement, icc_consistency, mean_squares


@pytest.fixture
def judges(shared_data: Path) -> dict[str, Any]:
    reference: dict[str, Any] = json.loads((shared_data.parent / "reference" / "statistics.json").read_text())
    return reference["shrout_fleiss_1979"]  # type: ignore[no-any-return]


@pytest.mark.shared_data
def test_both_forms_and_their_intervals_equal_those_of_psych(judges: dict[str, Any]) -> None:
    readings = np.array(judges["table"], dtype=np.float64)[:, :, None]

    found = {"ICC2": icc_agreement(readings), "ICC3": icc_consistency(readings)}

    for name, icc in found.items():
        got = (icc.value[0], icc.low[0], icc.high[0])
        assert got == pytest.approx(judges["psych_2.2.9"][name], abs=1e-8), name


@pytest.mark.shared_data
def test_the_mean_squares_are_those_of_shrout_and_fleiss(judges: dict[str, Any]) -> None:
    expected = judges["mean_squares"]
    readings = np.array(judges["table"], dtype=np.float64)[:, :, None]

    squares = mean_squares(readings)

    assert squares.cases[0] == pytest.approx(expected["MSR"], abs=1e-12)
    assert squares.readings[0] == pytest.approx(expected["MSC"], abs=1e-12)
    assert squares.error[0] == pytest.approx(expected["MSE"], abs=1e-12)
    within = (3 * squares.readings[0] + 15 * squares.error[0]) / 18
    assert within == pytest.approx(expected["MSW"], abs=1e-12)


def test_a_volume_that_is_a_tenth_larger_passes_consistency_and_fails_agreement() -> None:
    rng = np.random.default_rng(0)
    volume = rng.normal(30, 4, 30)
    again = 1.1 * volume + rng.normal(0, 0.5, 30)
    readings = np.stack([volume, again], axis=1)[:, :, None]

    agreement, consistency = icc_agreement(readings), icc_consistency(readings)

    assert consistency.value[0] > 0.95
    assert agreement.value[0] < 0.8


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(2, 4), st.floats(-1e4, 1e6), st.floats(1e-6, 1e11))
def test_neither_unit_nor_order_of_readings_changes_an_icc(
    seed: int, cases: int, times: int, shift: float, factor: float
) -> None:
    rng = np.random.default_rng(seed)
    readings = rng.standard_normal((cases, 1, 3)) + rng.standard_normal((cases, times, 3)) + [0, 1, 5]

    plain = icc_agreement(readings)
    changed = icc_agreement(factor * (readings + shift)[:, ::-1])

    for name in ("value", "low", "high"):
        assert getattr(changed, name) == pytest.approx(getattr(plain, name), rel=1e-5, abs=1e-5)
    agrees = plain.value > 0
    assert (plain.low <= plain.value + 1e-12)[agrees].all()
    assert (plain.value <= plain.high + 1e-12)[agrees].all()


def test_every_feature_is_judged_as_if_it_stood_alone() -> None:
    readings = np.random.default_rng(1).standard_normal((10, 3, 4)).cumsum(axis=0)

    together = icc_agreement(readings)

    for n in range(4):
        assert icc_agreement(readings[:, :, [n]]).low[0] == pytest.approx(together.low[n], abs=1e-12)


def test_readings_that_are_the_same_agree_fully_and_a_constant_feature_has_no_icc() -> None:
    same = np.repeat(np.arange(5.0)[:, None], 2, axis=1)
    readings = np.stack([same, np.full((5, 2), 0.1), same * 1e11], axis=2)

    for icc in (icc_agreement(readings), icc_consistency(readings)):
        assert icc.value.tolist() == pytest.approx([1, np.nan, 1], nan_ok=True)
        assert icc.low.tolist() == pytest.approx([1, np.nan, 1], nan_ok=True)
        assert icc.high.tolist() == pytest.approx([1, np.nan, 1], nan_ok=True)


def test_a_pure_shift_between_readers_has_full_consistency_and_an_agreement_with_an_interval() -> None:
    readings = np.stack([np.arange(8.0), np.arange(8.0) + 3], axis=1)[:, :, None]

    agreement, consistency = icc_agreement(readings), icc_consistency(readings)

    assert consistency.value[0] == consistency.low[0] == 1
    # MSR = 12, MSC = 36, MSE = 0: MSR / (MSR + 2 MSC / 8)
    assert agreement.value[0] == pytest.approx(12 / (12 + 2 * 36 / 8))
    assert 0 < agreement.low[0] < agreement.value[0] < agreement.high[0] <= 1


@pytest.mark.parametrize(
    ("readings", "says"),
    [
        (np.zeros((1, 2, 3)), "at least 2 cases with at least 2 readings each, got 1 cases with 2 readings"),
        (np.zeros((9, 1, 3)), "got 9 cases with 1 readings"),
        (np.zeros((9, 2)), "got 2 axes"),
        (np.full((9, 2, 1), np.nan), "finite values, got 18 that are not"),
    ],
)
def test_an_icc_says_what_it_needs_and_what_there_is(readings: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        icc_agreement(readings)
