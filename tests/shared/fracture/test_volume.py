from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.fracture.volume import Geometry, Mask, Volume, mask_from_nrrd, to_nrrd, to_sitk, volume_from_nrrd

EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def geometry(angle: float = 0.0, spacing: tuple[float, float, float] = (2.0, 0.5, 0.7)) -> Geometry:
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return Geometry(
        shape_zyx=(3, 4, 5),
        spacing_zyx=spacing,
        origin_zyx=(-10.0, 20.0, 30.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, c, -s), (0.0, s, c)),
    )


@settings(max_examples=25, deadline=None)
@given(st.floats(-3, 3), st.tuples(*[st.floats(0.05, 9)] * 3))
def test_a_volume_comes_back_from_nrrd_as_it_was(angle: float, spacing: tuple[float, float, float]) -> None:
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5) - 30
    volume = Volume(voxels=voxels, geometry=geometry(angle, spacing))

    back = volume_from_nrrd(to_nrrd(volume))

    assert np.array_equal(back.voxels, voxels)
    assert back.voxels.dtype == np.int16
    assert back.geometry.same_grid(volume.geometry, tolerance_mm=1e-9)


def test_equal_volumes_give_equal_bytes() -> None:
    volume = Volume(voxels=np.zeros((3, 4, 5), dtype=np.int16), geometry=geometry())

    assert to_nrrd(volume) == to_nrrd(volume)


def test_a_mask_comes_back_from_nrrd_as_it_was() -> None:
    voxels = np.zeros((3, 4, 5), dtype=np.uint8)
    voxels[1, 2, 3] = 20

    assert np.array_equal(mask_from_nrrd(to_nrrd(Mask(voxels=voxels, geometry=geometry()))).voxels, voxels)


@given(st.floats(-3, 3), st.integers(0, 2), st.integers(0, 3), st.integers(0, 4))
def test_world_positions_are_those_of_simpleitk(angle: float, k: int, j: int, i: int) -> None:
    volume = Volume(voxels=np.zeros((3, 4, 5), dtype=np.int16), geometry=geometry(angle))

    expected_xyz = to_sitk(volume).TransformIndexToPhysicalPoint((i, j, k))

    world_zyx = volume.geometry.world_zyx(np.array([[k, j, i]], dtype=float))[0]
    assert np.allclose(world_zyx[::-1], expected_xyz)
    assert np.allclose(volume.geometry.index_zyx(world_zyx), [[k, j, i]])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spacing_zyx": (1.0, 0.0, 1.0)}, "spacing"),
        ({"spacing_zyx": (1.0, float("nan"), 1.0)}, "spacing"),
        ({"shape_zyx": (0, 4, 5)}, "one voxel"),
        ({"origin_zyx": (float("inf"), 0.0, 0.0)}, "finite"),
        ({"direction_zyx": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.5), (0.0, 0.0, 1.0))}, "orthonormal"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(change: dict[str, object], fault: str) -> None:
    good = {
        "shape_zyx": (3, 4, 5),
        "spacing_zyx": (1.0, 1.0, 1.0),
        "origin_zyx": (0.0, 0.0, 0.0),
        "direction_zyx": EYE,
    }

    with pytest.raises(ValueError, match=fault):
        Geometry(**{**good, **change})  # type: ignore[arg-type]
