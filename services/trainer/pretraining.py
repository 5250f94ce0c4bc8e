"""Pre-training of a backbone on phantom slabs of a seed of their own.

The targets are the presence of each sign, the deformity and the height loss, never acute or chronic; and the slabs
are drawn at κ = 0, where both classes have the same signs, so no class can be read from them. Signs go with the
classes all the same, which the model card says: this backbone knows beforehand what matters in a phantom.

Slabs are a few sagittal slices wide, which makes them cheap; they go through the same crop and the same picture as
every case. Checkpoints are safetensors and JSON, written aside and renamed, so that training goes on where it stood.

`python -m services.trainer.pretraining --out weights.safetensors --work FOLDER` writes a file of weights for
`network.weights`; its header says that it is phantom pre-training, and how it was made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.trainer.checkpoint import resume, save_checkpoint
from services.trainer.network import Architecture, feature_count, resnet50, tiny
from services.trainer.phantoms.cohort import DEFORMITY, GENERATOR_VERSION, SIGNS, draw_patient
from services.trainer.phantoms.rendering import LABELS, render
from services.trainer.schedule import warm_cosine
from services.trainer.torch_device import Device, device_words, repeatable, torch_device
from services.trainer.torchvision_models import ResNet
from services.trainer.weights import PHANTOM_PRETRAINING, Start, read_weights, write_weights
from shared.fracture.crop import crop_vertebra
from shared.fracture.ids import digest
from shared.fracture.protocol import preset_box, preset_crop
from shared.fracture.sagittal import sagittal_image
from shared.fracture.volume import Mask
from shared.pipeline.errors import FractureSweepError

TARGETS: Final[tuple[str, ...]] = (*SIGNS, *DEFORMITY, "height_loss")
"""What the network learns to see: each sign (0 or 1), each deformity (0 or 1), and the height loss in SDs."""

SEED: Final = 77001
"""Of the command's slabs; no cohort of ours has it."""
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
    architecture: Architecture = "resnet50"

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
    return warm_cosine(step, rate=spec.learning_rate, warm_up=spec.warm_up, steps=spec.steps)


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
        self.fc = nn.Linear(feature_count(backbone), len(TARGETS))
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
    device: Device = "auto",
) -> list[float]:
    """Train the backbone in place for `spec.steps` steps, with as many threads as torch has; the loss of each step.

    A checkpoint of the same spec in the work folder is gone on from. `report(step, loss)` is called after each step.
    The backbone comes back on the CPU, in eval mode.
    """
    with repeatable(threads=torch.get_num_threads()):
        return _pretrain(
            backbone, pictures, targets, spec,
            work=work, checkpoint_every=checkpoint_every, report=report, device=torch_device(device),
        )  # fmt: skip


def _pretrain(
    backbone: ResNet,
    pictures: NDArray[np.float32],
    targets: NDArray[np.float32],
    spec: PretrainingSpec,
    *,
    work: Path,
    checkpoint_every: int,
    report: Callable[[int, float], None] | None,
    device: torch.device,
) -> list[float]:
    model = SignHead(backbone, seed=spec.seed).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)
    folder = work / f"pretraining-{spec.key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    history = resume(folder, model, optimiser)
    model.train()
    for step in range(len(history), spec.steps):
        shown, wanted = batch_at(step, pictures, targets, spec)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, spec)
        optimiser.zero_grad(set_to_none=True)
        value = loss(model(shown.to(device)), wanted.to(device))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        history.append(float(value.detach()))
        if (step + 1) % checkpoint_every == 0 or step + 1 == spec.steps:
            save_checkpoint(folder, model, optimiser, history)
        if report is not None:
            report(step + 1, history[-1])
    model.cpu().eval()
    return history


def fresh_backbone(spec: PretrainingSpec) -> ResNet:
    """The random start of a spec's pre-training."""
    return tiny(seed=spec.seed) if spec.architecture == "tiny" else resnet50(seed=spec.seed)


def pretrained_weights(
    spec: PretrainingSpec,
    *,
    out: Path,
    work: Path,
    processes: int = 1,
    device: Device = "auto",
    progress: Callable[[str], Progress] | None = None,
) -> Start:
    """Pre-train a backbone on phantom slabs and write its weights to `out` (.safetensors); what a run starts from then.

    `progress` makes the line of a stage by its name. The same spec, device and number of threads give the same bytes.
    """
    pictures, targets = slabs(
        spec, work=work, processes=processes, progress=None if progress is None else progress("phantom slabs")
    )
    backbone = fresh_backbone(spec)
    tell = None if progress is None else progress("pre-training, steps")
    history = pretrain(
        backbone,
        pictures,
        targets,
        spec,
        work=work,
        device=device,
        report=None if tell is None else lambda step, _: tell(step, spec.steps),
    )
    about = {
        "spec": asdict(spec),
        "generator": GENERATOR_VERSION,
        "targets": list(TARGETS),
        "loss": history[-1],
        "torch": str(torch.__version__),
        "device": device_words(torch_device(device)),
    }
    write_weights(out, backbone.state_dict(), source=PHANTOM_PRETRAINING, about=about)
    return read_weights(out, architecture=spec.architecture)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m services.trainer.pretraining",
        description="Pre-train a network on phantom slabs: weights for network.weights (no clinical meaning).",
    )
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--work", type=Path, required=True, help="folder for slabs and checkpoints; used to go on")
    parser.add_argument("--pictures", type=int, default=2500, help="phantom slabs (default 2500)")
    parser.add_argument("--steps", type=int, default=700, help="steps of one batch (default 700)")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step (default 32)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of slabs and random start (default {SEED})")
    parser.add_argument("--architecture", choices=("resnet50", "tiny"), default="resnet50")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is")
    parser.add_argument("--processes", type=int, default=2, help="processes for the slabs (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; part of what repeats bit for bit")
    return parser.parse_args(given)


def _line(stage: str) -> Progress:
    def tell(done: int, all_: int) -> None:
        if done == all_ or done % 20 == 0:
            print(f"{stage}: {done} of {all_}", file=sys.stderr, flush=True)

    return tell


def main(given: Sequence[str] | None = None) -> int:
    """The command line."""
    asked = _arguments(given)
    spec = PretrainingSpec(
        pictures=asked.pictures,
        steps=asked.steps,
        seed=asked.seed,
        batch=asked.batch,
        architecture=asked.architecture,
    )
    torch.set_num_threads(asked.threads)
    try:
        start = pretrained_weights(
            spec, out=asked.out, work=asked.work, processes=asked.processes, device=asked.device, progress=_line
        )
    except FractureSweepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(start.words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
