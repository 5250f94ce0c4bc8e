"""Which features a second reading of the same vertebra gives again: ICC(2,1), intra- and inter-observer (METHOD 4).

The readings are the columns mask2 and mask3 of training rows; without them perturbed masks stand in for a second
reader, which the report says. A feature that varies in no reading cannot be judged, and goes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np

from services.trainer.cohort_table import CohortTable, Repeat, Repeated, TooSmall
from services.trainer.results import IccValue, Repeatability
from services.trainer.settings import RepeatabilitySettings
from services.trainer.statistics import Icc, icc_agreement

LEAST_CASES: Final = 5
"""With fewer repeated cases an ICC says nothing."""


def repeatability(training: CohortTable, settings: RepeatabilitySettings) -> Repeatability:
    """The features of training rows whose every ICC(2,1) reaches the limit; TooSmall with too few repeats."""
    repeats: Mapping[Repeated, Repeat] = {} if settings.method == "none" else training.repeats
    if not repeats:
        return Repeatability(
            method="none", limit=settings.limit, cases={}, features=training.hcr_names, kept=training.hcr_names
        )
    found: dict[str, tuple[IccValue | None, ...]] = {}
    good = np.ones(len(training.hcr_names), dtype=bool)
    for name, repeat in sorted(repeats.items()):
        if len(repeat.rows) < LEAST_CASES:
            raise TooSmall(
                f"repeatability ({name})",
                needs=f"{LEAST_CASES} training rows with a repeated mask",
                has=f"{len(repeat.rows)}; or set repeatability.method to none",
            )
        icc = icc_agreement(np.stack([training.hcr[repeat.rows], repeat.hcr], axis=1))
        with np.errstate(invalid="ignore"):
            good &= icc.value >= settings.limit
        found[name] = _values(icc)
    kept = tuple(name for name, stays in zip(training.hcr_names, good, strict=True) if stays)
    if not kept:
        raise TooSmall("repeatability", needs=f"a feature with an ICC of {settings.limit:g}", has="none")
    return Repeatability(
        method="perturbation" if training.perturbed else "masks",
        limit=settings.limit,
        cases={name: len(repeat.rows) for name, repeat in sorted(repeats.items())},
        features=training.hcr_names,
        intra=found.get("intra", ()),
        inter=found.get("inter", ()),
        kept=kept,
    )


def _values(icc: Icc) -> tuple[IccValue | None, ...]:
    triples = zip(icc.value, icc.low, icc.high, strict=True)
    return tuple(
        IccValue(value=float(value), low=float(low), high=float(high))
        if all(math.isfinite(number) for number in (value, low, high))
        else None
        for value, low, high in triples
    )
