"""The whole pipeline in one process: the same services and worker loop, each on a thread, over a MemoryBroker."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from shared.pipeline.broker import Depth, Subscription
from shared.pipeline.memory_broker import MemoryBroker
from shared.pipeline.worker import Runs


class Counted:
    """A MemoryBroker that counts what is published, so that a progress bar can be drawn without asking the store."""

    def __init__(self, inner: MemoryBroker) -> None:
        self.inner = inner
        self._lock = threading.Lock()
        self._published: Counter[str] = Counter()

    def published(self) -> Mapping[str, int]:
        """How many messages of each type were published so far."""
        with self._lock:
            return dict(self._published)

    def declare(self, queues: Mapping[str, Sequence[str]]) -> None:
        """As the broker inside."""
        self.inner.declare(queues)

    def publish(self, message_type: str, body: bytes) -> None:
        """As the broker inside, counted."""
        self.inner.publish(message_type, body)
        with self._lock:
            self._published[message_type] += 1

    def publish_to_queue(self, queue: str, body: bytes, *, delay_seconds: float = 0.0) -> None:
        """As the broker inside."""
        self.inner.publish_to_queue(queue, body, delay_seconds=delay_seconds)

    def subscribe(self, queue: str, *, prefetch: int) -> Subscription:
        """As the broker inside."""
        return self.inner.subscribe(queue, prefetch=prefetch)

    def depths(self, queues: Sequence[str]) -> Mapping[str, Depth]:
        """As the broker inside."""
        return self.inner.depths(queues)

    def check(self) -> None:
        """As the broker inside."""
        self.inner.check()

    def close(self) -> None:
        """As the broker inside."""
        self.inner.close()


class Embedded:
    """Workers at work on one MemoryBroker, from `with` to its end; leaving it drains what was prefetched."""

    def __init__(self, broker: Counted, workers: Sequence[Runs]) -> None:
        self.broker = broker
        self._workers = workers
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Embedded:
        for number, worker in enumerate(self._workers):
            thread = threading.Thread(target=worker.run, args=(self._stop,), name=f"worker-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.broker.close()

    def wait_until_idle(self, tick: Callable[[], None] | None = None) -> None:
        """Wait until no queue holds a message, ready, under way or delayed; `tick` is called a few times a second.

        RuntimeError where a worker ended although nobody stopped it: then nothing would ever become idle.
        """
        while not self.broker.inner.wait_until_idle(1.0, tick=tick):
            self.check()

    def check(self) -> None:
        """RuntimeError where a worker ended although nobody stopped it."""
        if not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError("a worker of the embedded run ended by itself; the log has its last lines")
