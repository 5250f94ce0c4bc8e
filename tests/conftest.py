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
    """What cannot run here is left out with one line; under CI tests of the public data run all the same, and fail."""
    left_out = config.stash.setdefault(LEFT_OUT, {})
    if not SHARED_DATA.is_dir() and not UNDER_CI:
        left_out["shared_data"] = f"{SHARED_DATA} is not there"
    if "NNUNET_ENVIRONMENT" not in os.environ:
        left_out["nnunet"] = "NNUNET_ENVIRONMENT names no environment with nnU-Net (make nnunet-check makes one)"
    gone = [item for item in items if any(item.get_closest_marker(marker) for marker in left_out)]
    for marker in list(left_out):
        count = sum(item.get_closest_marker(marker) is not None for item in gone)
        left_out[marker] = f"{count} tests marked {marker}, because {left_out[marker]}" if count else ""
    if gone:
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=gone)


LEFT_OUT: pytest.StashKey[dict[str, str]] = pytest.StashKey()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say loudly what was left out."""
    for line in filter(None, config.stash.get(LEFT_OUT, {}).values()):
        terminalreporter.write_line(f"LEFT OUT: {line}", red=True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.fail(f"{SHARED_DATA} is not there, and CI must read it")
    return SHARED_DATA
