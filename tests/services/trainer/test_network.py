import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.deep_extractor.network import Network
from services.trainer import network as network_module
from services.trainer import torchvision_models
from services.trainer.network import (
    Storage,
    exported,
    feature_count,
    network_of,
    random_network,
    resnet50,
    tiny,
    to_one_channel,
    to_onnx,
    with_stored_weights,
)
from services.trainer.onnx_graph import dequantised, quantised
from services.trainer.torchvision_models import BasicBlock, Bottleneck, ResNet

pytestmark = pytest.mark.trainer


def _trained_like(network: ResNet, seed: int) -> ResNet:
    """The network with BatchNorm statistics as if it had seen pictures."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def _small(seed: int, block: object = Bottleneck) -> ResNet:
    return _trained_like(tiny(seed=seed, block=block, blocks=(1, 2, 1, 1), width=8), seed)


def _pictures(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 64, 64)).astype(np.float32)


@pytest.mark.parametrize("block", [Bottleneck, BasicBlock])
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_the_deep_extractor_gives_what_torch_gives(storage: Storage, block: object) -> None:
    network, pictures = _small(1, block), _pictures(3)

    stored, difference = exported(network, storage=storage, pictures=pictures)
    got = np.array(Network(stored, device="cpu").features(list(pictures)))

    with torch.no_grad():
        torchs = with_stored_weights(network) if storage == "int8" else network
        expected = torchs(torch.from_numpy(pictures)[:, None]).numpy()
    assert np.abs(got - expected).max() / np.abs(expected).max() == pytest.approx(difference, abs=1e-7)
    assert difference < 1e-5
    assert got.shape == (3, feature_count(network))


def test_the_export_leaves_the_network_as_it_was() -> None:
    network = _small(6).train()
    before = copy.deepcopy(network.state_dict())

    exported(network, storage="int8")

    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_an_export_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = to_onnx(_small(8), storage="float32")
    monkeypatch.setattr(network_module, "to_onnx", lambda *_, **__: other)

    with pytest.raises(ValueError, match="differs from torch's"):
        exported(_small(7))


def test_an_export_with_something_that_is_no_number_is_refused() -> None:
    network = _small(7)
    with torch.no_grad():
        network.layer1[0].conv1.weight[0, 0] = torch.nan

    with pytest.raises(ValueError, match="differs from torch's by nan"):
        exported(network)


def test_the_weights_in_the_file_are_int8_with_one_scale_a_channel() -> None:
    model = onnx.load_model_from_string(to_onnx(_small(2), storage="int8"))

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    kernels = [name for name in tensors if name.endswith(".int8")]
    assert kernels
    for name in kernels:
        assert tensors[name].data_type == onnx.TensorProto.INT8
        assert list(tensors[name.replace(".int8", ".scale")].dims) == [tensors[name].dims[0]]


def test_float32_storage_holds_nothing_but_float32() -> None:
    model = onnx.load_model_from_string(to_onnx(_small(2), storage="float32"))

    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.FLOAT}
    assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-6, 1e6))
def test_int8_is_wrong_by_half_a_step_at_most(seed: int, size: float) -> None:
    weight = (size * np.random.default_rng(seed).standard_normal((5, 4, 3, 3))).astype(np.float32)

    steps, scale = quantised(weight)

    assert np.all(np.abs(dequantised(steps, scale) - weight) <= 0.5001 * scale[:, None, None, None])


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_the_same_seed_gives_the_same_file(storage: Storage) -> None:
    assert to_onnx(_small(4), storage=storage) == to_onnx(_small(4), storage=storage)


def test_a_random_start_leaves_torchs_own_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)

    torch.manual_seed(1)
    tiny(seed=2)

    assert torch.equal(torch.rand(3), expected)


def test_names_and_shapes_are_torchvisions_but_for_the_head_and_the_one_channel() -> None:
    colour = to_one_channel(torchvision_models.resnet50(weights=None).state_dict())

    ours = resnet50(seed=0).state_dict()

    assert [(name, tensor.shape) for name, tensor in ours.items()] == [
        (name, tensor.shape) for name, tensor in colour.items()
    ]
    assert ours["conv1.weight"].shape == (64, 1, 7, 7)
    assert len(ours) == 318


def test_a_grey_picture_gives_what_torchvision_gives_for_it_three_times() -> None:
    colour = _trained_like(torchvision_models.resnet50(weights=None), 5)
    colour.fc = torch.nn.Identity()
    pictures = torch.from_numpy(_pictures(2))[:, None]

    grey = network_of("resnet50", to_one_channel(colour.state_dict()))

    with torch.no_grad():
        got, expected = grey(pictures), colour(pictures.expand(-1, 3, -1, -1))
    assert got.shape == (2, 2048)
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_kernels_of_a_colour_network_are_summed_for_grey_pictures() -> None:
    colour = {"conv1.weight": torch.ones(64, 3, 7, 7), "fc.weight": torch.ones(1000, 2048)}

    grey = to_one_channel(colour)

    assert list(grey) == ["conv1.weight"]
    assert grey["conv1.weight"].shape == (64, 1, 7, 7)
    assert float(grey["conv1.weight"].max()) == 3.0


def test_kernels_of_a_grey_network_stay_as_they_are() -> None:
    state = random_network("tiny", seed=3).state_dict()

    assert torch.equal(to_one_channel(state)["conv1.weight"], state["conv1.weight"])
