"""Why a message ends at the dead letters: every kind that there is, and what a person does about it.

One list, so that the worker, the recorder, the command line and the runbook (docs/runbook.md, held to it by a test)
cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

Kind = Literal["bug", "retries-exhausted", "over-budget", "newer-schema", "unreadable"]
"""What a worker gives a message up for."""

Death = Literal["delivery-limit", "expired", "maxlen", "rejected"]
"""What the broker gives a message up for; but for the first, somebody has put a policy on the queues."""

KINDS: Final[tuple[str, ...]] = (*get_args(Kind), *get_args(Death))
"""Every kind of a dead letter."""

WHAT_TO_DO: Final[Mapping[str, str]] = {
    "bug": "read the traceback, have it mended, upgrade, replay",
    "retries-exhausted": "mend what the reason names (store, bundle, memory), replay",
    "over-budget": "look at the case; raise the budget where the case deserves it, replay",
    "newer-schema": "upgrade the service that gave it up, replay",
    "unreadable": "find out who published it; it cannot be scored",
    "delivery-limit": "look whether its workers ran out of memory; give them more, replay",
    "expired": "take the policy off the queues (message-ttl), replay",
    "maxlen": "take the policy off the queues (max-length), replay",
    "rejected": "find the foreign consumer that refused it, replay",
}
"""One line for each kind; the runbook has the rest."""


def kind_of(death: str) -> str:
    """The kind of what the broker itself gave up, by the reason in its `x-death` header."""
    return death.replace("_", "-")


def reason_of_death(kind: str, *, queue: str, deliveries: int = 0) -> str:
    """What is known of a message that the broker gave up: nothing of its workers' ends, which nobody saw."""
    if kind == "delivery-limit":
        times = f"all {deliveries} times" if deliveries else "each time"
        return (
            f"its worker died or let it go {times} that {queue} delivered it; how is not known here: out of memory is "
            "the usual cause"
        )
    if kind == "unreadable":
        return "the message is not readable"
    return f"the broker gave it up ({kind})"
