"""The broker over RabbitMQ.

One I/O thread owns the connection, pika's event loop and every channel; all other threads hand it small calls. So a
handler that computes for an hour costs no heartbeat, publishes of several threads share one connection, and confirms
come in while others are still being sent. When the connection is lost the thread connects again (exponential backoff
with jitter), declares what was declared, consumes what was consumed and sends again what was not confirmed; deliveries
of the lost connection are forgotten, since the broker delivers them again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Annotated, Any, Final

import pika
import pika.exceptions
import pika.spec
from pika.adapters.select_connection import IOLoop
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from shared.pipeline.broker import DELIVERY_LIMIT, Depth
from shared.pipeline.errors import BrokerUnavailable, FractureSweepError, Unroutable

LOG = logging.getLogger("fracture_sweep.rabbit_broker")

EXCHANGE: Final = "fracture"
UNLIMITED: Final = 1_000_000_000
"""Delivery limit of a dead-letter queue: RabbitMQ 4 would otherwise drop a letter after 20 deliveries."""
CONSUMER_TIMEOUT_SECONDS: Final = 6 * 3600.0
"""Longest time between delivery and acknowledgement, longer than the longest case."""
_BACKOFF_SECONDS: Final = (0.2, 20.0)
_CHANNEL_PAUSE_SECONDS: Final = 1.0


def _env(name: str) -> dict[str, Any]:
    return {"env": name}


class BrokerSettings(BaseModel):
    """Where RabbitMQ is and how it is spoken to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="localhost", description="Host of RabbitMQ.", json_schema_extra=_env("RABBITMQ_HOST"))
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=5672, description="Port of RabbitMQ (5671 is usual with TLS).", json_schema_extra=_env("RABBITMQ_PORT")
    )
    username: str | None = Field(
        default=None, description="User of RabbitMQ; there is no default.", json_schema_extra=_env("RABBITMQ_USERNAME")
    )
    password: SecretStr | None = Field(
        default=None, description="Its password.", json_schema_extra=_env("RABBITMQ_PASSWORD")
    )
    virtual_host: str = Field(
        default="/", description="Virtual host of RabbitMQ.", json_schema_extra=_env("RABBITMQ_VIRTUAL_HOST")
    )
    url: SecretStr | None = Field(
        default=None, description="An amqp(s):// address instead of the five above; for tests."
    )
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = Field(
        default="", description="Put before the names of exchange and queues, so that two systems share one broker."
    )
    declare_queues: bool = Field(
        default=True,
        description="Make exchange and queues where they are not there. A user of least privilege may not: then the "
        "broker's own definitions make them, and false looks whether they are there.",
        json_schema_extra=_env("RABBITMQ_DECLARE_QUEUES"),
    )
    heartbeat_seconds: Annotated[int, Field(ge=1, le=600)] = Field(
        default=30, description="After two of these without a sign of life the connection counts as lost."
    )
    confirm_timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=60.0, description="How long a publish may wait for the broker's confirm, reconnecting included."
    )
    connect_timeout_seconds: Annotated[float, Field(gt=0, le=300)] = Field(
        default=10.0, description="How long the first connection may take."
    )
    consumer_timeout_seconds: Annotated[float, Field(ge=60, le=7 * 86400)] = Field(
        default=CONSUMER_TIMEOUT_SECONDS,
        description="Longest time between delivery and acknowledgement; longer than the longest case. RabbitMQ 4 takes "
        "it from here, older ones from their own consumer_timeout.",
    )
    tls: bool = Field(default=False, description="Speak TLS.")
    tls_ca_file: Path | None = Field(
        default=None, description="Certificates that are trusted (PEM) instead of the system's."
    )

    def parameters(self) -> pika.ConnectionParameters:
        """What pika connects with; FractureSweepError where no user is named."""
        if self.url is not None:
            parameters = pika.URLParameters(self.url.get_secret_value())
        else:
            if self.username is None or self.password is None:
                raise FractureSweepError(
                    "no user of RabbitMQ is named: set RABBITMQ_USERNAME and RABBITMQ_PASSWORD (or "
                    "RABBITMQ_PASSWORD_FILE)"
                )
            parameters = pika.ConnectionParameters(
                host=self.host,
                port=self.port,
                virtual_host=self.virtual_host,
                credentials=pika.PlainCredentials(self.username, self.password.get_secret_value()),
            )
            if self.tls:
                context = _trusting(self.tls_ca_file)
                parameters.ssl_options = pika.SSLOptions(context, self.host)
        parameters.heartbeat = self.heartbeat_seconds
        parameters.socket_timeout = self.connect_timeout_seconds
        parameters.stack_timeout = self.connect_timeout_seconds
        parameters.connection_attempts = 1
        return parameters


