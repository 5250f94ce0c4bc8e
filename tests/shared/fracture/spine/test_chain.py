from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from shared.fracture.crop import reoriented
from shared.fracture.levels import VERSE, sort_key
from shared.fracture.spine.chain import BodyMap, from_bodies, from_vertebrae, measured_chain, thinned
from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.grading import graded, judge
from shared.fracture.volume import Geometry, Mask, mask_from_sitk
from tests.fixtures.spines import DrawnBody, draw_spine

SOUND = DrawnBody()
WEDGED = DrawnBody(anterior=17, middle=21.5, posterior=26)


def heights(chain) -> np.ndarray:
    return np.array([[v.measured.heights.anterior, v.measured.heights.posterior] for v in chain])


def decisions(chain) -> list[str]:
    bodies = [vertebra.chain_body() for vertebra in chain]
    return [
        judge(body, grade, settings=GateSettings()).decision for body, grade in zip(bodies, graded(bodies), strict=True)
    ]


def test_whole_vertebrae_are_cut_and_measured_as_their_bodies_are() -> None:
    spine = draw_spine([SOUND, SOUND, WEDGED, SOUND, SOUND], bend_degrees=4)

    of_bodies = measured_chain(from_bodies(spine.bodies, range(1, 6), spacing_zyx=spine.spacing_zyx)[0])
    cut, kept = from_vertebrae(spine.whole, range(1, 6), spacing_zyx=spine.spacing_zyx)
    of_whole = measured_chain(cut)

    assert kept == (1, 2, 3, 4, 5)
    assert heights(of_whole) == pytest.approx(heights(of_bodies), abs=1.0)
    assert decisions(of_whole) == decisions(of_bodies) == ["not-fractured"] * 2 + ["fractured"] + ["not-fractured"] * 2


def test_the_back_of_a_turned_spine_is_where_its_canal_is() -> None:
    spine = draw_spine([SOUND, SOUND, SOUND], turn_degrees=18)

    cut, _ = from_vertebrae(spine.whole, range(1, 4), spacing_zyx=spine.spacing_zyx)

    for vertebra, frame in zip(measured_chain(cut), spine.frames, strict=True):
        assert np.rad2deg(np.arccos(vertebra.frame.back @ frame.back)) < 4


def test_bodies_with_a_network_s_arch_find_their_canal_too() -> None:
    spine = draw_spine([SOUND, SOUND, SOUND], turn_degrees=18)
    share = (spine.bodies > 0).astype(np.float32)

    chain = measured_chain(
        BodyMap(labels=spine.bodies, spacing_zyx=spine.spacing_zyx, share=share, behind=spine.arches > 0)
    )

    for vertebra, frame in zip(chain, spine.frames, strict=True):
        assert np.rad2deg(np.arccos(vertebra.frame.back @ frame.back)) < 4
    assert heights(chain) == pytest.approx(26.0, abs=0.7)


def test_a_vertebra_without_an_arch_cannot_be_cut_and_is_named() -> None:
    spine = draw_spine([SOUND, SOUND, SOUND])
    whole = spine.whole.copy()
    whole[(whole == 2) & (spine.bodies == 0)] = 0

    assert from_vertebrae(whole, (20, 21, 22), spacing_zyx=spine.spacing_zyx)[1] == ()  # values that it has not
    cut, kept = from_vertebrae(whole, range(1, 4), spacing_zyx=spine.spacing_zyx)

    assert kept == (1, 3)
    assert len(measured_chain(cut)) == 2


def test_a_body_that_is_too_small_for_the_grid_is_left_out() -> None:
    labels = np.zeros((120, 60, 60), dtype=np.uint8)
    labels[70:110, 10:50, 10:50], labels[10:50, 10:50, 10:50] = 1, 2
    labels[1, 1, 1] = 3

    bodies, kept = from_bodies(labels, (1, 2, 3), spacing_zyx=(0.4, 0.4, 0.4))

    assert kept == (1, 2)
    assert len(measured_chain(bodies)) == 2


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True), (True, True, True)])
def test_the_stored_order_of_the_axes_changes_nothing(axes, flips) -> None:
    spine = draw_spine([SOUND, WEDGED, SOUND], spacing_zyx=(1.5, 1.0, 1.2), bend_degrees=3)
    upright = Mask(
        voxels=spine.whole,
        geometry=Geometry(
            shape_zyx=spine.whole.shape,
            spacing_zyx=spine.spacing_zyx,
            origin_zyx=(0, 0, 0),
            direction_zyx=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ),
    )
    image = sitk.PermuteAxes(sitk_of(upright), axes)
    image = sitk.Flip(image, flips)

    turned = reoriented(mask_from_sitk(image))

    assert np.array_equal(turned.voxels, upright.voxels)
    assert turned.geometry.spacing_zyx == pytest.approx(spine.spacing_zyx)


def sitk_of(mask: Mask) -> sitk.Image:
    from shared.fracture.volume import to_sitk

    return to_sitk(mask)


