"""MasksReady in, one fact a vertebra out: not evaluated by a guard, rejected, or ready with its crop in the store.

Everything that can refuse the series as a whole is looked at before the plan of its cases is written; from then on a
fault costs one case. The plan is written before the first case is told. A case whose record lies in the store is told
again and not computed, so a run that stopped half-way goes on where it was. A crop that retention dropped is made
again, from the same volume to the same bytes, where something is still to be computed on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from services.resampler.regions import Region, region_of
from services.resampler.settings import ResamplerSettings
from shared.fracture import ids, keys
from shared.fracture.bundle import Bundle
from shared.fracture.crop import CropError, crop_vertebra
from shared.fracture.guards import contrast_warnings, evaluate_guards
from shared.fracture.levels import sort_key
from shared.fracture.messages import FACTS, CaseReady, Fact, MasksReady
from shared.fracture.protocol import CropProtocol
from shared.fracture.records import (
    CaseRecord,
    MaskRecord,
    NotEvaluated,
    PlannedCase,
    Rejection,
    SeriesManifest,
    SeriesPlan,
    Warned,
)
from shared.fracture.topology import RESAMPLER
from shared.fracture.volume import Mask, Volume, mask_from_nrrd, to_nrrd, volume_from_nrrd
from shared.pipeline.errors import NotInStore, Reject, Retry
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.records.archive import find_record, read_record, revisions, write_record, write_revision
from shared.records.outcomes import case_not_evaluated, decided, reject_case, rejecting

Want = Literal["nothing", "welcome", "needed"]
"""Whether the volume of a series has to be read for a case; "welcome": only where it is there."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resampler:
    """The handler of MasksReady over a store, for one crop protocol."""

    store: Store
    protocol: CropProtocol
    settings: ResamplerSettings

    def masks_ready(self, fact: MasksReady) -> Iterator[Fact]:
        """Writes the plan of the series and tells of each of its cases, in the order of the spine."""
        if fact.protocols.crop_hash != self.protocol.crop_hash:
            raise Retry(
                f"the series asks for crop protocol {ids.short(fact.protocols.crop_hash)}, this worker's bundle has "
                f"{ids.short(self.protocol.crop_hash)}; start workers with that bundle"
            )
        manifest, masks = self._records(fact)
        cases = planned_cases(manifest, masks)
        if not cases:
            raise Reject(*no_case_reasons(masks))
        wants = {case.case_id: self._want(fact, case) for case in cases if case.level in masks.levels}
        source = self._source_for(set(wants.values()), manifest=manifest, masks=masks)
        self._write_plan(fact, cases)
        for case in cases:
            want = wants.get(case.case_id, "nothing")
            yield self._told(fact, case, manifest=manifest, masks=masks, source=source, want=want)

    def _records(self, fact: MasksReady) -> tuple[SeriesManifest, MaskRecord]:
        try:
            return (
                read_record(self.store, keys.manifest(fact.series_id, fact.manifest_id), SeriesManifest),
                read_record(self.store, keys.mask_record(fact.series_id, fact.mask_hash), MaskRecord),
            )
        except NotInStore:
            raise Retry("the manifest or the mask record of the series is not in the store") from None

    def _want(self, fact: MasksReady, case: PlannedCase) -> Want:
        """What a case asks of the volume: its first crop, or one that was dropped and is still worked on."""
        asked, crop_hash = fact.protocols, self.protocol.crop_hash
        record = self._case_record(case.case_id)
        if record is None:
            refused = self.store.exists(keys.outcome("rejected", asked.scope, case.case_id))
            return "welcome" if refused else "needed"
        crop = (keys.case_image(crop_hash, case.case_id), keys.case_mask(crop_hash, case.case_id))
        if record.guards or all(self.store.exists(key) for key in crop):
            return "nothing"
        if decided(self.store, asked.scope, case.case_id):
            return "nothing"
        features = (keys.hcr_features(asked.hcr_hash, case.case_id), keys.dtl_features(asked.dtl_hash, case.case_id))
        # with both vectors there, the crop is only for the picture in the report
        return "welcome" if all(self.store.exists(key) for key in features) else "needed"

    def _source_for(self, wants: set[Want], *, manifest: SeriesManifest, masks: MaskRecord) -> Source | None:
        if not wants - {"nothing"}:
            return None
        try:
            return self._source(manifest, masks)
        except (Retry, Reject):
            if "needed" in wants:
                raise
            return None

    def _source(self, manifest: SeriesManifest, masks: MaskRecord) -> Source:
        try:
            volume = self.store.get(keys.volume(manifest.series_id, manifest.image_hash))
            labels = self.store.get(keys.mask(manifest.series_id, masks.mask_hash))
            bodies = None
            if masks.has_body_mask and masks.roi_kind == "vertebra" and self.protocol.roi == "body":
                bodies = self.store.get(keys.body_mask(manifest.series_id, masks.mask_hash))
        except NotInStore:
            raise Retry(
                "the volume or a mask of the series is not in the store; where retention dropped it: sweep the study "
                "with its masks again"
            ) from None
        try:
            source = Source(
                volume=volume_from_nrrd(volume),
                labels=mask_from_nrrd(labels),
                bodies=None if bodies is None else mask_from_nrrd(bodies),
            )
        except (RuntimeError, ValueError):
            raise Reject("the stored volume or mask cannot be read; delete it and sweep the series again") from None
        grids = [source.labels.geometry, *([] if source.bodies is None else [source.bodies.geometry])]
        if not all(source.volume.geometry.same_grid(grid) for grid in grids):
            raise Reject("the mask lies on another grid than the scan; give the mask of this series")
        return source

    def _write_plan(self, fact: MasksReady, cases: tuple[PlannedCase, ...]) -> None:
        prefix = keys.series_plans(fact.series_id)

        def made(number: int, last: SeriesPlan | None) -> SeriesPlan | None:
            for plan in [] if last is None else revisions(self.store, prefix, SeriesPlan):
                if (plan.manifest_id, plan.mask_hash, plan.cases) == (fact.manifest_id, fact.mask_hash, cases):
                    return None
            return SeriesPlan(
                study_id=fact.study_id,
                series_id=fact.series_id,
                manifest_id=fact.manifest_id,
                mask_hash=fact.mask_hash,
                revision=number,
                supersedes=None if last is None else last.revision,
                cases=cases,
            )

        write_revision(self.store, prefix, SeriesPlan, made)

    def _told(
        self,
        fact: MasksReady,
        case: PlannedCase,
        *,
        manifest: SeriesManifest,
        masks: MaskRecord,
        source: Source | None,
        want: Want,
    ) -> Fact:
        ready = CaseReady(
            study_id=fact.study_id, series_id=fact.series_id, case_id=case.case_id, protocols=fact.protocols
        )
        if case.level not in masks.levels:
            return reject_case(self.store, ready, service=RESAMPLER, reasons=(masks.refused[case.level],))
        record = self._case_record(case.case_id)
        if record is None and source is None:
            before = find_record(self.store, keys.outcome("rejected", fact.protocols.scope, case.case_id), Rejection)
            if before is None:
                raise Retry("the record of a case went away while its series was handled")
            return reject_case(self.store, ready, service=RESAMPLER, reasons=before.reasons)
        if source is not None:
            try:
                if record is None:
                    record = self._made(case, manifest=manifest, masks=masks, source=source)
                elif want != "nothing":
                    self._write_crop(case, self._region(case, masks=masks, source=source), source=source)
            except CropError as error:
                return reject_case(self.store, ready, service=RESAMPLER, reasons=(str(error),))
            except (RuntimeError, MemoryError, ArithmeticError) as error:  # ITK throws RuntimeError
                _log.exception("case %s could not be resampled", case.case_id)
                reason = f"the crop could not be computed ({type(error).__name__})"
                return reject_case(self.store, ready, service=RESAMPLER, reasons=(reason,))
        assert record is not None  # noqa: S101 - read, or made just now
        if not record.guards:
            return ready
        return case_not_evaluated(
            self.store,
            ready,
            NotEvaluated(
                case_id=case.case_id,
                kind="guard",
                service=RESAMPLER,
                reasons=tuple(guard.sentence for guard in record.guards),
                codes=tuple(guard.code for guard in record.guards),
            ),
        )

    def _made(self, case: PlannedCase, *, manifest: SeriesManifest, masks: MaskRecord, source: Source) -> CaseRecord:
        """The record of a case, written last: where it lies, the crop lies too unless a guard applies."""
        region = self._region(case, masks=masks, source=source)
        found = evaluate_guards(
            source.volume,
            region.roi,
            level=case.level,
            roi_kind=region.roi_kind,
            wanted_roi=self.protocol.roi,
            settings=self.settings,
            uncut=region.uncut,
        )
        warnings = (*manifest.warnings, *masks.warnings, *found.warnings, *contrast_warnings(manifest.acquisition))
        if not found.guards:
            warnings = (*warnings, *self._write_crop(case, region, source=source))
        record = CaseRecord(
            case_id=case.case_id,
            study_id=manifest.study_id,
            series_id=manifest.series_id,
            manifest_id=manifest.manifest_id,
            image_hash=manifest.image_hash,
            mask_hash=masks.mask_hash,
            mask_source=masks.source,
            patient_id=manifest.patient_id,
            level=case.level,
            crop_hash=self.protocol.crop_hash,
            roi_kind=region.roi_kind,
            volume_ml=found.volume_ml,
            source_spacing_zyx=source.volume.geometry.spacing_zyx,
            acquisition=manifest.acquisition,
            demographics=manifest.demographics,
            guards=found.guards,
            warnings=tuple(dict.fromkeys(warnings)),
        )
        write_record(self.store, keys.case_record(self.protocol.crop_hash, case.case_id), record)
        return record

    def _region(self, case: PlannedCase, *, masks: MaskRecord, source: Source) -> Region:
        return region_of(
            source.labels,
            masks.levels[case.level],
            roi_kind=masks.roi_kind,
            wanted=self.protocol.roi,
            bodies=source.bodies,
        )

    def _write_crop(self, case: PlannedCase, region: Region, *, source: Source) -> tuple[Warned, ...]:
        """Put the crop and its mask where they are not there; returns the crop's warnings."""
        crop = crop_vertebra(source.volume, region.roi, self.protocol)
        self.store.put(keys.case_image(self.protocol.crop_hash, case.case_id), to_nrrd(crop.image))
        self.store.put(keys.case_mask(self.protocol.crop_hash, case.case_id), to_nrrd(crop.mask))
        return crop.warnings

    def _case_record(self, case_id: str) -> CaseRecord | None:
        return find_record(self.store, keys.case_record(self.protocol.crop_hash, case_id), CaseRecord)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A series in memory: its volume, its label map, and the bodies to cut by, all on one grid."""

    volume: Volume
    labels: Mask
    bodies: Mask | None


def planned_cases(manifest: SeriesManifest, masks: MaskRecord) -> tuple[PlannedCase, ...]:
    """Every labelled level of a series as a case, those that are refused among them, from head to foot."""
    return tuple(
        PlannedCase(
            case_id=ids.case_id(
                series_id=manifest.series_id,
                image_hash=manifest.image_hash,
                mask_hash=masks.mask_hash,
                level=level,
            ),
            level=level,
        )
        for level in sorted({*masks.levels, *masks.refused}, key=sort_key)
    )


def no_case_reasons(masks: MaskRecord) -> tuple[str, ...]:
    """Why a mask gives no case at all."""
    if masks.not_chosen:
        first = f"none of the levels that were asked for is in the mask (it has {', '.join(masks.not_chosen)})"
    elif masks.unknown_labels:
        first = f"no label of the mask is a vertebra; unknown labels: {', '.join(masks.unknown_labels[:10])}"
    elif masks.ignored_labels:
        first = f"no label of the mask is a vertebra ({masks.ignored_labels} labels of other organs)"
    else:
        first = "the mask is empty"
    return (first,)


def build(*, store: Store, bundle: Bundle, settings: ResamplerSettings | None = None) -> Service:
    """The resampler over a store, for the crop protocol of a bundle."""
    return resampler_service(store=store, protocol=bundle.manifest.crop, settings=settings)


def resampler_service(*, store: Store, protocol: CropProtocol, settings: ResamplerSettings | None = None) -> Service:
    """The resampler over a store, for one crop protocol."""
    chosen = settings or ResamplerSettings()
    resampler = Resampler(store=store, protocol=protocol, settings=chosen)

    def masks_ready(fact: BaseModel) -> Iterable[BaseModel]:
        if not isinstance(fact, MasksReady):
            raise TypeError(f"the resampler handles MasksReady, not {type(fact).__name__}")
        return resampler.masks_ready(fact)

    return Service(
        name=RESAMPLER,
        queues=(RESAMPLER,),
        messages=FACTS,
        handlers={MasksReady: masks_ready},
        rejected=rejecting(store, RESAMPLER),
        slots=chosen.series_at_once,
    )
