from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shared.fracture.ids import sha256_hex
from shared.fracture.spine.network_card import (
    CARD_FILE,
    NETWORK_FILE,
    NetworkCard,
    NetworkCardError,
    TrainedOn,
    load_network,
)
from shared.fracture.spine.network_input import NetworkInput

CARD = NetworkCard(
    name="drawn",
    version="1",
    network_sha256=sha256_hex(b"network"),
    given=NetworkInput(),
    classes=("background", "body", "posterior", "disc", "sacrum", "rib"),
    multiple=16,
    trained_on=TrainedOn(anatomies=("a",), volumes=1, steps=1, seed=1, generator_version=1, device="cpu", loss=1.0),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NETWORK_FILE).write_bytes(b"network")
    (tmp_path / CARD_FILE).write_text(CARD.model_dump_json())
    return tmp_path


def test_a_network_is_loaded_with_its_card(folder: Path) -> None:
    assert load_network(folder) == (CARD, b"network")


def test_another_network_than_the_card_s_is_refused(folder: Path) -> None:
    (folder / NETWORK_FILE).write_bytes(b"another")

    with pytest.raises(NetworkCardError, match="SHA-256 differs"):
        load_network(folder)


@pytest.mark.parametrize("name", [NETWORK_FILE, CARD_FILE])
def test_a_folder_that_lacks_a_file_is_refused_by_the_file_s_name(folder: Path, name: str) -> None:
    (folder / name).unlink()

    with pytest.raises(NetworkCardError, match=name):
        load_network(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"classes": ["background", "body"]}, "lacks the classes posterior, sacrum, rib"),
        ({"multiple": 0}, "multiple"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_card_that_does_not_fit_says_where(folder: Path, change: dict[str, object], said: str) -> None:
    (folder / CARD_FILE).write_text(json.dumps({**json.loads(CARD.model_dump_json()), **change}))

    with pytest.raises(NetworkCardError, match=said):
        load_network(folder)


def test_hu_are_clipped_and_scaled_to_the_window() -> None:
    scaled = NetworkInput(window_hu=(-300, 900)).scaled(np.array([-1024, -300, 300, 900, 3000], dtype=np.float32))

    assert scaled == pytest.approx([0, 0, 0.5, 1, 1])
    assert scaled.dtype == np.float32
