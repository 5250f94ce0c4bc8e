"""A phantom patient as DICOM: a CT series, a DICOM SEG of the fractured bodies, and an RTSTRUCT on request.

Names are fictional (PHANTOM^0001), UIDs follow from (seed, index), and nothing holds the time of writing: the same
patient gives the same bytes. File names mean nothing, as in an export from a PACS. The class of a fracture is written
nowhere in these objects.

A SEG's segments are coded as bodies (SNOMED "Structure of body of first lumbar vertebra") in the anatomic region of
their level (CID 7603 "L1 vertebra"), and labelled "L1 body".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from services.trainer.phantoms.cohort import KERNEL_NAME, Patient
from services.trainer.phantoms.rendering import LABELS
from shared.fracture.volume import Mask, Volume

BODY_CODES: Final[Mapping[str, Code]] = {
    level: Code(value, "SCT", f"Structure of body of {name} vertebra")
    for level, value, name in (
        ("T11", "52120002", "eleventh thoracic"),
        ("T12", "280849005", "twelfth thoracic"),
        ("L1", "61032001", "first lumbar"),
        ("L2", "53983007", "second lumbar"),
        ("L3", "55492004", "third lumbar"),
        ("L4", "71996003", "fourth lumbar"),
        ("L5", "21799000", "fifth lumbar"),
    )
}
LEVEL_CODES: Final[Mapping[str, Code]] = {
    level: getattr(codes.cid7603, f"{level}Vertebra") for level in ("T11", "T12", "L1", "L2", "L3", "L4", "L5")
}
_FIRST_DAY: Final = date(2021, 3, 1)
_UID_ROOT: Final = "1.2.826.0.1.3680043.8.498."
_RESCALE_INTERCEPT: Final = -1024
_MANUFACTURER: Final = "fracture-sweep phantom"
_VERSION: Final = "1"


@dataclass(frozen=True, kw_only=True)
class WrittenStudy:
    """Where a study's files lie, and the UIDs in them."""

    study_uid: str
    series_uid: str
    images: tuple[Path, ...]
    segmentation: Path | None
    structure_set: Path | None
    other_segmentations: tuple[Path, ...] = ()
    """Of the second and further readers."""


def uid(patient: Patient, *parts: object) -> UID:
    """The UID of something that belongs to a phantom patient."""
    return generate_uid(prefix=_UID_ROOT, entropy_srcs=[f"phantom/{patient.seed}/{patient.index}/{parts}"])


def _file_name(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12].upper()


def _study_day(patient: Patient) -> date:
    return _FIRST_DAY + timedelta(days=patient.index % 700)


def _patient_and_study(ds: Dataset, patient: Patient) -> None:
    day = _study_day(patient)
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName = f"PHANTOM^{patient.index + 1:04d}"
    ds.PatientID = f"PHANTOM-{patient.seed}-{patient.index + 1:04d}"
    ds.PatientSex = patient.sex or ""
    ds.PatientBirthDate = ""
    if patient.age is not None:
        ds.PatientAge = f"{patient.age:03d}Y"
        ds.PatientBirthDate = date(day.year - patient.age, 1, 1).strftime("%Y%m%d")
    ds.StudyInstanceUID = uid(patient, "study")
    ds.StudyDate = day.strftime("%Y%m%d")
    ds.StudyTime = f"{8 + patient.index % 10:02d}1500"
    ds.AccessionNumber = f"PH{patient.seed % 10000:04d}{patient.index + 1:05d}"
    ds.ReferringPhysicianName = ""
    ds.StudyID = f"{patient.index + 1}"
    ds.StudyDescription = "PHANTOM spine CT (synthetic)"


