"""What Kubernetes and Prometheus ask of a worker: alive, ready and why not, metrics."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from shared.pipeline.errors import FractureSweepError

_OK = "ok"


class HealthServer:
    """/healthz, /readyz and /metrics on a port of their own.

    `checks` raise the reason why the worker is not ready; what they say is kept for `cache_seconds`, so that probes
    cost the broker and the store nothing. `alive` False makes /healthz fail, and Kubernetes restart the worker.
    """

    def __init__(
        self,
        *,
        checks: Mapping[str, Callable[[], None]],
        registry: CollectorRegistry,
        alive: Callable[[], bool] = lambda: True,
        cache_seconds: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checks = checks
        self._registry = registry
        self._alive = alive
        self._cache_seconds = cache_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._answers: dict[str, str] | None = None
        self._asked_at = 0.0
        self._server: ThreadingHTTPServer | None = None

    @property
    def port(self) -> int:
        """The port that it listens on (0 while it does not)."""
        return 0 if self._server is None else int(self._server.server_address[1])

    def start(self, *, host: str, port: int) -> None:
        """Listen (port 0: any free one); FractureSweepError where the port is taken."""
        health = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, content_type, body = health.answer(self.path.partition("?")[0])
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                return

        try:
            self._server = ThreadingHTTPServer((host, port), Answers)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise FractureSweepError(f"cannot listen on {host}:{port} for health and metrics: {reason}") from error
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def readiness(self) -> Mapping[str, str]:
        """Each check's name → `ok` or why not."""
        with self._lock:
            now = self._clock()
            if self._answers is None or now - self._asked_at >= self._cache_seconds:
                self._answers = {name: _ask(check) for name, check in self._checks.items()}
                self._asked_at = self._clock()
            return dict(self._answers)

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body for a path."""
        if path == "/healthz":
            alive = self._alive()
            return _json(HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE, {"alive": alive})
        if path == "/readyz":
            answers = self.readiness()
            ready = all(answer == _OK for answer in answers.values())
            return _json(
                HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, {"ready": ready, "checks": answers}
            )
        if path == "/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        return _json(HTTPStatus.NOT_FOUND, {"paths": ["/healthz", "/readyz", "/metrics"]})


def _ask(check: Callable[[], None]) -> str:
    try:
        check()
    except FractureSweepError as error:
        return str(error)
    except Exception as error:
        return f"the check failed: {type(error).__name__}"
    return _OK


def _json(status: HTTPStatus, document: Mapping[str, object]) -> tuple[HTTPStatus, str, bytes]:
    return status, "application/json", json.dumps(document).encode()
