"""What keeps a case from being scored, before any model sees it (METHOD 10).

Evaluated on the source voxels, neither clipped nor cropped: after clipping nothing exceeds the window, and a crop no
longer knows where the scan ended. Every guard that applies is listed, in the order of `ORDER`; the first one leads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from shared.fracture.crop import Box, bounding_box
from shared.fracture.levels import SCORED_LEVELS, is_uncertain
from shared.fracture.protocol import RoiKind
from shared.fracture.records import Acquisition, GuardRecord, Warned
from shared.fracture.volume import Mask, Volume

ORDER: Final[tuple[str, ...]] = (
    "unreadable",
    "no-mask",
    "spacing",
    "level",
    "border",
    "roi-kind",
    "volume",
    "components",
    "metal",
)
"""Codes of the guards, the one that leads first."""

Positive = Annotated[float, Field(gt=0)]


class GuardSettings(BaseModel):
    """The limits of the guards; METHOD 10 gives the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warn_spacing_mm: Positive = Field(
        default=1.5, description="Above this coarsest voxel spacing (mm) a case carries a warning."
    )
    max_spacing_mm: Positive = Field(
        default=3.0, description="Above this coarsest voxel spacing (mm) a case is not evaluated."
    )
    spacing_tolerance_mm: Annotated[float, Field(ge=0)] = Field(
        default=1e-3, description="By how much (mm) a spacing may exceed its limit and still pass."
    )
    min_volume_ml: Positive = Field(default=5.0, description="Below this volume (mL) a mask is not evaluated.")
    max_volume_ml: Positive = Field(default=90.0, description="Above this volume (mL) a mask is not evaluated.")
    island_share: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.01,
        description="Parts of a mask below this share of its voxels are islands: counted, not held against it.",
    )
    metal_hu: float = Field(
        default=2000.0, description="A voxel of the mask above these HU is metal or cement: the case is not evaluated."
    )


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """What the guards found: those that apply, in order, and what a reader should know beside."""

    guards: tuple[GuardRecord, ...]
    warnings: tuple[Warned, ...]
    volume_ml: float


def evaluate_guards(
    volume: Volume,
    roi: Mask,
    *,
    level: str,
    roi_kind: RoiKind,
    wanted_roi: RoiKind,
    settings: GuardSettings,
    uncut: Mask | None = None,
    uncertain_levels: bool = False,
) -> Guarded:
    """The guards of one region on its source scan.

    `volume` in HU, not clipped; `roi` bool or 0/1 on its grid, after the body cut, and `uncut` the same before it;
    `roi_kind` what `roi` holds and `wanted_roi` what the bundle was trained on; `uncertain_levels`: whether a body that
    is only known as the n-th from below (B01, …) passes.
    """
    box = bounding_box(roi.voxels)
    spacing_zyx = volume.geometry.spacing_zyx
    guards: list[GuardRecord] = []
    warnings: list[Warned] = list(spacing_warnings(spacing_zyx, settings=settings))
    guards += _spacing(spacing_zyx, settings)
    guards += [] if uncertain_levels and is_uncertain(level) else _level(level)
    guards += _roi_kind(roi_kind, wanted_roi)
    if box is None:
        was_cut = uncut is not None and bool(uncut.voxels.any())
        sentence = "no vertebral body is left of the mask after the body cut" if was_cut else "the mask is empty"
        guards.append(GuardRecord(code="no-mask", sentence=sentence, value=0.0, limit=1.0))
        if uncut is not None and was_cut:
            guards += _border(bounding_box(uncut.voxels), uncut.voxels.shape)
        return Guarded(guards=_in_order(guards), warnings=tuple(warnings), volume_ml=0.0)

    inside = tuple(slice(low, high) for low, high in box)
    region = roi.voxels[inside] != 0
    hu = volume.voxels[inside][region]
    volume_ml = float(region.sum() * np.prod(spacing_zyx) / 1000.0)
    guards += _unreadable(hu)
    guards += _border(box, roi.voxels.shape)
    guards += _volume(volume_ml, settings)
    guards += _metal(hu, settings)
    parts, islands = component_counts(region, island_share=settings.island_share)
    if parts > 1:
        sentence = f"the mask falls into {parts} parts that do not touch"
        guards.append(GuardRecord(code="components", sentence=sentence, value=float(parts), limit=1.0))
    if islands:
        sentence = f"{islands} islands of less than {settings.island_share:.0%} of the mask were not counted as parts"
        warnings.append(Warned(code="islands", sentence=sentence))
    return Guarded(guards=_in_order(guards), warnings=tuple(warnings), volume_ml=volume_ml)


