"""A store with one complete study, and the report-generator over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.pipeline.folder_store import FolderStore
from tests.services.report_generator.sample import SampleBundle


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture(scope="session")
def bundle() -> SampleBundle:
    return SampleBundle()
