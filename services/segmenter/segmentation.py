"""A CT volume to the label map of its vertebral bodies, with names, on the scan's own grid.

The volume is brought onto the network's grid, the network says what each voxel is, bodies are parted and named there,
and their surfaces are put back onto the scan's grid between voxels, not voxel by voxel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from services.segmenter.network import ClassMaps, SpineNetwork
from shared.fracture.crop import as_stored, reoriented
from shared.fracture.levels import VERSE
from shared.fracture.spine.chain import BodyMap, Vertebra, measured_chain
from shared.fracture.spine.frames import BodyFrame
from shared.fracture.spine.instances import bodies_of
from shared.fracture.spine.naming import MIN_SACRUM_ML, Named, Sacrum, SeenBody, named
from shared.fracture.spine.orientation import BACK_TO_FRONT, FEW_ARCHES, upside_down
from shared.fracture.volume import AIR_HU, Mask, Volume, to_sitk

LABEL_OF: Final[dict[str, int]] = {level: value for value, level in VERSE.items()}
MIN_BODIES: Final = 1
MIN_EXTENT_MM: Final = (40.0, 40.0, 30.0)
"""A scan smaller than this (z, y, x) shows no vertebra with its neighbours."""
END_VOXELS: Final = 2
"""A body that comes as near as this to the end of the scan is cut off: the network sees little of what it cannot see
whole."""
NO_SPINE: Final = "no spine is seen in the scan"
_RIB_SIDE_MM: Final = (-4.0, 32.0)
_RIB_BACK_MM: Final = (-14.0, 46.0)
_RIB_ML: Final = (0.08, 0.35)
"""Less than the first on both sides: no ribs; more than the second on both: ribs."""
_SHOWN_HU: Final = -1000
_HALF: Final = 127


class NotSegmentable(ValueError):
    """No mask can be made of this volume; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Segmented:
    """The bodies of a scan: label map on its grid (LABEL_OF, 100 + n for `Bn`), and each measured, head to foot."""

    labels: Mask
    named: Named
    vertebrae: tuple[Vertebra, ...]


def label_of(level: str) -> int:
    """The value of a level in our label maps: VerSe's ids, and 101, 102, … from below for bodies without a name."""
    return LABEL_OF[level] if level in LABEL_OF else 100 + int(level[1:])


def segment(volume: Volume, network: SpineNetwork) -> Segmented:
    """The vertebral bodies of a CT volume in HU. NotSegmentable where there are none."""
    image = reoriented(volume)
    extent = [n * s for n, s in zip(image.geometry.shape_zyx, image.geometry.spacing_zyx, strict=True)]
    if any(side < least for side, least in zip(extent, MIN_EXTENT_MM, strict=True)):
        raise NotSegmentable(
            f"the scan is too small to find vertebrae in: {extent[0]:.0f} x {extent[1]:.0f} x {extent[2]:.0f} mm "
            "(along, front to back, across)"
        )
    spacing = network.card.given.spacing_mm
    hu = on_grid(image, spacing_mm=spacing)
    maps = network.maps(hu)
    if maps is None:
        raise NotSegmentable(NO_SPINE)
    bodies = bodies_of(maps.body > _HALF, spacing_mm=spacing)
    if int(bodies.max(initial=0)) < MIN_BODIES:
        raise NotSegmentable(NO_SPINE)
    maps.body[(bodies > 0) & (maps.body <= _HALF)] = 255  # what was filled
    chain = measured_chain(
        _body_map(bodies, maps, network), source_spacing_zyx=image.geometry.spacing_zyx, rim=END_VOXELS
    )
    sacrum, above = _sacrum(bodies, maps, network)
    fault = upside_down(chain, sacrum_above=above) or _back_to_front(hu, bodies, maps, network)
    if fault:
        raise NotSegmentable(fault)
    names = named(_seen(chain, bodies, maps, hu, network), sacrum=sacrum)
    if names.above:
        chain = chain[names.above :]
        bodies = np.where(bodies > names.above, bodies - names.above, 0).astype(np.uint8)
    labels = _on_source(volume, image, bodies, maps, names, spacing_mm=spacing)
    corner = np.array([low for low, _ in maps.box]) * spacing
    return Segmented(labels=labels, named=names, vertebrae=tuple(vertebra.moved(corner) for vertebra in chain))


