"""The nomogram against R's rms, and its own identities."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fracture.nomogram import NomogramModel, layout, pretty, read_points, sigmoid


@pytest.fixture
def worked_example(shared_data: Path) -> dict[str, Any]:
    example: dict[str, Any] = json.loads((shared_data.parent / "reference" / "statistics.json").read_text())
    return example["rms_nomogram"]  # type: ignore[no-any-return]


def _model_of(example: dict[str, Any]) -> NomogramModel:
    coef = example["coef"]
    return NomogramModel(
        intercept=coef["Intercept"],
        beta_age=coef["age"],
        beta_male=coef["sex=male"],
        beta_score=coef["score"],
        age_range=tuple(example["limits"]["age"]),
        score_range=tuple(example["limits"]["score"]),
    )


@pytest.mark.shared_data
def test_axes_and_points_equal_those_of_rms(worked_example: dict[str, Any]) -> None:
    drawn = layout(_model_of(worked_example))

    assert drawn.points_per_unit == pytest.approx(worked_example["sc"], abs=1e-7)
    assert drawn.intercept_shifted == pytest.approx(worked_example["Intercept_shifted"], abs=1e-7)
    assert list(drawn.age.values) == worked_example["axes"]["age"]
    assert list(drawn.score.values) == worked_example["axes"]["score"]
    for axis in (drawn.age, drawn.sex, drawn.score):
        got = dict(zip(axis.labels, axis.points, strict=True))
        for label, points in worked_example["points"][axis.name].items():
            assert got[label] == pytest.approx(points, abs=1e-6)


@pytest.mark.shared_data
def test_total_points_and_probabilities_equal_those_of_rms(worked_example: dict[str, Any]) -> None:
    drawn = layout(_model_of(worked_example))

    for log_odds, points in worked_example["lp_points"].items():
        assert (float(log_odds) - drawn.intercept_shifted) * drawn.points_per_unit == pytest.approx(points, abs=1e-6)
    on_axis = dict(zip(drawn.probability.values, drawn.probability.points, strict=True))
    # rms finds where a probability stands by linear interpolation (approx) on a grid: right to some 2e-4 points
    for probability, points in worked_example["prob_points"].items():
        p = float(probability)
        got = (math.log(p / (1 - p)) - drawn.intercept_shifted) * drawn.points_per_unit
        assert got == pytest.approx(points, abs=5e-4)
        if p in on_axis:
            assert on_axis[p] == pytest.approx(points, abs=5e-4)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (20, 95, [20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (-4.0476, 3.7107, [-5, -4, -3, -2, -1, 0, 1, 2, 3, 4]),
        (0, 1, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        (0, 160, [0, 20, 40, 60, 80, 100, 120, 140, 160]),
    ],
)
def test_pretty_gives_the_round_values_of_r(low: float, high: float, expected: list[float]) -> None:
    assert list(pretty(low, high)) == expected


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_pretty_always_covers_its_range_in_equal_steps(low: float, width: float) -> None:
    ticks = pretty(low, low + width)

    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-9 * step
    assert ticks[-1] >= low + width - 1e-9 * step
    assert all(b - a == pytest.approx(step, rel=1e-3) for a, b in itertools.pairwise(ticks))
    assert 3 <= len(ticks) <= 25


@given(st.floats(18, 95), st.sampled_from(["F", "M"]), st.floats(-6, 6))
def test_the_points_lead_to_the_probability_of_the_regression(age: float, sex: Any, score: float) -> None:
    model = NomogramModel(
        intercept=1.0, beta_age=-0.05, beta_male=-0.3, beta_score=1.4, age_range=(20, 95), score_range=(-4, 4)
    )

    reading = read_points(model, age=age, sex=sex, score=score)

    direct = sigmoid(1.0 - 0.05 * age - 0.3 * (sex == "M") + 1.4 * score)
    assert reading.probability == pytest.approx(direct, abs=1e-12)
    assert reading.total_points == pytest.approx(reading.age_points + reading.sex_points + reading.score_points)


def test_the_axis_of_widest_effect_goes_from_nought_to_a_hundred() -> None:
    model = NomogramModel(
        intercept=0.0, beta_age=-0.05, beta_male=0.1, beta_score=2.0, age_range=(20, 95), score_range=(-4, 4)
    )

    drawn = layout(model)

    assert (min(drawn.score.points), max(drawn.score.points)) == pytest.approx((0.0, 100.0))
    assert min(drawn.age.points) == 0.0
    assert min(drawn.sex.points) == 0.0


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="from a lower to a higher"):
        NomogramModel(intercept=0, beta_age=1, beta_male=0, beta_score=1, age_range=(50, 50), score_range=(0, 1))


def test_large_log_odds_do_not_overflow() -> None:
    assert sigmoid(1e4) == 1.0
    assert sigmoid(-1e4) == 0.0
