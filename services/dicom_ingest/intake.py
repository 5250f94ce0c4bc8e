"""The one intake behind every reader: makes collected series durable, plans studies, and tells of them.

Order matters and is the same everywhere: objects, then the record that names them, then the plan, then the fact. Run
twice on the same input it writes nothing new and tells the same facts, but what retention dropped is written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from services.dicom_ingest.collected import CollectedMask, CollectedSeries, PatientIdentity
from services.dicom_ingest.union import covers, united
from shared.fracture import keys
from shared.fracture.ids import Pseudonyms, digest, manifest_id, mask_hash, sha256_hex
from shared.fracture.messages import Fact, SeriesRejected, SeriesStored, StudyRejected
from shared.fracture.protocol import Protocols
from shared.fracture.records import (
    Demographics,
    GridRecord,
    MaskRecord,
    PlannedSeries,
    Rejection,
    SeriesIdentity,
    SeriesManifest,
    SliceIdentity,
    StudyIdentity,
    StudyPlan,
    VolumeRecord,
)
from shared.fracture.volume import Geometry, Mask, Volume, to_nrrd, volume_from_nrrd
from shared.pipeline.errors import NotInStore
from shared.pipeline.store import Store
from shared.records.archive import find_record, newest, write_record, write_revision

SERVICE = "dicom-ingest"
VOLUME_DROPPED = "retention dropped the stored volume"
LIST_DROPPED = "retention dropped the list of the stored images"
OTHER_IMAGES = (
    "these are not the images that were stored under the same UIDs and dropped by retention: the result stands "
    "(use the same files and settings)"
)
NOT_JOINED = "late images that cannot join those that are stored (send the whole series again)"


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """What became of one study: its plan's entries that this intake touched, and the facts to tell."""

    study_id: str
    series: tuple[PlannedSeries, ...]
    facts: tuple[Fact, ...]
    new: bool
    """Whether anything was stored that was not there before."""
    unjoined: Mapping[str, str] = field(default_factory=dict)
    """series_id → why images that came now could not join the scored ones that are durable (those stand)."""


