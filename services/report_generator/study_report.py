"""What a report says of a study: one frozen model, from records alone, published as JSON Schema.

The HTML page is drawn from this model and holds nothing beyond it but pictures, so that what a person reads and what a
program reads are the same facts. Nothing in it depends on when or where it was made: equal records give equal bytes.
Every probability stands in one object with the basis on which the fracture itself was assumed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.fracture.bundle import BundleKind, ClassifierKind, ClassName, Manifest, ScoreKind
from shared.fracture.ids import short
from shared.fracture.ledger import CASE_STATES, CaseState, CaseStatus, SeriesState, SeriesStatus, StudyState
from shared.fracture.levels import sort_key
from shared.fracture.nomogram import NomogramModel, NomogramReading
from shared.fracture.protocol import Preset, Protocols, RoiKind
from shared.fracture.records import (
    GATED_BASIS,
    GIVEN_BASIS,
    CaseRecord,
    Classified,
    DeadLetterNote,
    Demographics,
    GuardRecord,
    MaskRecord,
    NotEvaluated,
    Rejection,
    SeriesManifest,
    Warned,
)
from shared.fracture.research_use import RESEARCH_USE
from shared.fracture.scoring import DEMO_FLAG, RESEARCH_FLAG, Classification, Contribution, OutsideRange
from shared.fracture.spine.gate import Gate
from shared.fracture.spine.record import Finding, SegmenterNote, SpineRecord
from shared.pipeline.envelope import only_unknown_fields
from shared.pipeline.errors import NewerSchema

DEMONSTRATION: Final = "DEMONSTRATION MODEL trained on synthetic phantoms: no clinical meaning."

Id = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScoringBundle(Protocol):
    """What a report needs of a bundle (shared.fracture.bundle.Bundle has it)."""

    @property
    def manifest(self) -> Manifest:
        """What the bundle is."""

    @property
    def nomogram(self) -> NomogramModel:
        """The nomogram that its cases are read on."""


class BundleNote(_Frozen):
    """The bundle that the study was scored with."""

    bundle_id: str
    kind: BundleKind
    name: str
    version: str
    preset: Preset
    roi: RoiKind
    threshold: Probability
    """Fusion probability from which on a case is called acute."""

    @classmethod
    def of(cls, manifest: Manifest) -> BundleNote:
        """The note of a bundle's manifest."""
        return cls(
            bundle_id=manifest.bundle_id,
            kind=manifest.kind,
            name=manifest.name,
            version=manifest.version,
            preset=manifest.preset,
            roi=manifest.crop.roi,
            threshold=manifest.threshold,
        )

    @property
    def demonstration(self) -> str | None:
        """The sentence that every output of a demonstration model carries."""
        return DEMONSTRATION if self.kind == "DEMO" else None


class AcuteProbability(_Frozen):
    """P(acute), given that there is a fracture: never to be read without its basis."""

    probability: Probability
    fracture_basis: str


class NomogramShown(_Frozen):
    """The nomogram, this patient's points on it, and the probability that they stand for."""

    model: NomogramModel
    reading: NomogramReading
    acute: AcuteProbability


class ScoredResult(_Frozen):
    """What the models say of one vertebra."""

    fusion: AcuteProbability
    hcr: AcuteProbability
    dtl: AcuteProbability
    nomogram: NomogramShown | None
    nomogram_absent: str | None
    predicted: ClassName
    threshold: Probability
    fusion_score: float
    hcr_score: float
    dtl_score: float
    contributions: tuple[Contribution, ...]
    """The features that pushed the fusion's linear score most, the strongest first; above zero towards acute.

    In log odds where `score_kind` is logistic, in the LASSO's own units else."""
    selected_features: int
    outside_range: tuple[OutsideRange, ...]
    flags: tuple[str, ...]
    prediction_set: tuple[ClassName, ...] | None = None
    """The classes that the bundle's conformal limits do not rule out; None where it has no limits."""
    indeterminate: bool = False
    """The prediction set is not exactly one class: MRI recommended."""
    score_kind: ScoreKind = "logistic"
    classifier: ClassifierKind | None = None
    """What gives the fusion probability; None where it follows from the linear score."""

    @property
    def own_flags(self) -> tuple[str, ...]:
        """The flags of this case alone: what holds of the whole bundle stands at the head of the page."""
        return tuple(flag for flag in self.flags if flag not in (RESEARCH_FLAG, DEMO_FLAG))


class CaseReport(_Frozen):
    """One vertebra: its result, or why there is none."""

    case_id: Id
    series_id: Id
    level: str
    state: CaseState
    reasons: tuple[str, ...] = ()
    not_evaluated_kind: Literal["guard", "not-fractured", "review"] | None = None
    service: str | None = None
    """Which service said so (rejected, not evaluated) or which queue it was lost in (dead-lettered)."""
    dead_letter_id: str | None = None
    guards: tuple[GuardRecord, ...] = ()
    warnings: tuple[Warned, ...] = ()
    mask_hash: str | None = None
    mask_source: str | None = None
    roi_kind: RoiKind | None = None
    volume_ml: float | None = None
    source_spacing_zyx: tuple[float, float, float] | None = None
    result: ScoredResult | None = None