def _image(patient: Patient, volume: Volume, k: int) -> FileDataset:
    """Slice k of the series, counted from below."""
    geometry = volume.geometry
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid(patient, "image", k)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    _patient_and_study(ds, patient)
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality = "CT"
    ds.Manufacturer = _MANUFACTURER
    ds.ManufacturerModelName = "superellipsoid spine"
    ds.SoftwareVersions = _VERSION
    ds.SeriesInstanceUID = uid(patient, "series")
    ds.SeriesNumber = 2
    ds.SeriesDescription = "PHANTOM spine"
    ds.SeriesDate = ds.ContentDate = ds.AcquisitionDate = ds.StudyDate
    ds.SeriesTime = ds.ContentTime = ds.AcquisitionTime = ds.StudyTime
    ds.AcquisitionNumber = 1
    ds.InstanceNumber = geometry.shape_zyx[0] - k
    ds.BodyPartExamined = "SPINE"
    ds.PatientPosition = "HFS"
    ds.KVP = str(patient.kvp)
    ds.ConvolutionKernel = KERNEL_NAME[patient.kernel]
    ds.SliceThickness = f"{patient.slice_thickness_mm:g}"
    ds.FrameOfReferenceUID = uid(patient, "frame")
    ds.PositionReferenceIndicator = ""
    sz, sy, sx = geometry.spacing_zyx
    oz, oy, ox = geometry.origin_zyx
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.ImagePositionPatient = [f"{ox:.3f}", f"{oy:.3f}", f"{oz + k * sz:.3f}"]
    ds.SliceLocation = f"{oz + k * sz:.3f}"
    ds.PixelSpacing = [f"{sy:.4f}", f"{sx:.4f}"]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = geometry.shape_zyx[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = "1", str(_RESCALE_INTERCEPT), "HU"
    ds.WindowCenter, ds.WindowWidth = "500", "1500"
    stored = volume.voxels[k].astype(np.int32) - _RESCALE_INTERCEPT
    ds.PixelData = stored.astype("<u2").tobytes()
    return ds


def _levels_in(mask: Mask) -> list[str]:
    present = {int(value) for value in np.unique(mask.voxels)}
    return [level for level, value in LABELS.items() if value in present]


def _segmentation(patient: Patient, images: list[FileDataset], mask: Mask, reader: int) -> Dataset:
    levels = _levels_in(mask)
    stack = np.stack([mask.voxels == LABELS[level] for level in levels], axis=-1)
    # highdicom sorts frames by where the source images lie; they are given from below, as the mask is
    description = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"{level} body",
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=BODY_CODES[level],
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
            tracking_uid=hd.UID(uid(patient, "tracking", reader, level)),
            tracking_id=f"{level} body",
            anatomic_regions=[LEVEL_CODES[level]],
        )
        for number, level in enumerate(levels, start=1)
    ]
    seg = hd.seg.Segmentation(
        source_images=images,
        pixel_array=stack,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=description,
        series_instance_uid=uid(patient, "seg-series", reader),
        series_number=100 + reader,
        sop_instance_uid=uid(patient, "seg", reader),
        instance_number=1,
        manufacturer=_MANUFACTURER,
        manufacturer_model_name="phantom reader",
        software_versions=_VERSION,
        device_serial_number="0",
        content_label="VERTEBRAL_BODIES",
        content_description="PHANTOM vertebral bodies",
        series_description=f"PHANTOM bodies, reader {reader + 1}",
        omit_empty_frames=True,
    )
    _without_chance(seg, patient, reader)
    return seg


def _without_chance(seg: Dataset, patient: Patient, reader: int) -> None:
    """What highdicom draws at random or takes from the clock, set from the patient."""
    dimension = uid(patient, "dimension", reader)
    for item in [*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence]:
        item.DimensionOrganizationUID = dimension
    for name in ("ContentDate", "SeriesDate", "InstanceCreationDate"):
        if name in seg:
            setattr(seg, name, _study_day(patient).strftime("%Y%m%d"))
    for name in ("ContentTime", "SeriesTime", "InstanceCreationTime"):
        if name in seg:
            setattr(seg, name, f"{18 + reader % 6:02d}0000")
    for contribution in seg.get("ContributingEquipmentSequence", []):
        if "ContributionDateTime" in contribution:
            contribution.ContributionDateTime = f"{seg.ContentDate}{seg.ContentTime}"


def outlines(plane: NDArray[np.bool_]) -> list[NDArray[np.float64]]:
    """Closed outlines of a mask's slice along pixel edges: (n, 2) of (row, column), pixel centres at integers."""
    padded = np.pad(plane, 1)
    after: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def edges(where: NDArray[np.intp], start: tuple[int, int], end: tuple[int, int]) -> None:
        for j, i in where:
            after.setdefault((j + start[0], i + start[1]), []).append((j + end[0], i + end[1]))

    inside = padded[1:-1, 1:-1]
    edges(np.argwhere(inside & ~padded[:-2, 1:-1]), (0, 0), (0, 1))
    edges(np.argwhere(inside & ~padded[1:-1, 2:]), (0, 1), (1, 1))
    edges(np.argwhere(inside & ~padded[2:, 1:-1]), (1, 1), (1, 0))
    edges(np.argwhere(inside & ~padded[1:-1, :-2]), (1, 0), (0, 0))
    rings = []
    while after:
        first = min(after)
        ring, here = [first], first
        while True:
            following = after[here].pop()
            if not after[here]:
                del after[here]
            if following == first:
                break
            ring.append(following)
            here = following
        rings.append(np.asarray(ring, dtype=np.float64) - 0.5)
    return rings


