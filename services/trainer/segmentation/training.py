"""From a folder of label maps to the segmenter's network: anatomies, volumes, fitting, export. Each step resumes.

OUT/anatomies/NAME-….npz   what each subject's masks came to
OUT/volumes/               synthetic CT with its labels
OUT/fit-…/                 checkpoints
OUT/network/               network.onnx and network.json: `segmenter.network` names this folder
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.trainer.segmentation.anatomy import fingerprint, read_anatomy, save_anatomy, subjects
from services.trainer.segmentation.export import exported, write_network
from services.trainer.segmentation.fitting import FittingSpec, batch_at, fit
from services.trainer.segmentation.synthesis import GENERATOR_VERSION
from services.trainer.segmentation.volumes import make_volumes
from services.trainer.torch_device import Device, device_words, torch_device
from shared.fracture.ids import digest, short
from shared.fracture.spine.network_card import NetworkCard, TrainedOn
from shared.fracture.spine.network_input import NetworkInput

ANATOMY_VERSION = 1
"""Rises whenever the same masks would give another anatomy."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SegmenterTraining:
    """What is trained, and how long."""

    volumes: int = 1600
    steps: int = 4000
    seed: int = 1
    name: str = "built-in"
    version: str = "1"
    fitting: FittingSpec | None = None
    """Other than `steps` and `seed` say, for tests."""

    @property
    def spec(self) -> FittingSpec:
        """How the network is fitted."""
        return self.fitting or FittingSpec(steps=self.steps, seed=self.seed)


def train(
    label_maps: Path,
    out: Path,
    training: SegmenterTraining,
    *,
    device: Device = "auto",
    processes: int = 0,
    given: NetworkInput | None = None,
    progress: Progress = lambda name, done, total: None,
) -> NetworkCard:
    """Train and export; the card of the network in OUT/network."""
    shown = given or NetworkInput()
    cores = processes or len(os.sched_getaffinity(0))
    known = {path: fingerprint(path) for path in subjects(label_maps)}
    anatomies = _anatomies(known, out / "anatomies", progress)
    data = digest({"anatomies": sorted(known.values()), "version": ANATOMY_VERSION, "volumes": training.volumes,
                   "seed": training.seed, "generator": GENERATOR_VERSION})  # fmt: skip
    folder = out / "volumes" / short(data)
    make_volumes(
        folder,
        anatomies=anatomies,
        count=training.volumes,
        seed=training.seed,
        processes=cores,
        progress=lambda done, total: progress("synthetic CT", done, total),
    )
    network, history = fit(
        folder,
        training.volumes,
        training.spec,
        given=shown,
        work=out,
        data=data,
        device=device,
        threads=cores,
        progress=lambda done, total: progress("fitting, steps", done, total),
    )
    pictures, _ = batch_at(0, folder, training.volumes, training.spec, shown)
    onnx_bytes, _ = exported(network, np.asarray(pictures))
    return write_network(
        out / "network",
        onnx_bytes,
        name=training.name,
        version=training.version,
        given=shown,
        multiple=network.multiple,
        trained=TrainedOn(
            anatomies=tuple(f"{_subject(path)} {hashed}" for path, hashed in known.items()),
            volumes=training.volumes,
            steps=training.spec.steps,
            seed=training.seed,
            generator_version=GENERATOR_VERSION,
            device=device_words(torch_device(device)),
            loss=round(float(np.mean(history[-100:])), 6),
        ),
    )


def _subject(path: Path) -> str:
    return path.parent.name if path.name == "segmentations" else path.name


def _anatomies(known: dict[Path, str], folder: Path, progress: Progress) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (path, hashed) in enumerate(known.items(), start=1):
        target = folder / f"{_subject(path)}-{short(digest([hashed, ANATOMY_VERSION]))}.npz"
        if not target.exists():
            save_anatomy(read_anatomy(path), target)
        found.append(target)
        progress("anatomies", number, len(known))
    return found
