"""A phantom patient's whole spine, T9 to sacrum with ribs, in a field of view of the spine: scans that bring no masks.

The vertebrae are those of rendering.py; ribs, sacrum, hip bones, organs and skin are added, since they are what levels
are counted from. Positions as in rendering.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.trainer.phantoms.cohort import Patient, draw_patient
from services.trainer.phantoms.rendering import (
    ANTERIOR_MM,
    FAT_HU,
    HALF_WIDTH_MM,
    LABELS,
    MUSCLE_HU,
    SPINE_LEVELS,
    Array,
    Canvas,
    PlacedVertebra,
    Window,
    between,
    bump,
    place_vertebrae,
    step,
    table_grid,
)
from shared.fracture.volume import Geometry, Mask, Volume

HALF_FIELD_MM: Final = 82.0
BEFORE_MM: Final = 62.0
BEHIND_MM: Final = 92.0
SACRUM_MM: Final = 98.0
_SACRAL_LINES_MM: Final = (27.0, 49.0, 67.0, 82.0)
RIBBED: Final = ("T9", "T10", "T11", "T12")
_ABOVE_MM: Final = 14.0
_BACK_OF_VERTEBRA_MM: Final = 70.0
_SKIN_MM: Final = 84.0
_AIR_HU: Final = -1000.0
_CORTEX_HU: Final = 260.0
_SPACINGS_MM: Final = (0.8, 1.0, 1.25, 1.5)


@dataclass(frozen=True, kw_only=True)
class WholeSpine:
    """A scan of the whole spine, and the truth about its bodies (VerSe labels), which no file of it holds."""

    volume: Volume
    bodies: Mask


def spine_patient(*, seed: int, index: int, kappa: float = 0.85) -> Patient:
    """A patient whose whole spine is scanned; one in four has no fracture.

    Slices of 0.8 to 1.5 mm, since heights are read from those without reserve.
    """
    patient = draw_patient(seed=seed, index=index, kappa=kappa, fractures=0 if index % 4 == 3 else None)
    rng = patient.rng("spine-scan")
    slice_mm = float(rng.choice(_SPACINGS_MM))
    pixel = round(float(rng.uniform(0.7, 0.9)), 4)
    return replace(patient, spacing_zyx=(slice_mm, pixel, pixel), slice_thickness_mm=slice_mm)


def render_spine(patient: Patient) -> WholeSpine:
    """The CT volume of a patient from T9 to the sacrum, and the true bodies."""
    placed = place_vertebrae(patient, SPINE_LEVELS, settled=True)
    vertebrae, sacrum = placed[:-1], placed[-1]
    geometry, table_z = _grid(patient, placed)
    z = np.arange(geometry.shape_zyx[0]) * geometry.spacing_zyx[0] + geometry.origin_zyx[0] - table_z
    around = _spine_y(placed, z)[:, None, None].astype(np.float32)
    canvas = Canvas(patient, geometry, table_z=table_z, around_y=around)
    _organs(canvas, around)
    _hips(canvas, sacrum)
    _sacrum(canvas, sacrum)
    for vertebra in vertebrae:
        if vertebra.level in RIBBED:
            _ribs(canvas, vertebra)
    parts: list[tuple[Window, str, slice, Array]] = []
    for vertebra in reversed(vertebrae):
        window = _window(canvas, vertebra)
        part = canvas.window(window)
        part.draw(vertebra)
        parts += [(window, level, where, depth) for level, (where, depth) in part.depth.items()]
    canvas.hu[np.broadcast_to(canvas.y > around + np.float32(_SKIN_MM), canvas.hu.shape)] = _AIR_HU
    bodies = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    for window, level, where, depth in parts:
        bodies[where, window.rows, window.columns][depth > 0] = LABELS[level]
    return WholeSpine(
        volume=Volume(voxels=canvas.scanned(), geometry=geometry), bodies=Mask(voxels=bodies, geometry=geometry)
    )


def _spine_y(placed: list[PlacedVertebra], z: NDArray[np.floating]) -> NDArray[np.float64]:
    """Where the spine lies front to back at some heights."""
    at = sorted(vertebra.centre_zy for vertebra in placed)
    found: NDArray[np.float64] = np.interp(z, [c[0] for c in at], [c[1] for c in at])
    return found


def _grid(patient: Patient, placed: list[PlacedVertebra]) -> tuple[Geometry, float]:
    ys = [vertebra.centre_zy[1] for vertebra in placed]
    front = min(ys) - BEFORE_MM
    return table_grid(
        patient,
        z_mm=(placed[-1].centre_zy[0] + placed[-1].half_zyx[0] - SACRUM_MM, _ABOVE_MM),
        front_mm=front,
        depth_mm=max(ys) + BEHIND_MM - front,
        half_width_mm=HALF_FIELD_MM,
    )


def _window(canvas: Canvas, vertebra: PlacedVertebra) -> Window:
    """The rows and columns that a vertebra is drawn into."""
    y = vertebra.centre_zy[1]
    return Window(
        rows=between(canvas.y[0, :, 0], y - ANTERIOR_MM, y + _BACK_OF_VERTEBRA_MM),
        columns=between(canvas.x[0, 0, :], -HALF_WIDTH_MM, HALF_WIDTH_MM),
    )


def _organs(canvas: Canvas, around: Array) -> None:
    """Kidneys, liver and bowel as blurred shapes beside and before the spine, lung above, a rim of muscle."""
    rng = canvas.patient.rng("organs")
    y = canvas.y - around
    everywhere = slice(0, canvas.geometry.shape_zyx[0])
    wall = np.sqrt(np.square((y - np.float32(8)) / np.float32(70)) + np.square(canvas.x / np.float32(100)))
    rim = step(np.float32(4) - np.abs(wall - np.float32(0.97)) * np.float32(80), 3.0)
    canvas.paint(everywhere, rim, MUSCLE_HU - 8)
    shapes = [((-150.0, 12.0, side * 60.0), (48.0, 22.0, 22.0), float(rng.uniform(30, 170))) for side in (-1.0, 1.0)]
    shapes.append(((-70.0, -38.0, -62.0), (90.0, 34.0, 42.0), float(rng.uniform(40, 110))))
    shapes += [
        (
            (float(rng.uniform(-330, -150)), -46.0 + float(rng.normal(0, 5)), float(rng.uniform(-60, 60))),
            (20.0, 12.0, 18.0),
            float(rng.choice([-700.0, 20.0, 35.0])),
        )
        for _ in range(6)
    ]
    shapes += [((0.0, -8.0, side * 74.0), (62.0, 44.0, 26.0), -820.0) for side in (-1.0, 1.0)]
    for (cz, cy, cx), (rz, ry, rx), value in shapes:
        where = canvas.slices(cz - rz - 3, cz + rz + 3)
        if where.stop > where.start:
            away = np.sqrt(
                np.square((canvas.z[where] - np.float32(cz)) / np.float32(rz))
                + np.square((y[where] - np.float32(cy)) / np.float32(ry))
                + np.square((canvas.x - np.float32(cx)) / np.float32(rx))
            )
            canvas.paint(
                where,
                step((np.float32(1) - away) * np.float32(min(rz, ry, rx)), 2.0),
                np.float32(value) + np.float32(7) * canvas.coarse[where],
            )


def _bone(canvas: Canvas, where: slice, depth: Array, density: float) -> None:
    """Bone of a depth (mm under its surface, negative outside) with a cortical shell."""
    inside = np.float32(density) + np.float32(30) * canvas.fine[where] + np.float32(14) * canvas.coarse[where]
    value = inside + np.float32(_CORTEX_HU) * bump(depth - np.float32(0.6), 0.8)
    canvas.paint(where, step(depth, canvas.soft), value)


def _ribs(canvas: Canvas, vertebra: PlacedVertebra) -> None:
    """A pair of ribs: out to the back and down; the twelfth is short."""
    _, half_y, half_x = vertebra.half_zyx
    cz, cy = vertebra.centre_zy
    cz += 0.35 * vertebra.half_zyx[0]
    short = vertebra.level == "T12"
    for side in (-1.0, 1.0):
        path = np.array(
            [
                (cz, cy + 0.55 * half_y, side * (half_x + 1)),
                (cz - 1, cy + half_y + 7, side * (half_x + 14)),
                (cz - 10, cy + half_y + 12, side * (half_x + 34)),
                *([] if short else [(cz - 26, cy + half_y - 2, side * (half_x + 56)), (cz - 40, cy - 20, side * 84)]),
            ],
            dtype=np.float64,
        )
        _tube(canvas, path, radius=3.9 if short else 4.6)


def _tube(canvas: Canvas, path: NDArray[np.float64], *, radius: float) -> None:
    """A rod of bone along a path (n, 3; zyx, mm)."""
    where = canvas.slices(float(path[:, 0].min()) - radius - 2, float(path[:, 0].max()) + radius + 2)
    y, x = canvas.y[0, :, 0], canvas.x[0, 0, :]
    rows = between(y, float(path[:, 1].min()) - radius - 2, float(path[:, 1].max()) + radius + 2)
    columns = between(x, float(path[:, 2].min()) - radius - 2, float(path[:, 2].max()) + radius + 2)
    if any(part.stop <= part.start for part in (where, rows, columns)):
        return
    part = canvas.window(Window(rows=rows, columns=columns))
    z, y3, x3 = part.z[where], part.y, part.x
    away = np.full((z.shape[0], y3.shape[1], x3.shape[2]), 1e3, dtype=np.float32)
    for start, end in pairwise(path):
        way = (end - start).astype(np.float32)
        offset = z - np.float32(start[0]), y3 - np.float32(start[1]), x3 - np.float32(start[2])
        share = np.clip(
            (offset[0] * way[0] + offset[1] * way[1] + offset[2] * way[2]) / np.float32(np.sum(np.square(way))), 0, 1
        )
        away = np.minimum(
            away,
            np.sqrt(
                np.square(offset[0] - share * way[0])
                + np.square(offset[1] - share * way[1])
                + np.square(offset[2] - share * way[2])
            ),
        )
    _bone(part, where, np.float32(radius) - away, 140.0)


def _sacrum(canvas: Canvas, first: PlacedVertebra) -> None:
    """The sacrum from the upper end-plate of S1 down: wide wings, narrowing, bent to the back, one bone."""
    top_z = first.centre_zy[0] + first.half_zyx[0]
    where = canvas.slices(top_z - SACRUM_MM, top_z + 14)
    z, wobble = canvas.z[where], canvas.coarse[where]
    down = np.clip(np.float32(top_z) - z, 0, None)
    middle = np.float32(first.centre_zy[1]) + np.float32(0.92) * down - np.float32(0.0046) * np.square(down)
    half_y = np.clip(np.float32(first.half_zyx[1]) - np.float32(0.175) * down, 3.5, None)
    half_x = np.clip(np.float32(54) - np.float32(0.44) * down, 10.0, None)
    beside = np.abs(canvas.x)
    wings = np.float32(11) * np.square(np.clip((beside - np.float32(18)) / np.float32(32), 0, None))
    y = canvas.y - middle - wings
    wall = (np.float32(1) - ((beside / half_x) ** np.float32(2.4) + (np.abs(y) / half_y) ** np.float32(2.4))
            ** np.float32(1 / 2.4)) * half_y  # fmt: skip
    tilt = first.tilt
    plate = -np.float32(np.cos(tilt)) * (z - np.float32(first.centre_zy[0])) + np.float32(np.sin(tilt)) * (
        canvas.y - np.float32(first.centre_zy[1])
    )
    depth = np.minimum(wall, plate + np.float32(first.half_zyx[0])) + np.float32(0.2) * wobble
    density = float(np.clip(canvas.patient.density_hu * 0.8, 25, 200))
    _bone(canvas, where, depth, density)
    for at in _SACRAL_LINES_MM:  # where the sacral bodies have grown together
        line = bump(down - np.float32(at), 0.9) * step(depth, 1.0) * step(np.float32(16) - beside, 4.0)
        canvas.paint(where, np.clip(line, 0, 1), np.float32(density + 190) + np.float32(20) * wobble)
    for level in range(4):
        at = top_z - 24 - 17 * level
        for side in (-1.0, 1.0):
            hole = np.sqrt(
                np.square((z - np.float32(at)) / np.float32(6))
                + np.square(y / np.float32(14))
                + np.square((canvas.x - np.float32(side * (20 - 2 * level))) / np.float32(4.5))
            )
            canvas.paint(where, step((np.float32(1) - hole) * np.float32(4.5), 1.0), FAT_HU)
    behind = canvas.y - middle - half_y - np.float32(13)
    width = np.float32(17) - np.float32(0.13) * down
    arch = np.float32(2.6) - np.abs(behind + np.float32(0.02) * np.square(canvas.x))
    spine = np.float32(5) - np.sqrt(np.square((behind - np.float32(5)) / np.float32(1.3)) + np.square(canvas.x))
    inside = np.minimum(width - beside, np.float32(top_z - 4) - z)
    _bone(canvas, where, np.minimum(np.maximum(arch, spine), inside), density + 90)


def _hips(canvas: Canvas, first: PlacedVertebra) -> None:
    """The wings of the hip bones beside the sacrum."""
    top_z = first.centre_zy[0] + first.half_zyx[0]
    where = canvas.slices(top_z - SACRUM_MM, top_z + 40)
    z = canvas.z[where] - np.float32(top_z - 38)
    for side in (-1.0, 1.0):
        y = canvas.y - np.float32(first.centre_zy[1] + 14)
        x = np.float32(side) * canvas.x - np.float32(68)
        turned = x + np.float32(0.35) * y
        along = y - np.float32(0.35) * x
        away = np.sqrt(
            np.square(z / np.float32(58)) + np.square(along / np.float32(44)) + np.square(turned / np.float32(8))
        )
        _bone(canvas, where, (np.float32(1) - away) * np.float32(8), 120.0)
