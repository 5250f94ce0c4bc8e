"""The broker: durable queues bound to fact names, at-least-once delivery, dead letters.

Contract (tests/contract/test_broker.py holds every implementation to it):

- `declare` makes, for each queue, the queue itself (delivery limit 2 = three deliveries, then dead letter), a delayed
  queue `<queue>.retry` whose messages return to the queue, and `<queue>.dead`.
- `publish` returns after the broker has the message safe in every bound queue; Unroutable where no queue is bound,
  BrokerUnavailable where that could not be confirmed in time. A publish that failed may still have arrived.
- A delivery that was neither acknowledged nor dead-lettered when its subscription ends is delivered again, with
  `delivery_count` one higher.
- `Subscription.receive`, `Delivery.ack` and `publish` may be called from any thread; the connection is owned by one
  I/O thread, so that a long computation never costs the heartbeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

DELIVERY_LIMIT = 2
"""`x-delivery-limit`: redeliveries before the broker dead-letters on its own (so three deliveries)."""


class Delivery(Protocol):
    """One receipt of a message."""

    @property
    def queue(self) -> str:
        """The queue that it came from."""

    @property
    def body(self) -> bytes:
        """The message's bytes."""

    @property
    def delivery_count(self) -> int:
        """How often it was delivered before: 0 the first time."""

    @property
    def death(self) -> str:
        """For a dead letter that the broker itself put there: its reason (`delivery_limit`), else ''."""

    def ack(self) -> None:
        """It is done. Silently nothing where the connection it came on is gone (it will come again)."""

    def requeue(self) -> None:
        """Give it back to the queue at once; this counts as a delivery."""


class Subscription(Protocol):
    """Messages of one queue, at most `prefetch` of them unacknowledged."""

    def receive(self, timeout_seconds: float) -> Delivery | None:
        """The next message, or None when none came in time. After `cancel`: what had been prefetched, then None."""

    def cancel(self) -> None:
        """Take no new messages; what was prefetched can still be received and acknowledged."""

    @property
    def drained(self) -> bool:
        """Whether nothing more will be received: cancelled, and all that was prefetched was received."""

    def close(self) -> None:
        """End it; what is unacknowledged returns to the queue."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How full a queue is."""

    ready: int
    unacknowledged: int


class Broker(Protocol):
    """Any broker."""

    def declare(self, queues: Mapping[str, Sequence[str]]) -> None:
        """Make exchange, queues and bindings where they are not there yet (queue → message types)."""

    def publish(self, message_type: str, body: bytes) -> None:
        """To every queue bound to the message type, confirmed."""

    def publish_to_queue(self, queue: str, body: bytes, *, delay_seconds: float = 0.0) -> None:
        """To one queue by name (also `<queue>.dead`), confirmed; with a delay by way of `<queue>.retry`."""

    def subscribe(self, queue: str, *, prefetch: int) -> Subscription:
        """Begin to consume a queue."""

    def depths(self, queues: Sequence[str]) -> Mapping[str, Depth]:
        """How full the queues are, `<queue>.retry` too (unacknowledged may be 0 where the broker does not tell)."""

    def check(self) -> None:
        """BrokerUnavailable where there is no open connection."""

    def close(self) -> None:
        """Close the connection; unacknowledged deliveries return to their queues."""
