from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from shared.fracture.spine.instances import Piece, bodies_of, chain_of, joined, pieces_of, separated
from tests.fixtures.spines import DrawnBody, DrawnSpine, draw_spine

GRID = (1.5, 1.5, 1.5)


def agreement(found: np.ndarray, spine: DrawnSpine, number: int) -> float:
    """Dice of one body."""
    one, two = found == number, spine.bodies == number
    return float(2 * (one & two).sum() / (one.sum() + two.sum()))


def test_bodies_apart_are_numbered_from_head_to_foot() -> None:
    spine = draw_spine([DrawnBody()] * 5, spacing_zyx=GRID, bend_degrees=5)

    found = bodies_of(spine.bodies > 0, spacing_mm=1.5)

    assert found.max() == 5
    assert min(agreement(found, spine, number) for number in range(1, 6)) > 0.98


def test_bodies_that_touch_are_parted() -> None:
    spine = draw_spine([DrawnBody()] * 4, spacing_zyx=GRID, disc_mm=3)
    bridged = ndimage.binary_closing(spine.bodies > 0, iterations=2)
    narrow = np.zeros_like(bridged)
    middle = np.rint(spine.frames[0].centre_zyx / 1.5).astype(int)
    narrow[:, middle[1] - 3 : middle[1] + 3, middle[2] - 3 : middle[2] + 3] = True
    touching = (spine.bodies > 0) | (bridged & narrow)
    assert ndimage.label(touching)[1] == 1

    found = bodies_of(touching, spacing_mm=1.5)

    assert found.max() == 4
    assert min(agreement(found, spine, number) for number in range(1, 5)) > 0.93


def test_a_crushed_body_stays_one() -> None:
    crushed = DrawnBody(anterior=10, middle=8, posterior=12)
    spine = draw_spine([DrawnBody(), crushed, DrawnBody()], spacing_zyx=GRID)

    found = bodies_of(spine.bodies > 0, spacing_mm=1.5)

    assert found.max() == 3
    assert agreement(found, spine, 2) > 0.9


def test_a_body_is_solid() -> None:
    spine = draw_spine([DrawnBody()] * 2, spacing_zyx=GRID)
    hollow = spine.bodies > 0
    k, j, i = np.rint(spine.frames[0].centre_zyx / 1.5).astype(int)
    hollow[k - 2 : k + 2, j - 2 : j + 2, i - 2 : i + 2] = False

    assert bodies_of(hollow, spacing_mm=1.5)[k, j, i] == 1


def test_pieces_of_one_body_that_lie_side_by_side_are_put_together() -> None:
    labels = np.zeros((20, 20, 40), dtype=np.int32)
    labels[5:15, 5:15, 5:19] = 1
    labels[5:15, 5:15, 19:33] = 2

    assert len(pieces_of(joined(labels, spacing_mm=1.5), spacing_mm=1.5)) == 1


def test_pieces_one_above_the_other_stay_apart() -> None:
    labels = np.zeros((40, 20, 20), dtype=np.int32)
    labels[5:19, 5:15, 5:15] = 1
    labels[19:33, 5:15, 5:15] = 2

    assert len(pieces_of(joined(labels, spacing_mm=1.5), spacing_mm=1.5)) == 2


def piece(label: int, z: float, y: float = 0.0, volume: float = 25.0) -> Piece:
    return Piece(label=label, centre_zyx=np.array([z, y, 0.0]), volume_ml=volume)


def test_what_looks_like_a_body_and_is_none_falls_out_of_the_chain() -> None:
    spine = [piece(n, 300.0 - 33 * n) for n in range(6)]
    hip = piece(10, 120.0, y=-90.0, volume=60.0)
    vessel = piece(11, 205.0, y=-38.0, volume=3.0)

    assert [p.label for p in chain_of([*spine, hip, vessel])] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("gap", [6.0, 60.0])
def test_neighbours_at_no_distance_of_vertebrae_are_not_of_one_chain(gap: float) -> None:
    found = chain_of([piece(1, 100.0, volume=20.0), piece(2, 100.0 - gap)])

    assert [p.label for p in found] == [2]


def test_a_crumb_is_no_body() -> None:
    assert chain_of([piece(1, 100.0, volume=0.5)]) == []


def test_nothing_is_found_in_nothing() -> None:
    empty = np.zeros((12, 12, 12), dtype=bool)

    assert not separated(empty, spacing_mm=1.5).any()
    assert not bodies_of(empty, spacing_mm=1.5).any()


def test_two_voxels_are_nothing() -> None:
    two = np.zeros((12, 12, 12), dtype=bool)
    two[5:7, 5, 5] = True

    assert not bodies_of(two, spacing_mm=1.5).any()
