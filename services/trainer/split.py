"""Training and test patients. The unit of the split is the patient: no one's vertebrae lie on both sides."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from services.trainer.cohort_table import CohortTable
from services.trainer.settings import SplitSettings, TrainingSettings
from shared.pipeline.errors import FractureSweepError


def held_out(
    patient: NDArray[np.int64], acute: NDArray[np.int64], *, share: float = 0.2, seed: int
) -> NDArray[np.bool_]:
    """Which rows belong to the test patients: a `share` of the patients with acute, chronic, and both kinds each."""
    strata: dict[tuple[bool, bool], list[int]] = {}
    for number in np.unique(patient):
        classes = acute[patient == number]
        strata.setdefault((bool(classes.any()), bool((classes == 0).any())), []).append(int(number))
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for _, members in sorted(strata.items()):
        order = rng.permutation(len(members))
        chosen += [members[place] for place in order[: round(share * len(members))]]
    return np.isin(patient, chosen)


class SplitError(FractureSweepError):
    """The cohort cannot be split as it was asked for."""


def held_out_rows(
    *,
    patient: NDArray[np.int64],
    acute: NDArray[np.int64],
    split: Sequence[str],
    site: Sequence[str],
    settings: SplitSettings,
    seed: int,
) -> NDArray[np.bool_]:
    """Which rows are held out, by the settings (all arguments have one entry a row). SplitError where it cannot be.

    random: a stratified share of the patients; column: rows whose `split` is test; site: all rows of `test_site`.
    """
    if settings.by == "random":
        return held_out(patient, acute, share=settings.test_share, seed=seed)
    if settings.by == "column":
        if set(split) - {"train", "test"}:
            raise SplitError("the cohort is split by its column `split`, which is not train or test in every row")
        test = np.array([value == "test" for value in split], dtype=np.bool_)
    else:
        if not settings.test_site:
            raise SplitError("the cohort is split by site: name the site that is held out (split.test_site)")
        if settings.test_site not in site:
            known = ", ".join(sorted({name for name in site if name})) or "none"
            raise SplitError(
                f"no row is of the site {settings.test_site!r} that is to be held out (there are: {known})"
            )
        test = np.array([name == settings.test_site for name in site], dtype=np.bool_)
    check_disjoint(test, {"patient": [int(number) for number in patient]})
    return test


def held_out_of(table: CohortTable, settings: TrainingSettings) -> NDArray[np.bool_]:
    """The same of a cohort's table."""
    return held_out_rows(
        patient=table.patient,
        acute=table.acute,
        split=table.split,
        site=table.site,
        settings=settings.split,
        seed=settings.seed,
    )


def check_disjoint(test: NDArray[np.bool_], groups: Mapping[str, Sequence[Hashable]]) -> None:
    """SplitError where a patient, study, accession or image lies on both sides. `groups`: name → one entry a row.

    Empty entries ('') are unknown and belong to nothing. The error holds counts, never the entries.
    """
    for name, entries in groups.items():
        if len(entries) != len(test):
            raise ValueError(f"{len(entries)} entries of {name} for {len(test)} rows")
        held = {entry for entry, out in zip(entries, test, strict=True) if out and entry != ""}
        both = held & {entry for entry, out in zip(entries, test, strict=True) if not out}
        if both:
            raise SplitError(f"training and test rows are not apart by {name}: {len(both)} on both sides")
