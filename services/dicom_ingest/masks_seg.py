"""Vertebra masks out of DICOM SEG: each frame is placed by its own position, never by its number.

A SEG holds frames for some slices and some segments in any order (PS3.3 A.51, C.8.20). A frame's plane position,
orientation and pixel spacing say where its pixels lie; they must be voxel centres of the volume, up to the order and
direction of the axes. Levels come from codes, else from labels (level_names.py). Labels are free text of people: they
are read and never repeated; a segment is named by its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.utils import iter_pixels

from services.dicom_ingest.headers import DEFLATED, quiet_pydicom, syntax_name
from services.dicom_ingest.level_masks import LevelMask, MaskRefused, ReadMask
from services.dicom_ingest.level_names import (
    SOME_VERTEBRA,
    NamedLevel,
    coded_level,
    mentions_vertebra,
    named_level,
    scheme_of,
)
from services.dicom_ingest.pixels import DECODERS
from shared.fracture.protocol import RoiKind
from shared.fracture.records import Warned
from shared.fracture.uids import OUR_MANUFACTURER
from shared.fracture.volume import Geometry

GRID_TOLERANCE: Final = 0.1
"""Of a voxel: how far a pixel centre of the SEG may lie from a voxel centre of the volume."""

FRACTION: Final = 0.5
"""From this share of MaximumFractionalValue on, a fractional pixel is inside."""

MAX_FILE_BYTES: Final = 2 << 30
"""A larger mask object is refused before it is read."""

_FRAMES_PER_SEGMENT: Final = 20_000
_NOT_IN_PYDICOM: Final = {"1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression"}
_NATIVE: Final = frozenset({"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"})
_COMPRESSED: Final = frozenset(
    {
        "1.2.840.10008.1.2.5",
        "1.2.840.10008.1.2.4.80",
        "1.2.840.10008.1.2.4.90",
        "1.2.840.10008.1.2.4.201",
    }
)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What one item of the SegmentSequence says that it is."""

    number: int
    level: NamedLevel | None
    fault: str = ""
    """Not empty: it speaks of a vertebra, but not of which, or names two."""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """One frame of the pixel data: where pixel (0, 0) lies in the volume's index space, and its steps."""

    number: int
    segment: int | None
    origin: NDArray[np.float64]
    row_axis: int
    row_sign: int
    column_axis: int
    column_sign: int


def read_seg(path: Path, geometry: Geometry, *, frame_of_reference_uid: str) -> ReadMask:
    """The vertebrae of a DICOM SEG on the grid of a volume. Raises MaskRefused with the reason."""
    with quiet_pydicom():
        ds = read_mask_object(path, name="DICOM SEG")
        return seg_masks(ds, geometry, frame_of_reference_uid=frame_of_reference_uid)


