"""The network's fine-tuning on acute and chronic (METHOD 3): backbone and head as two groups of parameters.

The head's rate follows a cosine from the learning rate to zero, epoch by epoch. The backbone stands still, its
BatchNorm in eval, until `frozen_share` of the epochs; then it follows `backbone_factor` times the same cosine.

With `patience` a fifth of the patients is an inner fold: nothing is fitted on it, the weights of the epoch with its
least loss stay, and after `patience` epochs without a better one training stops. Epochs in which the backbone still
stands do not count for that, or the second half of the schedule would often never begin.

`crossfit` gives each training row the logit of a network that never saw its patient. Networks of different folds have
different axes, so this one number is all that they hand on. Its features come out of the exported ONNX, as at scoring.

Training goes on where it was interrupted: checkpoints are safetensors with JSON in their header, written aside and
renamed. On one machine the result has the same bits as without the interruption.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from services.trainer.augmentation import augmented
from services.trainer.folds import Integers, fold_numbers, patients_by_class
from services.trainer.network import Architecture, exported, feature_count, network_of
from services.trainer.results import Epoch
from services.trainer.settings import NetworkSettings
from services.trainer.torch_device import device_words, repeatable, torch_device
from services.trainer.torchvision_models import ResNet
from shared.fracture.ids import digest
from shared.pipeline.errors import FractureSweepError

ALL: Final = "all"
"""`Epoch.fold` of the network that is fitted on all training patients."""
INNER_FOLDS: Final = 5
CHECKPOINT_SECONDS: Final = 20.0
_VERSION: Final = 1
"""Of what a fit with the same settings and data gives; a checkpoint of another version is not gone on from."""
_ORDER_STREAM: Final = 1
_NOT_IN_THE_FIT: Final = {
    "mode", "weights", "weights_sha256", "random_start", "random_line", "crossfit_folds", "components", "storage",
    "device",
}  # fmt: skip

Images = NDArray[np.float32]
Features = Callable[[bytes, Images], NDArray[np.float64]]
"""ONNX bytes and pictures (n, size, size) to features (n, features), as the deep extractor computes them."""
Progress = Callable[[int, int], None]
"""Epochs done, and all of them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedNetwork:
    """A fine-tuned network: the backbone's state (CPU), and the head as one logit, weight · features + bias.

    The logit is logit_acute - logit_chronic. `best_epoch` is the one whose weights these are.
    """

    architecture: Architecture
    backbone: dict[str, Tensor]
    weight: NDArray[np.float64]
    bias: float
    epochs: tuple[Epoch, ...]
    best_epoch: int
    device: str

    def network(self) -> ResNet:
        """The backbone, in eval mode on the CPU."""
        return network_of(self.architecture, self.backbone)

    def logit(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """The logits (n,) of features (n, features)."""
        return np.asarray(features @ self.weight + self.bias, dtype=np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossFitted:
    """The logit of each training row from a network that never saw its patient, and the network of all patients.

    `fold` (n,): 1 to k, which network a row's logit is from; `onnx_largest_difference` is the worst of their exports.
    """

    out_of_fold_logit: NDArray[np.float64]
    fold: Integers
    final: FittedNetwork
    epochs: tuple[Epoch, ...]
    onnx_largest_difference: float


def first_free_epoch(settings: NetworkSettings) -> int:
    """The first epoch, from 0, in which the backbone moves; the number of epochs where it never does."""
    if settings.backbone_factor == 0:
        return settings.epochs
    return math.ceil(settings.frozen_share * settings.epochs - 1e-9)


def rates(epoch: int, settings: NetworkSettings) -> tuple[float, float]:
    """Learning rates of head and backbone in an epoch, from 0."""
    head = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))
    return head, settings.backbone_factor * head if epoch >= first_free_epoch(settings) else 0.0


def class_weights(acute: Integers) -> tuple[float, float]:
    """The weights of chronic and acute in the loss: both classes weigh the same, and a row weighs 1 on average."""
    return float(len(acute) / (2 * (acute == 0).sum())), float(len(acute) / (2 * (acute == 1).sum()))


def _least_patients(patient: Integers, acute: Integers) -> tuple[int, str]:
    """How many patients the rarer class has, and both counts in words."""
    have = patients_by_class(patient, acute)
    return min(have), f"there are {have[0]} with acute and {have[1]} with chronic fractures"


