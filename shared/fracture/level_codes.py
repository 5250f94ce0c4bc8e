"""Codes of vertebrae and vertebral bodies: SNOMED CT, and retired SNOMED RT (CID 7603 of PS3.16; CodeX for bodies)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final


def _levels(letter: str, first: int, *codes: str) -> dict[str, str]:
    return {code: f"{letter}{number}" for number, code in enumerate(codes, start=first)}


VERTEBRA_SCT: Final[Mapping[str, str]] = {
    **_levels("C", 1, "14806007", "39976000", "113205007", "5329002", "36978003", "36054005", "87391001"),
    **_levels("T", 1, "64864005", "53733008", "1626008", "73071006", "56401006", "45296009"),
    **_levels("T", 7, "62487009", "11068009", "82687006", "7610001", "12989004", "23215003"),
    **_levels("L", 1, "66794005", "14293000", "36470004", "11994002", "49668003"),
    "65985001": "S1",
}
"""SNOMED CT codes of whole vertebrae."""

BODY_SCT: Final[Mapping[str, str]] = {
    **_levels("C", 3, "91116008", "14705001", "67479001", "88298007", "16126006"),
    **_levels("T", 1, "56094003", "50060007", "73138009", "86197001", "6105006", "32430008"),
    **_levels("T", 7, "71737002", "77435000", "33766003", "48405002", "52120002", "280849005", "1186895000"),
    **_levels("L", 1, "61032001", "53983007", "55492004", "71996003", "21799000"),
}
"""SNOMED CT codes of vertebral bodies."""

VERTEBRA_SRT: Final[Mapping[str, str]] = {
    **{f"T-116{n}0": f"C{n}" for n in range(1, 8)},
    **{f"T-117{n:X}0": f"T{n}" for n in range(1, 13)},
    **{f"T-119{n}0": f"L{n}" for n in range(1, 6)},
}
"""Retired SNOMED RT codes of whole vertebrae (SRT, SNM3, 99SDM designators)."""

BODY_OF_A_VERTEBRA_SCT: Final = "3572006"
"""Vertebral body, of no certain level."""

_ORDINALS: Final = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh"),
    *("twelfth", "thirteenth"),
)
_REGIONS: Final = {"C": "cervical", "T": "thoracic", "L": "lumbar"}


def body_code(level: str) -> tuple[str, str]:
    """Code value (SNOMED CT) and meaning of the body of a level; the general one where the level has none."""
    for value, named in BODY_SCT.items():
        if named == level:
            ordinal, region = _ORDINALS[int(level[1:]) - 1], _REGIONS[level[0]]
            return value, f"Structure of body of {ordinal} {region} vertebra"
    return BODY_OF_A_VERTEBRA_SCT, "Vertebral body"
