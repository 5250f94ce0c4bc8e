from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.dicom_ingest.headers import quiet_pydicom
from services.dicom_ingest.level_masks import MaskRefused, ReadMask
from services.dicom_ingest.level_names import NamedLevel
from services.dicom_ingest.masks_rtstruct import contours_of, rasterised, read_rtstruct, roi_mask, rtstruct_masks
from shared.fracture.volume import Geometry
from tests.fixtures.mask_objects import FRAME_OF_REFERENCE, grid, rtstruct, save

GRID = grid(shape=(8, 30, 28), spacing=(2.5, 0.8, 0.7))


def square(k: float, low: float, high: float, geometry: Geometry = GRID) -> np.ndarray[Any, Any]:
    """A square in slice k between two pixel indices, in mm."""
    corners = np.array([[k, low, low], [k, low, high], [k, high, high], [k, high, low]])
    return geometry.world_zyx(corners)


def voxels_of(mask: ReadMask, level: str) -> np.ndarray[Any, Any]:
    voxels = np.zeros(GRID.shape_zyx, dtype=bool)
    one = next(one for one in mask.levels if one.level == level)
    voxels[one.box] = one.voxels
    return voxels


def read(ds: pydicom.Dataset) -> ReadMask:
    return rtstruct_masks(ds, GRID, frame_of_reference_uid=FRAME_OF_REFERENCE)


def test_a_pixel_is_inside_where_its_centre_is() -> None:
    mask = read(rtstruct([("L1 body", [square(k, 4.6, 9.4) for k in (2, 3)])]))

    expected = np.zeros(GRID.shape_zyx, dtype=bool)
    expected[2:4, 5:10, 5:10] = True
    assert np.array_equal(voxels_of(mask, "L1"), expected)
    assert mask.levels[0].kind == "body"


def test_a_contour_within_another_is_a_hole_and_one_within_the_hole_is_an_island() -> None:
    contours = [square(2, 2.5, 20.5), square(2, 6.5, 16.5), square(2, 9.5, 12.5)]

    mask = read(rtstruct([("L1", contours)]))

    inside = voxels_of(mask, "L1")[2]
    assert int(inside.sum()) == 18 * 18 - 10 * 10 + 3 * 3
    assert not inside[8, 8]
    assert inside[11, 11]


def test_a_keyhole_is_a_hole() -> None:
    ring = [(2.5, 2.5), (2.5, 12.5), (12.5, 12.5), (12.5, 2.5), (2.5, 2.5)]
    hole = [(5.5, 5.5), (9.5, 5.5), (9.5, 9.5), (5.5, 9.5), (5.5, 5.5)]
    path = np.array([[3.0, *point] for point in [*ring, *hole]])

    mask = read(rtstruct([("L1", [GRID.world_zyx(path)])]))

    assert int(voxels_of(mask, "L1").sum()) == 10 * 10 - 4 * 4


def test_neighbours_that_share_an_edge_neither_share_nor_lose_pixels() -> None:
    left = np.array([[3.0, 3.0], [3.0, 8.0], [9.0, 8.0], [9.0, 3.0]])
    right = left + np.array([0, 5])

    one, two, both = (rasterised(polygons, (15, 20)) for polygons in ([left], [right], [left, right]))

    assert not (one & two).any()
    assert np.array_equal(one | two, both)
    assert int(both.sum()) == 6 * 10


_POINT = st.tuples(st.floats(-3, 15), st.floats(-3, 17))


@settings(max_examples=60, deadline=None)
@given(st.lists(_POINT, min_size=3, max_size=9))
def test_rasterising_agrees_with_counting_crossings_pixel_by_pixel(points: list[tuple[float, float]]) -> None:
    polygon = np.array(points)

    inside = rasterised([polygon], (12, 14))

    for row in range(12):
        for column in range(14):
            crossings = 0
            for (r0, c0), (r1, c1) in zip(points, [*points[1:], points[0]], strict=True):
                if (np.ceil(min(r0, r1)) <= row < np.ceil(max(r0, r1))) and r0 != r1:
                    at = c0 + (row - r0) / (r1 - r0) * (c1 - c0)
                    crossings += bool(np.ceil(at) <= column)
            assert inside[row, column] == bool(crossings % 2)


def test_slices_without_a_contour_stay_empty_and_are_warned_of() -> None:
    mask = read(rtstruct([("L1", [square(k, 4.5, 9.5) for k in (1, 2, 5)])]))

    assert not voxels_of(mask, "L1")[3:5].any()
    assert [w.code for w in mask.warnings] == ["contours-missing"]
    assert "2 slices" in mask.warnings[0].sentence


