"""Which source a path is: a folder of DICOM, or a CSV of pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from services.dicom_ingest.folder import read_identified_series, scan_folder
from services.dicom_ingest.folder_source import FolderSource
from services.dicom_ingest.pairs_csv import read_pairs
from services.dicom_ingest.pairs_source import PairsSource
from services.dicom_ingest.sweep import Source
from services.settings import Settings
from shared.fracture.protocol import RoiKind
from shared.pipeline.errors import FractureSweepError


def roi_of(text: str | None) -> RoiKind | None:
    """The ROI kind in an option's text."""
    match text:
        case None | "":
            return None
        case "body":
            return "body"
        case "vertebra":
            return "vertebra"
        case _:
            raise FractureSweepError(f"--roi is body or vertebra, not {text!r}")


def source_of(
    path: Path,
    *,
    settings: Settings,
    default_labels: str | None = None,
    default_roi: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """The source at a path; FractureSweepError (for a CSV: with all its faults) where it cannot be one."""
    roi = roi_of(default_roi)
    limits = settings.dicom_ingest
    if path.is_dir():
        return FolderSource(scan_folder(path, limits, progress=progress), limits, seg_roi=roi or limits.seg_roi)
    if path.suffix.lower() != ".csv":
        raise FractureSweepError(f"{path} is neither a folder of DICOM nor a CSV of pairs (a file that ends in .csv)")
    images = read_pairs(path, default_labels=default_labels, default_roi=roi)
    return PairsSource(images, read_folder=partial(read_identified_series, settings=limits), base=path.parent.resolve())
