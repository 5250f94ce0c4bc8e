"""What lies in the store beside pixels and features: plans, cases, outcomes. Pure data, JSON on disk.

Records are written once. A revision names what it supersedes. Nothing here names a patient except the models whose
docstring says "restricted".
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.fracture.protocol import Protocols, RoiKind


class Record(BaseModel):
    """Frozen, without unknown fields, with the version of its schema."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1

    def to_bytes(self) -> bytes:
        """Canonical enough to be read by people: JSON with two blanks of indent."""
        return (self.model_dump_json(indent=2) + "\n").encode()


class Warned(BaseModel):
    """Something that a reader should know, without stopping the case."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    sentence: str


class GridRecord(BaseModel):
    """The geometry of a stored volume, for reports and guards (see volume.Geometry)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape_zyx: tuple[int, int, int]
    spacing_zyx: tuple[float, float, float]
    origin_zyx: tuple[float, float, float]
    direction_zyx: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]


class Acquisition(BaseModel):
    """What the scanner did, in DICOM's keywords; None where it does not say. No identifiers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kvp: float | None = None
    convolution_kernel: str | None = None
    slice_thickness_mm: float | None = None
    slice_spacing_mm: float | None = None
    contrast_agent: bool | None = None
    manufacturer: str | None = None
    modality: str = "CT"


OLDEST_TOLD: Final = 90
"""Ages of 90 and over are told as 90: older ones could identify a patient."""


class Demographics(BaseModel):
    """Age in whole years (90 and over as 90) and sex, for the nomogram; None where unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    age_years: Annotated[int, Field(ge=0, le=OLDEST_TOLD)] | None = None
    sex: Literal["F", "M"] | None = None


class VolumeRecord(Record):
    """What a stored volume was. It stays when retention drops the volume: what is made again has to be the same."""

    image_hash: str
    voxels_sha256: str
    grid: GridRecord


class MaskRecord(Record):
    """What a stored label map holds. `levels`: level → value in the map."""

    series_id: str
    mask_hash: str
    source: Literal["dicom-seg", "rtstruct", "nifti", "automatic"]
    roi_kind: RoiKind
    has_body_mask: bool = False
    """A second map (keys.body_mask; 1 = body) by which whole vertebrae are to be cut."""
    segmenter: str = ""
    """Who made an automatic mask (spine.record.SegmenterNote.source)."""
    levels: dict[str, int]
    refused: dict[str, str] = {}
    """Levels that cannot be scored, with the reason ("two masks for L1"); they stand in the plan as rejected cases."""
    not_chosen: tuple[str, ...] = ()
    """Levels left out by the author's own choice (`levels` of the CSV)."""
    ignored_labels: int = 0
    """Labels that are known and no vertebra."""
    unknown_labels: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    """Other masks of the same study that this one won over, in words without identifiers."""
    warnings: tuple[Warned, ...] = ()


class SeriesManifest(Record):
    """One state of a series that was stored: its volume, and the masks known now."""

    study_id: str
    series_id: str
    manifest_id: str
    image_hash: str
    instances: int
    patient_id: str
    grid: GridRecord
    acquisition: Acquisition
    demographics: Demographics
    mask_hash: str | None = None
    """The given masks (keys.mask); None where no mask came along."""
    mask_faults: tuple[str, ...] = ()
    """Why masks that came along cannot be used."""
    warnings: tuple[Warned, ...] = ()


class PlannedSeries(BaseModel):
    """One line of a study's plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    series_id: str
    manifest_id: str
    modality: str
    instances: int
    rejected: bool = False
    """Refused by ingest itself; the reasons lie under keys.series_rejected."""
    description: str = ""
    """In words without identifiers: what the series is ("CT, 120 slices of 1.0 mm")."""


class StudyPlan(Record):
    """Revision n of a study: its series. Written by ingest before it tells of them."""

    study_id: str
    revision: int
    supersedes: int | None = None
    demographics: Demographics
    series: tuple[PlannedSeries, ...]


class PlannedCase(BaseModel):
    """One line of a series' plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    case_id: str
    level: str


class SeriesPlan(Record):
    """Revision n of a series: its cases. Written by the resampler before it tells of them."""

    study_id: str
    series_id: str
    manifest_id: str
    mask_hash: str
    revision: int
    supersedes: int | None = None
    cases: tuple[PlannedCase, ...]
    spine_hash: str | None = None
    """Levels, heights and the gate's decisions that these cases were planned with (keys.spine)."""


