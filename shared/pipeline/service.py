"""What a service is to the worker loop: a dictionary message → handler, and how much of it runs at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

Handler = Callable[[BaseModel], Iterable[BaseModel]]
"""Takes a fact, does its work, returns (or yields) the facts that follow from it. Raises Retry, Reject or OverBudget
(with that alone, what it yielded before is told); anything else is a bug. It finds its store and bundle in its own
closure, and may be run twice on the same fact."""

BatchHandler = Callable[[Sequence[BaseModel]], Sequence[Iterable[BaseModel] | Exception]]
"""Takes several facts of one type at once and returns, in the same order, what follows from each, or its exception."""


def _nothing() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How a batch handler's facts are gathered: up to `size`, waiting at most `wait_seconds` for the next."""

    handler: BatchHandler
    size: int
    wait_seconds: float


@dataclass(frozen=True, kw_only=True)
class Service:
    """One service. `queues` are consumed with `slots` deliveries under way at once, each on a thread of its own."""

    name: str
    queues: tuple[str, ...]
    messages: Mapping[str, type[BaseModel]]
    """Every fact's name on the wire → its class, for reading."""
    handlers: Mapping[type[BaseModel], Handler] = field(default_factory=dict)
    batches: Mapping[type[BaseModel], Batch] = field(default_factory=dict)
    """A type stands in `handlers` or here. A redelivered message is always handled alone."""
    rejected: Callable[[BaseModel, tuple[str, ...]], Iterable[BaseModel]]
    """Writes the terminal record of a refused input and returns the facts to tell."""
    slots: int = 1
    ready: Callable[[], None] = _nothing
    """Raises FractureSweepError with the reason while the service cannot work (model not loaded, …)."""
    close: Callable[[], None] = _nothing
    """Frees what the service holds (process pools)."""
    sees_identifiers: bool = False
    """Whether texts of unexpected exceptions may name a patient: then only their type and place are kept."""
