"""Automatic masks as DICOM SEG: bodies with SNOMED codes, on the images that they were made from.

Restricted: the object carries patient and UIDs, since a SEG without them would be another patient's. Its own UIDs
follow from what it shows, so a report written twice makes no second object, and ingest knows it again as ours.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Final

import highdicom as hd
import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from shared.fracture.level_codes import body_code
from shared.fracture.levels import sort_key
from shared.fracture.records import GridRecord, SeriesIdentity, StudyIdentity
from shared.fracture.spine.record import SegmenterNote
from shared.fracture.uids import OUR_MANUFACTURER, deterministic_uid
from shared.fracture.volume import Geometry, Mask

SERIES_NUMBER: Final = 7301
_UNKNOWN_DATE: Final = "19000101"


class NoSegmentation(ValueError):
    """No DICOM SEG can be made of this series; the text says why."""


def segmentation(
    labels: Mask,
    levels: Mapping[str, int],
    *,
    study: StudyIdentity,
    series: SeriesIdentity,
    grid: GridRecord,
    made_by: SegmenterNote,
) -> bytes:
    """The bytes of a DICOM SEG. NoSegmentation: images without UIDs, another grid, no body.

    `labels` on the stored volume's grid, whose axis 0 goes through the slices of `series` in their order.
    """
    geometry = Geometry(**grid.model_dump())
    uids = [one.sop_instance_uid for one in sorted(series.slices, key=lambda one: one.index)]
    if not series.series_instance_uid or not study.study_instance_uid or not uids or not all(uids):
        raise NoSegmentation("the images have no UIDs")
    if len(uids) != geometry.shape_zyx[0] or not geometry.same_grid(labels.geometry):
        raise NoSegmentation("the label map is not on the grid of the images")
    shown = [level for level in sorted(levels, key=sort_key) if bool((labels.voxels == levels[level]).any())]
    if not shown:
        raise NoSegmentation("there is no body in the label map")
    images = [_image(study, series, geometry, uid, k) for k, uid in enumerate(uids)]
    name = (series.series_id, made_by.model_dump(mode="json"), {level: levels[level] for level in shown})
    stack = np.stack([labels.voxels == levels[level] for level in shown], axis=-1)
    seg = hd.seg.Segmentation(
        source_images=images,
        pixel_array=stack,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_described(n, level, made_by, name) for n, level in enumerate(shown, start=1)],
        series_instance_uid=deterministic_uid("seg-series", *name, series.image_hash),
        series_number=SERIES_NUMBER,
        sop_instance_uid=deterministic_uid("seg", *name, series.image_hash),
        instance_number=1,
        manufacturer=OUR_MANUFACTURER,
        manufacturer_model_name=made_by.name or made_by.kind,
        software_versions=made_by.version or "unknown",
        device_serial_number="0",
        content_label="VERTEBRAL_BODIES",
        content_description="Automatic vertebral bodies, research use only",
        series_description="Vertebral bodies (automatic, research use only)",
        omit_empty_frames=True,
    )
    _without_chance(seg, study, name)
    stream = io.BytesIO()
    seg.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _image(study: StudyIdentity, series: SeriesIdentity, geometry: Geometry, uid: str, k: int) -> Dataset:
    """What a SEG has to know of one of its images."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta = meta
    ds.PatientName, ds.PatientID = study.patient_name, study.patient_id
    ds.PatientBirthDate, ds.PatientSex = study.patient_birth_date, study.patient_sex
    ds.AccessionNumber, ds.ReferringPhysicianName = study.accession_number, study.referring_physician_name
    ds.StudyInstanceUID, ds.StudyID = study.study_instance_uid, ""
    ds.StudyDate, ds.StudyTime = study.study_date, study.study_time
    if study.issuer_of_patient_id:
        ds.IssuerOfPatientID = study.issuer_of_patient_id
    ds.SeriesInstanceUID, ds.Modality = series.series_instance_uid, "CT"
    ds.FrameOfReferenceUID = series.frame_of_reference_uid or deterministic_uid("frame-of-reference", series.series_id)
    ds.SOPClassUID, ds.SOPInstanceUID = series.slices[0].sop_class_uid or CTImageStorage, uid
    ds.Rows, ds.Columns = geometry.shape_zyx[1], geometry.shape_zyx[2]
    direction = np.asarray(geometry.direction_zyx)
    ds.ImageOrientationPatient = [float(v) for axis in (2, 1) for v in direction[::-1, axis]]
    corner = geometry.world_zyx(np.array([[float(k), 0.0, 0.0]]))[0]
    ds.ImagePositionPatient = [float(v) for v in corner[::-1]]
    ds.PixelSpacing = [geometry.spacing_zyx[1], geometry.spacing_zyx[2]]
    ds.SliceThickness = geometry.spacing_zyx[0]
    return ds


def _described(number: int, level: str, made_by: SegmenterNote, name: tuple[Any, ...]) -> hd.seg.SegmentDescription:
    value, meaning = body_code(level)
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=f"{level} body" if value != body_code("")[0] else f"{level} body, level uncertain",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=Code(value, "SCT", meaning),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=made_by.name or made_by.kind,
            family=codes.DCM.ArtificialIntelligence,
            version=made_by.version or "unknown",
        ),
        tracking_uid=hd.UID(deterministic_uid("seg-tracking", level, *name)),
        tracking_id=f"{level} body",
    )


def _without_chance(seg: Dataset, study: StudyIdentity, name: tuple[Any, ...]) -> None:
    """What highdicom draws at random or takes from the clock, set from the study."""
    dimension = deterministic_uid("seg-dimension", *name)
    for item in [*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence]:
        item.DimensionOrganizationUID = dimension
    for keyword in ("ContentDate", "SeriesDate", "InstanceCreationDate"):
        if keyword in seg:
            setattr(seg, keyword, study.study_date or _UNKNOWN_DATE)
    for keyword in ("ContentTime", "SeriesTime", "InstanceCreationTime"):
        if keyword in seg:
            setattr(seg, keyword, study.study_time or "000000")
    for contribution in seg.get("ContributingEquipmentSequence", []):
        if "ContributionDateTime" in contribution:
            contribution.ContributionDateTime = f"{seg.ContentDate}{seg.ContentTime}"
