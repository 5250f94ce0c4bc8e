"""Reads a folder of DICOM, whatever its nesting and names: headers first, then one series at a time.

Every file ends as an image of a series, as a mask object, or as ignored with a reason; nothing is left out in
silence. Reasons name neither paths nor values.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from services.dicom_ingest.assembly import Arrangement, arrange, assemble
from services.dicom_ingest.collected import CollectedSeries, CollectedSlice, PatientIdentity
from services.dicom_ingest.headers import (
    InstanceHeader,
    MaskObject,
    NotAnInstance,
    read_header,
)
from services.dicom_ingest.identity import acquisition_of, are_two_patients, demographics_of, identity_of
from services.dicom_ingest.pixels import CannotDecode, can_decode, decode_hu
from services.dicom_ingest.series_selection import Candidate, candidate_of, left_out, refusals
from services.dicom_ingest.settings import IngestSettings
from shared.fracture.records import Warned
from shared.pipeline.errors import FractureSweepError

Progress = Callable[[int, int], None]

COPY = "a copy of an image that is here already"
OTHER_IMAGE = "another image under a SOP Instance UID already seen"
WORSE_COPY = "a copy that cannot be read, of an image that is here and can"
_TWO_PATIENTS_SERIES = "two patients in one series: PatientID, name or birth date differ among its images"
_TWO_PATIENTS_STUDY = "two patients in one study: PatientID, name or birth date differ among its series"


@dataclass(frozen=True, kw_only=True, slots=True)
class IgnoredFile:
    """A file that belongs to no series, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class SeriesGroup:
    """The images of one series, copies taken out. `faults` refuse it as a whole."""

    key: str
    """Distinct within a scan: the Series Instance UID, or a name of its own where there is none."""
    series_instance_uid: str
    instances: tuple[InstanceHeader, ...]
    faults: tuple[str, ...] = ()

    @property
    def identity(self) -> PatientIdentity:
        """Who was scanned, as these images say."""
        return identity_of(self.instances)


@dataclass(frozen=True, kw_only=True)
class StudyGroup:
    """One study of a folder."""

    key: str
    study_instance_uid: str
    series: tuple[SeriesGroup, ...]
    mask_objects: tuple[MaskObject, ...] = ()

    @property
    def identity(self) -> PatientIdentity:
        """Who was scanned, as the study's images say."""
        return identity_of([instance for group in self.series for instance in group.instances])


@dataclass(frozen=True, kw_only=True)
class FolderScan:
    """What lies in a folder. found = images + mask objects + ignored."""

    root: Path
    studies: tuple[StudyGroup, ...]
    ignored: tuple[IgnoredFile, ...]
    mask_objects: tuple[MaskObject, ...] = ()
    """All of them, those without a study of images here among them."""

    @property
    def found(self) -> int:
        """How many files were looked at."""
        images = sum(len(group.instances) for study in self.studies for group in study.series)
        return images + len(self.mask_objects) + len(self.ignored)


@dataclass(frozen=True, kw_only=True)
class JudgedSeries:
    """A series with its reasons (() where it is to be read) and its order of frames, before any pixel is decoded."""

    group: SeriesGroup
    reasons: tuple[str, ...]
    arrangement: Arrangement


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Every entry below a folder in a fixed order, with a reason where it is not a file to open."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        yield root, f"the folder cannot be opened ({type(error).__name__})"
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.is_symlink():
            yield path, "a symbolic link, not followed"
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(path)
        elif entry.is_file(follow_symlinks=False):
            yield path, ""
        else:
            yield path, "not a regular file"


