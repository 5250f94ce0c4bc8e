"""`fracture-sweep segment`: one image in; its vertebral bodies, levels, heights and pictures out. No store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import SimpleITK as sitk
from pydantic import BaseModel, ConfigDict

from services.dicom_ingest.collected import CollectedSeries
from services.dicom_ingest.folder import read_identified_series
from services.dicom_ingest.pairs_csv import nifti_series
from services.dicom_ingest.settings import IngestSettings
from services.segmenter.segmentation import NotSegmentable
from services.segmenter.series_spine import SeriesSpine, automatic_spine
from services.segmenter.service import built_in_of
from services.segmenter.settings import SegmenterSettings
from shared.fracture.research_use import RESEARCH_USE
from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.record import Finding, SegmenterNote
from shared.fracture.volume import mask_from_nrrd, to_sitk
from shared.pipeline.errors import FractureSweepError

BODIES: Final = "bodies.nii.gz"
VERTEBRAE: Final = "vertebrae.json"


class Vertebrae(BaseModel):
    """What `vertebrae.json` holds. `labels`: level → value in `bodies.nii.gz` (VerSe; 101, 102, … from below)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    research_use: str = RESEARCH_USE
    segmenter: SegmenterNote
    levels_from: str
    doubts: tuple[str, ...]
    warnings: tuple[str, ...]
    labels: dict[str, int]
    limits: GateSettings
    findings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """What was written, and what it says."""

    vertebrae: Vertebrae
    files: tuple[Path, ...]


def segment_image(image: Path, out: Path, *, ingest: IngestSettings, settings: SegmenterSettings) -> ByHand:
    """Segment a NIfTI file or a folder with one DICOM series. FractureSweepError where it cannot be done."""
    built_in = built_in_of(settings)
    series = _read(image, ingest)
    if series.volume is None:
        raise FractureSweepError(f"{image} cannot be segmented: {'; '.join(series.reasons or ('no volume in it',))}")
    try:
        found = automatic_spine(series.volume, built_in.network, limits=settings.limits)
    except NotSegmentable as error:
        raise FractureSweepError(f"{image}: {error}") from None
    vertebrae = Vertebrae(
        segmenter=built_in.note,
        levels_from=found.levels_from,
        doubts=found.doubts,
        warnings=(*found.warnings, *(warning.sentence for warning in series.warnings)),
        labels=found.levels,
        limits=settings.limits,
        findings=found.findings,
    )
    return ByHand(vertebrae=vertebrae, files=_write(out, found, vertebrae))


def _read(image: Path, ingest: IngestSettings) -> CollectedSeries:
    if not image.exists():
        raise FractureSweepError(f"{image} is not there: give a NIfTI file, or a folder with one DICOM series")
    if image.is_dir():
        return read_identified_series(image, ingest)[0]
    if not image.name.endswith((".nii", ".nii.gz")):
        raise FractureSweepError(f"{image} is no NIfTI file (.nii, .nii.gz); a DICOM series is given as its folder")
    return nifti_series(image)


def _write(out: Path, found: SeriesSpine, vertebrae: Vertebrae) -> tuple[Path, ...]:
    out.mkdir(parents=True, exist_ok=True)
    bodies = out / BODIES
    aside = out / f".{BODIES}"
    sitk.WriteImage(to_sitk(mask_from_nrrd(found.labels)), str(aside), useCompression=True)
    aside.replace(bodies)
    pictures = []
    for view, png in found.pictures.items():
        pictures.append(out / f"spine-{view}.png")
        pictures[-1].write_bytes(png)
    table = out / VERTEBRAE
    table.write_text(vertebrae.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return (bodies, table, *pictures)
