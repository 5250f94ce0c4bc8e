"""Several masks in one study: which series each belongs to, and which of them a level is taken from.

The series that a mask references wins. A study, frame of reference and level is one case: SEG before RTSTRUCT, then the
newest; the others are listed, in words; of equal rank they are refused ("two masks for L1"), since nobody can say which
of them a reader meant. Objects of ours that come back from the archive are no masks. `choose` is pure; `StudyMasks`
reads the objects, one series at a time, so that no more than one volume is in memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from services.dicom_ingest.collected import CollectedMask, CollectedSeries
from services.dicom_ingest.headers import MaskObject, quiet_pydicom
from services.dicom_ingest.level_masks import LevelMask, MaskRefused, ReadMask, merge_levels
from services.dicom_ingest.masks_rtstruct import read_rtstruct, rois_of
from services.dicom_ingest.masks_seg import read_mask_object, read_seg, segments_of
from shared.fracture.levels import sort_key
from shared.fracture.protocol import RoiKind
from shared.fracture.uids import is_our_uid
from shared.fracture.volume import Geometry

NAMES: Final[Mapping[str, str]] = {"dicom-seg": "DICOM SEG", "rtstruct": "RTSTRUCT"}
_KIND_RANK: Final[Mapping[str, int]] = {"dicom-seg": 1, "rtstruct": 0}

Rank = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class SeriesReference:
    """A series of the study that masks may belong to."""

    series_instance_uid: str
    frame_of_reference_uid: str
    sop_instance_uids: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That one mask object holds one level for one series."""

    level: str
    mask: int
    """Which object, by its place in the study's list."""
    series: int
    """Which series, by its place in the study's list."""
    rank: Rank


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which object each level is taken from. All claims of one choice are of one frame of reference."""

    taken: Mapping[str, Claim] = field(default_factory=dict)
    tied: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)
    """Levels that several objects of equal rank claim, in the order of their series."""
    lost: tuple[Claim, ...] = ()


def rank_of(kind: Literal["dicom-seg", "rtstruct"], written: str) -> Rank:
    """How a mask object ranks: SEG before RTSTRUCT, then by date and time (digits of DA and TM; '' is oldest)."""
    digits = re.sub(r"\D", "", written)
    return (_KIND_RANK[kind], digits.ljust(20, "0") if digits else "")


def choose(claims: Iterable[Claim]) -> Choice:
    """The claim of highest rank for each level; equal ranks of several objects are tied."""
    by_level: dict[str, list[Claim]] = {}
    for claim in claims:
        by_level.setdefault(claim.level, []).append(claim)
    taken: dict[str, Claim] = {}
    tied: dict[str, tuple[Claim, ...]] = {}
    lost: list[Claim] = []
    for level in sorted(by_level, key=sort_key):
        best = max(claim.rank for claim in by_level[level])
        first = sorted((c for c in by_level[level] if c.rank == best), key=lambda c: (c.series, c.mask))
        lost.extend(c for c in by_level[level] if c.rank != best)
        if len({claim.mask for claim in first}) > 1:
            tied[level] = tuple(first)
        else:
            taken[level] = first[0]
    return Choice(taken=taken, tied=tied, lost=tuple(lost))


def series_of(mask: MaskObject, series: Sequence[SeriesReference]) -> tuple[int, ...]:
    """Which series a mask belongs to: by the instances, else the series that it references; () where they are not here.

    A mask that references nothing may belong to each series of its frame of reference: its geometry decides.
    """
    referenced = set(mask.referenced_sop_instance_uids)
    common = [len(referenced & one.sop_instance_uids) for one in series]
    if common and max(common) > 0:
        return (common.index(max(common)),)
    uids = set(mask.referenced_series_uids)
    named = tuple(n for n, one in enumerate(series) if one.series_instance_uid and one.series_instance_uid in uids)
    if named or uids or referenced:
        return named[:1]
    return tuple(
        n
        for n, one in enumerate(series)
        if one.frame_of_reference_uid and one.frame_of_reference_uid in mask.frame_of_reference_uids
    )


class StudyMasks:
    """The mask objects of one study. Ask for its series in the order in which they were given."""

    def __init__(
        self, objects: Sequence[MaskObject], series: Sequence[SeriesReference], *, seg_roi: RoiKind | None = None
    ) -> None:
        self._series = tuple(series)
        self._seg_roi = seg_roi
        self._objects = _distinct([one for one in objects if not _is_ours(one)])
        self._own = len(objects) - sum(1 for one in objects if not _is_ours(one))
        self._places = [series_of(one, self._series) for one in self._objects]
        self._levels: dict[int, frozenset[str]] = {}

    def of_series(self, collected: CollectedSeries) -> tuple[CollectedMask | None, tuple[str, ...]]:
        """The masks of one assembled series merged into one label map on its grid, and why masks were refused.

        Nothing of a fault identifies anyone. A series without a volume has no masks.
        """
        place = self._place(collected)
        here = [n for n, places in enumerate(self._places) if place in places]
        if collected.volume is None:
            self._levels.update({n: frozenset() for n in here if len(self._places[n]) == 1})
            return None, ()
        geometry = collected.volume.geometry
        read: dict[int, ReadMask] = {}
        faults: list[str] = []
        for n in here:
            try:
                one = self._read(n, geometry, collected.frame_of_reference_uid)
            except MaskRefused as error:
                faults.append(str(error))
                if len(self._places[n]) == 1:
                    self._levels[n] = frozenset()
                continue
            if not one.levels and not one.refused:
                faults.append(_without_vertebra(self._objects[n], one))
                if not one.unknown_labels:
                    continue
            read[n] = one
            self._levels[n] = frozenset(mask.level for mask in one.levels)
            self._places[n] = (place,)

        claims = [
            Claim(level=level, mask=n, series=place, rank=self._rank(n)) for n in read for level in self._levels[n]
        ]
        claims.extend(self._elsewhere(place, collected.frame_of_reference_uid))
        choice = choose(claims)
        mask, more = self._merged(place, read, choice, geometry)
        faults.extend(more)
        if mask is None:
            faults.extend(self._not_here(place, collected.frame_of_reference_uid))
        return mask, tuple(dict.fromkeys(faults))

    def _place(self, collected: CollectedSeries) -> int:
        for n, one in enumerate(self._series):
            if one.series_instance_uid == collected.series_instance_uid:
                uids = {s.sop_instance_uid for s in collected.slices}
                if not uids or not one.sop_instance_uids or uids & one.sop_instance_uids:
                    return n
        raise ValueError("this series is not of the study whose masks these are")

    def _rank(self, n: int) -> Rank:
        return rank_of(self._objects[n].kind, self._objects[n].written)

    def _read(self, n: int, geometry: Geometry, frame_of_reference_uid: str) -> ReadMask:
        one = self._objects[n]
        if one.faults:
            raise MaskRefused(f"the {NAMES[one.kind]} cannot be used: {one.faults[0]}")
        if not frame_of_reference_uid:
            raise MaskRefused("a mask cannot be placed: the images name no frame of reference")
        read = read_seg if one.kind == "dicom-seg" else read_rtstruct
        return read(one.path, geometry, frame_of_reference_uid=frame_of_reference_uid)

    def _levels_of(self, n: int) -> frozenset[str]:
        """The levels that an object names, from its header alone; none where it cannot be read."""
        if n not in self._levels:
            one = self._objects[n]
            try:
                with quiet_pydicom():
                    ds = read_mask_object(one.path, name=NAMES[one.kind], pixels=False)
                    named = [s.level for s in (segments_of(ds) if one.kind == "dicom-seg" else rois_of(ds))]
            except (MaskRefused, AttributeError, KeyError, IndexError, TypeError, ValueError):
                named = []
            self._levels[n] = frozenset() if one.faults else frozenset(level.level for level in named if level)
        return self._levels[n]

    def _elsewhere(self, place: int, frame_of_reference_uid: str) -> list[Claim]:
        """The claims of masks of the study's other series in the same frame of reference."""
        return [
            Claim(level=level, mask=n, series=places[0], rank=self._rank(n))
            for n, places in enumerate(self._places)
            if len(places) == 1
            and places[0] != place
            and self._series[places[0]].frame_of_reference_uid == frame_of_reference_uid
            for level in sorted(self._levels_of(n))
        ]

    def _not_here(self, place: int, frame_of_reference_uid: str) -> list[str]:
        """Why a series without a mask has none, though its study has mask objects."""
        reasons = []
        for n, one in enumerate(self._objects):
            if place in self._places[n]:
                continue
            same = frame_of_reference_uid in one.frame_of_reference_uids
            where = "another series" if same or not one.frame_of_reference_uids else "another frame of reference"
            reasons.append(f"a mask of the study ({NAMES[one.kind]}) belongs to {where}")
        if self._own:
            reasons.append("objects that this pipeline made are ignored as masks")
        return reasons

    def _merged(
        self, place: int, read: Mapping[int, ReadMask], choice: Choice, geometry: Geometry
    ) -> tuple[CollectedMask | None, list[str]]:
        wanted: list[LevelMask] = [
            mask
            for n, one in read.items()
            for mask in one.levels
            if mask.level in choice.taken and choice.taken[mask.level].mask == n
        ]
        refused = {level: f"two masks for {level}" for level, tied in choice.tied.items() if tied[0].series == place}
        faults = [
            f"two masks for {level}, one of them with another series"
            for level, tied in choice.tied.items()
            if tied[0].series != place and any(claim.series == place for claim in tied)
        ]
        away = sorted(
            {c.level for c in choice.lost if c.series == place and choice.taken.get(c.level, c).series != place},
            key=sort_key,
        )
        if away:
            faults.append(f"taken from a mask of another series of the study: {', '.join(away)}")
        for one in read.values():
            for level, reason in one.refused.items():
                if level not in choice.taken:
                    refused.setdefault(level, reason)
        if not wanted and not refused:
            return None, faults
        try:
            merged = merge_levels(wanted, geometry=geometry, default_roi=self._seg_roi)
        except MaskRefused as error:
            return None, [*faults, str(error)]
        sources = Counter(self._objects[claim.mask].kind for claim in choice.taken.values() if claim.series == place)
        source = sources.most_common(1)[0][0] if sources else self._objects[next(iter(read))].kind
        return (
            CollectedMask(
                source=source,
                roi_kind=merged.roi_kind,
                labels=merged.labels,
                levels=merged.levels,
                refused={**refused, **merged.refused},
                ignored_labels=sum(one.ignored_labels for one in read.values()),
                unknown_labels=tuple(label for one in read.values() for label in one.unknown_labels),
                others=self._others(place, choice),
                warnings=(*(w for one in read.values() for w in one.warnings), *merged.warnings),
            ),
            faults,
        )

    def _others(self, place: int, choice: Choice) -> tuple[str, ...]:
        """The masks that this series' masks won over, in words: "RTSTRUCT: L1, L2"."""
        losers: dict[int, list[str]] = {}
        for claim in choice.lost:
            winner = choice.taken.get(claim.level)
            if winner is not None and winner.series == place and winner.mask != claim.mask:
                losers.setdefault(claim.mask, []).append(claim.level)
        words = []
        for n, levels in losers.items():
            elsewhere = ", of another series" if place not in self._places[n] else ""
            words.append(f"{NAMES[self._objects[n].kind]}{elsewhere}: {', '.join(sorted(levels, key=sort_key))}")
        return tuple(words)


