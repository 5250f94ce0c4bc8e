from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytestmark = pytest.mark.trainer
pytest.importorskip("torch")

from services.__main__ import app  # noqa: E402
from services.segmenter.network import SpineNetwork  # noqa: E402
from services.trainer.segmentation.fitting import FittingSpec  # noqa: E402
from services.trainer.segmentation.training import SegmenterTraining, train  # noqa: E402
from shared.fracture.spine.network_card import load_network  # noqa: E402

SMALL = SegmenterTraining(
    volumes=2, steps=3, seed=4, fitting=FittingSpec(steps=3, seed=4, batch=2, height=48, width=32, widths=(4, 8))
)


@pytest.fixture(scope="module")
def trained(label_maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(label_maps, out, SMALL, device="cpu", processes=1)
    return out


def test_label_maps_become_a_network_that_serving_loads(trained: Path) -> None:
    card, onnx = load_network(trained / "network")

    found = SpineNetwork(card, onnx, threads=1).probabilities(np.zeros((2, 5, 30, 21), dtype=np.float32))

    assert found.shape == (2, len(card.classes), 30, 21)
    assert found.sum(axis=1) == pytest.approx(1.0, abs=1e-5)
    assert card.trained_on.anatomies[0].startswith("drawn-1 ")
    assert (card.trained_on.volumes, card.trained_on.steps, card.trained_on.seed) == (2, 3, 4)


def test_a_run_that_is_done_is_not_done_again(trained: Path, label_maps: Path) -> None:
    told: list[tuple[str, int, int]] = []
    before = (trained / "network" / "network.onnx").read_bytes()
    volumes = {path: path.stat().st_mtime_ns for path in trained.glob("volumes/**/*.npy")}

    train(
        label_maps, trained, SMALL, device="cpu", processes=1,
        progress=lambda name, done, total: told.append((name, done, total)),
    )  # fmt: skip

    assert told == [("anatomies", 1, 1), ("synthetic CT", 2, 2)]
    assert (trained / "network" / "network.onnx").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in trained.glob("volumes/**/*.npy")} == volumes


def test_more_volumes_are_other_data(trained: Path, label_maps: Path, tmp_path: Path) -> None:
    (folder,) = trained.glob("volumes/*")

    train(label_maps, trained, SegmenterTraining(volumes=1, seed=4, fitting=SMALL.fitting), device="cpu", processes=1)

    assert len(list(trained.glob("volumes/*"))) == 2
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no label maps in nowhere"),
        (["nowhere", "--device", "tpu"], "--device is auto, cpu or cuda, not 'tpu'"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    ran = CliRunner().invoke(app, ["train-segmenter", *arguments, "--out", str(tmp_path)])

    assert ran.exit_code != 0
    assert said in str(ran.exception)