class SpineReport(_Frozen):
    """The spine of a series: who made the masks, what the levels rest on, and every vertebra's heights."""

    mask_hash: Id
    segmenter: SegmenterNote
    levels_from: str
    doubts: tuple[str, ...] = ()
    gate: Gate
    gated: bool
    findings: tuple[Finding, ...]

    @property
    def maker(self) -> str:
        """Who made the masks, in words."""
        if self.segmenter.kind == "given":
            return "masks that came with the series"
        return f"{self.segmenter.kind} segmenter {self.segmenter.name} {self.segmenter.version}".strip()


class SeriesReport(_Frozen):
    """One series of the study's newest plan."""

    series_id: Id
    manifest_id: Id
    modality: str
    description: str
    instances: int
    state: SeriesState
    reasons: tuple[str, ...] = ()
    plan_revision: int | None = None
    notes: tuple[str, ...] = ()
    """What a reader should know of its masks and its acquisition."""
    spine: SpineReport | None = None
    """None where nobody measured it."""


class StudyReport(_Frozen):
    """A revision of a study's report. `report_id` is the hash of the plans and terminal records that it shows."""

    schema_version: Literal[1] = 1
    report_id: Id
    study_id: Id
    plan_revision: int
    research_use: str
    demonstration: str | None
    fracture_basis: str
    bundle: BundleNote
    protocols: Protocols
    demographics: Demographics
    counts: dict[CaseState, int]
    cases: tuple[CaseReport, ...]
    """From head to foot."""
    series: tuple[SeriesReport, ...]

    def to_bytes(self) -> bytes:
        """The JSON as it is published: floats in full."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    @property
    def scored(self) -> tuple[CaseReport, ...]:
        """The vertebrae with a result, the likeliest acute first."""
        found = [(case, case.result) for case in self.cases if case.result is not None]
        found.sort(
            key=lambda pair: (pair[1].predicted != "acute", -pair[1].fusion.probability, sort_key(pair[0].level))
        )
        return tuple(case for case, _ in found)

    @property
    def not_scored(self) -> tuple[CaseReport, ...]:
        """The vertebrae without a result, from head to foot; superseded ones are not listed."""
        return tuple(case for case in self.cases if case.result is None and case.state != "superseded")


def build(
    state: StudyState,
    *,
    bundle: ScoringBundle,
    cases: Mapping[str, CaseRecord],
    manifests: Mapping[str, SeriesManifest],
    masks: Mapping[str, MaskRecord],
    spines: Mapping[str, SpineRecord] | None = None,
) -> StudyReport:
    """The report of a study's state.

    `cases` by case id, `manifests`, `masks` and `spines` by series id; each may lack entries, then less is said.
    ValueError where a result was made with another bundle.
    """
    known = spines or {}
    manifest = bundle.manifest
    shown = [_case(status, record=cases.get(status.case_id), bundle=bundle) for status in state.cases]
    shown.sort(key=lambda case: (sort_key(case.level), case.series_id, case.case_id))
    note = BundleNote.of(manifest)
    return StudyReport(
        report_id=state.report_id,
        study_id=state.study_id,
        plan_revision=state.plan.revision,
        research_use=RESEARCH_USE,
        demonstration=note.demonstration,
        fracture_basis=basis_of(known.values(), count=sum(1 for one in state.series if one.plan is not None)),
        bundle=note,
        protocols=manifest.protocols,
        demographics=state.plan.demographics,
        counts={name: sum(1 for case in shown if case.state == name) for name in CASE_STATES},
        cases=tuple(shown),
        series=tuple(
            _series(
                status,
                manifest=manifests.get(status.planned.series_id),
                mask=masks.get(status.planned.series_id),
                spine=known.get(status.planned.series_id),
            )
            for status in state.series
        ),
    )


def basis_of(spines: Iterable[SpineRecord], *, count: int) -> str:
    """On what it rests that the vertebrae of a study are fractured; `count`: of its series that have masks."""
    gated = sum(1 for spine in spines if spine.gated)
    if gated == 0:
        return GIVEN_BASIS
    return GATED_BASIS if gated >= count else f"{GIVEN_BASIS}; or {GATED_BASIS}"


def _case(status: CaseStatus, *, record: CaseRecord | None, bundle: ScoringBundle) -> CaseReport:
    known: dict[str, Any] = {} if record is None else _known(record)
    outcome = status.outcome
    base: dict[str, Any] = {
        "case_id": status.case_id,
        "series_id": status.series_id,
        "level": status.level,
        "state": status.state(report_written=True),
        "reasons": status.reasons,
        **known,
    }
    match outcome:
        case Classified():
            basis = GIVEN_BASIS if record is None else record.fracture_basis
            base["result"] = scored_result(outcome, bundle=bundle, fracture_basis=basis)
            base["warnings"] = _each_once((*known.get("warnings", ()), *outcome.warnings))
        case NotEvaluated():
            base["not_evaluated_kind"], base["service"] = outcome.kind, outcome.service
        case Rejection():
            base["service"] = outcome.service
        case DeadLetterNote():
            base["service"], base["dead_letter_id"] = outcome.queue, outcome.dead_letter_id
        case None:
            pass
    return CaseReport(**base)


def scored_result(outcome: Classified, *, bundle: ScoringBundle, fracture_basis: str) -> ScoredResult:
    """What is shown of a stored classification.

    ValueError where it is of another bundle; NewerSchema where a newer version wrote it.
    """
    try:
        found = Classification.model_validate_json(json.dumps(outcome.classification))
    except ValidationError as error:
        if not only_unknown_fields(error):
            raise
        raise NewerSchema(
            "the result of the case was written by a newer version: upgrade the report-generator, then replay"
        ) from None
    if found.bundle_id != bundle.manifest.bundle_id:
        raise ValueError(
            f"a result of bundle {short(found.bundle_id)} cannot be shown with bundle "
            f"{short(bundle.manifest.bundle_id)}"
        )

    def acute(probability: float) -> AcuteProbability:
        return AcuteProbability(probability=probability, fracture_basis=fracture_basis)

    reading = found.nomogram
    nomogram = (
        None
        if reading is None
        else NomogramShown(model=bundle.nomogram, reading=reading, acute=acute(reading.probability))
    )
    return ScoredResult(
        fusion=acute(found.probability),
        hcr=acute(found.hcr_probability),
        dtl=acute(found.dtl_probability),
        nomogram=nomogram,
        nomogram_absent=found.nomogram_absent,
        predicted=found.predicted,
        threshold=found.threshold,
        fusion_score=found.score,
        hcr_score=found.hcr_score,
        dtl_score=found.dtl_score,
        contributions=found.contributions,
        selected_features=found.selected_features,
        outside_range=found.outside_range,
        flags=found.flags,
        prediction_set=found.prediction_set,
        indeterminate=found.indeterminate,
        score_kind=found.score_kind,
        classifier=found.classifier,
    )


def _known(record: CaseRecord) -> dict[str, Any]:
    return {
        "guards": record.guards,
        "warnings": record.warnings,
        "mask_hash": record.mask_hash,
        "mask_source": record.mask_source,
        "roi_kind": record.roi_kind,
        "volume_ml": record.volume_ml,
        "source_spacing_zyx": record.source_spacing_zyx,
    }


def _each_once(warnings: tuple[Warned, ...]) -> tuple[Warned, ...]:
    return tuple({(warning.code, warning.sentence): warning for warning in warnings}.values())


def _series(
    status: SeriesStatus, *, manifest: SeriesManifest | None, mask: MaskRecord | None, spine: SpineRecord | None
) -> SeriesReport:
    planned = status.planned
    return SeriesReport(
        series_id=planned.series_id,
        manifest_id=planned.manifest_id,
        modality=planned.modality,
        description=planned.description,
        instances=planned.instances,
        state=status.state,
        reasons=status.reasons,
        plan_revision=None if status.plan is None else status.plan.revision,
        notes=_notes(manifest, mask),
        spine=None
        if spine is None
        else SpineReport(
            mask_hash=spine.mask_hash,
            segmenter=spine.segmenter,
            levels_from=spine.levels_from,
            doubts=spine.doubts,
            gate=spine.gate,
            gated=spine.gated,
            findings=spine.findings,
        ),
    )


def _notes(manifest: SeriesManifest | None, mask: MaskRecord | None) -> tuple[str, ...]:
    notes: list[str] = []
    if manifest is not None:
        notes += [warning.sentence for warning in manifest.warnings]
        notes += [f"mask not used: {fault}" for fault in manifest.mask_faults]
    if mask is not None:
        notes += [warning.sentence for warning in mask.warnings]
        notes += [f"another mask was not used: {other}" for other in mask.others]
        if mask.not_chosen:
            notes.append(f"levels left out by choice: {', '.join(mask.not_chosen)}")
        if mask.ignored_labels:
            notes.append(f"{mask.ignored_labels} labels that are no vertebra were ignored")
        if mask.unknown_labels:
            notes.append(f"labels that the label map does not know: {', '.join(mask.unknown_labels)}")
    return tuple(dict.fromkeys(notes))


def report_schema() -> dict[str, Any]:
    """The JSON Schema of a report (docs/report.schema.json)."""
    schema = StudyReport.model_json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Study report of fracture-sweep, version 1",
    }


def report_schema_bytes() -> bytes:
    """The published bytes of the schema."""
    return (json.dumps(report_schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
