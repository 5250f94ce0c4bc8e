"""External validation: a bundle's four models on another cohort, with nothing fitted, by the services' arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from services.trainer.cohort_table import CohortTable
from services.trainer.results import ModelName, Scored
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
