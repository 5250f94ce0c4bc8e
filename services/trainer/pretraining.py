"""Pre-training of the demonstration backbone on phantom slabs of a seed of their own.

The targets are the presence of each sign, the deformity and the height loss, never acute or chronic; and the slabs
are drawn at κ = 0, where both classes have the same signs, so no class can be read from them. Signs go with the
classes all the same, which the model card says: this backbone knows beforehand what matters in a phantom.

Slabs are a few sagittal slices wide, which makes them cheap; they go through the same crop and the same picture as
every case. Checkpoints are safetensors and JSON, written aside and renamed, so that training goes on where it stood.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.trainer.cohort_extraction import GENERATOR_VERSION
from services.trainer.network import ResNet
from services.trainer.phantoms.cohort import DEFORMITY, SIGNS, draw_patient
from services.trainer.phantoms.rendering import LABELS, render
from shared.fracture.crop import crop_vertebra
from shared.fracture.ids import digest
from shared.fracture.protocol import preset_box, preset_crop
from shared.fracture.sagittal import sagittal_image
from shared.fracture.volume import Mask

TARGETS: Final[tuple[str, ...]] = (*SIGNS, *DEFORMITY, "height_loss")
"""What the network learns to see: each sign (0 or 1), each deformity (0 or 1), and the height loss in SDs."""

SLAB_HALF_WIDTH_MM: Final = 5.0
_SHIFT_PIXELS: Final = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class PretrainingSpec:
    """How the backbone is pre-trained."""

    pictures: int
    steps: int
    seed: int
    batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warm_up: int = 40
    size: int = 64

    @property
    def key(self) -> str:
        """What the result depends on."""
        return digest({**asdict(self), "generator": GENERATOR_VERSION})


def slab(index: int, *, seed: int, size: int = 64) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The picture (size, size) and the targets of slab number `index`."""
    patient = draw_patient(seed=seed, index=index, kappa=0.0, fractures=1)
    fracture = patient.fractures[0]
    rendered = render(patient, half_width_mm=SLAB_HALF_WIDTH_MM)
    labels = rendered.masks[0]
    roi = Mask(voxels=(labels.voxels == LABELS[fracture.level]).astype(np.uint8), geometry=labels.geometry)
    crop = crop_vertebra(rendered.volume, roi, preset_crop("recommended"))
    box, box_margin_mm = preset_box("recommended")
    picture = sagittal_image(crop.image, crop.mask, box=box, box_margin_mm=box_margin_mm, size=size)
    targets = [float(fracture.has(sign)) for sign in SIGNS]
    targets += [float(fracture.deformity == kind) for kind in DEFORMITY]
    targets.append((fracture.height_loss - 0.295) / 0.09)
    return picture, np.array(targets, dtype=np.float32)


