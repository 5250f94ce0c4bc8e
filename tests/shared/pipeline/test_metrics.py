"""Metrics: counted where they belong, and no id in any label."""

from __future__ import annotations

from prometheus_client import generate_latest

from shared.pipeline.metrics import Metrics, process_registry


def test_a_handled_message_is_counted_timed_and_no_longer_in_flight() -> None:
    metrics = Metrics()

    metrics.start("resampler")
    metrics.finish("resampler", "MasksReady", outcome="done", seconds=1.5)

    labels = {"service": "resampler", "type": "MasksReady"}
    assert metrics.value("fracture_sweep_messages_total", labels | {"outcome": "done"}) == 1
    assert metrics.value("fracture_sweep_handling_seconds_sum", labels) == 1.5
    assert metrics.value("fracture_sweep_in_flight", {"service": "resampler"}) == 0


def test_device_and_version_are_told() -> None:
    metrics = Metrics(version="1.2.3")

    metrics.device("deep-extractor", "cpu")

    assert metrics.value("fracture_sweep_device_info", {"service": "deep-extractor", "device": "cpu"}) == 1
    assert metrics.value("fracture_sweep_build_info", {"version": "1.2.3"}) == 1


def test_two_registries_share_nothing() -> None:
    first, second = Metrics(), Metrics()

    first.retry("resampler", "MasksReady")

    assert second.value("fracture_sweep_retries_total", {"service": "resampler", "type": "MasksReady"}) == 0


def test_the_process_itself_is_measured() -> None:
    assert b"process_resident_memory_bytes" in generate_latest(process_registry())
