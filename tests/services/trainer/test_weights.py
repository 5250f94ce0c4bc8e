import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from services.trainer.network import random_network
from services.trainer.settings import NetworkSettings
from services.trainer.torchvision_models import BasicBlock
from services.trainer.weights import WeightsError, read_weights, starting_weights, write_weights

pytestmark = pytest.mark.trainer


def _state(seed: int = 3) -> dict[str, torch.Tensor]:
    return dict(random_network("tiny", seed=seed).state_dict())


def _colour() -> dict[str, torch.Tensor]:
    """A state as torchvision gives it: three channels and a head."""
    state = _state()
    state["conv1.weight"] = torch.cat([state["conv1.weight"] * share for share in (0.5, 0.25, 0.25)], dim=1)
    return {**state, "fc.weight": torch.ones(1000, 128), "fc.bias": torch.ones(1000)}


def _settings(**changes: object) -> NetworkSettings:
    return NetworkSettings.model_validate({"architecture": "tiny", **changes})


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_three_channels_are_summed_to_one_and_their_head_is_left_out(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"colour{suffix}"
    torch.save(_colour(), path) if suffix == ".pth" else save_file(_colour(), path)

    start = starting_weights(_settings(weights=path, weights_sha256=_sha(path).upper()), seed=1)

    expected = _state()
    assert list(start.state) == list(expected)
    for name, tensor in expected.items():
        assert torch.allclose(start.state[name], tensor, atol=1e-7), name
    assert start.words == f"colour{suffix}, SHA-256 {_sha(path)}"


def test_weights_of_one_channel_are_taken_as_they_are(tmp_path: Path) -> None:
    write_weights(tmp_path / "grey.safetensors", _state(), source="phantom pre-training", about={"steps": 3})

    start = read_weights(tmp_path / "grey.safetensors", architecture="tiny")

    assert all(torch.equal(start.state[name], tensor) for name, tensor in _state().items())
    assert start.words.startswith("phantom pre-training: grey.safetensors, SHA-256 ")


def test_old_files_without_batch_counters_fit(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in _colour().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "old.safetensors")

    start = read_weights(tmp_path / "old.safetensors", architecture="tiny")

    assert list(start.state) == list(_state())


def test_without_weights_the_error_says_how_to_give_a_file_or_to_start_at_random_on_purpose() -> None:
    with pytest.raises(WeightsError) as refused:
        starting_weights(NetworkSettings(), seed=1)

    for word in ("network.weights", "resnet50-0676ba61.pth", "0676ba61", "network.random_start = true", "pretraining"):
        assert word in str(refused.value)


def test_a_random_start_that_was_asked_for_says_so_and_comes_from_the_seed() -> None:
    first, second = (starting_weights(_settings(random_start=True), seed=seed) for seed in (1, 2))

    assert first.words == "random start (seed 1)"
    assert first.sha256 is None
    assert torch.equal(first.state["conv1.weight"], _state(1)["conv1.weight"])
    assert not torch.equal(first.state["conv1.weight"], second.state["conv1.weight"])


def test_a_randomly_started_resnet50_that_is_to_be_trained_begins_with_quiet_blocks() -> None:
    trained = starting_weights(NetworkSettings(random_start=True, mode="in_sample"), seed=1)
    frozen = starting_weights(NetworkSettings(random_start=True, mode="frozen"), seed=1)

    assert not trained.state["layer3.0.bn3.weight"].any()
    assert frozen.state["layer3.0.bn3.weight"].all()


def test_a_file_and_a_random_start_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="exclude each other"):
        starting_weights(_settings(weights=tmp_path / "a.pth", random_start=True), seed=1)


def test_a_hash_without_a_file_is_refused() -> None:
    with pytest.raises(WeightsError, match="names no file"):
        starting_weights(_settings(weights_sha256="ab", random_start=True), seed=1)


def test_another_file_than_the_settings_name_is_refused_with_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(_state(), path)

    with pytest.raises(WeightsError, match=f"has the SHA-256 {_sha(path)}, and the settings want {'0' * 64}"):
        starting_weights(_settings(weights=path, weights_sha256="0" * 64), seed=1)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    state = _state()
    del state["bn1.weight"]
    state["layer9.0.conv1.weight"] = torch.ones(1)
    state["layer1.0.conv1.weight"] = torch.ones(16, 15, 3, 3)
    state["layer2.0.bn1.bias"] = torch.full((32,), torch.nan)
    save_file(state, tmp_path / "wrong.safetensors")

    with pytest.raises(WeightsError) as refused:
        read_weights(tmp_path / "wrong.safetensors", architecture="tiny")

    assert str(refused.value) == (
        "wrong.safetensors does not fit the network tiny. missing: bn1.weight; unknown: layer9.0.conv1.weight; "
        "another shape: layer1.0.conv1.weight (16, 15, 3, 3) for (16, 16, 3, 3); "
        "no finite floating-point numbers: layer2.0.bn1.bias"
    )


def test_weights_of_another_network_are_refused_with_some_names_and_a_count(tmp_path: Path) -> None:
    save_file(_state(), tmp_path / "tiny.safetensors")

    with pytest.raises(WeightsError, match=r"does not fit the network resnet50\. missing: .* and \d+ more; another"):
        read_weights(tmp_path / "tiny.safetensors", architecture="resnet50")


def test_two_channels_are_another_shape(tmp_path: Path) -> None:
    save_file({**_state(), "conv1.weight": torch.ones(16, 2, 7, 7)}, tmp_path / "two.safetensors")

    with pytest.raises(WeightsError, match=r"conv1\.weight \(16, 2, 7, 7\) for \(16, 1, 7, 7\)"):
        read_weights(tmp_path / "two.safetensors", architecture="tiny")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save(BasicBlock(4, 4), tmp_path / "module.pth")

    with pytest.raises(WeightsError, match="weights_only"):
        read_weights(tmp_path / "module.pth", architecture="tiny")


def test_a_file_of_something_else_than_tensors_by_name_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": _state()}, tmp_path / "wrapped.pth")

    with pytest.raises(WeightsError, match="a state dict is wanted"):
        read_weights(tmp_path / "wrapped.pth", architecture="tiny")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth cannot be read \(No such file"):
        read_weights(tmp_path / "absent.pth", architecture="tiny")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".pth", ".safetensors", ""]))
def test_any_other_bytes_are_one_clear_error(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(content)

    with pytest.raises(WeightsError, match="noise"):
        read_weights(path, architecture="tiny")
