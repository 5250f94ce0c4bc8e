"""Health: alive, ready or why not, and the metrics."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from shared.pipeline.errors import BrokerUnavailable, FractureSweepError
from shared.pipeline.health import HealthServer
from shared.pipeline.metrics import Metrics


def fine() -> None:
    """A check that passes."""


def away() -> None:
    """A check that does not."""
    raise BrokerUnavailable("RabbitMQ at broker:5672: nothing listens there")


def broken() -> None:
    """A check that has a bug, whose text nobody vetted."""
    raise ValueError("DOE^JANE")


@pytest.fixture
def serve() -> Iterator[Callable[..., HealthServer]]:
    servers: list[HealthServer] = []

    def start(checks: Mapping[str, Callable[[], None]], **more: Any) -> HealthServer:
        server = HealthServer(checks=checks, registry=Metrics(version="1").registry, **more)
        server.start(host="127.0.0.1", port=0)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


def get(server: HealthServer, path: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_worker_that_can_work_is_alive_and_ready(serve: Callable[..., HealthServer]) -> None:
    server = serve({"broker": fine, "store": fine})

    assert get(server, "/healthz") == (200, b'{"alive": true}')
    status, body = get(server, "/readyz?verbose=1")
    assert (status, json.loads(body)["checks"]) == (200, {"broker": "ok", "store": "ok"})


def test_a_worker_that_cannot_says_why_without_a_text_that_nobody_vetted(serve: Callable[..., HealthServer]) -> None:
    server = serve({"broker": away, "model": broken, "store": fine})

    status, body = get(server, "/readyz")

    checks = json.loads(body)["checks"]
    assert status == 503
    assert checks["broker"] == "RabbitMQ at broker:5672: nothing listens there"
    assert checks["model"] == "the check failed: ValueError"
    assert get(server, "/healthz")[0] == 200


def test_a_worker_that_hangs_is_not_alive(serve: Callable[..., HealthServer]) -> None:
    assert get(serve({}, alive=lambda: False), "/healthz")[0] == 503


def test_checks_are_asked_seldom() -> None:
    asked: list[int] = []
    now = [0.0]
    server = HealthServer(
        checks={"store": lambda: asked.append(1)},
        registry=Metrics().registry,
        cache_seconds=3,
        clock=lambda: now[0],
    )

    server.readiness()
    server.readiness()
    now[0] = 3.0
    server.readiness()

    assert len(asked) == 2


def test_metrics_and_unknown_paths(serve: Callable[..., HealthServer]) -> None:
    server = serve({})

    assert b'fracture_sweep_build_info{version="1"} 1.0' in get(server, "/metrics")[1]
    assert get(server, "/elsewhere")[0] == 404


def test_a_taken_port_is_one_sentence(serve: Callable[..., HealthServer]) -> None:
    port = serve({}).port

    with pytest.raises(FractureSweepError, match=f"cannot listen on 127.0.0.1:{port}"):
        HealthServer(checks={}, registry=Metrics().registry).start(host="127.0.0.1", port=port)
