"""Which value of a NIfTI label map is which vertebra: TotalSegmentator's, VerSe's, or the user's own in JSON.

The map is always named by the user, never told from the values: 26 is S1 in one and the sacrum in the other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from shared.fracture.levels import KNOWN_TABLES, ORDER, LevelTable
from shared.pipeline.errors import FractureSweepError

LARGEST_LABEL: Final = 65535
_UNCERTAIN = re.compile(r"B\d\d")
_LARGEST_FILE: Final = 1_000_000


class LabelMapError(FractureSweepError):
    """A label map cannot be read; the text lists all its faults."""


class LabelMap(LevelTable):
    """A table that the values of a mask are sorted by."""

    def sort_values(self, values: Iterable[int]) -> tuple[dict[int, str], int, tuple[str, ...]]:
        """The values found in a mask (0 left out): those with a level, the count of known others, the unknown named."""
        found = sorted({value for value in values if value != 0})
        named = {value: self.levels[value] for value in found if value in self.levels}
        ignored = sum(1 for value in found if value not in self.levels and value in self.others)
        unknown = tuple(str(value) for value in found if value not in self.levels and value not in self.others)
        return named, ignored, unknown


BUILT_IN: Final[Mapping[str, LabelMap]] = {
    name: LabelMap(levels=table.levels, others=table.others) for name, table in KNOWN_TABLES.items()
}
TOTALSEG_MAP: Final = BUILT_IN["totalseg"]
VERSE_MAP: Final = BUILT_IN["verse"]


def load_label_map(name: str, *, base: Path) -> LabelMap:
    """The label map of a name (`totalseg`, `verse`) or of a JSON file, whose path is relative to `base`.

    The file: {"20": "L1", "21": "L2", "99": null}; null = known and no vertebra. Raises LabelMapError.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = base / name
    if path.suffix.lower() != ".json":
        raise LabelMapError(f"unknown label map {name!r}: say totalseg, verse, or the path of a .json file")
    if not path.is_file():
        raise LabelMapError(f"the label map {name!r} does not exist")
    if path.stat().st_size > _LARGEST_FILE:
        raise LabelMapError(f"the label map {name!r} is larger than {_LARGEST_FILE} bytes: this is no label map")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LabelMapError(f"the label map {name!r} cannot be read as UTF-8 text") from error
    try:
        return parse_label_map(text)
    except LabelMapError as error:
        raise LabelMapError(f"the label map {name!r}: {error}") from error


def parse_label_map(text: str) -> LabelMap:
    """The label map in a JSON text. Raises LabelMapError with all faults at once."""
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                twice.append(key)
            seen[key] = value
        return seen

    try:
        content = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise LabelMapError("is no JSON") from error
    if not isinstance(content, dict) or not content:
        raise LabelMapError('must be a JSON object like {"20": "L1", "21": "L2"}')

    faults = [f"value {_shown(key)} stands twice" for key in twice]
    levels: dict[int, str] = {}
    others: set[int] = set()
    for key, level in content.items():
        value = int(key) if re.fullmatch(r"[0-9]{1,5}", key) else -1
        if not 1 <= value <= LARGEST_LABEL:
            faults.append(f"{_shown(key)} is no label value (a whole number from 1 to {LARGEST_LABEL})")
        elif value in levels or value in others:
            faults.append(f"value {value} stands twice")
        elif level is None:
            others.add(value)
        elif not isinstance(level, str) or not is_level(level):
            faults.append(f"value {value}: {_shown(level)} is no level (C1…C7, T1…T13, L1…L6, S1, B01…, or null)")
        elif level in levels.values():
            faults.append(f"level {level} has two values")
        else:
            levels[value] = level
    if not levels and not faults:
        faults.append("names no vertebra")
    if faults:
        raise LabelMapError("; ".join(faults))
    return LabelMap(levels=levels, others=frozenset(others))


def is_level(name: str) -> bool:
    """Whether a name is a level of ours."""
    return name in ORDER or (_UNCERTAIN.fullmatch(name) is not None and name != "B00")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 24 else text[:23] + "…"
