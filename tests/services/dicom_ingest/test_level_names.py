from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.sr.codedict import codes

from services.dicom_ingest.level_names import (
    NamedLevel,
    coded_level,
    mentions_vertebra,
    named_level,
)
from shared.fracture.level_codes import BODY_SCT, VERTEBRA_SCT, VERTEBRA_SRT
from shared.fracture.levels import ORDER


@pytest.mark.parametrize(
    ("text", "level", "kind"),
    [
        ("L1", "L1", None),
        ("l1", "L1", None),
        ("L 1", "L1", None),
        ("L01", "L1", None),
        ("Th12", "T12", None),
        ("D12 vertebra", "T12", None),
        ("vertebra L1", "L1", None),
        ("vertebrae_L1", "L1", None),
        ("VertebraL1", "L1", None),
        ("Lumbar 1", "L1", None),
        ("Lumbar vertebra 3", "L3", None),
        ("first lumbar vertebra", "L1", None),
        ("12th thoracic vertebra", "T12", None),
        ("LWK 1", "L1", None),
        ("L1 (first lumbar vertebra)", "L1", None),
        ("S1", "S1", None),
        ("L1 body", "L1", "body"),
        ("L1_body", "L1", "body"),
        ("L1Body", "L1", "body"),
        ("body of T12", "T12", "body"),
        ("VB_L1", "L1", "body"),
        ("corpus vertebrae L2", "L2", "body"),
        ("Wirbelkörper L3", "L3", "body"),
        ("Structure of body of fourth lumbar vertebra", "L4", "body"),
        ("whole L3 vertebra", "L3", "vertebra"),
    ],
)
def test_a_label_that_names_one_vertebra_is_read(text: str, level: str, kind: str | None) -> None:
    assert named_level(text) == NamedLevel(level=level, kind=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "L1-L2 disc",
        "L1-L2",
        "L1/L2",
        "L1-5",
        "L1 2",
        "T12L1",
        "disc L1",
        "L1 rib",
        "L1 left pedicle",
        "PTV L1",
        "L1 fracture",
        "L1?",
        "L1+",
        "~L1",
        "thoracic L1",
        "first L1",
        "L1 body whole",
        "L7",
        "L0",
        "T14",
        "S2",
        "C8",
        "D12",
        "D95",
        "vertebra",
        "vertebra 20",
        "lumbar spine",
        "BODY",
        "sacrum",
        "Heart",
        "1",
        "L",
        "L1" + " " * 80 + "x",
    ],
)
def test_a_label_that_leaves_a_doubt_names_no_vertebra(text: str) -> None:
    assert named_level(text) is None


_LEVEL = st.sampled_from(ORDER)
_AROUND = st.sampled_from(["{}", "vertebra {}", "Vertebra_{}", "{} vertebra", "[{}]", "bone: {}", "the {}"])


@given(level=_LEVEL, around=_AROUND, lower=st.booleans())
def test_every_level_is_read_in_every_way_of_writing_it(level: str, around: str, lower: bool) -> None:
    text = around.format(level.lower() if lower else level)

    named = named_level(text)

    assert named == NamedLevel(level=level, kind=None)


@given(one=_LEVEL, two=_LEVEL, between=st.sampled_from([" ", "-", "/", "_", " and ", " to ", ", "]))
def test_two_levels_are_never_one(one: str, two: str, between: str) -> None:
    named = named_level(f"{one}{between}{two}")

    assert named is None or one == two


@given(level=_LEVEL, word=st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=4, max_size=9))
def test_an_unknown_word_beside_a_level_is_a_doubt(level: str, word: str) -> None:
    known = named_level(f"{word} L1") is not None

    assert known or named_level(f"{level} {word}") is None


@given(st.text(max_size=40))
def test_any_text_is_read_without_a_crash_and_only_real_levels_come_out(text: str) -> None:
    named = named_level(text)

    assert named is None or named.level in ORDER
    assert isinstance(mentions_vertebra(text), bool)


def test_the_codes_of_whole_vertebrae_are_those_of_cid_7603() -> None:
    for level in [*(f"C{n}" for n in range(1, 8)), *(f"T{n}" for n in range(1, 13)), *(f"L{n}" for n in range(1, 6))]:
        standard = getattr(codes.cid7603, f"{level}Vertebra")

        assert coded_level("SCT", standard.value) == NamedLevel(level=level, kind="vertebra")


def test_retired_codes_mean_what_the_new_ones_mean() -> None:
    from pydicom.sr._snomed_dict import mapping

    for retired, level in VERTEBRA_SRT.items():
        assert VERTEBRA_SCT[mapping["SRT"][retired]] == level
        assert coded_level("SNM3", retired) == NamedLevel(level=level, kind="vertebra")


def test_a_body_code_says_body_and_no_code_stands_for_two_things() -> None:
    assert coded_level("SCT", "61032001") == NamedLevel(level="L1", kind="body")
    assert not set(BODY_SCT) & set(VERTEBRA_SCT)
    assert len(set(BODY_SCT.values())) == len(BODY_SCT)
    assert {f"T{n}" for n in range(1, 14)} | {f"L{n}" for n in range(1, 6)} <= set(BODY_SCT.values())


@pytest.mark.parametrize("value", [*BODY_SCT, *VERTEBRA_SCT])
def test_every_snomed_code_has_a_right_check_digit(value: str) -> None:
    assert _verhoeff(value)


def test_a_code_of_another_scheme_names_nothing() -> None:
    assert coded_level("99LOCAL", "61032001") is None
    assert coded_level("SCT", "10200004") is None


def _verhoeff(number: str) -> bool:
    """SNOMED CT's check digit: Verhoeff's dihedral scheme (SNOMED CT Release File Specification 6)."""
    turn = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]
    check = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit)
        for _ in range(place % 8):
            value = turn[value]
        check = _dihedral(check, value)
    return check == 0


def _dihedral(a: int, b: int) -> int:
    if a < 5:
        return (a + b) % 5 if b < 5 else 5 + (a + b) % 5
    return 5 + (a - b) % 5 if b < 5 else (a - b) % 5
