"""CT numbers for a map of tissues: drawn anew for each volume, wider than scanners and patients are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, gaussian_filter

from services.trainer.segmentation.tissues import BONES, CODE, TISSUES

Array = NDArray[np.float32]
AIR_HU: Final = -1000.0
_OSTEOPENIC_SHARE: Final = 0.6
_CONTRAST_SHARE: Final = 0.55


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """What one volume's tissues look like in HU."""

    mean: Array
    """By tissue value."""
    grain: Array
    """SD of coarse texture, by tissue value."""
    trabecular: float
    shell: float
    """What the outermost voxels of a bone have beyond its inside."""


def draw_appearance(rng: np.random.Generator) -> Appearance:
    """Values for one volume."""
    contrast = rng.random() < _CONTRAST_SHARE
    arterial = contrast and rng.random() < 0.5
    osteopenic = rng.random() < _OSTEOPENIC_SHARE
    trabecular = float(rng.uniform(-25, 110) if osteopenic else rng.uniform(90, 300))
    muscle = float(rng.uniform(-20, 35) if rng.random() < 0.3 else rng.uniform(35, 75))
    blood = float(rng.uniform(30, 60))
    artery = float(rng.uniform(150, 450) if arterial else rng.uniform(90, 200)) if contrast else blood
    vein = float(rng.uniform(40, 120) if arterial else rng.uniform(90, 200)) if contrast else blood
    values: dict[str, tuple[float, float]] = {
        "air": (AIR_HU, 3),
        "fat": (rng.uniform(-115, -75), rng.uniform(4, 25)),
        "muscle": (muscle, rng.uniform(5, 22)),
        "lung": (rng.uniform(-900, -620), rng.uniform(15, 70)),
        "airway": (AIR_HU, 5),
        "artery": (artery, rng.uniform(3, 12)),
        "vein": (vein, rng.uniform(3, 12)),
        "heart": (blood + (rng.uniform(40, 220) if contrast else 0), rng.uniform(8, 40)),
        "liver": (rng.uniform(-10, 75) + (rng.uniform(20, 70) if contrast else 0), rng.uniform(4, 12)),
        "spleen": (rng.uniform(35, 60) + (rng.uniform(30, 90) if contrast else 0), rng.uniform(4, 12)),
        "kidney": (rng.uniform(22, 42) + (rng.uniform(60, 220) if contrast else 0), rng.uniform(5, 40)),
        "bowel": (rng.uniform(10, 55), rng.uniform(15, 60)),
        "fluid": (rng.uniform(-5, 25), rng.uniform(3, 8)),
        "gland": (rng.uniform(25, 60) + (rng.uniform(20, 80) if contrast else 0), rng.uniform(5, 15)),
        "canal": (rng.uniform(0, 50), rng.uniform(4, 14)),
        "cartilage": (rng.uniform(50, 190), rng.uniform(15, 80)),
        "other-bone": (trabecular * rng.uniform(0.6, 1.4) + rng.uniform(0, 180), rng.uniform(20, 60)),
        "body": (trabecular, rng.uniform(8, 35)),
        "posterior": (trabecular * rng.uniform(0.7, 1.2) + rng.uniform(20, 220), rng.uniform(20, 80)),
        "disc": (rng.uniform(40, 130), rng.uniform(4, 18)),
        "sacrum": (trabecular * rng.uniform(0.5, 1.1), rng.uniform(15, 60)),
        "rib": (rng.uniform(40, 420), rng.uniform(20, 80)),
        "hip": (trabecular * rng.uniform(0.6, 1.2) + rng.uniform(0, 80), rng.uniform(15, 60)),
        "uncut": (trabecular, rng.uniform(8, 35)),
    }
    return Appearance(
        mean=np.array([values[name][0] for name in TISSUES], dtype=np.float32),
        grain=np.array([values[name][1] for name in TISSUES], dtype=np.float32),
        trabecular=trabecular,
        shell=float(rng.uniform(80, 950) * rng.uniform(0.35, 1.0)),
    )


def noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | tuple[float, ...]) -> Array:
    """Correlated noise of SD 1 (sigma in voxels)."""
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap", truncate=3)
    return np.asarray(field / max(float(field.std()), 1e-6), dtype=np.float32)


def paint(tissue: NDArray[np.uint8], vertebra: NDArray[np.uint8], rng: np.random.Generator) -> Array:
    """The HU (float32) of a map of tissues, before the scanner. `vertebra`: which one a voxel belongs to, 0 none."""
    look = draw_appearance(rng)
    coarse = noise(rng, tissue.shape, 2.2)
    fine = noise(rng, tissue.shape, 0.6)
    hu = look.mean[tissue] + look.grain[tissue] * (0.75 * coarse + 0.66 * fine)
    if rng.random() < 0.32:
        _other_organs(hu, tissue, rng)
    _bowel_content(hu, tissue, coarse, rng)
    if rng.random() < 0.6:
        _strands(hu, tissue, rng)
    bone = np.isin(tissue, [CODE[name] for name in BONES])
    _shell(hu, tissue, bone, look, rng)
    _per_vertebra(hu, tissue, vertebra, look, rng)
    _lesions(hu, tissue, rng)
    return hu


