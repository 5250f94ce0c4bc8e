from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest

from services.trainer.phantoms.archive import write_archive
from services.trainer.phantoms.cohort import Patient, draw_patient
from services.trainer.phantoms.dicom_writer import BODY_CODES, WrittenStudy, outlines, write_dicom
from services.trainer.phantoms.rendering import LABELS, Rendered, render


@pytest.fixture(scope="module")
def patient() -> Patient:
    return draw_patient(seed=21, index=4, fractures=2)


@pytest.fixture(scope="module")
def rendered(patient: Patient) -> Rendered:
    return render(patient)


@pytest.fixture(scope="module")
def study(patient: Patient, rendered: Rendered, tmp_path_factory: pytest.TempPathFactory) -> WrittenStudy:
    folder = tmp_path_factory.mktemp("study")
    return write_dicom(patient, folder, volume=rendered.volume, masks=rendered.masks, rtstruct=True)


def test_the_images_hold_the_volume_in_hounsfield_units(rendered: Rendered, study: WrittenStudy) -> None:
    images = sorted((pydicom.dcmread(path) for path in study.images), key=lambda ds: ds.ImagePositionPatient[2])

    stack = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in images])

    assert np.array_equal(stack, rendered.volume.voxels)
    assert {str(ds.PatientName) for ds in images} == {"PHANTOM^0005"}
    assert len({ds.SOPInstanceUID for ds in images}) == len(images)


def test_the_segmentation_holds_the_mask_and_names_bodies(
    patient: Patient, rendered: Rendered, study: WrittenStudy
) -> None:
    assert study.segmentation is not None
    seg = hd.seg.segread(study.segmentation)
    uids = [ds.SOPInstanceUID for ds in map(pydicom.dcmread, study.images)]
    positions = [float(ds.ImagePositionPatient[2]) for ds in map(pydicom.dcmread, study.images)]
    from_below = [uid for _, uid in sorted(zip(positions, uids, strict=True))]

    planes = seg.get_pixels_by_source_instance(from_below, assert_missing_frames_are_empty=True)

    for number, level in enumerate(sorted((f.level for f in patient.fractures), key=LABELS.__getitem__), start=1):
        assert np.array_equal(planes[..., number - 1] > 0, rendered.masks[0].voxels == LABELS[level])
        description = seg.get_segment_description(number)
        assert description.segment_label == f"{level} body"
        assert description.segmented_property_type == BODY_CODES[level]


def test_the_structure_set_encloses_the_mask_exactly(patient: Patient, rendered: Rendered, study: WrittenStudy) -> None:
    assert study.structure_set is not None
    ds = pydicom.dcmread(study.structure_set)
    area = np.prod(patient.spacing_zyx[1:])

    for roi, drawn in zip(ds.StructureSetROISequence, ds.ROIContourSequence, strict=True):
        enclosed = 0.0
        for contour in drawn.ContourSequence:
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            x, y = points[:, 0], points[:, 1]
            enclosed += float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        level = str(roi.ROIName).removesuffix(" body")
        expected = (rendered.masks[0].voxels == LABELS[level]).sum() * area
        assert abs(enclosed) == pytest.approx(expected, rel=1e-3)


def test_outlines_follow_pixel_edges_with_holes_turned_round() -> None:
    plane = np.zeros((6, 6), dtype=bool)
    plane[1:5, 1:5] = True
    plane[2, 2] = False

    rings = outlines(plane)

    areas = sorted(float(r[:, 1] @ np.roll(r[:, 0], -1) - r[:, 0] @ np.roll(r[:, 1], -1)) / 2 for r in rings)
    assert areas == [-1.0, 16.0]


def test_an_archive_has_the_same_bytes_when_it_is_made_again(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    first = write_archive(tmp_path / "a", patients=1, seed=4, progress=lambda done, all_: told.append((done, all_)))
    write_archive(tmp_path / "b", patients=1, seed=4)

    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert told == [(1, 1)]
    assert len(first) == 1
    assert (tmp_path / "a" / "truth.csv").read_text().splitlines()[0] == "study,level,acute,origin"


def test_the_class_stands_in_no_object(study: WrittenStudy) -> None:
    assert study.segmentation is not None
    text = str(pydicom.dcmread(study.segmentation)) + str(pydicom.dcmread(study.images[0]))

    assert "acute" not in text.lower()
    assert "chronic" not in text.lower()
