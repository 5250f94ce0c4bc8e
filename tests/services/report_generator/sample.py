"""A study in a store as the services before this one leave it: plans, cases, crops, outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from shared.fracture import keys
from shared.fracture.bundle import ClassifierKind, ClassName, ScoreKind
from shared.fracture.ids import digest
from shared.fracture.messages import (
    CaseDeadLettered,
    CaseNotEvaluated,
    CaseRejected,
    Fact,
    FractureClassified,
)
from shared.fracture.nomogram import read_points, sigmoid
from shared.fracture.protocol import Protocols
from shared.fracture.records import (
    Acquisition,
    CaseRecord,
    Classified,
    DeadLetterNote,
    Demographics,
    FileCounts,
    MaskRecord,
    NotEvaluated,
    PlannedCase,
    PlannedSeries,
    Record,
    Rejection,
    SeriesPlan,
    StudyIdentity,
    StudyPlan,
    SweepClosing,
    SweepPlan,
    SweepSeries,
    Warned,
)
from shared.fracture.scoring import (
    DEMO_FLAG,
    INDETERMINATE_FLAG,
    RESEARCH_FLAG,
    Classification,
    Contribution,
    OutsideRange,
)
from shared.fracture.volume import Geometry, Mask, Volume, to_nrrd
from shared.pipeline.store import Store
from tests.fixtures.small_bundle import NOMOGRAM, small_files, small_manifest

End = Literal["classified", "not-evaluated", "rejected", "dead-lettered", "pending"]
NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@dataclass(frozen=True)
class SampleBundle:
    """The two parts of a bundle that a report reads."""

    manifest: Any = field(default_factory=lambda: small_manifest(small_files()))
    nomogram: Any = NOMOGRAM

    @property
    def protocols(self) -> Protocols:
        return self.manifest.protocols


@dataclass(frozen=True, kw_only=True)
class SampleCase:
    """One vertebra and how it is to end."""

    level: str
    end: End = "classified"
    score: float = 0.8
    reason: str = "the mask touches the border of the scan"
    warnings: tuple[Warned, ...] = ()
    with_crop: bool = True
    prediction_set: tuple[ClassName, ...] | None = None
    score_kind: ScoreKind = "logistic"
    classifier: ClassifierKind | None = None


@dataclass(frozen=True, kw_only=True)
class SampleStudy:
    """One study of one used series (and one left out)."""

    name: str = "one"
    age: int | None = 71
    sex: Literal["F", "M"] | None = "F"
    cases: Sequence[SampleCase] = (SampleCase(level="L1"),)
    left_out: str | None = "not an axial stack: a localiser"
    description: str = "CT, 120 slices of 1.0 mm"

    @property
    def study_id(self) -> str:
        return digest({"study": self.name})

    @property
    def series_id(self) -> str:
        return digest({"series": self.name})

    @property
    def manifest_id(self) -> str:
        return digest({"manifest": self.name})

    @property
    def left_out_id(self) -> str:
        return digest({"left out": self.name})

    def case_id(self, level: str) -> str:
        return digest({"case": self.name, "level": level})


def put(store: Store, key: str, record: Record) -> None:
    store.put(key, record.to_bytes())


def write_study(store: Store, study: SampleStudy, bundle: SampleBundle, *, crops: Any = None) -> None:
    """Plans, cases, crops and outcomes of a study; `crops` (level → (image, mask)) replaces the drawn ellipsoids."""
    demographics = Demographics(age_years=study.age, sex=study.sex)
    series = [
        PlannedSeries(
            series_id=study.series_id,
            manifest_id=study.manifest_id,
            modality="CT",
            instances=120,
            description=study.description,
        )
    ]
    if study.left_out is not None:
        series.append(
            PlannedSeries(
                series_id=study.left_out_id,
                manifest_id=study.manifest_id,
                modality="CT",
                instances=2,
                rejected=True,
                description="CT, 2 instances",
            )
        )
        put(
            store,
            keys.series_rejected(study.left_out_id, study.manifest_id),
            Rejection(service="dicom-ingest", reasons=(study.left_out,)),
        )
    plan = StudyPlan(study_id=study.study_id, revision=1, demographics=demographics, series=tuple(series))
    put(store, keys.revision(keys.study_plans(study.study_id), 1), plan)
    mask_hash = digest({"mask": study.name})
    put(
        store,
        keys.revision(keys.series_plans(study.series_id), 1),
        SeriesPlan(
            study_id=study.study_id,
            series_id=study.series_id,
            manifest_id=study.manifest_id,
            mask_hash=mask_hash,
            revision=1,
            cases=tuple(PlannedCase(case_id=study.case_id(c.level), level=c.level) for c in study.cases),
        ),
    )
    put(
        store,
        keys.mask_record(study.series_id, mask_hash),
        MaskRecord(
            series_id=study.series_id,
            mask_hash=mask_hash,
            source="dicom-seg",
            roi_kind="body",
            levels={c.level: n for n, c in enumerate(study.cases, start=1)},
            ignored_labels=3,
        ),
    )
    for case in study.cases:
        write_case(store, study, case, bundle, mask_hash=mask_hash)
        if case.with_crop:
            image, mask = (crops or {}).get(case.level) or ellipsoid()
            store.put(keys.case_image(bundle.protocols.crop_hash, study.case_id(case.level)), to_nrrd(image))
            store.put(keys.case_mask(bundle.protocols.crop_hash, study.case_id(case.level)), to_nrrd(mask))
        write_end(store, study, case, bundle)


def write_case(store: Store, study: SampleStudy, case: SampleCase, bundle: SampleBundle, *, mask_hash: str) -> None:
    put(
        store,
        keys.case_record(bundle.protocols.crop_hash, study.case_id(case.level)),
        CaseRecord(
            case_id=study.case_id(case.level),
            study_id=study.study_id,
            series_id=study.series_id,
            manifest_id=study.manifest_id,
            image_hash=digest("image"),
            mask_hash=mask_hash,
            mask_source="dicom-seg",
            patient_id=digest("patient"),
            level=case.level,
            crop_hash=bundle.protocols.crop_hash,
            roi_kind="body",
            volume_ml=27.4,
            source_spacing_zyx=(1.0, 0.7, 0.7),
            acquisition=Acquisition(kvp=120.0, convolution_kernel="B60"),
            demographics=Demographics(age_years=study.age, sex=study.sex),
            warnings=case.warnings,
        ),
    )


def write_end(store: Store, study: SampleStudy, case: SampleCase, bundle: SampleBundle) -> None:
    case_id, scope = study.case_id(case.level), bundle.protocols.scope
    records: dict[str, Record] = {
        "classified": Classified(
            case_id=case_id,
            study_id=study.study_id,
            series_id=study.series_id,
            level=case.level,
            protocols=bundle.protocols,
            classification=classification(study, case, bundle).model_dump(mode="json", exclude_defaults=True),
        ),
        "not-evaluated": NotEvaluated(
            case_id=case_id, kind="guard", service="resampler", reasons=(case.reason,), codes=("border",)
        ),
        "rejected": Rejection(service="deep-extractor", reasons=(case.reason,)),
        "dead-lettered": DeadLetterNote(
            dead_letter_id=digest("letter"),
            queue="radiomics-extractor.dead",
            kind="delivery-limit",
            reason=case.reason,
            attempts=1,
        ),
    }
    if case.end != "pending":
        put(store, keys.outcome(case.end, scope, case_id), records[case.end])


def classification(study: SampleStudy, case: SampleCase, bundle: SampleBundle) -> Classification:
    probability = sigmoid(case.score)
    threshold = bundle.manifest.threshold
    known = study.age is not None and study.sex is not None
    indeterminate = case.prediction_set is not None and len(case.prediction_set) != 1
    return Classification(
        bundle_id=bundle.manifest.bundle_id,
        bundle_kind=bundle.manifest.kind,
        probability=probability,
        hcr_probability=sigmoid(case.score * 0.7 - 0.2),
        dtl_probability=sigmoid(case.score * 0.6 + 0.3),
        score=case.score,
        hcr_score=case.score * 0.7 - 0.2,
        dtl_score=case.score * 0.6 + 0.3,
        threshold=threshold,
        predicted="acute" if probability >= threshold else "chronic",
        contributions=tuple(
            Contribution(feature=name, value=value, z=amount * 1.4, contribution=amount)
            for name, value, amount in (
                ("wavelet-HLL_glcm_Correlation", 0.4132, 0.91),
                ("pca_003", -4.81, -0.62),
                ("original_shape_Flatness", 0.57, 0.41),
                ("log-sigma-3-0-mm-3D_firstorder_90Percentile", 183.2, 0.33),
                ("squareroot_gldm_DependenceNonUniformityNormalized", 0.0713, -0.21),
                ("pca_000", 12.4, 0.12),
            )
        ),
        selected_features=24,
        outside_range=(OutsideRange(feature="original_shape_Flatness", value=0.57, low=0.61, high=0.93),),
        nomogram=read_points(bundle.nomogram, age=float(study.age or 0), sex=study.sex or "F", score=case.score)
        if known
        else None,
        nomogram_absent=None if known else "the patient's age is not known",
        flags=(
            RESEARCH_FLAG,
            DEMO_FLAG,
            *([INDETERMINATE_FLAG] if indeterminate else []),
            "1 of 24 selected features lie outside the range seen in training",
        ),
        prediction_set=case.prediction_set,
        indeterminate=indeterminate,
        score_kind=case.score_kind,
        classifier=case.classifier,
    )


def ellipsoid() -> tuple[Volume, Mask]:
    """A bright ellipsoid of 20 x 24 x 30 mm in a grey box, on the crop's kind of grid."""
    z, y, x = np.mgrid[0:44, 0:50, 0:56].astype(float)
    inside = ((z - 21) / 10) ** 2 + ((y - 24) / 12) ** 2 + ((x - 27) / 15) ** 2 <= 1
    hu = np.where(inside, 250, 40).astype(np.int16)
    geometry = Geometry(
        shape_zyx=(44, 50, 56),
        spacing_zyx=(1.0, 1.0, 1.0),
        origin_zyx=(0.0, 0.0, 0.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    return Volume(voxels=hu, geometry=geometry), Mask(voxels=inside.astype(np.uint8), geometry=geometry)


def write_identity(store: Store, study: SampleStudy, **values: str) -> None:
    named = {
        "patient_name": "MUSTERFRAU^ERIKA^^DR",
        "patient_id": "PID-4711",
        "accession_number": "ACC-0815",
        "study_date": "20261122",
    }
    identity = StudyIdentity(study_id=study.study_id, **{**named, **values})
    put(store, keys.study_identity(study.study_id, digest(identity.model_dump(mode="json"))), identity)


def write_sweep(
    store: Store, name: str, studies: Sequence[SampleStudy], bundle: SampleBundle, *, closed: bool = False
) -> str:
    """A sweep over the studies; its id."""
    sweep_id = digest({"sweep": name})
    references = [
        SweepSeries(study_id=study.study_id, series_id=series_id, manifest_id=study.manifest_id)
        for study in studies
        for series_id in ((study.series_id, study.left_out_id) if study.left_out is not None else (study.series_id,))
    ]
    put(
        store,
        keys.revision(keys.sweep_plans(sweep_id), 1),
        SweepPlan(
            sweep_id=sweep_id,
            revision=1,
            protocols=bundle.protocols,
            series=tuple(references),
            files=FileCounts(found=130, in_series=122, ignored={"not a DICOM file": 8}),
            planned_at=NOON,
        ),
    )
    for study in studies:
        store.put(keys.sweep_of_study(study.study_id, sweep_id), b"{}")
    if closed:
        close_sweep(store, sweep_id)
    return sweep_id


def close_sweep(store: Store, sweep_id: str) -> None:
    closing = SweepClosing(sweep_id=sweep_id, revision=1, closed_at=NOON, pending=0)
    put(store, keys.revision(keys.sweep_closed(sweep_id), 1), closing)


def fact_of(study: SampleStudy, bundle: SampleBundle, *, level: str | None = None, end: End | None = None) -> Fact:
    """The fact that ended one case of a study (its last one, unless told)."""
    last = study.cases[-1]
    ids: dict[str, Any] = {
        "study_id": study.study_id,
        "series_id": study.series_id,
        "case_id": study.case_id(level or last.level),
        "protocols": bundle.protocols,
    }
    match end or last.end:
        case "not-evaluated":
            return CaseNotEvaluated(**ids)
        case "rejected":
            return CaseRejected(**ids)
        case "dead-lettered":
            return CaseDeadLettered(**ids)
        case _:
            return FractureClassified(**ids)
