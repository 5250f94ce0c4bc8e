"""A folder of DICOM as a source of studies: the scan first, then one series at a time with its masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from services.dicom_ingest.collected import CollectedSeries
from services.dicom_ingest.folder import (
    FolderScan,
    JudgedSeries,
    SeriesGroup,
    StudyGroup,
    collect_judged,
    collect_series,
    judge_study,
)
from services.dicom_ingest.mask_choice import SeriesReference, StudyMasks
from services.dicom_ingest.settings import IngestSettings
from services.dicom_ingest.sweep import CollectedFile, CollectedStudy
from shared.fracture.protocol import RoiKind

NO_STUDY = "a mask whose images are not here"


class FolderSource:
    """The studies of a scanned folder."""

    def __init__(self, scan: FolderScan, settings: IngestSettings, *, seg_roi: RoiKind | None = None) -> None:
        self._scan = scan
        self._settings = settings
        self._seg_roi = seg_roi

    @property
    def total(self) -> int:
        """How many studies the folder holds."""
        return len(self._scan.studies)

    def studies(self) -> Iterator[CollectedStudy]:
        """The studies, in the order in which they were found."""
        for study in self._scan.studies:
            identity = study.identity
            if not identity.study_instance_uid:
                identity = replace(identity, study_instance_uid=f"without UID: {study.key}")
            yield CollectedStudy(identity=identity, series=self._series(study))

    def _series(self, study: StudyGroup) -> Iterator[CollectedSeries]:
        groups = list(zip(study.series, self._judged(study), strict=True))
        # a series that is refused claims no mask: its sister may have it
        eligible = [group for group, judged in groups if judged is None or not judged.reasons]
        masks = StudyMasks(study.mask_objects, [_reference(group) for group in eligible], seg_roi=self._seg_roi)
        for group, judged in groups:
            collected = collect_series(group, self._settings) if judged is None else collect_judged(judged)
            collected = replace(collected, files=tuple(self._shown(i.path) for i in group.instances))
            if group not in eligible or not study.mask_objects:
                yield collected
                continue
            try:
                mask, faults = masks.of_series(collected)
            except Exception as error:  # a broken mask costs itself alone; the text of the error can hold values
                mask, faults = None, (f"the masks of this series cannot be read ({type(error).__name__})",)
            yield replace(collected, mask=mask, mask_faults=faults)

    def _judged(self, study: StudyGroup) -> tuple[JudgedSeries | None, ...]:
        try:
            return judge_study(
                study,
                self._settings,
                referenced_series_uids=frozenset(u for m in study.mask_objects for u in m.referenced_series_uids),
                prefer_sop_instance_uids=frozenset(
                    uid for mask in study.mask_objects for uid in mask.referenced_sop_instance_uids
                ),
            )
        except Exception:  # then each series is judged alone, and costs itself alone
            return tuple(None for _ in study.series)

    def files(self) -> tuple[CollectedFile, ...]:
        """Every file of the folder and what became of it."""
        with_images = {mask.path for study in self._scan.studies for mask in study.mask_objects}
        images = [
            CollectedFile(path=self._shown(instance.path), role="image")
            for study in self._scan.studies
            for group in study.series
            for instance in group.instances
        ]
        masks = [
            CollectedFile(path=self._shown(mask.path), role="mask")
            if mask.path in with_images
            else CollectedFile(path=self._shown(mask.path), role="ignored", reason=NO_STUDY)
            for mask in self._scan.mask_objects
        ]
        ignored = [
            CollectedFile(path=self._shown(file.path), role="ignored", reason=file.reason)
            for file in self._scan.ignored
        ]
        return (*images, *masks, *ignored)

    def _shown(self, path: Path) -> str:
        return path.relative_to(self._scan.root).as_posix() if path != self._scan.root else path.name


def _reference(group: SeriesGroup) -> SeriesReference:
    frames = {instance.shared.frame_of_reference_uid for instance in group.instances}
    return SeriesReference(
        series_instance_uid=group.series_instance_uid,
        frame_of_reference_uid=frames.pop() if len(frames) == 1 else "",
        sop_instance_uids=frozenset(i.sop_instance_uid for i in group.instances if i.sop_instance_uid),
    )
