from __future__ import annotations

import re

import pytest

from shared.fracture.spine.naming import Sacrum, SeenBody, checked, from_below, named

SACRUM = Sacrum(volume_ml=60.0, gap_mm=6.0)


def bodies(count: int, *, ribs: str = "", pitch: float = 33.0, whole: bool = True) -> list[SeenBody]:
    """`ribs` from head to foot: "y" yes, "n" no, "?" not shown; padded with "?"."""
    seen = {"y": True, "n": False, "?": None}
    shown = ribs.ljust(count, "?")
    return [SeenBody(pitch_mm=pitch if n < count - 1 else None, ribs=seen[shown[n]], whole=whole) for n in range(count)]


def test_levels_are_counted_up_from_the_sacrum() -> None:
    found = named(bodies(7), sacrum=SACRUM)

    assert found.levels == ("T11", "T12", "L1", "L2", "L3", "L4", "L5")
    assert found.levels_from == "sacrum"
    assert not found.doubts


@pytest.mark.parametrize("sacrum", [None, Sacrum(volume_ml=4.0, gap_mm=6.0), Sacrum(volume_ml=60.0, gap_mm=31.0)])
def test_a_sacrum_that_is_too_small_or_too_far_is_none(sacrum: Sacrum | None) -> None:
    found = named(bodies(5), sacrum=sacrum)

    assert found.levels == ("B05", "B04", "B03", "B02", "B01")
    assert found.levels_from == "nothing"
    assert "neither the sacrum" in found.doubts[0]


def test_without_a_sacrum_the_last_ribs_are_those_of_t12() -> None:
    found = named(bodies(7, ribs="yyyynnn"), sacrum=None)

    assert found.levels == ("T9", "T10", "T11", "T12", "L1", "L2", "L3")
    assert found.levels_from == "ribs"


@pytest.mark.parametrize(
    "ribs",
    [
        "yyyyyyy",  # the scan ends before the ribs do
        "yyyy?nn",  # whether the next body has none is not shown
        "yy?ynnn".replace("?", "n"),  # one was overlooked, so the last may have been too
        "ynnnnnn",  # one pair of ribs may be anything
        "yyyynny",
        "???????",
    ],
)
def test_ribs_that_may_not_be_the_last_name_nothing(ribs: str) -> None:
    assert named(bodies(7, ribs=ribs), sacrum=None).levels_from == "nothing"


def test_the_body_below_the_last_ribs_has_to_be_whole() -> None:
    seen = bodies(5, ribs="yyyyn")
    seen[-1] = SeenBody(pitch_mm=None, ribs=False, whole=False)

    assert named(seen, sacrum=None).levels_from == "nothing"


def test_sacrum_and_ribs_that_agree_are_both_named() -> None:
    assert named(bodies(8, ribs="yyynnnnn"), sacrum=SACRUM).levels_from == "sacrum and ribs"


def test_ribs_below_t12_leave_the_levels_uncertain() -> None:
    found = named(bodies(8, ribs="yyyynnnn"), sacrum=SACRUM)

    assert found.levels == from_below(8)
    assert "transitional" in found.doubts[0]


def test_ribs_that_end_higher_leave_the_levels_uncertain_too() -> None:
    found = named(bodies(8, ribs="yynnnnnn"), sacrum=SACRUM)

    assert found.levels == from_below(8)
    assert "a part of the sacrum taken for a body" in found.doubts[0]


@pytest.mark.parametrize(("last", "levels_from"), [(0.9, "ribs"), (1.6, "nothing")])
def test_ribs_as_large_as_those_above_are_not_the_last(last: float, levels_from: str) -> None:
    seen = [
        SeenBody(pitch_mm=None if n == 5 else 30.0, ribs=n < 3, whole=True, rib_ml=amount)
        for n, amount in enumerate((1.8, 1.7, last, 0.0, 0.0, 0.0))
    ]

    assert named(seen, sacrum=None).levels_from == levels_from
    both = named(seen, sacrum=SACRUM)
    assert (both.levels_from == "nothing") == (levels_from == "ribs")  # only ribs that are the last can speak against


