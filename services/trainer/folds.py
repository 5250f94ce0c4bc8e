"""Folds of cross-validation. The unit is the patient: nobody's vertebrae lie on both sides of one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from services.trainer.cohort_table import TooSmall

Integers = NDArray[np.int64]
Folds = list[tuple[NDArray[np.intp], NDArray[np.intp]]]
"""The rows to fit on and the rows left out, fold by fold."""


def patients_by_class(patient: Integers, acute: Integers) -> tuple[int, int]:
    """How many patients have an acute, and how many a chronic fracture."""
    return len(np.unique(patient[acute == 1])), len(np.unique(patient[acute == 0]))


def patient_folds(patient: Integers, folds: int, *, step: str) -> Folds:
    """Folds of whole patients, whatever their class; TooSmall where there are fewer patients than folds."""
    there = len(np.unique(patient))
    if there < folds:
        raise TooSmall(step, needs=f"{folds} patients, one a fold", has=f"{there}")
    return list(GroupKFold(n_splits=folds).split(patient, groups=patient))


def stratified_folds(patient: Integers, acute: Integers, folds: int, *, seed: int) -> Folds:
    """Folds of whole patients with the classes spread evenly, as far as whole patients allow."""
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(acute)), acute, groups=patient))


def fold_numbers(patient: Integers, acute: Integers, folds: int, *, seed: int) -> Integers:
    """The stratified fold in which each row is left out, from 1 on."""
    found = np.zeros(len(acute), dtype=np.int64)
    for number, (_, left_out) in enumerate(stratified_folds(patient, acute, folds, seed=seed), start=1):
        found[left_out] = number
    return found
