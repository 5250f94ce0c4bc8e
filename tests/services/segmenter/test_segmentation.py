from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from services.segmenter.network import SpineNetwork
from services.segmenter.segmentation import NO_SPINE, NotSegmentable, label_of, on_grid, segment
from shared.fracture.crop import reoriented
from shared.fracture.levels import VERSE
from shared.fracture.spine.network_card import load_network
from shared.fracture.volume import Geometry, Volume, to_sitk, volume_from_sitk
from tests.fixtures.spine_network import SOUND, ct_of, lumbar, write_hu_network
from tests.fixtures.spines import DrawnBody, DrawnSpine

L1_TO_L5 = ("T12", "L1", "L2", "L3", "L4", "L5")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> SpineNetwork:
    folder = tmp_path_factory.mktemp("network")
    write_hu_network(folder)
    return SpineNetwork(*load_network(folder), threads=1)


def dice(found: np.ndarray, drawn: np.ndarray) -> float:
    return float(2 * (found & drawn).sum() / (found.sum() + drawn.sum()))


def agreement(labels: np.ndarray, spine: DrawnSpine, levels: tuple[str, ...]) -> float:
    return min(dice(labels == label_of(level), spine.bodies == number) for number, level in enumerate(levels, start=1))


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (1.0, 0.8, 0.8), (2.0, 0.7, 0.7)])
def test_bodies_are_found_named_from_the_sacrum_and_put_back_on_the_scan_s_grid(network, spacing) -> None:
    spine = lumbar(spacing_zyx=spacing)
    scan = ct_of(spine, sacrum=True)

    found = segment(scan, network)

    assert found.named.levels == L1_TO_L5
    assert found.named.levels_from == "sacrum"
    assert found.labels.geometry == scan.geometry
    assert agreement(found.labels.voxels, spine, L1_TO_L5) > 0.9


def test_without_a_sacrum_the_last_ribs_name_the_levels(network) -> None:
    spine = lumbar()

    found = segment(ct_of(spine, ribs=(1, 2, 3)), network)

    assert found.named.levels == ("T10", "T11", "T12", "L1", "L2", "L3")
    assert found.named.levels_from == "ribs"


def test_with_neither_bodies_are_counted_from_below(network) -> None:
    spine = lumbar()

    found = segment(ct_of(spine), network)

    assert found.named.levels == ("B06", "B05", "B04", "B03", "B02", "B01")
    assert set(np.unique(found.labels.voxels).tolist()) == {0, 101, 102, 103, 104, 105, 106}


def test_a_scan_that_does_not_show_the_sides_leaves_the_levels_uncertain(network) -> None:
    spine = lumbar()
    middle = round(spine.frames[0].centre_zyx[2] / 1.5)
    narrow = (slice(None), slice(None), slice(middle - 20, middle + 20))

    found = segment(ct_of(spine, ribs=(1, 2, 3), cropped_to=narrow), network)

    assert found.named.levels_from == "nothing"


def test_centres_are_told_in_the_scan_s_own_millimetres(network) -> None:
    spine = lumbar()

    found = segment(ct_of(spine, sacrum=True), network)

    for vertebra, frame in zip(found.vertebrae, spine.frames, strict=True):
        assert vertebra.frame.centre_zyx == pytest.approx(frame.centre_zyx, abs=1.5)


def test_a_fracture_is_measured_on_the_network_s_own_surface(network) -> None:
    spine = lumbar(bodies=(SOUND, SOUND, DrawnBody(anterior=16, middle=20, posterior=26), SOUND, SOUND, SOUND))

    found = segment(ct_of(spine, sacrum=True), network)

    heights = found.vertebrae[2].measured.heights
    assert heights.anterior == pytest.approx(16 + 0.15 * 10, abs=1.2)
    assert heights.posterior == pytest.approx(26 - 0.15 * 10 * 0.8, abs=1.2)


