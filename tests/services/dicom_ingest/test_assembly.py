"""Frames are put in order by geometry alone, and what makes no volume is named."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from services.dicom_ingest.assembly import Arrangement, arrange
from services.dicom_ingest.collected import PatientIdentity
from services.dicom_ingest.folder import read_one_series
from services.dicom_ingest.headers import InstanceHeader, PlaneHeader, SeriesHeader
from services.dicom_ingest.settings import IngestSettings
from shared.fracture.volume import volume_from_sitk
from tests.fixtures.broken_dicom import TILTED
from tests.fixtures.dicom_files import AXIAL, enhanced_ct, slice_pixels, write_dicom, write_series

SETTINGS = IngestSettings()
SHARED = SeriesHeader(identity=PatientIdentity(), modality="CT", rows=4, columns=5, bits_allocated=16)


def header(name: int, position: tuple[float, float, float], **plane: object) -> InstanceHeader:
    values: dict[str, object] = {
        "position_xyz": position,
        "orientation_xyz": AXIAL,
        "pixel_spacing": (0.8, 0.7),
        "rescale_slope": 1.0,
        "rescale_intercept": 0.0,
        **plane,
    }
    return InstanceHeader(
        path=Path(f"{name}"),
        file_bytes=1,
        sop_class_uid="ct",
        sop_instance_uid=str(name),
        transfer_syntax_uid="",
        shared=SHARED,
        frames=(PlaneHeader(**values),),  # type: ignore[arg-type]
    )


def stack(count: int, step: float = 1.5) -> list[InstanceHeader]:
    return [header(n, (0.0, 0.0, n * step)) for n in range(count)]


def order(arrangement: Arrangement) -> list[str]:
    return [placed.instance.sop_instance_uid for placed in arrangement.frames]


@given(st.permutations(range(9)), st.floats(0.3, 6.0))
def test_any_order_of_files_gives_the_same_stack(shuffled: list[int], step: float) -> None:
    instances = stack(9, step)

    arrangement = arrange([instances[n] for n in shuffled], SETTINGS)

    assert arrangement.reasons == ()
    assert order(arrangement) == [str(n) for n in range(9)]
    assert arrangement.geometry is not None
    assert arrangement.geometry.spacing_zyx == pytest.approx((step, 0.8, 0.7))


@given(st.integers(5, 60), st.data(), st.floats(0.3, 6.0))
def test_a_slice_that_is_missing_anywhere_in_the_middle_is_found(count: int, data: st.DataObject, step: float) -> None:
    gone = data.draw(st.integers(1, count - 2))
    instances = [one for n, one in enumerate(stack(count, step)) if n != gone]

    arrangement = arrange(instances, SETTINGS)

    assert len(arrangement.reasons) == 1
    assert arrangement.reasons[0].startswith("1 missing slice of")
    assert f"between {(gone - 1) * step:.1f} and {(gone + 1) * step:.1f} mm" in arrangement.reasons[0]


@given(st.floats(0.5, 40.0))
def test_the_angle_of_a_gantry_tilt_is_told(degrees: float) -> None:
    shear = 1.5 * float(np.tan(np.radians(degrees)))
    instances = [header(n, (0.0, n * shear, n * 1.5)) for n in range(20)]

    arrangement = arrange(instances, SETTINGS)

    (reason,) = arrangement.reasons
    told = re.fullmatch(r"gantry tilt of ([0-9.]+) degrees: the slices are not stacked along their normal", reason)
    assert told is not None
    assert abs(float(told.group(1)) - degrees) <= 0.0501  # one decimal is told, and halves round either way


@given(st.lists(st.floats(-0.02, 0.02), min_size=12, max_size=12))
def test_rounded_positions_are_one_even_stack(errors: list[float]) -> None:
    instances = [header(n, (0.0, 0.0, n * 1.5 + error)) for n, error in enumerate(errors)]

    arrangement = arrange(instances, SETTINGS)

    assert arrangement.reasons == ()


def test_two_acquisitions_at_the_same_positions_are_told_apart() -> None:
    first = [header(n, (0.0, 0.0, n * 1.5), acquisition="1") for n in range(6)]
    second = [header(10 + n, (0.0, 0.0, n * 1.5), acquisition="2") for n in range(6)]

    arrangement = arrange([*second, *first], SETTINGS)

    assert order(arrangement) == [str(n) for n in range(6)]
    assert [warned.code for warned in arrangement.warnings] == ["several-stacks"]


def test_the_stack_that_a_mask_references_is_taken() -> None:
    first = [header(n, (0.0, 0.0, n * 1.5), acquisition="1") for n in range(6)]
    second = [header(10 + n, (0.0, 0.0, n * 1.5), acquisition="2") for n in range(6)]

    arrangement = arrange([*first, *second], SETTINGS, prefer_sop_instance_uids=frozenset({"12", "13"}))

    assert order(arrangement) == [str(10 + n) for n in range(6)]


def test_acquisitions_that_only_overlap_are_refused() -> None:
    lower = [header(n, (0.0, 0.0, n * 1.5), acquisition="1") for n in range(6)]
    upper = [header(10 + n, (0.0, 0.0, (n + 5) * 1.5), acquisition="2") for n in range(6)]

    arrangement = arrange([*lower, *upper], SETTINGS)

    assert arrangement.geometry is None
    assert arrangement.reasons[0].startswith("repeated positions: 1 of 12 images")


def test_thin_slices_far_apart_are_warned_of() -> None:
    instances = [header(n, (0.0, 0.0, n * 5.0), slice_thickness_mm=1.0) for n in range(6)]

    arrangement = arrange(instances, SETTINGS)

    assert [warned.code for warned in arrangement.warnings] == ["slice-gap"]


@pytest.mark.parametrize(
    "orientation", [AXIAL, TILTED, (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)]
)
def test_the_volume_equals_simpleitks(orientation: tuple[float, ...], tmp_path: Path) -> None:
    write_series(tmp_path, 6, orientation=orientation)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))

    ours = read_one_series(tmp_path).volume

    theirs = volume_from_sitk(reader.Execute())
    assert ours is not None
    assert ours.geometry.same_grid(theirs.geometry)
    np.testing.assert_array_equal(ours.voxels, theirs.voxels)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.permutations(range(6)), numbers=st.permutations(range(6)))
def test_names_and_instance_numbers_decide_nothing(
    names: list[int], numbers: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def renumber(index: int, ds: Dataset) -> None:
        ds.InstanceNumber = str(numbers[index])

    folder = tmp_path_factory.mktemp("shuffled")
    write_series(folder, 6, change=renumber, name=lambda index: f"{names[index]}/IMG")

    volume = read_one_series(folder).volume

    assert volume is not None
    for k in range(6):
        np.testing.assert_array_equal(volume.voxels[k], slice_pixels(k) - 1024)


def test_an_enhanced_object_is_assembled_from_its_frames(tmp_path: Path) -> None:
    write_dicom(tmp_path / "multi", enhanced_ct(5, order=[3, 1, 0, 2, 4]))

    collected = read_one_series(tmp_path)

    assert collected.reasons == ()
    assert collected.volume is not None
    assert [int(plane[0, 0]) for plane in collected.volume.voxels] == [1000 + 100 * k - 1024 for k in range(5)]