class GuardRecord(BaseModel):
    """One guard that applies to a case (METHOD 10), the leading one first in the list."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    sentence: str
    value: float | None = None
    limit: float | None = None


GIVEN_BASIS: Final = "fracture given by the mask, not assessed"
GATED_BASIS: Final = "fracture by height loss, seen by no reader"


def basis_alone(basis: str) -> str:
    """On what a fracture rests, without what was measured."""
    return basis.split(";", 1)[0].split(":", 1)[0]


"""What it rests on that a vertebra is fractured at all: every probability holds only under it."""


class CaseRecord(Record):
    """What is known of a case before it is scored. Written by the resampler before CaseReady."""

    case_id: str
    study_id: str
    series_id: str
    manifest_id: str
    image_hash: str
    mask_hash: str
    mask_source: str
    patient_id: str
    level: str
    crop_hash: str
    roi_kind: RoiKind
    """What the crop's mask holds, after a body cut."""
    volume_ml: float | None = None
    source_spacing_zyx: tuple[float, float, float]
    acquisition: Acquisition
    demographics: Demographics
    guards: tuple[GuardRecord, ...] = ()
    warnings: tuple[Warned, ...] = ()
    fracture_basis: str = GIVEN_BASIS


class Rejection(Record):
    """Why an input was refused: a series or a case. The first reason leads."""

    service: str
    reasons: tuple[str, ...]
    recorded_at: datetime | None = None


class NotEvaluated(Record):
    """Why a case was not scored by rule."""

    case_id: str
    kind: Literal["guard", "not-fractured", "review"]
    service: str
    reasons: tuple[str, ...]
    codes: tuple[str, ...] = ()


class DeadLetterNote(Record):
    """The end of a series or a case at the dead letters; the letter itself lies under keys.dead_letter."""

    dead_letter_id: str
    queue: str
    kind: str
    reason: str
    attempts: int


class DeadLetter(Record):
    """One dead letter as the recorder found it."""

    dead_letter_id: str
    queue: str
    kind: str
    reason: str
    service: str = ""
    traceback: str = ""
    message_type: str = ""
    message_id: str = ""
    parents: tuple[str, ...] = ()
    attempts: int = 0
    delivery_count: int = 0
    recorded_at: datetime
    envelope: str
    """The message's own JSON, as it is to be published again."""


class Classified(Record):
    """The result of a case (terminal). `classification` is scoring.Classification as JSON."""

    case_id: str
    study_id: str
    series_id: str
    level: str
    protocols: Protocols
    classification: dict[str, Any]
    warnings: tuple[Warned, ...] = ()


class SweepSeries(BaseModel):
    """A reference from a sweep to a series of a study's plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study_id: str
    series_id: str
    manifest_id: str


class FileCounts(BaseModel):
    """The ledger of files in numbers: found = in_series + sum(ignored.values())."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    found: int = 0
    in_series: int = 0
    ignored: dict[str, int] = {}


class SweepPlan(Record):
    """Revision n of a sweep: references to series, so that two sweeps share results."""

    sweep_id: str
    revision: int
    supersedes: int | None = None
    protocols: Protocols
    series: tuple[SweepSeries, ...]
    files: FileCounts
    planned_at: datetime


class SweepClosing(Record):
    """That a sweep's runner saw nothing pending, or why it stopped."""

    sweep_id: str
    revision: int
    supersedes: int | None = None
    closed_at: datetime
    pending: int


class StudyIdentity(Record):
    """Restricted: who a study belongs to, as its instances said."""

    study_id: str
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


class SliceIdentity(BaseModel):
    """Restricted: one slice of a stored volume."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sop_instance_uid: str
    sop_class_uid: str = ""
    index: int


class SeriesIdentity(Record):
    """Restricted: the UIDs behind a stored volume, slice by slice from the first along the normal."""

    series_id: str
    image_hash: str
    series_instance_uid: str = ""
    frame_of_reference_uid: str = ""
    slices: tuple[SliceIdentity, ...]


class FileLine(BaseModel):
    """Restricted: one file of a sweep: the series that it is part of, or why it was ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    series_id: str | None = None
    role: Literal["image", "mask", "ignored"]
    reason: str = ""


class FilesLedger(Record):
    """Restricted: the ledger of files of a sweep."""

    sweep_id: str
    files: tuple[FileLine, ...]
