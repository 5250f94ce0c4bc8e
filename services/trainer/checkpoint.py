"""Where a training of a fixed number of steps stands: model, AdamW and the loss of each step, in one safetensors file.

Written aside and renamed; no pickle.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

_NAME = "checkpoint.safetensors"


def save_checkpoint(folder: Path, model: nn.Module, optimiser: torch.optim.AdamW, history: list[float]) -> None:
    """Write where the training stands; `history` holds the loss of each step so far."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for number, parameter in enumerate(model.parameters()):
        for name, value in optimiser.state[parameter].items():
            tensors[f"optimiser.{number}.{name}"] = value.contiguous()
    tensors["history"] = torch.tensor(history, dtype=torch.float64)
    aside = folder / "checkpoint.part"
    save_file(tensors, str(aside))
    aside.replace(folder / _NAME)


def resume(folder: Path, model: nn.Module, optimiser: torch.optim.AdamW) -> list[float]:
    """Put model and optimiser where the folder's checkpoint stood; the loss of each step until then, none without."""
    path = folder / _NAME
    if not path.exists():
        return []
    tensors = load_file(str(path))
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    for number, parameter in enumerate(model.parameters()):
        prefix = f"optimiser.{number}."
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        # AdamW counts its steps on the CPU, wherever the parameter lies
        optimiser.state[parameter] = {n: t if n == "step" else t.to(parameter.device) for n, t in state.items()}
    return [float(value) for value in tensors["history"]]
