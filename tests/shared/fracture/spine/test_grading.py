from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.grading import (
    ChainBody,
    edges,
    expected_heights,
    grade_of,
    graded,
    judge,
    losses,
)
from shared.fracture.spine.heights import Heights, MeasuredBody

SETTINGS = GateSettings()


def heights(anterior: float, middle: float | None = None, posterior: float = 26.0) -> Heights:
    middle = (anterior + posterior) / 2 if middle is None else middle
    return Heights(anterior=anterior, middle=middle, posterior=posterior, width_mm=42, depth_mm=32)


def body(anterior: float = 26.0, middle: float | None = None, posterior: float = 26.0, **more) -> ChainBody:
    return ChainBody(
        measured=MeasuredBody(heights=heights(anterior, middle, posterior), perturbed=()),
        **{"step_mm": 1.0, **more},
    )


def wedge(loss: float, height: float = 26.0) -> ChainBody:
    """A straight wedge as its windows at 15 and 85 % of the depth read it."""
    return body(height * (1 - 0.85 * loss), height * (1 - 0.5 * loss), height * (1 - 0.15 * loss))


def decisions(chain: list[ChainBody]) -> list[str]:
    return [judge(one, grade, settings=SETTINGS).decision for one, grade in zip(chain, graded(chain), strict=True)]


@given(loss=st.floats(0, 0.8), height=st.floats(15, 35))
def test_a_straight_wedge_has_lost_what_its_front_edge_has_lost(loss, height) -> None:
    one = wedge(loss, height)
    assert one.measured is not None

    assert losses(one.measured.heights, expected_mm=None).within == pytest.approx(loss, abs=1e-9)
    assert edges(one.measured.heights) == pytest.approx((height * (1 - loss), height))


def test_a_crush_is_seen_against_its_neighbours_alone() -> None:
    chain = [body(), body(), body(15.0, 15.0, 15.6), body(), body()]

    found = graded(chain)[2]

    assert found is not None
    assert found.loss.within < 0.10
    assert found.loss.neighbours == pytest.approx(1 - 15 / 26, abs=0.01)
    assert (found.shape, found.grade) == ("crush", 3)


def test_the_lowest_of_the_three_says_what_the_fracture_is_called() -> None:
    wedged = graded([body(), body(), wedge(0.3), body(), body()])[2]
    hollow = graded([body(), body(), body(25.5, 18.0, 26.0), body(), body()])[2]

    assert wedged is not None
    assert hollow is not None
    assert (wedged.shape, hollow.shape) == ("wedge", "biconcave")


def test_a_neighbour_that_is_fractured_itself_is_no_measure() -> None:
    chain = [body(), body(), body(15.0, 15.0, 15.6), body(14.0, 14.0, 14.5), body(), body()]

    expected = expected_heights(chain)

    assert expected[2][0] == pytest.approx(26.0)
    assert 3 not in expected[2][1]
    assert decisions(chain) == ["not-fractured"] * 2 + ["fractured"] * 2 + ["not-fractured"] * 2


def test_neighbours_farther_than_two_levels_do_not_count() -> None:
    chain = [body(posterior=40.0, anterior=40.0), *(body() for _ in range(4))]

    assert 0 not in expected_heights(chain)[3][1]


def test_with_fewer_than_two_usable_neighbours_the_body_speaks_for_itself_and_says_so() -> None:
    chain = [wedge(0.3), body()]

    verdict = judge(chain[0], graded(chain)[0], settings=SETTINGS)

    assert verdict.decision == "fractured"
    assert "fewer than two usable neighbours" in verdict.warnings[0]


@pytest.mark.parametrize(
    ("loss", "grade"), [(0.0, 0), (0.199, 0), (0.2, 1), (0.249, 1), (0.25, 2), (0.399, 2), (0.4, 3), (0.9, 3)]
)
def test_genant_s_grades(loss: float, grade: int) -> None:
    assert grade_of(loss) == grade


@pytest.mark.parametrize(
    ("step", "loss", "decision"),
    [
        (1.0, 0.10, "not-fractured"),
        (1.0, 0.22, "review"),
        (1.0, 0.27, "fractured"),
        (2.5, 0.10, "not-fractured"),
        (2.5, 0.17, "review"),
        (2.5, 0.30, "review"),
        (2.5, 0.40, "fractured"),
        (3.2, 0.40, "not-evaluable"),
    ],
)
def test_thick_slices_have_wider_limits_and_then_none(step: float, loss: float, decision: str) -> None:
    chain = [body(step_mm=step), body(step_mm=step), wedge(loss), body(step_mm=step), body(step_mm=step)]
    chain[2] = ChainBody(measured=chain[2].measured, step_mm=step)

    assert decisions(chain)[2] == decision


def test_a_body_that_is_cut_off_is_not_judged_and_judges_nobody() -> None:
    chain = [body(9.0, 9.0, 9.0, fault="cut off by the end of the scan"), body(), body(), body()]

    assert decisions(chain)[0] == "not-evaluable"
    assert judge(chain[0], None, settings=SETTINGS).reason == "cut off by the end of the scan"
    assert 0 not in expected_heights(chain)[1][1]


def test_heights_that_cannot_be_read_are_said_to_be_so() -> None:
    one = ChainBody(measured=None, step_mm=1.0)

    assert judge(one, graded([one])[0], settings=SETTINGS).reason == "the heights of the body cannot be read"


def test_a_band_that_crosses_a_limit_is_borderline() -> None:
    sure = heights(26 * (1 - 0.85 * 0.32), posterior=26 * (1 - 0.15 * 0.32))
    other = heights(26 * (1 - 0.85 * 0.22), posterior=26 * (1 - 0.15 * 0.22))
    one = ChainBody(measured=MeasuredBody(heights=sure, perturbed=(other,)), step_mm=1.0)

    (found,) = graded([one])

    assert found is not None
    assert found.borderline
    assert found.low == pytest.approx(0.22, abs=0.005)
    assert any("borderline" in warning for warning in judge(one, found, settings=SETTINGS).warnings)


@given(st.lists(st.floats(0.0, 0.7), min_size=1, max_size=12), st.floats(18, 32))
def test_the_chain_upside_down_gives_the_same_grades(lost, height) -> None:
    chain = [wedge(loss, height) for loss in lost]

    down, up = graded(chain), graded(chain[::-1])[::-1]

    for one, two in zip(down, up, strict=True):
        assert one is not None
        assert two is not None
        if (one.expected_mm is None) == (two.expected_mm is None):
            assert one.loss.within == pytest.approx(two.loss.within)


def test_a_lower_level_may_be_a_little_higher_without_anybody_being_fractured() -> None:
    chain = [body(h * 0.96, h * 0.9, h) for h in np.linspace(20, 29, 12)]

    assert decisions(chain) == ["not-fractured"] * 12


def test_where_bodies_may_be_fragments_none_is_called_fractured() -> None:
    broken = wedge(0.4)
    (grade,) = graded([broken])

    plain = judge(broken, grade, settings=SETTINGS)
    doubted = judge(broken, grade, settings=SETTINGS, doubt="one may be a fragment")

    assert plain.decision == "fractured"
    assert doubted.decision == "review"
    assert doubted.reason.endswith("but one may be a fragment; a person has to look")
