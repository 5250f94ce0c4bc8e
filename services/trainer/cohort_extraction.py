"""From phantom patients to rows of features: render, crop, hand-crafted features, and the picture for the network.

The same pure functions as in the services make every number, so that a model fitted on these rows may score theirs.
One file a patient lies in a work folder, named by what it depends on, so that an interrupted run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.trainer.phantoms.cohort import Patient, draw_patient
from services.trainer.phantoms.rendering import LABELS, render
from shared.fracture.crop import crop_vertebra
from shared.fracture.ids import digest
from shared.fracture.protocol import CropProtocol, Preset, preset_box, preset_crop
from shared.fracture.sagittal import sagittal_image
from shared.fracture.volume import Mask, Volume

GENERATOR_VERSION: Final = 1
"""To be raised with every change of the phantoms that changes a voxel."""

HcrExtractor = Callable[[Volume, Mask], Mapping[str, float]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class CohortSpec:
    """Which phantom cohort, under which protocols; everything that a cached row depends on but the extractor."""

    patients: int
    seed: int
    kappa: float
    preset: Preset = "recommended"
    image_size: int = 64

    @property
    def crop(self) -> CropProtocol:
        """The crop of the preset."""
        return preset_crop(self.preset)

    @property
    def cache_key(self) -> str:
        """What the rows depend on, but for the number of patients and the extractor."""
        return digest(
            {
                "seed": self.seed,
                "kappa": self.kappa,
                "crop": self.crop.crop_hash,
                "box": list(preset_box(self.preset)),
                "size": self.image_size,
                "generator": GENERATOR_VERSION,
            }
        )


@dataclass(frozen=True, kw_only=True)
class CohortRows:
    """One row a fractured vertebra, sorted by patient and level.

    hcr (n, features) float64 in the order of `hcr_names`; images (n, size, size) float32; `patient` is the group.
    """

    patient: NDArray[np.int64]
    level: tuple[str, ...]
    acute: NDArray[np.int64]
    age: NDArray[np.float64]
    male: NDArray[np.float64]
    kernel: tuple[str, ...]
    kvp: NDArray[np.float64]
    hcr_names: tuple[str, ...]
    hcr: NDArray[np.float64]
    images: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.level)


def case_images(patient: Patient, *, spec: CohortSpec) -> Iterator[tuple[str, Volume, Mask, NDArray[np.float32]]]:
    """Level, cropped image, cropped mask and network picture of each fractured vertebra of a patient."""
    rendered = render(patient)
    box, box_margin_mm = preset_box(spec.preset)
    for fracture in patient.fractures:
        roi = Mask(
            voxels=(rendered.masks[0].voxels == LABELS[fracture.level]).astype(np.uint8),
            geometry=rendered.volume.geometry,
        )
        crop = crop_vertebra(rendered.volume, roi, spec.crop)
        picture = sagittal_image(crop.image, crop.mask, box=box, box_margin_mm=box_margin_mm, size=spec.image_size)
        yield fracture.level, crop.image, crop.mask, picture


def _write_patient(index: int, *, spec: CohortSpec, extractor: HcrExtractor, folder: Path) -> int:
    path = folder / f"{index:05d}.npz"
    if path.exists():
        return index
    patient = draw_patient(seed=spec.seed, index=index, kappa=spec.kappa)
    levels, names, values, pictures = [], [], [], []
    for level, image, mask, picture in case_images(patient, spec=spec):
        features = extractor(image, mask)
        names = list(features)
        levels.append(level)
        values.append(list(features.values()))
        pictures.append(picture)
    aside = path.with_suffix(f".{os.getpid()}.part")
    with aside.open("wb") as stream:
        np.savez_compressed(
            stream,
            level=np.array(levels),
            hcr_names=np.array(names),
            hcr=np.array(values, dtype=np.float64),
            images=np.array(pictures, dtype=np.float32),
        )
    aside.replace(path)
    return index


def extract_cohort(
    spec: CohortSpec,
    *,
    extractor: HcrExtractor,
    extractor_id: str,
    work: Path,
    processes: int = 1,
    progress: Progress | None = None,
) -> CohortRows:
    """The rows of a cohort, from the work folder where they lie there already.

    `extractor` gives the hand-crafted features of a crop (picklable when `processes` > 1) and `extractor_id` names it
    with its parameters: other features never mix in one cache.
    """
    folder = work / f"cohort-{digest([spec.cache_key, extractor_id])[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    one = partial(_write_patient, spec=spec, extractor=extractor, folder=folder)
    missing = [n for n in range(spec.patients) if not (folder / f"{n:05d}.npz").exists()]
    done = spec.patients - len(missing)
    if processes > 1 and missing:
        with ProcessPoolExecutor(max_workers=processes) as pool:
            for _ in pool.map(one, missing):
                done += 1
                if progress is not None:
                    progress(done, spec.patients)
    else:
        for index in missing:
            one(index)
            done += 1
            if progress is not None:
                progress(done, spec.patients)
    return _read_rows(spec, folder)


def _read_rows(spec: CohortSpec, folder: Path) -> CohortRows:
    names: tuple[str, ...] = ()
    hcr: list[NDArray[np.float64]] = []
    images: list[NDArray[np.float32]] = []
    people: list[Patient] = []
    levels: list[str] = []
    for index in range(spec.patients):
        patient = draw_patient(seed=spec.seed, index=index, kappa=spec.kappa)
        with np.load(folder / f"{index:05d}.npz", allow_pickle=False) as stored:
            found = tuple(str(name) for name in stored["hcr_names"])
            if names and found != names:
                raise ValueError("the work folder holds rows of different feature lists; remove it and run again")
            names = found
            hcr.append(stored["hcr"])
            images.append(stored["images"])
            drawn = [str(level) for level in stored["level"]]
        if drawn != [fracture.level for fracture in patient.fractures]:
            raise ValueError("the work folder holds rows of another generator; remove it and run again")
        levels += drawn
        people += [patient] * len(drawn)
    classes = [f.acute for index in _unique(people) for f in index.fractures]
    return CohortRows(
        patient=np.array([p.index for p in people], dtype=np.int64),
        level=tuple(levels),
        acute=np.array(classes, dtype=np.int64),
        age=np.array([p.age for p in people], dtype=np.float64),
        male=np.array([p.sex == "M" for p in people], dtype=np.float64),
        kernel=tuple(p.kernel for p in people),
        kvp=np.array([p.kvp for p in people], dtype=np.float64),
        hcr_names=names,
        hcr=np.concatenate(hcr),
        images=np.concatenate(images),
    )


def _unique(people: Sequence[Patient]) -> list[Patient]:
    return list({p.index: p for p in people}.values())
