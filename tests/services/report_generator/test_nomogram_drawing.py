from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.report_generator.nomogram_drawing import LEFT, RIGHT, draw
from shared.fracture.nomogram import read_points
from tests.fixtures.small_bundle import NOMOGRAM


def _place(points: float) -> float:
    return LEFT + points / 100 * (RIGHT - LEFT)


def test_each_mark_stands_under_its_points() -> None:
    reading = read_points(NOMOGRAM, age=70.0, sex="M", score=1.0)

    drawing = draw(NOMOGRAM, reading, score=1.0)

    marks = [axis.mark_x for axis in drawing.axes]
    assert marks == pytest.approx([_place(p) for p in (reading.age_points, reading.sex_points, reading.score_points)])
    assert [axis.title for axis in drawing.axes] == ["Age, years", "Sex", "Fusion score"]


def test_total_points_and_probability_stand_on_one_line() -> None:
    reading = read_points(NOMOGRAM, age=70.0, sex="F", score=-0.5)

    drawing = draw(NOMOGRAM, reading, score=-0.5)

    assert drawing.total.mark_x == drawing.probability.mark_x
    assert drawing.probability.mark_text == f"{reading.probability:.1%}"


def test_a_patient_beyond_an_axis_is_drawn_beyond_it_and_said_to_be() -> None:
    reading = read_points(NOMOGRAM, age=70.0, sex="M", score=9.0)

    drawing = draw(NOMOGRAM, reading, score=9.0)

    score = drawing.axes[2]
    assert score.beyond
    assert not drawing.axes[0].beyond
    assert score.mark_x == pytest.approx(RIGHT)
    assert score.x1 < RIGHT


@given(age=st.floats(0, 90), sex=st.sampled_from(["F", "M"]), score=st.floats(-30, 30))
def test_everything_stays_on_the_paper(age: float, sex: str, score: float) -> None:
    reading = read_points(NOMOGRAM, age=age, sex="F" if sex == "F" else "M", score=score)

    drawing = draw(NOMOGRAM, reading, score=score)

    for axis in (drawing.points, *drawing.axes, drawing.total, drawing.probability):
        marks = [] if axis.mark_x is None else [axis.mark_x]
        assert all(LEFT - 1e-6 <= x <= RIGHT + 1e-6 for x in marks)
        assert axis.x0 >= LEFT - 1e-6
        assert axis.x1 <= RIGHT + 1e-6


def test_labels_of_ticks_do_not_run_into_each_other() -> None:
    reading = read_points(NOMOGRAM, age=70.0, sex="M", score=1.0)

    drawing = draw(NOMOGRAM, reading, score=1.0)

    for axis in (*drawing.axes, drawing.total, drawing.probability):
        for above in (True, False):
            shown = sorted((tick.x, tick.label) for tick in axis.ticks if tick.label and tick.above is above)
            for (x0, first), (x1, second) in itertools.pairwise(shown):
                assert x1 - x0 >= (len(first) + len(second)) * 6.6 / 2
