import numpy as np
import onnx
import pytest
import torch

from services.deep_extractor.network import Network
from services.trainer.network import (
    ResNet,
    dequantised,
    initialised,
    quantised,
    resnet50,
    to_one_channel,
    to_onnx,
    with_stored_weights,
)

pytestmark = pytest.mark.trainer


def _small(seed: int) -> ResNet:
    network = initialised(ResNet(blocks=(1, 2, 1, 1), width=8), seed=seed, zero_residual=False)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def test_onnx_gives_what_torch_gives_with_the_stored_weights() -> None:
    network = _small(1)
    pictures = np.random.default_rng(1).standard_normal((3, 64, 64)).astype(np.float32)
    stored = to_onnx(network)

    got = np.array(Network(stored, device="cpu").features(list(pictures)))

    with torch.no_grad():
        expected = with_stored_weights(network)(torch.from_numpy(pictures)[:, None]).numpy()
    assert np.abs(got - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())


def test_the_weights_in_the_file_are_int8_with_one_scale_a_channel() -> None:
    model = onnx.load_model_from_string(to_onnx(_small(2)))

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    kernels = [name for name in tensors if name.endswith(".int8")]
    assert kernels
    for name in kernels:
        assert tensors[name].data_type == onnx.TensorProto.INT8
        assert list(tensors[name.replace(".int8", ".scale")].dims) == [tensors[name].dims[0]]


def test_int8_is_wrong_by_half_a_step_at_most() -> None:
    weight = np.random.default_rng(3).standard_normal((5, 4, 3, 3)).astype(np.float32)

    steps, scale = quantised(weight)

    assert np.all(np.abs(dequantised(steps, scale) - weight) <= 0.5001 * scale[:, None, None, None])


def test_the_same_seed_gives_the_same_file() -> None:
    assert to_onnx(_small(4)) == to_onnx(_small(4))


def test_the_parameters_have_torchvisions_names_and_shapes() -> None:
    state = resnet50(seed=0).state_dict()

    assert len(state) == 318
    assert state["layer1.0.downsample.1.running_var"].shape == (256,)
    assert state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert state["conv1.weight"].shape == (64, 1, 7, 7)


def test_kernels_of_a_colour_network_are_summed_for_grey_pictures() -> None:
    colour = {"conv1.weight": torch.ones(64, 3, 7, 7), "fc.weight": torch.ones(1000, 2048)}

    grey = to_one_channel(colour)

    assert list(grey) == ["conv1.weight"]
    assert grey["conv1.weight"].shape == (64, 1, 7, 7)
    assert float(grey["conv1.weight"].max()) == 3.0
