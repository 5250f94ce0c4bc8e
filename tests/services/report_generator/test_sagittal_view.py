from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from services.report_generator.sagittal_view import ENLARGEMENT, bone_window, outlines_of, sagittal_view
from tests.services.report_generator.sample import ellipsoid


def _area(loop: tuple[tuple[float, float], ...]) -> float:
    """Signed (shoelace): above zero for loops that run clockwise on the screen, whose inside is the mask."""
    return 0.5 * sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, loop[1:] + loop[:1], strict=True))


def test_the_bone_window_is_black_at_minus_250_and_white_at_1250_hu() -> None:
    grey = bone_window(np.array([[-1000.0, -250.0, 500.0, 1250.0, 3000.0]]))

    assert grey.tolist() == [[0, 0, 128, 255, 255]]


def test_one_pixel_is_outlined_by_a_diamond_through_the_middles_of_its_edges() -> None:
    inside = np.zeros((3, 3), dtype=bool)
    inside[1, 1] = True

    (loop,) = outlines_of(inside)

    assert set(loop) == {(1.5, 1.0), (2.0, 1.5), (1.5, 2.0), (1.0, 1.5)}


def test_a_hole_has_an_outline_of_its_own_that_runs_the_other_way() -> None:
    inside = np.ones((5, 5), dtype=bool)
    inside[2, 2] = False

    loops = outlines_of(inside)

    assert sorted(np.sign(_area(loop)) for loop in loops) == [-1.0, 1.0]


def test_an_empty_mask_has_no_outline() -> None:
    assert outlines_of(np.zeros((4, 4), dtype=bool)) == ()


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=st.booleans()))
def test_outlines_pass_every_outer_edge_once_and_enclose_about_the_mask(inside: np.ndarray) -> None:
    padded = np.pad(inside, 1).astype(int)
    edges = int(np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum())

    loops = outlines_of(inside)

    points = [point for loop in loops for point in loop]
    assert len(points) == len(set(points)) == edges
    assert abs(sum(_area(loop) for loop in loops) - inside.sum()) <= edges / 8 + 1e-9


def test_the_head_is_on_top_and_the_front_on_the_left() -> None:
    image, mask = ellipsoid()
    image.voxels[:] = -250
    image.voxels[40:, :10, 20] = 1250  # superior and anterior corner

    view = sagittal_view(image, mask, slice_index=20)

    picture = np.asarray(Image.open(io.BytesIO(view.png)))
    assert picture[4, 4] == 255
    assert picture[-4, 4] == picture[4, -4] == picture[-4, -4] == 0


def test_the_picture_and_its_outline_share_one_scale_in_millimetres() -> None:
    image, mask = ellipsoid()

    view = sagittal_view(image, mask, slice_index=27)

    picture = Image.open(io.BytesIO(view.png))
    assert picture.size == (50 * ENLARGEMENT, 44 * ENLARGEMENT)
    assert (view.width_mm, view.height_mm) == (50.0, 44.0)
    xs = [x for loop in view.outlines for x, _ in loop]
    assert (min(xs), max(xs)) == (12.0, 37.0)  # voxels 12 to 36, edge to edge
    assert view.scale_bar_mm == 10
    assert (view.slice_number, view.slices) == (28, 56)
    assert base64.b64decode(view.data_uri.removeprefix("data:image/png;base64,")) == view.png


def test_equal_crops_give_equal_bytes() -> None:
    first, second = (sagittal_view(*ellipsoid(), slice_index=27) for _ in range(2))

    assert first == second


@pytest.mark.parametrize("letter", ["M", "L", "Z"])
def test_the_path_is_closed_lines(letter: str) -> None:
    view = sagittal_view(*ellipsoid(), slice_index=27)

    assert letter in view.path
