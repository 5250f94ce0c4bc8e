"""The broker inside one process: the embedded run's bus, and RabbitBroker's sibling under the same contract tests.

It keeps what the handlers rely on (prefetch, redelivery with a count, the delivery limit, dead letters, delayed
retries, Unroutable), so that a service that works here works over RabbitMQ. No thread is its own: delayed messages move
when somebody looks.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from shared.pipeline.broker import DELIVERY_LIMIT, Depth
from shared.pipeline.errors import BrokerUnavailable, FractureSweepError, Unroutable

Clock = Callable[[], float]


@dataclass(kw_only=True)
class _Message:
    body: bytes
    delivery_count: int = 0
    death: str = ""


@dataclass(kw_only=True)
class _Queue:
    name: str
    limited: bool
    ready: deque[_Message] = field(default_factory=deque)
    delayed: int = 0
    subscriptions: list[MemorySubscription] = field(default_factory=list)

    @property
    def unacknowledged(self) -> int:
        return sum(len(subscription.held) for subscription in self.subscriptions)


class MemoryDelivery:
    """One receipt of a message from a MemoryBroker."""

    def __init__(self, subscription: MemorySubscription, message: _Message) -> None:
        self._subscription = subscription
        self._message = message
        self.delivery_count = message.delivery_count
        self.death = message.death

    @property
    def queue(self) -> str:
        """The queue that it came from."""
        return self._subscription.queue

    @property
    def body(self) -> bytes:
        """The message's bytes."""
        return self._message.body

    def ack(self) -> None:
        """It is done; nothing where its subscription was closed."""
        self._subscription.settle(self._message, again=False)

    def requeue(self) -> None:
        """Give it back to the queue at once; this counts as a delivery."""
        self._subscription.settle(self._message, again=True)


class MemorySubscription:
    """Messages of one queue of a MemoryBroker, at most `prefetch` of them unacknowledged."""

    def __init__(self, broker: MemoryBroker, queue: str, prefetch: int) -> None:
        self._broker = broker
        self.queue = queue
        self.prefetch = prefetch
        self.buffer: deque[_Message] = deque()
        self.held: dict[int, _Message] = {}
        self.cancelled = False

    def receive(self, timeout_seconds: float) -> MemoryDelivery | None:
        """The next message, or None when none came in time; after `cancel` what was prefetched, then None."""
        message = self._broker.take(self, timeout_seconds)
        return None if message is None else MemoryDelivery(self, message)

    def cancel(self) -> None:
        """Take no new messages; what was prefetched can still be received and acknowledged."""
        self._broker.end(self, give_back=False)

    @property
    def drained(self) -> bool:
        """Whether nothing more will be received."""
        return self.cancelled and not self.buffer

    def close(self) -> None:
        """End it; what is unacknowledged returns to the queue."""
        self._broker.end(self, give_back=True)

    def settle(self, message: _Message, *, again: bool) -> None:
        """Acknowledge a held message, or give it back; nothing where it is no longer held."""
        self._broker.settle(self, message, again=again)