def read_mask_object(path: Path, *, name: str, pixels: bool = True) -> Dataset:
    """The dataset of a SEG or RTSTRUCT file, bounded in size. Raises MaskRefused; call it under `quiet_pydicom`."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise MaskRefused(f"the {name} has more than {MAX_FILE_BYTES >> 20} MiB")
        if str(read_file_meta_info(path).get("TransferSyntaxUID", "")) == DEFLATED:
            raise MaskRefused(f"the {name}'s transfer syntax cannot be decoded: {syntax_name(DEFLATED)}")
        ds = pydicom.dcmread(path, stop_before_pixels=not pixels)
        if str(ds.get("Manufacturer", "")) == OUR_MANUFACTURER:
            raise MaskRefused(f"the {name} was made by this pipeline: ignored as a mask")
        return ds
    except MaskRefused:
        raise
    except Exception as error:  # pydicom raises whatever the bytes lead it to; the file costs only itself
        raise MaskRefused(f"the {name} cannot be read: it is truncated or damaged") from error


def seg_masks(ds: Dataset, geometry: Geometry, *, frame_of_reference_uid: str) -> ReadMask:
    """The vertebrae of a DICOM SEG on the grid of a volume. Raises MaskRefused with the reason."""
    try:
        return _seg_masks(ds, geometry, frame_of_reference_uid)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise MaskRefused("the DICOM SEG is damaged: what it says of its frames or segments is not complete") from error


def _seg_masks(ds: Dataset, geometry: Geometry, frame_of_reference_uid: str) -> ReadMask:
    own = str(ds.get("FrameOfReferenceUID", "") or _shared_frame_of_reference(ds))
    if not own or own != frame_of_reference_uid:
        raise MaskRefused("a mask in another frame of reference")
    segments = segments_of(ds)
    if not segments:
        raise MaskRefused("the DICOM SEG has no segments")
    wanted = {segment.number: segment for segment in segments if segment.level is not None}
    unknown = tuple(f"segment {segment.number} ({segment.fault})" for segment in segments if segment.fault)
    ignored = len(segments) - len(wanted) - len(unknown)
    if not wanted:
        return ReadMask(source="dicom-seg", ignored_labels=ignored, unknown_labels=unknown)

    kind = str(ds.get("SegmentationType", ""))
    if kind not in ("BINARY", "FRACTIONAL", "LABELMAP"):
        raise MaskRefused("the DICOM SEG is neither BINARY, FRACTIONAL nor LABELMAP")
    frames = _frames(ds, geometry, labelmap=kind == "LABELMAP", wanted=wanted)
    _refuse_bombs(ds, geometry, frames, len(segments))
    threshold = 1.0 if kind != "FRACTIONAL" else FRACTION * float(ds.MaximumFractionalValue)

    pieces: dict[int, list[tuple[tuple[int, int, int], NDArray[np.bool_]]]] = {number: [] for number in wanted}
    decoded = _decoded(ds, [frame.number for frame in frames])
    for frame, pixels in zip(frames, decoded, strict=True):
        if frame.segment is not None:
            _add(pieces[frame.segment], frame, pixels >= threshold, geometry)
            continue
        for value in np.flatnonzero(np.bincount(pixels.ravel())):
            if int(value) in wanted:
                _add(pieces[int(value)], frame, pixels == value, geometry)

    levels = []
    empty = 0
    for number, segment in wanted.items():
        if segment.level is None or not pieces[number]:
            empty += 1
            continue
        levels.append(_joined(segment.level, pieces[number]))
    if not levels:
        raise MaskRefused("the mask is empty")
    warnings = (
        (Warned(code="empty-segments", sentence=f"{empty} of {len(wanted)} vertebra segments have no voxels"),)
        if empty
        else ()
    )
    return ReadMask(
        source="dicom-seg",
        levels=tuple(levels),
        ignored_labels=ignored,
        unknown_labels=unknown,
        warnings=warnings,
    )


def segments_of(ds: Dataset) -> list[Segment]:
    """What the segments of a SEG are, by code, else by label."""
    segments = []
    labelmap = ds.get("SegmentationType") == "LABELMAP"
    for item in ds.get("SegmentSequence", None) or []:
        number = int(item.SegmentNumber)
        if labelmap and number == 0:
            continue
        level, fault = _level_of(item)
        segments.append(Segment(number=number, level=level, fault=fault))
    return segments


def _codes(item: Dataset, keyword: str) -> list[tuple[str, str, str]]:
    return [
        (
            scheme_of(str(code.get("CodingSchemeDesignator", "") or "")),
            str(code.get("CodeValue", "") or code.get("LongCodeValue", "") or ""),
            str(code.get("CodeMeaning", "") or ""),
        )
        for code in item.get(keyword, None) or []
    ]


def _level_of(item: Dataset) -> tuple[NamedLevel | None, str]:
    types = _codes(item, "SegmentedPropertyTypeCodeSequence")
    label = str(item.get("SegmentLabel", "") or "")
    by_label = named_level(label)
    coded = next((level for scheme, value, _ in types if (level := coded_level(scheme, value))), None)
    some = next(((scheme, value) for scheme, value, _ in types if (scheme, value) in SOME_VERTEBRA), None)
    kind: RoiKind | None = coded.kind if coded else None
    if coded is None and some is not None:
        kind = SOME_VERTEBRA[some]
        regions = _codes(item, "AnatomicRegionSequence")
        coded = next((level for scheme, value, _ in regions if (level := coded_level(scheme, value))), None)
        if coded is not None and kind is None and coded.kind == "body":
            kind = "body"
    if coded is not None and by_label is not None and coded.level != by_label.level:
        return None, "its code and its label name different vertebrae"
    if coded is not None:
        says_body = by_label is not None and by_label.kind == "body"
        return NamedLevel(level=coded.level, kind="body" if says_body else kind), ""
    if by_label is not None:
        return NamedLevel(level=by_label.level, kind=by_label.kind or kind), ""
    known_code = some is not None or not types or types[0][0] not in ("SCT", "SRT")
    if known_code:
        by_meaning = next((level for _, _, meaning in types if (level := named_level(meaning))), None)
        if by_meaning is not None:
            return by_meaning, ""
    of_spine = some in (("SCT", "51282000"), ("SRT", "T-11510"), ("SCT", "3572006"))
    if of_spine or (known_code and mentions_vertebra(label)):
        return None, "a vertebra without a level"
    return None, ""


def _shared_frame_of_reference(ds: Dataset) -> str:
    for item in ds.get("ReferencedFrameOfReferenceSequence", None) or []:
        return str(item.get("FrameOfReferenceUID", "") or "")
    return ""


def _group(shared: Dataset, own: Dataset, keyword: str) -> Dataset:
    for groups in (own, shared):
        sequence = groups.get(keyword, None)
        if sequence:
            item: Dataset = sequence[0]
            return item
    raise MaskRefused(f"the DICOM SEG does not say where its frames lie ({keyword} is missing)")


def _frames(ds: Dataset, geometry: Geometry, *, labelmap: bool, wanted: dict[int, Segment]) -> list[_Frame]:
    shared_groups = ds.get("SharedFunctionalGroupsSequence", None)
    shared = shared_groups[0] if shared_groups else Dataset()
    per_frame = ds.get("PerFrameFunctionalGroupsSequence", None) or []
    if len(per_frame) != int(ds.get("NumberOfFrames", 1) or 1):
        raise MaskRefused("the DICOM SEG does not describe each of its frames")
    shape = (int(ds.Rows), int(ds.Columns))
    frames = []
    for number, own in enumerate(per_frame):
        segment: int | None = None
        if not labelmap:
            segment = int(_group(shared, own, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            if segment not in wanted:
                continue
        frames.append(_placed(number, segment, shape, shared, own, geometry))
    return frames


def _placed(
    number: int,
    segment: int | None,
    shape: tuple[int, int],
    shared: Dataset,
    own: Dataset,
    geometry: Geometry,
) -> _Frame:
    position = [float(v) for v in _group(shared, own, "PlanePositionSequence").ImagePositionPatient]
    orientation = [float(v) for v in _group(shared, own, "PlaneOrientationSequence").ImageOrientationPatient]
    spacing = [float(v) for v in _group(shared, own, "PixelMeasuresSequence").PixelSpacing]
    if not np.isfinite([*position, *orientation, *spacing]).all() or len(position) != 3 or len(orientation) != 6:
        raise MaskRefused("the DICOM SEG has positions that are no numbers")
    place = np.array([position[::-1]])
    along_columns = np.array(orientation[:3][::-1]) * spacing[1]
    along_rows = np.array(orientation[3:][::-1]) * spacing[0]
    origin = geometry.index_zyx(place)[0]
    column_step = geometry.index_zyx(place + along_columns)[0] - origin
    row_step = geometry.index_zyx(place + along_rows)[0] - origin
    column_axis, row_axis = int(np.abs(column_step).argmax()), int(np.abs(row_step).argmax())
    if column_axis == row_axis:
        raise MaskRefused("a mask in another geometry: its planes are turned against the volume's slices")
    column_sign = 1 if column_step[column_axis] > 0 else -1
    row_sign = 1 if row_step[row_axis] > 0 else -1
    ideal_column = np.eye(3)[column_axis] * column_sign
    ideal_row = np.eye(3)[row_axis] * row_sign
    drift = max(
        float(np.abs(column_step - ideal_column).max()) * max(shape[1] - 1, 1),
        float(np.abs(row_step - ideal_row).max()) * max(shape[0] - 1, 1),
    )
    if drift > GRID_TOLERANCE:
        sizes = np.array([spacing[1], spacing[0]])
        there = np.array([geometry.spacing_zyx[column_axis], geometry.spacing_zyx[row_axis]])
        if np.abs(sizes - there).max() > 1e-3 * there.min():
            what = f"pixels of {spacing[0]:.4g} × {spacing[1]:.4g} mm"
        else:
            what = "its planes are turned against the volume's slices"
        raise MaskRefused(f"a mask in another geometry: {what}")
    if float(np.abs(origin - np.rint(origin)).max()) > GRID_TOLERANCE:
        apart = float(np.linalg.norm((origin - np.rint(origin)) * np.asarray(geometry.spacing_zyx)))
        raise MaskRefused(f"a mask in another geometry: a plane lies {apart:.2f} mm beside the volume's voxels")
    return _Frame(
        number=number,
        segment=segment,
        origin=np.rint(origin),
        row_axis=row_axis,
        row_sign=row_sign,
        column_axis=column_axis,
        column_sign=column_sign,
    )


def _refuse_bombs(ds: Dataset, geometry: Geometry, frames: Sequence[_Frame], segments: int) -> None:
    syntax = str(ds.file_meta.TransferSyntaxUID) if "TransferSyntaxUID" in getattr(ds, "file_meta", {}) else ""
    if syntax not in _NATIVE | _COMPRESSED:
        name = _NOT_IN_PYDICOM.get(syntax) or syntax_name(syntax)
        raise MaskRefused(f"the DICOM SEG's transfer syntax cannot be decoded: {name}")
    if "PixelData" not in ds:
        raise MaskRefused("the DICOM SEG has no pixel data")
    rows, columns, bits = int(ds.Rows), int(ds.Columns), int(ds.BitsAllocated)
    count = int(ds.get("NumberOfFrames", 1) or 1)
    largest = max(geometry.shape_zyx)
    if not 0 < rows <= 2 * largest or not 0 < columns <= 2 * largest:
        raise MaskRefused(f"a mask in another geometry: frames of {rows} × {columns} pixels")
    if count > segments * _FRAMES_PER_SEGMENT:
        raise MaskRefused("the DICOM SEG promises more frames than its segments can have")
    if bits not in (1, 8, 16) or int(ds.get("SamplesPerPixel", 1)) != 1:
        raise MaskRefused("the DICOM SEG has pixels that are no mask")
    if syntax in _NATIVE and rows * columns * count * bits > 8 * len(ds.PixelData):
        raise MaskRefused("the DICOM SEG is truncated: it promises more frames than it holds")


def _decoded(ds: Dataset, numbers: Sequence[int]) -> Iterator[NDArray[Any]]:
    if not numbers:
        return
    try:
        if int(ds.BitsAllocated) == 1 and str(ds.file_meta.TransferSyntaxUID) in _NATIVE:
            yield from _unpacked(ds, numbers)
            return
        decoder = DECODERS.get(str(ds.file_meta.TransferSyntaxUID), "")
        for frame in iter_pixels(ds, indices=list(numbers), decoding_plugin=decoder):
            yield frame.reshape(int(ds.Rows), int(ds.Columns))
    except Exception as error:  # decoders raise whatever the bytes lead them to
        syntax = syntax_name(str(ds.file_meta.TransferSyntaxUID))
        raise MaskRefused(
            f"the frames of the DICOM SEG cannot be decoded ({syntax}, {ds.BitsAllocated} bit)"
        ) from error


def _unpacked(ds: Dataset, numbers: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Frames of one bit a pixel, which begin in the middle of a byte (PS3.5 8.1.1, little endian within the byte)."""
    rows, columns = int(ds.Rows), int(ds.Columns)
    length = rows * columns
    packed = np.frombuffer(ds.PixelData, dtype=np.uint8)
    for number in numbers:
        first, last = number * length, (number + 1) * length
        bits = np.unpackbits(packed[first // 8 : (last + 7) // 8], bitorder="little")
        yield bits[first % 8 : first % 8 + length].reshape(rows, columns)


def _add(
    pieces: list[tuple[tuple[int, int, int], NDArray[np.bool_]]],
    frame: _Frame,
    inside: NDArray[np.bool_],
    geometry: Geometry,
) -> None:
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    if not rows.size:
        return
    part = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    start = [int(v) for v in frame.origin]
    start[frame.row_axis] += frame.row_sign * int(rows[0] if frame.row_sign > 0 else rows[-1])
    start[frame.column_axis] += frame.column_sign * int(columns[0] if frame.column_sign > 0 else columns[-1])
    part = part[:: frame.row_sign, :: frame.column_sign]
    normal = 3 - frame.row_axis - frame.column_axis
    plane = part if frame.row_axis < frame.column_axis else part.T
    block = np.expand_dims(plane, normal)
    if any(s < 0 or s + n > size for s, n, size in zip(start, block.shape, geometry.shape_zyx, strict=True)):
        raise MaskRefused("a mask in another geometry: it reaches beyond the volume")
    pieces.append(((start[0], start[1], start[2]), block.copy()))


def _joined(level: NamedLevel, pieces: list[tuple[tuple[int, int, int], NDArray[np.bool_]]]) -> LevelMask:
    low = [min(start[axis] for start, _ in pieces) for axis in range(3)]
    high = [max(start[axis] + block.shape[axis] for start, block in pieces) for axis in range(3)]
    voxels = np.zeros([high[axis] - low[axis] for axis in range(3)], dtype=bool)
    for start, block in pieces:
        where = tuple(slice(start[axis] - low[axis], start[axis] - low[axis] + block.shape[axis]) for axis in range(3))
        voxels[where] |= block
    return LevelMask(level=level.level, kind=level.kind, start_zyx=(low[0], low[1], low[2]), voxels=voxels)
