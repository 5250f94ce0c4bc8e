"""What a worker tells Prometheus. Labels are names of the system alone: never an id, whose number has no bound.

One registry a process, handed around: nothing is registered by importing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def process_registry() -> CollectorRegistry:
    """A new registry that also tells this process's memory, CPU time and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


class Metrics:
    """The metrics of the worker loop in one registry; several services of one process share them."""

    def __init__(self, registry: CollectorRegistry | None = None, *, version: str = "") -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._gauges: dict[str, Gauge] = {}
        self._messages = Counter(
            "fracture_sweep_messages_total",
            "Messages handled, by what became of them.",
            ("service", "type", "outcome"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "fracture_sweep_handling_seconds",
            "Time from receipt to acknowledgement (of a batch: of the whole batch).",
            ("service", "type"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "fracture_sweep_in_flight", "Messages being handled now.", ("service",), registry=self.registry
        )
        self._oldest = Gauge(
            "fracture_sweep_oldest_in_flight_seconds",
            "For how long the message that is longest being handled is so (0: none is).",
            ("service",),
            registry=self.registry,
        )
        self._retries = Counter(
            "fracture_sweep_retries_total", "Messages published again.", ("service", "type"), registry=self.registry
        )
        self._dead_letters = Counter(
            "fracture_sweep_dead_letters_total",
            "Messages that a worker gave up, by kind.",
            ("service", "type", "kind"),
            registry=self.registry,
        )
        self._batch_size = Histogram(
            "fracture_sweep_batch_size",
            "Messages handled in one batch.",
            ("service", "type"),
            buckets=_SIZES,
            registry=self.registry,
        )
        self._device = Gauge(
            "fracture_sweep_device_info",
            "1 for the device that the service really computes on.",
            ("service", "device"),
            registry=self.registry,
        )
        if version:
            build = Gauge("fracture_sweep_build_info", "1 for this version.", ("version",), registry=self.registry)
            build.labels(version=version).set(1)

    def start(self, service: str, count: int = 1) -> None:
        """So many messages were received and are now being handled."""
        self._in_flight.labels(service=service).inc(count)

    def oldest_in_flight(self, service: str, seconds: Callable[[], float]) -> None:
        """Ask `seconds`, whenever the metrics are read, for how long the oldest message is being handled."""
        self._oldest.labels(service=service).set_function(seconds)

    def finish(self, service: str, message_type: str, *, outcome: str, seconds: float) -> None:
        """One of them is done."""
        self._in_flight.labels(service=service).dec()
        self._messages.labels(service=service, type=message_type, outcome=outcome).inc()
        self._seconds.labels(service=service, type=message_type).observe(seconds)

    def retry(self, service: str, message_type: str) -> None:
        """A message was published again for another attempt."""
        self._retries.labels(service=service, type=message_type).inc()

    def dead_letter(self, service: str, message_type: str, *, kind: str) -> None:
        """A message was given up."""
        self._dead_letters.labels(service=service, type=message_type, kind=kind).inc()

    def batch(self, service: str, message_type: str, *, size: int) -> None:
        """A batch of so many messages was handled."""
        self._batch_size.labels(service=service, type=message_type).observe(size)

    def device(self, service: str, device: str) -> None:
        """The service computes on this device (`cpu`, `cuda`, …)."""
        self._device.labels(service=service, device=device).set(1)

    def gauge(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Gauge:
        """A gauge of one service's own, made at the first call and the same at each later one."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, documentation, labels, registry=self.registry)
        return self._gauges[name]

    def value(self, name: str, labels: Mapping[str, str] | None = None) -> float:
        """One sample as it stands now (0 where it was never touched)."""
        return self.registry.get_sample_value(name, dict(labels or {})) or 0.0
