"""Fitting the segmenter's network on synthetic volumes: batches of sagittal slices, Dice and cross-entropy, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.trainer.checkpoint import resume, save_checkpoint
from services.trainer.schedule import warm_cosine
from services.trainer.segmentation.synthesis import GENERATOR_VERSION
from services.trainer.segmentation.tissues import IGNORED, NETWORK_CLASSES
from services.trainer.segmentation.unet import WIDTHS, SagittalUNet, fresh
from services.trainer.segmentation.volumes import read_volume
from services.trainer.torch_device import Device, torch_device
from shared.fracture.ids import digest
from shared.fracture.spine.network_input import NetworkInput

BACKGROUND_WEIGHT: Final = 0.5
_SPINE_SHARE: Final = 0.75
"""Of the slices of a batch, those that are looked for where there is bone of the spine."""


@dataclass(frozen=True, kw_only=True)
class FittingSpec:
    """How the network is fitted. `height`, `width`: of the pieces of slices it is shown, in pixels."""

    steps: int = 3000
    seed: int = 1
    batch: int = 8
    height: int = 144
    width: int = 96
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warm_up: int = 50
    widths: tuple[int, ...] = WIDTHS

    def key(self, data: str) -> str:
        """What the result depends on; `data` names the volumes."""
        return digest({**asdict(self), "data": data, "generator": GENERATOR_VERSION})


def learning_rate(step: int, spec: FittingSpec) -> float:
    """A short linear warm-up, then a cosine to zero."""
    return warm_cosine(step, rate=spec.learning_rate, warm_up=spec.warm_up, steps=spec.steps)


def batch_at(
    step: int, folder: Path, count: int, spec: FittingSpec, given: NetworkInput
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pictures (n, channels, height, width) and classes (n, height, width) of one step."""
    rng = np.random.default_rng([spec.seed, step])
    pictures = np.empty((spec.batch, len(given.offsets), spec.height, spec.width), dtype=np.float32)
    wanted = np.empty((spec.batch, spec.height, spec.width), dtype=np.int64)
    for place in range(spec.batch):
        hu, labels = read_volume(folder, int(rng.integers(count)))
        across, rows, columns = hu.shape
        middle = int(rng.integers(across))
        if rng.random() < _SPINE_SHARE:
            spine = np.flatnonzero((labels[:, ::4, ::4] % IGNORED != 0).any(axis=(1, 2)))
            middle = int(rng.choice(spine)) if len(spine) else middle
        top = int(rng.integers(max(rows - spec.height, 0) + 1))
        first = int(rng.integers(max(columns - spec.width, 0) + 1))
        box = (slice(top, top + spec.height), slice(first, first + spec.width))
        sides = np.clip(middle + np.array(given.offsets), 0, across - 1)
        for channel, side in enumerate(sides):
            pictures[place, channel] = given.scaled(np.asarray(hu[side][box], dtype=np.float32))
        wanted[place] = labels[middle][box]
        pictures[place] += np.float32(rng.uniform(-0.05, 0.05))
    return pictures, wanted


def loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy, the background at half weight, and one minus the mean Dice of the classes that are there."""
    classes = logits.shape[1]
    weight = torch.ones(classes, device=logits.device)
    weight[0] = BACKGROUND_WEIGHT
    entropy = nn.functional.cross_entropy(logits, wanted, weight=weight, ignore_index=IGNORED)
    share = logits.softmax(dim=1)
    known = (wanted != IGNORED).unsqueeze(1)
    target = nn.functional.one_hot(wanted.clamp(max=classes - 1), classes).permute(0, 3, 1, 2) * known
    share = share * known
    both = (share * target).sum(dim=(0, 2, 3))
    sizes = share.sum(dim=(0, 2, 3)), target.sum(dim=(0, 2, 3))
    there = sizes[1] > 0
    there[0] = False
    dice = (2 * both + 1) / (sizes[0] + sizes[1] + 1)
    return entropy + 1 - (dice[there].mean() if bool(there.any()) else dice[1:].mean())


def fit(
    folder: Path,
    count: int,
    spec: FittingSpec,
    *,
    given: NetworkInput,
    work: Path,
    data: str,
    device: Device = "auto",
    threads: int = 0,
    checkpoint_every: int = 100,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[SagittalUNet, list[float]]:
    """The network fitted on `count` volumes in `folder`, in eval mode on the CPU, and the loss of each step.

    Goes on from the checkpoint of the same spec and data in `work`. `threads`: of torch, 0 leaves them.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = torch_device(device)
    model = fresh(channels=len(given.offsets), classes=len(NETWORK_CLASSES), seed=spec.seed, widths=spec.widths)
    model = model.to(chosen)
    optimiser = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    kept = work / f"fit-{spec.key(data)[:16]}"
    kept.mkdir(parents=True, exist_ok=True)
    history = resume(kept, model, optimiser)
    model.train()
    for step in range(len(history), spec.steps):
        pictures, wanted = batch_at(step, folder, count, spec, given)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, spec)
        optimiser.zero_grad(set_to_none=True)
        value = loss(model(torch.from_numpy(pictures).to(chosen)), torch.from_numpy(wanted).to(chosen))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        history.append(float(value.detach()))
        if (step + 1) % checkpoint_every == 0 or step + 1 == spec.steps:
            save_checkpoint(kept, model, optimiser, history)
        progress(step + 1, spec.steps)
    return model.cpu().eval(), history
