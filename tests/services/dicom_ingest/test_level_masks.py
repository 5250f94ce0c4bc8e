from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from services.dicom_ingest.level_masks import LevelMask, MaskRefused, cropped, merge_levels, shared_voxels, value_of
from shared.fracture.levels import ORDER
from shared.fracture.protocol import RoiKind
from tests.fixtures.mask_objects import grid

GRID = grid(shape=(12, 10, 10))


def block(level: str, low: int, high: int, *, kind: RoiKind | None = "body", columns: int = 10) -> LevelMask:
    voxels = np.zeros(GRID.shape_zyx, dtype=bool)
    voxels[low:high, :, :columns] = True
    mask = cropped(level, kind, voxels)
    assert mask is not None
    return mask


def test_levels_of_several_masks_become_one_map_with_fixed_values() -> None:
    merged = merge_levels([block("L2", 6, 9), block("L1", 2, 5)], geometry=GRID, default_roi=None)

    assert merged.levels == {"L1": value_of("L1"), "L2": value_of("L2")}
    assert merged.labels.voxels.dtype == np.uint8
    assert np.count_nonzero(merged.labels.voxels == value_of("L1")) == 300
    assert merged.roi_kind == "body"
    assert not merged.refused


def test_a_body_wins_over_the_whole_vertebra_of_its_level() -> None:
    whole, body = block("L1", 2, 6, kind="vertebra"), block("L1", 3, 5)

    merged = merge_levels([whole, body], geometry=GRID, default_roi=None)

    assert merged.roi_kind == "body"
    assert np.count_nonzero(merged.labels.voxels) == 200


def test_the_same_level_twice_is_refused() -> None:
    merged = merge_levels([block("L1", 1, 3), block("L1", 4, 6), block("L2", 8, 9)], geometry=GRID, default_roi=None)

    assert merged.refused == {"L1": "two masks for L1"}
    assert list(merged.levels) == ["L2"]


def test_a_whole_vertebra_among_bodies_is_refused() -> None:
    masks = [block("L1", 1, 3), block("L2", 5, 8, kind="vertebra")]

    merged = merge_levels(masks, geometry=GRID, default_roi=None)

    assert list(merged.levels) == ["L1"]
    assert "whole vertebra among" in merged.refused["L2"]


def test_without_codes_or_setting_nothing_is_guessed() -> None:
    with pytest.raises(MaskRefused, match="seg_roi"):
        merge_levels([block("L1", 1, 3, kind=None)], geometry=GRID, default_roi=None)

    assert merge_levels([block("L1", 1, 3, kind=None)], geometry=GRID, default_roi="vertebra").roi_kind == "vertebra"


def test_a_few_voxels_claimed_twice_go_to_the_upper_level() -> None:
    upper, lower = block("L1", 0, 6), block("L2", 6, 12)
    voxels = np.pad(lower.voxels, ((1, 0), (0, 0), (0, 0)))
    voxels[0, 0, :4] = True
    lower = LevelMask(level="L2", kind="body", start_zyx=(5, 0, 0), voxels=voxels)

    merged = merge_levels([lower, upper], geometry=GRID, default_roi=None)

    assert shared_voxels(upper, lower) == 4
    assert np.count_nonzero(merged.labels.voxels == value_of("L1")) == 600
    assert np.count_nonzero(merged.labels.voxels == value_of("L2")) == 600
    assert [w.code for w in merged.warnings] == ["mask-overlap"]
    assert "4 voxels" in merged.warnings[0].sentence


def test_levels_that_overlap_more_are_both_refused_and_the_rest_stays() -> None:
    masks = [block("L1", 0, 5), block("L2", 4, 8), block("L3", 9, 12)]

    merged = merge_levels(masks, geometry=GRID, default_roi=None)

    assert set(merged.refused) == {"L1", "L2"}
    assert "overlap by 25%" in merged.refused["L1"]
    assert set(np.unique(merged.labels.voxels)) == {0, value_of("L3")}


def test_values_are_unique_and_fit_a_byte() -> None:
    values = [value_of(level) for level in (*ORDER, *(f"B{n:02d}" for n in range(1, 30)))]

    assert len(set(values)) == len(values)
    assert max(values) < 256


@settings(max_examples=40, deadline=None)
@given(arrays(bool, (4, 5, 6)), arrays(bool, (4, 5, 6)))
def test_overlap_is_counted_as_on_the_whole_grid(
    one: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], two: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
) -> None:
    a, b = cropped("L1", "body", one), cropped("L2", "body", two)

    expected = int(np.count_nonzero(one & two))

    assert (shared_voxels(a, b) if a and b else 0) == expected