def component_counts(region: NDArray[np.bool_], *, island_share: float) -> tuple[int, int]:
    """How many 26-connected parts a region has, and how many islands (parts below the share of its voxels) beside."""
    labels = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(region.astype(np.uint8)), True))
    sizes = np.bincount(labels.ravel())[1:]
    islands = int((sizes < island_share * sizes.sum()).sum())
    return len(sizes) - islands, islands


def spacing_warnings(spacing_zyx: tuple[float, float, float], *, settings: GuardSettings) -> tuple[Warned, ...]:
    """The warning of thick slices: scored, but texture wants thin ones."""
    coarsest, tolerance = max(spacing_zyx), settings.spacing_tolerance_mm
    if not settings.warn_spacing_mm + tolerance < coarsest <= settings.max_spacing_mm + tolerance:
        return ()
    sentence = f"the coarsest axis has {coarsest:.4g} mm, above {settings.warn_spacing_mm:g} mm: texture is less exact"
    return (Warned(code="spacing", sentence=sentence),)


def contrast_warnings(acquisition: Acquisition) -> tuple[Warned, ...]:
    """The warning of a contrast agent (kVp and kernel are the bundle's to judge: scoring.acquisition_warnings)."""
    if not acquisition.contrast_agent:
        return ()
    return (Warned(code="contrast-agent", sentence="the scan was made with a contrast agent"),)


def _in_order(guards: list[GuardRecord]) -> tuple[GuardRecord, ...]:
    return tuple(sorted(guards, key=lambda guard: ORDER.index(guard.code)))


def _unreadable(hu: NDArray[np.generic]) -> list[GuardRecord]:
    count = int((~np.isfinite(hu.astype(np.float64))).sum())
    if count == 0:
        return []
    sentence = f"the scan cannot be read inside the mask: {count} voxels have no finite value"
    return [GuardRecord(code="unreadable", sentence=sentence, value=float(count), limit=0.0)]


def _spacing(spacing_zyx: tuple[float, float, float], settings: GuardSettings) -> list[GuardRecord]:
    coarsest = max(spacing_zyx)
    if coarsest <= settings.max_spacing_mm + settings.spacing_tolerance_mm:
        return []
    sentence = f"the coarsest axis has {coarsest:.4g} mm, above the limit of {settings.max_spacing_mm:g} mm"
    return [GuardRecord(code="spacing", sentence=sentence, value=coarsest, limit=settings.max_spacing_mm)]


def _level(level: str) -> list[GuardRecord]:
    if level in SCORED_LEVELS:
        return []
    return [GuardRecord(code="level", sentence=f"the method answers for T1 to L5, not for {level}")]


def _border(box: Box | None, shape: tuple[int, ...]) -> list[GuardRecord]:
    faces = 0 if box is None else sum((low == 0) + (high == n) for (low, high), n in zip(box, shape, strict=True))
    if faces == 0:
        return []
    sentence = "the mask touches the border of the scan: the vertebra may be cut off"
    return [GuardRecord(code="border", sentence=sentence, value=float(faces), limit=0.0)]


def _roi_kind(roi_kind: RoiKind, wanted: RoiKind) -> list[GuardRecord]:
    if roi_kind == wanted:
        return []
    words = {"body": "vertebral bodies", "vertebra": "whole vertebrae"}
    sentence = f"the mask holds {words[roi_kind]}, the model was trained on {words[wanted]}"
    if wanted == "body":
        sentence += "; give a body mask to cut it by"
    return [GuardRecord(code="roi-kind", sentence=sentence)]


def _volume(volume_ml: float, settings: GuardSettings) -> list[GuardRecord]:
    if volume_ml < settings.min_volume_ml:
        side, limit = "below", settings.min_volume_ml
    elif volume_ml > settings.max_volume_ml:
        side, limit = "above", settings.max_volume_ml
    else:
        return []
    sentence = f"the mask has {volume_ml:.1f} mL, {side} the limit of {limit:g} mL"
    return [GuardRecord(code="volume", sentence=sentence, value=volume_ml, limit=limit)]


def _metal(hu: NDArray[np.generic], settings: GuardSettings) -> list[GuardRecord]:
    values = hu.astype(np.float64)
    finite = values[np.isfinite(values)]
    count = int((finite > settings.metal_hu).sum())
    if count == 0:
        return []
    highest = float(finite.max())
    sentence = f"metal or cement: {count} voxels above {settings.metal_hu:g} HU, up to {highest:.0f} HU"
    return [GuardRecord(code="metal", sentence=sentence, value=highest, limit=settings.metal_hu)]
