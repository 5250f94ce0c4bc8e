"""Real odd files from public repositories: each ends in the ledger of files or in a series with the right reason."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from services.dicom_ingest.collected import CollectedSeries
from services.dicom_ingest.folder import FolderScan, collect_judged, judge_study, read_one_series, scan_folder
from services.dicom_ingest.headers import InstanceHeader, read_header
from services.dicom_ingest.pixels import decode_hu
from services.dicom_ingest.settings import IngestSettings
from shared.fracture.volume import AIR_HU, volume_from_sitk

pytestmark = pytest.mark.shared_data

COPY = "a copy of an image that is here already"
SEG_AGAIN = "another mask object under a SOP Instance UID already seen"
ONE = "1 image, a volume needs at least 3"

ODD: dict[str, dict[str, str]] = {
    "pydicom-odd": {
        "CT_small.dcm": ONE,
        "ExplVR_BigEndNoMeta.dcm": "no pixel data: RT Ion Plan Storage",
        "J2K_pixelrep_mismatch.dcm": "gantry tilt of 22.0 degrees",
        "MR_truncated.dcm": "modality MR, not CT",
        "badVR.dcm": "modality RTDOSE, not CT",
        "bad_sequence.dcm": ONE,
        "dicomdirtests/77654033/CT2/17106": "161 missing slices of 1.25 mm",
        "dicomdirtests/77654033/CT2/17136": "161 missing slices of 1.25 mm",
        "dicomdirtests/77654033/CT2/17166": "161 missing slices of 1.25 mm",
        "dicomdirtests/77654033/CT2/17196": "161 missing slices of 1.25 mm",
        "dicomdirtests/98892001/CT2N/6293": "localiser",
        "dicomdirtests/98892001/CT2N/6924": "localiser",
        **{f"dicomdirtests/98892001/CT5N/{n}": "volume" for n in (2062, 2392, 2693, 3023, 3353)},
        "eCT_Supplemental.dcm": "derived images (PERFUSION)",
        "explicit_VR-UN.dcm": ONE,
        "liver.dcm": "mask",
        "liver_1frame.dcm": SEG_AGAIN,
        "liver_deflate.dcm": "mask",
        "liver_expb.dcm": SEG_AGAIN,
        "liver_j2k.dcm": "mask",
        "liver_nonbyte_aligned.dcm": "mask",
        "liver_nonbyte_aligned_deflate.dcm": "mask",
        "liver_nonbyte_aligned_j2k.dcm": "mask",
        "liver_nonbyte_aligned_rle.dcm": "mask",
        "liver_rle.dcm": "mask",
        "no_meta.dcm": "not DICOM",
        "no_meta_group_length.dcm": "no pixel data: RT Image Storage",
        "reportsi.dcm": "no pixel data: Basic Text SR Storage",
        "reportsi_with_empty_number_tags.dcm": "no pixel data: Basic Text SR Storage",
        "rtstruct.dcm": "mask",
        "test-SR.dcm": "no pixel data: Comprehensive SR Storage",
    },
    "dicom2nifti-ct": {
        **{f"gantrytilting/001/IM-0001-000{n}.dcm": "gantry tilt of 14.0 degrees" for n in (1, 2, 3, 4)},
        **{f"notavolume/001/00{n}.dcm": "all 4 images lie at one position" for n in (1, 2, 3, 4)},
        **{
            f"sliceincrement/001/IM-0001-00{n}-0001.dcm": "1 missing slice of 5.00 mm" for n in ("07", "08", "09", "10")
        },
    },
    "dcmqa-ct": {
        "Philips_tilt.tar.xz": "not DICOM",
        **{f"S21610/S4010/I{n}": "secondary capture" for n in (10, 20, 30)},
    },
    "ts-ctimage": {
        "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm": "derived images (PERFUSION)",
        "CT2_J2KR": ONE,
        "CTImage.dcm": "all 7 images lie at one position",
        **{
            f"CTImage.dcm_{name}.dcm": COPY
            for name in (
                "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2",
                "DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99",
                "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90",
                "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80",
                "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70",
                "JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57",
                "LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1",
                "LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2",
                "RLELosslessTransferSyntax_1.2.840.10008.1.2.5",
            )
        },
        **{
            f"CTImage.dcm_{name}.dcm": "JPEG Spectral Selection, Non-Hierarchical (Process 6 and 8)"
            for name in (
                "JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91",
                "JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81",
                "JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55",
                "JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50",
                "JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51",
                "JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53",
            )
        },
        "no-pixel-data.dcm": "no pixel data: Basic Text SR Storage",
        "no-pixel-spacing.dcm": "modality US, not CT",
    },
    "highdicom-seg-sr": {
        "ct_image.dcm": ONE,
        "seg_image_ct_binary.dcm": "mask",
        "seg_image_ct_binary_fractional.dcm": "mask",
        "seg_image_ct_binary_overlap.dcm": "mask",
        "seg_image_ct_binary_single_frame.dcm": "mask",
        "seg_image_ct_true_fractional.dcm": "mask",
        "sr_document.dcm": "no pixel data: Comprehensive 3D SR Storage",
        "sr_document_with_multiple_groups.dcm": "no pixel data: Comprehensive 3D SR Storage",
    },
}


def outcomes(scan: FolderScan) -> dict[str, str]:
    """Relative path → what became of the file: "volume", "mask", or the reasons."""
    found = {file.path.relative_to(scan.root).as_posix(): file.reason for file in scan.ignored}
    found |= {mask.path.relative_to(scan.root).as_posix(): "mask" for mask in scan.mask_objects}
    for study in scan.studies:
        for judged in judge_study(study, IngestSettings()):
            collected = collect_judged(judged)
            for instance in judged.group.instances:
                path = instance.path.relative_to(scan.root).as_posix()
                found[path] = "; ".join(collected.reasons) or "volume"
    return found


def unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", ODD)
def test_each_file_ends_in_the_ledger_with_the_right_reason(name: str, shared_data: Path) -> None:
    found = outcomes(scan_folder(shared_data / name))

    assert set(found) == set(ODD[name])
    for path, expected in ODD[name].items():
        assert expected in found[path], (path, found[path])


def test_a_tilted_philips_scan_its_localiser_and_its_directory_files(shared_data: Path, tmp_path: Path) -> None:
    scan = scan_folder(unpacked(shared_data / "dcmqa-ct" / "Philips_tilt.tar.xz", tmp_path))

    found = outcomes(scan)

    assert len(found) == 57
    assert found["S21610/S1000/DIRFILE"] == found["S21610/S2010/DIRFILE"] == "a DICOMDIR, an index and no image"
    assert found["S21610/S1000/I10"].startswith("localiser")
    tilted = [reason for path, reason in found.items() if path.startswith("S21610/S2010/I")]
    assert tilted == ["gantry tilt of 18.5 degrees: the slices are not stacked along their normal"] * 54


def itk_volume(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    image: sitk.Image = reader.Execute()
    return image


def assert_equals_simpleitk(collected: CollectedSeries, folder: Path) -> None:
    theirs = volume_from_sitk(itk_volume(folder))
    assert collected.reasons == ()
    assert collected.volume is not None
    assert collected.volume.geometry.same_grid(theirs.geometry, tolerance_mm=0.01)
    padding = -3024
    expected = np.where(theirs.voxels == padding, AIR_HU, theirs.voxels)
    assert np.array_equal(collected.volume.voxels, expected)


def test_a_philips_scan_is_assembled_as_simpleitk_does(shared_data: Path, tmp_path: Path) -> None:
    folder = unpacked(shared_data / "lidc-0314-dicom" / "LIDC-0314_55slices.tar.xz", tmp_path)

    collected = read_one_series(folder)

    assert collected.volume is not None
    assert collected.volume.geometry.shape_zyx == (55, 512, 512)
    assert [warned.code for warned in collected.warnings] == ["frame-of-reference"]
    assert_equals_simpleitk(collected, next(folder.rglob("*.dcm")).parent)


def test_a_ge_scan_is_assembled_as_simpleitk_does(shared_data: Path, tmp_path: Path) -> None:
    folder = unpacked(shared_data / "crlm-1004-dicom" / "CRLM-CT-1004.tar.xz", tmp_path)

    collected = read_one_series(folder)

    assert collected.volume is not None
    assert collected.volume.geometry.spacing_zyx[0] == pytest.approx(5.0)
    assert collected.demographics.age_years == 38
    assert_equals_simpleitk(collected, next(folder.rglob("*.dcm")).parent)


def test_uids_that_are_empty_in_every_dataset_come_from_the_file_meta(shared_data: Path) -> None:
    collected = read_one_series(shared_data / "totalseg-ct-dicom" / "example_ct_dicom")

    assert collected.volume is not None
    assert collected.volume.geometry.shape_zyx == (20, 512, 512)
    assert len({s.sop_instance_uid for s in collected.slices} - {""}) == 20
    assert collected.series_instance_uid == ""
    assert collected.content_sha256


def test_a_legacy_converted_multi_frame_object_is_the_volume_of_its_source_images(shared_data: Path) -> None:
    folder = shared_data / "dcmqi-seg-sr" / "segmentations" / "23x38x3"

    single = read_one_series(folder / "image")
    multi = read_one_series(folder / "multiframe")

    assert single.volume is not None
    assert multi.volume is not None
    assert single.volume.geometry.same_grid(multi.volume.geometry)
    np.testing.assert_array_equal(single.volume.voxels, multi.volume.voxels)


def test_jpeg_2000_whose_header_contradicts_pixel_representation_keeps_its_sign(shared_data: Path) -> None:
    header = read_header(shared_data / "pydicom-odd" / "J2K_pixelrep_mismatch.dcm", IngestSettings())
    assert isinstance(header, InstanceHeader)

    hu = decode_hu(header)

    assert (hu.min(), hu.max()) == (-2000, 1896)