def _other_organs(hu: Array, tissue: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Random organs in the place of the real ones: what lies beside a spine must not matter."""
    free = ~np.isin(tissue, [CODE[name] for name in (*BONES, "disc", "canal", "air", "cartilage")])
    kinds = int(rng.integers(3, 8))
    field = noise(rng, tissue.shape, float(rng.uniform(5, 14)))
    steps = np.quantile(field[free], np.linspace(0, 1, kinds + 1)[1:-1]) if free.any() else np.zeros(kinds - 1)
    value = rng.choice(
        [rng.uniform(-120, -60), rng.uniform(-20, 90), rng.uniform(30, 250), rng.uniform(-900, -500)],
        size=kinds,
        p=[0.3, 0.4, 0.2, 0.1],
    ).astype(np.float32)
    hu[free] = value[np.searchsorted(steps, field[free])] + 8 * noise(rng, tissue.shape, 1.0)[free]


def _bowel_content(hu: Array, tissue: NDArray[np.uint8], coarse: Array, rng: np.random.Generator) -> None:
    bowel = tissue == CODE["bowel"]
    if not bowel.any():
        return
    field = noise(rng, tissue.shape, float(rng.uniform(2.5, 6)))
    gas, oral = float(rng.uniform(0, 0.5)), float(rng.uniform(0, 0.4) if rng.random() < 0.3 else 0)
    values = field[bowel]
    high, low = np.quantile(values, 1 - gas), np.quantile(values, oral)
    inside = hu[bowel]
    inside[values > high] = rng.uniform(-950, -600)
    inside[values < low] = rng.uniform(120, 500)
    hu[bowel] = inside + 6 * coarse[bowel]


def _strands(hu: Array, tissue: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Soft tissue that no mask names: sheets and strands in the fat."""
    fat = tissue == CODE["fat"]
    field = noise(rng, tissue.shape, float(rng.uniform(1.5, 4)))
    near = np.abs(field) < rng.uniform(0.08, 0.6)
    hu[fat & near] = rng.uniform(0, 60) + 10 * field[fat & near]


def _shell(
    hu: Array, tissue: NDArray[np.uint8], bone: NDArray[np.bool_], look: Appearance, rng: np.random.Generator
) -> None:
    """Cortical bone: the outermost voxels of what belongs together (a body and its arch do, two bodies do not)."""
    outer = np.zeros_like(bone)
    for name in ("body", "sacrum", "rib", "hip", "other-bone", "uncut"):
        part = tissue == CODE[name]
        if name == "body":
            part |= tissue == CODE["posterior"]
        if part.any():
            outer |= part & ~binary_erosion(part)
    field = 1 + rng.uniform(0.1, 0.5) * noise(rng, tissue.shape, 1.5)
    strength = np.full(len(look.mean), look.shell, dtype=np.float32)
    for name in BONES:
        strength[CODE[name]] *= rng.uniform(0.6, 1.3)
    hu[outer] += (strength[tissue] * np.clip(field, 0, 2))[outer]


def _per_vertebra(
    hu: Array, tissue: NDArray[np.uint8], vertebra: NDArray[np.uint8], look: Appearance, rng: np.random.Generator
) -> None:
    """Bodies of one spine differ: in density, and sometimes by sclerosis under an end-plate."""
    body = tissue == CODE["body"]
    for value in np.unique(vertebra[body]):
        if value:
            here = body & (vertebra == value)
            hu[here] += rng.normal(0, 6 + 0.06 * abs(look.trabecular))


def _lesions(hu: Array, tissue: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Sclerotic, lytic and cemented spots in bodies; gas in discs."""
    body = np.flatnonzero((tissue == CODE["body"]).ravel())
    disc = np.flatnonzero((tissue == CODE["disc"]).ravel())
    for chance, among, radius, value in (
        (0.25, body, rng.uniform(2, 7), rng.uniform(250, 900)),
        (0.2, body, rng.uniform(2, 6), rng.uniform(-60, 60)),
        (0.05, body, rng.uniform(4, 9), rng.uniform(1200, 2600)),
        (0.15, disc, rng.uniform(2, 6), rng.uniform(-800, -200)),
    ):
        if len(among) and rng.random() < chance:
            for _ in range(int(rng.integers(1, 4))):
                _spot(hu, tissue, int(rng.choice(among)), radius=float(radius), value=float(value), rng=rng)


def _spot(
    hu: Array, tissue: NDArray[np.uint8], at: int, *, radius: float, value: float, rng: np.random.Generator
) -> None:
    centre = np.unravel_index(at, tissue.shape)
    kind = tissue[centre]
    reach = round(radius) + 1
    box = tuple(slice(max(int(c) - reach, 0), int(c) + reach + 1) for c in centre)
    grid = np.stack(
        np.meshgrid(
            *[np.arange(s.start, min(s.stop, n)) for s, n in zip(box, tissue.shape, strict=True)], indexing="ij"
        )
    )
    stretch = rng.uniform(0.6, 1.4, size=3)
    away = np.sqrt(sum(np.square((grid[a] - centre[a]) / stretch[a]) for a in range(3)))
    weight = np.clip(radius / 1.5 - away / 1.5 + 0.5, 0, 1) * (tissue[box] == kind)
    hu[box] += weight * (value - hu[box])
