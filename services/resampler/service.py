"""MasksReady in, one fact a vertebra out: not evaluated by a guard, rejected, or ready with its crop in the store.

The volume is read and its cases are computed in a process of a pool, within a budget of time and memory
(series_crops.py); the store stays with the worker. Everything that can refuse or cost the series as a whole happens
before the plan of its cases is written; a fault of a case costs that case. The plan is written before the first case is
told. A case whose record lies in the store is told again and not computed, so a run that stopped half-way goes on where
it was. A crop that retention dropped is made again, from the same volume to the same bytes, where something is still to
be computed on it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel

from services.resampler.series_crops import (
    CaseResult,
    ComputedCase,
    FailedCase,
    SeriesFiles,
    TooDear,
    UnusableSource,
    compute_series,
)
from services.resampler.settings import ResamplerSettings
from shared.fracture import ids, keys
from shared.fracture.bundle import Bundle
from shared.fracture.guards import contrast_warnings
from shared.fracture.levels import sort_key
from shared.fracture.messages import FACTS, CaseReady, Fact, MasksReady
from shared.fracture.protocol import CropProtocol
from shared.fracture.records import (
    GATED_BASIS,
    GIVEN_BASIS,
    CaseRecord,
    MaskRecord,
    NotEvaluated,
    PlannedCase,
    Rejection,
    SeriesManifest,
    SeriesPlan,
    Warned,
)
from shared.fracture.spine.record import Finding, SpineRecord
from shared.fracture.topology import RESAMPLER, SEGMENTER
from shared.pipeline.errors import NotInStore, OverBudget, Reject, Retry
from shared.pipeline.process_pool import ProcessPool
from shared.pipeline.service import Service
from shared.pipeline.spool import PREFIX
from shared.pipeline.store import Store
from shared.records.archive import find_record, read_record, revisions, write_record, write_revision
from shared.records.outcomes import case_not_evaluated, decided, reject_case, rejecting


@dataclass(frozen=True, kw_only=True)
class Want:
    """What a case asks of its series' volume."""

    need: Literal["nothing", "welcome", "needed"]
    """`welcome`: only where the volume is there."""
    judged: bool
    """The guards let it pass before: it is cropped again as it was, whatever the limits are today."""


Wanted = Callable[[MasksReady], Collection[str]]
"""Which levels of a series are to become cases, for training: then no plan is made, and no sweep's ledger counts them.
Where it is not given, all of them are planned."""