@pytest.mark.parametrize("pitches", [(33, 33, 66, 33), (33, 33, 15, 33), (20, 34, 34, 34)])
def test_a_jump_in_the_distances_leaves_the_levels_uncertain(pitches: tuple[float, ...]) -> None:
    seen = [SeenBody(pitch_mm=pitch, ribs=None, whole=True) for pitch in pitches]
    seen.append(SeenBody(pitch_mm=None, ribs=None, whole=True))

    found = named(seen, sacrum=SACRUM)

    assert found.levels_from == "nothing"
    assert "one may be missing, or two taken for one" in found.doubts[0]


def test_bodies_of_the_neck_above_t1_are_left_out_with_a_word() -> None:
    found = named(bodies(19), sacrum=SACRUM)

    assert (found.levels[0], found.levels[-1], found.above) == ("T1", "L5", 2)
    assert "2 bodies above T1 are left out" in found.warnings[0]


def test_more_bodies_than_a_spine_has_are_not_named() -> None:
    found = named(bodies(23), sacrum=SACRUM)

    assert (found.levels[0], found.above) == ("B23", 0)
    assert "do not fit" in found.doubts[0]


@pytest.mark.parametrize(("volumes", "told"), [((20, 22, 5, 24), 1), ((20, 22, 9, 24), 0), ((20, 70, 24, 25), 1)])
def test_a_jump_in_the_volumes_leaves_the_levels_uncertain(volumes: tuple[float, ...], told: int) -> None:
    seen = [
        SeenBody(pitch_mm=None if n == 3 else 33.0, ribs=None, whole=True, volume_ml=volume)
        for n, volume in enumerate(volumes)
    ]

    found = named(seen, sacrum=SACRUM)

    assert (found.levels_from == "nothing") == bool(told)
    assert all("fragment" in doubt for doubt in found.doubts)


def test_a_body_that_the_scan_cuts_off_may_be_as_small_as_it_likes() -> None:
    seen = [
        SeenBody(pitch_mm=20.0, ribs=None, whole=False, volume_ml=2.0),
        SeenBody(pitch_mm=None, ribs=None, whole=True, volume_ml=25.0),
    ]

    assert named(seen, sacrum=SACRUM).levels == ("L4", "L5")


def test_one_body_above_a_sacrum_is_l5() -> None:
    assert named(bodies(1), sacrum=SACRUM).levels == ("L5",)


def test_names_that_go_down_the_spine_one_by_one_are_kept() -> None:
    levels = ("T11", "T12", "L1", "L2")

    found = checked(levels, bodies(4))

    assert (found.levels, found.levels_from, found.doubts) == (levels, "mask", ())


@pytest.mark.parametrize(
    ("levels", "doubt"),
    [
        (("T11", "L1", "L2"), r"between T11 and L1 no body is found \(T12\)"),
        (("L1", "L3", "L2"), "L3 lies above L2"),
        (("L1", "L1", "L2"), "L1 lies above L1"),
        (("T12", "L1", "L6"), "no order is known of L6"),
    ],
)
def test_names_that_cannot_be_right_are_taken_back(levels: tuple[str, ...], doubt: str) -> None:
    found = checked(levels, bodies(len(levels)))

    assert found.levels == from_below(len(levels))
    assert any(re.search(doubt, one) for one in found.doubts)


def test_names_at_distances_of_no_neighbours_are_taken_back() -> None:
    seen = [SeenBody(pitch_mm=pitch, ribs=None, whole=True) for pitch in (33.0, 66.0)]
    seen.append(SeenBody(pitch_mm=None, ribs=None, whole=True))

    assert checked(("L1", "L2", "L3"), seen).levels_from == "nothing"
