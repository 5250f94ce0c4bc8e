"""One patient's anatomy as maps of tissues, made from the organ masks of a folder in TotalSegmentator's layout.

    LABELMAPS/NAME/segmentations/vertebrae_L1.nii.gz, rib_left_12.nii.gz, …

Whole vertebrae are cut into body and arch; discs are what lies between two neighbouring bodies; what no mask names
inside the trunk's hull is fat. No image goes in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from services.trainer.segmentation.tissues import BONES, CODE, tissue_of
from shared.fracture.crop import bounding_box, reoriented
from shared.fracture.ids import sha256_hex
from shared.fracture.levels import ORDER
from shared.fracture.spine.body_cut import cut_body
from shared.fracture.spine.frames import POSTERIOR, BodyFrame, frame_of, tangents
from shared.fracture.volume import Mask, mask_from_sitk
from shared.pipeline.errors import FractureSweepError

SPACING_MM: Final = 1.5
"""Of the maps that a network is trained on."""
_SKIN_MM: Final = 14.0
_MAX_DISC_MM: Final = 18.0
_VERTEBRA: Final = "vertebrae_"
_MIN_BODY_ML: Final = 2.0
_OPTIONAL: Final = ("T13", "L6")

Maps = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class AnatomyBody:
    """A whole vertebral body of an anatomy: its level, its frame, and its size in mm."""

    level: str
    frame: BodyFrame
    height_mm: float
    half_depth_mm: float
    half_width_mm: float


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Maps (z, y, x), axes towards superior, posterior and left."""

    name: str
    spacing_mm: float = SPACING_MM
    tissue: Maps
    vertebra: Maps
    """Place of each vertebra (body and arch) in ORDER + 1; 0 elsewhere."""
    bodies: tuple[AnatomyBody, ...]
    """From head to foot; those that are cut off by the map's end are not among them."""


def subjects(folder: Path) -> tuple[Path, ...]:
    """The folders of organ masks below a folder, by name. FractureSweepError where there is none."""
    found = sorted({path.parent for path in folder.glob(f"**/{_VERTEBRA}*.nii.gz")})
    if not found:
        raise FractureSweepError(
            f"no label maps in {folder}: give a folder of NAME/segmentations/{_VERTEBRA}L1.nii.gz, …, as "
            "TotalSegmentator's dataset has them"
        )
    return tuple(found)


def fingerprint(folder: Path) -> str:
    """The SHA-256 over the masks of one subject: names and bytes."""
    parts = [f"{path.name} {sha256_hex(path.read_bytes())}" for path in sorted(folder.glob("*.nii.gz"))]
    return sha256_hex("\n".join(parts).encode())


def read_anatomy(folder: Path) -> Anatomy:
    """The anatomy in a folder of organ masks. FractureSweepError: unknown organs alone, other grids, no vertebra."""
    name = folder.parent.name if folder.name == "segmentations" else folder.name
    masks: dict[str, NDArray[np.bool_]] = {}
    shape: tuple[int, ...] | None = None
    for path in sorted(folder.glob("*.nii.gz")):
        organ = path.name.removesuffix(".nii.gz")
        if tissue_of(organ) is None:
            continue
        voxels = _on_grid(mask_from_sitk(sitk.ReadImage(str(path), sitk.sitkUInt8)), SPACING_MM) != 0
        if shape is not None and voxels.shape != shape:
            raise FractureSweepError(f"{path}: another grid than the masks before it")
        shape = voxels.shape
        if voxels.any():
            masks[organ] = voxels
    vertebrae = {organ: mask for organ, mask in masks.items() if organ.startswith(_VERTEBRA)}
    if shape is None or len(vertebrae) < 3:
        raise FractureSweepError(f"{folder}: fewer than three vertebrae")
    return _assembled(name, shape, masks, spacing_mm=SPACING_MM)


def anatomy_of_vertebrae(labels: Mask, levels: Mapping[int, str], *, name: str, spacing_mm: float) -> Anatomy:
    """The anatomy of a label map of whole vertebrae alone; all around them is fat. Values without a level are left out.

    FractureSweepError where it has fewer than three vertebrae.
    """
    voxels = _on_grid(labels, spacing_mm)
    there = set(np.unique(voxels).tolist())
    masks = {_VERTEBRA + level: voxels == value for value, level in levels.items() if value in there}
    if len(masks) < 3:
        raise FractureSweepError(f"{name}: fewer than three vertebrae")
    return _assembled(name, voxels.shape, masks, spacing_mm=spacing_mm)


def _on_grid(mask: Mask, spacing_mm: float) -> Maps:
    """A label map on axes towards superior, posterior and left, on an isotropic grid."""
    turned = reoriented(mask)
    voxels = np.asarray(turned.voxels)
    spacing = turned.geometry.spacing_zyx
    if not np.allclose(spacing, spacing_mm, atol=1e-3):
        voxels = ndimage.zoom(voxels, [s / spacing_mm for s in spacing], order=0)
    return np.ascontiguousarray(voxels, dtype=np.uint8)


