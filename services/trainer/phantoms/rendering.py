"""A patient's slab of CT and the masks of the fractured vertebral bodies.

Bodies are superellipsoids with end-plates, a cortical shell and correlated trabecular noise, between discs, under
posterior elements and soft tissue. Only a slab of the trunk is made: 100 × 98 mm in plane around the spine, and
`MARGIN_Z_MM` above and below the fractured bodies, so that a crop with a 25 mm margin lies inside (nearly: behind the
body there are 50 mm) and one patient takes about a second. Shapes are drawn with soft edges and blurred by the
kernel and the slice thickness afterwards; nothing is supersampled.

Positions are millimetres of DICOM LPS+, written (z, y, x): z to the head, y to the back, x to the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from services.trainer.phantoms.cohort import LEVELS, Deformity, Fracture, Patient
from shared.fracture.levels import VERSE
from shared.fracture.volume import Geometry, Mask, Volume

Array = NDArray[np.float32]

LABELS: Final[dict[str, int]] = {name: value for value, name in VERSE.items()}
MARGIN_Z_MM: Final = 33.0
HALF_WIDTH_MM: Final = 50.0
ANTERIOR_MM: Final = 46.0
POSTERIOR_MM: Final = 52.0
FAT_HU, MUSCLE_HU, VESSEL_HU, DISC_HU, CANAL_HU = -95.0, 52.0, 42.0, 82.0, 22.0
_SHELL_HU: Final = 250.0
SLAB_LEVELS: Final[tuple[str, ...]] = ("T10", *LEVELS, "S1")
SPINE_LEVELS: Final[tuple[str, ...]] = ("T9", *SLAB_LEVELS)
_HEIGHT_MM: Final = dict(zip(SPINE_LEVELS, (21.5, 22, 22.5, 24, 26, 27, 27.5, 27.5, 27, 27), strict=True))
_WIDTH_MM: Final = dict(zip(SPINE_LEVELS, (31, 32, 34, 37, 40, 42, 44, 47, 50, 50), strict=True))
_DEPTH_MM: Final = dict(zip(SPINE_LEVELS, (27.5, 28, 29, 30, 31, 32, 33, 34, 34.5, 32), strict=True))
_DISC_MM: Final = dict(zip(SPINE_LEVELS, (4.5, 4.5, 5, 6, 7.5, 9, 10, 11, 10, 6), strict=True))
_TILT_DEG: Final = dict(zip(SPINE_LEVELS, (8, 7, 6, 4, 1, -3, -5, -8, -14, -28), strict=True))
_BLUR_MM: Final = {"soft": 0.75, "standard": 0.58, "bone": 0.40}
_GRAIN_MM: Final = {"soft": 0.70, "standard": 0.50, "bone": 0.28}


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A patient's volume (int16 HU) and one label mask a reader (uint8, VerSe labels), all on one grid."""

    volume: Volume
    masks: tuple[Mask, ...]


@dataclass(frozen=True, kw_only=True)
class PlacedVertebra:
    """One vertebra of a patient, in mm: `centre_zy` from the top of the highest one, half sizes of the body."""

    level: str
    centre_zy: tuple[float, float]
    tilt: float
    half_zyx: tuple[float, float, float]
    fracture: Fracture | None


def place_vertebrae(
    patient: Patient, levels: Sequence[str] = SLAB_LEVELS, *, settled: bool = False
) -> list[PlacedVertebra]:
    """Vertebrae from the first of some levels down to S1, placed from above; z = 0 is the top of the first.

    `settled`: what lies above a fracture has come down by the mean of what the body lost, as in a patient; without it
    the discs beside a fracture are as much thicker (slabs, whose voxels a trained model depends on).
    """
    by_level = {fracture.level: fracture for fracture in patient.fractures}
    rng = patient.rng("anatomy")
    size = patient.rendered_size
    z, y, placed = 0.0, float(rng.normal(0, 2)), []
    for level in levels:
        height, disc = _HEIGHT_MM[level] * size, _DISC_MM[level] * size * float(rng.uniform(0.75, 1.1))
        tilt = float(np.deg2rad(_TILT_DEG[level] + rng.normal(0, 2)))
        fracture = by_level.get(level)
        above, below = (0.0, 0.0) if fracture is None or not settled else _sunk(patient, fracture, height)
        z += above
        half = (height / 2, _DEPTH_MM[level] * size / 2 * float(rng.normal(1, 0.03)), _WIDTH_MM[level] * size / 2)
        placed.append(
            PlacedVertebra(
                level=level,
                centre_zy=(z - height / 2, y),
                tilt=tilt,
                half_zyx=half,
                fracture=fracture,
            )
        )
        z -= height + disc - below
        y += float(np.tan(tilt)) * (height + disc) * 0.6
    return placed


