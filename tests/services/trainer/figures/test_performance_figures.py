"""What the figures of the performance show, counted again row by row."""

from __future__ import annotations

import csv
import io
import math

import pytest

from services.trainer.figures.calibration import calibration
from services.trainer.figures.conformal_sets import conformal_sets
from services.trainer.figures.decision_curves import decision_curves
from services.trainer.figures.nomogram import draw_nomogram, nomogram
from services.trainer.figures.roc import roc
from services.trainer.results import LABELS, MODELS, RunResult, Scored
from shared.fracture.nomogram import NomogramModel, read_points
from tests.fixtures.run_results import drawn, full_result

RESULT = full_result()


def one_model(*, acute: tuple[int, ...], probability: tuple[float, ...]) -> RunResult:
    scored = Scored(
        model="fusion",
        part="out_of_fold",
        patient=tuple(range(len(acute))),
        acute=acute,
        probability=probability,
        threshold=0.5,
    )
    return RESULT.model_copy(update={"scores": (scored,)})


@pytest.mark.parametrize("model", MODELS)
def test_each_point_of_a_roc_curve_is_the_share_of_cases_at_its_threshold(model) -> None:  # type: ignore[no-untyped-def]
    scored = RESULT.scored(model, "test")
    pairs = list(zip(scored.acute, scored.probability, strict=True))

    curve = roc(RESULT).data.where(part="test", model=LABELS[model])

    for threshold, x, y in zip(
        curve.numbers("threshold"), curve.numbers("false_positive_rate"), curve.numbers("sensitivity"), strict=True
    ):
        at = math.inf if math.isnan(threshold) else threshold
        assert y == pytest.approx(sum(p >= at for a, p in pairs if a) / sum(scored.acute))
        assert x == pytest.approx(sum(p >= at for a, p in pairs if not a) / (len(pairs) - sum(scored.acute)))


def test_the_csv_of_the_roc_holds_the_area_of_its_curve() -> None:
    rows = list(csv.DictReader(io.StringIO(drawn()["roc"].csv)))

    fusion = [row for row in rows if (row["part"], row["model"]) == ("out_of_fold", "Features Fusion")]

    x = [float(row["false_positive_rate"]) for row in fusion]
    y = [float(row["sensitivity"]) for row in fusion]
    area = sum((x[n + 1] - x[n]) * (y[n + 1] + y[n]) / 2 for n in range(len(x) - 1))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert float(fusion[0]["auc"]) == pytest.approx(area, abs=1e-12)
    assert float(fusion[0]["auc_low"]) < area < float(fusion[0]["auc_high"])


def test_equal_scores_are_one_slanted_line_of_the_curve() -> None:
    result = one_model(acute=(1, 0, 1, 0), probability=(0.5, 0.5, 0.5, 0.5))

    data = roc(result).data

    assert data.numbers("false_positive_rate").tolist() == [0, 1]
    assert data.numbers("auc").tolist() == [0.5, 0.5]


def test_a_part_of_one_class_alone_has_no_curve() -> None:
    assert roc(one_model(acute=(1, 1, 1), probability=(0.5, 0.6, 0.7))).data.absent == "no part has both classes"


def test_calibration_groups_hold_each_case_once_and_their_own_share() -> None:
    scored = RESULT.scored("dlrn", "out_of_fold")
    pairs = list(zip(scored.probability, scored.acute, strict=True))

    groups = calibration(RESULT).data.where(part="out_of_fold", model=LABELS["dlrn"])

    assert groups.numbers("cases").sum() == len(pairs)
    for place in range(len(groups)):
        inside = [a for p, a in pairs if groups.numbers("least")[place] <= p <= groups.numbers("most")[place]]
        assert len(inside) == groups.numbers("cases")[place]
        assert groups.numbers("observed")[place] == pytest.approx(sum(inside) / len(inside))
    brier = sum((p - a) ** 2 for p, a in pairs) / len(pairs)
    assert groups.numbers("brier")[0] == pytest.approx(brier)


def test_the_interval_of_a_group_is_wilsons() -> None:
    result = one_model(acute=(1,) * 8 + (0,) * 2, probability=(0.8,) * 10)

    data = calibration(result).data

    assert (data.numbers("low")[0], data.numbers("high")[0]) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_net_benefit_is_that_of_the_counted_cases() -> None:
    scored = RESULT.scored("radiomics", "test")
    n = len(scored.acute)

    curve = decision_curves(RESULT).data.where(part="test")

    for place in (0, 29, 56, 98):
        pt = curve.numbers("threshold_probability")[place]
        called = [a for a, p in zip(scored.acute, scored.probability, strict=True) if p >= pt]
        expected = sum(called) / n - (len(called) - sum(called)) / n * pt / (1 - pt)
        assert curve.numbers(LABELS["radiomics"])[place] == pytest.approx(expected, abs=1e-12)
        everybody = sum(scored.acute) / n - (n - sum(scored.acute)) / n * pt / (1 - pt)
        assert curve.numbers("treat all")[place] == pytest.approx(everybody, abs=1e-12)


def test_the_nomogram_gives_the_points_that_are_read() -> None:
    data = nomogram(RESULT).data
    read = read_points(RESULT.nomogram, age=60, sex="M", score=2.0)

    def points(axis: str, label: str) -> float:
        return float(data.where(axis=axis, label=label).numbers("points")[0])

    assert points("Age (years)", "60") == pytest.approx(read.age_points)
    assert points("Sex", "male") == pytest.approx(read.sex_points)
    assert points("Fusion score", "2") == pytest.approx(read.score_points)
    low, high = points("P(acute)", "0.8"), points("P(acute)", "0.9")
    total = low + (high - low) * (math.log(read.probability / (1 - read.probability)) - math.log(4)) / math.log(9 / 4)
    assert total == pytest.approx(read.total_points)


def test_the_axes_of_the_nomogram_are_aligned_with_the_points() -> None:
    model = NomogramModel(
        intercept=0, beta_age=0.0, beta_male=0.0, beta_score=1.0, age_range=(40, 90), score_range=(0, 10)
    )

    figure = nomogram(RESULT.model_copy(update={"nomogram": model}))
    axes = draw_nomogram(figure.data, phantom=False).axes[0]

    spans = [tuple(line.get_xdata()) for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert spans[0] == (0, 1)
    assert spans[1] == (0, 0)
    assert spans[3] == (0, 1)


def test_conformal_sets_count_each_case_once() -> None:
    scored = RESULT.scored("fusion", "test")

    data = conformal_sets(RESULT).data.where(part="test")

    both = sum(
        a == 1 and 1 - p <= RESULT.conformal["acute"] and p <= RESULT.conformal["chronic"]
        for a, p in zip(scored.acute, scored.probability, strict=True)
    )
    assert data.numbers("cases").sum() == len(scored.acute)
    assert data.where(true="acute", set="both").numbers("cases").tolist() == [both]
    assert data.where(true="chronic").numbers("share").sum() == pytest.approx(1)


def test_without_conformal_limits_there_are_no_sets() -> None:
    figure = conformal_sets(RESULT.model_copy(update={"conformal": {"alpha": 0.1}}))

    assert figure.data.absent == "the run has no conformal limit named acute, chronic"
