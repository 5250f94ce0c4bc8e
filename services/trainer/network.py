"""ResNet50 with torchvision's parameter names and one input channel, and its way into ONNX with int8 weights.

Written out here because torchvision's wheel is linked to CUDA and cannot be imported beside a CPU build of torch;
weights of torchvision's `resnet50` (ImageNet V1) fit by name. Source: He et al. 2016, and torchvision's stride in the
3 x 3 convolution.

In the ONNX file a convolution's weights are int8 with one scale an output channel, turned to float32 by
DequantizeLinear; all arithmetic is float32. BatchNorm is folded into the convolutions first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

FEATURES: Final = 2048
OPSET: Final = 17
IR_VERSION: Final = 8


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions around a shortcut."""

    def __init__(self, inputs: int, planes: int, *, stride: int, expansion: int = 4) -> None:
        super().__init__()
        outputs = planes * expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Planes in, planes times expansion out."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return torch.relu(self.bn3(self.conv3(x)) + shortcut)


class ResNet(nn.Module):
    """A bottleneck ResNet without its head: (n, channels, h, w) to (n, features), average-pooled."""

    def __init__(self, *, blocks: tuple[int, int, int, int] = (3, 4, 6, 3), width: int = 64, channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for number, count in enumerate(blocks):
            planes, stride = width * 2**number, 1 if number == 0 else 2
            stage = [Bottleneck(inputs, planes, stride=stride)]
            inputs = planes * 4
            stage += [Bottleneck(inputs, planes, stride=1) for _ in range(count - 1)]
            setattr(self, f"layer{number + 1}", nn.Sequential(*stage))
        self.features = inputs

    def stages(self) -> list[nn.Sequential]:
        """layer1 to layer4."""
        found = [getattr(self, f"layer{number}") for number in range(1, 5)]
        return [stage for stage in found if isinstance(stage, nn.Sequential)]

    def forward(self, x: Tensor) -> Tensor:
        """The pooled features."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages():
            x = stage(x)
        return x.mean(dim=(2, 3))


def resnet50(*, seed: int) -> ResNet:
    """A ResNet50 of one input channel with He's random start (the last BatchNorm of a block starts at zero)."""
    return initialised(ResNet(), seed=seed)


def initialised(network: ResNet, *, seed: int, zero_residual: bool = True) -> ResNet:
    """The network with a seeded random start."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_residual:
        for module in network.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
    return network


def to_one_channel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a three-channel network for a grey image: the kernels of conv1 summed over the channels."""
    turned = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    if turned["conv1.weight"].shape[1] == 3:
        turned["conv1.weight"] = turned["conv1.weight"].sum(dim=1, keepdim=True)
    return turned


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


class _Graph:
    """The ONNX graph as it is written down, node by node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def tensor(self, values: NDArray[np.generic], name: str) -> str:
        self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def conv(self, x: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, name: str, *, relu: bool) -> str:
        weight, bias = folded(conv, norm)
        steps, scale = quantised(weight)
        inputs = [self.tensor(steps, f"{name}.int8"), self.tensor(scale, f"{name}.scale")]
        kernel = self.add("DequantizeLinear", inputs, f"{name}.weight", axis=0)
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


def to_onnx(network: ResNet, *, size: int = 64) -> bytes:
    """The network as ONNX bytes: input `image` (n, 1, size, size) float32, output `features` (n, features) float32."""
    graph = _Graph()
    x = graph.conv("image", network.conv1, network.bn1, "conv1", relu=True)
    x = graph.add("MaxPool", [x], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for number, stage in enumerate(network.stages(), start=1):
        for place, block in enumerate(stage):
            if not isinstance(block, Bottleneck):
                raise TypeError("a stage holds something that is no bottleneck")
            name, shortcut = f"layer{number}.{place}", x
            y = graph.conv(x, block.conv1, block.bn1, f"{name}.conv1", relu=True)
            y = graph.conv(y, block.conv2, block.bn2, f"{name}.conv2", relu=True)
            y = graph.conv(y, block.conv3, block.bn3, f"{name}.conv3", relu=False)
            if block.downsample is not None:
                conv, norm = block.downsample
                if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
                    raise TypeError("a shortcut is a convolution and its BatchNorm")
                shortcut = graph.conv(x, conv, norm, f"{name}.downsample", relu=False)
            x = graph.add("Relu", [graph.add("Add", [y, shortcut], f"{name}.add")], f"{name}.relu")
    pooled = graph.add("GlobalAveragePool", [x], "pooled")
    graph.add("Flatten", [pooled], "features", axis=1)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "resnet",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", network.conv1.in_channels, size, size])],
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", network.features])],
            graph.tensors,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fracture-sweep",
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def with_stored_weights(network: ResNet) -> ResNet:
    """The network as `to_onnx` stores it: folded, its weights rounded to int8; BatchNorm does nothing. In place."""
    pairs = [(network.conv1, network.bn1)]
    for stage in network.stages():
        for block in stage:
            if not isinstance(block, Bottleneck):
                raise TypeError("a stage holds something that is no bottleneck")
            pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)]
            if block.downsample is not None:
                conv, norm = block.downsample
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    pairs.append((conv, norm))
    with torch.no_grad():
        for conv, norm in pairs:
            weight, bias = folded(conv, norm)
            conv.weight.copy_(torch.from_numpy(dequantised(*quantised(weight))))
            norm.weight.copy_(torch.full_like(norm.weight, float(np.sqrt(1 + norm.eps))))
            norm.bias.copy_(torch.from_numpy(bias))
            norm.reset_running_stats()
    return network.eval()