class _Kept:
    """Maps equal values to one object."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(self, value: Any) -> Any:
        return self._known.setdefault(value, value)


def scan_folder(path: Path, settings: IngestSettings | None = None, *, progress: Progress | None = None) -> FolderScan:
    """Read the headers of all files below a folder (or of one file) and group them.

    `progress` is called with (files read, files found). FractureSweepError where the path is not there.
    """
    limits = settings or IngestSettings()
    root = Path(path)
    try:
        mode = root.stat().st_mode
    except OSError:
        raise FractureSweepError(f"{root} is not there or cannot be read; name a folder of DICOM files") from None
    entries = list(_walk(root)) if stat.S_ISDIR(mode) else [(root, "")]
    images: list[InstanceHeader] = []
    masks: list[MaskObject] = []
    ignored: list[IgnoredFile] = []
    keep = _Kept()
    for number, (file, reason) in enumerate(entries, start=1):
        if reason:
            ignored.append(IgnoredFile(path=file, reason=reason))
        else:
            try:
                header = read_header(file, limits, keep=keep)
            except NotAnInstance as error:
                ignored.append(IgnoredFile(path=file, reason=error.reason))
            else:
                if isinstance(header, InstanceHeader):
                    images.append(header)
                else:
                    masks.append(header)
        if progress is not None:
            progress(number, len(entries))
    used, copies = _without_copies(images)
    distinct_masks, mask_copies = _without_mask_copies(masks)
    return FolderScan(
        root=root,
        studies=_grouped(used, distinct_masks),
        ignored=(*ignored, *copies, *mask_copies),
        mask_objects=tuple(distinct_masks),
    )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as fp:
        return hashlib.file_digest(fp, "sha256").hexdigest()


def _without_copies(images: Sequence[InstanceHeader]) -> tuple[list[InstanceHeader], list[IgnoredFile]]:
    """One image for each SOP Instance UID: the first that can be read. Equal in HU and place is a copy, else another.

    Images without any UID are told apart by their file's bytes.
    """
    by_uid: dict[str, list[InstanceHeader]] = {}
    for image in images:
        name = image.sop_instance_uid or f"bytes {_file_sha256(image.path)}"
        by_uid.setdefault(name, []).append(image)
    used: list[InstanceHeader] = []
    ignored: list[IgnoredFile] = []
    for several in by_uid.values():
        if len(several) == 1:
            used.append(several[0])
            continue
        first = next((image for image in several if not image.faults and _content(image)), several[0])
        used.append(first)
        ignored.extend(
            IgnoredFile(path=image.path, reason=_of_copy(image, first)) for image in several if image is not first
        )
    return used, ignored


def _of_copy(image: InstanceHeader, first: InstanceHeader) -> str:
    if image.file_bytes == first.file_bytes and _file_sha256(image.path) == _file_sha256(first.path):
        return COPY
    content = "" if image.faults else _content(image)
    if not content:
        lacks_decoder = not image.faults and not can_decode(image.transfer_syntax_uid)
        return OTHER_IMAGE if lacks_decoder or not _content(first) else WORSE_COPY
    return COPY if content == _content(first) else OTHER_IMAGE


def _content(image: InstanceHeader) -> str:
    """The SHA-256 of an image's HU and place; '' where it cannot be decoded."""
    if image.faults:
        return ""
    try:
        voxels = decode_hu(image)
    except CannotDecode:
        return ""
    places = repr([(f.position_xyz, f.orientation_xyz, f.pixel_spacing) for f in image.frames])
    return hashlib.sha256(voxels.tobytes() + places.encode()).hexdigest()


def _without_mask_copies(masks: Sequence[MaskObject]) -> tuple[list[MaskObject], list[IgnoredFile]]:
    first: dict[str, MaskObject] = {}
    ignored: list[IgnoredFile] = []
    used: list[MaskObject] = []
    for mask in masks:
        before = first.setdefault(mask.sop_instance_uid, mask) if mask.sop_instance_uid else mask
        if before is mask:
            used.append(mask)
        elif _file_sha256(before.path) == _file_sha256(mask.path):
            ignored.append(IgnoredFile(path=mask.path, reason="a copy of a mask that is here already"))
        else:
            ignored.append(
                IgnoredFile(path=mask.path, reason="another mask object under a SOP Instance UID already seen")
            )
    return used, ignored


def _study_key(identity: PatientIdentity, study_id: str) -> str:
    if identity.study_instance_uid:
        return identity.study_instance_uid
    parts = (
        identity.patient_id,
        identity.issuer_of_patient_id,
        identity.patient_name,
        identity.accession_number,
        identity.study_date,
        identity.study_time,
        study_id,
    )
    return "without UID: " + "/".join(parts)


def _series_key(image: InstanceHeader) -> str:
    """The Series Instance UID, else what a series has in common: its scan's time, number and frame of reference."""
    shared = image.shared
    if shared.series_instance_uid:
        return shared.series_instance_uid
    parts = (
        shared.modality,
        shared.series_number,
        shared.series_date,
        shared.series_time,
        shared.frame_of_reference_uid,
        str(image.frames[0].orientation_xyz),
        image.frames[0].convolution_kernel,
    )
    return f"without UID: {_study_key(shared.identity, shared.study_id)}/" + "/".join(parts)


def _grouped(images: Sequence[InstanceHeader], masks: Sequence[MaskObject]) -> tuple[StudyGroup, ...]:
    studies: dict[str, dict[str, list[InstanceHeader]]] = {}
    studies_of_series: dict[str, set[str]] = {}
    for image in images:
        study, series = _study_key(image.shared.identity, image.shared.study_id), _series_key(image)
        studies.setdefault(study, {}).setdefault(series, []).append(image)
        studies_of_series.setdefault(series, set()).add(study)
    torn = {series for series, of in studies_of_series.items() if len(of) > 1}
    groups = []
    for study, by_series in studies.items():
        two = are_two_patients(i.shared.identity for several in by_series.values() for i in several)
        series_groups = tuple(
            _series_group(key, several, study_of_two=two, torn=key in torn) for key, several in by_series.items()
        )
        uid = series_groups[0].instances[0].shared.identity.study_instance_uid
        groups.append(
            StudyGroup(
                key=study,
                study_instance_uid=uid,
                series=series_groups,
                mask_objects=tuple(mask for mask in masks if uid and mask.study_instance_uid == uid),
            )
        )
    return tuple(groups)


