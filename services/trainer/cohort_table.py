"""A cohort as arrays: one row a fractured vertebra. Where it came from is forgotten here; what fits knows only this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shared.pipeline.errors import FractureSweepError

Repeated = Literal["intra", "inter"]


class TooSmall(FractureSweepError):
    """A cohort is too small for a step; the text says which step, what it needs and what it has."""

    def __init__(self, step: str, *, needs: str, has: str) -> None:
        super().__init__(f"the cohort is too small for the step {step}: it needs {needs}, and there is {has}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Repeat:
    """Features of some rows under another mask: `rows` (m,) places in the cohort, `hcr` (m, features)."""

    rows: NDArray[np.int64]
    hcr: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class CohortTable:
    """n vertebrae. `patient` (n,) numbers of the patients; `acute` (n,) 0 or 1; `age` years; `male` 0.0 or 1.0.

    `hcr` (n, features) float64 in the order of `hcr_names`; `images` (n, size, size) float32, the network's input.
    `split`: "train" or "test" where the cohort says so, else "". `repeats`: the same reader again (intra, of mask2),
    another reader (inter, of mask3); or under "intra" alone perturbed masks, then `perturbed` is true.
    `kernel` and `kvp` (nan where unknown) are those of the series.
    """

    case_id: tuple[str, ...]
    patient: NDArray[np.int64]
    site: tuple[str, ...]
    split: tuple[str, ...]
    level: tuple[str, ...]
    acute: NDArray[np.int64]
    age: NDArray[np.float64]
    male: NDArray[np.float64]
    kernel: tuple[str, ...]
    kvp: NDArray[np.float64]
    hcr_names: tuple[str, ...]
    hcr: NDArray[np.float64]
    images: NDArray[np.float32]
    repeats: Mapping[Repeated, Repeat] = field(default_factory=dict)
    perturbed: bool = False

    def __len__(self) -> int:
        return len(self.acute)

    def part(self, rows: NDArray[np.bool_]) -> CohortTable:
        """Some of the rows, with the repeats that belong to them."""
        place = np.cumsum(rows) - 1
        kept = {}
        for name, repeat in self.repeats.items():
            inside = rows[repeat.rows]
            kept[name] = Repeat(rows=place[repeat.rows[inside]].astype(np.int64), hcr=repeat.hcr[inside])
        chosen = np.flatnonzero(rows)
        return replace(
            self,
            case_id=tuple(self.case_id[n] for n in chosen),
            patient=self.patient[rows],
            site=tuple(self.site[n] for n in chosen),
            split=tuple(self.split[n] for n in chosen),
            level=tuple(self.level[n] for n in chosen),
            acute=self.acute[rows],
            age=self.age[rows],
            male=self.male[rows],
            kernel=tuple(self.kernel[n] for n in chosen),
            kvp=self.kvp[rows],
            hcr=self.hcr[rows],
            images=self.images[rows],
            repeats=kept,
        )
