"""Which body of a segmenter is which known one: by what covers it.

Names do not matter, since a slab of five vertebrae shows nothing to count from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

COVERED: Final = 0.5
"""A body is found where one label covers this share of it."""

K = TypeVar("K")


@dataclass(frozen=True, kw_only=True)
class Match:
    """The label that covers a body, the Dice of both, and whether the label covers another known body too."""

    label: int
    dice: float
    merged: bool


def matches(bodies: Mapping[K, NDArray[np.bool_]], labels: NDArray[Any]) -> dict[K, Match]:
    """For each known body that is found in a label map on its grid what covers it."""
    found: dict[K, tuple[int, float]] = {}
    for key, body in bodies.items():
        inside = labels[body]
        counts = np.bincount(inside, minlength=1)
        counts[0] = 0
        label = int(counts.argmax())
        if len(inside) and counts[label] >= COVERED * len(inside):
            found[key] = label, float(2 * counts[label] / (len(inside) + int((labels == label).sum())))
    of_label = Counter(label for label, _ in found.values())
    return {key: Match(label=label, dice=dice, merged=of_label[label] > 1) for key, (label, dice) in found.items()}
