"""A message on the wire: the fact's name and body, and the way it came."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Final = 1
MAX_PARENTS: Final = 32


class Failure(BaseModel):
    """Why a message went to the dead letters, as the worker that gave it up saw it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    """`bug`, `retries-exhausted`, `over-budget`, `newer-schema`, `unreadable` or, by the broker, `delivery-limit`."""
    reason: str
    traceback: str = ""
    service: str = ""


class Envelope(BaseModel):
    """A fact under way. `parents` are the message ids that led here, the oldest first."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = SCHEMA_VERSION
    message_type: str
    body: dict[str, Any]
    message_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    parents: tuple[str, ...] = ()
    attempt: int = 1
    published_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    failure: Failure | None = None

    @classmethod
    def of(cls, fact: BaseModel, *, parent: Envelope | None = None) -> Envelope:
        """A new envelope around a fact, a child of the message that was being handled."""
        parents = () if parent is None else (*parent.parents, parent.message_id)[-MAX_PARENTS:]
        return cls(message_type=type(fact).__name__, body=fact.model_dump(mode="json"), parents=parents)

    def again(self) -> Envelope:
        """The same message for its next attempt."""
        return self.model_copy(update={"attempt": self.attempt + 1, "published_at": datetime.now(UTC)})

    def failed(self, failure: Failure) -> Envelope:
        """The same message on its way to the dead letters."""
        return self.model_copy(update={"failure": failure})

    def to_bytes(self) -> bytes:
        """The JSON on the wire."""
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Envelope:
        """The envelope in the JSON; ValueError (pydantic) where it is none."""
        return cls.model_validate_json(data)
