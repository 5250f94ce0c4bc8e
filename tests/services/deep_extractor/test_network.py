"""The network's numbers depend on the picture alone, and the device is what the session really got."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from services.deep_extractor.network import CPU, CUDA, CUDA_FRAME, Network, check_golden
from shared.fracture.bundle import GoldenImage
from shared.pipeline.errors import FractureSweepError, OverBudget
from tests.fixtures.small_bundle import SIZE, brooding_network, golden_picture, load_small_bundle, small_network


def _pictures(count: int) -> list[NDArray[np.float32]]:
    return [np.random.default_rng(n).normal(size=(SIZE, SIZE)).astype(np.float32) for n in range(count)]


def _deep_network(*, layers: int = 12, channels: int = 64) -> bytes:
    """Wide convolutions one after another: what a ResNet is made of, and where kernels differ between shapes."""
    rng = np.random.default_rng(5)
    nodes, weights, source, wide = [], [], "image", 1
    for layer in range(layers):
        kernel = (rng.normal(size=(channels, wide, 3, 3)) * np.sqrt(2 / (9 * wide))).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"w{layer}"))
        stride = 2 if layer in (0, 1, 2, 3) else 1
        nodes.append(
            helper.make_node("Conv", [source, f"w{layer}"], [f"c{layer}"], pads=[1] * 4, strides=[stride, stride])
        )
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        source, wide = f"r{layer}", channels
    nodes.append(helper.make_node("GlobalAveragePool", [source], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["features"]))
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 1, SIZE, SIZE])],
        [helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, ["n", channels])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def test_a_network_that_does_not_end_is_stopped_and_works_on() -> None:
    network = Network(brooding_network(), device="cpu", seconds=0.5)
    quiet, endless = np.ones((SIZE, SIZE), dtype=np.float32), np.full((SIZE, SIZE), 11, dtype=np.float32)

    with pytest.raises(OverBudget, match=r"the network took more than 0\.5 s"):
        network.features([quiet, endless])

    assert network.features([quiet])[0][0] == 1.0


def test_features_are_the_same_bits_alone_and_in_any_batch() -> None:
    network, pictures = Network(_deep_network(), device="cpu"), _pictures(8)

    together = network.features(pictures)
    alone = [network.features([picture])[0] for picture in pictures]
    turned = network.features(pictures[::-1])[::-1]

    for one, two, three in zip(together, alone, turned, strict=True):
        assert one.tobytes() == two.tobytes() == three.tobytes()


@pytest.mark.parametrize("threads", [2, 3, 4, 0])
def test_features_are_the_same_bits_with_any_number_of_threads(threads: int) -> None:
    onnx_bytes, pictures = _deep_network(), _pictures(3)

    single = Network(onnx_bytes, device="cpu", intra_op_threads=1).features(pictures)
    several = Network(onnx_bytes, device="cpu", intra_op_threads=threads).features(pictures)

    assert [v.tobytes() for v in single] == [v.tobytes() for v in several]


def test_the_features_are_the_float32_values_exactly() -> None:
    picture = golden_picture()

    got = Network(small_network(), device="cpu").features([picture])[0]

    session = onnxruntime.InferenceSession(small_network(), providers=[CPU])
    expected = session.run(None, {"image": picture[None, None]})[0][0]
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got.astype(np.float32), expected)


def test_no_pictures_give_no_features() -> None:
    assert Network(small_network(), device="cpu").features([]) == []


def test_the_device_is_the_one_that_the_session_got() -> None:
    network = Network(small_network(), device="cpu")

    assert network.provider == CPU
    assert network.device == "cpu"
    assert network.provenance["execution_provider"] == CPU


def test_cuda_demanded_where_it_is_not_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])

    with pytest.raises(FractureSweepError, match="the setting device is cuda, but this onnxruntime has no CUDA"):
        Network(small_network(), device="cuda")


class _Session:
    """A session of the GPU wheel: asked for CUDA, it gets what it is told to get."""

    got = CPU
    shapes: list[tuple[int, ...]]

    def __init__(self, onnx_bytes: bytes, options: object, *, providers: list[object]) -> None:
        self._real = _REAL_SESSION(onnx_bytes, options, providers=[CPU])
        _Session.shapes = []

    def get_providers(self) -> list[str]:
        return [self.got, CPU]

    def get_inputs(self) -> object:
        return self._real.get_inputs()

    def get_outputs(self) -> object:
        return self._real.get_outputs()

    def run(
        self, outputs: list[str], inputs: dict[str, NDArray[np.float32]], options: object
    ) -> list[NDArray[np.float32]]:
        _Session.shapes.append(inputs["image"].shape)
        found: list[NDArray[np.float32]] = self._real.run(outputs, inputs)
        return found


_REAL_SESSION = onnxruntime.InferenceSession


@pytest.fixture
def gpu_wheel(monkeypatch: pytest.MonkeyPatch) -> type[_Session]:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", _Session)
    return _Session


def test_a_gpu_wheel_without_a_gpu_falls_back_and_says_so(
    gpu_wheel: type[_Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_wheel, "got", CPU)

    assert Network(small_network(), device="auto").device == "cpu"
    with pytest.raises(FractureSweepError, match=f"the setting device is cuda, but the network got {CPU}"):
        Network(small_network(), device="cuda")


def test_on_cuda_every_run_has_the_same_shape_whatever_waits(
    gpu_wheel: type[_Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_wheel, "got", CUDA)
    network, pictures = Network(small_network(), device="cuda"), _pictures(CUDA_FRAME + 3)

    together = network.features(pictures)
    alone = network.features(pictures[-1:])[0]

    assert set(gpu_wheel.shapes) == {(CUDA_FRAME, 1, SIZE, SIZE)}
    assert len(together) == CUDA_FRAME + 3
    np.testing.assert_allclose(together[-1], alone, rtol=1e-5)


def test_a_network_that_cannot_be_loaded_is_one_sentence() -> None:
    with pytest.raises(FractureSweepError, match="cannot be loaded by onnxruntime"):
        Network(b"\x00not a network", device="cpu")


def test_the_golden_image_comes_out(tmp_path: Path) -> None:
    bundle = load_small_bundle(tmp_path / "bundle")

    assert check_golden(Network(bundle.network_bytes(), device="cpu"), bundle.golden.image) < 1e-5


def test_a_golden_image_that_does_not_come_out_is_refused(tmp_path: Path) -> None:
    image = load_small_bundle(tmp_path / "bundle").golden.image
    wrong = GoldenImage(pixels=image.pixels, features=(image.features[0] + 0.1, *image.features[1:]))

    with pytest.raises(FractureSweepError, match=r"golden image's features differ by 0\.1"):
        check_golden(Network(small_network(), device="cpu"), wrong)


def test_int8_weights_give_the_values_of_their_float_form() -> None:
    model = onnx.load_model_from_string(small_network())
    kernel = numpy_helper.to_array(model.graph.initializer[0])
    scale = (np.abs(kernel).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    whole = np.round(kernel / scale[:, None, None, None]).astype(np.int8)
    unfolded = onnx.ModelProto()
    unfolded.CopyFrom(model)
    unfolded.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(whole.astype(np.float32) * scale[:, None, None, None], "weights")
    )
    del model.graph.initializer[:]
    model.graph.initializer.extend([numpy_helper.from_array(whole, "whole"), numpy_helper.from_array(scale, "scale")])
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["whole", "scale"], ["weights"], axis=0))

    got = Network(model.SerializeToString(), device="cpu").features(_pictures(1))[0]

    expected = Network(unfolded.SerializeToString(), device="cpu").features(_pictures(1))[0]
    np.testing.assert_array_equal(got, expected)
