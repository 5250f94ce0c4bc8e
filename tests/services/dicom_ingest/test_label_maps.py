from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.dicom_ingest.label_maps import (
    TOTALSEG_MAP,
    VERSE_MAP,
    LabelMapError,
    is_level,
    load_label_map,
    parse_label_map,
)


def test_totalsegmentators_organs_are_counted_and_not_named() -> None:
    named, ignored, unknown = TOTALSEG_MAP.sort_values([0, 1, 5, 27, 31, 117, 118, 250])

    assert named == {27: "L5", 31: "L1"}
    assert ignored == 3
    assert unknown == ("118", "250")


def test_verse_knows_sacrum_and_coccyx_as_no_vertebra() -> None:
    named, ignored, unknown = VERSE_MAP.sort_values([20, 26, 27, 28, 99])

    assert named == {20: "L1", 28: "T13"}
    assert ignored == 2
    assert unknown == ("99",)


def test_a_json_file_names_levels_and_what_is_no_vertebra(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"7": "L1", "8": "L2", "9": null}', encoding="utf-8-sig")

    label_map = load_label_map("map.json", base=tmp_path)

    assert label_map.levels == {7: "L1", 8: "L2"}
    assert label_map.others == {9}


def test_all_faults_of_a_map_are_told_at_once() -> None:
    text = '{"1": "L1", "1": "L2", "x": "L3", "0": "L4", "2": "Q9", "3": "L2", "4": 5}'

    with pytest.raises(LabelMapError) as caught:
        parse_label_map(text)

    message = str(caught.value)
    for part in ['"1" stands twice', '"x" is no label', '"0" is no label', '"Q9" is no level', "L2 has two", "5 is no"]:
        assert part in message


@pytest.mark.parametrize("text", ["", "[]", "{}", "L1", '{"1": null}', '{"1": "L1"', "[" * 100_000])
def test_what_is_no_map_is_refused(text: str) -> None:
    with pytest.raises(LabelMapError):
        parse_label_map(text)


def test_an_unknown_name_says_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(LabelMapError, match=r"totalseg, verse, or the path of a \.json file"):
        load_label_map("totalsegmentator", base=tmp_path)
    with pytest.raises(LabelMapError, match="does not exist"):
        load_label_map("absent.json", base=tmp_path)


@given(st.dictionaries(st.text(max_size=6), st.one_of(st.none(), st.text(max_size=4), st.integers()), max_size=6))
def test_any_json_object_is_a_map_of_real_levels_or_one_clear_error(content: dict[str, object]) -> None:
    try:
        label_map = parse_label_map(json.dumps(content))
    except LabelMapError:
        return

    assert label_map.levels
    assert all(is_level(level) for level in label_map.levels.values())
