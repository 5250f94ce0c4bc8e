"""Fixtures and rules of the whole suite: real servers, the public data, nothing left out in silence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fixtures.rabbitmq import *  # noqa: F403
from tests.fixtures.runs import *  # noqa: F403
from tests.fixtures.s3 import *  # noqa: F403

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
UNDER_CI = os.environ.get("CI", "").lower() == "true"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the public data the tests that read it are left out with one line; under CI they run, and fail."""
    if SHARED_DATA.is_dir() or UNDER_CI:
        return
    reading = [item for item in items if item.get_closest_marker("shared_data")]
    if reading:
        items[:] = [item for item in items if item not in reading]
        config.hook.pytest_deselected(items=reading)
        config.stash[LEFT_OUT] = len(reading)


LEFT_OUT: pytest.StashKey[int] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say loudly what was left out."""
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        terminalreporter.write_line(
            f"LEFT OUT: {count} tests marked shared_data, because {SHARED_DATA} is not there", red=True
        )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.fail(f"{SHARED_DATA} is not there, and CI must read it")
    return SHARED_DATA
