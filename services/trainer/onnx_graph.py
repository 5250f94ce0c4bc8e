"""An ONNX graph written down node by node, so that the same weights give the same bytes.

BatchNorm is folded into the convolutions. With `int8` storage a convolution's weights are int8 with one scale an output
channel, turned to float32 by DequantizeLinear; all arithmetic is float32 in both storages.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

Storage = Literal["float32", "int8"]

OPSET: Final = 17
IR_VERSION: Final = 8


def quantised(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A convolution's weight (out, …) as int8, -127 to 127, and one scale an output channel."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = np.where(largest > 0, largest / 127.0, 1.0).astype(np.float32)
    steps = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return np.clip(steps, -127, 127).astype(np.int8), scale


def dequantised(steps: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The float32 weights that int8 steps stand for."""
    return steps.astype(np.float32) * scale.reshape(-1, *[1] * (steps.ndim - 1))


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight and bias of one convolution that does what a convolution and its BatchNorm in eval mode do."""
    if norm.running_var is None or norm.running_mean is None:
        raise ValueError("a BatchNorm without running statistics cannot be folded")
    factor = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weight = conv.weight.detach().double() * factor[:, None, None, None]
    bias = norm.bias.detach().double() - norm.running_mean.double() * factor
    return weight.float().numpy(), bias.float().numpy()


class Graph:
    """The graph as it is written down."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node; the name of its output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def tensor(self, values: NDArray[np.generic], name: str) -> str:
        """Add a constant; its name."""
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def kernel(self, weight: NDArray[np.float32], name: str) -> str:
        """Add a convolution's weight in the graph's storage."""
        if self.storage == "float32":
            return self.tensor(weight, f"{name}.weight")
        steps, scale = quantised(weight)
        inputs = [self.tensor(steps, f"{name}.int8"), self.tensor(scale, f"{name}.scale")]
        return self.add("DequantizeLinear", inputs, f"{name}.weight", axis=0)

    def conv(self, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, name: str, *, relu: bool) -> str:
        """Add a convolution, its BatchNorm folded in, and a ReLU where it has one."""
        weight, bias = _plain(conv) if norm is None else folded(conv, norm)
        kernel = self.kernel(weight, name)
        padding = [int(p) for p in conv.padding] if not isinstance(conv.padding, str) else [0, 0]
        y = self.add(
            "Conv",
            [x, kernel, self.tensor(bias, f"{name}.bias")],
            f"{name}.y",
            kernel_shape=list(conv.kernel_size),
            strides=list(conv.stride),
            pads=padding * 2,
        )
        return self.add("Relu", [y], f"{name}.relu") if relu else y

    def model(self, name: str, *, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> bytes:
        """The bytes of the checked model."""
        model = helper.make_model(
            helper.make_graph(self.nodes, name, inputs, outputs, self.tensors),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="fracture-sweep",
        )
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))


def _plain(conv: nn.Conv2d) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    bias = np.zeros(conv.out_channels, dtype=np.float32) if conv.bias is None else conv.bias.detach().float().numpy()
    return conv.weight.detach().float().numpy(), bias
