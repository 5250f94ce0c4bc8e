"""Where torch computes, and how it computes the same thing twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from shared.pipeline.errors import FractureSweepError

Device = Literal["auto", "cpu", "cuda"]


def torch_device(device: Device) -> torch.device:
    """The device of a setting: auto is CUDA where there is one. FractureSweepError: cuda without CUDA."""
    if device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if device == "cuda":
        raise FractureSweepError(
            f"the setting network.device is cuda, but torch {torch.__version__} finds no CUDA device "
            "(a build of torch for CUDA and an NVIDIA driver are needed; or set it to auto or cpu)"
        )
    return torch.device("cpu")


def device_words(device: torch.device) -> str:
    """The device for a report: `cpu`, or `cuda` with the card's name."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


@contextmanager
def repeatable(*, threads: int) -> Iterator[None]:
    """Deterministic algorithms, full float32 (no TF32) and a fixed number of threads; all of it put back afterwards.

    The same seed gives the same bits on one machine, and with as many threads: another number sums in another order.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_num_threads(),
    )
    # cuBLAS is deterministic only with a workspace of fixed size, and reads this when it starts:
    # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.backends.cudnn.allow_tf32 = before[2]
        torch.backends.cuda.matmul.allow_tf32 = before[3]
        torch.set_num_threads(before[4])
