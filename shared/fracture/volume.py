"""A volume and a mask with their geometry.

Axis order is always (z, y, x): `voxels[k, j, i]`, `spacing_zyx`, and world vectors (DICOM LPS+, millimetres) are
written (z, y, x) too, so that no array is ever transposed in silence. xyz exists only in `to_sitk` and `from_sitk`.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

AIR_HU = -1024
"""What lies outside an image."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where a grid of voxels lies in the patient: world = origin + direction @ (spacing * index), all zyx."""

    shape_zyx: tuple[int, int, int]
    spacing_zyx: tuple[float, float, float]
    origin_zyx: tuple[float, float, float]
    direction_zyx: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]
    """Row: world component (z, y, x of LPS+). Column: the unit vector of array axis 0, 1, 2."""

    def __post_init__(self) -> None:
        if any(n < 1 for n in self.shape_zyx):
            raise ValueError(f"a grid needs at least one voxel on each axis, got {self.shape_zyx}")
        if not all(np.isfinite(s) and s > 0 for s in self.spacing_zyx):
            raise ValueError(f"spacing must be finite and above zero, got {self.spacing_zyx}")
        matrix = np.asarray(self.direction_zyx, dtype=float)
        if not np.isfinite(matrix).all() or not np.isfinite(np.asarray(self.origin_zyx, dtype=float)).all():
            raise ValueError("origin and direction must be finite")
        if not np.allclose(matrix.T @ matrix, np.eye(3), atol=1e-4):
            raise ValueError("the axes of the grid are not orthonormal")

    def world_zyx(self, index_zyx: NDArray[np.float64]) -> NDArray[np.float64]:
        """World positions (n, 3) in mm of (fractional) voxel indices (n, 3)."""
        scaled = np.atleast_2d(np.asarray(index_zyx, dtype=float)) * np.asarray(self.spacing_zyx)
        world: NDArray[np.float64] = np.asarray(self.origin_zyx) + scaled @ np.asarray(self.direction_zyx).T
        return world

    def index_zyx(self, world_zyx: NDArray[np.float64]) -> NDArray[np.float64]:
        """Fractional voxel indices (n, 3) of world positions (n, 3) in mm."""
        offset = np.atleast_2d(np.asarray(world_zyx, dtype=float)) - np.asarray(self.origin_zyx)
        index: NDArray[np.float64] = (offset @ np.asarray(self.direction_zyx)) / np.asarray(self.spacing_zyx)
        return index

    def same_grid(self, other: Geometry, *, tolerance_mm: float = 1e-2) -> bool:
        """Whether the corner voxels of both grids lie at the same places within the tolerance."""
        if self.shape_zyx != other.shape_zyx:
            return False
        last = np.asarray(self.shape_zyx, dtype=float) - 1
        corners = np.array([[i * last[0], j * last[1], k * last[2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        return bool(np.abs(self.world_zyx(corners) - other.world_zyx(corners)).max() <= tolerance_mm)


@dataclass(frozen=True, kw_only=True)
class Volume:
    """One CT volume: `voxels` in HU, shape `geometry.shape_zyx`."""

    voxels: NDArray[np.generic]
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.voxels.shape != self.geometry.shape_zyx:
            raise ValueError(f"voxels {self.voxels.shape} do not fit the geometry {self.geometry.shape_zyx}")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """One mask or label map: `voxels` unsigned, 0 outside, shape `geometry.shape_zyx`."""

    voxels: NDArray[np.generic]
    geometry: Geometry

    def __post_init__(self) -> None:
        if self.voxels.shape != self.geometry.shape_zyx:
            raise ValueError(f"voxels {self.voxels.shape} do not fit the geometry {self.geometry.shape_zyx}")


def to_sitk(grid: Volume | Mask) -> sitk.Image:
    """A SimpleITK image of the same voxels and geometry (bool becomes uint8)."""
    voxels = grid.voxels.astype(np.uint8) if grid.voxels.dtype == bool else grid.voxels
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels))
    geometry = grid.geometry
    image.SetSpacing(tuple(float(s) for s in geometry.spacing_zyx[::-1]))
    image.SetOrigin(tuple(float(o) for o in geometry.origin_zyx[::-1]))
    image.SetDirection(tuple(float(d) for d in np.asarray(geometry.direction_zyx)[::-1, ::-1].ravel()))
    return image


def geometry_of(image: sitk.Image) -> Geometry:
    """The geometry of a three-dimensional SimpleITK image."""
    if image.GetDimension() != 3:
        raise ValueError(f"a volume has three axes, this image has {image.GetDimension()}")
    direction = np.array(image.GetDirection(), dtype=np.float64).reshape(3, 3)[::-1, ::-1]
    size, spacing, origin = image.GetSize()[::-1], image.GetSpacing()[::-1], image.GetOrigin()[::-1]
    rows = [(float(row[0]), float(row[1]), float(row[2])) for row in direction]
    return Geometry(
        shape_zyx=(int(size[0]), int(size[1]), int(size[2])),
        spacing_zyx=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        origin_zyx=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction_zyx=(rows[0], rows[1], rows[2]),
    )


def volume_from_sitk(image: sitk.Image) -> Volume:
    """A Volume of a SimpleITK image."""
    return Volume(voxels=sitk.GetArrayFromImage(image), geometry=geometry_of(image))


def mask_from_sitk(image: sitk.Image) -> Mask:
    """A Mask of a SimpleITK image."""
    return Mask(voxels=sitk.GetArrayFromImage(image), geometry=geometry_of(image))


def to_nrrd(grid: Volume | Mask, *, compress: bool = True) -> bytes:
    """The bytes of one NRRD file: one packed object, with geometry in full precision, that 3D Slicer and ITK-SNAP open.

    Equal grids give equal bytes (no time stamp is written).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.nrrd"
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(path))
        writer.SetUseCompression(compress)
        writer.SetCompressionLevel(1)
        writer.Execute(to_sitk(grid))
        return path.read_bytes()


class TooLarge(ValueError):
    """An NRRD file claims more voxels than its reader takes."""


def wanted_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had; SimpleITK has one class, RuntimeError, for everything."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "alloc" in text or "resource temporarily unavailable" in text


def _read_nrrd_file(path: Path, max_voxels: int | None) -> sitk.Image:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO")
    reader.SetFileName(str(path))
    try:
        if max_voxels is not None:
            reader.ReadImageInformation()
            voxels = math.prod(reader.GetSize())
            if voxels > max_voxels:
                raise TooLarge(f"the file claims {voxels} voxels, the limit is {max_voxels}")
        image: sitk.Image = reader.Execute()
    except RuntimeError as error:
        if wanted_memory(error):
            raise MemoryError from None
        raise
    return image


def _read_nrrd(data: bytes, max_voxels: int | None) -> sitk.Image:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.nrrd"
        path.write_bytes(data)
        return _read_nrrd_file(path, max_voxels)


def volume_from_nrrd(data: bytes, *, max_voxels: int | None = None) -> Volume:
    """The volume in the bytes of an NRRD file; TooLarge, before memory is taken, where it claims more voxels."""
    return volume_from_sitk(_read_nrrd(data, max_voxels))


def mask_from_nrrd(data: bytes, *, max_voxels: int | None = None) -> Mask:
    """The mask or label map in the bytes of an NRRD file; TooLarge as for a volume."""
    return mask_from_sitk(_read_nrrd(data, max_voxels))


def volume_from_nrrd_file(path: Path) -> Volume:
    """The volume in an NRRD file."""
    return volume_from_sitk(_read_nrrd_file(path, None))


def mask_from_nrrd_file(path: Path) -> Mask:
    """The mask or label map in an NRRD file."""
    return mask_from_sitk(_read_nrrd_file(path, None))