def _contours(mask: Mask, value: int, image_uids: list[str]) -> Iterable[Dataset]:
    for k in np.flatnonzero((mask.voxels == value).any(axis=(1, 2))):
        for ring in outlines(mask.voxels[k] == value):
            index = np.column_stack([np.full(len(ring), float(k)), ring])
            world_xyz = mask.geometry.world_zyx(index)[:, ::-1]
            reference = Dataset()
            reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = CTImageStorage, image_uids[k]
            contour = Dataset()
            contour.ContourImageSequence = Sequence([reference])
            contour.ContourGeometricType = "CLOSED_PLANAR"
            contour.NumberOfContourPoints = len(ring)
            contour.ContourData = [f"{value:.3f}" for value in world_xyz.ravel()]
            yield contour


def _structure_set(patient: Patient, images: list[FileDataset], mask: Mask) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = RTStructureSetStorage
    meta.MediaStorageSOPInstanceUID = uid(patient, "rtstruct")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    _patient_and_study(ds, patient)
    ds.SOPClassUID, ds.SOPInstanceUID = RTStructureSetStorage, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.Manufacturer = "RTSTRUCT", _MANUFACTURER
    ds.SeriesInstanceUID, ds.SeriesNumber = uid(patient, "rtstruct-series"), 200
    ds.StructureSetLabel = "PHANTOM bodies"
    ds.StructureSetDate, ds.StructureSetTime = ds.StudyDate, "180000"
    image_uids = [str(image.SOPInstanceUID) for image in images]

    series = Dataset()
    series.SeriesInstanceUID = images[0].SeriesInstanceUID
    series.ContourImageSequence = Sequence()
    for image_uid in image_uids:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = CTImageStorage, image_uid
        series.ContourImageSequence.append(item)
    study = Dataset()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"
    study.ReferencedSOPInstanceUID = ds.StudyInstanceUID
    study.RTReferencedSeriesSequence = Sequence([series])
    frame = Dataset()
    frame.FrameOfReferenceUID = images[0].FrameOfReferenceUID
    frame.RTReferencedStudySequence = Sequence([study])
    ds.ReferencedFrameOfReferenceSequence = Sequence([frame])
    ds.FrameOfReferenceUID = images[0].FrameOfReferenceUID

    ds.StructureSetROISequence, ds.ROIContourSequence = Sequence(), Sequence()
    ds.RTROIObservationsSequence = Sequence()
    for number, level in enumerate(_levels_in(mask), start=1):
        roi, drawn, seen = Dataset(), Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, f"{level} body"
        roi.ReferencedFrameOfReferenceUID, roi.ROIGenerationAlgorithm = images[0].FrameOfReferenceUID, "MANUAL"
        drawn.ReferencedROINumber, drawn.ROIDisplayColor = number, [255, 160, 0]
        drawn.ContourSequence = Sequence(list(_contours(mask, LABELS[level], image_uids)))
        seen.ObservationNumber, seen.ReferencedROINumber = number, number
        seen.RTROIInterpretedType, seen.ROIInterpreter = "ORGAN", ""
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(drawn)
        ds.RTROIObservationsSequence.append(seen)
    return ds


def _save(ds: Any, path: Path) -> Path:
    ds.save_as(path, enforce_file_format=True)
    return path


def write_dicom(
    patient: Patient,
    folder: Path,
    *,
    volume: Volume,
    masks: tuple[Mask, ...] = (),
    rtstruct: bool = False,
    others: Path | None = None,
) -> WrittenStudy:
    """Write one study into a folder: the CT, a SEG for each reader's mask that holds a label, an RTSTRUCT if asked.

    The RTSTRUCT holds the first reader's bodies along pixel edges. `segmentation` names the first reader's SEG; those
    of further readers lie in the folder `others`, where it is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if others is not None:
        others.mkdir(parents=True, exist_ok=True)
    images = [_image(patient, volume, k) for k in range(volume.geometry.shape_zyx[0])]
    key = (patient.seed, patient.index)
    paths = [_save(ds, folder / _file_name(*key, "image", k)) for k, ds in enumerate(images)]
    labelled = [(reader, mask) for reader, mask in enumerate(masks) if mask.voxels.any()]
    segmentations = [
        _save(
            _segmentation(patient, images, mask, reader),
            (others if others is not None and reader else folder) / _file_name(*key, "seg", reader),
        )
        for reader, mask in labelled
    ]
    structure_set = None
    if rtstruct and labelled:
        structure_set = _save(_structure_set(patient, images, labelled[0][1]), folder / _file_name(*key, "rtstruct"))
    return WrittenStudy(
        study_uid=uid(patient, "study"),
        series_uid=uid(patient, "series"),
        images=tuple(paths),
        segmentation=segmentations[0] if segmentations else None,
        structure_set=structure_set,
        other_segmentations=tuple(segmentations[1:]),
    )