class MemoryBroker:
    """A broker in this process's memory; thread-safe, gone with the process."""

    def __init__(self, *, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        self._queues: dict[str, _Queue] = {}
        self._bindings: dict[str, list[str]] = {}
        self._delayed: list[tuple[float, int, str, bytes]] = []
        self._order = itertools.count()
        self._closed = False

    def declare(self, queues: Mapping[str, Sequence[str]]) -> None:
        """Make queues, their dead-letter queues and their bindings where they are not there yet."""
        with self._changed:
            self._check_open()
            for queue, message_types in queues.items():
                self._queues.setdefault(queue, _Queue(name=queue, limited=True))
                self._queues.setdefault(f"{queue}.dead", _Queue(name=f"{queue}.dead", limited=False))
                for message_type in message_types:
                    bound = self._bindings.setdefault(message_type, [])
                    if queue not in bound:
                        bound.append(queue)

    def publish(self, message_type: str, body: bytes) -> None:
        """To every queue bound to the message type; Unroutable where there is none."""
        with self._changed:
            self._check_open()
            bound = self._bindings.get(message_type)
            if not bound:
                raise Unroutable(f"no queue is bound to {message_type}: nobody would hear it")
            for queue in bound:
                self._arrive(self._queues[queue], _Message(body=body))

    def publish_to_queue(self, queue: str, body: bytes, *, delay_seconds: float = 0.0) -> None:
        """To one queue by name; with a delay it arrives that much later."""
        with self._changed:
            self._check_open()
            target = self._queue(queue)
            if delay_seconds > 0:
                target.delayed += 1
                heapq.heappush(self._delayed, (self._clock() + delay_seconds, next(self._order), queue, body))
                self._changed.notify_all()
            else:
                self._arrive(target, _Message(body=body))

    def subscribe(self, queue: str, *, prefetch: int) -> MemorySubscription:
        """Begin to consume a queue."""
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, not {prefetch}")
        with self._changed:
            self._check_open()
            subscription = MemorySubscription(self, queue, prefetch)
            source = self._queue(queue)
            source.subscriptions.append(subscription)
            self._hand_out(source)
            return subscription

    def depths(self, queues: Sequence[str]) -> Mapping[str, Depth]:
        """How full the queues are; `<queue>.retry` holds what waits for its retry."""
        with self._changed:
            self._move_due()
            return {queue: self._depth(queue) for queue in queues}

    def check(self) -> None:
        """BrokerUnavailable once it was closed."""
        with self._changed:
            self._check_open()

    def close(self) -> None:
        """End all subscriptions; unacknowledged deliveries return to their queues."""
        with self._changed:
            for queue in self._queues.values():
                for subscription in list(queue.subscriptions):
                    self.end(subscription, give_back=True)
            self._closed = True
            self._changed.notify_all()

    def idle(self, queues: Sequence[str] | None = None) -> bool:
        """Whether these queues (None: all, dead letters too) hold nothing ready, unacknowledged or delayed."""
        with self._changed:
            self._move_due()
            looked_at = list(self._queues.values()) if queues is None else [self._queue(queue) for queue in queues]
            return not any(queue.ready or queue.delayed or queue.unacknowledged for queue in looked_at)

    def wait_until_idle(
        self,
        timeout_seconds: float | None = None,
        *,
        queues: Sequence[str] | None = None,
        tick: Callable[[], None] | None = None,
        tick_seconds: float = 0.2,
    ) -> bool:
        """Wait until these queues are idle, calling `tick` about every `tick_seconds`: False when the time ran out."""
        end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            with self._changed:
                if self.idle(queues):
                    return True
                left = tick_seconds if end is None else min(tick_seconds, end - time.monotonic())
                if left <= 0:
                    return False
                self._changed.wait(left)
            if tick is not None:
                tick()

    def take(self, subscription: MemorySubscription, timeout_seconds: float) -> _Message | None:
        """The next prefetched message of a subscription (for MemorySubscription)."""
        end = time.monotonic() + timeout_seconds
        with self._changed:
            while True:
                due_in = self._move_due()
                if subscription.buffer:
                    return subscription.buffer.popleft()
                left = end - time.monotonic()
                if subscription.cancelled or self._closed or left <= 0:
                    return None
                self._changed.wait(left if due_in is None else min(left, due_in))

    def end(self, subscription: MemorySubscription, *, give_back: bool) -> None:
        """Cancel a subscription, or close it and give back what it holds (for MemorySubscription)."""
        with self._changed:
            queue = self._queue(subscription.queue)
            subscription.cancelled = True
            if give_back and subscription in queue.subscriptions:
                queue.subscriptions.remove(subscription)
                subscription.buffer.clear()
                held, subscription.held = list(subscription.held.values()), {}
                for message in reversed(held):
                    self._return(queue, message)
            self._hand_out(queue)
            self._changed.notify_all()

    def settle(self, subscription: MemorySubscription, message: _Message, *, again: bool) -> None:
        """Acknowledge or give back one held message (for MemorySubscription)."""
        with self._changed:
            if subscription.held.pop(id(message), None) is None:
                return
            queue = self._queue(subscription.queue)
            if again:
                self._return(queue, message)
            self._hand_out(queue)
            self._changed.notify_all()

    def _return(self, queue: _Queue, message: _Message) -> None:
        count = message.delivery_count + 1
        if queue.limited and count > DELIVERY_LIMIT:
            dead = _Message(body=message.body, death="delivery_limit")
            self._arrive(self._queues[f"{queue.name}.dead"], dead)
        else:
            queue.ready.appendleft(_Message(body=message.body, delivery_count=count, death=message.death))

    def _arrive(self, queue: _Queue, message: _Message) -> None:
        queue.ready.append(message)
        self._hand_out(queue)
        self._changed.notify_all()

    def _hand_out(self, queue: _Queue) -> None:
        open_ones = [s for s in queue.subscriptions if not s.cancelled and len(s.held) < s.prefetch]
        while queue.ready and open_ones:
            subscription = min(open_ones, key=lambda s: len(s.held))
            message = queue.ready.popleft()
            subscription.held[id(message)] = message
            subscription.buffer.append(message)
            if len(subscription.held) >= subscription.prefetch:
                open_ones.remove(subscription)

    def _move_due(self) -> float | None:
        now = self._clock()
        while self._delayed and self._delayed[0][0] <= now:
            _, _, name, body = heapq.heappop(self._delayed)
            queue = self._queues[name]
            queue.delayed -= 1
            self._arrive(queue, _Message(body=body))
        return self._delayed[0][0] - now if self._delayed else None

    def _depth(self, name: str) -> Depth:
        delaying = self._queues.get(name.removesuffix(".retry"))
        if name.endswith(".retry") and delaying is not None and delaying.limited:
            return Depth(ready=delaying.delayed, unacknowledged=0)
        queue = self._queue(name)
        return Depth(ready=len(queue.ready), unacknowledged=queue.unacknowledged)

    def _queue(self, name: str) -> _Queue:
        queue = self._queues.get(name)
        if queue is None:
            raise FractureSweepError(f"there is no queue named {name}: declare it first")
        return queue

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable("the broker in memory was closed")
