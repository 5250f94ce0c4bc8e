"""Puts the frames of one series in order by geometry alone, and says why they make no volume where they do not.

InstanceNumber and file names decide nothing: frames are sorted by their position along the slice normal (PS3.3
C.7.6.2.1.1), and what is missing, repeated, tilted or mixed shows itself there. `arrange` needs headers only, so that
a series is judged before a pixel is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.dicom_ingest.collected import CollectedSlice
from services.dicom_ingest.headers import InstanceHeader, PlaneHeader
from services.dicom_ingest.settings import IngestSettings
from shared.fracture.records import Warned
from shared.fracture.volume import AIR_HU, Geometry, Volume

_ORTHONORMAL: Final = 1e-3
_SHOWN_GAPS: Final = 3

SPLITTERS: Final[Mapping[str, Callable[[PlaneHeader], object]]] = {
    "AcquisitionNumber": lambda plane: plane.acquisition,
    "TemporalPositionIdentifier": lambda plane: plane.temporal_position,
    "ImageType": lambda plane: plane.image_type,
    "ConvolutionKernel": lambda plane: plane.convolution_kernel,
    "KVP": lambda plane: plane.kvp,
    "SliceThickness": lambda plane: plane.slice_thickness_mm,
}
"""What can tell two stacks apart that lie at the same positions, in the order in which it is tried."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One frame of one instance, with its place along the slice normal."""

    instance: InstanceHeader
    frame: int
    position_mm: float

    @property
    def plane(self) -> PlaneHeader:
        """The frame's own header."""
        return self.instance.frames[self.frame]


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Either a grid with its frames in order (ascending along the normal), or the reasons why there is none."""

    reasons: tuple[str, ...] = ()
    frames: tuple[Placed, ...] = ()
    geometry: Geometry | None = None
    warnings: tuple[Warned, ...] = ()

    @property
    def slices(self) -> tuple[CollectedSlice, ...]:
        """The slices of the volume, in order."""
        return tuple(
            CollectedSlice(
                sop_instance_uid=placed.instance.sop_instance_uid,
                sop_class_uid=placed.instance.sop_class_uid,
                position_mm=placed.position_mm,
            )
            for placed in self.frames
        )


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A volume in HU (int16), axis z ascending along the slice normal, and the instances behind its slices."""

    volume: Volume
    slices: tuple[CollectedSlice, ...]
    warnings: tuple[Warned, ...] = ()


def _refused(*reasons: str) -> Arrangement:
    return Arrangement(reasons=reasons)


def arrange(
    instances: Sequence[InstanceHeader],
    settings: IngestSettings,
    *,
    prefer_sop_instance_uids: frozenset[str] = frozenset(),
) -> Arrangement:
    """Order all frames of a series into one regular stack.

    Where positions repeat, the stacks are told apart by AcquisitionNumber or another tag; the one that holds most of
    the preferred instances (those that a mask references), then the first, is taken, and a warning says so.
    """
    frames = [(instance, number) for instance in instances for number in range(len(instance.frames))]
    mixed = _incomplete(frames) or _mixed(frames, settings)
    if mixed:
        return _refused(*mixed)
    normal = slice_normal(frames[0][0].frames[frames[0][1]])
    placed = sorted(
        (
            Placed(instance=instance, frame=number, position_mm=_along(normal, instance.frames[number]))
            for instance, number in frames
        ),
        key=lambda p: (p.position_mm, p.instance.sop_instance_uid, p.frame),
    )
    repeats = sum(
        1 for before, after in pairwise(placed) if after.position_mm - before.position_mm < settings.same_position_mm
    )
    if not repeats:
        return _stack(placed, settings)
    return _split(placed, repeats, settings, prefer_sop_instance_uids)


