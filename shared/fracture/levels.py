"""Vertebral levels and the label maps that name them (METHOD 1).

A level is "C1"…"C7", "T1"…"T13", "L1"…"L6", "S1", or "B01", "B02", … (the n-th visible from below, where the level
is uncertain).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

SCORED_LEVELS: Final[tuple[str, ...]] = tuple([f"T{n}" for n in range(1, 13)] + [f"L{n}" for n in range(1, 6)])
"""The levels that the method answers for: T1 to L5, from above."""

ORDER: Final[tuple[str, ...]] = (
    *(f"C{n}" for n in range(1, 8)),
    *(f"T{n}" for n in range(1, 14)),
    *(f"L{n}" for n in range(1, 7)),
    "S1",
)

TOTALSEG: Final[Mapping[int, str]] = {
    26: "S1",
    **{27 + n: f"L{5 - n}" for n in range(5)},
    **{32 + n: f"T{12 - n}" for n in range(12)},
    **{44 + n: f"C{7 - n}" for n in range(7)},
}
"""TotalSegmentator task `total`: 26 = S1, 27…31 = L5…L1, 32…43 = T12…T1, 44…50 = C7…C1."""

TOTALSEG_LABELS: Final[range] = range(1, 118)
"""All 117 labels of the task; those that are no vertebra are ignored with one count."""

VERSE: Final[Mapping[int, str]] = {
    **{n: f"C{n}" for n in range(1, 8)},
    **{7 + n: f"T{n}" for n in range(1, 13)},
    **{19 + n: f"L{n}" for n in range(1, 7)},
    28: "T13",
}
"""VerSe: 1–7 C, 8–19 T1–T12, 20–25 L1–L6, 28 = T13 (26 = sacrum and 27 = coccyx are known and no vertebra)."""

VERSE_OTHER: Final[tuple[int, ...]] = (26, 27)


@dataclass(frozen=True, kw_only=True)
class LevelTable:
    """Value of a label map → level; `others` are values that the map knows and that are no vertebra."""

    levels: Mapping[int, str]
    others: frozenset[int] = field(default_factory=frozenset)


KNOWN_TABLES: Final[Mapping[str, LevelTable]] = {
    "totalseg": LevelTable(levels=TOTALSEG, others=frozenset(TOTALSEG_LABELS) - frozenset(TOTALSEG)),
    "verse": LevelTable(levels=VERSE, others=frozenset(VERSE_OTHER)),
}
"""By the names that a user gives them."""


def is_uncertain(level: str) -> bool:
    """Whether a level only says which body from below it is."""
    return level not in ORDER and level.startswith("B")


def sort_key(level: str) -> tuple[int, str]:
    """Orders levels from head to foot; uncertain ones last, from below."""
    return (ORDER.index(level), level) if level in ORDER else (len(ORDER), level)