def _series_group(key: str, images: Sequence[InstanceHeader], *, study_of_two: bool, torn: bool) -> SeriesGroup:
    ordered = tuple(sorted(images, key=lambda image: (image.sop_instance_uid, str(image.path))))
    faults: list[str] = []
    if are_two_patients(image.shared.identity for image in ordered):
        faults.append(_TWO_PATIENTS_SERIES)
    elif study_of_two:
        faults.append(_TWO_PATIENTS_STUDY)
    if torn:
        faults.append("one Series Instance UID in two studies")
    return SeriesGroup(
        key=key,
        series_instance_uid=ordered[0].shared.series_instance_uid,
        instances=ordered,
        faults=tuple(faults),
    )


def judge_series(
    group: SeriesGroup,
    settings: IngestSettings,
    *,
    prefer_sop_instance_uids: frozenset[str] = frozenset(),
) -> JudgedSeries:
    """Judge one series by its headers: what it is, its files' faults, size and geometry.

    All reasons are listed, but those of geometry for a series that is none of the kind that is looked for.
    """
    instances = group.instances
    of_its_kind = refusals(instances, settings)
    reasons = [*group.faults, *of_its_kind, *_instance_faults(instances)]
    size = sum(2 * (i.shared.rows or 0) * (i.shared.columns or 0) * len(i.frames) for i in instances)
    if size > settings.max_series_bytes:
        reasons.append(f"the series would take {size} bytes of memory, the limit is {settings.max_series_bytes}")
    arrangement = arrange(instances, settings, prefer_sop_instance_uids=prefer_sop_instance_uids)
    if not of_its_kind:
        reasons.extend(arrangement.reasons)
    return JudgedSeries(group=group, reasons=tuple(dict.fromkeys(reasons)), arrangement=arrangement)


def _instance_faults(instances: Sequence[InstanceHeader]) -> list[str]:
    counts: dict[str, int] = {}
    for instance in instances:
        faults = list(instance.faults)
        if not faults and not can_decode(instance.transfer_syntax_uid):
            faults = [CannotDecode.by_syntax(instance.transfer_syntax_uid).reason]
        for fault in faults:
            counts[fault] = counts.get(fault, 0) + 1
    total = len(instances)
    return [fault if total == 1 else f"{fault} ({count} of {total} images)" for fault, count in counts.items()]


def judge_study(
    study: StudyGroup,
    settings: IngestSettings,
    *,
    referenced_series_uids: frozenset[str] = frozenset(),
    prefer_sop_instance_uids: frozenset[str] = frozenset(),
) -> tuple[JudgedSeries, ...]:
    """Judge all series of a study, and leave out those of which a better reconstruction is there."""
    judged = [
        judge_series(group, settings, prefer_sop_instance_uids=prefer_sop_instance_uids) for group in study.series
    ]
    candidates: list[Candidate] = []
    for one in judged:
        candidate = candidate_of(one.group.key, one.group.instances, one.arrangement) if not one.reasons else None
        if candidate is not None:
            candidates.append(candidate)
    out: Mapping[str, str] = left_out(candidates, settings, referenced_series_uids=referenced_series_uids)
    return tuple(
        replace(one, reasons=(*one.reasons, out[one.group.key])) if one.group.key in out else one for one in judged
    )


def collect_judged(judged: JudgedSeries) -> CollectedSeries:
    """Read and decode one judged series. Never raises on bad input: what goes wrong is a reason."""
    if judged.reasons:
        return _described(judged, reasons=judged.reasons)
    try:
        assembled = assemble(judged.arrangement, partial(_decoded, total=len(judged.group.instances)))
    except CannotDecode as error:
        return _described(judged, reasons=(error.reason,))
    except MemoryError:
        return _described(judged, reasons=("the series needs more memory than there is",))
    except Exception as error:  # one broken series costs itself alone; the text of the error can hold values
        return _described(judged, reasons=(f"the series cannot be read ({type(error).__name__})",))
    spacing = assembled.volume.geometry.spacing_zyx[0]
    return replace(
        _described(judged, reasons=()),
        volume=assembled.volume,
        slices=assembled.slices,
        warnings=(*assembled.warnings, *_lossy(judged.group.instances)),
        acquisition=acquisition_of(judged.group.instances, slice_spacing_mm=spacing),
    )


