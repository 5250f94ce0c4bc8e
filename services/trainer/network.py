"""torchvision's ResNet50 with one input channel and without its head, and its way into ONNX.

Parameter names and shapes stay torchvision's, so weights of its `resnet50` (ImageNet V1) fit by name. `fc` is an
identity: what the network gives are the averages of its last layer, 2,048 of them. `tiny` is a network of torchvision's
blocks that is small enough for tests.

How ONNX is written, and what int8 storage means: services/trainer/onnx_graph.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from services.trainer import torchvision_models
from services.trainer.onnx_graph import Graph, Storage, dequantised, folded, quantised
from services.trainer.torchvision_models import BasicBlock, Bottleneck, ResNet

Architecture = Literal["resnet50", "tiny"]

FEATURES: Final = 2048
"""Of the ResNet50."""
TINY_WIDTH: Final = 16
PARITY: Final = 1e-4
"""How far onnxruntime may be from torch, as a share of the largest feature."""
_PARITY_PICTURES: Final = 4
_PARITY_SEED: Final = 5


def resnet50(*, seed: int) -> ResNet:
    """A ResNet50 of one input channel with He's random start (the last BatchNorm of a block starts at zero)."""
    with torch.random.fork_rng(devices=[]):
        network = _resnet50()
    return initialised(network, seed=seed)


def tiny(
    *,
    seed: int,
    block: Any = BasicBlock,
    blocks: tuple[int, int, int, int] = (1, 1, 1, 1),
    width: int = TINY_WIDTH,
) -> ResNet:
    """A narrow ResNet of torchvision's blocks for tests, randomly started: `width` channels where torchvision has 64.

    With BasicBlock it gives 8 * width features, with Bottleneck 32 * width.
    """
    with torch.random.fork_rng(devices=[]):
        network = _narrow(block, blocks, width)
    return initialised(network, seed=seed, zero_residual=False)


def _resnet50() -> ResNet:
    network = torchvision_models.resnet50(weights=None)
    network.conv1, network.fc = _conv(1, 64, 7, stride=2), nn.Identity()
    return network


def _narrow(block: Any = BasicBlock, blocks: tuple[int, ...] = (1, 1, 1, 1), width: int = TINY_WIDTH) -> ResNet:
    with torch.device("meta"):  # every part that has weights is replaced
        network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.conv1, network.bn1, network.fc = _conv(1, width, 7, stride=2), nn.BatchNorm2d(width), nn.Identity()
    inputs = width
    for number, count in enumerate(blocks):
        planes, stage = width * 2**number, nn.Sequential()
        outputs = planes * block.expansion
        for place in range(count):
            stride = 2 if number > 0 and place == 0 else 1
            shortcut = None
            if stride != 1 or inputs != outputs:
                shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))
            stage.append(block(inputs, planes, stride, shortcut))
            inputs = outputs
        setattr(network, f"layer{number + 1}", stage)
    return network


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


def random_network(architecture: Architecture, *, seed: int, zero_residual: bool = False) -> ResNet:
    """The network of an architecture with a seeded random start.

    Its blocks do something at once, which gives a network that stays as it is more kinds of features. A ResNet50 that
    is to be trained had better start with `zero_residual`: measured, the features of the other are 200 times as large
    and the loss goes from 11 to 190, where this one's goes from .69 down. The tiny network learns faster without.
    """
    network = tiny(seed=seed) if architecture == "tiny" else resnet50(seed=seed)
    return initialised(network, seed=seed, zero_residual=zero_residual)


def network_of(architecture: Architecture, state: Mapping[str, Tensor]) -> ResNet:
    """The network of an architecture with a copy of these weights, in eval mode."""
    network = _without_weights(architecture)
    network.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()}, assign=True)
    return network.eval()


def empty_state(architecture: Architecture) -> dict[str, Tensor]:
    """The names, shapes and types of an architecture's weights, as tensors without content (on the meta device)."""
    return dict(_without_weights(architecture).state_dict())


def _without_weights(architecture: Architecture) -> ResNet:
    with torch.device("meta"):
        return _narrow() if architecture == "tiny" else _resnet50()


def feature_count(network: ResNet) -> int:
    """How many pooled features the network gives."""
    block = network.layer4[-1]
    return int((block.bn3 if isinstance(block, Bottleneck) else block.bn2).num_features)


def initialised(network: ResNet, *, seed: int, zero_residual: bool = True) -> ResNet:
    """The network with a seeded random start, in place."""
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
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
    return network


