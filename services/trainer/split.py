"""Training and test patients. The unit of the split is the patient: no one's vertebrae lie on both sides."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
