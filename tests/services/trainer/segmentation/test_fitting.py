from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.trainer
torch = pytest.importorskip("torch")

from services.trainer.segmentation.export import exported, to_onnx, write_network  # noqa: E402
from services.trainer.segmentation.fitting import FittingSpec, batch_at, fit, learning_rate, loss  # noqa: E402
from services.trainer.segmentation.tissues import IGNORED, NETWORK_CLASSES  # noqa: E402
from services.trainer.segmentation.unet import fresh  # noqa: E402
from services.trainer.segmentation.volumes import make_volumes  # noqa: E402
from shared.fracture.spine.network_card import TrainedOn, load_network  # noqa: E402
from shared.fracture.spine.network_input import NetworkInput  # noqa: E402

GIVEN = NetworkInput()
SMALL = FittingSpec(steps=6, batch=2, height=48, width=32, widths=(4, 8), warm_up=2)
CLASSES = len(NETWORK_CLASSES)


@pytest.fixture(scope="module")
def volumes(anatomy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    make_volumes(folder, anatomies=[anatomy_file], count=3, seed=1, processes=1, progress=lambda done, total: None)
    return folder


def test_a_batch_depends_on_seed_and_step_alone(volumes: Path) -> None:
    one, two, other = (batch_at(step, volumes, 3, SMALL, GIVEN) for step in (4, 4, 5))

    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    assert not np.array_equal(one[0], other[0])
    assert one[0].shape == (2, 5, 48, 32)
    assert one[1].shape == (2, 48, 32)
    assert one[0].min() >= -0.06
    assert one[0].max() <= 1.06


def test_an_interrupted_training_ends_where_a_whole_one_ends(volumes: Path, tmp_path: Path) -> None:
    def run(work: Path, steps_seen: list[int], stop_at: int | None = None) -> list[float]:
        def progress(done: int, total: int) -> None:
            steps_seen.append(done)
            if done == stop_at:
                raise KeyboardInterrupt

        _, history = fit(
            volumes, 3, SMALL, given=GIVEN, work=work, data="d", device="cpu", threads=1, checkpoint_every=2,
            progress=progress,
        )  # fmt: skip
        return history

    whole = run(tmp_path / "whole", [])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", [], stop_at=5)
    seen: list[int] = []
    resumed = run(tmp_path / "broken", seen)

    assert seen == [5, 6]
    assert resumed == pytest.approx(whole, abs=1e-6)


def test_other_data_or_another_spec_does_not_go_on_from_a_checkpoint(volumes: Path) -> None:
    assert SMALL.key("one") != SMALL.key("two")
    assert SMALL.key("one") != FittingSpec(steps=7, batch=2, height=48, width=32, widths=(4, 8)).key("one")


def test_the_network_learns_what_it_is_shown(volumes: Path, tmp_path: Path) -> None:
    spec = FittingSpec(steps=60, batch=4, height=96, width=64, widths=(8, 16), warm_up=5)

    _, history = fit(volumes, 3, spec, given=GIVEN, work=tmp_path, data="d", device="cpu", threads=1)

    assert np.mean(history[-10:]) < 0.75 * np.mean(history[:10])


def test_what_is_not_judged_costs_nothing() -> None:
    logits = torch.randn(1, CLASSES, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = torch.zeros(1, 8, 8, dtype=torch.int64)
    wanted[0, 2:5, 2:5] = 1
    with_unknown = wanted.clone()
    with_unknown[0, 6:] = IGNORED
    wild = logits.clone()
    wild[:, 1, 6:] += 20

    assert loss(wild, with_unknown) == pytest.approx(float(loss(logits, with_unknown)), abs=1e-5)
    assert float(loss(wild, wanted)) > float(loss(logits, wanted)) + 0.1


def test_a_perfect_answer_costs_nearly_nothing() -> None:
    wanted = torch.zeros(1, 16, 16, dtype=torch.int64)
    wanted[0, :8] = 1
    logits = 30 * torch.nn.functional.one_hot(wanted, CLASSES).permute(0, 3, 1, 2).float()

    assert float(loss(logits, wanted)) < 0.01


def test_a_batch_of_background_alone_has_a_loss() -> None:
    wanted = torch.zeros(1, 8, 8, dtype=torch.int64)

    value = loss(torch.zeros(1, CLASSES, 8, 8), wanted)

    assert bool(torch.isfinite(value))


def test_the_rate_warms_up_and_goes_to_zero() -> None:
    rates = [learning_rate(step, FittingSpec(steps=100, warm_up=10)) for step in range(100)]

    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == pytest.approx(2e-3)
    assert rates[-1] < 1e-5


def test_onnxruntime_gives_what_torch_gives_and_the_bytes_follow_from_the_weights() -> None:
    network = fresh(channels=5, classes=CLASSES, seed=3, widths=(4, 8, 12)).eval()
    rng = np.random.default_rng(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(torch.from_numpy(rng.normal(0, 0.2, module.num_features)))
            module.running_var.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, module.num_features)))
    pictures = rng.random((2, 5, 24, 20), dtype=np.float32)

    onnx_bytes, difference = exported(network, pictures)

    assert difference < 1e-5
    assert to_onnx(network) == onnx_bytes


def test_a_network_that_onnxruntime_computes_otherwise_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    network = fresh(channels=5, classes=CLASSES, seed=3, widths=(4, 8)).eval()
    other = to_onnx(fresh(channels=5, classes=CLASSES, seed=4, widths=(4, 8)).eval())
    monkeypatch.setattr("services.trainer.segmentation.export.to_onnx", lambda _: other)

    with pytest.raises(ValueError, match="differs from torch's"):
        exported(network, np.random.default_rng(1).random((1, 5, 16, 16), dtype=np.float32))


def test_what_is_written_is_what_serving_loads(tmp_path: Path) -> None:
    network = fresh(channels=5, classes=CLASSES, seed=3, widths=(4, 8)).eval()
    trained = TrainedOn(anatomies=("drawn-1",), volumes=3, steps=6, seed=1, generator_version=1, device="cpu", loss=1.5)

    card = write_network(
        tmp_path, to_onnx(network), name="n", version="1", given=GIVEN, multiple=network.multiple, trained=trained
    )

    assert load_network(tmp_path) == (card, to_onnx(network))
    assert card.multiple == 2
