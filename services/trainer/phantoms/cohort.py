"""Who the phantom patients are: demographics, scanner, levels, and the signs of each fracture (METHOD 11).

A sign never belongs to one class alone. Each is a probability per class, and one knob, κ, shrinks every difference
between the classes towards their mean: κ = 1 gives the full table below, κ = 0 makes acute and chronic the same.
A patient depends on (seed, index) and on nothing else, so cohorts can be made in any order and in part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

Sex = Literal["F", "M"]
Kernel = Literal["soft", "standard", "bone"]
Deformity = Literal["wedge", "biconcave", "crush"]

GENERATOR_VERSION: Final = 2
"""To be raised with every change of the phantoms that changes a voxel."""

LEVELS: Final[tuple[str, ...]] = ("T11", "T12", "L1", "L2", "L3", "L4", "L5")
"""The levels that phantoms are made of, from above."""

SIGNS: Final[tuple[str, ...]] = (
    "band",
    "step",
    "lucent_line",
    "swelling",
    "sclerosis",
    "osteophytes",
    "vacuum",
)

SIGN_PROBABILITY: Final[Mapping[str, tuple[float, float]]] = {
    "band": (0.72, 0.22),
    "step": (0.55, 0.16),
    "lucent_line": (0.40, 0.12),
    "swelling": (0.65, 0.10),
    "sclerosis": (0.15, 0.55),
    "osteophytes": (0.30, 0.60),
    "vacuum": (0.05, 0.15),
}
"""How often a sign is seen in an acute and in a chronic fracture at κ = 1."""

HEIGHT_LOSS: Final[tuple[float, float]] = (0.26, 0.33)
HEIGHT_LOSS_SD: Final = 0.09
DENSITY_SHIFT_HU: Final[tuple[float, float]] = (12.0, -12.0)
AGE: Final[tuple[float, float]] = (65.0, 72.0)
AGE_SD: Final = 10.0
DEFORMITY: Final[Mapping[Deformity, tuple[float, float]]] = {
    "wedge": (0.62, 0.45),
    "biconcave": (0.20, 0.38),
    "crush": (0.18, 0.17),
}
KERNEL_NAME: Final[Mapping[Kernel, str]] = {"soft": "B30f", "standard": "B45f", "bone": "B70f"}
"""What a header calls the kernels (ConvolutionKernel)."""
_KERNELS: Final[tuple[Kernel, ...]] = tuple(KERNEL_NAME)
_LEVEL_WEIGHTS: Final[tuple[float, ...]] = (0.08, 0.22, 0.28, 0.15, 0.11, 0.10, 0.06)
_SAME_CLASS: Final = 0.7
_ACUTE_SHARE: Final = 0.6


@dataclass(frozen=True, kw_only=True)
class Fracture:
    """One fractured vertebra: its class, and the strength of each sign (0 where absent, about 1 where present)."""

    level: str
    acute: bool
    strengths: Mapping[str, float]
    height_loss: float
    deformity: Deformity
    density_shift_hu: float

    def has(self, sign: str) -> bool:
        """Whether the sign is present."""
        return self.strengths[sign] > 0


@dataclass(frozen=True, kw_only=True)
class Patient:
    """One phantom patient: what the volume, the masks and the DICOM headers are made from.

    Density, kernel, noise and spacing hold for all of a patient's vertebrae. `age` and `sex` are None where the
    headers shall not hold them; `rendered_size` stands in for sex in the anatomy then.
    """

    seed: int
    index: int
    age: int | None
    sex: Sex | None
    rendered_size: float
    density_hu: float
    kernel: Kernel
    noise_hu: float
    kvp: int
    spacing_zyx: tuple[float, float, float]
    slice_thickness_mm: float
    centre_level: str
    fractures: tuple[Fracture, ...]

    def rng(self, stream: str) -> np.random.Generator:
        """A generator that belongs to this patient and this use alone."""
        return _rng(self.seed, self.index, stream)


def _rng(seed: int, index: int, stream: str) -> np.random.Generator:
    return np.random.default_rng([seed, index, *stream.encode()])


def _between(pair: tuple[float, float], *, acute: bool, kappa: float) -> float:
    middle = (pair[0] + pair[1]) / 2
    return middle + kappa * ((pair[0] if acute else pair[1]) - middle)


def _draw_fracture(rng: np.random.Generator, level: str, *, acute: bool, kappa: float) -> Fracture:
    strengths = {}
    for sign in SIGNS:
        present, strength = rng.random(), rng.uniform(0.6, 1.25)
        shown = present < _between(SIGN_PROBABILITY[sign], acute=acute, kappa=kappa)
        strengths[sign] = float(strength) if shown else 0.0
    kinds = list(DEFORMITY)
    weights = np.array([_between(DEFORMITY[kind], acute=acute, kappa=kappa) for kind in kinds])
    loss = rng.normal(_between(HEIGHT_LOSS, acute=acute, kappa=kappa), HEIGHT_LOSS_SD)
    return Fracture(
        level=level,
        acute=acute,
        strengths=strengths,
        height_loss=float(np.clip(loss, 0.08, 0.55)),
        deformity=kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))],
        density_shift_hu=float(rng.normal(_between(DENSITY_SHIFT_HU, acute=acute, kappa=kappa), 10.0)),
    )


def _levels(rng: np.random.Generator, count: int) -> list[str]:
    """`count` levels within a stretch of at most five, so that one slab of the spine holds them."""
    centre = int(rng.choice(len(LEVELS), p=_LEVEL_WEIGHTS))
    first = int(np.clip(centre - rng.integers(0, 5), 0, len(LEVELS) - 5))
    stretch = [n for n in range(first, first + 5) if n != centre]
    others = [int(n) for n in rng.choice(stretch, size=count - 1, replace=False)]
    return [LEVELS[n] for n in sorted([centre, *others])]


def draw_patient(*, seed: int, index: int, kappa: float = 0.85, fractures: int | None = None) -> Patient:
    """The patient number `index` of the cohort `seed`, with `fractures` vertebrae (0 to 4), or as many as drawn."""
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa lies between 0 and 1, got {kappa}")
    rng = _rng(seed, index, "patient")
    drawn = int(rng.choice([1, 2, 3, 4], p=[0.70, 0.20, 0.07, 0.03]))
    count = drawn if fractures is None else fractures
    if not 0 <= count <= 4:
        raise ValueError(f"a phantom patient has up to four fractures, got {count}")
    first_acute = bool(rng.random() < _ACUTE_SHARE)
    age = int(np.clip(rng.normal(_between(AGE, acute=first_acute, kappa=kappa), AGE_SD), 40, 94))
    sex: Sex = "F" if rng.random() < 0.66 else "M"
    density = rng.normal(226 - 2.3 * (age - 30), 30.0)
    kernel = _KERNELS[int(rng.choice(3, p=[0.25, 0.35, 0.40]))]
    noise = rng.uniform(9, 20) * {"soft": 0.8, "standard": 1.0, "bone": 1.6}[kernel]
    spacing_z = float(rng.choice([0.7, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5], p=[0.1, 0.1, 0.4, 0.2, 0.12, 0.05, 0.03]))
    thickness = float(spacing_z * rng.choice([1.0, 1.25], p=[0.8, 0.2]))
    row = round(float(rng.uniform(0.62, 0.88)), 4)
    column = row if rng.random() < 0.85 else round(row * float(rng.uniform(0.94, 1.06)), 4)
    kvp = int(rng.choice([100, 120, 140], p=[0.15, 0.75, 0.10]))
    size = float(rng.normal(1.0, 0.04)) * (1.05 if sex == "M" else 0.98)
    levels = _levels(rng, max(count, 1))
    acute = first_acute
    drawn_fractures: list[Fracture] = []
    for level in levels if count else []:
        if drawn_fractures:
            acute = first_acute if rng.random() < _SAME_CLASS else not first_acute
        drawn_fractures.append(_draw_fracture(rng, level, acute=acute, kappa=kappa))
    return Patient(
        seed=seed,
        index=index,
        age=age,
        sex=sex,
        rendered_size=size,
        density_hu=float(np.clip(density, 40, 260)),
        kernel=kernel,
        noise_hu=float(noise),
        kvp=kvp,
        spacing_zyx=(spacing_z, row, column),
        slice_thickness_mm=thickness,
        centre_level=levels[len(levels) // 2],
        fractures=tuple(drawn_fractures),
    )


def cohort(*, patients: int, seed: int, kappa: float = 0.85) -> Iterator[Patient]:
    """The first `patients` fractured patients of a seed, for training."""
    return (draw_patient(seed=seed, index=index, kappa=kappa) for index in range(patients))


def archive_patient(*, seed: int, index: int, kappa: float = 0.85) -> Patient:
    """A patient of a demonstration archive: every eighth without a fracture, every eighth without age and sex."""
    turn = index % 8
    patient = draw_patient(seed=seed, index=index, kappa=kappa, fractures={1: 2, 4: 3, 5: 0}.get(turn))
    return replace(patient, age=None, sex=None) if turn == 3 else patient