_MEAN_LOSS: Final[dict[Deformity, tuple[float, float]]] = {
    "wedge": (0.5, 0.0),
    "biconcave": (0.36, 0.28),
    "crush": (0.89, 0.06),
}
"""The mean of what the broken end-plate and the other one lose, as a multiple of the height loss (`Canvas._plates`)."""


def _breaks_above(rng: np.random.Generator) -> bool:
    """Whether it is the upper end-plate that breaks most; the first draw of a vertebra's shape."""
    return bool(rng.random() < 0.8)


def _sunk(patient: Patient, fracture: Fracture, height: float) -> tuple[float, float]:
    """By how many mm the upper and the lower end-plate of a broken body give way in the mean."""
    broken, other = (share * fracture.height_loss * height for share in _MEAN_LOSS[fracture.deformity])
    upper = _breaks_above(patient.rng("shape-" + fracture.level))
    return (broken, other) if upper else (other, broken)


def step(value: Array, softness: float) -> Array:
    """0 below, 1 above, linear over `softness` mm around zero."""
    return np.asarray(np.clip(value / np.float32(softness) + np.float32(0.5), 0, 1), dtype=np.float32)


def between(places: NDArray[np.floating], low: float, high: float) -> slice:
    """Where ascending places lie from `low` to `high`; an empty slice where none does."""
    inside = np.flatnonzero((places >= low) & (places <= high))
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)


def bump(value: Array, width: float) -> Array:
    """1 at zero, falling off on both sides as a Gaussian of SD `width`."""
    return np.asarray(np.exp(np.float32(-0.5) * np.square(value / np.float32(width))), dtype=np.float32)


def _noise(
    rng: np.random.Generator, shape: Sequence[int], sigma_mm: Sequence[float], spacing: Sequence[float]
) -> Array:
    """Correlated noise of SD 1."""
    sigma = [s / d for s, d in zip(sigma_mm, spacing, strict=True)]
    field = gaussian_filter(rng.standard_normal(tuple(shape), dtype=np.float32), sigma, mode="wrap", truncate=3)
    return np.asarray(field / max(float(field.std()), 1e-6), dtype=np.float32)


def _grid(patient: Patient, placed: Sequence[PlacedVertebra], half_width_mm: float) -> tuple[Geometry, float]:
    """The slab's grid, and where z = 0 of the spine lies on the table."""
    shown = [v for v in placed if v.fracture is not None] or [v for v in placed if v.level == patient.centre_level]
    top = max(v.centre_zy[0] + v.half_zyx[0] for v in shown) + MARGIN_Z_MM
    bottom = min(v.centre_zy[0] - v.half_zyx[0] for v in shown) - MARGIN_Z_MM
    middle_y = float(np.mean([v.centre_zy[1] for v in shown]))
    return table_grid(
        patient,
        z_mm=(bottom, top),
        front_mm=middle_y - ANTERIOR_MM,
        depth_mm=ANTERIOR_MM + POSTERIOR_MM,
        half_width_mm=half_width_mm,
    )


