"""Vertebra masks out of RTSTRUCT: contours rasterised on the volume's grid by the pixel-centre rule.

A pixel is inside where its centre is, counted even–odd over all contours of one ROI in one slice, so that a hole drawn
as its own contour is a hole (XOR, as treatment planning systems write it) and a keyhole is one too. A centre on an edge
belongs to the region right of it and below it, so that neighbours neither share nor lose pixels. Slices without a
contour stay empty: nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from services.dicom_ingest.headers import quiet_pydicom
from services.dicom_ingest.level_masks import LevelMask, MaskRefused, ReadMask, cropped
from services.dicom_ingest.level_names import NamedLevel, mentions_vertebra, named_level
from services.dicom_ingest.masks_seg import read_mask_object
from shared.fracture.records import Warned
from shared.fracture.volume import Geometry

PLANAR_TOLERANCE: Final = 0.1
"""Of the slice spacing: how much a contour may leave its plane, and contours of one slice may differ."""

HALF_SLICE: Final = 0.5
"""A contour belongs to the slice whose centre plane lies within half a slice of it."""

OFF_CENTRE: Final = 0.1
"""Of the slice spacing: contours farther than this from their slice's centre plane are warned of."""

_CLOSED: Final = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_MAX_POINTS: Final = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Roi:
    """What one item of the StructureSetROISequence says that it is."""

    number: int
    level: NamedLevel | None
    frame_of_reference_uid: str
    fault: str = ""


def read_rtstruct(path: Path, geometry: Geometry, *, frame_of_reference_uid: str) -> ReadMask:
    """The vertebrae of an RTSTRUCT on the grid of a volume. Raises MaskRefused with the reason."""
    with quiet_pydicom():
        ds = read_mask_object(path, name="RTSTRUCT")
        return rtstruct_masks(ds, geometry, frame_of_reference_uid=frame_of_reference_uid)


def rtstruct_masks(ds: Dataset, geometry: Geometry, *, frame_of_reference_uid: str) -> ReadMask:
    """The vertebrae of an RTSTRUCT on the grid of a volume. Raises MaskRefused with the reason."""
    try:
        return _rtstruct_masks(ds, geometry, frame_of_reference_uid)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise MaskRefused("the RTSTRUCT is damaged: what it says of its contours is not complete") from error


def rois_of(ds: Dataset) -> list[Roi]:
    """What the ROIs of an RTSTRUCT are, by name."""
    frames = [
        str(item.get("FrameOfReferenceUID", "") or "")
        for item in ds.get("ReferencedFrameOfReferenceSequence", None) or []
    ]
    only = frames[0] if len(set(frames)) == 1 else ""
    rois = []
    for item in ds.get("StructureSetROISequence", None) or []:
        name = str(item.get("ROIName", "") or "")
        level = named_level(name)
        fault = "a vertebra without a level" if level is None and mentions_vertebra(name) else ""
        own = str(item.get("ReferencedFrameOfReferenceUID", "") or only)
        rois.append(Roi(number=int(item.ROINumber), level=level, frame_of_reference_uid=own, fault=fault))
    return rois


def _rtstruct_masks(ds: Dataset, geometry: Geometry, frame_of_reference_uid: str) -> ReadMask:
    rois = rois_of(ds)
    if not rois:
        raise MaskRefused("the RTSTRUCT has no ROIs")
    unknown = tuple(f"ROI {roi.number} ({roi.fault})" for roi in rois if roi.fault)
    named = [roi for roi in rois if roi.level is not None]
    ignored = len(rois) - len(named) - len(unknown)
    if not named:
        return ReadMask(source="rtstruct", ignored_labels=ignored, unknown_labels=unknown)
    here = [roi for roi in named if roi.frame_of_reference_uid and roi.frame_of_reference_uid == frame_of_reference_uid]
    if not here:
        raise MaskRefused("a mask in another frame of reference")
    drawn = {
        int(item.ReferencedROINumber): item.get("ContourSequence", None) or []
        for item in ds.get("ROIContourSequence", None) or []
    }
    levels: list[LevelMask] = []
    refused: dict[str, str] = {}
    warnings: list[Warned] = []
    empty = 0
    for roi in here:
        if roi.level is None:
            continue
        try:
            mask, warned = roi_mask(roi.level, contours_of(drawn.get(roi.number, [])), geometry)
        except MaskRefused as error:
            refused[roi.level.level] = f"{roi.level.level}: {error}"
            continue
        warnings.extend(warned)
        if mask is None:
            empty += 1
        else:
            levels.append(mask)
    if empty:
        warnings.append(Warned(code="empty-rois", sentence=f"{empty} of {len(here)} vertebra ROIs have no voxels"))
    if not levels and not refused:
        raise MaskRefused("the mask is empty")
    return ReadMask(
        source="rtstruct",
        levels=tuple(levels),
        refused=refused,
        ignored_labels=ignored,
        unknown_labels=unknown,
        warnings=tuple(warnings),
    )


