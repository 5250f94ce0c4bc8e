"""Names of vertebrae: counted from the sacrum, or from the last ribs, or not at all. Wrong levels are worse than none.

Where neither can be relied on a body is the n-th visible from below (`B01`, `B02`, …), which the report says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np

from shared.fracture.levels import ORDER

LevelsFrom = Literal["mask", "sacrum", "ribs", "sacrum and ribs", "nothing"]

NAMES_FROM_BELOW: Final[tuple[str, ...]] = (
    *(f"L{n}" for n in range(5, 0, -1)),
    *(f"T{n}" for n in range(12, 0, -1)),
)
"""L5 … L1, T12 … T1."""
MOST_CERVICAL: Final = 5
"""Bodies above T1 that a scan of the trunk may show: C3 to C7."""
MIN_SACRUM_ML: Final = 8.0
MAX_SACRUM_GAP_MM: Final = 20.0
PITCH_RATIO: Final = (0.6, 1.67)
"""How the distance between two neighbouring centres may compare to the next one; a missed body doubles it."""
LAST_RIB: Final = 0.75
"""The twelfth pair is thinner and shorter: more than this share of what those above show is no last pair, but one below
which another was overlooked."""
VOLUME_RATIO: Final = 3.3
"""How many times the volume of a whole neighbour a body may have; a fragment taken for a body has less than a third."""
_SPINE: Final[tuple[str, ...]] = tuple(level for level in ORDER if level not in ("T13", "L6"))
_LAST_THORACIC: Final = NAMES_FROM_BELOW.index("T12")


@dataclass(frozen=True, kw_only=True)
class SeenBody:
    """What is known of one body of a chain, from head to foot."""

    pitch_mm: float | None
    """Distance from its centre to that of the body below; None of the lowest."""
    ribs: bool | None
    """Whether ribs begin at it; None where the scan does not show both its sides."""
    whole: bool
    """Not cut off by the end of the scan."""
    volume_ml: float | None = None
    rib_ml: float | None = None
    """Of rib that is seen beside it, on both sides together."""


@dataclass(frozen=True, kw_only=True)
class Sacrum:
    """The sacrum as it was found: its volume, and the gap between its nearest voxel and the lowest body."""

    volume_ml: float
    gap_mm: float


@dataclass(frozen=True, kw_only=True)
class Named:
    """The levels of a chain, from head to foot, and what they rest on."""

    levels: tuple[str, ...]
    levels_from: LevelsFrom
    doubts: tuple[str, ...] = ()
    """Why levels are uncertain, in sentences; none where they are named."""
    warnings: tuple[str, ...] = ()
    """What speaks against the names that were given, in sentences."""
    gaps: tuple[str, ...] = ()
    """Those of the doubts that say that a body may be missing, a fragment, or two in one: then no height is trusted."""
    above: int = 0
    """How many bodies at the head's end lie above T1; `levels` does not hold them."""


def from_below(count: int) -> tuple[str, ...]:
    """`count` bodies without names, from head to foot."""
    return tuple(f"B{n:02d}" for n in range(count, 0, -1))


def named(bodies: Sequence[SeenBody], *, sacrum: Sacrum | None) -> Named:
    """The names of a chain of bodies."""
    count = len(bodies)
    by_sacrum = 0 if sacrum is not None and _is_one(sacrum) else None
    by_ribs = _lowest_by_ribs(bodies)
    gaps = _gaps(bodies)
    doubts, warnings = list(gaps), []
    lowest = by_sacrum if by_sacrum is not None else by_ribs
    if by_sacrum is not None and by_ribs is not None and by_ribs > by_sacrum:
        doubts.append("ribs begin below T12 as it is counted from the sacrum: transitional anatomy")
    elif by_sacrum is not None and by_ribs is not None and by_ribs < by_sacrum:
        doubts.append(
            "the last ribs end above T12 as it is counted from the sacrum: a part of the sacrum taken for a body, "
            "short ribs, or transitional anatomy (count the lumbar vertebrae)"
        )
    if lowest is None:
        doubts.append("the scan shows neither the sacrum nor which ribs are the last")
    elif lowest < 0 or lowest + count > len(NAMES_FROM_BELOW) + MOST_CERVICAL:
        doubts.append(f"{count} bodies do not fit between C3 and L5")
    if doubts:
        return Named(levels=from_below(count), levels_from="nothing", doubts=tuple(doubts), gaps=tuple(gaps))
    assert lowest is not None  # noqa: S101 - without it there is a doubt
    found = NAMES_FROM_BELOW[lowest : lowest + count][::-1]
    above = count - len(found)
    if above:
        warnings.append(f"{above} bodies above T1 are left out: this reads T1 to L5")
    source: LevelsFrom = "ribs" if by_sacrum is None else "sacrum and ribs" if by_ribs == by_sacrum else "sacrum"
    return Named(levels=tuple(found), levels_from=source, warnings=tuple(warnings), above=above)