def _incomplete(frames: Sequence[tuple[InstanceHeader, int]]) -> tuple[str, ...]:
    if not frames:
        return ("no images",)
    reasons = []
    said: Callable[[PlaneHeader], object]
    for keyword, said in (
        ("ImagePositionPatient", lambda p: p.position_xyz),
        ("ImageOrientationPatient", lambda p: p.orientation_xyz),
        ("PixelSpacing", lambda p: p.pixel_spacing),
        ("RescaleSlope", lambda p: p.rescale_slope),
        ("RescaleIntercept", lambda p: p.rescale_intercept),
    ):
        lacking = sum(1 for instance, number in frames if said(instance.frames[number]) is None)
        if lacking:
            reasons.append(f"{keyword} is missing or unusable in {_share(lacking, len(frames))}")
    planes = [instance.frames[number] for instance, number in frames]
    if not all(instance.shared.rows and instance.shared.columns for instance, _ in frames):
        reasons.append("Rows or Columns are missing, so that no grid can be made")
    if any(plane.pixel_spacing is not None and min(plane.pixel_spacing) <= 0 for plane in planes):
        reasons.append("PixelSpacing is not above zero")
    if any(plane.rescale_slope == 0 for plane in planes):
        reasons.append("RescaleSlope is zero")
    if any(plane.orientation_xyz is not None and not _orthonormal(plane.orientation_xyz) for plane in planes):
        reasons.append("ImageOrientationPatient is not a pair of perpendicular unit vectors")
    return tuple(reasons)


def _share(count: int, total: int) -> str:
    return f"{count} of {total} images" if total > 1 else "the only image"


def _orthonormal(cosines: Sequence[float]) -> bool:
    row, column = np.asarray(cosines[:3]), np.asarray(cosines[3:])
    return bool(
        abs(float(row @ row) - 1) < 2 * _ORTHONORMAL
        and abs(float(column @ column) - 1) < 2 * _ORTHONORMAL
        and abs(float(row @ column)) < _ORTHONORMAL
    )


def _mixed(frames: Sequence[tuple[InstanceHeader, int]], settings: IngestSettings) -> tuple[str, ...]:
    reasons = []
    matrices = {(instance.shared.rows, instance.shared.columns) for instance, _ in frames}
    if len(matrices) > 1:
        reasons.append(f"mixed image sizes: {len(matrices)} different Rows × Columns in one series")
    orientations = np.array([instance.frames[number].orientation_xyz for instance, number in frames], dtype=float)
    different = int(
        (np.abs(orientations - np.median(orientations, axis=0)).max(axis=1) > settings.orientation_tolerance).sum()
    )
    if different:
        reasons.append(
            f"mixed orientations: ImageOrientationPatient differs within the series ({different} of {len(frames)})"
        )
    spacings = np.array([instance.frames[number].pixel_spacing for instance, number in frames], dtype=float)
    if float(np.ptp(spacings, axis=0).max()) > 1e-3 * float(spacings.max()):
        reasons.append("mixed pixel spacings: PixelSpacing differs within the series")
    if 1 < _frames_of_reference(frames) < len(frames):
        reasons.append("mixed frames of reference: FrameOfReferenceUID differs within the series")
    return tuple(reasons)


def _frames_of_reference(frames: Iterable[tuple[InstanceHeader, int]]) -> int:
    """How many there are. One for each image is what some de-identifiers leave (LIDC-IDRI), and says nothing."""
    return len({instance.shared.frame_of_reference_uid for instance, _ in frames} - {""})


def slice_normal(plane: PlaneHeader) -> NDArray[np.float64]:
    """The unit vector (x, y, z) perpendicular to a plane: row direction × column direction."""
    row, column = _axes(plane)
    return np.asarray(np.cross(row, column), dtype=np.float64)


