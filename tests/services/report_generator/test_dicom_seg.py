from __future__ import annotations

import io
from dataclasses import asdict, replace

import highdicom as hd
import numpy as np
import pydicom
import pytest

from services.report_generator.dicom_seg import NoSegmentation, segmentation
from shared.fracture.level_codes import BODY_SCT, body_code
from shared.fracture.levels import SCORED_LEVELS
from shared.fracture.records import GridRecord, SeriesIdentity, SliceIdentity, StudyIdentity
from shared.fracture.spine.record import SegmenterNote
from shared.fracture.uids import OUR_MANUFACTURER, is_our_uid
from shared.fracture.volume import Geometry, Mask

GEOMETRY = Geometry(
    shape_zyx=(12, 20, 16),
    spacing_zyx=(2.0, 0.8, 0.8),
    origin_zyx=(-400.0, 30.0, -12.5),
    direction_zyx=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
)
STUDY = StudyIdentity(
    study_id="a" * 64,
    patient_name="PHANTOM^Paula",
    patient_id="P-1",
    patient_sex="F",
    patient_birth_date="19500102",
    accession_number="A-1",
    study_instance_uid="1.2.3",
    study_date="20260102",
    study_time="101112",
)
SERIES = SeriesIdentity(
    series_id="b" * 64,
    image_hash="c" * 64,
    series_instance_uid="1.2.3.4",
    frame_of_reference_uid="1.2.3.5",
    slices=tuple(SliceIdentity(sop_instance_uid=f"1.2.3.4.{k}", index=k) for k in range(12)),
)
NOTE = SegmenterNote(kind="built-in", name="spine", version="3", sha256="d" * 64)
LEVELS = {"T12": 19, "L1": 20, "B01": 101}


def labels() -> Mask:
    voxels = np.zeros(GEOMETRY.shape_zyx, dtype=np.uint8)
    voxels[8:11, 4:12, 3:9] = 19
    voxels[4:7, 5:13, 4:10] = 20
    voxels[1:3, 5:13, 4:11] = 101
    return Mask(voxels=voxels, geometry=GEOMETRY)


def made(**more) -> pydicom.Dataset:
    known = {
        "study": STUDY,
        "series": SERIES,
        "grid": GridRecord(**asdict(GEOMETRY)),
        "made_by": NOTE,
        **more,
    }
    return pydicom.dcmread(io.BytesIO(segmentation(known.pop("labels", labels()), LEVELS, **known)))


def test_what_is_opened_again_is_the_label_map() -> None:
    seg = hd.seg.Segmentation.from_dataset(made())

    assert seg.number_of_segments == 3
    for number, (level, value) in enumerate(LEVELS.items(), start=1):
        description = seg.get_segment_description(number)
        assert description.segment_label.startswith(f"{level} body")
        pixels = seg.get_pixels_by_source_instance(
            [one.sop_instance_uid for one in SERIES.slices], segment_numbers=[number],
            assert_missing_frames_are_empty=True,
        )[..., 0]  # fmt: skip
        assert np.array_equal(pixels.astype(bool), labels().voxels == value)


def test_levels_are_told_by_their_codes_and_uncertain_ones_by_none() -> None:
    seg = made()

    codes = [item.SegmentedPropertyTypeCodeSequence[0].CodeValue for item in seg.SegmentSequence]
    assert [BODY_SCT.get(code) for code in codes] == ["T12", "L1", None]
    assert seg.SegmentSequence[2].SegmentLabel == "B01 body, level uncertain"
    assert all(item.SegmentAlgorithmType == "AUTOMATIC" for item in seg.SegmentSequence)


def test_it_belongs_to_the_patient_and_the_images_it_was_made_from() -> None:
    seg = made()

    assert (str(seg.PatientName), seg.PatientID, seg.AccessionNumber) == ("PHANTOM^Paula", "P-1", "A-1")
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == ("1.2.3", "1.2.3.5")
    referenced = seg.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == "1.2.3.4"
    positions = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in seg.PerFrameFunctionalGroupsSequence]
    assert {tuple(float(v) for v in position) for position in positions} <= {
        (-12.5, 30.0, -400.0 + 2.0 * k) for k in range(12)
    }


def test_it_is_known_again_as_ours_and_made_twice_is_the_same() -> None:
    one, two = made(), made()

    assert is_our_uid(one.SOPInstanceUID)
    assert is_our_uid(one.SeriesInstanceUID)
    assert one.Manufacturer == OUR_MANUFACTURER
    assert one == two
    assert made(made_by=NOTE.model_copy(update={"version": "4"})).SOPInstanceUID != one.SOPInstanceUID


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"series": SERIES.model_copy(update={"series_instance_uid": ""})}, "no UIDs"),
        ({"study": STUDY.model_copy(update={"study_instance_uid": ""})}, "no UIDs"),
        ({"series": SERIES.model_copy(update={"slices": SERIES.slices[:-1]})}, "not on the grid"),
        (
            {"labels": Mask(voxels=labels().voxels, geometry=replace(GEOMETRY, origin_zyx=(0.0, 0.0, 0.0)))},
            "not on the grid",
        ),
        ({"labels": Mask(voxels=np.zeros_like(labels().voxels), geometry=GEOMETRY)}, "no body"),
    ],
)
def test_what_cannot_be_a_segmentation_says_why(more, said) -> None:
    with pytest.raises(NoSegmentation, match=said):
        made(**more)


@pytest.mark.parametrize("level", SCORED_LEVELS)
def test_every_scored_level_has_a_code_of_its_own(level: str) -> None:
    value, meaning = body_code(level)

    assert BODY_SCT[value] == level
    assert meaning.startswith("Structure of body of")
