"""External validation: a bundle's four models on another cohort, with nothing fitted, by the services' arithmetic."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Final, Literal

import numpy as np

from services.trainer.cohort_table import CohortTable
from services.trainer.results import Demographic, Evaluation, FlowStep, ModelName, Scored
from services.trainer.selection import Matrix
from shared.fracture.bundle import Bundle, evaluate
from shared.fracture.nomogram import Sex, read_points


def probabilities(bundle: Bundle, table: CohortTable, dtl: Matrix) -> Mapping[ModelName, Matrix]:
    """P(acute) of each row by model. `bundle` must be running; `dtl` (n, features) under the bundle's DTL protocol."""
    if table.hcr_names != bundle.hcr_features:
        raise ValueError("the cohort's features have other names than the bundle's")
    found: dict[ModelName, list[float]] = {"radiomics": [], "dlr": [], "fusion": [], "dlrn": []}
    for row in range(len(table)):
        hcr = dict(zip(table.hcr_names, map(float, table.hcr[row]), strict=True))
        got = evaluate(bundle.models, hcr=hcr, dtl=dtl[row], classifiers=bundle.classifiers)
        sex: Sex = "M" if table.male[row] else "F"
        read = read_points(bundle.nomogram, age=float(table.age[row]), sex=sex, score=got.fusion_score)
        found["radiomics"].append(got.hcr_probability)
        found["dlr"].append(got.dtl_probability)
        found["fusion"].append(got.fusion_probability)
        found["dlrn"].append(read.probability)
    return {name: np.array(values) for name, values in found.items()}


def scored(bundle: Bundle, table: CohortTable, dtl: Matrix) -> tuple[Scored, ...]:
    """The same as results, at the bundle's frozen thresholds."""
    limits = bundle.models.thresholds
    fusion = bundle.manifest.threshold
    thresholds: dict[ModelName, float] = {
        "radiomics": fusion if limits is None else limits.hcr,
        "dlr": fusion if limits is None else limits.dtl,
        "fusion": fusion,
        "dlrn": fusion if limits is None else limits.nomogram,
    }
    return tuple(
        Scored(
            model=name,
            part="test",
            patient=tuple(int(number) for number in table.patient),
            acute=tuple(int(label) for label in table.acute),
            probability=tuple(float(value) for value in values),
            threshold=thresholds[name],
        )
        for name, values in probabilities(bundle, table, dtl).items()
    )


def demographics(table: CohortTable, part: Sequence[Literal["train", "test"]]) -> tuple[Demographic, ...]:
    """The rows of Table 1; `part` of each row."""
    return tuple(
        Demographic(
            patient=int(table.patient[row]),
            part=part[row],
            acute=bool(table.acute[row]),
            age=float(table.age[row]),
            male=bool(table.male[row]),
            level=table.level[row],
            site=table.site[row],
        )
        for row in range(len(table))
    )


BOOTSTRAPS: Final = 2000
SEED: Final = 2023


def evaluation(
    bundle: Bundle,
    table: CohortTable,
    dtl: Matrix,
    *,
    flow: tuple[FlowStep, ...],
    phantom: bool,
    sha256: str,
    warnings: tuple[str, ...] = (),
) -> Evaluation:
    """All that is said of a `running` bundle on a cohort. `dtl` (n, features); `sha256` of COHORT.csv."""
    manifest = bundle.manifest
    found = scored(bundle, table, dtl)
    (fusion,) = [one for one in found if one.model == "fusion"]
    limits = bundle.models.conformal
    sets = [] if limits is None else [limits.prediction_set(value) for value in fusion.probability]
    trained_on_phantoms = manifest.kind == "DEMO"
    said = list(warnings)
    if phantom:
        said.insert(0, "All images are synthetic phantoms: no number here says anything about patients.")
    if trained_on_phantoms:
        said.insert(0, "The bundle was trained on synthetic phantoms and has no clinical meaning.")
    return Evaluation(
        title=f"{manifest.name} {manifest.version} on another cohort",
        phantom=phantom or trained_on_phantoms,
        bundle={
            "bundle_id": bundle.bundle_id,
            "name": manifest.name,
            "version": manifest.version,
            "kind": manifest.kind,
            "preset": manifest.preset,
        },
        seed=SEED,
        bootstraps=BOOTSTRAPS,
        versions={
            "Python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "scipy", "onnxruntime", "fracture-sweep")},
        },
        hashes={
            "crop protocol": manifest.crop.crop_hash,
            "HCR protocol": manifest.hcr.hcr_hash,
            "DTL protocol": manifest.dtl.dtl_hash,
            "COHORT.csv": sha256,
        },
        flow=flow,
        cohort=demographics(table, ["test"] * len(table)),
        scores=found,
        indeterminate=sum(1 for one in sets if len(one) != 1),
        warnings=tuple(said),
    )