def test_a_mirrored_spine_has_the_same_heights() -> None:
    spine = draw_spine([SOUND, WEDGED, SOUND], bend_degrees=3)

    plain, _ = from_vertebrae(spine.whole, range(1, 4), spacing_zyx=spine.spacing_zyx)
    mirrored, _ = from_vertebrae(spine.whole[:, :, ::-1], range(1, 4), spacing_zyx=spine.spacing_zyx)

    assert heights(measured_chain(mirrored)) == pytest.approx(heights(measured_chain(plain)), abs=0.3)


def test_a_body_at_the_end_of_the_scan_is_cut_off() -> None:
    spine = draw_spine([SOUND, SOUND, SOUND])
    top = np.flatnonzero((spine.bodies == 1).any(axis=(1, 2)))[-4]

    chain = measured_chain(from_bodies(spine.bodies[:top], range(1, 4), spacing_zyx=spine.spacing_zyx)[0])

    assert [vertebra.cut_off for vertebra in chain] == [True, False, False]
    assert decisions(chain)[0] == "not-evaluable"


def test_a_fine_grid_is_thinned_before_it_is_read() -> None:
    labels = np.zeros((40, 41, 42), dtype=np.uint8)

    thin, spacing = thinned(labels, (0.3, 0.9, 1.7))

    assert thin.shape == (20, 41, 42)
    assert spacing == pytest.approx((0.6, 0.9, 1.7))


@pytest.mark.shared_data
def test_the_fractures_of_a_real_mask_are_found_and_no_others(shared_data: Path) -> None:
    path = shared_data / "verse004" / "sub-verse004_seg-vert_msk.nii.gz"
    mask = reoriented(mask_from_sitk(sitk.ReadImage(str(path))))
    values = sorted((int(v) for v in np.unique(mask.voxels) if v in VERSE), key=lambda v: sort_key(VERSE[v]))

    cut, kept = from_vertebrae(mask.voxels, values, spacing_zyx=mask.geometry.spacing_zyx)
    chain = measured_chain(cut)
    bodies = [vertebra.chain_body() for vertebra in chain]
    grades = graded(bodies)
    found = {
        VERSE[value]: judge(body, grade, settings=GateSettings())
        for value, body, grade in zip(values, bodies, grades, strict=True)
    }

    assert kept == tuple(values)
    assert [level for level, verdict in found.items() if verdict.decision == "fractured"] == ["T9", "T10", "L1"]
    assert {verdict.decision for level, verdict in found.items() if level not in ("T9", "T10", "L1")} == {
        "not-fractured"
    }
    assert "fewer than two usable neighbours" in found["T9"].warnings[0]
    by_level = dict(zip(found, grades, strict=True))
    assert [by_level[level].grade for level in ("T9", "T10", "L1")] == [2, 2, 3]


def stored_otherwise(image: sitk.Image) -> sitk.Image:
    return sitk.Flip(sitk.PermuteAxes(image, (2, 0, 1)), (True, False, True))


def in_the_mirror(image: sitk.Image) -> sitk.Image:
    """The patient's left where the right was: the first axis of this file goes to the left or right."""
    turned = sitk.DICOMOrient(image, "LPS")
    mirrored = sitk.GetImageFromArray(sitk.GetArrayFromImage(turned)[:, :, ::-1])
    mirrored.CopyInformation(turned)
    return mirrored


def bent_over(image: sitk.Image) -> sitk.Image:
    """The patient turned by nine degrees about the left-right axis, on a grid of 1 x 1 x 2 mm as the file's own."""
    turned = sitk.DICOMOrient(image, "LPS")
    middle = turned.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in turned.GetSize()])
    rotation = sitk.Euler3DTransform(middle, float(np.deg2rad(9.0)), 0.0, 0.0)
    return sitk.Resample(turned, turned, rotation, sitk.sitkNearestNeighbor, 0)


@pytest.mark.shared_data
@pytest.mark.parametrize("turned", [stored_otherwise, in_the_mirror, bent_over])
def test_a_real_mask_that_is_turned_or_mirrored_has_the_same_heights_and_levels(shared_data: Path, turned) -> None:
    image = sitk.ReadImage(str(shared_data / "verse004" / "sub-verse004_seg-vert_msk.nii.gz"), sitk.sitkUInt8)

    def read(one: sitk.Image) -> dict[str, tuple[int | None, tuple[float, float, float]]]:
        mask = reoriented(mask_from_sitk(one))
        values = sorted((int(v) for v in np.unique(mask.voxels) if v in VERSE), key=lambda v: sort_key(VERSE[v]))
        cut, kept = from_vertebrae(mask.voxels, values, spacing_zyx=mask.geometry.spacing_zyx)
        chain = measured_chain(cut)
        grades = graded([vertebra.chain_body() for vertebra in chain])
        return {
            VERSE[value]: (None if grade is None else grade.grade, heights([vertebra])[0])
            for value, vertebra, grade in zip(kept, chain, grades, strict=True)
        }

    first, second = read(image), read(turned(image))

    inner = [level for level in first if level not in ("T9", "L5")]  # the ends may leave a grid that was turned
    assert set(second) == set(first)
    for level in inner:
        assert second[level][0] == first[level][0], level
        assert second[level][1] == pytest.approx(first[level][1], abs=0.7), level