def content_sha256(volume: Volume) -> str:
    """The SHA-256 of a volume's voxels and geometry, for images without UIDs."""
    return hashlib.sha256(np.ascontiguousarray(volume.voxels).tobytes() + repr(volume.geometry).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StoredSeries:
    """What became of one series that was stored for itself: its line, and the fact to tell."""

    study_id: str
    line: PlannedSeries
    fact: SeriesStored | SeriesRejected
    fault: str = ""
    """Why the images that came now are not those that are durable (which stand)."""


class Intake:
    """Stores collected series under pseudonymous ids. `judged_by`: the settings whose change judges a series anew.

    `masks_by`: who makes the masks of series that come without ("" nobody). Such a series is another one when that
    changes, so that a refusal for want of a mask does not outlive the setting that caused it.
    """

    def __init__(
        self,
        *,
        store: Store,
        pseudonyms: Pseudonyms,
        protocols: Protocols,
        judged_by: Mapping[str, Any],
        masks_by: str = "",
    ) -> None:
        self._store = store
        self._pseudonyms = pseudonyms
        self._protocols = protocols
        self._judged_by = dict(judged_by)
        self._masks_by = masks_by

    def store_study(self, identity: PatientIdentity, collected: Iterable[CollectedSeries]) -> StoredStudy:
        """Store the series of one study one by one, then its plan; returns the facts, which are not told here."""
        planned: list[PlannedSeries] = []
        fresh = False
        study_id = self.study_id(identity) if identity.study_instance_uid else ""
        demographics = Demographics()
        unjoined: dict[str, str] = {}
        for series in collected:
            if not study_id:
                study_id = self._pseudonyms.content_id("study", series.content_sha256.encode())
            if series.demographics != Demographics():
                demographics = series.demographics
            line, new = self._store_series(study_id, identity, series, unjoined)
            planned.append(line)
            fresh = fresh or new
        self._write_identity(study_id, identity)
        _, revised = self._plan(study_id, planned, demographics)
        return StoredStudy(
            study_id=study_id,
            series=tuple(planned),
            facts=self._facts(study_id, planned),
            new=fresh or revised,
            unjoined=unjoined,
        )

    def store_series(self, identity: PatientIdentity, series: CollectedSeries) -> StoredSeries:
        """Store one series for training: no report follows, so no plan of its study is made or changed.

        What a sweep planned stays as it is; the ids are those that a sweep would give.
        """
        study_id = self.study_id(identity) if identity.study_instance_uid else ""
        study_id = study_id or self._pseudonyms.content_id("study", series.content_sha256.encode())
        unjoined: dict[str, str] = {}
        line, _ = self._store_series(study_id, identity, series, unjoined)
        fact = SeriesRejected if line.rejected else SeriesStored
        return StoredSeries(
            study_id=study_id,
            line=line,
            fact=fact(
                study_id=study_id, series_id=line.series_id, manifest_id=line.manifest_id, protocols=self._protocols
            ),
            fault=unjoined.get(line.series_id, ""),
        )

    def study_id(self, identity: PatientIdentity) -> str:
        """The pseudonymous id of the study of an identity."""
        return self._pseudonyms.study_id(identity.study_instance_uid)

    def _patient_id(self, identity: PatientIdentity, study_id: str) -> str:
        if identity.patient_id:
            return self._pseudonyms.patient_id(identity.patient_id, identity.issuer_of_patient_id)
        return self._pseudonyms.content_id("patient", study_id.encode())

    def _write_identity(self, study_id: str, identity: PatientIdentity) -> None:
        record = StudyIdentity(study_id=study_id, **asdict(identity))
        write_record(self._store, keys.study_identity(study_id, digest(record.model_dump(mode="json"))), record)

    def _series_id(self, study_id: str, series: CollectedSeries) -> str:
        if series.series_instance_uid:
            return self._pseudonyms.series_id(series.series_instance_uid)
        return self._pseudonyms.content_id("series", f"{study_id}/{series.content_sha256}".encode())

    def _image_hash(self, series: CollectedSeries) -> str:
        uids = [s.sop_instance_uid for s in series.slices]
        if uids and all(uids):
            return self._pseudonyms.image_hash(uids)
        if series.volume is not None:
            return self._pseudonyms.content_id("image", content_sha256(series.volume).encode())
        return self._pseudonyms.content_id("image", (series.content_sha256 or "no image").encode())

    def _store_series(
        self, study_id: str, identity: PatientIdentity, series: CollectedSeries, unjoined: dict[str, str]
    ) -> tuple[PlannedSeries, bool]:
        series_id = self._series_id(study_id, series)
        before = self._current_manifest(study_id, series_id)
        if before is not None:
            if series.volume is None:
                if not self._is_subset(before, series):
                    unjoined[series_id] = f"{NOT_JOINED}: {(series.reasons or ('no volume',))[0]}"
                return self._line(before, series), False
            try:
                series = self._united(before, series)
            except _NotToBeJoined as why:
                if not (self._is_subset(before, series) and self._brings_images_alone(before, series)):
                    unjoined[series_id] = f"{NOT_JOINED}: {why}"
                return self._line(before, series), False
        image_hash = self._image_hash(series)
        if before is not None and before.image_hash == image_hash and self._adds_nothing(before, series):
            fault = "" if series.volume is None else self._write_volume(series_id, image_hash, series.volume)
            if fault:
                unjoined[series_id] = fault
            else:
                self._write_instances(series_id, image_hash, series)
            return self._line(before, series), False
        if series.volume is None or series.reasons:
            return self._reject(study_id, series_id, image_hash, series)
        volume, mask = series.volume, series.mask
        fault = self._write_volume(series_id, image_hash, volume)
        if fault and before is None:
            return self._reject(study_id, series_id, image_hash, replace(series, reasons=(fault,)))
        if fault and before is not None:
            unjoined[series_id] = fault
            return self._line(before, series), False
        hashed = None if mask is None else self._mask_hash(mask, series.demographics)
        manifest = SeriesManifest(
            study_id=study_id,
            series_id=series_id,
            manifest_id=manifest_id(
                image_hash=image_hash,
                mask_hash=hashed,
                intake={
                    **self._judged_by,
                    "demographics": series.demographics.model_dump(mode="json"),
                    "mask_faults": list(series.mask_faults),
                    **({"masks_by": self._masks_by} if hashed is None and self._masks_by else {}),
                },
            ),
            image_hash=image_hash,
            instances=series.instances,
            patient_id=self._patient_id(identity, study_id),
            grid=GridRecord(**asdict(volume.geometry)),
            acquisition=series.acquisition,
            demographics=series.demographics,
            mask_hash=hashed,
            mask_faults=series.mask_faults,
            warnings=series.warnings,
        )
        self._write_instances(series_id, image_hash, series)
        if mask is not None and hashed is not None:
            self._write_mask(series_id, hashed, mask)
        key = keys.manifest(series_id, manifest.manifest_id)
        new = not self._store.exists(key) and write_record(self._store, key, manifest)
        return self._line(manifest, series), new

    def _write_volume(self, series_id: str, image_hash: str, volume: Volume) -> str:
        """Put the volume where it is not there; returns why not, where it is another one than was there before.

        UIDs name it, so that files changed under the same UIDs (or read under other settings) would take its place
        unseen, and features made now would stand beside features of other voxels.
        """
        key = keys.volume(series_id, image_hash)
        if self._store.exists(key):
            return ""
        record = VolumeRecord(
            image_hash=image_hash, voxels_sha256=_voxels_sha256(volume), grid=GridRecord(**asdict(volume.geometry))
        )
        before = find_record(self._store, keys.volume_record(series_id, image_hash), VolumeRecord)
        if before is not None:
            geometry = Geometry(**before.grid.model_dump())
            if before.voxels_sha256 != record.voxels_sha256 or not geometry.same_grid(volume.geometry):
                return OTHER_IMAGES
            volume = replace(volume, geometry=geometry)  # to the last bit: a stack joined late was rounded otherwise
        self._store.put(key, to_nrrd(volume))
        write_record(self._store, keys.volume_record(series_id, image_hash), record)
        return ""

    def _current_manifest(self, study_id: str, series_id: str) -> SeriesManifest | None:
        plan = newest(self._store, keys.study_plans(study_id), StudyPlan)
        line = None if plan is None else next((s for s in plan.series if s.series_id == series_id), None)
        if line is None or line.rejected:
            return None
        return find_record(self._store, keys.manifest(series_id, line.manifest_id), SeriesManifest)

    def _instances(self, manifest: SeriesManifest) -> SeriesIdentity | None:
        key = keys.series_instances(manifest.series_id, manifest.image_hash)
        return find_record(self._store, key, SeriesIdentity)

    def _united(self, before: SeriesManifest, series: CollectedSeries) -> CollectedSeries:
        """The series with the durable slices that this delivery lacks (a series is the union of its instances).

        _NotToBeJoined where these were dropped: what is durable then stays as it is, and nothing of it shrinks.
        """
        stored = self._instances(before)
        uids = {s.sop_instance_uid for s in series.slices}
        if stored is None and uids:
            same = self._image_hash(series) == before.image_hash
            if same or (series.volume and covers(series.volume.geometry, Geometry(**before.grid.model_dump()))):
                return series
            raise _NotToBeJoined(LIST_DROPPED)
        if stored is None or "" in uids or not stored.slices:
            return series
        if {s.sop_instance_uid for s in stored.slices} <= uids:
            return series
        try:
            volume = volume_from_nrrd(self._store.get(keys.volume(before.series_id, before.image_hash)))
        except NotInStore:
            raise _NotToBeJoined(VOLUME_DROPPED) from None
        return united(series, durable=stored, volume=volume)

    def _is_subset(self, before: SeriesManifest, series: CollectedSeries) -> bool:
        """Whether a refused delivery holds nothing beyond the durable instances (or does not say what it holds)."""
        stored = self._instances(before)
        return stored is not None and {s.sop_instance_uid for s in series.slices} <= {
            s.sop_instance_uid for s in stored.slices
        }

    def _brings_images_alone(self, before: SeriesManifest, series: CollectedSeries) -> bool:
        known = series.demographics in (Demographics(), before.demographics)
        return series.mask is None and not series.mask_faults and known

    def _adds_nothing(self, before: SeriesManifest, series: CollectedSeries) -> bool:
        """The same image without masks or age, where they were known before: that takes nothing back."""
        return before.mask_hash is not None and self._brings_images_alone(before, series)

    def _reject(
        self, study_id: str, series_id: str, image_hash: str, series: CollectedSeries
    ) -> tuple[PlannedSeries, bool]:
        reasons = series.reasons or ("no volume could be made of it",)
        state = manifest_id(image_hash=image_hash, mask_hash=None, intake={**self._judged_by, "reasons": list(reasons)})
        record = Rejection(service=SERVICE, reasons=reasons, recorded_at=datetime.now(UTC))
        new = write_record(self._store, keys.series_rejected(series_id, state), record)
        line = PlannedSeries(
            series_id=series_id,
            manifest_id=state,
            modality=series.modality,
            instances=series.instances,
            rejected=True,
            description=series.description,
        )
        return line, new

    def _write_instances(self, series_id: str, image_hash: str, series: CollectedSeries) -> None:
        key = keys.series_instances(series_id, image_hash)
        if self._store.exists(key):
            return
        write_record(
            self._store,
            key,
            SeriesIdentity(
                series_id=series_id,
                image_hash=image_hash,
                series_instance_uid=series.series_instance_uid,
                frame_of_reference_uid=series.frame_of_reference_uid,
                slices=tuple(
                    SliceIdentity(sop_instance_uid=s.sop_instance_uid, sop_class_uid=s.sop_class_uid, index=index)
                    for index, s in enumerate(series.slices)
                ),
            ),
        )

    def _mask_hash(self, mask: CollectedMask, demographics: Demographics) -> str:
        """Demographics are part of it: a corrected age must make a new case, or the nomogram would keep the old one."""
        return mask_hash(
            {
                "labels": _voxels_sha256(mask.labels),
                "body": None if mask.body is None else _voxels_sha256(mask.body),
                "levels": dict(mask.levels),
                "refused": dict(mask.refused),
                "roi": mask.roi_kind,
                "demographics": demographics.model_dump(mode="json"),
            }
        )

    def _write_mask(self, series_id: str, hashed: str, mask: CollectedMask) -> None:
        maps = {keys.mask(series_id, hashed): mask.labels, keys.body_mask(series_id, hashed): mask.body}
        for key, labels in maps.items():
            if labels is not None and not self._store.exists(key):
                self._store.put(key, to_nrrd(_unsigned(labels)))
        if self._store.exists(keys.mask_record(series_id, hashed)):
            return
        write_record(
            self._store,
            keys.mask_record(series_id, hashed),
            MaskRecord(
                series_id=series_id,
                mask_hash=hashed,
                source=mask.source,
                roi_kind=mask.roi_kind,
                has_body_mask=mask.body is not None,
                levels=dict(mask.levels),
                refused=dict(mask.refused),
                not_chosen=mask.not_chosen,
                ignored_labels=mask.ignored_labels,
                unknown_labels=mask.unknown_labels,
                others=mask.others,
                warnings=mask.warnings,
            ),
        )

    def _line(self, manifest: SeriesManifest, series: CollectedSeries) -> PlannedSeries:
        return PlannedSeries(
            series_id=manifest.series_id,
            manifest_id=manifest.manifest_id,
            modality=series.modality,
            instances=manifest.instances,
            description=series.description,
        )

    def _plan(self, study_id: str, planned: list[PlannedSeries], demographics: Demographics) -> tuple[StudyPlan, bool]:
        """The next revision of a study's plan: what was planned before, with what came now in its place."""

        def make(number: int, last: StudyPlan | None) -> StudyPlan | None:
            merged = {} if last is None else {series.series_id: series for series in last.series}
            for line in planned:
                old = merged.get(line.series_id)
                if old is not None and old.manifest_id == line.manifest_id:
                    continue
                merged[line.series_id] = line
            series = tuple(sorted(merged.values(), key=lambda s: s.series_id))
            if last is not None and last.series == series:
                return None
            known = demographics if demographics != Demographics() or last is None else last.demographics
            return StudyPlan(
                study_id=study_id,
                revision=number,
                supersedes=None if last is None else last.revision,
                demographics=known,
                series=series,
            )

        return write_revision(self._store, keys.study_plans(study_id), StudyPlan, make)

    def _facts(self, study_id: str, planned: list[PlannedSeries]) -> tuple[Fact, ...]:
        facts: list[Fact] = []
        for line in planned:
            fact = SeriesRejected if line.rejected else SeriesStored
            facts.append(
                fact(
                    study_id=study_id,
                    series_id=line.series_id,
                    manifest_id=line.manifest_id,
                    protocols=self._protocols,
                )
            )
        if planned and all(line.rejected for line in planned):
            facts.append(StudyRejected(study_id=study_id, protocols=self._protocols))
        return tuple(facts)


class _NotToBeJoined(Exception):
    """Images of a series that is durable, but not whole any more: the text says what of it was dropped."""


def _voxels_sha256(grid: Mask | Volume) -> str:
    return sha256_hex(np.ascontiguousarray(grid.voxels).tobytes() + repr(grid.geometry.shape_zyx).encode())


def _unsigned(mask: Mask) -> Mask:
    return replace(mask, voxels=mask.voxels.astype(np.uint8))


Tell = Callable[[Fact], None]
"""Publishes a fact and returns when the broker has it."""
