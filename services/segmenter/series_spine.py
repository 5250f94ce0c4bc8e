"""The computing of a series' spine: masks where none came, heights and the gate in any case, pictures. Knows no store.

Runs in a process of a pool. Volume and masks come as files, since they may be larger than what a pipe should carry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.segmenter.network import SpineNetwork
from services.segmenter.segmentation import NotSegmentable, Segmented, label_of, segment
from services.segmenter.spine_pictures import Shown, spine_pictures
from shared.fracture.crop import as_stored, reoriented
from shared.fracture.keys import SpineView
from shared.fracture.protocol import RoiKind
from shared.fracture.spine.chain import Vertebra, from_bodies, from_vertebrae, measured_chain, spread
from shared.fracture.spine.findings import findings_of
from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.naming import LevelsFrom, Named, SeenBody, checked
from shared.fracture.spine.network_card import load_network
from shared.fracture.spine.record import Finding
from shared.fracture.volume import Mask, Volume, mask_from_nrrd_file, to_nrrd, volume_from_nrrd_file

METAL_HU: Final = 2000
METAL_ML: Final = 0.05
SCOLIOSIS_DEGREES: Final = 30.0
UNREADABLE: Final = "the stored volume or mask cannot be read; delete it and sweep the series again"
OTHER_GRID: Final = "the mask lies on another grid than the scan; give the mask of this series"


class UnusableSpine(ValueError):
    """Nothing can be measured of this volume and these masks; the text says why."""


@dataclass(frozen=True, kw_only=True)
class BuiltIn:
    """Masks are made by the network in a folder."""

    folder: Path
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class Given:
    """Masks came along: NRRD label map, its levels, what it holds, and bodies to cut by where they came too."""

    labels: Path
    levels: Mapping[str, int]
    roi_kind: RoiKind
    bodies: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Plugged:
    """Masks were made by a plugged-in command: NRRD label map, its levels, what it holds."""

    labels: Path
    levels: Mapping[str, int]
    roi_kind: RoiKind


@dataclass(frozen=True, kw_only=True)
class SeriesSpine:
    """What a series came to. `labels`: NRRD of the label map that was made, empty where masks were given."""

    findings: tuple[Finding, ...]
    levels: dict[str, int]
    levels_from: LevelsFrom
    doubts: tuple[str, ...]
    warnings: tuple[str, ...]
    pictures: dict[SpineView, bytes]
    labels: bytes = b""


def compute_spine(volume: Path, masks: BuiltIn | Plugged | Given, *, limits: GateSettings) -> SeriesSpine:
    """The spine of a series. NotSegmentable, UnusableSpine, MemoryError."""
    try:
        scan = volume_from_nrrd_file(volume)
    except (RuntimeError, ValueError):
        raise UnusableSpine(UNREADABLE) from None
    if isinstance(masks, BuiltIn):
        return automatic_spine(scan, masks, limits=limits)
    if isinstance(masks, Plugged):
        return plugged_spine(scan, masks, limits=limits)
    return _given(scan, masks, limits=limits)


def automatic_spine(scan: Volume, masks: BuiltIn, *, limits: GateSettings) -> SeriesSpine:
    """The spine of a volume, with masks that are made here. NotSegmentable."""
    found, findings = segmented(scan, masks, limits=limits)
    return SeriesSpine(
        findings=findings,
        levels=_levels(found.named.levels, found.labels),
        levels_from=found.named.levels_from,
        doubts=found.named.doubts,
        warnings=found.named.warnings,
        pictures=_pictures(scan, found.labels, findings),
        labels=to_nrrd(found.labels),
    )


def segmented(scan: Volume, masks: BuiltIn, *, limits: GateSettings) -> tuple[Segmented, tuple[Finding, ...]]:
    """The bodies of a volume, and what heights and gate say of each. NotSegmentable."""
    found = segment(scan, network_in(masks.folder, masks.threads))
    named = found.named
    faults = _faults(scan, found.labels, [label_of(level) for level in named.levels], found.vertebrae)
    return found, findings_of(named.levels, found.vertebrae, limits=limits, faults=faults, gaps=named.gaps)


@lru_cache(maxsize=2)
def network_in(folder: Path, threads: int) -> SpineNetwork:
    """The network in a folder, loaded once a process."""
    card, onnx = load_network(folder)
    return SpineNetwork(card, onnx, threads=threads)


def _levels(levels: Iterable[str], labels: Mask) -> dict[str, int]:
    """Level → label, of the bodies that the scan's grid is fine enough for to hold a voxel of."""
    there = set(np.unique(labels.voxels).tolist())
    return {level: label_of(level) for level in levels if label_of(level) in there}


def plugged_spine(scan: Volume, masks: Plugged, *, limits: GateSettings) -> SeriesSpine:
    """The spine of a volume whose masks a command made: whole vertebrae are cut, names are checked. NotSegmentable."""
    labels = _read_mask(masks.labels)
    if not scan.geometry.same_grid(labels.geometry):
        raise UnusableSpine(OTHER_GRID)
    turned = reoriented(labels)
    names = {value: level for level, value in masks.levels.items()}
    values = _from_head_to_foot(turned.voxels, sorted(names))
    spacing = turned.geometry.spacing_zyx
    made_of = from_bodies if masks.roi_kind == "body" else from_vertebrae
    body_map, kept = made_of(turned.voxels, values, spacing_zyx=spacing)
    if not kept:
        raise NotSegmentable("no vertebra of the label map can be cut into body and arch")
    chain = measured_chain(body_map, source_spacing_zyx=spacing)
    named = _checked([names[value] for value in kept], chain)
    table = np.array([0, *[label_of(level) for level in named.levels]], dtype=np.uint8)
    on_scan = table[spread(body_map.labels, turned.voxels.shape)]
    on_scan[turned.voxels == 0] = 0
    made = Mask(voxels=np.ascontiguousarray(as_stored(on_scan, labels.geometry)), geometry=labels.geometry)
    of_levels = [label_of(level) for level in named.levels]
    faults = _faults(scan, made, of_levels, chain)
    findings = findings_of(named.levels, chain, limits=limits, faults=faults, gaps=named.gaps)
    return SeriesSpine(
        findings=findings,
        levels=_levels(named.levels, made),
        levels_from=named.levels_from,
        doubts=named.doubts,
        warnings=_uncut_words(names[value] for value in values if value not in kept),
        pictures=_pictures(scan, made, findings),
        labels=to_nrrd(made),
    )