NOT_MEASURED: Final = "the heights of the vertebra could not be measured"
SERIES_PER_PROCESS: Final = 50
"""After so many series a process is replaced by a new one, since long-lived ones leak."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resampler:
    """The handler of MasksReady over a store, for one crop protocol."""

    store: Store
    protocol: CropProtocol
    settings: ResamplerSettings
    pool: ProcessPool
    wanted: Wanted | None = None
    mask_sources: tuple[str, ...] = ()
    """Of the bundle: whose masks it was fitted on, or bridged to."""

    def masks_ready(self, fact: MasksReady) -> Iterator[Fact]:
        """Writes the plan of the series and tells of each of its cases, in the order of the spine.

        OverBudget: before anything was written (the series), or after the other cases were told (some of its cases).
        """
        if fact.protocols.crop_hash != self.protocol.crop_hash:
            raise Retry(
                f"the series asks for crop protocol {ids.short(fact.protocols.crop_hash)}, this worker's bundle has "
                f"{ids.short(self.protocol.crop_hash)}; start workers with that bundle"
            )
        manifest, masks, spine = self._records(fact)
        cases = planned_cases(manifest, masks)
        if not cases:
            raise Reject(*no_case_reasons(masks))
        kept_out: Mapping[str, NotEvaluated] = {}
        if self.wanted is not None:
            asked = self.wanted(fact)
            cases = tuple(case for case in cases if case.level in asked)
        else:  # cohorts for training are never gated
            kept_out = self._kept_out([case for case in cases if case.level in masks.levels], masks, spine)
        wants = {
            case.level: self._want(fact, case)
            for case in cases
            if case.level in masks.levels and case.level not in kept_out
        }
        results = self._results(wants, manifest=manifest, masks=masks)
        if self.wanted is None:
            self._write_plan(fact, cases)
        dear: list[str] = []
        for case in cases:
            result = results.get(case.level)
            if case.level in kept_out:
                yield case_not_evaluated(self.store, self._ready(fact, case), kept_out[case.level])
            elif not isinstance(result, TooDear):
                yield self._told(fact, case, manifest=manifest, masks=masks, spine=spine, result=result)
            elif wants[case.level].need == "needed":
                dear.append(case.level)
            else:
                yield self._told(fact, case, manifest=manifest, masks=masks, spine=spine, result=None)
        if dear:
            raise OverBudget(f"the crop of {', '.join(dear)} wanted more than {self.settings.memory_gib:g} GiB")

    def _kept_out(
        self, cases: Sequence[PlannedCase], masks: MaskRecord, spine: SpineRecord | None
    ) -> dict[str, NotEvaluated]:
        """Level → why it is not scored, whatever its crop: the height gate, or masks that the bundle does not know."""
        found = {} if spine is None else kept_out_by_gate(cases, spine)
        if masks.source != "automatic" or masks.segmenter in self.mask_sources:
            return found
        unknown = unknown_mask_source(masks.segmenter, self.mask_sources)
        return {
            case.level: found.get(case.level)
            or NotEvaluated(
                case_id=case.case_id, kind="guard", service=RESAMPLER, reasons=(unknown,), codes=("mask-source",)
            )
            for case in cases
        }

    def _records(self, fact: MasksReady) -> tuple[SeriesManifest, MaskRecord, SpineRecord | None]:
        spine = None if fact.spine_hash is None else keys.spine(fact.series_id, fact.spine_hash)
        try:
            return (
                read_record(self.store, keys.manifest(fact.series_id, fact.manifest_id), SeriesManifest),
                read_record(self.store, keys.mask_record(fact.series_id, fact.mask_hash), MaskRecord),
                None if spine is None else read_record(self.store, spine, SpineRecord),
            )
        except NotInStore:
            raise Retry("the manifest, the mask record or the spine record of the series is not in the store") from None

    def _want(self, fact: MasksReady, case: PlannedCase) -> Want:
        """What a case asks of the volume: its first crop, or one that was dropped and is still worked on."""
        asked, crop_hash = fact.protocols, self.protocol.crop_hash
        record = self._case_record(case.case_id)
        if record is None:
            refused = self.store.exists(keys.outcome("rejected", asked.scope, case.case_id))
            return Want(need="welcome" if refused else "needed", judged=False)
        crop = (keys.case_image(crop_hash, case.case_id), keys.case_mask(crop_hash, case.case_id))
        if record.guards or all(self.store.exists(key) for key in crop):
            return Want(need="nothing", judged=True)
        if decided(self.store, asked.scope, case.case_id):
            return Want(need="nothing", judged=True)
        features = (keys.hcr_features(asked.hcr_hash, case.case_id), keys.dtl_features(asked.dtl_hash, case.case_id))
        # with both vectors there, the crop is only for the picture in the report
        return Want(need="welcome" if all(self.store.exists(key) for key in features) else "needed", judged=True)

    def _results(
        self, wants: Mapping[str, Want], *, manifest: SeriesManifest, masks: MaskRecord
    ) -> Mapping[str, CaseResult]:
        """What the levels come to that want anything; nothing where the volume is gone and is only welcome."""
        asked = {level: want for level, want in wants.items() if want.need != "nothing"}
        if not asked:
            return {}
        try:
            return self._computed(asked, manifest=manifest, masks=masks)
        except (Retry, Reject, OverBudget):
            if any(want.need == "needed" for want in asked.values()):
                raise
            return {}

    def _computed(
        self, wants: Mapping[str, Want], *, manifest: SeriesManifest, masks: MaskRecord
    ) -> Mapping[str, CaseResult]:
        """What levels of a series come to, computed in a process of the pool."""
        with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
            files = self._files(Path(folder), manifest, masks)
            try:
                return self.pool.run(
                    compute_series,
                    files,
                    levels={level: masks.levels[level] for level in wants},
                    judged=frozenset(level for level, want in wants.items() if want.judged),
                    roi_kind=masks.roi_kind,
                    protocol=self.protocol,
                    guards=self.settings,
                    uncertain_levels=masks.source == "automatic",  # named so by us, since nothing says more
                )
            except UnusableSource as error:
                raise Reject(str(error)) from None

    def _files(self, folder: Path, manifest: SeriesManifest, masks: MaskRecord) -> SeriesFiles:
        def fetched(key: str, name: str) -> Path:
            path = folder / name
            path.write_bytes(self.store.get(key))
            return path

        cut = masks.has_body_mask and masks.roi_kind == "vertebra" and self.protocol.roi == "body"
        try:
            return SeriesFiles(
                volume=fetched(keys.volume(manifest.series_id, manifest.image_hash), "volume.nrrd"),
                labels=fetched(keys.mask(manifest.series_id, masks.mask_hash), "labels.nrrd"),
                bodies=fetched(keys.body_mask(manifest.series_id, masks.mask_hash), "bodies.nrrd") if cut else None,
            )
        except NotInStore:
            raise Retry(
                "the volume or a mask of the series is not in the store; where retention dropped it: sweep the study "
                "with its masks again"
            ) from None

    def _write_plan(self, fact: MasksReady, cases: tuple[PlannedCase, ...]) -> None:
        prefix = keys.series_plans(fact.series_id)

        def made(number: int, last: SeriesPlan | None) -> SeriesPlan | None:
            for plan in [] if last is None else revisions(self.store, prefix, SeriesPlan):
                same = (plan.manifest_id, plan.mask_hash, plan.spine_hash, plan.cases)
                if same == (fact.manifest_id, fact.mask_hash, fact.spine_hash, cases):
                    return None
            return SeriesPlan(
                study_id=fact.study_id,
                series_id=fact.series_id,
                manifest_id=fact.manifest_id,
                mask_hash=fact.mask_hash,
                revision=number,
                supersedes=None if last is None else last.revision,
                cases=cases,
                spine_hash=fact.spine_hash,
            )

        write_revision(self.store, prefix, SeriesPlan, made)

    def _ready(self, fact: MasksReady, case: PlannedCase) -> CaseReady:
        return CaseReady(
            study_id=fact.study_id, series_id=fact.series_id, case_id=case.case_id, protocols=fact.protocols
        )

    def _told(
        self,
        fact: MasksReady,
        case: PlannedCase,
        *,
        manifest: SeriesManifest,
        masks: MaskRecord,
        spine: SpineRecord | None,
        result: CaseResult | None,
    ) -> Fact:
        ready = self._ready(fact, case)
        if case.level not in masks.levels:
            return reject_case(self.store, ready, service=RESAMPLER, reasons=(masks.refused[case.level],))
        record = self._case_record(case.case_id)
        if isinstance(result, FailedCase):
            if result.traceback:
                fields = {"case_id": ids.short(case.case_id), "traceback": result.traceback}
                _log.error("a case could not be resampled", extra={"fields": fields})
            return reject_case(self.store, ready, service=RESAMPLER, reasons=(result.reason,))
        if record is not None:
            if isinstance(result, ComputedCase) and result.image:
                self._write_crop(case, result)
        elif isinstance(result, ComputedCase):
            record = self._write_case(case, result, manifest=manifest, masks=masks, spine=spine)
        else:
            outcome = keys.outcome("rejected", fact.protocols.scope, case.case_id)
            before = find_record(self.store, outcome, Rejection)
            if before is None:
                raise Retry("the record of a case went away while its series was handled")
            return reject_case(self.store, ready, service=RESAMPLER, reasons=before.reasons)
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

    def _write_case(
        self,
        case: PlannedCase,
        result: ComputedCase,
        *,
        manifest: SeriesManifest,
        masks: MaskRecord,
        spine: SpineRecord | None,
    ) -> CaseRecord:
        """The record of a case, written last: where it lies, the crop lies too unless a guard applies."""
        warnings = (
            *manifest.warnings,
            *masks.warnings,
            *result.guard_warnings,
            *contrast_warnings(manifest.acquisition),
            *result.crop_warnings,
        )
        finding = None if spine is None else spine.finding(case.level)
        measured = () if finding is None else tuple(Warned(code="heights", sentence=one) for one in finding.warnings)
        if not result.guards:
            self._write_crop(case, result)
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
            roi_kind=result.roi_kind,
            volume_ml=result.volume_ml,
            source_spacing_zyx=result.source_spacing_zyx,
            acquisition=manifest.acquisition,
            demographics=manifest.demographics,
            guards=result.guards,
            warnings=tuple(dict.fromkeys((*warnings, *measured))),
            fracture_basis=fracture_basis(finding, gated=spine is not None and spine.gated),
        )
        write_record(self.store, keys.case_record(self.protocol.crop_hash, case.case_id), record)
        return record

    def _write_crop(self, case: PlannedCase, result: ComputedCase) -> None:
        self.store.put(keys.case_image(self.protocol.crop_hash, case.case_id), result.image)
        self.store.put(keys.case_mask(self.protocol.crop_hash, case.case_id), result.mask)

    def _case_record(self, case_id: str) -> CaseRecord | None:
        return find_record(self.store, keys.case_record(self.protocol.crop_hash, case_id), CaseRecord)


def kept_out_by_gate(cases: Iterable[PlannedCase], spine: SpineRecord) -> dict[str, NotEvaluated]:
    """Level → why it is not scored, of those that the gate keeps out; none where the spine's record only annotates."""
    found: dict[str, NotEvaluated] = {}
    for case in cases if spine.gated else ():
        finding = spine.finding(case.level)
        if finding is not None and finding.decision == "fractured":
            continue
        kind: Literal["guard", "not-fractured", "review"] = "guard"
        if finding is not None and finding.decision in ("review", "not-fractured"):
            kind = "review" if finding.decision == "review" else "not-fractured"
        found[case.level] = NotEvaluated(
            case_id=case.case_id,
            kind=kind,
            service=SEGMENTER,
            reasons=(NOT_MEASURED,) if finding is None else (finding.reason, *finding.warnings),
            codes=("gate",),
        )
    return found


