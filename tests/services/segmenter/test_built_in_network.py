"""The network that comes with the project, on real CT beside the checkout and on phantoms.

Each figure that is tested here stands in the network's model card, with the log of looks at the real scans.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from services.dicom_ingest.masks_nifti import read_nifti_volume
from services.segmenter.network import SpineNetwork
from services.segmenter.segmentation import NotSegmentable, Segmented, label_of, segment
from services.segmenter.service import built_in_of
from services.segmenter.settings import BUILT_IN_NETWORK, SegmenterSettings
from services.settings import DEMO_BUNDLE
from services.trainer.phantoms.whole_spine import WholeSpine, render_spine, spine_patient
from shared.fracture.bundle import load_bundle
from shared.fracture.crop import reoriented
from shared.fracture.levels import TOTALSEG, VERSE
from shared.fracture.spine.findings import findings_of
from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.network_card import NETWORK_FILE, load_network
from shared.fracture.volume import Geometry, Mask, Volume, mask_from_sitk

SIX = ("T12", "L1", "L2", "L3", "L4", "L5")


@cache
def network() -> SpineNetwork:
    return SpineNetwork(*load_network(BUILT_IN_NETWORK), threads=2)


def dice(one: np.ndarray, two: np.ndarray) -> float:
    return float(2 * (one & two).sum() / (one.sum() + two.sum()))


def label_map(path: Path) -> Mask:
    import SimpleITK as sitk

    return mask_from_sitk(sitk.ReadImage(str(path), sitk.sitkUInt8))


def names_at(found: Segmented, reference: np.ndarray, levels: dict[int, str]) -> dict[str, str]:
    """The name that each level of a reference map got: of the label that covers most of it, "" where none does half."""
    named = {label_of(level): level for level in found.named.levels}
    given = {}
    for value, level in levels.items():
        inside = found.labels.voxels[reference == value]
        if not len(inside):
            continue
        counts = np.bincount(inside, minlength=1)
        counts[0] = 0
        best = int(counts.argmax())
        given[level] = named[best] if counts[best] >= len(inside) / 2 else ""
    return given


def test_it_is_small_and_is_the_file_that_its_card_names() -> None:
    card, onnx = load_network(BUILT_IN_NETWORK)  # the SHA-256 is compared in it

    assert len(onnx) < 8_000_000
    assert (BUILT_IN_NETWORK / NETWORK_FILE).stat().st_size == len(onnx)
    assert [one.split()[0] for one in card.trained_on.anatomies] == ["s0327", "s0328"]
    assert "Research use only" in (BUILT_IN_NETWORK / "MODEL_CARD.md").read_text()


def test_the_demonstration_bundle_knows_its_masks() -> None:
    source = built_in_of(SegmenterSettings()).note.source

    assert source in load_bundle(DEMO_BUNDLE).manifest.mask_sources


# real CT ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def example(shared_data: Path) -> tuple[Volume, np.ndarray, np.ndarray]:
    """A real CT of 3 mm, its reference vertebrae (TotalSegmentator's values), and its reference bodies."""
    folder = shared_data / "totalseg-example"
    report = folder / "spine_report" / "example_ct_report"
    volume, _ = read_nifti_volume(folder / "example_ct.nii.gz")
    vertebrae = label_map(report / "totalseg.nii.gz")
    bodies = label_map(report / "totalseg_vertebrae_body.nii.gz")
    return volume, vertebrae.voxels, (bodies.voxels == 1) & (vertebrae.voxels != 0)


@pytest.mark.shared_data
def test_the_bodies_of_a_real_scan_are_found_and_named_as_its_reference_has_them(
    example: tuple[Volume, np.ndarray, np.ndarray],
) -> None:
    volume, vertebrae, bodies = example
    six = {value: level for value, level in TOTALSEG.items() if level in SIX}
    of_six = np.where(bodies & np.isin(vertebrae, list(six)), vertebrae, 0)

    found = segment(volume, network())

    assert names_at(found, of_six, six) == {level: level for level in SIX}
    automatic = np.isin(found.labels.voxels, [label_of(level) for level in SIX])
    planes = np.flatnonzero((of_six > 0).any(axis=(1, 2)))
    inside = slice(int(planes[0]), int(planes[-1]) + 1)
    assert dice(automatic[inside], of_six[inside] > 0) >= 0.90


@pytest.mark.shared_data
@pytest.mark.parametrize("lowest", ["L5", "L4", "L3", "L2"])
def test_cut_off_above_the_sacrum_the_names_are_the_same_or_none(
    example: tuple[Volume, np.ndarray, np.ndarray], lowest: str
) -> None:
    volume, vertebrae, bodies = example
    value = next(value for value, level in TOTALSEG.items() if level == lowest)
    first = int(np.flatnonzero((bodies & (vertebrae == value)).any(axis=(1, 2)))[0])
    cut = Volume(
        voxels=np.ascontiguousarray(volume.voxels[first:]),
        geometry=replace(
            volume.geometry,
            shape_zyx=(volume.geometry.shape_zyx[0] - first, *volume.geometry.shape_zyx[1:]),
            origin_zyx=tuple(float(v) for v in volume.geometry.world_zyx(np.array([[first, 0, 0]]))[0]),
        ),
    )
    levels = {v: level for v, level in TOTALSEG.items() if level in SIX}

    found = segment(cut, network())

    given = names_at(found, np.where(bodies, vertebrae, 0)[first:], levels)
    assert given
    assert all(name in ("", level) or name.startswith("B") for level, name in given.items()), given


@pytest.mark.shared_data
def test_an_osteoporotic_noisy_body_is_found(shared_data: Path) -> None:
    folder = shared_data / "tptbox-l3"
    volume, _ = read_nifti_volume(folder / "sub-ct_label-22_ct.nii.gz")
    vertebrae = label_map(folder / "sub-ct_seg-vert_label-22_msk.nii.gz").voxels
    parts = label_map(folder / "sub-ct_seg-subreg_label-22_msk.nii.gz").voxels
    l3 = (vertebrae == 22) & np.isin(parts, (49, 50))

    found = segment(volume, network())

    counts = np.bincount(found.labels.voxels[l3], minlength=1)
    counts[0] = 0
    assert dice(found.labels.voxels == int(counts.argmax()), l3) >= 0.92
    assert found.named.levels_from == "nothing"  # neither sacrum nor ribs are in the picture


# phantoms -----------------------------------------------------------------------------------------------------------
@cache
def phantom() -> WholeSpine:
    patient = replace(spine_patient(seed=31, index=3), spacing_zyx=(1.5, 1.2, 1.2), slice_thickness_mm=1.5)
    return render_spine(patient)


@cache
def of_phantom() -> Segmented:
    return segment(phantom().volume, network())


PHANTOM_LEVELS = ("T9", "T10", "T11", "T12", *SIX[1:])


def test_a_phantom_s_spine_is_found_and_named_from_sacrum_and_ribs() -> None:
    found = of_phantom()

    names = names_at(found, phantom().bodies.voxels, dict(VERSE))

    assert names == {level: level for level in PHANTOM_LEVELS}
    assert found.named.levels_from in ("sacrum", "sacrum and ribs")


def stored_as(volume: Volume, axes: tuple[int, int, int], flips: tuple[bool, bool, bool]) -> Volume:
    """The same volume with its voxels stored along other axes."""
    voxels = np.transpose(volume.voxels, axes)
    direction = np.array(volume.geometry.direction_zyx)[:, list(axes)]
    spacing = [volume.geometry.spacing_zyx[axis] for axis in axes]
    origin = np.array(volume.geometry.origin_zyx)
    for axis, flipped in enumerate(flips):
        if flipped:
            origin = origin + direction[:, axis] * spacing[axis] * (voxels.shape[axis] - 1)
            direction[:, axis] *= -1
            voxels = np.flip(voxels, axis=axis)
    return Volume(
        voxels=np.ascontiguousarray(voxels),
        geometry=Geometry(
            shape_zyx=voxels.shape,  # type: ignore[arg-type]
            spacing_zyx=tuple(spacing),  # type: ignore[arg-type]
            origin_zyx=tuple(float(v) for v in origin),  # type: ignore[arg-type]
            direction_zyx=tuple(tuple(float(v) for v in row) for row in direction),  # type: ignore[arg-type]
        ),
    )


@pytest.mark.parametrize(
    ("axes", "flips"),
    [
        ((2, 0, 1), (False, False, False)),
        ((1, 2, 0), (True, False, True)),
        ((0, 1, 2), (True, True, True)),
    ],
)
def test_a_scan_that_is_stored_along_other_axes_has_the_same_levels_and_heights(
    axes: tuple[int, int, int], flips: tuple[bool, bool, bool]
) -> None:
    first = of_phantom()

    turned = segment(stored_as(phantom().volume, axes, flips), network())

    assert turned.named == first.named
    one, two = (findings_of(found.named.levels, found.vertebrae, limits=GateSettings()) for found in (first, turned))
    for before, after in zip(one, two, strict=True):
        assert (before.level, before.decision, before.grade) == (after.level, after.decision, after.grade)
        for name in ("anterior_mm", "middle_mm", "posterior_mm"):
            assert getattr(after, name).value == pytest.approx(getattr(before, name).value, abs=0.05)


def upside_down(volume: Volume) -> Volume:
    """The voxels turned head to foot, while the header says that nothing was."""
    return Volume(voxels=np.ascontiguousarray(volume.voxels[::-1]), geometry=volume.geometry)


def back_to_front(volume: Volume) -> Volume:
    return Volume(voxels=np.ascontiguousarray(volume.voxels[:, ::-1]), geometry=volume.geometry)


@pytest.mark.parametrize("turned", [upside_down, back_to_front])
def test_a_scan_whose_header_lies_about_head_or_back_is_refused_with_that_reason(turned) -> None:
    with pytest.raises(NotSegmentable, match="orientation"):
        segment(turned(phantom().volume), network())


def cylinder(shape: tuple[int, int, int], *, inside: float, shell: float, radius: float) -> Volume:
    """A leg, as it were: soft parts with a shaft of bone."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[: shape[1], : shape[2]]
    away = np.hypot(y - shape[1] / 2, x - shape[2] / 2)
    plane = np.full(shape[1:], -1000.0)
    plane[away < 60] = 50
    plane[away < radius] = shell
    plane[away < radius * 0.55] = inside
    voxels = plane[None] + rng.normal(0, 15, shape)
    return Volume(
        voxels=voxels.astype(np.int16),
        geometry=Geometry(
            shape_zyx=shape,
            spacing_zyx=(1.5, 1.0, 1.0),
            origin_zyx=(0.0, 0.0, 0.0),
            direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
        ),
    )


def head(shape: tuple[int, int, int] = (120, 200, 170)) -> Volume:
    """A head, as it were: brain in a shell of bone."""
    rng = np.random.default_rng(3)
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    depth = np.sqrt(((z - 60) * 1.5 / 80) ** 2 + ((y - 100) / 92) ** 2 + ((x - 85) / 74) ** 2)
    hu = np.where(depth < 0.86, 32.0, np.where(depth < 0.95, 900.0, np.where(depth < 1.02, 30.0, -1000.0)))
    made = cylinder(shape, inside=0, shell=0, radius=1)
    return Volume(voxels=(hu + rng.normal(0, 8, shape)).astype(np.int16), geometry=made.geometry)


@pytest.mark.parametrize(
    "scan",
    [
        cylinder((160, 140, 140), inside=-60, shell=1100, radius=16),
        cylinder((160, 140, 140), inside=200, shell=400, radius=24),
        cylinder((160, 140, 140), inside=0, shell=30, radius=24),
        head(),
    ],
    ids=["leg", "rod", "water", "head"],
)
def test_a_scan_without_a_spine_gets_no_masks(scan: Volume) -> None:
    with pytest.raises(NotSegmentable, match="no spine"):
        segment(scan, network())


@pytest.mark.parametrize("slices", [4, 12])
def test_a_few_slices_get_no_names_and_nothing_is_judged(slices: int) -> None:
    volume = phantom().volume
    part = Volume(
        voxels=np.ascontiguousarray(volume.voxels[120 : 120 + slices]),
        geometry=replace(volume.geometry, shape_zyx=(slices, *volume.geometry.shape_zyx[1:])),
    )

    with pytest.raises(NotSegmentable, match="too small"):
        segment(part, network())


def test_the_network_sees_a_reoriented_scan_whatever_it_was_stored_as() -> None:
    turned = stored_as(phantom().volume, (2, 0, 1), (True, False, False))

    assert np.array_equal(reoriented(turned).voxels, reoriented(phantom().volume).voxels)