def _checked(levels: Sequence[str], chain: Sequence[Vertebra]) -> Named:
    """Whether names that somebody else gave can be right."""
    pitches = [float(np.linalg.norm(one.frame.centre_zyx - two.frame.centre_zyx)) for one, two in pairwise(chain)]
    return checked(
        levels,
        [
            SeenBody(pitch_mm=pitch, ribs=None, whole=not one.cut_off, volume_ml=one.volume_ml)
            for one, pitch in zip(chain, [*pitches, None], strict=True)
        ],
    )


def _uncut_words(levels: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"heights of {level} are not read: its body cannot be told apart in the mask" for level in levels)


def _read_mask(path: Path) -> Mask:
    try:
        return mask_from_nrrd_file(path)
    except (RuntimeError, ValueError):
        raise UnusableSpine(UNREADABLE) from None


def _given(scan: Volume, masks: Given, *, limits: GateSettings) -> SeriesSpine:
    labels = _read_mask(masks.labels)
    bodies = None if masks.bodies is None else _read_mask(masks.bodies)
    if any(not scan.geometry.same_grid(one.geometry) for one in (labels, bodies) if one is not None):
        raise UnusableSpine(OTHER_GRID)
    turned = reoriented(labels)
    names = {value: level for level, value in masks.levels.items()}
    values = _from_head_to_foot(turned.voxels, sorted(names))
    spacing = turned.geometry.spacing_zyx
    if bodies is not None:
        cut = np.where(reoriented(bodies).voxels != 0, turned.voxels, 0)
        of_bodies, kept = from_bodies(cut, values, spacing_zyx=spacing)
        whole, _ = from_bodies(turned.voxels, kept, spacing_zyx=spacing)
        body_map = replace(of_bodies, behind=(whole.labels != 0) & (of_bodies.labels == 0))
    else:
        made_of = from_bodies if masks.roi_kind == "body" else from_vertebrae
        body_map, kept = made_of(turned.voxels, values, spacing_zyx=spacing)
    chain = measured_chain(body_map, source_spacing_zyx=spacing)
    levels = [names[value] for value in kept]
    findings = findings_of(levels, chain, limits=limits, faults=_faults(scan, labels, kept, chain))
    return SeriesSpine(
        findings=findings,
        levels=dict(masks.levels),
        levels_from="mask",
        doubts=(),
        warnings=(
            *_uncut_words(names[value] for value in values if value not in kept),
            *(f"levels as the mask names them, though {doubt}" for doubt in _checked(levels, chain).doubts),
        ),
        pictures=_pictures(scan, labels, findings, values=dict(masks.levels)),
    )


def _from_head_to_foot(labels: NDArray[Any], values: Sequence[int]) -> list[int]:
    """Those of some values that are there, by the height of their middles."""
    counts = np.stack([np.bincount(plane.ravel(), minlength=max(values, default=0) + 1) for plane in labels])
    planes = np.arange(labels.shape[0])
    middle = {
        value: float((counts[:, value] * planes).sum() / counts[:, value].sum())
        for value in values
        if counts[:, value].any()
    }
    return sorted(middle, key=lambda value: -middle[value])


def _faults(scan: Volume, labels: Mask, values: Sequence[int], chain: Sequence[Vertebra]) -> list[str]:
    """Why bodies are not to be judged by their heights: metal or cement in them, a spine bent to the side."""
    voxel_ml = float(np.prod(scan.geometry.spacing_zyx)) / 1000
    metal = np.greater(scan.voxels, METAL_HU)
    count = np.bincount(labels.voxels[metal].ravel().astype(np.int64), minlength=256) if metal.any() else np.zeros(256)
    bent = _bend_to_the_side(chain)
    scoliosis = f"the spine is bent to the side by {bent:.0f} degrees: heights are not read above {SCOLIOSIS_DEGREES:g}"
    return [
        f"metal or cement in the body: more than {METAL_HU} HU"
        if count[value] * voxel_ml >= METAL_ML
        else scoliosis
        if bent > SCOLIOSIS_DEGREES
        else ""
        for value in values
    ]


def _bend_to_the_side(chain: Sequence[Vertebra]) -> float:
    """The largest angle between two bodies' axes, seen from the front, in degrees."""
    angles = [float(np.degrees(np.arctan2(one.frame.up[2], one.frame.up[0]))) for one in chain]
    return max(angles) - min(angles) if angles else 0.0


def _pictures(
    scan: Volume, labels: Mask, findings: Sequence[Finding], *, values: Mapping[str, int] | None = None
) -> dict[SpineView, bytes]:
    shown = [Shown(finding=one, label=label_of(one.level) if values is None else values[one.level]) for one in findings]
    return spine_pictures(scan, labels, shown)
