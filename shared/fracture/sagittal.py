"""From the crop of one vertebra to the picture that the network sees (METHOD 3).

The training and every later scoring must see the same picture to the last bit, so there is one function for both, with
no image library below it whose filters change between versions. The resampling is that of PIL's and torch's antialiased
bilinear filter (half-pixel centres; when shrinking the triangle is as wide as the step), computed in float64 without
BLAS, so that the number of threads cannot change a bit.

The crop is LPS and axial (array axes to superior, posterior, left, but for an oblique scan's rotation). In the picture
superior is up and anterior is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.fracture.protocol import BoxRule
from shared.fracture.volume import Geometry, Mask, Volume

OUTSIDE_HU: Final = -250.0
"""What lies outside the scan: the lower end of the bone window."""


@dataclass(frozen=True, kw_only=True)
class SagittalBox:
    """Which slice was chosen and which part of it, in voxels of the crop; ends are exclusive, and may leave the crop.

    Row 0 of the picture is z_stop - 1 (superior), column 0 is y_start (anterior).
    """

    x: int
    z_start: int
    z_stop: int
    y_start: int
    y_stop: int


def sagittal_box(mask: Mask, *, box: BoxRule, box_margin_mm: float) -> SagittalBox:
    """The slice of largest mask area along the left-right axis, and the box in it.

    Of equal slices the one nearest the mask's centroid, then the lower index. `tight`: the mask's bounding box in that
    slice; `square`: a square about it, its side the longer side + `box_margin_mm` (rounded up to whole voxels; where
    it cannot be centred on a voxel's edge, the odd voxel goes superior or posterior). ValueError: an empty mask, or
    a crop that is not LPS and axial with equal spacing in the slice.
    """
    _check_lps(mask.geometry)
    inside = mask.voxels != 0
    areas = inside.sum(axis=(0, 1))
    if not areas.any():
        raise ValueError("the mask of the crop is empty")
    centroid = float((areas * np.arange(areas.size)).sum() / areas.sum())
    tied = np.flatnonzero(areas == areas.max())
    x = int(tied[np.argmin(np.abs(tied - centroid))])
    z_start, z_stop = _extent(inside[:, :, x].any(axis=1))
    y_start, y_stop = _extent(inside[:, :, x].any(axis=0))
    if box == "square":
        spacing = mask.geometry.spacing_zyx[0]
        side = int(np.ceil(max(z_stop - z_start, y_stop - y_start) + box_margin_mm / spacing - 1e-9))
        z_start, z_stop = _widened(z_start, z_stop, side)
        y_start, y_stop = _widened(y_start, y_stop, side)
    return SagittalBox(x=x, z_start=z_start, z_stop=z_stop, y_start=y_start, y_stop=y_stop)


def sagittal_hu(image: Volume, place: SagittalBox) -> NDArray[np.float64]:
    """The picture in HU, (z, y) with superior up and anterior left; `OUTSIDE_HU` where the box leaves the crop."""
    _check_lps(image.geometry)
    depth_z, depth_y, depth_x = image.geometry.shape_zyx
    if not 0 <= place.x < depth_x:
        raise ValueError("the slice lies outside the crop")
    picture = np.full((place.z_stop - place.z_start, place.y_stop - place.y_start), OUTSIDE_HU)
    z_low, z_high = max(place.z_start, 0), min(place.z_stop, depth_z)
    y_low, y_high = max(place.y_start, 0), min(place.y_stop, depth_y)
    if z_low < z_high and y_low < y_high:
        picture[z_low - place.z_start : z_high - place.z_start, y_low - place.y_start : y_high - place.y_start] = (
            image.voxels[z_low:z_high, y_low:y_high, place.x]
        )
    return picture[::-1]


def sagittal_image(
    image: Volume, mask: Mask, *, box: BoxRule, box_margin_mm: float, size: int = 64
) -> NDArray[np.float32]:
    """The network's input: (size, size) float32 of mean 0 and SD 1, superior up, anterior left.

    ValueError: image and mask on different grids, an empty mask, values that are not finite, or a constant picture.
    """
    if not image.geometry.same_grid(mask.geometry):
        raise ValueError("image and mask of the crop do not lie on one grid")
    picture = sagittal_hu(image, sagittal_box(mask, box=box, box_margin_mm=box_margin_mm))
    if not np.isfinite(picture).all():
        raise ValueError("the sagittal slice holds values that are not finite")
    if picture.min() == picture.max():
        raise ValueError("the sagittal slice is constant, there is nothing to see in it")
    resized = resize(picture, size=size)
    deviation = resized.std()
    if not deviation > 0:
        raise ValueError("the sagittal slice is constant, there is nothing to see in it")
    normalised: NDArray[np.float32] = ((resized - resized.mean()) / deviation).astype(np.float32)
    return normalised


def resize(picture: NDArray[np.float64], *, size: int) -> NDArray[np.float64]:
    """A picture (h, w) stretched to (size, size): bilinear, half-pixel centres, antialiased when shrinking."""
    rows, columns = _weights(picture.shape[0], size), _weights(picture.shape[1], size)
    stretched: NDArray[np.float64] = np.einsum("ih,hw->iw", rows, picture, optimize=False)
    resized: NDArray[np.float64] = np.einsum("jw,iw->ij", columns, stretched, optimize=False)
    return resized


def _weights(length: int, size: int) -> NDArray[np.float64]:
    """(size, length): how much of each source pixel goes into each target pixel."""
    step = length / size
    width = max(step, 1.0)
    centres = (np.arange(size) + 0.5) * step
    distance = np.abs(np.arange(length)[None, :] + 0.5 - centres[:, None]) / width
    weights = np.clip(1.0 - distance, 0.0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


def _extent(present: NDArray[np.bool_]) -> tuple[int, int]:
    where = np.flatnonzero(present)
    return int(where[0]), int(where[-1]) + 1


def _widened(start: int, stop: int, side: int) -> tuple[int, int]:
    first = start - (side - (stop - start)) // 2
    return first, first + side


def _check_lps(geometry: Geometry) -> None:
    # an oblique scan keeps its small rotation; each axis must still point mainly to superior, posterior and left
    direction = np.asarray(geometry.direction_zyx)
    if not (np.diag(direction) > np.sqrt(0.5)).all():
        raise ValueError("the crop must be LPS and axial, its axes are turned")
    if abs(geometry.spacing_zyx[0] - geometry.spacing_zyx[1]) > 1e-6:
        raise ValueError("the crop must have equal spacing in the sagittal slice")