def to_one_channel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a three-channel network for a grey image: the kernels of conv1 summed over the channels, no `fc`.

    Equal to feeding the grey image three times; the mean would scale by a third.
    """
    turned = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    kernels = turned.get("conv1.weight")
    if kernels is not None and kernels.ndim == 4 and kernels.shape[1] == 3:
        turned["conv1.weight"] = kernels.sum(dim=1, keepdim=True)
    return turned


def _stages(network: ResNet) -> list[Any]:
    return [network.layer1, network.layer2, network.layer3, network.layer4]


def _convolutions(block: nn.Module) -> list[tuple[str, nn.Conv2d, nn.BatchNorm2d]]:
    """Name, convolution and BatchNorm of a block's way, in order."""
    if not isinstance(block, Bottleneck | BasicBlock):
        raise TypeError(f"a stage holds a {type(block).__name__}, and not a block of torchvision's ResNet")
    count = 3 if isinstance(block, Bottleneck) else 2
    return [(f"conv{n}", getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in range(1, count + 1)]


def _pairs(network: ResNet) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    yield network.conv1, network.bn1
    for stage in _stages(network):
        for block in stage:
            for _, conv, norm in _convolutions(block):
                yield conv, norm
            if block.downsample is not None:
                conv, norm = block.downsample
                yield conv, norm


def to_onnx(network: ResNet, *, size: int = 64, storage: Storage = "int8") -> bytes:
    """The network as ONNX bytes: input `image` (n, 1, size, size) float32, output `features` (n, features) float32."""
    graph = Graph(storage)
    x = graph.conv("image", network.conv1, network.bn1, "conv1", relu=True)
    x = graph.add("MaxPool", [x], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for number, stage in enumerate(_stages(network), start=1):
        for place, block in enumerate(stage):
            name, y = f"layer{number}.{place}", x
            steps = _convolutions(block)
            for step, conv, norm in steps:
                y = graph.conv(y, conv, norm, f"{name}.{step}", relu=step != steps[-1][0])
            shortcut = x
            if block.downsample is not None:
                conv, norm = block.downsample
                shortcut = graph.conv(x, conv, norm, f"{name}.downsample", relu=False)
            x = graph.add("Relu", [graph.add("Add", [y, shortcut], f"{name}.add")], f"{name}.relu")
    pooled = graph.add("GlobalAveragePool", [x], "pooled")
    graph.add("Flatten", [pooled], "features", axis=1)
    return graph.model(
        "resnet",
        inputs=[
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", network.conv1.in_channels, size, size])
        ],
        outputs=[helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", feature_count(network)])],
    )


def with_stored_weights(network: ResNet) -> ResNet:
    """A copy of the network as `to_onnx` stores it in int8: folded, its weights rounded; BatchNorm does nothing."""
    stored = copy.deepcopy(network)
    with torch.no_grad():
        for conv, norm in _pairs(stored):
            weight, bias = folded(conv, norm)
            conv.weight.copy_(torch.from_numpy(dequantised(*quantised(weight))))
            norm.weight.copy_(torch.full_like(norm.weight, float(np.sqrt(1 + norm.eps))))
            norm.bias.copy_(torch.from_numpy(bias))
            norm.reset_running_stats()
    return stored.eval()


def exported(
    network: ResNet, *, size: int = 64, storage: Storage = "float32", pictures: NDArray[np.float32] | None = None
) -> tuple[bytes, float]:
    """ONNX bytes, and the largest difference of onnxruntime's features from torch's, as a share of the largest feature.

    `pictures` (n, size, size): what is compared on; none: a few random ones. With int8 storage torch computes with the
    weights that the file holds. ValueError where the difference is above PARITY or no number.
    """
    still = copy.deepcopy(network).cpu().float().eval()
    onnx_bytes = to_onnx(still, size=size, storage=storage)
    if pictures is None:
        rng = np.random.default_rng(_PARITY_SEED)
        pictures = rng.standard_normal((_PARITY_PICTURES, size, size)).astype(np.float32)
    with torch.no_grad():
        expected = (with_stored_weights(still) if storage == "int8" else still)(torch.from_numpy(pictures)[:, None])
    difference = parity(onnx_bytes, pictures, expected.numpy())
    if not difference <= PARITY:
        raise ValueError(
            f"the exported network differs from torch's by {difference:.1e} of the largest feature (limit {PARITY:g})"
        )
    return onnx_bytes, difference


def parity(onnx_bytes: bytes, pictures: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference of onnxruntime's features (n, features) from those expected, as a share of the largest."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # as the deep extractor runs it
    session = onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    got = np.concatenate([session.run(["features"], {"image": picture[None, None]})[0] for picture in pictures])
    if got.shape != expected.shape:
        raise ValueError(f"the exported network gives {got.shape[1]} features, and torch's {expected.shape[1]}")
    return float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-30))