@pytest.mark.parametrize("axes", [(2, 1, 0), (1, 0, 2)])
def test_the_stored_order_of_the_axes_changes_neither_levels_nor_heights(network, axes) -> None:
    spine = lumbar()
    scan = ct_of(spine, sacrum=True)
    turned = volume_from_sitk(sitk.Flip(sitk.PermuteAxes(to_sitk(scan), axes), (True, False, True)))

    plain, other = segment(scan, network), segment(turned, network)

    assert other.named == plain.named
    assert np.array_equal(reoriented(other.labels).voxels, reoriented(plain.labels).voxels)
    for one, two in zip(plain.vertebrae, other.vertebrae, strict=True):
        assert one.measured.heights == two.measured.heights


def test_the_body_at_the_end_of_the_scan_is_cut_off(network) -> None:
    spine = lumbar()
    top = round(spine.frames[0].centre_zyx[0] / 1.5) + 3

    found = segment(ct_of(spine, sacrum=True, cropped_to=(slice(0, top), slice(None), slice(None))), network)

    assert [vertebra.cut_off for vertebra in found.vertebrae] == [True] + [False] * 5


def volume_of(voxels: np.ndarray, spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)) -> Volume:
    return Volume(
        voxels=voxels.astype(np.int16),
        geometry=Geometry(
            shape_zyx=voxels.shape,
            spacing_zyx=spacing,
            origin_zyx=(0, 0, 0),
            direction_zyx=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ),
    )


def test_a_scan_without_a_spine_is_refused(network) -> None:
    with pytest.raises(NotSegmentable, match=NO_SPINE):
        segment(volume_of(np.full((60, 60, 60), -150)), network)


def test_specks_that_look_like_bone_are_no_spine(network) -> None:
    voxels = np.full((60, 60, 60), -150)
    voxels[20:24, 20:28, 20:34] = 200  # less than a millilitre, in slices that are looked at

    with pytest.raises(NotSegmentable, match=NO_SPINE):
        segment(volume_of(voxels), network)


@pytest.mark.parametrize("shape", [(8, 100, 100), (100, 12, 100), (100, 100, 6)])
def test_a_scan_of_a_few_slices_is_refused_with_its_size(network, shape) -> None:
    with pytest.raises(NotSegmentable, match="too small to find vertebrae in"):
        segment(volume_of(np.zeros(shape)), network)


def test_a_spine_that_lies_in_a_small_part_of_the_scan_is_found_there(network) -> None:
    spine = lumbar()
    scan = ct_of(spine, sacrum=True)
    wide = np.full(tuple(n + 80 for n in scan.voxels.shape), -150)
    wide[40:-40, 40:-40, 40:-40] = scan.voxels

    found = segment(volume_of(wide), network)

    assert found.named.levels == L1_TO_L5
    inside = found.labels.voxels[40:-40, 40:-40, 40:-40]
    assert agreement(inside, spine, L1_TO_L5) > 0.93


def test_bringing_a_volume_onto_the_network_s_grid_keeps_places_and_values() -> None:
    z, y, x = np.indices((40, 50, 60))
    ramp = volume_of(3 * z + 2 * y + x, spacing=(1.0, 0.7, 0.5))

    found = on_grid(ramp, spacing_mm=1.5)

    assert found.shape == (27, 23, 20)
    expected = 3 * 10 * 1.5 / 1.0 + 2 * 12 * 1.5 / 0.7 + 11 * 1.5 / 0.5
    assert found[10, 12, 11] == pytest.approx(expected, abs=1.5)


def test_labels_are_verse_s() -> None:
    assert {level: label_of(level) for level in ("T1", "T12", "L1", "L5", "B01", "B12")} == {
        "T1": 8,
        "T12": 19,
        "L1": 20,
        "L5": 24,
        "B01": 101,
        "B12": 112,
    }
    assert VERSE[label_of("L3")] == "L3"
