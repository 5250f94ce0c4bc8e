"""What the readers of this service (folder, CSV of pairs; later C-STORE and DICOMweb) hand to the one intake.

These objects live in memory alone and hold identifiers; `intake.py` turns them into pseudonymous records and
restricted identities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shared.fracture.protocol import RoiKind
from shared.fracture.records import Acquisition, Demographics, Warned
from shared.fracture.volume import Mask, Volume


@dataclass(frozen=True, kw_only=True)
class PatientIdentity:
    """Who a study belongs to, as its instances said ('' where they do not say)."""

    patient_name: str = ""
    patient_id: str = ""
    issuer_of_patient_id: str = ""
    patient_birth_date: str = ""
    patient_sex: str = ""
    accession_number: str = ""
    study_instance_uid: str = ""
    study_date: str = ""
    study_time: str = ""
    study_description: str = ""
    referring_physician_name: str = ""


@dataclass(frozen=True, kw_only=True)
class CollectedSlice:
    """One instance of an assembled volume. `sop_instance_uid` may come from the file meta, or be ''."""

    sop_instance_uid: str
    sop_class_uid: str
    position_mm: float
    """Along the slice normal."""


@dataclass(frozen=True, kw_only=True)
class CollectedMask:
    """The masks of one series, brought onto its grid."""

    source: Literal["dicom-seg", "rtstruct", "nifti"]
    roi_kind: RoiKind
    labels: Mask
    """uint8 label map on the volume's grid."""
    levels: Mapping[str, int]
    body: Mask | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    not_chosen: tuple[str, ...] = ()
    ignored_labels: int = 0
    unknown_labels: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    warnings: tuple[Warned, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CollectedSeries:
    """One series: either a volume, or the reasons why there is none."""

    series_instance_uid: str
    """Or, for a CSV of pairs, '' : then the content names the series."""
    modality: str
    instances: int
    reasons: tuple[str, ...] = ()
    """Not empty: refused, the first reason leads. No identifiers in it."""
    volume: Volume | None = None
    slices: tuple[CollectedSlice, ...] = ()
    content_sha256: str = ""
    """Of voxels and geometry, where there are no SOP Instance UIDs (NIfTI)."""
    frame_of_reference_uid: str = ""
    acquisition: Acquisition = field(default_factory=Acquisition)
    demographics: Demographics = field(default_factory=Demographics)
    warnings: tuple[Warned, ...] = ()
    description: str = ""
    """What it is in words without identifiers ("CT, 120 slices of 1.0 mm")."""
    mask: CollectedMask | None = None
    mask_faults: tuple[str, ...] = ()
    """Why masks that came along cannot be used (another frame of reference, empty, a label without a level, …)."""
    files: tuple[str, ...] = ()
    """The paths of its images, for the ledger of files."""
