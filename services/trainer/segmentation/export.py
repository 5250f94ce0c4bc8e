"""The segmenter's network as ONNX, with its card; onnxruntime is compared with torch before anything is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from services.trainer.onnx_graph import Graph
from services.trainer.segmentation.tissues import NETWORK_CLASSES
from services.trainer.segmentation.unet import SagittalUNet
from shared.fracture.ids import sha256_hex
from shared.fracture.spine.network_card import CARD_FILE, NETWORK_FILE, NetworkCard, TrainedOn
from shared.fracture.spine.network_input import NetworkInput

PARITY: Final = 1e-4
"""How far a probability of onnxruntime may be from torch's."""


def to_onnx(network: SagittalUNet) -> bytes:
    """The network as ONNX bytes: `pictures` (n, channels, height, width) to `probabilities` (n, classes, …)."""
    graph = Graph("float32")
    scales = graph.tensor(np.array([1, 1, 2, 2], dtype=np.float32), "twice")
    kept: list[str] = []
    x = "pictures"
    for number, block in enumerate(network.descending):
        if number:
            x = graph.add("MaxPool", [x], f"pool{number}", kernel_shape=[2, 2], strides=[2, 2])
        x = graph.conv(x, block.conv1, block.bn1, f"down{number}.1", relu=True)
        x = graph.conv(x, block.conv2, block.bn2, f"down{number}.2", relu=True)
        kept.append(x)
    for number, (block, beside) in enumerate(zip(network.ascending, kept[-2::-1], strict=True)):
        x = graph.add(
            "Resize",
            [x, "", scales],
            f"up{number}.resized",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        x = graph.add("Concat", [x, beside], f"up{number}.joined", axis=1)
        x = graph.conv(x, block.conv1, block.bn1, f"up{number}.1", relu=True)
        x = graph.conv(x, block.conv2, block.bn2, f"up{number}.2", relu=True)
    x = graph.conv(x, network.head, None, "head", relu=False)
    graph.add("Softmax", [x], "probabilities", axis=1)
    sides = ["height", "width"]
    return graph.model(
        "sagittal-unet",
        inputs=[helper.make_tensor_value_info("pictures", TensorProto.FLOAT, ["n", network.channels, *sides])],
        outputs=[helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", network.classes, *sides])],
    )


def exported(network: SagittalUNet, pictures: NDArray[np.float32]) -> tuple[bytes, float]:
    """ONNX bytes, and the largest difference of a probability from torch's on `pictures`; ValueError above PARITY."""
    still = copy.deepcopy(network).cpu().float().eval()
    onnx_bytes = to_onnx(still)
    with torch.no_grad():
        expected = still(torch.from_numpy(pictures)).softmax(dim=1).numpy()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_bytes, options, providers=["CPUExecutionProvider"])
    got = session.run(["probabilities"], {"pictures": pictures})[0]
    difference = float(np.abs(got - expected).max())
    if not difference <= PARITY:
        raise ValueError(f"the exported network differs from torch's by {difference:.1e} (limit {PARITY:g})")
    return onnx_bytes, difference


def write_network(
    folder: Path, onnx_bytes: bytes, *, name: str, version: str, given: NetworkInput, multiple: int, trained: TrainedOn
) -> NetworkCard:
    """Write network and card into a folder; the card last."""
    folder.mkdir(parents=True, exist_ok=True)
    card = NetworkCard(
        name=name,
        version=version,
        network_sha256=sha256_hex(onnx_bytes),
        given=given,
        classes=NETWORK_CLASSES,
        multiple=multiple,
        trained_on=trained,
    )
    (folder / NETWORK_FILE).write_bytes(onnx_bytes)
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return card