def slabs(
    spec: PretrainingSpec, *, work: Path, processes: int = 1, progress: Progress | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All pictures (n, size, size) and targets (n, targets), from the work folder in chunks of 100."""
    folder = work / f"slabs-{digest([spec.seed, spec.size, GENERATOR_VERSION])[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    one = partial(slab, seed=spec.seed, size=spec.size)
    found = []
    with ProcessPoolExecutor(max_workers=processes) as pool:
        for start in range(0, spec.pictures, 100):
            stop = min(start + 100, spec.pictures)
            path = folder / f"{start:06d}-{stop:06d}.npz"
            if not path.exists():
                made = list(pool.map(one, range(start, stop), chunksize=10))
                aside = path.with_suffix(".part")
                with aside.open("wb") as stream:
                    np.savez_compressed(
                        stream, pictures=np.array([p for p, _ in made]), targets=np.array([t for _, t in made])
                    )
                aside.replace(path)
            with np.load(path, allow_pickle=False) as stored:
                found.append((stored["pictures"], stored["targets"]))
            if progress is not None:
                progress(stop, spec.pictures)
    return np.concatenate([p for p, _ in found]), np.concatenate([t for _, t in found])


def learning_rate(step: int, spec: PretrainingSpec) -> float:
    """A short linear warm-up, then a cosine to zero."""
    if step < spec.warm_up:
        return spec.learning_rate * (step + 1) / spec.warm_up
    gone = (step - spec.warm_up) / max(spec.steps - spec.warm_up, 1)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * min(gone, 1.0)))


def batch_at(
    step: int, pictures: NDArray[np.float32], targets: NDArray[np.float32], spec: PretrainingSpec
) -> tuple[Tensor, Tensor]:
    """The pictures of one step, shifted by some pixels and made noisier; it depends on seed and step alone."""
    rng = np.random.default_rng([spec.seed, step])
    rows = rng.choice(len(pictures), size=spec.batch, replace=len(pictures) < spec.batch)
    shown = np.empty((spec.batch, 1, *pictures.shape[1:]), dtype=np.float32)
    for place, row in enumerate(rows):
        down, right = rng.integers(-_SHIFT_PIXELS, _SHIFT_PIXELS + 1, size=2)
        padded = np.pad(pictures[row], _SHIFT_PIXELS, mode="edge")
        height, width = pictures.shape[1:]
        top, left = _SHIFT_PIXELS + down, _SHIFT_PIXELS + right
        picture = padded[top : top + height, left : left + width]
        picture = picture + np.float32(rng.uniform(0, 0.15)) * rng.standard_normal(picture.shape, dtype=np.float32)
        shown[place, 0] = (picture - picture.mean()) / picture.std()
    return torch.from_numpy(shown), torch.from_numpy(targets[rows])


class SignHead(nn.Module):
    """The backbone with one linear layer onto the targets."""

    def __init__(self, backbone: ResNet, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.features, len(TARGETS))
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.fc.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, targets): logits, and the height loss in SDs."""
        predicted: Tensor = self.fc(self.backbone(x))
        return predicted


def loss(predicted: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every yes or no, and a third of the squared error of the height loss."""
    signs = nn.functional.binary_cross_entropy_with_logits(predicted[:, :-1], targets[:, :-1])
    return signs + nn.functional.mse_loss(predicted[:, -1], targets[:, -1]) / 3


def pretrain(
    backbone: ResNet,
    pictures: NDArray[np.float32],
    targets: NDArray[np.float32],
    spec: PretrainingSpec,
    *,
    work: Path,
    checkpoint_every: int = 50,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the backbone in place for `spec.steps` steps; the loss of each step.

    A checkpoint of the same spec in the work folder is gone on from. `report(step, loss)` is called after each step.
    """
    model = SignHead(backbone, seed=spec.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    folder = work / f"pretraining-{spec.key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    history = _resume(folder, model, optimiser)
    model.train()
    for step in range(len(history), spec.steps):
        shown, wanted = batch_at(step, pictures, targets, spec)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, spec)
        optimiser.zero_grad(set_to_none=True)
        value = loss(model(shown), wanted)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        history.append(float(value.detach()))
        if (step + 1) % checkpoint_every == 0 or step + 1 == spec.steps:
            _checkpoint(folder, model, optimiser, history)
        if report is not None:
            report(step + 1, history[-1])
    model.eval()
    return history


def _checkpoint(folder: Path, model: SignHead, optimiser: torch.optim.AdamW, history: list[float]) -> None:
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for number, parameter in enumerate(model.parameters()):
        for name, value in optimiser.state[parameter].items():
            tensors[f"optimiser.{number}.{name}"] = value.contiguous()
    tensors["history"] = torch.tensor(history, dtype=torch.float64)
    aside = folder / "checkpoint.part"
    save_file(tensors, str(aside))
    aside.replace(folder / "checkpoint.safetensors")
    (folder / "progress.json").write_text(json.dumps({"steps": len(history), "loss": history[-1]}), encoding="utf-8")


def _resume(folder: Path, model: SignHead, optimiser: torch.optim.AdamW) -> list[float]:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return []
    tensors = load_file(str(path))
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    for number, parameter in enumerate(model.parameters()):
        prefix = f"optimiser.{number}."
        optimiser.state[parameter] = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return [float(value) for value in tensors["history"]]