def _axes(plane: PlaneHeader) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Direction of growing column index and of growing row index, made exactly orthonormal."""
    if plane.orientation_xyz is None:
        raise ValueError("a plane without orientation has no axes")
    cosines = np.asarray(plane.orientation_xyz, dtype=np.float64)
    row = cosines[:3] / np.linalg.norm(cosines[:3])
    column = cosines[3:] - row * float(row @ cosines[3:])
    return row, column / np.linalg.norm(column)


def _along(normal: NDArray[np.float64], plane: PlaneHeader) -> float:
    return float(normal @ np.asarray(plane.position_xyz, dtype=np.float64))


def _split(placed: Sequence[Placed], repeats: int, settings: IngestSettings, preferred: frozenset[str]) -> Arrangement:
    """Tell stacks at the same positions apart by a tag; each must reach as far as the whole."""
    first, last = placed[0].position_mm, placed[-1].position_mm
    if last - first < settings.same_position_mm:
        return _refused(f"no volume: all {len(placed)} images lie at one position")
    for keyword, value in SPLITTERS.items():
        parts: dict[object, list[Placed]] = {}
        for one in placed:
            parts.setdefault(value(one.plane), []).append(one)
        if len(parts) < 2:
            continue
        stacks = [(part, _stack(part, settings)) for part in parts.values() if _whole(part, first, last, settings)]
        if len(stacks) < len(parts):
            continue
        good = [(part, stack) for part, stack in stacks if not stack.reasons]
        if not good:
            continue
        _, stack = max(good, key=lambda pair: sum(p.instance.sop_instance_uid in preferred for p in pair[0]))
        number = 1 + [s for _, s in stacks].index(stack)
        said = f"the series holds {len(parts)} stacks at the same positions (by {keyword}); number {number} was taken"
        return Arrangement(
            frames=stack.frames,
            geometry=stack.geometry,
            warnings=(*stack.warnings, Warned(code="several-stacks", sentence=said)),
        )
    where = next(
        after.position_mm
        for before, after in pairwise(placed)
        if after.position_mm - before.position_mm < settings.same_position_mm
    )
    return _refused(
        f"repeated positions: {repeats} of {len(placed)} images lie where another one lies"
        f" (first at {where:.1f} mm along the slice normal), and no tag tells the stacks apart"
    )


def _whole(part: Sequence[Placed], first: float, last: float, settings: IngestSettings) -> bool:
    positions = [one.position_mm for one in part]
    steps = np.diff(positions)
    if len(positions) < 2 or float(steps.min()) < settings.same_position_mm:
        return False
    slack = float(np.median(steps)) * 1.5
    return positions[0] - first <= slack and last - positions[-1] <= slack


def _stack(placed: Sequence[Placed], settings: IngestSettings) -> Arrangement:
    """One stack with distinct positions → its grid, or why it is none."""
    count = len(placed)
    if count < settings.min_slices:
        tilt = placed[0].instance.shared.gantry_tilt_degrees
        more = (f"gantry tilt of {abs(tilt):.1f} degrees (GantryDetectorTilt)",) if tilt and abs(tilt) > 0.5 else ()
        images = "1 image" if count == 1 else f"{count} images"
        return _refused(f"{images}, a volume needs at least {settings.min_slices}", *more)
    reasons = [*_tilt(placed, settings), *_gaps([p.position_mm for p in placed], settings)]
    if reasons:
        return _refused(*reasons)
    return Arrangement(frames=tuple(placed), geometry=_geometry(placed), warnings=tuple(_warnings(placed)))


def _tilt(placed: Sequence[Placed], settings: IngestSettings) -> list[str]:
    """Shear between the slices: a gantry tilt where it grows evenly, a shift where it does not."""
    points = np.array([one.plane.position_xyz for one in placed], dtype=np.float64)
    normal = slice_normal(placed[0].plane)
    line = points[-1] - points[0]
    drift = line - normal * float(normal @ line)
    angle = math.degrees(math.atan2(float(np.linalg.norm(drift)), float(normal @ line)))
    relative = points - points[0]
    share = (relative @ normal) / float(normal @ line)
    off_line = np.linalg.norm(relative - normal * (relative @ normal)[:, None] - share[:, None] * drift, axis=1)
    shifted = int((off_line > settings.in_plane_tolerance_mm).sum())
    if shifted:
        return [f"slices are shifted against each other within their plane ({shifted} of {len(placed)})"]
    if angle > settings.max_gantry_tilt_degrees and float(np.linalg.norm(drift)) > settings.in_plane_tolerance_mm:
        return [f"gantry tilt of {angle:.1f} degrees: the slices are not stacked along their normal"]
    return []


def _gaps(positions: Sequence[float], settings: IngestSettings) -> list[str]:
    steps = np.diff(np.asarray(positions, dtype=np.float64))
    usual = float(np.sort(steps)[(len(steps) - 1) // 2])
    even = float(steps.mean())
    if float(np.abs(steps - even).max()) <= settings.spacing_tolerance * even:
        return []
    multiples = np.rint(steps / usual)
    fits = np.abs(steps - multiples * usual) <= settings.spacing_tolerance * usual * np.maximum(multiples, 1)
    wide = multiples > 1
    if bool(fits.all()) and bool((multiples >= 1).all()) and int(wide.sum()) * 2 <= len(steps):
        missing = int((multiples - 1).sum())
        places = [
            f"{positions[k]:.1f} and {positions[k + 1]:.1f} mm" for k in np.flatnonzero(wide)[:_SHOWN_GAPS].tolist()
        ]
        more = "" if int(wide.sum()) <= _SHOWN_GAPS else f" and {int(wide.sum()) - _SHOWN_GAPS} more gaps"
        slices = "1 missing slice" if missing == 1 else f"{missing} missing slices"
        return [f"{slices} of {usual:.2f} mm: between {', '.join(places)} along the slice normal{more}"]
    return [f"irregular slice spacing: {float(steps.min()):.2f} to {float(steps.max()):.2f} mm"]


def _geometry(placed: Sequence[Placed]) -> Geometry:
    first = placed[0]
    row, column = _axes(first.plane)
    normal = slice_normal(first.plane)
    spacing = first.plane.pixel_spacing
    position = first.plane.position_xyz
    if spacing is None or position is None:
        raise ValueError("a stack without positions or spacing has no geometry")
    axes = np.column_stack([normal, column, row])[::-1]
    rows = [(float(a[0]), float(a[1]), float(a[2])) for a in axes]
    return Geometry(
        shape_zyx=(len(placed), int(first.instance.shared.rows or 0), int(first.instance.shared.columns or 0)),
        spacing_zyx=((placed[-1].position_mm - first.position_mm) / (len(placed) - 1), spacing[0], spacing[1]),
        origin_zyx=(position[2], position[1], position[0]),
        direction_zyx=(rows[0], rows[1], rows[2]),
    )


def _warnings(placed: Sequence[Placed]) -> list[Warned]:
    found = []
    spacing = (placed[-1].position_mm - placed[0].position_mm) / (len(placed) - 1)
    thickness = placed[0].plane.slice_thickness_mm
    if thickness and spacing > 1.1 * thickness + 0.05:
        found.append(
            Warned(
                code="slice-gap",
                sentence=f"slices of {thickness:.2f} mm lie {spacing:.2f} mm apart: what lies between was not imaged",
            )
        )
    if _frames_of_reference((one.instance, one.frame) for one in placed) > 1:
        found.append(
            Warned(
                code="frame-of-reference",
                sentence="each image names a frame of reference of its own; positions were taken as one",
            )
        )
    announced = {one.instance.shared.images_in_acquisition for one in placed}
    acquisitions = {one.plane.acquisition for one in placed}
    number = next(iter(announced)) if len(announced) == 1 else None
    if number and len(acquisitions) == 1 and number > len(placed):
        found.append(
            Warned(
                code="fewer-images",
                sentence=f"the headers announce {number} images of this acquisition, {len(placed)} are here;"
                " slices may be missing at the ends",
            )
        )
    return found


def assemble(
    arrangement: Arrangement, decode: Callable[[InstanceHeader, Sequence[int]], NDArray[np.int16]]
) -> Assembled:
    """Fill the grid of an arrangement with HU, one instance in memory at a time.

    `decode` gives the named frames of an instance in HU, shape (frames, rows, columns).
    """
    if arrangement.geometry is None:
        raise ValueError("an arrangement with reasons has no volume")
    voxels = np.full(arrangement.geometry.shape_zyx, AIR_HU, dtype=np.int16)
    by_instance: dict[int, tuple[InstanceHeader, list[int], list[int]]] = {}
    for index, placed in enumerate(arrangement.frames):
        _, frames, indices = by_instance.setdefault(id(placed.instance), (placed.instance, [], []))
        frames.append(placed.frame)
        indices.append(index)
    for instance, frames, indices in by_instance.values():
        voxels[indices] = decode(instance, frames)
    return Assembled(
        volume=Volume(voxels=voxels, geometry=arrangement.geometry),
        slices=arrangement.slices,
        warnings=arrangement.warnings,
    )