def _assembled(name: str, shape: tuple[int, ...], masks: dict[str, NDArray[np.bool_]], *, spacing_mm: float) -> Anatomy:
    tissue = np.zeros(shape, dtype=np.uint8)
    if all(organ.startswith(_VERTEBRA) for organ in masks):
        tissue[:] = CODE["fat"]
    else:
        labelled = reduce(np.logical_or, masks.values())
        tissue[trunk(labelled, spacing_mm=spacing_mm)] = CODE["fat"]
    for organ, mask in sorted(masks.items(), key=lambda item: _paint_order(item[0])):
        tissue[mask] = CODE[tissue_of(organ) or "fat"]
    vertebra, parts, bodies = _cut(masks, spacing_mm)
    for level, body in parts.items():
        tissue[masks[_VERTEBRA + level]] = CODE["posterior"]
        tissue[body] = CODE["body"]
    levels = [level for level in ORDER if level in parts]
    spine = [level for level in ORDER if level in parts or level not in _OPTIONAL]
    for upper, lower in pairwise(levels):
        if spine.index(lower) == spine.index(upper) + 1:
            _paint_disc(tissue, parts[upper], parts[lower], spacing_mm)
    sacrum = tissue == CODE["sacrum"]
    if levels and sacrum.any() and levels[-1] in ("L4", "L5", "L6"):
        _paint_disc(tissue, parts[levels[-1]], sacrum, spacing_mm)
    return Anatomy(name=name, spacing_mm=spacing_mm, tissue=tissue, vertebra=vertebra, bodies=bodies)


def _paint_order(organ: str) -> int:
    tissue = tissue_of(organ)
    return 2 if tissue in BONES else 1 if tissue == "canal" else 0


def trunk(labelled: NDArray[np.bool_], *, spacing_mm: float = SPACING_MM) -> NDArray[np.bool_]:
    """The trunk: slice by slice the convex hull of what is labelled, and a rim of subcutaneous fat."""
    filled = np.zeros(labelled.shape, dtype=bool)
    for k in np.flatnonzero(labelled.any(axis=(1, 2))):
        points = np.argwhere(labelled[k])
        try:
            corners = points[ConvexHull(points).vertices]
        except (QhullError, ValueError):  # fewer than three points, or all on one line
            filled[k] = labelled[k]
            continue
        picture = Image.new("1", (labelled.shape[2], labelled.shape[1]))
        ImageDraw.Draw(picture).polygon([(int(x), int(y)) for y, x in corners], fill=1, outline=1)
        filled[k] = np.asarray(picture, dtype=bool)
    rim = round(_SKIN_MM / spacing_mm)
    disk = np.hypot(*np.mgrid[-rim : rim + 1, -rim : rim + 1]) <= rim
    return np.stack([ndimage.binary_dilation(plane, structure=disk) if plane.any() else plane for plane in filled])


def _cut(
    masks: dict[str, NDArray[np.bool_]], spacing_mm: float
) -> tuple[Maps, dict[str, NDArray[np.bool_]], tuple[AnatomyBody, ...]]:
    """The map of whole vertebrae, the body of each, and the sizes of those that are whole."""
    whole = {organ.removeprefix(_VERTEBRA): mask for organ, mask in masks.items() if organ.startswith(_VERTEBRA)}
    levels = [level for level in ORDER if level in whole and level != "S1" and not level.startswith("C")]
    vertebra = np.zeros(next(iter(whole.values())).shape, dtype=np.uint8)
    for level in levels:
        vertebra[whole[level]] = ORDER.index(level) + 1
    bodies = {level: whole[level] for level in levels}
    canals: dict[str, NDArray[np.float64]] = {}
    for _ in range(2):  # the second time along the curve of the bodies that the first time found
        centres = [_centre(bodies[level], spacing_mm) for level in levels]
        for level, up in zip(levels, tangents(centres), strict=True):
            box = _box_around(whole[level])
            start = np.array([s.start for s in box]) * spacing_mm
            frame = frame_of(_centre(whole[level], spacing_mm), up=up, back=np.array(POSTERIOR))
            cut = cut_body(whole[level][box], frame=frame, spacing_zyx=(spacing_mm,) * 3, start_zyx_mm=start)
            if cut is None:
                continue
            body = np.zeros_like(whole[level])
            body[box] = cut.body
            bodies[level], canals[level] = body, cut.canal_zyx
    found = {level: bodies[level] for level in levels if level in canals}
    kept = [level for level in levels if level in canals]
    if not kept:
        return vertebra, found, ()
    frames = [
        frame_of(centre, up=up, back=canals[level] - centre)
        for level, centre, up in zip(
            kept,
            [_centre(found[level], spacing_mm) for level in kept],
            tangents([_centre(found[level], spacing_mm) for level in kept]),
            strict=True,
        )
    ]
    sizes = [
        _sized(level, found[level], frame, spacing_mm)
        for level, frame in zip(kept, frames, strict=True)
        if not _touches_border(whole[level])
    ]
    return vertebra, found, tuple(body for body in sizes if body is not None)