def unknown_mask_source(made_by: str, known: Sequence[str]) -> str:
    """That a bundle does not know masks of a maker: its classifier sees other texture and shape in them."""
    return (
        f"mask source: the model was not fitted on masks of {made_by}, nor bridged to them (it knows: "
        f"{', '.join(known) or 'none'})"
    )


def fracture_basis(finding: Finding | None, *, gated: bool) -> str:
    """On what it rests that a vertebra is fractured, in one line."""
    if finding is None:
        return GIVEN_BASIS
    if gated:
        return f"{GATED_BASIS}: {finding.words}"
    return f"{GIVEN_BASIS}; measured: {finding.words}"


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
    return resampler_service(
        store=store, protocol=bundle.manifest.crop, settings=settings, mask_sources=bundle.manifest.mask_sources
    )


def resampler_service(
    *,
    store: Store,
    protocol: CropProtocol,
    settings: ResamplerSettings | None = None,
    pool: ProcessPool | None = None,
    wanted: Wanted | None = None,
    mask_sources: tuple[str, ...] = (),
) -> Service:
    """The resampler over a store, for one crop protocol.

    `wanted` names the levels where not all are to be cropped; `mask_sources`: whose automatic masks may be scored.
    """
    chosen = settings or ResamplerSettings()
    processes = pool or series_pool(chosen)
    resampler = Resampler(
        store=store, protocol=protocol, settings=chosen, pool=processes, wanted=wanted, mask_sources=mask_sources
    )

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
        ready=processes.check,
        close=processes.close,
    )


def series_pool(settings: ResamplerSettings) -> ProcessPool:
    """Processes in which series are computed, each within the budget of the settings."""
    return ProcessPool(
        what="the resampling",
        processes=settings.series_at_once,
        seconds=settings.series_seconds,
        memory_gib=settings.memory_gib,
        jobs_per_process=SERIES_PER_PROCESS,
        preload=("services.resampler.series_crops",),
    )