def on_grid(image: Volume, *, spacing_mm: float) -> NDArray[np.int16]:
    """A reoriented volume on an isotropic grid that begins at its first voxel; finer voxels are averaged first."""
    source = to_sitk(image)
    source.SetOrigin((0.0, 0.0, 0.0))
    source.SetDirection((1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0))
    shrink = [max(int(spacing_mm / s + 1e-6), 1) for s in image.geometry.spacing_zyx]
    if max(shrink) > 1:
        source = sitk.BinShrink(source, shrink[::-1])
    size = [
        int((n - 1) * s / spacing_mm + 1e-6) + 1
        for n, s in zip(image.geometry.shape_zyx, image.geometry.spacing_zyx, strict=True)
    ]
    target = sitk.ResampleImageFilter()
    target.SetInterpolator(sitk.sitkLinear)
    target.SetSize(size[::-1])
    target.SetOutputSpacing((spacing_mm,) * 3)
    target.SetOutputOrigin((0.0, 0.0, 0.0))
    target.SetDefaultPixelValue(AIR_HU)
    target.SetOutputPixelType(sitk.sitkInt16)
    target.UseNearestNeighborExtrapolatorOn()
    found: NDArray[np.int16] = sitk.GetArrayFromImage(target.Execute(source))
    return found


def _body_map(bodies: NDArray[np.uint8], maps: ClassMaps, network: SpineNetwork) -> BodyMap:
    spacing = network.card.given.spacing_mm
    behind = maps.classes == network.card.value("posterior") if "posterior" in network.card.classes else None
    return BodyMap(
        labels=bodies,
        spacing_zyx=(spacing,) * 3,
        share=maps.body.astype(np.float32) / np.float32(255),
        behind=behind,
    )


def _sacrum(bodies: NDArray[np.uint8], maps: ClassMaps, network: SpineNetwork) -> tuple[Sacrum | None, bool]:
    """The largest piece of "sacrum" with its distance from the lowest body, and whether it lies above all bodies."""
    spacing = network.card.given.spacing_mm
    labels, count = ndimage.label(maps.classes == network.card.value("sacrum"))
    if count == 0:
        return None, False
    sizes = np.bincount(labels.ravel())[1:]
    largest = labels == int(sizes.argmax()) + 1
    away = ndimage.distance_transform_edt(bodies != bodies.max(), sampling=(spacing,) * 3)
    found = Sacrum(volume_ml=float(sizes.max()) * spacing**3 / 1000, gap_mm=float(away[largest].min()))
    middles = [float(np.flatnonzero(part.any(axis=(1, 2))).mean()) for part in (largest, bodies == 1)]
    return found, found.volume_ml >= MIN_SACRUM_ML and middles[0] > middles[1]


def _back_to_front(hu: NDArray[np.int16], bodies: NDArray[np.uint8], maps: ClassMaps, network: SpineNetwork) -> str:
    """Why front and back must be exchanged, or "": bodies without arches, which have them in the mirror."""
    value = network.card.value("posterior")
    arches = int((maps.classes == value).sum())
    if arches >= FEW_ARCHES * int((bodies > 0).sum()):
        return ""
    mirrored = network.maps(np.ascontiguousarray(hu[:, ::-1]))
    seen = 0 if mirrored is None else int((mirrored.classes == value).sum())
    return BACK_TO_FRONT if seen > 2 * arches and seen >= FEW_ARCHES * int((bodies > 0).sum()) else ""


def _seen(
    chain: list[Vertebra],
    bodies: NDArray[np.uint8],
    maps: ClassMaps,
    hu: NDArray[np.int16],
    network: SpineNetwork,
) -> list[SeenBody]:
    spacing = network.card.given.spacing_mm
    ribs = np.argwhere(maps.classes == network.card.value("rib")).astype(np.float64) * spacing
    box = tuple(slice(*side) for side in maps.box)
    shown = hu[box] > _SHOWN_HU
    found = []
    for number, vertebra in enumerate(chain):
        lower = chain[number + 1] if number + 1 < len(chain) else None
        has_ribs, rib_ml = _ribs_at(vertebra, ribs, shown, spacing_mm=spacing)
        found.append(
            SeenBody(
                pitch_mm=None
                if lower is None
                else float(np.linalg.norm(vertebra.frame.centre_zyx - lower.frame.centre_zyx)),
                ribs=has_ribs,
                whole=not vertebra.cut_off,
                volume_ml=vertebra.volume_ml,
                rib_ml=rib_ml,
            )
        )
    return found


