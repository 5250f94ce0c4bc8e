"""A message on the wire: the fact's name, version and body, and the way it came.

Two versions travel (docs/decisions/0012-message-versions.md): that of the envelope, and that of the fact in it. Who
meets a newer one than it knows, or a field that it does not know, never guesses: NewerSchema. What an older reader does
not know of an envelope rides along when it passes the message on, so that a replay after the upgrade finds it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.pipeline.errors import NewerSchema

SCHEMA_VERSION: Final = 1
"""Of the envelope: raised only where an older reader would misread it."""
MAX_PARENTS: Final = 32


class Failure(BaseModel):
    """Why a message went to the dead letters, as the worker that gave it up saw it."""

    model_config = ConfigDict(frozen=True, extra="allow")

    kind: str
    """One of `failures.KINDS`, or one that a newer version knows."""
    reason: str
    traceback: str = ""
    service: str = ""


class Envelope(BaseModel):
    """A fact under way. `parents` are the message ids that led here, the oldest first."""

    model_config = ConfigDict(frozen=True, extra="allow")

    schema_version: int = SCHEMA_VERSION
    message_type: str
    fact_version: int = 1
    """Of the fact in `body` (`version_of` its class when it was told)."""
    body: dict[str, Any]
    message_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    parents: tuple[str, ...] = ()
    attempt: int = 1
    published_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    failure: Failure | None = None

    @classmethod
    def of(cls, fact: BaseModel, *, parent: Envelope | None = None) -> Envelope:
        """A new envelope around a fact, a child of the message that was being handled.

        A field at its default is not sent: so an older reader meets a new field only where it says something.
        """
        parents = () if parent is None else (*parent.parents, parent.message_id)[-MAX_PARENTS:]
        return cls(
            message_type=type(fact).__name__,
            fact_version=version_of(type(fact)),
            body=fact.model_dump(mode="json", exclude_defaults=True),
            parents=parents,
        )

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


def version_of(fact_class: type[BaseModel]) -> int:
    """The version of a fact's schema: its class variable `VERSION`, 1 where it has none."""
    return int(getattr(fact_class, "VERSION", 1))


def open_fact(envelope: Envelope, facts: Mapping[str, type[BaseModel]]) -> BaseModel:
    """The fact in an envelope, read with the classes that this version knows.

    NewerSchema where a newer version told it: a newer envelope or fact, a type or a field that is unknown here.
    ValueError (without anything of what stood in it) where the body is no such fact.
    """
    if envelope.schema_version > SCHEMA_VERSION:
        raise newer_envelope(envelope.schema_version)
    fact_class = facts.get(envelope.message_type)
    if fact_class is None:
        raise _newer("no message of this type is known here")
    if envelope.fact_version > version_of(fact_class):
        raise _newer(
            f"version {envelope.fact_version} of {envelope.message_type} is newer than {version_of(fact_class)}, the "
            "newest that is known here"
        )
    try:
        return fact_class.model_validate_json(json.dumps(envelope.body))
    except ValidationError as error:
        if only_unknown_fields(error):
            raise _newer(
                f"this {envelope.message_type} has fields that are not known here ({error.error_count()})"
            ) from None
        raise ValueError(f"not a {envelope.message_type}: {faults(error)}") from None


def newer_envelope(version: int) -> NewerSchema:
    """That an envelope is of a newer version."""
    return _newer(f"message schema {version} is newer than {SCHEMA_VERSION}, the newest that is known here")


def _newer(what: str) -> NewerSchema:
    return NewerSchema(f"{what}: upgrade this service, then replay the dead letter")


def schema_version_in(data: bytes) -> int | None:
    """The schema version that a JSON object says it has; None where it says none."""
    try:
        document = json.loads(data)
    except ValueError:
        return None
    version = document.get("schema_version") if isinstance(document, dict) else None
    return version if isinstance(version, int) else None


def only_unknown_fields(error: ValidationError) -> bool:
    """Whether fields that the model does not have are all that is wrong: the mark of a newer writer."""
    return all(part["type"] == "extra_forbidden" for part in error.errors(include_input=False, include_url=False))


def faults(error: ValidationError) -> str:
    """The first faults of a document, each as place and kind, without any value."""
    return "; ".join(
        f"{'.'.join(map(str, part['loc'])) or 'document'}: {part['type']}"
        for part in error.errors(include_input=False, include_context=False, include_url=False)[:5]
    )