def _sized(level: str, body: NDArray[np.bool_], frame: BodyFrame, spacing_mm: float) -> AnatomyBody | None:
    local = frame.local(np.argwhere(body).astype(np.float64) * spacing_mm)
    if len(local) * spacing_mm**3 / 1000 < _MIN_BODY_ML:
        return None
    low, high = np.quantile(local, 0.02, axis=0), np.quantile(local, 0.98, axis=0)
    middle = frame.world(((low + high) / 2)[None])[0]
    centred = frame_of(middle, up=frame.up, back=frame.back)
    size = high - low + spacing_mm
    return AnatomyBody(
        level=level,
        frame=centred,
        height_mm=float(size[0]),
        half_depth_mm=float(size[1] / 2),
        half_width_mm=float(size[2] / 2),
    )


def _centre(mask: NDArray[np.bool_], spacing_mm: float) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.argwhere(mask).mean(axis=0) * spacing_mm
    return found


def _box_around(mask: NDArray[np.bool_], *, margin: int = 3) -> tuple[slice, slice, slice]:
    box = bounding_box(mask)
    if box is None:
        raise ValueError("an empty mask has no box")
    k, j, i = (slice(max(low - margin, 0), high + margin) for low, high in box)
    return k, j, i


def _touches_border(mask: NDArray[np.bool_]) -> bool:
    box = bounding_box(mask)
    return box is not None and (box[0][0] == 0 or box[0][1] == mask.shape[0])


def _paint_disc(tissue: Maps, upper: NDArray[np.bool_], lower: NDArray[np.bool_], spacing_mm: float) -> None:
    """What lies between two bodies: near to both, and with one on the other side than the other."""
    box = _box_around(upper | lower, margin=2)
    one, two = upper[box], lower[box]
    distance = []
    towards = []
    for mask in (one, two):
        far, nearest = ndimage.distance_transform_edt(~mask, sampling=(spacing_mm,) * 3, return_indices=True)
        distance.append(far)
        towards.append((nearest - np.indices(mask.shape)) * spacing_mm)
    together = distance[0] + distance[1]
    opposite = np.sum(towards[0] * towards[1], axis=0) <= -0.5 * np.maximum(distance[0] * distance[1], 1e-6)
    disc = (together <= _MAX_DISC_MM) & opposite & ~one & ~two
    disc = ndimage.binary_opening(disc, structure=ndimage.generate_binary_structure(3, 1)) | (
        disc & (together <= 3 * spacing_mm)
    )
    here = tissue[box]
    soft = np.isin(here, [CODE[name] for name in ("fat", "canal", "muscle", "artery", "vein", "gland", "posterior")])
    here[disc & soft & (here != CODE["posterior"])] = CODE["disc"]


def save_anatomy(anatomy: Anatomy, path: Path) -> None:
    """Write an anatomy as .npz, aside and renamed."""
    aside = path.with_suffix(".part")
    rows = [
        [
            *body.frame.centre_zyx,
            *body.frame.up,
            *body.frame.back,
            body.height_mm,
            body.half_depth_mm,
            body.half_width_mm,
        ]
        for body in anatomy.bodies
    ]
    with aside.open("wb") as stream:
        np.savez_compressed(
            stream,
            tissue=anatomy.tissue,
            vertebra=anatomy.vertebra,
            levels=np.array([body.level for body in anatomy.bodies], dtype="U4"),
            bodies=np.array(rows, dtype=np.float64).reshape(len(rows), 12),
        )
    aside.replace(path)


def load_anatomy(path: Path) -> Anatomy:
    """An anatomy out of its .npz."""
    with np.load(path, allow_pickle=False) as stored:
        tissue, vertebra = stored["tissue"], stored["vertebra"]
        levels, rows = stored["levels"], stored["bodies"]
    return Anatomy(name=path.stem, tissue=tissue, vertebra=vertebra, bodies=tuple(_bodies(levels.tolist(), rows)))


def _bodies(levels: Iterable[str], rows: NDArray[np.float64]) -> Iterable[AnatomyBody]:
    for level, row in zip(levels, rows, strict=True):
        yield AnatomyBody(
            level=str(level),
            frame=frame_of(row[0:3], up=row[3:6], back=row[6:9]),
            height_mm=float(row[9]),
            half_depth_mm=float(row[10]),
            half_width_mm=float(row[11]),
        )
