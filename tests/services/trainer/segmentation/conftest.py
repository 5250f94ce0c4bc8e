from __future__ import annotations

from pathlib import Path

import pytest

from services.trainer.segmentation.anatomy import Anatomy, read_anatomy, save_anatomy, subjects
from tests.fixtures.label_maps import write_label_maps


@pytest.fixture(scope="session")
def label_maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("label-maps")
    write_label_maps(folder)
    return folder


@pytest.fixture(scope="session")
def anatomy(label_maps: Path) -> Anatomy:
    return read_anatomy(subjects(label_maps)[0])


@pytest.fixture(scope="session")
def anatomy_file(anatomy: Anatomy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("anatomies") / "drawn-1.npz"
    save_anatomy(anatomy, path)
    return path
