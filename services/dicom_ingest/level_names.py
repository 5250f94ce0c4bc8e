"""Which vertebra a code or a label names, and whether its body or the whole of it. Never a guess.

Codes: CID 7603 "Vertebra" of PS3.16 (whole vertebrae, SNOMED CT with the retired SNOMED RT), and SNOMED CT's
"Structure of body of … vertebra" as the HL7 CodeX radiotherapy guide lists them for TG-263's VB_ names. Texts: every
word must be known, exactly one level may be named, no number may be left over; "L1-L2 disc" is no vertebra.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from shared.fracture.level_codes import BODY_SCT, VERTEBRA_SCT, VERTEBRA_SRT
from shared.fracture.levels import ORDER
from shared.fracture.protocol import RoiKind


@dataclass(frozen=True, kw_only=True)
class NamedLevel:
    """A level, and what of it (None where the name does not say)."""

    level: str
    kind: RoiKind | None


SOME_VERTEBRA: Final[Mapping[tuple[str, str], RoiKind | None]] = {
    ("SCT", "51282000"): None,
    ("SRT", "T-11510"): None,
    ("SCT", "3572006"): "body",
    ("SCT", "272673000"): None,
    ("SRT", "T-D016E"): None,
}
"""Codes that leave the level to the anatomic region or the label: vertebra, vertebral body, bone."""

_RT_DESIGNATORS: Final = ("SRT", "SNM3", "99SDM")


def scheme_of(designator: str) -> str:
    """One name for the designators of one coding scheme."""
    if designator in _RT_DESIGNATORS:
        return "SRT"
    return "SCT" if designator in ("SCT", "http://snomed.info/sct") else designator


def coded_level(designator: str, value: str) -> NamedLevel | None:
    """The vertebra that a code names; None where it names none."""
    scheme = scheme_of(designator)
    if scheme == "SRT" and value in VERTEBRA_SRT:
        return NamedLevel(level=VERTEBRA_SRT[value], kind="vertebra")
    if scheme == "SCT" and value in VERTEBRA_SCT:
        return NamedLevel(level=VERTEBRA_SCT[value], kind="vertebra")
    if scheme == "SCT" and value in BODY_SCT:
        return NamedLevel(level=BODY_SCT[value], kind="body")
    return None


_VERTEBRA_WORDS: Final = frozenset({"vert", "vertebra", "vertebrae", "vertebral", "vertebralis", "wirbel"})
_FILLERS: Final = _VERTEBRA_WORDS | {
    *("the", "of", "a", "mask", "seg", "segment", "segmentation", "roi", "level", "bone", "bony", "structure")
}
_BODY: Final = frozenset({"body", "bodies", "corpus", "vb", "wirbelkorper"})
_WHOLE: Final = frozenset({"whole", "entire", "complete"})
_REGIONS: Final[Mapping[str, str]] = {
    "lumbar": "L",
    "lumbalis": "L",
    "thoracic": "T",
    "thoracica": "T",
    "dorsal": "T",
    "cervical": "C",
    "cervicalis": "C",
    "sacral": "S",
    "lwk": "L",
    "bwk": "T",
    "hwk": "C",
}
_ORDINAL_WORDS: Final = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
    *("eleventh", "twelfth", "thirteenth"),
)
_ORDINALS: Final[Mapping[str, int]] = {
    **{word: number for number, word in enumerate(_ORDINAL_WORDS, start=1)},
    **{"1st": 1, "2nd": 2, "3rd": 3},
    **{f"{n}th": n for n in range(4, 14)},
}
_LETTERS: Final[Mapping[str, str]] = {"c": "C", "t": "T", "th": "T", "l": "L", "s": "S"}
_DIRECT = re.compile(r"(c|th|t|l|s|lwk|bwk|hwk)0?([1-9][0-9]?)")
_DORSAL = re.compile(r"d0?([1-9][0-9]?)")
_NUMBER = re.compile(r"0?([1-9][0-9]?)")
_ALLOWED = re.compile(r"[a-z0-9 ]*")


def _tokens(text: str) -> list[str] | None:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", plain)
    spaced = re.sub(r"(?<=[0-9])(?=[A-Z][a-z])", " ", spaced)
    spaced = re.sub(r"[_\-.,()\[\]:/\s]+", " ", spaced).lower().strip()
    return spaced.split(" ") if spaced and _ALLOWED.fullmatch(spaced) else None


def mentions_vertebra(text: str) -> bool:
    """Whether a label that names no single level speaks of vertebrae all the same."""
    return any(word in _VERTEBRA_WORDS | {"vb", "wirbelkorper"} for word in _tokens(text) or [])


def named_level(text: str) -> NamedLevel | None:
    """The vertebra that a label names: "L1", "vertebrae_L1", "body of T12", "Lumbar 1", "first lumbar vertebra".

    None for anything that holds an unknown word, two levels, a number too many, or a level that does not exist.
    """
    if len(text) > 64:
        return None
    tokens = _tokens(text)
    if tokens is None:
        return None
    found: set[str] = set()
    regions: list[str] = []
    numbers: list[int] = []
    kinds: set[RoiKind] = set()
    speaks_of_vertebra = any(token in _VERTEBRA_WORDS or token in _BODY for token in tokens)
    n = 0
    while n < len(tokens):
        token = tokens[n]
        following = _NUMBER.fullmatch(tokens[n + 1]) if n + 1 < len(tokens) else None
        if direct := _DIRECT.fullmatch(token):
            letter = _LETTERS.get(direct[1]) or _REGIONS[direct[1]]
            found.add(f"{letter}{int(direct[2])}")
        elif speaks_of_vertebra and (dorsal := _DORSAL.fullmatch(token)):
            found.add(f"T{int(dorsal[1])}")
        elif token in _LETTERS and following:
            found.add(f"{_LETTERS[token]}{int(following[1])}")
            n += 1
        elif token in _REGIONS:
            regions.append(_REGIONS[token])
        elif token in _ORDINALS:
            numbers.append(_ORDINALS[token])
        elif number := _NUMBER.fullmatch(token):
            numbers.append(int(number[1]))
        elif token in _BODY:
            kinds.add("body")
        elif token in _WHOLE:
            kinds.add("vertebra")
        elif token not in _FILLERS:
            return None
        n += 1
    if len(set(regions)) > 1 or len(numbers) > 1 or (numbers and not regions):
        return None
    if numbers:
        found.add(f"{regions[0]}{numbers[0]}")
    if len(found) != 1 or len(kinds) > 1:
        return None
    level = found.pop()
    if level not in ORDER or any(region != level[0] for region in regions):
        return None
    return NamedLevel(level=level, kind=next(iter(kinds), None))