def checked(levels: Sequence[str], bodies: Sequence[SeenBody]) -> Named:
    """Names that somebody else gave to a chain of bodies (from head to foot), where they can be right.

    They have to go down the spine one by one, without a gap, at distances of neighbours.
    """
    places = [_SPINE.index(level) if level in _SPINE else None for level in levels]
    gaps = _gaps(bodies)
    doubts = list(gaps)
    if any(place is None for place in places):
        doubts.append(f"no order is known of {', '.join(n for n, p in zip(levels, places, strict=True) if p is None)}")
    known = [place for place in places if place is not None]
    for upper, lower in pairwise(known):
        if lower <= upper:
            doubts.append(f"{_SPINE[upper]} lies above {_SPINE[lower]}")
        elif lower > upper + 1:
            missing = ", ".join(_SPINE[upper + 1 : lower])
            doubts.append(f"between {_SPINE[upper]} and {_SPINE[lower]} no body is found ({missing})")
    if doubts:
        return Named(levels=from_below(len(levels)), levels_from="nothing", doubts=tuple(doubts), gaps=tuple(gaps))
    return Named(levels=tuple(levels), levels_from="mask")


def _is_one(sacrum: Sacrum) -> bool:
    return sacrum.volume_ml >= MIN_SACRUM_ML and sacrum.gap_mm <= MAX_SACRUM_GAP_MM


def _lowest_by_ribs(bodies: Sequence[SeenBody]) -> int | None:
    """Which of NAMES_FROM_BELOW the lowest body is by the last ribs; None where these cannot be told.

    The last ribs are the last only when the next body is wholly seen, with both sides, and has none; when what is above
    them has ribs throughout (a rib that was overlooked in the middle could as well have been overlooked at the end);
    and when they are as small as a twelfth pair.
    """
    with_ribs = [n for n, body in enumerate(bodies) if body.ribs]
    if len(with_ribs) < 2:
        return None
    last = with_ribs[-1]
    if last + 1 >= len(bodies):
        return None
    below = bodies[last + 1 :]
    if below[0].ribs is not False or not below[0].whole or any(body.ribs for body in below):
        return None
    seen_above = [body.ribs for body in bodies[: last + 1] if body.ribs is not None]
    if not all(seen_above) or not _is_last_pair([bodies[n].rib_ml for n in with_ribs]):
        return None
    return _LAST_THORACIC - (len(bodies) - 1 - last)


def _is_last_pair(rib_ml: Sequence[float | None]) -> bool:
    """Whether the last of some pairs of ribs (from head to foot) is as small as a twelfth; yes where none is known."""
    known = [amount for amount in rib_ml if amount is not None]
    return len(known) < len(rib_ml) or known[-1] <= LAST_RIB * float(np.median(known[:-1]))


def _gaps(bodies: Sequence[SeenBody]) -> list[str]:
    """Distances and volumes that a missing body, two taken for one, or a fragment taken for a body would give."""
    pitches = [body.pitch_mm for body in bodies if body.pitch_mm is not None]
    volumes = [body.volume_ml for body in bodies if body.whole and body.volume_ml is not None]
    return [
        *(
            f"the distance between neighbouring bodies jumps from {one:.0f} to {two:.0f} mm: one may be missing, or "
            "two taken for one"
            for one, two in pairwise(pitches)
            if not PITCH_RATIO[0] <= one / two <= PITCH_RATIO[1]
        ),
        *(
            f"the volume of neighbouring bodies jumps from {one:.0f} to {two:.0f} mL: one may be a fragment, or two "
            "taken for one"
            for one, two in pairwise(volumes)
            if max(one, two) > VOLUME_RATIO * min(one, two)
        ),
    ]
