"""NIfTI volumes and label maps: judged by their header before memory is taken, placed by their affine, and stripped.

NIfTI counts i fastest and speaks RAS+; we hold [k, j, i] in LPS+ (volume.py). A mask belongs to a volume when its voxel
centres are those of the volume up to the order and direction of the axes: then no voxel is resampled and none moved.
Anything else is "a mask in another geometry". Nothing of a header but voxels and geometry goes on.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from services.dicom_ingest.label_maps import LARGEST_LABEL, LabelMap
from services.dicom_ingest.level_masks import LevelMask, MaskRefused, ReadMask
from shared.fracture.ids import canonical_json, sha256_hex
from shared.fracture.protocol import RoiKind
from shared.fracture.records import Warned
from shared.fracture.volume import Geometry, Volume

MAX_VOXELS: Final = 1_000_000_000
"""Of a volume: 512 × 512 × 3,800 slices; more is refused by the header."""

MAX_BYTES: Final = 4 << 30
"""Of a volume's values in memory; scaled ones (scl_slope, scl_inter) take eight bytes each."""

MAX_LABELS: Final = 500
"""Distinct values in a mask; more is an image rather than a mask."""

GRID_TOLERANCE: Final = 0.1
"""Of the smallest voxel edge: how far apart voxel centres of mask and volume may lie (rounded headers)."""

_DEFLATE_LIMIT: Final = 1100
"""gzip cannot shrink further than about 1 : 1032."""

_READ_FAULTS: Final = (
    ImageFileError,
    HeaderDataError,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    OverflowError,
    KeyError,
    IndexError,
    zlib.error,
)

_LPS_FROM_RAS: Final = np.diag([-1.0, -1.0, 1.0])


class NiftiRefused(MaskRefused):
    """A NIfTI file cannot be used; the text says why, in words without identifiers."""


@dataclass(frozen=True, kw_only=True)
class NiftiHeader:
    """What a header says, in our axes."""

    shape_zyx: tuple[int, int, int]
    matrix_zyx: NDArray[np.float64]
    """(3, 3): world step (z, y, x of LPS+) of one voxel along array axis 0, 1, 2, in mm."""
    origin_zyx: NDArray[np.float64]
    dtype: np.dtype[Any]
    two_places: bool
    """qform and sform are both set and differ; the sform holds."""


def read_header(path: Path, *, max_voxels: int = MAX_VOXELS) -> NiftiHeader:
    """The header of a NIfTI file (.nii, .nii.gz), without its voxels. Raises NiftiRefused."""
    header, _ = _open(path, max_voxels=max_voxels)
    return header


