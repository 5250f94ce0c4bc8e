"""The computing of a series: its regions, guards and crops. Runs in a process of a pool, and knows no store.

The volume and its masks come as files, since they may be larger than what a pipe should carry; what goes back is
small. A fault costs its own case; a case that wants more memory than there is, too.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.resampler.regions import region_of
from shared.fracture.crop import CropError, crop_vertebra
from shared.fracture.guards import GuardSettings, evaluate_guards
from shared.fracture.protocol import CropProtocol, RoiKind
from shared.fracture.records import GuardRecord, Warned
from shared.fracture.volume import Mask, Volume, mask_from_nrrd_file, to_nrrd, volume_from_nrrd_file, wanted_memory


class UnusableSource(ValueError):
    """Nothing can be computed of this volume and these masks; the text says why."""


@dataclass(frozen=True, kw_only=True)
class SeriesFiles:
    """A series in files of NRRD: its volume, its label map, and the bodies to cut by."""

    volume: Path
    labels: Path
    bodies: Path | None


@dataclass(frozen=True, kw_only=True)
class ComputedCase:
    """What a case came to: judged by the guards, and cropped (`image`, `mask`: NRRD) unless one of them applies."""

    roi_kind: RoiKind
    volume_ml: float
    source_spacing_zyx: tuple[float, float, float]
    guards: tuple[GuardRecord, ...]
    guard_warnings: tuple[Warned, ...]
    crop_warnings: tuple[Warned, ...] = ()
    image: bytes = b""
    mask: bytes = b""


@dataclass(frozen=True, kw_only=True)
class FailedCase:
    """Why no crop of a case can be had: a sentence, and for a fault inside ITK its traceback for the log."""

    reason: str
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class TooDear:
    """A case that wanted more memory than its process may take."""


CaseResult = ComputedCase | FailedCase | TooDear


@dataclass(frozen=True, kw_only=True)
class Source:
    """A series in memory: its volume, its label map, and the bodies to cut by, all on one grid."""

    volume: Volume
    labels: Mask
    bodies: Mask | None


def compute_series(
    files: SeriesFiles,
    *,
    levels: Mapping[str, int],
    roi_kind: RoiKind,
    protocol: CropProtocol,
    guards: GuardSettings,
    judged: Collection[str] = (),
    uncertain_levels: bool = False,
) -> dict[str, CaseResult]:
    """The results of some levels (`levels`: name → label) of a series. Raises UnusableSource, MemoryError.

    A level that was `judged` before is cropped whatever the guards say now.
    """
    source = read_source(files)
    return {
        level: _computed(
            source,
            level,
            label,
            roi_kind=roi_kind,
            protocol=protocol,
            guards=guards,
            judged=level in judged,
            uncertain_levels=uncertain_levels,
        )
        for level, label in levels.items()
    }


def read_source(files: SeriesFiles) -> Source:
    """The series in its files; UnusableSource where they cannot be read, or lie on different grids."""
    try:
        source = Source(
            volume=volume_from_nrrd_file(files.volume),
            labels=mask_from_nrrd_file(files.labels),
            bodies=None if files.bodies is None else mask_from_nrrd_file(files.bodies),
        )
    except (RuntimeError, ValueError):
        raise UnusableSource("the stored volume or mask cannot be read; delete it and sweep the series again") from None
    grids = [source.labels.geometry, *([] if source.bodies is None else [source.bodies.geometry])]
    if not all(source.volume.geometry.same_grid(grid) for grid in grids):
        raise UnusableSource("the mask lies on another grid than the scan; give the mask of this series")
    return source


def _computed(
    source: Source,
    level: str,
    label: int,
    *,
    roi_kind: RoiKind,
    protocol: CropProtocol,
    guards: GuardSettings,
    judged: bool,
    uncertain_levels: bool,
) -> CaseResult:
    try:
        return compute_case(
            source,
            level,
            label,
            roi_kind=roi_kind,
            protocol=protocol,
            guards=guards,
            judged=judged,
            uncertain_levels=uncertain_levels,
        )
    except CropError as error:
        return FailedCase(reason=str(error))
    except (RuntimeError, MemoryError, ArithmeticError) as error:  # ITK throws RuntimeError
        if wanted_memory(error):
            return TooDear()
        reason = f"the crop could not be computed ({type(error).__name__})"
        return FailedCase(reason=reason, traceback=traceback.format_exc())


def compute_case(
    source: Source,
    level: str,
    label: int,
    *,
    roi_kind: RoiKind,
    protocol: CropProtocol,
    guards: GuardSettings,
    judged: bool = False,
    uncertain_levels: bool = False,
) -> ComputedCase:
    """One level of a series: its region, the guards on the source, and the crop unless one of them applies."""
    wanted = protocol.roi
    region = region_of(source.labels, label, roi_kind=roi_kind, wanted=wanted, bodies=source.bodies)
    found = evaluate_guards(
        source.volume,
        region.roi,
        level=level,
        roi_kind=region.roi_kind,
        wanted_roi=wanted,
        settings=guards,
        uncut=region.uncut,
        uncertain_levels=uncertain_levels,
    )
    crop = None if found.guards and not judged else crop_vertebra(source.volume, region.roi, protocol)
    return ComputedCase(
        roi_kind=region.roi_kind,
        volume_ml=found.volume_ml,
        source_spacing_zyx=source.volume.geometry.spacing_zyx,
        guards=found.guards,
        guard_warnings=found.warnings,
        crop_warnings=() if crop is None else crop.warnings,
        image=b"" if crop is None else to_nrrd(crop.image),
        mask=b"" if crop is None else to_nrrd(crop.mask),
    )
