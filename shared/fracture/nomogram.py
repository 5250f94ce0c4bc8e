"""The nomogram (DLRN): points for age, sex and the fusion score, as R's `rms::nomogram` draws them (METHOD 6).

Stored are the logistic regression and the range of the data, nothing derived: axes, points per unit, total points and
the probability axis follow from them here, in one place.

Source: F. Harrell, rms 6.5-0, `nomogram.s`, and R's `pretty.default`; compared with R in the tests.
"""

from __future__ import annotations

import math
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

INTERVALS: Final = 10
"""rms: `nint`, the aimed number of intervals of an axis."""
MAX_POINTS: Final = 100.0
"""rms: `maxscale`, the points of the axis with the widest effect."""
PROBABILITY_TICKS: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

Sex = Literal["F", "M"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NomogramModel(_Frozen):
    """nomogram.json: logit P(acute) = intercept + beta_age·age + beta_male·[male] + beta_score·score.

    `score` is the fusion model's linear score (rad-score, before any Platt scaling); in training it is out-of-fold
    nested. `age_range` (years) and `score_range` are the least and largest value of the data that it was fitted on.
    """

    intercept: float
    beta_age: float
    beta_male: float
    beta_score: float
    age_range: tuple[float, float]
    score_range: tuple[float, float]

    @model_validator(mode="after")
    def _ranges_are_ranges(self) -> Self:
        for name, (low, high) in (("age_range", self.age_range), ("score_range", self.score_range)):
            if not low < high:
                raise ValueError(f"{name} must go from a lower to a higher value, got {low} to {high}")
        if self.beta_age == self.beta_male == self.beta_score == 0:
            raise ValueError("a nomogram needs at least one coefficient that is not zero")
        return self


class Axis(_Frozen):
    """One axis of the drawing: `labels` with the points (or, for the probability axis, total points) they stand at."""

    name: Literal["age", "sex", "score", "total", "probability"]
    labels: tuple[str, ...]
    values: tuple[float, ...]
    points: tuple[float, ...]


class NomogramLayout(_Frozen):
    """All axes of a nomogram, and how points and log odds turn into each other.

    points of an axis = (beta·value - least beta·value on the axis) · points_per_unit;
    log odds = intercept_shifted + total / points_per_unit.
    """

    age: Axis
    sex: Axis
    score: Axis
    total: Axis
    probability: Axis
    points_per_unit: float
    intercept_shifted: float
    least_xb_age: float
    least_xb_sex: float
    least_xb_score: float


class NomogramReading(_Frozen):
    """One patient's points on each axis, their total, and the probability of an acute fracture that it stands for."""

    age: float
    sex: Sex
    age_points: float
    sex_points: float
    score_points: float
    total_points: float
    probability: float


def pretty(low: float, high: float, intervals: int = INTERVALS) -> tuple[float, ...]:
    """R's `pretty(c(low, high), n = intervals)`: round values that cover the range.

    Steps of 1, 2, 5 or 10 times a power of ten, with R's biases (high.u.bias 1.5, u5.bias 2.75). Needs low < high.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"pretty needs a finite range, got {low} to {high}")
    bias, bias_five = 1.5, 0.5 + 1.5 * 1.5
    cell = (high - low) / intervals
    base = 10.0 ** math.floor(math.log10(cell))
    unit = base
    if 2 * base - cell < bias * (cell - unit):
        unit = 2 * base
        if 5 * base - cell < bias_five * (cell - unit):
            unit = 5 * base
            if 10 * base - cell < bias * (cell - unit):
                unit = 10 * base
    rounding = 1e-10
    first = math.floor(low / unit + rounding)
    last = math.ceil(high / unit - rounding)
    while first * unit > low + rounding * unit:
        first -= 1
    while last * unit < high - rounding * unit:
        last += 1
    digits = max(0, 1 - math.floor(math.log10(unit)))
    return tuple(round(n * unit, digits) + 0.0 for n in range(first, last + 1))


def sigmoid(log_odds: float) -> float:
    """The probability of log odds, without overflow."""
    if log_odds >= 0:
        return 1.0 / (1.0 + math.exp(-log_odds))
    small = math.exp(log_odds)
    return small / (1.0 + small)


def layout(model: NomogramModel) -> NomogramLayout:
    """The axes of a nomogram: limits by `pretty` over the data's range, the widest effect 0 to 100 points."""
    ages, scores = pretty(*model.age_range), pretty(*model.score_range)
    xb_age = [model.beta_age * value for value in ages]
    xb_sex = [0.0, model.beta_male]
    xb_score = [model.beta_score * value for value in scores]
    least_age, least_sex, least_score = min(xb_age), min(xb_sex), min(xb_score)
    unit = MAX_POINTS / max(max(xb) - min(xb) for xb in (xb_age, xb_sex, xb_score))
    shifted = model.intercept + least_age + least_sex + least_score
    most = sum((max(xb) - min(xb)) * unit for xb in (xb_age, xb_sex, xb_score))
    totals = pretty(0.0, most)
    at = [(p, (math.log(p / (1 - p)) - shifted) * unit) for p in PROBABILITY_TICKS]
    shown = [(p, points) for p, points in at if totals[0] <= points <= totals[-1]]
    return NomogramLayout(
        age=Axis(
            name="age",
            labels=tuple(f"{value:g}" for value in ages),
            values=ages,
            points=tuple((xb - least_age) * unit for xb in xb_age),
        ),
        sex=Axis(
            name="sex",
            labels=("female", "male"),
            values=(0.0, 1.0),
            points=tuple((xb - least_sex) * unit for xb in xb_sex),
        ),
        score=Axis(
            name="score",
            labels=tuple(f"{value:g}" for value in scores),
            values=scores,
            points=tuple((xb - least_score) * unit for xb in xb_score),
        ),
        total=Axis(name="total", labels=tuple(f"{value:g}" for value in totals), values=totals, points=totals),
        probability=Axis(
            name="probability",
            labels=tuple(f"{p:g}" for p, _ in shown),
            values=tuple(p for p, _ in shown),
            points=tuple(points for _, points in shown),
        ),
        points_per_unit=unit,
        intercept_shifted=shifted,
        least_xb_age=least_age,
        least_xb_sex=least_sex,
        least_xb_score=least_score,
    )


def read_points(model: NomogramModel, *, age: float, sex: Sex, score: float) -> NomogramReading:
    """One patient's points and probability; a value beyond its axis is continued in a straight line, as R does."""
    drawn = layout(model)
    unit = drawn.points_per_unit
    age_points = (model.beta_age * age - drawn.least_xb_age) * unit
    sex_points = ((model.beta_male if sex == "M" else 0.0) - drawn.least_xb_sex) * unit
    score_points = (model.beta_score * score - drawn.least_xb_score) * unit
    total = age_points + sex_points + score_points
    return NomogramReading(
        age=age,
        sex=sex,
        age_points=age_points,
        sex_points=sex_points,
        score_points=score_points,
        total_points=total,
        probability=sigmoid(drawn.intercept_shifted + total / unit),
    )
