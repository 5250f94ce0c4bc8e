"""Acute or chronic: what a bundle says of one fractured vertebra, from its two feature vectors alone.

Pure float64 arithmetic without BLAS, and classifiers one row at a time, so that the same case gives the same bits on
every worker. Nothing is fitted here; every number comes out of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from shared.fracture.bundle import (
    Bundle,
    BundleKind,
    ClassifierKind,
    ClassName,
    ScoreKind,
    check_features,
    evaluate,
)
from shared.fracture.features import FeatureVector
from shared.fracture.nomogram import NomogramReading, Sex, read_points
from shared.fracture.records import Acquisition, Warned

TOP_CONTRIBUTIONS: Final = 10
DEMO_FLAG: Final = "trained on synthetic phantoms; no clinical meaning"
RESEARCH_FLAG: Final = "research use only"
INDETERMINATE_FLAG: Final = "indeterminate: MRI recommended"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Contribution(_Frozen):
    """How far one feature pushed the fusion's linear score: coef · z, above zero towards acute.

    In log odds where the score is logistic, not where it is a LASSO's (`Classification.score_kind`).
    """

    feature: str
    value: float
    z: float
    contribution: float


class OutsideRange(_Frozen):
    """A selected feature whose value no training case reached."""

    feature: str
    value: float
    low: float
    high: float


class Classification(_Frozen):
    """The whole answer for one case.

    `probability`: P(acute) of the fusion model; `score`: its linear score (rad-score). `predicted` is acute where
    `probability` reaches the bundle's frozen `threshold`. Either `nomogram` stands, or `nomogram_absent` says why not.
    `prediction_set`: the classes that the bundle's conformal limits do not rule out, None where it has none;
    `indeterminate` where they are not exactly one. `classifier`: what gives `probability` beside the linear score,
    None where it is the linear score itself.
    """

    bundle_id: str
    bundle_kind: BundleKind
    probability: float
    hcr_probability: float
    dtl_probability: float
    score: float
    hcr_score: float
    dtl_score: float
    threshold: float
    predicted: ClassName
    contributions: tuple[Contribution, ...]
    """The features that pushed the fusion score most, the strongest first."""
    selected_features: int
    outside_range: tuple[OutsideRange, ...]
    nomogram: NomogramReading | None
    nomogram_absent: str | None
    flags: tuple[str, ...]
    prediction_set: tuple[ClassName, ...] | None = None
    indeterminate: bool = False
    score_kind: ScoreKind = "logistic"
    classifier: ClassifierKind | None = None

    @property
    def outside_fraction(self) -> float:
        """The share of the selected features that lie outside the training range, 0 to 1."""
        return len(self.outside_range) / self.selected_features


def score(
    bundle: Bundle, *, hcr: FeatureVector, dtl: FeatureVector, age: int | None, sex: str | None
) -> Classification:
    """The classification of one case; `age` in whole years, `sex` "F" or "M", each None where unknown.

    ValueError where a vector is of another list or protocol than the bundle's; RuntimeError where the bundle has ONNX
    classifiers and is not `running`.
    """
    check_features(bundle, hcr=hcr, dtl=dtl)
    models = bundle.models
    named = {name: float(value) for name, value in zip(hcr.names, hcr.values, strict=True)}
    outputs = evaluate(models, hcr=named, dtl=dtl.values, classifiers=bundle.classifiers)
    outside = _outside_range(bundle, outputs.values)
    selected = len(models.selected)
    nomogram, absent = _nomogram(bundle, age=age, sex=sex, fusion_score=outputs.fusion_score)
    threshold = bundle.manifest.threshold
    possible = None if models.conformal is None else models.conformal.prediction_set(outputs.fusion_probability)
    indeterminate = possible is not None and len(possible) != 1
    classifier = models.fusion.classifier
    return Classification(
        bundle_id=bundle.bundle_id,
        bundle_kind=bundle.manifest.kind,
        probability=outputs.fusion_probability,
        hcr_probability=outputs.hcr_probability,
        dtl_probability=outputs.dtl_probability,
        score=outputs.fusion_score,
        hcr_score=outputs.hcr_score,
        dtl_score=outputs.dtl_score,
        threshold=threshold,
        predicted="acute" if outputs.fusion_probability >= threshold else "chronic",
        contributions=_contributions(bundle, outputs.values),
        selected_features=selected,
        outside_range=outside,
        nomogram=nomogram,
        nomogram_absent=absent,
        flags=_flags(
            bundle,
            outside=len(outside),
            selected=selected,
            age=None if nomogram is None else age,
            indeterminate=indeterminate,
        ),
        prediction_set=possible,
        indeterminate=indeterminate,
        score_kind=models.fusion.score_kind,
        classifier=None if classifier is None else classifier.kind,
    )


def acquisition_warnings(bundle: Bundle, acquisition: Acquisition) -> tuple[Warned, ...]:
    """What the scanner did that no training case had: a kernel, or a tube voltage (METHOD 10)."""
    training = bundle.manifest.training
    warnings = []
    kernel, kvp = acquisition.convolution_kernel, acquisition.kvp
    if kernel is not None and training.kernels and kernel not in training.kernels:
        warnings.append(Warned(code="kernel", sentence="the reconstruction kernel is not among those seen in training"))
    if kvp is not None and training.kvp and not any(abs(kvp - seen) < 0.5 for seen in training.kvp):
        warnings.append(Warned(code="kvp", sentence=f"the tube voltage of {kvp:g} kV was not seen in training"))
    return tuple(warnings)


def _contributions(bundle: Bundle, values: Mapping[str, float]) -> tuple[Contribution, ...]:
    model = bundle.models.fusion
    z = model.z(values)
    pushed = sorted(model.contributions(values).items(), key=lambda item: (-abs(item[1]), item[0]))
    return tuple(
        Contribution(feature=name, value=values[name], z=z[name], contribution=amount)
        for name, amount in pushed[:TOP_CONTRIBUTIONS]
    )


def _outside_range(bundle: Bundle, values: Mapping[str, float]) -> tuple[OutsideRange, ...]:
    ranges = bundle.distribution.features
    return tuple(
        OutsideRange(feature=name, value=values[name], low=ranges[name].low, high=ranges[name].high)
        for name in bundle.models.selected
        if not ranges[name].low <= values[name] <= ranges[name].high
    )


def _nomogram(
    bundle: Bundle, *, age: int | None, sex: str | None, fusion_score: float
) -> tuple[NomogramReading | None, str | None]:
    known: Sex | None = "F" if sex == "F" else "M" if sex == "M" else None
    if age is not None and known is not None:
        return read_points(bundle.nomogram, age=float(age), sex=known, score=fusion_score), None
    missing: Literal["age and sex", "age", "sex"]
    missing = "age and sex" if age is None and known is None else "age" if age is None else "sex"
    return None, f"the patient's {missing} {'are' if missing == 'age and sex' else 'is'} not known"


def _flags(bundle: Bundle, *, outside: int, selected: int, age: int | None, indeterminate: bool) -> tuple[str, ...]:
    flags = [RESEARCH_FLAG]
    if bundle.manifest.kind == "DEMO":
        flags.append(DEMO_FLAG)
    if indeterminate:
        flags.append(INDETERMINATE_FLAG)
    if outside:
        flags.append(f"{outside} of {selected} selected features lie outside the range seen in training")
    low, high = bundle.nomogram.age_range
    if age is not None and not low <= age <= high:
        flags.append("the patient's age lies outside the range seen in training")
    return tuple(flags)