def _trusting(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except OSError as error:
        raise BrokerUnavailable(
            f"the certificates in {ca_file} for RabbitMQ cannot be read: {error.strerror}"
        ) from error


class _Publication:
    """A message on its way to the broker; `done` is resolved by its confirm."""

    def __init__(self, number: int, exchange: str, routing_key: str, body: bytes, delay_seconds: float) -> None:
        self.exchange = exchange
        self.routing_key = routing_key
        self.body = body
        self.done: Future[None] = Future()
        self.number = number
        self.returned = False
        self.properties = pika.BasicProperties(
            content_type="application/json",
            delivery_mode=pika.DeliveryMode.Persistent.value,
            correlation_id=str(number),
            expiration=str(max(1, round(delay_seconds * 1000))) if delay_seconds > 0 else None,
        )

    def resolve(self, error: Exception | None = None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)


class RabbitDelivery:
    """One receipt of a message from RabbitMQ."""

    def __init__(
        self, subscription: RabbitSubscription, channel: Any, tag: int, body: bytes, headers: Mapping[str, Any]
    ) -> None:
        self._subscription = subscription
        self._channel = channel
        self._tag = tag
        self.body = body
        self.delivery_count = int(headers.get("x-delivery-count", 0))
        self.death = _death(subscription.queue, subscription.prefix, headers)

    @property
    def queue(self) -> str:
        """The queue that it came from."""
        return self._subscription.queue

    def ack(self) -> None:
        """It is done; nothing where the channel that it came on is gone."""
        self._subscription.settle(self._channel, self._tag, again=False)

    def requeue(self) -> None:
        """Give it back to the queue at once; this counts as a delivery."""
        self._subscription.settle(self._channel, self._tag, again=True)


class RabbitSubscription:
    """Messages of one queue of RabbitMQ, on a channel of its own.

    `channel`, `tag` and `opening` belong to the I/O thread; buffer and states are guarded by `changed`.
    """

    def __init__(self, broker: RabbitBroker, queue: str, prefetch: int) -> None:
        self._broker = broker
        self.queue = queue
        self.prefix = broker.settings.prefix
        self.prefetch = prefetch
        self.channel: Any = None
        self.tag = ""
        self.changed = threading.Condition()
        self.buffer: deque[RabbitDelivery] = deque()
        self.cancelling = False
        self.cancelled = False
        self.closed = False
        self.consuming: Future[None] = Future()

    def receive(self, timeout_seconds: float) -> RabbitDelivery | None:
        """The next message, or None when none came in time; after `cancel` what was prefetched, then None."""
        end = time.monotonic() + timeout_seconds
        with self.changed:
            while not self.buffer:
                left = end - time.monotonic()
                if self.cancelled or left <= 0:
                    return None
                self.changed.wait(left)
            return self.buffer.popleft()

    def cancel(self) -> None:
        """Take no new messages; what was prefetched can still be received and acknowledged."""
        with self.changed:
            if self.cancelling:
                return
            self.cancelling = True
        self._broker.cancel(self)

    @property
    def drained(self) -> bool:
        """Whether nothing more will be received."""
        with self.changed:
            return self.cancelled and not self.buffer

    def close(self) -> None:
        """End it; what is unacknowledged returns to the queue."""
        with self.changed:
            self.cancelling = True
            self.closed = True
        self._broker.end(self)

    def settle(self, channel: Any, tag: int, *, again: bool) -> None:
        """Acknowledge or give back one delivery (for RabbitDelivery)."""
        self._broker.settle(self, channel, tag, again=again)

    def arrived(self, delivery: RabbitDelivery) -> None:
        """A message was prefetched (I/O thread)."""
        with self.changed:
            self.buffer.append(delivery)
            self.changed.notify()

    def ended(self, *, lost: bool) -> None:
        """The consumer is cancelled, or its channel lost with all that was prefetched (I/O thread)."""
        with self.changed:
            if lost:
                self.channel = None
                self.buffer.clear()
            if self.cancelling:
                self.cancelled = True
            self.changed.notify_all()


class RabbitBroker:
    """A connection to RabbitMQ that mends itself; opened by its first use."""

    def __init__(self, settings: BrokerSettings) -> None:
        # pika tells each failed connection in seven lines; here it is one.
        logging.getLogger("pika").setLevel(logging.CRITICAL)
        self.settings = settings
        self._parameters = settings.parameters()
        self.address = f"{self._parameters.host}:{self._parameters.port}"
        self._exchange = settings.prefix + EXCHANGE
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._first: Future[None] = Future()
        self._loop: Any = None
        self._closing = threading.Event()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Publication] = {}
        self._topology: dict[str, tuple[str, ...]] = {}
        self._subscriptions: list[RabbitSubscription] = []
        self._ready = False
        self._blocked = False
        # The rest belongs to the I/O thread alone.
        self._connection: Any = None
        self._publisher: Any = None
        self._sent_tag = 0
        self._unconfirmed: dict[int, _Publication] = {}
        self._calls: set[Future[Any]] = set()
        self._failures = 0
        self._last_error: BaseException | None = None

    # -- any thread ------------------------------------------------------------------------------------------------

    def declare(self, queues: Mapping[str, Sequence[str]]) -> None:
        """Make exchange, queues, retry and dead-letter queues and bindings where they are not there yet."""
        self._open()
        topology = {queue: tuple(message_types) for queue, message_types in queues.items()}
        self._call(functools.partial(self._declare, topology), "declaring the queues")
        with self._lock:
            for queue, message_types in topology.items():
                self._topology[queue] = tuple(dict.fromkeys((*self._topology.get(queue, ()), *message_types)))

    def publish(self, message_type: str, body: bytes) -> None:
        """To every queue bound to the message type, confirmed; waits through a reconnect up to the confirm timeout."""
        self._send(self._exchange, message_type, body, 0.0, f"no queue is bound to {message_type}")

    def publish_to_queue(self, queue: str, body: bytes, *, delay_seconds: float = 0.0) -> None:
        """To one queue by name, confirmed; with a delay by way of `<queue>.retry`.

        A message cannot overtake another in `<queue>.retry`: a delay may last as long as a longer one before it.
        """
        target = f"{self.settings.prefix}{queue}" + (".retry" if delay_seconds > 0 else "")
        self._send(self._exchange, target, body, delay_seconds, f"there is no queue named {queue}")

    def subscribe(self, queue: str, *, prefetch: int) -> RabbitSubscription:
        """Begin to consume a queue."""
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, not {prefetch}")
        self._open()
        subscription = RabbitSubscription(self, queue, prefetch)
        with self._lock:
            self._subscriptions.append(subscription)
        self._post(lambda: self._consume(subscription))
        try:
            subscription.consuming.result(self.settings.confirm_timeout_seconds)
        except (FutureTimeoutError, FractureSweepError) as error:
            subscription.close()
            if isinstance(error, FractureSweepError):
                raise
            raise self._unavailable(f"consuming {queue} was not confirmed in time") from None
        return subscription

    def depths(self, queues: Sequence[str]) -> Mapping[str, Depth]:
        """How many messages are ready in the queues; AMQP does not tell of the unacknowledged ones."""
        self._open()
        found: dict[str, Depth] = {}
        self._call(functools.partial(self._look, tuple(queues), found), "asking for the queues' depths")
        return found

    def check(self) -> None:
        """BrokerUnavailable where there is no open connection, or the broker takes no messages."""
        self._open()
        if not self._ready:
            raise self._unavailable("the connection is lost and not yet back")
        if self._blocked:
            raise self._unavailable("it takes no messages now (memory or disk alarm)")

    def close(self) -> None:
        """Close the connection; unacknowledged deliveries return to their queues."""
        self._closing.set()
        self._post(self._shut)
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self.settings.connect_timeout_seconds + 5)
        with self._lock:
            waiting, self._waiting = list(self._waiting.values()), {}
        for publication in waiting:
            publication.resolve(self._unavailable("the connection was closed"))

    def cancel(self, subscription: RabbitSubscription) -> None:
        """Stop a consumer and wait until the broker says so (for RabbitSubscription)."""
        self._post(lambda: self._cancel(subscription))
        with subscription.changed:
            subscription.changed.wait_for(lambda: subscription.cancelled, self.settings.confirm_timeout_seconds)
            subscription.cancelled = True
            subscription.changed.notify_all()

    def end(self, subscription: RabbitSubscription) -> None:
        """Close a subscription's channel (for RabbitSubscription)."""
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
        done: Future[None] = Future()
        if self._post(lambda: self._close_channel(subscription, done)):
            with contextlib.suppress(FutureTimeoutError):
                done.result(self.settings.connect_timeout_seconds)
        subscription.ended(lost=True)

    def settle(self, subscription: RabbitSubscription, channel: Any, tag: int, *, again: bool) -> None:
        """Acknowledge or give back one delivery, returning when it was written to the socket (for RabbitSubscription).

        A worker that dies on the next message must not take this one's acknowledgement with it.
        """
        done: Future[None] = Future()

        def on_io_thread() -> None:
            if channel is subscription.channel and channel.is_open:
                if again:
                    channel.basic_nack(tag, requeue=True)
                else:
                    channel.basic_ack(tag)
            self._post(lambda: done.set_result(None))

        if self._post(on_io_thread):
            with contextlib.suppress(FutureTimeoutError):
                done.result(1.0)

    def _send(self, exchange: str, routing_key: str, body: bytes, delay_seconds: float, unroutable: str) -> None:
        self._open()
        publication = _Publication(next(self._numbers), exchange, routing_key, body, delay_seconds)
        with self._lock:
            self._waiting[publication.number] = publication
        self._post(lambda: self._publish(publication))
        try:
            publication.done.result(self.settings.confirm_timeout_seconds)
        except FutureTimeoutError:
            raise self._unavailable("a message was not confirmed in time") from None
        except Unroutable:
            raise Unroutable(f"{unroutable}: nobody would hear it") from None
        finally:
            with self._lock:
                self._waiting.pop(publication.number, None)

    def _call(self, call: Callable[[Future[Any]], None], what: str) -> None:
        done: Future[Any] = Future()

        def on_io_thread() -> None:
            if not self._ready:
                done.set_exception(self._unavailable("the connection is lost and not yet back"))
                return
            self._calls.add(done)
            call(done)

        if not self._post(on_io_thread):
            raise self._unavailable("the connection is lost and not yet back")
        try:
            done.result(self.settings.confirm_timeout_seconds)
        except FutureTimeoutError:
            raise self._unavailable(f"{what} was not confirmed in time") from None

    def _open(self) -> None:
        if self._closing.is_set():
            raise self._unavailable("the connection was closed")
        with self._lock:
            if self._thread is None or (not self._thread.is_alive() and not self._ready):
                self._first = Future()
                self._thread = threading.Thread(target=self._run, name="rabbitmq", daemon=True)
                self._thread.start()
            first = self._first
        try:
            first.result(self.settings.connect_timeout_seconds + 5)
        except FutureTimeoutError:
            raise self._unavailable("it did not answer in time") from None

    def _unavailable(self, why: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"RabbitMQ at {self.address}: {why}")

    def _post(self, call: Callable[[], None]) -> bool:
        with self._lock:
            if self._loop is None:
                return False
            self._loop.add_callback_threadsafe(self._safely(call))
            return True

    # -- the I/O thread --------------------------------------------------------------------------------------------

    def _safely(self, call: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(call)
        def safe(*arguments: Any) -> None:
            try:
                call(*arguments)
            except Exception as error:
                # An exception out of a callback would end the event loop; the connection is made anew instead.
                LOG.warning("the connection is given up", extra={"fields": {"error": type(error).__name__}})
                self._last_error = error
                self._give_up()

        return safe

    def _run(self) -> None:
        while not self._closing.is_set():
            loop = IOLoop()
            with self._lock:
                self._loop = loop
            try:
                self._connection = pika.SelectConnection(
                    self._parameters,
                    on_open_callback=self._safely(self._on_open),
                    on_open_error_callback=self._on_open_error,
                    on_close_callback=self._on_close,
                    custom_ioloop=loop,
                )
                loop.start()
            except Exception as error:
                self._last_error = error
            with self._lock:
                self._loop = None
                self._ready = False
            self._lost()
            with contextlib.suppress(Exception):
                loop.close()
            if not self._first.done():
                self._first.set_exception(self._unavailable(_why(self._last_error)))
                return
            if self._closing.is_set():
                return
            low, high = _BACKOFF_SECONDS
            pause = min(low * 2.0**self._failures, high) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
            self._failures += 1
            LOG.warning(
                "the connection to RabbitMQ is lost; connecting again",
                extra={"fields": {"why": _why(self._last_error), "in_seconds": round(pause, 2)}},
            )
            self._closing.wait(pause)

    def _on_open(self, connection: Any) -> None:
        connection.add_on_connection_blocked_callback(lambda *_: self._set_blocked(True))
        connection.add_on_connection_unblocked_callback(lambda *_: self._set_blocked(False))
        self._set_blocked(False)
        with self._lock:
            topology = dict(self._topology)
        if not topology:
            self._open_publisher()
            return
        declared: Future[Any] = Future()

        def on_declared(future: Future[Any]) -> None:
            error = future.exception()
            if error is None:
                self._open_publisher()
            else:
                LOG.error("declaring again failed", extra={"fields": {"why": str(error)}})
                self._give_up()

        declared.add_done_callback(on_declared)
        self._calls.add(declared)
        self._declare(topology, declared)

    def _on_open_error(self, connection: Any, error: BaseException) -> None:
        self._last_error = error
        connection.ioloop.stop()

    def _on_close(self, connection: Any, error: BaseException) -> None:
        self._last_error = error
        connection.ioloop.stop()

    def _set_blocked(self, blocked: bool) -> None:
        self._blocked = blocked
        if blocked:
            LOG.warning("RabbitMQ takes no messages now (memory or disk alarm)")

    def _give_up(self) -> None:
        connection = self._connection
        if connection is not None and connection.is_open:
            connection.close(320, "given up")
        elif connection is not None and not connection.is_closing:
            connection.ioloop.stop()

    def _shut(self) -> None:
        self._give_up()

    def _lost(self) -> None:
        self._publisher = None
        self._unconfirmed.clear()
        for call in list(self._calls):
            if not call.done():
                call.set_exception(self._unavailable("the connection was lost meanwhile"))
        self._calls.clear()
        with self._lock:
            subscriptions = list(self._subscriptions)
        for subscription in subscriptions:
            subscription.ended(lost=True)

    def _open_publisher(self) -> None:
        def on_channel(channel: Any) -> None:
            channel.add_on_close_callback(self._safely(self._on_publisher_closed))
            channel.add_on_return_callback(self._safely(self._on_returned))
            channel.confirm_delivery(self._safely(self._on_confirmed), self._safely(lambda _: on_ready(channel)))

        def on_ready(channel: Any) -> None:
            self._publisher = channel
            self._sent_tag = 0
            self._unconfirmed = {}
            self._failures = 0
            with self._lock:
                again = not self._ready and self._first.done()
                self._ready = True
                waiting = list(self._waiting.values())
                subscriptions = [one for one in self._subscriptions if one.channel is None]
            if again:
                LOG.info("connected to RabbitMQ again")
            for publication in waiting:
                self._publish(publication)
            for subscription in subscriptions:
                self._consume(subscription)
            if not self._first.done():
                self._first.set_result(None)

        self._connection.channel(on_open_callback=self._safely(on_channel))

    def _on_publisher_closed(self, channel: Any, reason: Exception) -> None:
        self._publisher = None
        unconfirmed, self._unconfirmed = list(self._unconfirmed.values()), {}
        if isinstance(reason, pika.exceptions.ChannelClosedByBroker) and reason.reply_code in (403, 404):
            # Which of them it was the broker does not say. Refused ones are not sent again: it would refuse them again.
            gone = reason.reply_code == 404
            for publication in unconfirmed:
                publication.resolve(Unroutable("not declared") if gone else self._refused(reason))
        if self._connection is not None and self._connection.is_open:
            self._open_publisher()

    def _publish(self, publication: _Publication) -> None:
        if self._publisher is None or not self._publisher.is_open or publication.done.done():
            return
        if publication in self._unconfirmed.values():
            return
        with self._lock:
            if publication.number not in self._waiting:
                return
        self._sent_tag += 1
        self._unconfirmed[self._sent_tag] = publication
        publication.returned = False
        self._publisher.basic_publish(
            exchange=publication.exchange,
            routing_key=publication.routing_key,
            body=publication.body,
            properties=publication.properties,
            mandatory=True,
        )

    def _on_returned(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        with self._lock:
            publication = self._waiting.get(int(properties.correlation_id))
        if publication is not None:
            publication.returned = True

    def _on_confirmed(self, frame: Any) -> None:
        confirm = frame.method
        tags = (
            [tag for tag in self._unconfirmed if tag <= confirm.delivery_tag]
            if confirm.multiple
            else [confirm.delivery_tag]
        )
        for tag in tags:
            publication = self._unconfirmed.pop(tag, None)
            if publication is None:
                continue
            if isinstance(confirm, pika.spec.Basic.Nack):
                publication.resolve(self._unavailable("it refused a message (queue full or no quorum)"))
            elif publication.returned:
                publication.resolve(Unroutable("returned"))
            else:
                publication.resolve()

    def _consume(self, subscription: RabbitSubscription) -> None:
        if subscription.channel is not None or subscription.cancelling or not self._ready:
            return
        if self._connection is None or not self._connection.is_open:
            return
        queue = self.settings.prefix + subscription.queue

        def on_channel(channel: Any) -> None:
            channel.add_on_close_callback(self._safely(on_closed))
            channel.add_on_cancel_callback(self._safely(lambda _: channel.close()))
            channel.basic_qos(prefetch_count=subscription.prefetch, callback=self._safely(lambda _: start(channel)))

        def start(channel: Any) -> None:
            subscription.tag = channel.basic_consume(
                queue, self._safely(on_message), callback=self._safely(lambda _: on_consuming())
            )

        def on_consuming() -> None:
            if not subscription.consuming.done():
                subscription.consuming.set_result(None)

        def on_message(channel: Any, method: Any, properties: Any, body: bytes) -> None:
            delivery = RabbitDelivery(subscription, channel, method.delivery_tag, body, properties.headers or {})
            subscription.arrived(delivery)

        def on_closed(channel: Any, reason: Exception) -> None:
            if subscription.channel is not channel:
                return
            subscription.ended(lost=True)
            code = reason.reply_code if isinstance(reason, pika.exceptions.ChannelClosedByBroker) else 0
            if code == 404 and not subscription.consuming.done():
                subscription.consuming.set_exception(
                    FractureSweepError(f"there is no queue named {subscription.queue}: declare it first")
                )
            elif code == 403 and not subscription.consuming.done():
                subscription.consuming.set_exception(self._refused(reason))
            elif self._connection.is_open and not subscription.cancelling:
                LOG.warning(
                    "a consumer was closed by RabbitMQ; consuming again",
                    extra={"fields": {"queue": subscription.queue, "why": _why(reason)}},
                )
                self._connection.ioloop.call_later(
                    _CHANNEL_PAUSE_SECONDS, self._safely(lambda: self._consume(subscription))
                )

        subscription.channel = self._connection.channel(on_open_callback=self._safely(on_channel))

    def _cancel(self, subscription: RabbitSubscription) -> None:
        channel = subscription.channel
        if channel is None or not channel.is_open or not subscription.tag:
            subscription.ended(lost=False)
            return
        # Not channel.basic_cancel: it rejects what arrives before the broker's CancelOk, and a rejection counts as a
        # delivery; those messages are prefetched like the others and will be finished.
        channel._rpc(
            pika.spec.Basic.Cancel(consumer_tag=subscription.tag),
            self._safely(lambda _: subscription.ended(lost=False)),
            [(pika.spec.Basic.CancelOk, {"consumer_tag": subscription.tag})],
        )

    def _close_channel(self, subscription: RabbitSubscription, done: Future[None]) -> None:
        channel = subscription.channel
        if channel is None or not channel.is_open:
            done.set_result(None)
            return
        channel.add_on_close_callback(lambda *_: done.set_result(None))
        channel.close()

    def _declare(self, topology: Mapping[str, Sequence[str]], done: Future[Any]) -> None:
        prefix = self.settings.prefix

        def on_channel(channel: Any) -> None:
            channel.add_on_close_callback(lambda _, reason: self._finish(done, reason))
            if self.settings.declare_queues:
                channel.exchange_declare(self._exchange, "topic", durable=True, callback=_ignore)
            for queue, message_types in topology.items():
                for name, arguments in self.queue_arguments(queue).items():
                    if not self.settings.declare_queues:
                        channel.queue_declare(prefix + name, passive=True, callback=_ignore)
                        continue
                    channel.queue_declare(prefix + name, durable=True, arguments=arguments, callback=_ignore)
                    channel.queue_bind(prefix + name, self._exchange, prefix + name, callback=_ignore)
                for message_type in message_types if self.settings.declare_queues else ():
                    channel.queue_bind(prefix + queue, self._exchange, message_type, callback=_ignore)
            # Answered after all the others.
            channel.exchange_declare(self._exchange, passive=True, callback=lambda _: channel.close())

        self._connection.channel(on_open_callback=self._safely(on_channel))

    def queue_arguments(self, queue: str) -> Mapping[str, Mapping[str, Any]]:
        """The three queues of a queue, each with the arguments that it is declared with."""
        return queue_arguments(
            queue, prefix=self.settings.prefix, consumer_timeout_seconds=self.settings.consumer_timeout_seconds
        )

    def _look(self, queues: Sequence[str], found: dict[str, Depth], done: Future[Any]) -> None:
        def on_channel(channel: Any) -> None:
            channel.add_on_close_callback(lambda _, reason: self._finish(done, reason))
            for queue in queues:
                channel.queue_declare(
                    self.settings.prefix + queue, passive=True, callback=functools.partial(on_queue, queue)
                )
            channel.exchange_declare("amq.topic", passive=True, callback=lambda _: channel.close())

        def on_queue(queue: str, frame: Any) -> None:
            found[queue] = Depth(ready=frame.method.message_count, unacknowledged=0)

        self._connection.channel(on_open_callback=self._safely(on_channel))

    def _finish(self, done: Future[Any], reason: BaseException) -> None:
        self._calls.discard(done)
        if done.done():
            return
        if isinstance(reason, pika.exceptions.ChannelClosedByClient):
            done.set_result(None)
        else:
            done.set_exception(self._refused(reason))

    def _refused(self, reason: BaseException) -> FractureSweepError:
        if isinstance(reason, pika.exceptions.ChannelClosedByBroker):
            named = re.search(r"(queue|exchange) '([^']*)'", reason.reply_text)
            what = f"{named[1]} {named[2]}" if named else "a queue"
            match reason.reply_code:
                case 406:
                    argument = re.search(r"inequivalent arg '([^']*)'", reason.reply_text)
                    other = f" ({argument[1]} differs)" if argument else ""
                    return self._unavailable(
                        f"{what} was declared before with other arguments{other}: stop the workers, let the queue run "
                        "empty, delete it and start again, or choose another rabbitmq.prefix"
                    )
                case 404:
                    return self._unavailable(
                        f"{what} is not there: load the definitions that `fracture-sweep secrets` makes, or set "
                        "RABBITMQ_DECLARE_QUEUES=true"
                    )
                case 403:
                    return self._unavailable(
                        f"user {self._user()} may not use {what}: its permissions are those of another service, or are "
                        "not loaded (see docs/distributed.md)"
                    )
        return self._unavailable(_why(reason))

    def _user(self) -> str:
        return str(getattr(self._parameters.credentials, "username", self.settings.username))


def queue_arguments(
    queue: str, *, prefix: str = "", consumer_timeout_seconds: float = CONSUMER_TIMEOUT_SECONDS
) -> Mapping[str, Mapping[str, Any]]:
    """The three queues of a queue (without prefix) → the arguments that each is declared with.

    Each is bound to the exchange by its own name, and dead letters travel through the exchange too: so the exchange is
    all that a worker needs to write to, and the broker can hold it to its own routing keys.
    """
    # at-least-once: the broker keeps a dead letter until its target confirmed it; that needs reject-publish.
    safe = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": prefix + EXCHANGE,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    timeout = {"x-consumer-timeout": round(consumer_timeout_seconds * 1000)}
    name = prefix + queue
    return {
        f"{queue}.dead": {"x-queue-type": "quorum", "x-delivery-limit": UNLIMITED} | timeout,
        queue: safe | {"x-delivery-limit": DELIVERY_LIMIT, "x-dead-letter-routing-key": f"{name}.dead"} | timeout,
        f"{queue}.retry": safe | {"x-dead-letter-routing-key": name},
    }


def _ignore(_: Any) -> None:
    return


def _death(queue: str, prefix: str, headers: Mapping[str, Any]) -> str:
    if not queue.endswith(".dead"):
        return ""
    origin = prefix + queue.removesuffix(".dead")
    for death in headers.get("x-death", ()):
        if death.get("queue") == origin:
            return str(death.get("reason", ""))
    return ""


def _why(error: BaseException | None) -> str:
    """One clause about a connection's failure, without credentials."""
    causes: list[BaseException] = []
    unread = [error] if error is not None else []
    while unread:
        cause = unread.pop(0)
        causes.append(cause)
        for inner in (*getattr(cause, "exceptions", ()), getattr(cause, "exception", None), *cause.args):
            if isinstance(inner, BaseException) and inner not in causes:
                unread.append(inner)
    for cause in reversed(causes):
        match cause:
            case pika.exceptions.ProbableAuthenticationError() | pika.exceptions.AuthenticationError():
                return "it refused the user name or the password"
            case pika.exceptions.ProbableAccessDeniedError():
                return "it refused the virtual host (is there one of that name, and may the user enter it?)"
            case pika.exceptions.ConnectionClosedByBroker() | pika.exceptions.ChannelClosedByBroker():
                if cause.reply_code == 403:
                    return "it refused the user name or the password"
                if cause.reply_code == 530:
                    return "it refused the virtual host (is there one of that name, and may the user enter it?)"
                return f"it closed the connection ({cause.reply_code} {cause.reply_text})"
            case pika.exceptions.AMQPHeartbeatTimeout():
                return "its heartbeat stopped"
            case ConnectionRefusedError():
                return "nothing listens there (connection refused)"
            case ssl.SSLError():
                return f"TLS failed ({cause.reason})"
            case OSError() if cause.strerror:
                return cause.strerror
    return "it cannot be reached" if error is None else f"it cannot be reached ({type(error).__name__})"
