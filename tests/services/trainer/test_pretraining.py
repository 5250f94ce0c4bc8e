from pathlib import Path

import numpy as np
import pytest
import torch

from services.trainer.network import tiny
from services.trainer.pretraining import TARGETS, PretrainingSpec, main, pretrain, pretrained_weights, slab, slabs
from services.trainer.torchvision_models import ResNet
from services.trainer.weights import read_weights

pytestmark = pytest.mark.trainer


def _network() -> ResNet:
    return tiny(seed=1, width=4)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_slab_has_a_normalised_picture_and_all_targets() -> None:
    picture, targets = slab(3, seed=9)

    assert picture.shape == (64, 64)
    assert abs(float(picture.mean())) < 1e-5
    assert targets.shape == (len(TARGETS),)
    assert not any("acute" in name or "chronic" in name for name in TARGETS)


def test_slabs_come_from_the_work_folder_the_second_time(tmp_path: Path) -> None:
    spec = PretrainingSpec(pictures=4, steps=1, seed=9)

    first, targets = slabs(spec, work=tmp_path)
    again, _ = slabs(spec, work=tmp_path)

    assert np.array_equal(first, again)
    assert np.array_equal(first[3], slab(3, seed=9)[0])
    assert targets.shape == (4, len(TARGETS))


def test_training_that_was_interrupted_ends_where_an_unbroken_one_ends(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pictures = rng.standard_normal((12, 32, 32)).astype(np.float32)
    targets = rng.integers(0, 2, size=(12, len(TARGETS))).astype(np.float32)
    spec = PretrainingSpec(pictures=12, steps=6, seed=3, batch=4, warm_up=2, size=32)
    whole = _network()
    pretrain(whole, pictures, targets, spec, work=tmp_path / "whole")

    def stop(step: int, _: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(_network(), pictures, targets, spec, work=tmp_path / "parts", checkpoint_every=2, report=stop)
    resumed = _network()
    history = pretrain(resumed, pictures, targets, spec, work=tmp_path / "parts", checkpoint_every=2)

    assert len(history) == 6
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_weights_file_says_that_it_is_phantom_pretraining_and_repeats_byte_for_byte(tmp_path: Path) -> None:
    spec = PretrainingSpec(pictures=4, steps=2, seed=9, batch=2, warm_up=1, architecture="tiny")

    first = pretrained_weights(spec, out=tmp_path / "a.safetensors", work=tmp_path / "a", device="cpu")
    second = pretrained_weights(spec, out=tmp_path / "b.safetensors", work=tmp_path / "b", device="cpu")

    assert first.words == f"phantom pre-training: a.safetensors, SHA-256 {first.sha256}"
    assert first.sha256 == second.sha256
    start = tiny(seed=9).state_dict()
    assert not torch.equal(first.state["conv1.weight"], start["conv1.weight"])


def test_the_command_writes_weights_that_fit_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "weights.safetensors"
    asked = ["--pictures", "4", "--steps", "1", "--batch", "2", "--architecture", "tiny", "--device", "cpu"]

    code = main(["--out", str(out), "--work", str(tmp_path), "--processes", "1", *asked])

    assert code == 0
    assert capsys.readouterr().out.strip() == read_weights(out, architecture="tiny").words