def inner_fold(patient: Integers, acute: Integers, *, seed: int) -> NDArray[np.bool_]:
    """The rows of patients that only measure; both classes lie on both sides. FractureSweepError: too few patients."""
    least, words = _least_patients(patient, acute)
    if least >= 2:
        count = min(INNER_FOLDS, least)
        fold = fold_numbers(patient, acute, count, seed=seed)
        for number in range(1, count + 1):
            inner: NDArray[np.bool_] = fold == number
            if all(len(np.unique(acute[side])) == 2 for side in (inner, ~inner)):
                return inner
    raise FractureSweepError(
        f"the network's early stop needs an inner fold of patients with both classes on both sides; {words}: "
        "set network.patience to none, or give more patients"
    )


class _Fit:
    """One network while it is fitted. Its state is what a checkpoint holds."""

    def __init__(
        self, settings: NetworkSettings, start: Mapping[str, Tensor], *, weights: tuple[float, float], fold: str
    ) -> None:
        self.settings, self.start, self.fold = settings, start, fold
        self.device = torch_device(settings.device)
        self.network = network_of(settings.architecture, start).to(self.device)
        self.head = nn.utils.skip_init(nn.Linear, feature_count(self.network), 2, device=self.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimiser = torch.optim.SGD(
            [{"params": list(self.network.parameters())}, {"params": list(self.head.parameters())}],
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float32, device=self.device))
        self.epochs: list[Epoch] = []
        self.best_epoch = -1
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}

    def _moved(self, epoch: int) -> bool:
        return epoch >= first_free_epoch(self.settings)

    def state(self, epoch: int) -> dict[str, Tensor]:
        """A copy of the head, and of the backbone once it has moved."""
        parts: list[tuple[str, nn.Module]] = [("head", self.head)]
        if self._moved(epoch):
            parts.append(("backbone", self.network))
        return {
            f"{part}.{name}": tensor.detach().cpu().clone()
            for part, module in parts
            for name, tensor in module.state_dict().items()
        }

    def train(self, images: Images, acute: Integers, rows: Integers, *, seed: int) -> float:
        """One epoch over pictures whose numbers in the cohort are `rows`; the mean loss."""
        epoch, settings = len(self.epochs), self.settings
        head_rate, backbone_rate = rates(epoch, settings)
        moves = self._moved(epoch)
        self.network.train(moves)
        self.network.requires_grad_(moves)
        for group, rate in zip(self.optimiser.param_groups, (backbone_rate, head_rate), strict=True):
            group["lr"] = rate
        order = np.random.default_rng([seed, _ORDER_STREAM, epoch]).permutation(len(rows))
        total = 0.0
        for places in batches(order, settings.batch):
            shown = images[places]
            if settings.augmentation:
                shown = np.stack(
                    [augmented(images[place], seed=seed, epoch=epoch, row=int(rows[place])) for place in places]
                )
            with torch.set_grad_enabled(moves):
                features = self.network(torch.from_numpy(shown)[:, None].to(self.device))
            value = self.loss(self.head(features), torch.from_numpy(acute[places]).to(self.device))
            self.optimiser.zero_grad(set_to_none=True)
            value.backward()
            self.optimiser.step()
            total += float(value.detach()) * len(places)
        return self._finite(total / len(rows))

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise FractureSweepError(
                f"the network's training diverged in epoch {len(self.epochs)} (its loss is no number): "
                "lower network.learning_rate, or look at the weights that it starts from"
            )
        return loss

    def measure(self, images: Images, acute: Integers) -> tuple[float, float]:
        """Loss and AUC on the inner fold."""
        self.network.eval()
        with torch.no_grad():
            answers = [
                self.head(self.network(torch.from_numpy(images[part])[:, None].to(self.device)))
                for part in np.array_split(np.arange(len(images)), math.ceil(len(images) / self.settings.batch))
            ]
            logits = torch.cat(answers)
            value = self._finite(float(self.loss(logits, torch.from_numpy(acute).to(self.device))))
        return value, float(roc_auc_score(acute, (logits[:, 1] - logits[:, 0]).cpu().numpy()))

    def keep(self, loss: float, measured: tuple[float, float] | None) -> None:
        """Write the epoch down, and keep its weights where it is the best so far (without an inner fold: the last)."""
        epoch = len(self.epochs)
        head_rate, backbone_rate = rates(epoch, self.settings)
        inner_loss, inner_auc = measured or (None, None)
        if inner_loss is None or inner_loss < self.best_loss:
            self.best_epoch, self.best_loss = epoch, math.inf if inner_loss is None else inner_loss
            self.best = self.state(epoch) if inner_loss is not None or epoch + 1 == self.settings.epochs else {}
        self.epochs.append(
            Epoch(
                fold=self.fold, epoch=epoch, head_rate=head_rate, backbone_rate=backbone_rate, loss=loss,
                inner_loss=inner_loss, inner_auc=inner_auc,
            )
        )  # fmt: skip

    @property
    def done(self) -> bool:
        """All epochs are over, or too many since the best."""
        if len(self.epochs) >= self.settings.epochs:
            return True
        if self.settings.patience is None or not self.epochs:
            return False
        free = first_free_epoch(self.settings)
        counted_from = max(self.best_epoch, free - 1 if free < self.settings.epochs else 0)
        return len(self.epochs) - 1 - counted_from >= self.settings.patience

    def fitted(self) -> FittedNetwork:
        """The best epoch's weights."""
        return _fitted(
            self.best, self.epochs, self.best_epoch,
            settings=self.settings, start=self.start, device=device_words(self.device),
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        tensors = {f"now.{name}": tensor for name, tensor in self.state(len(self.epochs) - 1).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, parameter in enumerate(_parameters(self.optimiser)):
            momentum = self.optimiser.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{number}"] = momentum.detach().cpu().clone()
        _save(path, tensors, epochs=self.epochs, best_epoch=self.best_epoch)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, where there is one."""
        if not path.exists():
            return
        tensors, epochs, self.best_epoch = _load(path)
        self.epochs = epochs
        self.head.load_state_dict(_part(tensors, "now.head."))
        if moved := _part(tensors, "now.backbone."):
            self.network.load_state_dict(moved)
        self.best = _part(tensors, "best.")
        best_loss = epochs[self.best_epoch].inner_loss
        self.best_loss = math.inf if best_loss is None else best_loss
        for number, parameter in enumerate(_parameters(self.optimiser)):
            if f"momentum.{number}" in tensors:
                self.optimiser.state[parameter]["momentum_buffer"] = tensors[f"momentum.{number}"].to(self.device)


def batches(order: Integers, size: int) -> list[Integers]:
    """The order in batches; one row that would be left alone joins the batch before (BatchNorm wants two)."""
    found = [order[begin : begin + size] for begin in range(0, len(order), size)]
    if len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [np.concatenate(found[-2:])]
    return found


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _save(path: Path, tensors: Mapping[str, Tensor], **words: Any) -> None:
    words["epochs"] = [epoch.model_dump() for epoch in words["epochs"]]
    aside = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(aside), {"fit": json.dumps(words)})
    aside.replace(path)


def _load(path: Path) -> tuple[dict[str, Tensor], list[Epoch], int]:
    with safe_open(str(path), framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        words = json.loads(stored.metadata()["fit"])
    return tensors, [Epoch.model_validate(epoch) for epoch in words["epochs"]], int(words["best_epoch"])


def _fitted(
    state: Mapping[str, Tensor],
    epochs: list[Epoch],
    best_epoch: int,
    *,
    settings: NetworkSettings,
    start: Mapping[str, Tensor],
    device: str,
) -> FittedNetwork:
    weight, bias = state["head.weight"].double().numpy(), state["head.bias"].double().numpy()
    backbone = _part(state, "backbone.") or {name: tensor.detach().cpu().clone() for name, tensor in start.items()}
    return FittedNetwork(
        architecture=settings.architecture,
        backbone=backbone,
        weight=weight[1] - weight[0],
        bias=float(bias[1] - bias[0]),
        epochs=tuple(epochs),
        best_epoch=best_epoch,
        device=device,
    )


def _key(
    images: Images, acute: Integers, patient: Integers, rows: Integers, settings: NetworkSettings, *, seed: int,
    start: Mapping[str, Tensor], fold: str, device: torch.device,
) -> str:  # fmt: skip
    """What a fit depends on; its checkpoints lie under this name."""
    weights = sha256()
    for name, tensor in sorted(start.items()):
        weights.update(name.encode() + np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    arrays = [np.ascontiguousarray(array) for array in (images, acute, patient, rows)]
    return digest(
        {
            "version": _VERSION,
            "settings": settings.model_dump(mode="json", exclude=_NOT_IN_THE_FIT),
            "seed": seed,
            "fold": fold,
            "device": device.type,
            "torch": str(torch.__version__),
            "start": weights.hexdigest(),
            "data": [[list(array.shape), sha256(array.tobytes()).hexdigest()] for array in arrays],
        }
    )


def _checked(images: Images, acute: Integers, patient: Integers) -> None:
    if images.ndim != 3 or images.dtype != np.float32 or not len(images) == len(acute) == len(patient):
        raise ValueError("pictures (n, size, size) float32, n labels and n patients are wanted")
    if not np.isfinite(images).all():
        raise ValueError("a picture holds something that is no number")
    if sorted(set(acute.tolist())) != [0, 1]:
        raise FractureSweepError("the network's training needs acute and chronic rows, and has one class alone")


def fit_network(
    images: Images,
    acute: Integers,
    patient: Integers,
    settings: NetworkSettings,
    *,
    seed: int,
    start: Mapping[str, Tensor],
    work: Path,
    fold: str = ALL,
    rows: Integers | None = None,
    progress: Progress | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> FittedNetwork:
    """A network fine-tuned on all of these rows; with `settings.patience` a fifth of their patients only measures.

    `images` (n, size, size) float32; `acute` (n,) 0 or 1; `start`: the backbone's state (weights.py); `rows`: the
    numbers of the rows in the cohort, on which the augmentation depends; `work`: where checkpoints lie. A fit that
    lies there is not made again. FractureSweepError: one class alone, too few patients, no CUDA, or it diverged.
    """
    _checked(images, acute, patient)
    rows = np.arange(len(acute)) if rows is None else rows
    device = torch_device(settings.device)
    key = _key(images, acute, patient, rows, settings, seed=seed, start=start, fold=fold, device=device)
    folder = work / f"fit-{fold}-{key[:16]}"
    finished, checkpoint = folder / "fitted.safetensors", folder / "checkpoint.safetensors"
    if finished.exists():
        state, epochs, best_epoch = _load(finished)
        words = device_words(device)
        return _fitted(state, epochs, best_epoch, settings=settings, start=start, device=words)
    folder.mkdir(parents=True, exist_ok=True)
    inner = None if settings.patience is None else inner_fold(patient, acute, seed=seed)
    used = np.ones(len(acute), dtype=bool) if inner is None else ~inner
    with repeatable(threads=settings.threads):
        fit = _Fit(settings, start, weights=class_weights(acute[used]), fold=fold)
        fit.resume(checkpoint)
        saved = time.monotonic()
        while not fit.done:
            loss = fit.train(images[used], acute[used], rows[used], seed=seed)
            fit.keep(loss, None if inner is None else fit.measure(images[inner], acute[inner]))
            if time.monotonic() - saved >= checkpoint_seconds and not fit.done:
                fit.save(checkpoint)
                saved = time.monotonic()
            if progress is not None:
                progress(len(fit.epochs), settings.epochs)
    _save(finished, fit.best, epochs=fit.epochs, best_epoch=fit.best_epoch)
    checkpoint.unlink(missing_ok=True)
    return fit.fitted()


def crossfit(
    images: Images,
    acute: Integers,
    patient: Integers,
    settings: NetworkSettings,
    *,
    seed: int,
    start: Mapping[str, Tensor],
    work: Path,
    features: Features,
    fold: Integers | None = None,
    progress: Progress | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> CrossFitted:
    """The out-of-fold logit of every row, and the network fitted on all rows whose logit new rows get.

    As `fit_network`; `features` run an exported network, `fold` (n,) are the folds of the rows, whole patients each
    (none: `settings.crossfit_folds` of them, from the seed). FractureSweepError: fewer patients of a class than folds.
    """
    _checked(images, acute, patient)
    if fold is None:
        least, words = _least_patients(patient, acute)
        if least < settings.crossfit_folds:
            raise FractureSweepError(
                f"crossfit needs {settings.crossfit_folds} patients of each class, one for a fold; {words}: "
                "set network.crossfit_folds lower, network.mode to frozen, or give more patients"
            )
        fold = fold_numbers(patient, acute, settings.crossfit_folds, seed=seed)
    if any(len(np.unique(fold[patient == one])) > 1 for one in np.unique(patient)):
        raise ValueError("a patient lies in two folds")
    numbers = np.unique(fold)
    total = (len(numbers) + 1) * settings.epochs
    done = 0

    def tell(epochs: int, _: int) -> None:
        if progress is not None:
            progress(done + epochs, total)

    logit = np.full(len(acute), np.nan)
    all_epochs: list[Epoch] = []
    differences = []
    every = np.arange(len(acute))
    for number in numbers:
        held = fold == number
        fitted = fit_network(
            images[~held], acute[~held], patient[~held], settings, seed=seed, start=start, work=work,
            fold=str(number), rows=every[~held], progress=tell, checkpoint_seconds=checkpoint_seconds,
        )  # fmt: skip
        onnx, difference = exported(fitted.network(), size=images.shape[1], storage=settings.storage)
        logit[held] = fitted.logit(features(onnx, images[held]))
        differences.append(difference)
        all_epochs += fitted.epochs
        done += settings.epochs
        tell(0, total)
    final = fit_network(
        images, acute, patient, settings, seed=seed, start=start, work=work,
        progress=tell, checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip
    done = total
    tell(0, total)
    return CrossFitted(
        out_of_fold_logit=logit,
        fold=fold,
        final=final,
        epochs=(*all_epochs, *final.epochs),
        onnx_largest_difference=max(differences),
    )