def _open(path: Path, *, max_voxels: int) -> tuple[NiftiHeader, Any]:
    if not path.is_file():
        raise NiftiRefused("the file does not exist")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise NiftiRefused("is no NIfTI file (.nii or .nii.gz)")
    try:
        image: Any = nib.load(path)
    except _READ_FAULTS as error:
        raise NiftiRefused("cannot be read as NIfTI: it is truncated or no NIfTI file") from error
    if not isinstance(image, nib.Nifti1Image):
        raise NiftiRefused("is no NIfTI file (.nii or .nii.gz)")
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise NiftiRefused(f"has {len(shape)} dimensions instead of 3")
    if min(shape) < 1:
        raise NiftiRefused(f"has an axis without voxels: {_times(shape)}")
    voxels = shape[0] * shape[1] * shape[2]
    if voxels > max_voxels:
        raise NiftiRefused(f"promises {_times(shape)} voxels, more than the {max_voxels} allowed")
    dtype: np.dtype[Any] = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise NiftiRefused("has no whole or real numbers as voxels (colour or complex)")
    promised = voxels * dtype.itemsize
    size = path.stat().st_size
    if promised > (size * _DEFLATE_LIMIT if path.name.lower().endswith(".gz") else size):
        raise NiftiRefused("is truncated: its header promises more voxels than the file can hold")

    slope, intercept = image.header.get_slope_inter()
    scaled = slope not in (None, 1) or intercept not in (None, 0)
    if voxels * (8 if scaled else dtype.itemsize) > MAX_BYTES:
        raise NiftiRefused(f"would take more than {MAX_BYTES >> 20} MiB of memory")

    qform, q_code = image.header.get_qform(coded=True)
    sform, s_code = image.header.get_sform(coded=True)
    if not q_code and not s_code:
        raise NiftiRefused("has neither qform nor sform: where it lies in the patient is unknown")
    affine = np.asarray(sform if s_code else qform, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise NiftiRefused("has NaN or infinity in its affine")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise NiftiRefused("has an affine without volume (a spacing of zero)")
    matrix = (_LPS_FROM_RAS @ affine[:3, :3])[::-1, ::-1]
    origin = (_LPS_FROM_RAS @ affine[:3, 3])[::-1]
    two_places = False
    if q_code and s_code and qform is not None and sform is not None:
        last = np.array([*(n - 1 for n in shape), 1.0])
        corners = np.array([[0, 0, 0, 1.0], last, [last[0], 0, 0, 1], [0, last[1], 0, 1], [0, 0, last[2], 1]])
        apart = np.linalg.norm(corners @ (np.asarray(qform, dtype=float) - affine).T, axis=1).max()
        two_places = bool(apart > GRID_TOLERANCE * np.linalg.norm(matrix, axis=0).min())
    header = NiftiHeader(
        shape_zyx=(shape[2], shape[1], shape[0]),
        matrix_zyx=np.ascontiguousarray(matrix),
        origin_zyx=np.ascontiguousarray(origin),
        dtype=dtype,
        two_places=two_places,
    )
    return header, image


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(str(n) for n in shape)


def _voxels(image: Any, header: NiftiHeader) -> NDArray[Any]:
    """The scaled values as [k, j, i]: integers where the file has integers without scaling."""
    try:
        values = np.asanyarray(image.dataobj)
    except MemoryError as error:
        raise NiftiRefused("does not fit into memory") from error
    except _READ_FAULTS as error:
        raise NiftiRefused("is truncated or damaged: its voxels cannot be read") from error
    zyx: NDArray[Any] = values.reshape(header.shape_zyx[::-1], order="F").T
    return zyx


def read_nifti_volume(path: Path, *, max_voxels: int = MAX_VOXELS) -> tuple[Volume, tuple[Warned, ...]]:
    """The CT volume of a NIfTI file in whole HU (int16; scl_slope and scl_inter honoured).

    Raises NiftiRefused: no NIfTI, truncated, not three-dimensional, too large, NaN, values that no int16 holds, an
    affine that is sheared or absent.
    """
    header, image = _open(path, max_voxels=max_voxels)
    spacing = np.linalg.norm(header.matrix_zyx, axis=0)
    direction = header.matrix_zyx / spacing
    rows = [(float(row[0]), float(row[1]), float(row[2])) for row in direction]
    try:
        geometry = Geometry(
            shape_zyx=header.shape_zyx,
            spacing_zyx=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
            origin_zyx=(float(header.origin_zyx[0]), float(header.origin_zyx[1]), float(header.origin_zyx[2])),
            direction_zyx=(rows[0], rows[1], rows[2]),
        )
    except ValueError as error:
        raise NiftiRefused("has axes that are not at right angles (gantry tilt, or a sheared affine)") from error
    values = _voxels(image, header)
    warnings = _place_warning(header)
    hounsfield = np.empty(header.shape_zyx, dtype=np.int16)
    for k in range(header.shape_zyx[0]):
        plane = np.asarray(values[k])
        if plane.dtype.kind == "f":
            if not np.isfinite(plane).all():
                raise NiftiRefused("has NaN or infinity among its voxels")
            plane = np.rint(plane)
        if plane.size and (plane.min() < -32768 or plane.max() > 32767):
            raise NiftiRefused("has values that are no HU (outside -32768 to 32767)")
        hounsfield[k] = plane
    return Volume(voxels=hounsfield, geometry=geometry), warnings


def _place_warning(header: NiftiHeader) -> tuple[Warned, ...]:
    if not header.two_places:
        return ()
    sentence = "qform and sform of the NIfTI file place its voxels differently; the sform was taken"
    return (Warned(code="nifti-two-places", sentence=sentence),)


def content_sha256(volume: Volume) -> str:
    """The SHA-256 of voxels and geometry: what names a volume that has no UIDs."""
    geometry = volume.geometry
    place = canonical_json(
        [
            geometry.shape_zyx,
            geometry.spacing_zyx,
            geometry.origin_zyx,
            geometry.direction_zyx,
            str(volume.voxels.dtype),
        ]
    )
    return sha256_hex(place + np.ascontiguousarray(volume.voxels).tobytes())


def index_map(header: NiftiHeader, geometry: Geometry) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How a mask's axes become the volume's: `order` for np.transpose, then which of the new axes to flip.

    Raises NiftiRefused ("a mask in another geometry: …") where the voxel centres differ by more than `GRID_TOLERANCE`.
    """
    target = np.asarray(geometry.direction_zyx) * np.asarray(geometry.spacing_zyx)
    steps = np.linalg.solve(target, header.matrix_zyx)
    order = [int(np.abs(steps[axis]).argmax()) for axis in range(3)]
    if sorted(order) != [0, 1, 2]:
        raise NiftiRefused("a mask in another geometry: its axes are turned against the volume's")
    permuted = tuple(header.shape_zyx[axis] for axis in order)
    if permuted != geometry.shape_zyx:
        raise NiftiRefused(
            f"a mask in another geometry: {_times(permuted)} voxels, the volume has {_times(geometry.shape_zyx)}"
        )
    flips = [bool(steps[axis, order[axis]] < 0) for axis in range(3)]

    last = np.asarray(geometry.shape_zyx, dtype=float) - 1
    corners = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], dtype=float) * last
    own = np.empty_like(corners)
    for axis in range(3):
        own[:, order[axis]] = last[axis] - corners[:, axis] if flips[axis] else corners[:, axis]
    placed = header.origin_zyx + own @ header.matrix_zyx.T
    apart = float(np.linalg.norm(placed - geometry.world_zyx(corners), axis=1).max())
    if apart > GRID_TOLERANCE * min(geometry.spacing_zyx):
        spacing = np.linalg.norm(header.matrix_zyx, axis=0)[order]
        differing = np.abs(spacing - np.asarray(geometry.spacing_zyx)) * np.maximum(last, 1)
        if differing.max() > GRID_TOLERANCE * min(geometry.spacing_zyx):
            what = f"voxels of {_mm(spacing)} mm, the volume has {_mm(geometry.spacing_zyx)} mm"
        else:
            what = f"it lies up to {apart:.2f} mm beside the volume"
        raise NiftiRefused(f"a mask in another geometry: {what}")
    return (order[0], order[1], order[2]), (flips[0], flips[1], flips[2])


def _mm(spacing: Any) -> str:
    return " × ".join(f"{float(s):.4g}" for s in spacing)


def read_label_values(path: Path, geometry: Geometry) -> tuple[NDArray[np.uint16], tuple[Warned, ...]]:
    """The values of a NIfTI label map, brought onto the grid of a volume.

    Its geometry is judged before its voxels are read. Raises NiftiRefused: another geometry, NaN, values that are
    negative, not whole or above 65535, more than `MAX_LABELS` of them, an empty mask.
    """
    header, image = _open(path, max_voxels=MAX_VOXELS)
    order, flips = index_map(header, geometry)
    values = np.transpose(_voxels(image, header), order)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    labels = np.empty(geometry.shape_zyx, dtype=np.uint16)
    for k in range(geometry.shape_zyx[0]):
        plane = np.asarray(values[k])
        if plane.dtype.kind == "f":
            if np.isnan(plane).any():
                raise NiftiRefused("the mask has NaN among its voxels")
            if not np.isfinite(plane).all() or (plane != np.rint(plane)).any():
                raise NiftiRefused("the mask has values that are no whole numbers: it is no label map")
        if plane.min() < 0:
            raise NiftiRefused("the mask has negative values: it is no label map")
        if plane.max() > LARGEST_LABEL:
            raise NiftiRefused(f"the mask has values above {LARGEST_LABEL}: it is no label map")
        labels[k] = plane
    found = np.count_nonzero(np.bincount(labels.ravel(), minlength=1)[1:])
    if found == 0:
        raise NiftiRefused("the mask is empty")
    if found > MAX_LABELS:
        raise NiftiRefused(f"the mask has {found} different values: this is an image rather than a mask")
    return labels, _place_warning(header)


def read_nifti_mask(path: Path, geometry: Geometry, *, label_map: LabelMap, roi: RoiKind) -> ReadMask:
    """The vertebrae of a NIfTI label map on the grid of a volume. Raises NiftiRefused (see `read_label_values`)."""
    labels, warnings = read_label_values(path, geometry)
    levels, ignored, unknown = label_map.sort_values(int(v) for v in np.flatnonzero(np.bincount(labels.ravel())))
    return ReadMask(
        source="nifti",
        levels=tuple(_level_masks(labels, levels, roi)),
        ignored_labels=ignored,
        unknown_labels=unknown,
        warnings=warnings,
    )


def _level_masks(labels: NDArray[np.uint16], levels: Mapping[int, str], roi: RoiKind) -> list[LevelMask]:
    boxes: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for k in range(labels.shape[0]):
        plane = labels[k]
        for value in np.flatnonzero(np.bincount(plane.ravel())).tolist():
            if value in levels:
                where = plane == value
                j, i = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
                boxes.setdefault(value, []).append((k, int(j[0]), int(j[-1]) + 1, int(i[0]), int(i[-1]) + 1))
    masks = []
    for value, planes in boxes.items():
        low = (min(p[0] for p in planes), min(p[1] for p in planes), min(p[3] for p in planes))
        high = (max(p[0] for p in planes) + 1, max(p[2] for p in planes), max(p[4] for p in planes))
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        masks.append(LevelMask(level=levels[value], kind=roi, start_zyx=low, voxels=labels[box] == value))
    return masks