def table_grid(
    patient: Patient, *, z_mm: tuple[float, float], front_mm: float, depth_mm: float, half_width_mm: float
) -> tuple[Geometry, float]:
    """A grid of the patient's spacing around a part of the spine, and where z = 0 of the spine lies on the table."""
    bottom, top = z_mm
    sz, sy, sx = patient.spacing_zyx
    columns = max(round(2 * half_width_mm / sx), 3)
    table_z = -float(patient.rng("table").uniform(200, 900))
    geometry = Geometry(
        shape_zyx=(int(np.ceil((top - bottom) / sz)), round(depth_mm / sy), columns),
        spacing_zyx=patient.spacing_zyx,
        origin_zyx=(round(table_z + bottom, 3), round(front_mm, 3), round(-(columns - 1) / 2 * sx, 3)),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    return geometry, table_z


def _soft_tissue(y: Array, x: Array, middle_y: Array | float, coarse: Array) -> Array:
    """Fat, psoas and back muscles, aorta and vena cava; y (1, n, 1), x (1, 1, n), coarse noise (z, y, x)."""
    tissue = np.full(coarse.shape, FAT_HU, dtype=np.float32) + np.float32(9) * coarse
    for cy, cx, ry, rx, value in (
        (4.0, 36.0, 17.0, 13.0, MUSCLE_HU),
        (4.0, -36.0, 17.0, 13.0, MUSCLE_HU),
        (46.0, 24.0, 19.0, 22.0, MUSCLE_HU),
        (46.0, -24.0, 19.0, 22.0, MUSCLE_HU),
        (-28.0, 9.0, 9.5, 9.5, VESSEL_HU),
        (-27.0, -13.0, 9.0, 10.0, VESSEL_HU),
    ):
        inside = np.float32(1) - np.sqrt(np.square((y - middle_y - cy) / ry) + np.square((x - cx) / rx))
        weight = np.clip(inside * np.float32(min(ry, rx)) / np.float32(1.5) + np.float32(0.5), 0, 1)
        tissue += weight * (np.float32(value) + np.float32(6) * coarse - tissue)
    return tissue


@dataclass(frozen=True, kw_only=True)
class Window:
    """Rows and columns of a canvas that are drawn into."""

    rows: slice
    columns: slice


class Canvas:
    """What is being drawn, in float32 HU, with the fields that all of its vertebrae share.

    `around_y`: front to back, where the soft tissue lies around; one number, or one a slice (z, 1, 1).
    """

    def __init__(self, patient: Patient, geometry: Geometry, *, table_z: float, around_y: Array | float) -> None:
        self.patient = patient
        self.geometry = geometry
        nz, ny, nx = geometry.shape_zyx
        sz, sy, sx = geometry.spacing_zyx
        oz, oy, ox = geometry.origin_zyx
        self.z = (np.arange(nz, dtype=np.float32) * sz + (oz - table_z)).astype(np.float32)[:, None, None]
        self.y = (np.arange(ny, dtype=np.float32) * sy + oy).astype(np.float32)[None, :, None]
        self.x = (np.arange(nx, dtype=np.float32) * sx + ox).astype(np.float32)[None, None, :]
        rng = patient.rng("texture")
        self.fine = _noise(rng, (nz, ny, nx), (0.95, 0.6, 0.6), self.geometry.spacing_zyx)
        self.coarse = _noise(rng, (nz, ny, nx), (3.2, 3.2, 3.2), self.geometry.spacing_zyx)
        self.soft = float(max(sy, sx, sz * 0.7))
        self.hu = _soft_tissue(self.y, self.x, around_y, self.coarse)
        self.depth: dict[str, tuple[slice, Array]] = {}

    def window(self, window: Window) -> Canvas:
        """A canvas on a part of this one's rows and columns; what is drawn on it is drawn on this one."""
        part = copy(self)
        part.y, part.x = self.y[:, window.rows], self.x[:, :, window.columns]
        for name in ("fine", "coarse", "hu"):
            setattr(part, name, getattr(self, name)[:, window.rows, window.columns])
        part.depth = {}
        return part

    def slices(self, low_mm: float, high_mm: float) -> slice:
        """The slices between two heights."""
        return between(self.z[:, 0, 0], low_mm, high_mm)

    def paint(self, where: slice, weight: Array, value: Array | float) -> None:
        """Blend a value in."""
        region = self.hu[where]
        region += weight * (value - region)

    def draw(self, vertebra: PlacedVertebra) -> None:
        """One vertebra with the disc below it."""
        half_z, half_y, half_x = vertebra.half_zyx
        reach = half_z + 16.0
        where = self.slices(vertebra.centre_zy[0] - reach, vertebra.centre_zy[0] + reach)
        if where.stop <= where.start:
            return
        fracture, rng = vertebra.fracture, self.patient.rng("shape-" + vertebra.level)
        dz, dy = self.z[where] - np.float32(vertebra.centre_zy[0]), self.y - np.float32(vertebra.centre_zy[1])
        cos, sin = np.float32(np.cos(vertebra.tilt)), np.float32(np.sin(vertebra.tilt))
        z, y, x = cos * dz - sin * dy, sin * dz + cos * dy, self.x
        strength = dict(fracture.strengths) if fracture else {}
        side = 1.0 if _breaks_above(rng) else -1.0
        lean, wobble = float(rng.normal(0, 0.5)), self.coarse[where]

        top, bottom = self._plates(z, y, x, vertebra, side=side)
        reach_y = np.full((1, 1, 1), half_y, dtype=np.float32)
        if strength.get("step"):
            shift = 2.6 * strength["step"]
            above = step(np.float32(side) * z - np.float32(0.35 * half_z), 0.8)
            y = y + np.float32(shift) * above * step(-y - np.float32(0.25 * half_y), 6.0)
        if strength.get("osteophytes"):
            grow = 0.28 * strength["osteophytes"]
            lips = bump(top - z, 2.4) + np.float32(0.8) * bump(z - bottom, 2.4)
            reach_y = reach_y * (1 + np.float32(grow) * lips * step(-y, 8.0))
        waist = np.float32(1) - np.float32(0.07) * (1 - np.square(np.clip(z / np.float32(half_z), -1, 1)))
        radius = np.sqrt(
            np.power(np.abs(x) / np.float32(half_x), np.float32(2.5))
            + np.power(np.abs(y) / reach_y, np.float32(2.5)) / np.power(waist, np.float32(2.5))
        ) ** np.float32(0.8)
        behind = np.float32(0.09) * bump(x, 8.0) * step(y - np.float32(0.5 * half_y), 6.0)
        wall = (np.float32(1) - radius - behind) * np.float32(min(half_y, half_x))
        depth = np.minimum(np.minimum(top - z, z - bottom), wall) + np.float32(0.18) * wobble
        tissue = self._marrow(where, depth, fracture)
        shell = bump(depth - np.float32(0.45), 0.55) + np.float32(0.35) * bump(np.minimum(top - z, z - bottom), 0.9)
        tissue += np.float32(_SHELL_HU * rng.uniform(0.85, 1.15)) * np.clip(shell, 0, 1.2)
        tissue -= np.float32(55) * bump(z, 1.3) * bump(x, 3.5) * step(y - np.float32(0.1 * half_y), 8.0)
        if fracture:
            near = (top - z) if side > 0 else (z - bottom)
            self._signs(tissue, depth, near, z, y, x, wobble, strength, rng, vertebra, lean)

        if strength.get("swelling"):
            cuff = 7.5 * strength["swelling"]
            around = step(wall + np.float32(cuff), 1.8) * step(np.float32(half_z + 3) - np.abs(z), 6.0)
            soft_tissue = around * step(np.float32(0.4 * half_y) - y, 6.0)
            self.paint(where, soft_tissue, np.float32(38) + np.float32(8) * wobble)
        self._posterior(where, z, y, x, vertebra)
        disc_top = np.float32(-half_z) - z
        disc_height = np.float32(_DISC_MM[vertebra.level] * self.patient.rendered_size + 2)
        gap = np.minimum(disc_top + np.float32(6), disc_height - disc_top)
        self.paint(where, step(np.minimum(gap, wall + np.float32(0.5)), 1.2), np.float32(DISC_HU) + 6 * wobble)
        upper = np.minimum(z - np.float32(half_z * 0.2), np.float32(half_z + 2.5) - z)
        self.paint(where, step(np.minimum(upper, wall), 1.2), np.float32(DISC_HU) + 6 * wobble)
        self.paint(where, step(depth, self.soft), tissue)
        self.depth[vertebra.level] = (where, depth)

    def _plates(self, z: Array, y: Array, x: Array, vertebra: PlacedVertebra, *, side: float) -> tuple[Array, Array]:
        """Heights of the upper and the lower end-plate over (y, x), with the deformity."""
        half_z, half_y, half_x = vertebra.half_zyx
        off = np.square(x / np.float32(half_x)) + np.square(y / np.float32(half_y))
        cup = np.float32(1.1) * np.clip(1 - off, 0, 1)
        top, bottom = half_z - cup, -half_z + cup
        fracture = vertebra.fracture
        if fracture is None:
            return top, bottom
        lost = np.float32(2 * half_z * fracture.height_loss)
        front = np.clip(np.float32(0.5) - y / np.float32(2 * half_y), 0, 1)
        if fracture.deformity == "wedge":
            sink, rise = lost * front, np.float32(0) * front
        elif fracture.deformity == "biconcave":
            dish = np.clip(1 - np.float32(0.85) * off, 0, 1)
            sink, rise = np.float32(0.62) * lost * dish, np.float32(0.48) * lost * dish
        else:
            sink, rise = np.float32(0.78) * lost + np.float32(0.22) * lost * front, np.float32(0.12) * lost * front
        return (top - sink, bottom + rise) if side > 0 else (top - rise, bottom + sink)

    def _marrow(self, where: slice, depth: Array, fracture: Fracture | None) -> Array:
        density = self.patient.density_hu + (fracture.density_shift_hu if fracture else 0.0)
        grain = 12 + 0.14 * self.patient.density_hu
        return np.asarray(
            np.float32(density) + np.float32(grain) * self.fine[where] + np.float32(13) * self.coarse[where],
            dtype=np.float32,
        )

    def _signs(
        self,
        tissue: Array,
        depth: Array,
        near: Array,
        z: Array,
        y: Array,
        x: Array,
        wobble: Array,
        strength: dict[str, float],
        rng: np.random.Generator,
        vertebra: PlacedVertebra,
        lean: float,
    ) -> None:
        """What the fracture does to the marrow; `near` is the distance under the broken end-plate in mm."""
        _, half_y, half_x = vertebra.half_zyx
        place, width, reach = rng.uniform(4.0, 7.5), rng.uniform(1.6, 2.8), rng.uniform(0.5, 1.1)
        slope = near + np.float32(0.08 * lean) * y + np.float32(0.6) * wobble
        if strength["band"]:
            spread = step(np.float32(reach * half_y) - y, 9.0) * (1 + np.float32(0.35) * wobble)
            tissue += np.float32(140 * strength["band"]) * bump(slope - np.float32(place), width) * spread
        if strength["lucent_line"]:
            line = slope + np.float32(0.12) * y - np.float32(place + 3.5)
            spread = step(np.float32(0.3 * half_y) - y, 6.0)
            tissue -= np.float32(150 * strength["lucent_line"]) * bump(line, 0.95) * spread
        if strength["sclerosis"]:
            rim = bump(near - np.float32(1.4), 1.5) + np.float32(0.4) * bump(depth - np.float32(1.4), 1.5)
            tissue += np.float32(210 * strength["sclerosis"]) * rim * (1 + np.float32(0.25) * wobble)
        if strength["vacuum"]:
            centre_y, centre_x = rng.uniform(-0.5, 0.1) * half_y, rng.uniform(-0.3, 0.3) * half_x
            cleft = (
                np.square((near - np.float32(4.5)) / np.float32(1.5))
                + np.square((y - np.float32(centre_y)) / np.float32(7))
                + np.square((x - np.float32(centre_x)) / np.float32(10))
            )
            gas = step(np.float32(1) - cleft, 0.6)
            tissue += gas * (np.float32(-560) * np.float32(strength["vacuum"]) - tissue)

    def _posterior(self, where: slice, z: Array, y: Array, x: Array, vertebra: PlacedVertebra) -> None:
        """Canal, pedicles, lamina and spinous process: plain shapes of dense bone."""
        half_z, half_y, half_x = vertebra.half_zyx
        bone = np.float32(self.patient.density_hu + 190) + np.float32(35) * self.fine[where]

        def ellipsoid(cz: float, cy: float, cx: float, rz: float, ry: float, rx: float) -> Array:
            distance = np.sqrt(
                np.square((z - np.float32(cz)) / np.float32(rz))
                + np.square((y - np.float32(cy)) / np.float32(ry))
                + np.square((x - np.float32(cx)) / np.float32(rx))
            )
            return step((np.float32(1) - distance) * np.float32(min(rz, ry, rx)), 1.0)

        back = half_y
        for sign in (-1.0, 1.0):
            self.paint(where, ellipsoid(0.3 * half_z, back + 5, sign * 0.55 * half_x, 6.5, 10, 4.5), bone)
            self.paint(where, ellipsoid(-0.3 * half_z, back + 20, sign * 0.5 * half_x, 12, 6, 6.5), bone)
        self.paint(where, ellipsoid(-0.35 * half_z, back + 23, 0, 8, 4, 13), bone)
        self.paint(where, ellipsoid(-0.6 * half_z, back + 36, 0, 9, 14, 3.2), bone)
        canal = np.sqrt(np.square((y - np.float32(back + 9)) / np.float32(8.5)) + np.square(x / np.float32(11)))
        self.paint(where, step((np.float32(1) - canal) * np.float32(8.5), 1.0) + 0 * z, CANAL_HU)

    def scanned(self) -> NDArray[np.int16]:
        """The volume as the scanner shows it: blurred, noisy, whole HU."""
        sz, sy, sx = self.geometry.spacing_zyx
        blur = _BLUR_MM[self.patient.kernel]
        sigma = (0.32 * self.patient.slice_thickness_mm / sz, blur / sy, blur / sx)
        image = gaussian_filter(self.hu, sigma, mode="nearest", truncate=3)
        grain = _GRAIN_MM[self.patient.kernel]
        noise = _noise(self.patient.rng("noise"), image.shape, (0.2, grain, grain), self.geometry.spacing_zyx)
        image += np.float32(self.patient.noise_hu / np.sqrt(self.patient.slice_thickness_mm)) * noise
        return np.asarray(np.clip(np.rint(image), -1024, 3071), dtype=np.int16)

    def mask(self, reader: int) -> Mask:
        """The fractured bodies as one reader draws them: a smooth error of a third of a millimetre, and a habit."""
        rng = self.patient.rng(f"reader-{reader}")
        labels = np.zeros(self.geometry.shape_zyx, dtype=np.uint8)
        habit = float(rng.normal(0, 0.25)) if reader else 0.0
        fractured = {fracture.level for fracture in self.patient.fractures}
        for level, (where, depth) in sorted(self.depth.items()):
            if level not in fractured:
                continue
            error = _noise(rng, depth.shape, (2.5, 2.5, 2.5), self.geometry.spacing_zyx)
            labels[where][depth + np.float32(habit) + np.float32(0.33) * error > 0] = LABELS[level]
        return Mask(voxels=labels, geometry=self.geometry)


def render(patient: Patient, *, readers: int = 1, half_width_mm: float = HALF_WIDTH_MM) -> Rendered:
    """The CT slab of a patient and the label masks of `readers` readers (VerSe values; no label where none is broken).

    `half_width_mm` narrows the slab around the sagittal plane, for pictures that need a few sagittal slices only.
    """
    placed = place_vertebrae(patient)
    geometry, table_z = _grid(patient, placed, half_width_mm)
    canvas = Canvas(patient, geometry, table_z=table_z, around_y=geometry.origin_zyx[1] + ANTERIOR_MM)
    for vertebra in reversed(placed):
        canvas.draw(vertebra)
    volume = Volume(voxels=canvas.scanned(), geometry=geometry)
    return Rendered(volume=volume, masks=tuple(canvas.mask(reader) for reader in range(readers)))