def test_a_contour_belongs_to_the_slice_within_half_a_slice() -> None:
    mask = read(rtstruct([("L1", [square(k + 0.3, 4.5, 9.5) for k in (1, 2)])]))

    assert voxels_of(mask, "L1")[1:3].any(axis=(1, 2)).all()
    assert [w.code for w in mask.warnings] == ["contours-off-centre"]


@pytest.mark.parametrize(
    ("contours", "reason"),
    [
        ([square(k / 2, 4.5, 9.5) for k in range(2, 9)], "planes denser"),
        ([square(9.0, 4.5, 9.5)], "beyond the volume"),
        ([square(3.0, 4.5, 40.0)], "beyond the volume"),
        ([GRID.world_zyx(np.array([[1.0, 2, 2], [3.0, 2, 8], [3.0, 8, 8]]))], "cross the volume"),
    ],
)
def test_contours_of_another_geometry_refuse_their_level_alone(contours: list[Any], reason: str) -> None:
    mask = read(rtstruct([("L1", contours), ("L2", [square(2, 4.5, 9.5)])]))

    assert [one.level for one in mask.levels] == ["L2"]
    assert reason in mask.refused["L1"]


def test_rois_that_are_no_vertebra_are_counted_and_doubtful_ones_named_by_number() -> None:
    contour = [square(2, 4.5, 9.5)]

    mask = read(rtstruct([("BODY", contour), ("vertebra SENTINEL", contour), ("PTV", contour), ("T12", contour)]))

    assert [one.level for one in mask.levels] == ["T12"]
    assert mask.ignored_labels == 2
    assert mask.unknown_labels == ("ROI 2 (a vertebra without a level)",)
    assert "SENTINEL" not in str(mask)


def test_another_frame_of_reference_open_contours_and_damage_are_refused() -> None:
    contour = [square(2, 4.5, 9.5)]
    damaged = rtstruct([("L1", contour)])
    damaged.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2"]

    with pytest.raises(MaskRefused, match="another frame of reference"):
        read(rtstruct([("L1", contour)], frame_of_reference="1.2.9"))
    with pytest.raises(MaskRefused, match="the mask is empty"):
        read(rtstruct([("L1", contour)], kind="OPEN_PLANAR"))
    assert "damaged" in read(damaged).refused["L1"]
    with pytest.raises(MaskRefused, match="no ROIs"):
        read(rtstruct([]))


def test_an_rtstruct_file_is_read(tmp_path: Path) -> None:
    path = save(rtstruct([("L1", [square(2, 4.5, 9.5)])]), tmp_path / "rt.dcm")

    mask = read_rtstruct(path, GRID, frame_of_reference_uid=FRAME_OF_REFERENCE)

    assert int(mask.levels[0].voxels.sum()) == 25


@pytest.mark.shared_data
def test_a_real_structure_set_has_the_areas_of_its_contours(shared_data: Path) -> None:
    folder = shared_data / "rtstruct" / "example_data"
    with quiet_pydicom():
        ds = pydicom.dcmread(folder / "rtss.dcm")
    spacing, low = 1.074219, -122.44
    geometry = Geometry(
        shape_zyx=(98, 512, 512),
        spacing_zyx=(3.0, spacing, spacing),
        origin_zyx=(low, -524.0, -275.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )

    for item in ds.ROIContourSequence:
        contours = contours_of(item.get("ContourSequence", None) or [])
        if int(item.ReferencedROINumber) not in (5, 9, 10):
            continue
        mask, warnings = roi_mask(NamedLevel(level="L1", kind=None), contours, geometry)
        area = sum(abs(np.sum(c[:, 2] * np.roll(c[:, 1], -1) - np.roll(c[:, 2], -1) * c[:, 1])) / 2 for c in contours)
        assert mask is not None
        assert int(mask.voxels.sum()) * spacing**2 == pytest.approx(area, rel=0.01)
        assert not warnings


@pytest.mark.shared_data
def test_a_real_structure_set_without_vertebrae_says_so(shared_data: Path) -> None:
    mask = read_rtstruct(shared_data / "rtstruct" / "example_data" / "rtss.dcm", GRID, frame_of_reference_uid="1.2.3")

    assert not mask.levels
    assert mask.ignored_labels == 10