def contours_of(items: Sequence[Dataset]) -> list[NDArray[np.float64]]:
    """The closed planar contours among the items of a ContourSequence: points (n, 3) in mm, as (z, y, x)."""
    contours = []
    for item in items:
        if str(item.get("ContourGeometricType", "")) not in _CLOSED:
            continue
        values = np.asarray([float(v) for v in item.get("ContourData", None) or []], dtype=np.float64)
        if values.size % 3 or not np.isfinite(values).all():
            raise MaskRefused("a contour is damaged")
        if values.size > _MAX_POINTS:
            raise MaskRefused("a contour has too many points")
        if values.size >= 9:
            contours.append(values.reshape(-1, 3)[:, ::-1])
    return contours


def roi_mask(
    level: NamedLevel, contours: Sequence[NDArray[np.float64]], geometry: Geometry
) -> tuple[LevelMask | None, list[Warned]]:
    """The voxels of one ROI (contours in mm, zyx); None where they hold no voxel centre.

    Raises MaskRefused: contours across the slices, beyond the volume, or on planes denser than the slices.
    """
    slices = geometry.shape_zyx[0]
    planes: dict[int, list[NDArray[np.float64]]] = {}
    heights: dict[int, list[float]] = {}
    for contour in contours:
        index = geometry.index_zyx(contour)
        height = float(np.median(index[:, 0]))
        if float(np.abs(index[:, 0] - height).max()) > PLANAR_TOLERANCE:
            raise MaskRefused("a mask in another geometry: its contours cross the volume's slices")
        if not -HALF_SLICE <= height <= slices - 1 + HALF_SLICE:
            raise MaskRefused("a mask in another geometry: its contours reach beyond the volume's slices")
        k = min(max(round(height), 0), slices - 1)
        planes.setdefault(k, []).append(index[:, 1:])
        heights.setdefault(k, []).append(height)
    if not planes:
        return None, []
    if any(max(found) - min(found) > PLANAR_TOLERANCE for found in heights.values()):
        raise MaskRefused("a mask in another geometry: its contours lie on planes denser than the volume's slices")

    first, last = min(planes), max(planes)
    voxels = np.zeros((last - first + 1, *geometry.shape_zyx[1:]), dtype=bool)
    for k, polygons in planes.items():
        edges = np.concatenate(polygons)
        size = np.asarray(geometry.shape_zyx[1:])
        if (edges < -HALF_SLICE).any() or (edges > size - 1 + HALF_SLICE).any():
            raise MaskRefused("a mask in another geometry: its contours reach beyond the volume")
        voxels[k - first] = rasterised(polygons, (geometry.shape_zyx[1], geometry.shape_zyx[2]))
    warnings = []
    absent = last - first + 1 - len(planes)
    if absent:
        sentence = f"{level.level}: {absent} slices between its first and last have no contour and stay empty"
        warnings.append(Warned(code="contours-missing", sentence=sentence))
    off = max(abs(height - k) for k, found in heights.items() for height in found)
    if off > OFF_CENTRE:
        sentence = f"{level.level}: contours lie up to {off:.0%} of a slice beside the slices' centre planes"
        warnings.append(Warned(code="contours-off-centre", sentence=sentence))
    mask = cropped(level.level, level.kind, voxels)
    if mask is None:
        return None, warnings
    start = (mask.start_zyx[0] + first, mask.start_zyx[1], mask.start_zyx[2])
    return LevelMask(level=mask.level, kind=mask.kind, start_zyx=start, voxels=mask.voxels), warnings


def rasterised(polygons: Sequence[NDArray[np.float64]], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which pixel centres (row, column) lie inside, even–odd over all polygons: points (n, 2) in pixel indices.

    Each edge toggles, in every row that it crosses, all pixels from its crossing on.
    """
    toggles = np.zeros((shape[0], shape[1] + 1), dtype=np.int32)
    for polygon in polygons:
        start, end = polygon, np.roll(polygon, -1, axis=0)
        low, high = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
        first = np.clip(np.ceil(low), 0, shape[0]).astype(np.int64)
        stop = np.clip(np.ceil(high), 0, shape[0]).astype(np.int64)
        counts = stop - first
        edge = np.repeat(np.arange(len(polygon)), counts)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = first[edge] + within
        share = (rows - start[edge, 0]) / (end[edge, 0] - start[edge, 0])
        columns = start[edge, 1] + share * (end[edge, 1] - start[edge, 1])
        np.add.at(toggles, (rows, np.clip(np.ceil(columns), 0, shape[1]).astype(np.int64)), 1)
    return (np.cumsum(toggles[:, :-1], axis=1) % 2).astype(bool)
