"""The masks of single vertebrae on their way to one label map: where they overlap, and which of two kinds wins.

Every reader (SEG, RTSTRUCT, NIfTI) ends in `LevelMask`s on the volume's own grid; from here on nobody knows what they
came from. A level keeps only the box around its voxels: 24 vertebrae of a whole-spine scan would take gigabytes else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from shared.fracture.levels import ORDER, sort_key
from shared.fracture.protocol import RoiKind
from shared.fracture.records import Warned
from shared.fracture.volume import Geometry, Mask

OVERLAP_LIMIT: Final = 0.01
"""Of the smaller of two levels: voxels claimed twice up to this share go to the upper one, more refuses both."""

MaskSource = Literal["dicom-seg", "rtstruct", "nifti"]


class MaskRefused(Exception):
    """A mask cannot be used; the text says why, in words without identifiers."""


@dataclass(frozen=True, kw_only=True)
class LevelMask:
    """One vertebra: its voxels in the box that begins at `start_zyx` of the volume's grid."""

    level: str
    kind: RoiKind | None
    """None where neither codes nor names say what the mask holds."""
    start_zyx: tuple[int, int, int]
    voxels: NDArray[np.bool_]

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """Where the voxels lie in the volume."""
        k, j, i = (
            slice(start, start + length) for start, length in zip(self.start_zyx, self.voxels.shape, strict=True)
        )
        return k, j, i


@dataclass(frozen=True, kw_only=True)
class ReadMask:
    """What one mask object holds, on the grid of one volume."""

    source: MaskSource
    levels: tuple[LevelMask, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    ignored_labels: int = 0
    unknown_labels: tuple[str, ...] = ()
    warnings: tuple[Warned, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MergedLevels:
    """One label map of many levels."""

    labels: Mask
    levels: Mapping[str, int]
    refused: Mapping[str, str]
    roi_kind: RoiKind
    warnings: tuple[Warned, ...]


def value_of(level: str) -> int:
    """The value of a level in our label maps, the same whatever map it came with: C1 = 1 … S1 = 27, B01 = 101 …"""
    return ORDER.index(level) + 1 if level in ORDER else 100 + int(level[1:])


def cropped(level: str, kind: RoiKind | None, voxels: NDArray[np.bool_]) -> LevelMask | None:
    """The LevelMask of a boolean array on the whole grid; None where it is empty."""
    if not voxels.any():
        return None
    bounds = []
    for axis in range(3):
        found = np.flatnonzero(voxels.any(axis=tuple(other for other in range(3) if other != axis)))
        bounds.append((int(found[0]), int(found[-1]) + 1))
    box = tuple(slice(low, high) for low, high in bounds)
    start = (bounds[0][0], bounds[1][0], bounds[2][0])
    return LevelMask(level=level, kind=kind, start_zyx=start, voxels=voxels[box].copy())


def shared_voxels(one: LevelMask, two: LevelMask) -> int:
    """How many voxels two masks both claim."""
    common = []
    for a, b in zip(one.box, two.box, strict=True):
        low, high = max(a.start, b.start), min(a.stop, b.stop)
        if low >= high:
            return 0
        common.append((low, high))
    views = [
        mask.voxels[
            tuple(slice(low - start, high - start) for (low, high), start in zip(common, mask.start_zyx, strict=True))
        ]
        for mask in (one, two)
    ]
    return int(np.count_nonzero(views[0] & views[1]))


def merge_levels(masks: Sequence[LevelMask], *, geometry: Geometry, default_roi: RoiKind | None) -> MergedLevels:
    """One label map (uint8) of the masks of one series.

    A level that comes as body and as whole vertebra is taken as body; the same level twice in one kind is refused,
    and so are levels that overlap by more than `OVERLAP_LIMIT`, and whole vertebrae among bodies. Raises MaskRefused
    where nothing says what the masks hold.
    """
    refused: dict[str, str] = {}
    warnings: list[Warned] = []
    if any(mask.kind is None for mask in masks) and default_roi is None:
        raise MaskRefused(
            "nothing says whether the mask holds vertebral bodies or whole vertebrae: set `seg_roi` to body or vertebra"
        )
    known = [mask if mask.kind is not None else replace(mask, kind=default_roi) for mask in masks]

    chosen: dict[str, LevelMask] = {}
    for level in sorted({mask.level for mask in known}, key=sort_key):
        of_level = [mask for mask in known if mask.level == level]
        bodies = [mask for mask in of_level if mask.kind == "body"]
        wanted = bodies or of_level
        if len(wanted) > 1:
            refused[level] = f"two masks for {level}"
        else:
            chosen[level] = wanted[0]

    kinds = {mask.kind for mask in chosen.values()}
    roi: RoiKind = "body" if "body" in kinds else "vertebra" if kinds else (default_roi or "body")
    if len(kinds) > 1:
        for level in [level for level, mask in chosen.items() if mask.kind == "vertebra"]:
            refused[level] = f"{level} comes as a whole vertebra among masks of vertebral bodies"
            del chosen[level]

    ordered = list(chosen.values())
    for n, upper in enumerate(ordered):
        for lower in ordered[n + 1 :]:
            twice = shared_voxels(upper, lower)
            if not twice:
                continue
            smaller = min(int(np.count_nonzero(upper.voxels)), int(np.count_nonzero(lower.voxels)))
            if twice > OVERLAP_LIMIT * smaller:
                reason = f"the masks of {upper.level} and {lower.level} overlap by {twice / smaller:.0%} of the smaller"
                refused.setdefault(upper.level, reason)
                refused.setdefault(lower.level, reason)
            else:
                sentence = f"{twice} voxels that {upper.level} and {lower.level} both claim were given to {upper.level}"
                warnings.append(Warned(code="mask-overlap", sentence=sentence))

    labels = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    levels: dict[str, int] = {}
    for mask in reversed(ordered):
        if mask.level not in refused:
            levels[mask.level] = value_of(mask.level)
            labels[mask.box][mask.voxels] = value_of(mask.level)
    return MergedLevels(
        labels=Mask(voxels=labels, geometry=geometry),
        levels={level: levels[level] for level in sorted(levels, key=sort_key)},
        refused={level: refused[level] for level in sorted(refused, key=sort_key)},
        roi_kind=roi,
        warnings=tuple(warnings),
    )
