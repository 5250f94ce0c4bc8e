"""The weights that a network starts from: a file that the user gives, or a random start that was asked for.

Nothing is downloaded and nothing is filled up in silence: a file fits the network by every name and shape, or the error
lists what does not. A file of torchvision (.pth) is read with `weights_only`, so nothing in it is run.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.trainer.network import Architecture, empty_state, random_network, to_one_channel
from services.trainer.settings import NetworkSettings
from shared.pipeline.errors import FractureSweepError

IMAGENET_FILE: Final = "resnet50-0676ba61.pth"
"""torchvision's ResNet50_Weights.IMAGENET1K_V1; its name carries the first eight digits of its SHA-256."""
PHANTOM_PRETRAINING: Final = "phantom pre-training"
_HEADER: Final = "fracture-sweep"
_COUNTER: Final = ".num_batches_tracked"
_LISTED: Final = 8


class WeightsError(FractureSweepError):
    """The weights that the settings ask for cannot be had; nothing random takes their place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Weights to start from: `state` of a one-channel network without `fc`, float32 on the CPU.

    `words` say where they came from (NetworkRun.weights); `sha256` of the file, none for a random start.
    """

    state: dict[str, Tensor]
    words: str
    sha256: str | None


def starting_weights(settings: NetworkSettings, *, seed: int) -> Start:
    """What the settings say to start from; WeightsError in words that say what to do."""
    if settings.weights is None:
        if settings.weights_sha256 is not None:
            raise WeightsError("network.weights_sha256 is set, but network.weights names no file")
        if not settings.random_start:
            raise WeightsError(_no_weights(settings.architecture))
        quiet = settings.architecture == "resnet50" and settings.mode != "frozen"
        network = random_network(settings.architecture, seed=seed, zero_residual=quiet)
        return Start(state=_copy(network.state_dict()), words=f"random start (seed {seed})", sha256=None)
    if settings.random_start:
        raise WeightsError("network.weights and network.random_start exclude each other: take one of them away")
    return read_weights(settings.weights, architecture=settings.architecture, sha256=settings.weights_sha256)


def read_weights(path: Path, *, architecture: Architecture, sha256: str | None = None) -> Start:
    """The weights of a file, with kernels of three channels summed to one; `sha256` is what the file's must be."""
    found = _sha256(path)
    if sha256 is not None and found != sha256.lower():
        raise WeightsError(f"{path.name} has the SHA-256 {found}, and the settings want {sha256.lower()}")
    state, source = _safetensors(path) if path.suffix == ".safetensors" else (_torch_file(path), None)
    fitting = _fitting(to_one_channel(state), architecture=architecture, name=path.name)
    words = f"{path.name}, SHA-256 {found}"
    return Start(state=fitting, words=f"{source}: {words}" if source else words, sha256=found)


def write_weights(path: Path, state: Mapping[str, Tensor], *, source: str, about: Mapping[str, Any]) -> None:
    """Write a .safetensors file of weights, aside and renamed; its header says where they came from, in words and JSON.

    One entry in the header, because safetensors keeps no order among several and the file's bytes would vary.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    save_file(_copy(state), str(aside), {_HEADER: json.dumps({"source": source, **about}, sort_keys=True)})
    aside.replace(path)


def _no_weights(architecture: Architecture) -> str:
    file = (
        f"a file of torchvision's ResNet50 such as {IMAGENET_FILE} (ImageNet V1, 98 MB, from "
        f"https://download.pytorch.org/models/{IMAGENET_FILE}; its SHA-256 begins with 0676ba61)"
        if architecture == "resnet50"
        else "a .safetensors file of the tiny network"
    )
    return (
        f"the network has no weights to start from. Set network.weights to {file}, or to weights of phantom "
        "pre-training (python -m services.trainer.pretraining --out weights.safetensors). A random start must be "
        "asked for with network.random_start = true; it does not learn on cohorts of this size"
    )


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"the weights {path} cannot be read ({error.strerror})") from error


def _safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(str(path), framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            header = (stored.metadata() or {}).get(_HEADER)
        return tensors, None if header is None else str(json.loads(header)["source"])
    except Exception as error:  # safetensors raises several kinds, and one of its own
        raise WeightsError(f"{path.name} is no safetensors file of weights ({error})") from error


def _torch_file(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about strange bytes, which end in an error here
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here: pickle's, zipfile's, RuntimeError
        raise WeightsError(
            f"{path.name} is no file of weights that torch reads with weights_only ({type(error).__name__}); "
            "give torchvision's own .pth, or .safetensors"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise WeightsError(f"{path.name} holds something else than tensors by name (a state dict is wanted)")
    return {str(name): tensor for name, tensor in loaded.items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _fitting(state: Mapping[str, Tensor], *, architecture: Architecture, name: str) -> dict[str, Tensor]:
    """The state in the network's own order, float32; WeightsError with all that does not fit.

    Old files of torchvision lack BatchNorm's counters of batches, which nothing reads; they alone may be missing.
    """
    wanted = empty_state(architecture)
    missing = [key for key in wanted if key not in state and not key.endswith(_COUNTER)]
    unknown = sorted(key for key in state if key not in wanted)
    both = [key for key in wanted if key in state]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
        for key in both
        if state[key].shape != wanted[key].shape
    ]
    broken = [
        key
        for key in both
        if wanted[key].is_floating_point()
        and (not state[key].is_floating_point() or not bool(torch.isfinite(state[key]).all()))
    ]
    faults = [
        f"{words}: {_listed(keys)}"
        for words, keys in (
            ("missing", missing),
            ("unknown", unknown),
            ("another shape", shapes),
            ("no finite floating-point numbers", broken),
        )
        if keys
    ]
    if faults:
        raise WeightsError(f"{name} does not fit the network {architecture}. " + "; ".join(faults))
    return {
        key: state[key].to(wanted[key].dtype).contiguous().clone()
        if key in state
        else torch.zeros_like(wanted[key], device="cpu")
        for key in wanted
    }
