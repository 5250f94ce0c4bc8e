"""How often a model is right at a frozen threshold: the table of right and wrong, its shares, and Youden's threshold.

Intervals are Wilson's (1927), which stay inside 0 to 1 and do not collapse where all are right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.trainer.statistics.outcomes import Labels, Scores, check_outcomes

_Z95: Final = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class ConfusionTable:
    """How many are right and wrong; acute is positive."""

    tp: int
    fn: int
    tn: int
    fp: int

    @property
    def cases(self) -> int:
        """All of them."""
        return self.tp + self.fn + self.tn + self.fp


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share with its 95 % interval; `count` of `of` cases."""

    value: float
    low: float
    high: float
    count: int
    of: int


@dataclass(frozen=True, kw_only=True)
class Performance:
    """What a model reaches at one threshold. A share of no case at all (PPV where none was called) is None."""

    accuracy: Proportion
    sensitivity: Proportion
    specificity: Proportion
    f1: Proportion
    ppv: Proportion | None
    npv: Proportion | None


def confusion(labels: Labels, called: NDArray[np.bool_]) -> ConfusionTable:
    """Labels (n,) of 0 and 1 against what was called acute (n,)."""
    if labels.shape != called.shape:
        raise ValueError(
            f"a table of right and wrong needs one call for each label, got {called.shape}, {labels.shape}"
        )
    positive = labels == 1
    return ConfusionTable(
        tp=int((positive & called).sum()),
        fn=int((positive & ~called).sum()),
        tn=int((~positive & ~called).sum()),
        fp=int((~positive & called).sum()),
    )


def wilson(count: int, of: int) -> Proportion:
    """The share `count` / `of` with Wilson's 95 % interval."""
    if not 0 <= count <= of or of == 0:
        raise ValueError(f"a share needs 0 <= count <= of and at least 1 case, got {count} of {of}")
    share, z2 = count / of, _Z95**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    reach = _Z95 / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    low = 0.0 if count == 0 else middle - reach
    high = 1.0 if count == of else middle + reach
    return Proportion(value=share, low=low, high=high, count=count, of=of)


def performance(table: ConfusionTable) -> Performance:
    """ACC, SEN, SPE, F1, PPV and NPV of a table with both classes, each with Wilson's interval.

    F1 is no share of cases. With J = TP / (TP + FN + FP), which is one, F1 = 2 J / (1 + J) grows with J: its interval
    is that of J, carried over.
    """
    acute, chronic = table.tp + table.fn, table.tn + table.fp
    if acute == 0 or chronic == 0:
        raise ValueError(
            f"sensitivity and specificity need at least 1 case of each class, got {acute} acute and {chronic} chronic"
        )
    called, not_called = table.tp + table.fp, table.tn + table.fn
    overlap = wilson(table.tp, acute + table.fp)
    return Performance(
        accuracy=wilson(table.tp + table.tn, table.cases),
        sensitivity=wilson(table.tp, acute),
        specificity=wilson(table.tn, chronic),
        f1=Proportion(
            value=2 * table.tp / (2 * table.tp + table.fp + table.fn),
            low=2 * overlap.low / (1 + overlap.low),
            high=2 * overlap.high / (1 + overlap.high),
            count=2 * table.tp,
            of=2 * table.tp + table.fp + table.fn,
        ),
        ppv=wilson(table.tp, called) if called else None,
        npv=wilson(table.tn, not_called) if not_called else None,
    )


def youden_threshold(labels: Labels, scores: Scores) -> float:
    """The threshold of largest sensitivity + specificity - 1, half-way between two neighbouring scores.

    Of equal ones the lowest, which is the more sensitive. A case is called acute from the threshold on.
    """
    check_outcomes("a threshold", labels, scores)
    values, place = np.unique(scores, return_inverse=True)
    if len(values) < 2:
        raise ValueError(f"a threshold needs at least two different scores, got {len(values)}")
    below = [np.cumsum(np.bincount(place[labels == one], minlength=len(values)))[:-1] for one in (0, 1)]
    specificity, missed = (part / (labels == one).sum() for one, part in enumerate(below))
    best = int(np.argmax(np.round(specificity - missed, 12)))
    middle = float(values[best] / 2 + values[best + 1] / 2)
    # where two neighbours leave no number between them, the middle may round to the lower one
    return middle if middle > values[best] else float(values[best + 1])