def masks_of_series(
    collected: CollectedSeries,
    objects: Sequence[MaskObject],
    *,
    series: Sequence[SeriesReference] = (),
    seg_roi: RoiKind | None = None,
) -> tuple[CollectedMask | None, tuple[str, ...]]:
    """The masks of one series, and why masks were refused (see StudyMasks, which serves a whole study).

    `series`: those of the study; none given: this one alone.
    """
    return StudyMasks(objects, series or (reference_of(collected),), seg_roi=seg_roi).of_series(collected)


def reference_of(collected: CollectedSeries) -> SeriesReference:
    """What masks may reference of an assembled series."""
    return SeriesReference(
        series_instance_uid=collected.series_instance_uid,
        frame_of_reference_uid=collected.frame_of_reference_uid,
        sop_instance_uids=frozenset(s.sop_instance_uid for s in collected.slices if s.sop_instance_uid),
    )


def _is_ours(one: MaskObject) -> bool:
    return is_our_uid(one.sop_instance_uid) or is_our_uid(one.series_instance_uid)


def _distinct(objects: Sequence[MaskObject]) -> list[MaskObject]:
    """Each SOP instance once: the same object sent twice is no second mask."""
    seen: set[str] = set()
    kept = []
    for one in objects:
        if one.sop_instance_uid and one.sop_instance_uid in seen:
            continue
        seen.add(one.sop_instance_uid)
        kept.append(one)
    return kept


def _without_vertebra(one: MaskObject, read: ReadMask) -> str:
    name = NAMES[one.kind]
    if read.unknown_labels:
        return f"a mask label without a level ({name}): {', '.join(read.unknown_labels[:10])}"
    part = "segments" if one.kind == "dicom-seg" else "ROIs"
    return f"the {name} holds no vertebra: none of its {read.ignored_labels} {part} names one by code or name"
