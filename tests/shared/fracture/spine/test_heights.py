from __future__ import annotations

import numpy as np
import pytest

from shared.fracture.spine.frames import frame_of
from shared.fracture.spine.heights import column_heights, heights_of, measure, smoothed
from tests.fixtures.spines import DrawnBody, DrawnSpine, draw_spine


def measured(spine: DrawnSpine, number: int):
    soft = smoothed(spine.bodies == number, spacing_zyx=spine.spacing_zyx, start_zyx_mm=np.zeros(3))
    return measure(soft, spine.frames[number - 1])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 0.8, 0.8), (1.0, 1.0, 2.0)])
def test_the_heights_of_a_drawn_body_are_read_within_half_a_voxel(spacing) -> None:
    spine = draw_spine([DrawnBody(anterior=22, middle=24, posterior=28)], spacing_zyx=spacing)

    found = measured(spine, 1)

    tolerance = 0.5 * spacing[0]
    assert found.heights.anterior == pytest.approx(22 + 0.3 * 2, abs=tolerance)  # at 15 % of the depth
    assert found.heights.posterior == pytest.approx(28 - 0.3 * 4, abs=tolerance)
    assert found.heights.middle <= 24 + tolerance
    assert found.heights.depth_mm == pytest.approx(32, abs=2)
    assert found.heights.width_mm == pytest.approx(42, abs=2.5)


def test_heights_do_not_depend_on_how_the_body_leans() -> None:
    body, fine = DrawnBody(anterior=20, middle=24, posterior=28), (0.7, 0.7, 0.7)
    upright = measured(draw_spine([body], spacing_zyx=fine), 1).heights
    leaning = measured(draw_spine([body], spacing_zyx=fine, lean_degrees=25), 1).heights

    for name in ("anterior", "middle", "posterior"):
        assert getattr(leaning, name) == pytest.approx(getattr(upright, name), abs=0.6)


def test_a_cleft_inside_does_not_cut_a_column_in_two() -> None:
    spine = draw_spine([DrawnBody()])
    cleft = spine.bodies.copy()
    middle = np.rint(spine.frames[0].centre_zyx).astype(int)
    cleft[middle[0] - 1 : middle[0] + 2, middle[1] - 8 : middle[1] + 8, middle[2] - 8 : middle[2] + 8] = 0

    whole, broken = measured(spine, 1), measured(DrawnSpine(bodies=cleft, arches=spine.arches, frames=spine.frames), 1)

    assert broken.heights.middle == pytest.approx(whole.heights.middle, abs=0.1)


def test_a_biconcave_body_is_as_low_in_the_middle_as_at_its_lowest_place() -> None:
    found = measured(draw_spine([DrawnBody(anterior=26, middle=16, posterior=26)]), 1).heights

    assert found.middle == pytest.approx(16.8, abs=0.8)  # the median over 16 % of the depth around the lowest place
    assert found.least == found.middle


def test_a_column_is_measured_between_its_crossings_of_one_half() -> None:
    column = np.array([0, 0, 0.25, 1, 1, 1, 0.75, 0, 0], dtype=np.float32)[:, None, None]

    found = column_heights(column, surface=0.5)[0, 0]

    low = 2 + (0.5 - 0.25) / 0.75  # in steps of half a millimetre
    high = 6 + (0.75 - 0.5) / 0.75
    assert found == pytest.approx((high - low) * 0.5, abs=1e-6)


def test_an_empty_column_has_no_height() -> None:
    assert np.isnan(column_heights(np.zeros((5, 1, 1), dtype=np.float32), surface=0.5)[0, 0])


def test_a_body_of_a_few_voxels_has_no_heights() -> None:
    mask = np.zeros((12, 12, 12), dtype=bool)
    mask[5:8, 5:8, 5:8] = True
    frame = frame_of(np.full(3, 6.0), up=np.array([1.0, 0, 0]), back=np.array([0, 1.0, 0]))

    assert measure(smoothed(mask, spacing_zyx=(1, 1, 1), start_zyx_mm=np.zeros(3)), frame) is None


def test_small_changes_of_frame_and_surface_give_a_band_around_the_heights() -> None:
    found = measured(draw_spine([DrawnBody(anterior=20, middle=23, posterior=28)], bend_degrees=0), 1)

    anterior = [heights.anterior for heights in found.perturbed]
    assert len(anterior) == 6
    assert min(anterior) < found.heights.anterior < max(anterior)
    assert max(anterior) - min(anterior) < 3


def test_nothing_in_a_grid_has_no_heights() -> None:
    assert heights_of(np.zeros((10, 10, 10), dtype=np.float32), surface=0.5) is None
