import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fracture.guards import (
    ORDER,
    GuardSettings,
    component_counts,
    contrast_warnings,
    evaluate_guards,
)
from shared.fracture.records import Acquisition
from shared.fracture.volume import Geometry, Mask, Volume

SHAPE = (40, 50, 60)
BLOCK = (slice(10, 30), slice(10, 35), slice(10, 40))  # 15 mL at 1 mm


def geometry(spacing=(1.0, 1.0, 1.0)):
    return Geometry(
        shape_zyx=SHAPE,
        spacing_zyx=spacing,
        origin_zyx=(0.0, 0.0, 0.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )


def guarded(
    *,
    blocks=(BLOCK,),
    spacing=(1.0, 1.0, 1.0),
    hu=150.0,
    level="L1",
    roi_kind="body",
    wanted_roi="body",
    uncut=None,
    spots=(),
    settings=None,
):
    grid = geometry(spacing)
    voxels = np.full(SHAPE, hu)
    for place, value in spots:
        voxels[place] = value
    inside = np.zeros(SHAPE, dtype=bool)
    for block in blocks:
        inside[block] = True
    whole = None
    if uncut is not None:
        whole = np.zeros(SHAPE, dtype=bool)
        whole[uncut] = True
    return evaluate_guards(
        Volume(voxels=voxels, geometry=grid),
        Mask(voxels=inside, geometry=grid),
        level=level,
        roi_kind=roi_kind,
        wanted_roi=wanted_roi,
        settings=settings or GuardSettings(),
        uncut=None if whole is None else Mask(voxels=whole, geometry=grid),
    )


def codes(found):
    return [guard.code for guard in found.guards]


def test_a_vertebra_inside_a_thin_scan_passes_without_a_warning():
    found = guarded()

    assert found.guards == ()
    assert found.warnings == ()
    assert found.volume_ml == pytest.approx(15.0)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"spots": [((15, 15, 15), np.nan)]}, ["unreadable"]),
        ({"blocks": ()}, ["no-mask"]),
        ({"blocks": (), "uncut": BLOCK}, ["no-mask"]),
        ({"spacing": (3.1, 0.8, 0.8)}, ["spacing"]),
        ({"spacing": (0.8, 0.8, 3.2)}, ["spacing"]),
        ({"level": "S1"}, ["level"]),
        ({"level": "C7"}, ["level"]),
        ({"level": "T13"}, ["level"]),
        ({"level": "B02"}, ["level"]),
        ({"blocks": ((slice(0, 20), *BLOCK[1:]),)}, ["border"]),
        ({"blocks": ((*BLOCK[:2], slice(30, 60)),)}, ["border"]),
        ({"roi_kind": "vertebra"}, ["roi-kind"]),
        ({"wanted_roi": "vertebra"}, ["roi-kind"]),
        ({"blocks": ((slice(10, 20), slice(10, 20), slice(10, 20)),)}, ["volume"]),
        ({"spacing": (3.0, 1.5, 1.5)}, ["volume"]),
        ({"blocks": (BLOCK, (slice(32, 34), slice(40, 48), slice(42, 58)))}, ["components"]),
        ({"spots": [((15, 15, 15), 2001.0)]}, ["metal"]),
        ({"spots": [((1, 1, 1), 3071.0)]}, []),
    ],
)
def test_each_guard_applies_to_its_own_case(case, expected):
    assert codes(guarded(**case)) == expected


def test_all_guards_that_apply_are_listed_in_the_methods_order():
    found = guarded(
        blocks=((slice(0, 4), slice(10, 14), slice(10, 14)), (slice(8, 12), slice(10, 14), slice(10, 14))),
        spacing=(4.0, 1.0, 1.0),
        level="S1",
        roi_kind="vertebra",
        spots=[((1, 11, 11), np.nan), ((2, 11, 11), 2500.0)],
    )

    assert codes(found) == ["unreadable", "spacing", "level", "border", "roi-kind", "volume", "components", "metal"]
    assert [ORDER.index(code) for code in codes(found)] == sorted(ORDER.index(code) for code in codes(found))


def test_a_guard_says_what_was_measured_and_what_is_allowed():
    guard = guarded(spacing=(3.5, 0.7, 0.7)).guards[0]

    assert (guard.value, guard.limit) == (3.5, 3.0)
    assert "3.5 mm" in guard.sentence


@pytest.mark.parametrize(
    ("spacing_mm", "guards", "warnings"),
    [
        (1.5, [], []),
        (1.5005, [], []),
        (1.6, [], ["spacing"]),
        (3.0, [], ["spacing"]),
        (3.0009, [], ["spacing"]),
        (3.002, ["spacing"], []),
    ],
)
def test_spacing_is_warned_of_and_refused_within_a_thousandth(spacing_mm, guards, warnings):
    found = guarded(spacing=(spacing_mm, 0.8, 0.8))

    assert codes(found) == guards
    assert [warning.code for warning in found.warnings] == warnings


def test_a_body_cut_that_leaves_nothing_is_told_with_the_border_of_the_whole_vertebra():
    found = guarded(blocks=(), uncut=(slice(0, 12), *BLOCK[1:]))

    assert codes(found) == ["no-mask", "border"]
    assert "body cut" in found.guards[0].sentence


def test_small_islands_are_counted_in_a_warning_and_not_held_against_the_mask():
    found = guarded(blocks=(BLOCK, (slice(35, 37), slice(2, 4), slice(2, 4)), (slice(2, 3), slice(2, 3), slice(2, 3))))

    assert found.guards == ()
    assert [warning.code for warning in found.warnings] == ["islands"]
    assert "2 islands" in found.warnings[0].sentence


def test_voxels_that_touch_at_a_corner_are_one_part():
    region = np.zeros((4, 4, 4), dtype=bool)
    region[:2, :2, :2] = True
    region[2:, 2:, 2:] = True

    assert component_counts(region, island_share=0.01) == (1, 0)


def test_limits_are_settings():
    found = guarded(settings=GuardSettings(max_spacing_mm=0.9, max_volume_ml=10.0, min_volume_ml=1.0))

    assert codes(found) == ["spacing", "volume"]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_the_volume_is_voxels_times_their_size(a, b, c):
    found = guarded(blocks=((slice(5, 5 + a), slice(5, 5 + b), slice(5, 5 + c)),), spacing=(2.0, 0.5, 0.5))

    assert found.volume_ml == pytest.approx(a * b * c * 0.5 / 1000)


@pytest.mark.parametrize(("agent", "expected"), [(True, ["contrast-agent"]), (False, []), (None, [])])
def test_a_contrast_agent_is_warned_of_where_the_scan_says_so(agent, expected):
    assert [warning.code for warning in contrast_warnings(Acquisition(contrast_agent=agent))] == expected