def _decoded(instance: InstanceHeader, frames: Sequence[int], *, total: int) -> Any:
    try:
        return decode_hu(instance, frames)
    except CannotDecode as error:
        where = "" if total == 1 else f" (in at least one of {total} images)"
        raise CannotDecode(error.reason + where) from None


def _lossy(instances: Sequence[InstanceHeader]) -> tuple[Warned, ...]:
    if any(instance.lossy for instance in instances):
        return (
            Warned(code="lossy", sentence="the images were compressed with loss; texture features are changed by it"),
        )
    return ()


def _described(judged: JudgedSeries, *, reasons: tuple[str, ...]) -> CollectedSeries:
    group, arrangement = judged.group, judged.arrangement
    slices = arrangement.slices or tuple(
        CollectedSlice(sop_instance_uid=i.sop_instance_uid, sop_class_uid=i.sop_class_uid, position_mm=0.0)
        for i in group.instances
    )
    spacing = None if arrangement.geometry is None else arrangement.geometry.spacing_zyx[0]
    modality = next((i.shared.modality for i in group.instances if i.shared.modality), "")
    return CollectedSeries(
        series_instance_uid=group.series_instance_uid,
        modality=modality if modality.isalpha() and modality.isupper() and len(modality) <= 10 else "",
        instances=len(group.instances),
        reasons=reasons,
        slices=slices,
        content_sha256=_content_of_group(group),
        frame_of_reference_uid=_common_frame_of_reference(group.instances),
        acquisition=acquisition_of(group.instances, slice_spacing_mm=spacing),
        demographics=demographics_of(group.instances),
        description=_description(group, arrangement),
    )


def _common_frame_of_reference(instances: Sequence[InstanceHeader]) -> str:
    named = {instance.shared.frame_of_reference_uid for instance in instances} - {""}
    return named.pop() if len(named) == 1 else ""


def _content_of_group(group: SeriesGroup) -> str:
    """Names a set of images that has no UIDs: by SOP Instance UIDs where there are some, else by the files' bytes."""
    names = sorted(i.sop_instance_uid or _file_sha256(i.path) for i in group.instances)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _description(group: SeriesGroup, arrangement: Arrangement) -> str:
    modality = group.instances[0].shared.modality
    what = modality if modality.isalpha() and modality.isupper() and len(modality) <= 10 else "unknown modality"
    if arrangement.geometry is None:
        number = len(group.instances)
        return f"{what}, {number} image{'' if number == 1 else 's'}"
    return f"{what}, {len(arrangement.frames)} slices of {arrangement.geometry.spacing_zyx[0]:.1f} mm"


def collect_series(
    group: SeriesGroup,
    settings: IngestSettings | None = None,
    *,
    left_out_reason: str = "",
    prefer_sop_instance_uids: frozenset[str] = frozenset(),
) -> CollectedSeries:
    """Read and decode one series: a volume, or the reasons why there is none. Never raises on bad input."""
    limits = settings or IngestSettings()
    try:
        judged = judge_series(group, limits, prefer_sop_instance_uids=prefer_sop_instance_uids)
    except Exception as error:  # one broken series costs itself alone
        reason = f"the headers of the series cannot be judged ({type(error).__name__})"
        judged = JudgedSeries(group=group, reasons=(reason,), arrangement=Arrangement(reasons=(reason,)))
    if left_out_reason:
        judged = replace(judged, reasons=(*judged.reasons, left_out_reason))
    return collect_judged(judged)


def read_one_series(path: Path, settings: IngestSettings | None = None) -> CollectedSeries:
    """The one DICOM series of a folder, as a CSV of pairs names it. Several CT series, or none, is a reason."""
    return read_identified_series(path, settings)[0]


def read_identified_series(
    path: Path, settings: IngestSettings | None = None
) -> tuple[CollectedSeries, PatientIdentity]:
    """The one DICOM series of a folder, and whose it is."""
    scan = scan_folder(path, settings)
    groups = [group for study in scan.studies for group in study.series]
    if not groups:
        reasons = sorted({ignored.reason for ignored in scan.ignored})
        return _no_series(("the folder holds no DICOM image", *reasons[:3])), PatientIdentity()
    limits = settings or IngestSettings()
    eligible = groups if len(groups) == 1 else [one for one in groups if not judge_series(one, limits).reasons]
    if len(eligible) == 1:
        return collect_series(eligible[0], settings), eligible[0].identity
    return _no_series((f"the folder holds {len(groups)} DICOM series, one is needed",)), PatientIdentity()


def _no_series(reasons: tuple[str, ...]) -> CollectedSeries:
    return CollectedSeries(series_instance_uid="", modality="", instances=0, reasons=reasons)
