"""Errors named by what happens next. The worker loop is the one place that interprets them.

Which layer retries what: handlers never loop over a failing call themselves; they raise Retry, and the worker
publishes the message again, later and at most `max_attempts` times. The broker and store clients retry a lost
connection alone.
"""

from __future__ import annotations

from typing import Final, Literal

Exhausted = Literal["retries-exhausted", "over-budget"]
"""The kinds of a dead letter that may follow from trying in vain."""
RETRIES_EXHAUSTED: Final = "retries-exhausted"
OVER_BUDGET: Final = "over-budget"


class FractureSweepError(Exception):
    """An error with one clear sentence for the user; the command line prints it and exits with 2."""


class Retry(Exception):
    """The same message may succeed later: published again with attempt + 1, dead-lettered after the last attempt.

    `exhausted` is the kind of that dead letter, where something better is known than that it was tried in vain.
    """

    def __init__(
        self, reason: str, *, after_seconds: float | None = None, exhausted: Exhausted = RETRIES_EXHAUSTED
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after_seconds = after_seconds
        self.exhausted = exhausted


class Reject(Exception):
    """The input is refused for good: the terminal record is written with these reasons, first the leading one."""

    def __init__(self, reason: str, *more: str) -> None:
        super().__init__(reason)
        self.reasons: tuple[str, ...] = (reason, *more)


class OverBudget(Exception):
    """A case used more time or memory than it may: dead-lettered with that reason, not tried again.

    What its handler yielded before is told first: of a series, the cases that kept within the budget.
    """


class NewerSchema(FractureSweepError):
    """A message or a record of a newer version than this one: dead-lettered so, to be replayed after the upgrade."""


class BrokerUnavailable(FractureSweepError):
    """The broker cannot be reached, or did not confirm in time."""


class Unroutable(FractureSweepError):
    """No queue is bound to the message's type: declared nothing, or a type that topology.py does not know."""


class StoreUnavailable(FractureSweepError):
    """The store cannot be reached or refuses the credentials."""


class NotInStore(KeyError):
    """No object lies under this key."""


class StoreFull(Retry):
    """The store has no room; the message is tried again later, as often as when the store is away."""
