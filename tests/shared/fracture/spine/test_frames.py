from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fracture.spine.frames import POSTERIOR, SUPERIOR, frame_of, tangents

numbers = st.floats(-1, 1, allow_nan=False)
vectors = st.tuples(numbers, numbers, numbers).filter(lambda v: np.linalg.norm(v) > 0.1)


@given(up=vectors, back=vectors)
def test_a_frame_is_right_angled_and_right_handed(up, back) -> None:
    frame = frame_of(np.zeros(3), up=np.array(up), back=np.array(back))

    assert frame.axes @ frame.axes.T == pytest.approx(np.eye(3), abs=1e-9)
    assert np.linalg.det(frame.axes) == pytest.approx(1.0)
    assert frame.up == pytest.approx(np.array(up) / np.linalg.norm(up))


def test_the_frame_of_an_upright_spine_has_the_patient_s_left_on_its_left() -> None:
    frame = frame_of(np.zeros(3), up=np.array(SUPERIOR), back=np.array(POSTERIOR))

    assert frame.left == pytest.approx([0.0, 0.0, 1.0])


@given(point=st.tuples(numbers, numbers, numbers), up=vectors, back=vectors)
def test_local_positions_lead_back_to_the_same_point(point, up, back) -> None:
    frame = frame_of(np.array([3.0, -2.0, 7.0]), up=np.array(up), back=np.array(back))

    assert frame.world(frame.local(np.array([point])))[0] == pytest.approx(point, abs=1e-9)


def test_the_tangents_of_a_circle_are_those_of_the_circle() -> None:
    angles = np.deg2rad(np.arange(-40, 41, 8))
    centres = [200 * np.array([-np.sin(a), np.cos(a), 0.0]) for a in angles]

    found = tangents(centres)

    for angle, tangent in list(zip(angles, found, strict=True))[1:-1]:
        assert tangent == pytest.approx([np.cos(angle), np.sin(angle), 0.0], abs=1e-3)
    for angle, tangent in ((angles[0], found[0]), (angles[-1], found[-1])):  # turned by half the bend only
        assert np.rad2deg(np.arccos(tangent @ [np.cos(angle), np.sin(angle), 0.0])) == pytest.approx(2, abs=0.2)


def test_one_body_alone_stands_along_the_grid() -> None:
    assert tangents([np.array([1.0, 2.0, 3.0])])[0] == pytest.approx(SUPERIOR)


def test_two_bodies_stand_along_their_chord() -> None:
    one, two = tangents([np.array([30.0, 5.0, 0.0]), np.array([0.0, 0.0, 0.0])])

    assert one == pytest.approx(two)
    assert one == pytest.approx(np.array([30.0, 5.0, 0.0]) / np.hypot(30, 5))


def test_a_tilted_frame_is_turned_by_so_many_degrees() -> None:
    frame = frame_of(np.zeros(3), up=np.array(SUPERIOR), back=np.array(POSTERIOR))

    pitched, turned = frame.tilted(pitch_degrees=5.0), frame.tilted(turn_degrees=7.0)

    assert np.rad2deg(np.arccos(pitched.up @ frame.up)) == pytest.approx(5.0)
    assert np.rad2deg(np.arccos(turned.back @ frame.back)) == pytest.approx(7.0)
    assert turned.up == pytest.approx(frame.up)