def _ribs_at(
    vertebra: Vertebra, ribs: NDArray[np.float64], shown: NDArray[np.bool_], *, spacing_mm: float
) -> tuple[bool | None, float]:
    """Whether ribs begin beside a body on both sides (None where that cannot be told), and how many mL of them."""
    half_width = 20.0 if vertebra.measured is None else vertebra.measured.heights.width_mm / 2
    height = 22.0 if vertebra.measured is None else vertebra.measured.heights.posterior
    local = vertebra.frame.local(ribs) if len(ribs) else np.zeros((0, 3))
    near = (np.abs(local[:, 0]) <= 0.6 * height) & (local[:, 1] >= _RIB_BACK_MM[0]) & (local[:, 1] <= _RIB_BACK_MM[1])
    amounts = []
    for side in (-1.0, 1.0):
        beside = side * local[:, 2]
        here = near & (beside >= half_width + _RIB_SIDE_MM[0]) & (beside <= half_width + _RIB_SIDE_MM[1])
        amounts.append(float(here.sum()) * spacing_mm**3 / 1000)
    if min(amounts) >= _RIB_ML[1]:
        return True, sum(amounts)
    if max(amounts) <= _RIB_ML[0] and _both_sides_shown(vertebra.frame, half_width, shown, spacing_mm=spacing_mm):
        return False, sum(amounts)
    return None, sum(amounts)


def _both_sides_shown(frame: BodyFrame, half_width: float, shown: NDArray[np.bool_], *, spacing_mm: float) -> bool:
    """Whether the scan reaches as far to both sides of a body as ribs would be looked for."""
    across = half_width + _RIB_SIDE_MM[1]
    corners = np.array([[0.0, back, side * across] for back in (0.0, _RIB_BACK_MM[1] / 2) for side in (-1.0, 1.0)])
    index = np.rint(frame.world(corners) / spacing_mm).astype(int)
    inside = np.all((index >= 0) & (index < np.array(shown.shape)), axis=1)
    return bool(inside.all() and shown[tuple(index.T)].all())


def _on_source(
    volume: Volume,
    image: Volume,
    bodies: NDArray[np.uint8],
    maps: ClassMaps,
    names: Named,
    *,
    spacing_mm: float,
) -> Mask:
    """The label map on the scan's grid: the surface of the probability at one half, each voxel's nearest body."""
    table = np.array([0, *[label_of(level) for level in names.levels]], dtype=np.uint8)
    grown = _grown(bodies, spacing_mm=spacing_mm)
    share = np.where(grown > 0, maps.body, 0).astype(np.float32)
    source = image.geometry
    first, counts, places = [], [], []
    for axis in range(3):
        low, high = maps.box[axis]
        start = int(np.ceil(low * spacing_mm / source.spacing_zyx[axis]))
        stop = min(int(np.floor((high - 1) * spacing_mm / source.spacing_zyx[axis])) + 1, source.shape_zyx[axis])
        first.append(start)
        counts.append(max(stop - start, 0))
        places.append(np.arange(start, max(stop, start)) * source.spacing_zyx[axis] / spacing_mm - low)
    labels = np.zeros(source.shape_zyx, dtype=np.uint8)
    view = labels[tuple(slice(f, f + n) for f, n in zip(first, counts, strict=True))]
    nearest = [np.clip(np.rint(p).astype(int), 0, n - 1) for p, n in zip(places, share.shape, strict=True)]
    for k in range(counts[0]):  # slice by slice: the scan may have a hundred million voxels
        plane = _linear(share, places[0][k], places[1], places[2])
        inside = plane > _HALF + 0.5
        if inside.any():
            mine = grown[nearest[0][k]][np.ix_(nearest[1], nearest[2])]
            view[k][inside] = table[mine[inside]]
    return Mask(voxels=np.ascontiguousarray(as_stored(labels, volume.geometry)), geometry=volume.geometry)


def _linear(
    share: NDArray[np.float32], z: float, y: NDArray[np.floating], x: NDArray[np.floating]
) -> NDArray[np.float32]:
    """A plane of a map at fractional places, linear along each axis."""

    def ends(place: NDArray[np.floating], size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
        low = np.clip(np.floor(place).astype(np.intp), 0, size - 1)
        high = np.minimum(low + 1, size - 1)
        return low, high, (place - low).astype(np.float32)

    z0, z1, wz = ends(np.array([z]), share.shape[0])
    plane = share[z0[0]] * (1 - wz[0]) + share[z1[0]] * wz[0]
    y0, y1, wy = ends(y, share.shape[1])
    plane = plane[y0] * (1 - wy)[:, None] + plane[y1] * wy[:, None]
    x0, x1, wx = ends(x, share.shape[2])
    found: NDArray[np.float32] = plane[:, x0] * (1 - wx)[None, :] + plane[:, x1] * wx[None, :]
    return found


def _grown(bodies: NDArray[np.uint8], *, spacing_mm: float) -> NDArray[np.uint8]:
    """Each body with a rim of two voxels, which its surface between voxels may lie in."""
    far, nearest = ndimage.distance_transform_edt(bodies == 0, sampling=(spacing_mm,) * 3, return_indices=True)
    grown: NDArray[np.uint8] = np.where(far <= 2 * spacing_mm, bodies[tuple(nearest)], 0).astype(np.uint8)
    return grown
