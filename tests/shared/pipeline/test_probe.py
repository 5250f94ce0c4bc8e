"""Docker's health check against a real health server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from shared.pipeline import probe
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.health import HealthServer


@pytest.fixture
def faults() -> list[str]:
    return []


@pytest.fixture
def server(faults: list[str]) -> Iterator[HealthServer]:
    def check() -> None:
        if faults:
            raise FractureSweepError(faults[0])

    server = HealthServer(checks={"store": check}, registry=CollectorRegistry(), cache_seconds=0.0)
    server.start(host="127.0.0.1", port=0)
    yield server
    server.stop()


def test_a_ready_worker_is_healthy(server: HealthServer) -> None:
    script = [sys.executable, "-IS", str(Path(probe.__file__)), str(server.port)]

    done = subprocess.run(script, capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert '"ready": true' in done.stdout


def test_a_worker_without_its_store_is_not_and_says_why(server: HealthServer, faults: list[str]) -> None:
    faults.append("the store is away")

    ready, said = probe.ask(server.port)

    assert not ready
    assert "the store is away" in said


def test_nobody_there_is_not_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["1"]) == 1

    assert "nothing answers on port 1" in capsys.readouterr().out
