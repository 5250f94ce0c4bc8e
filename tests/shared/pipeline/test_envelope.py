"""Envelopes: what goes over the wire comes back, and the chain of parents is bounded."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from shared.pipeline.envelope import MAX_PARENTS, Envelope, Failure, open_fact
from shared.pipeline.errors import NewerSchema

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


class Told(BaseModel):
    """A fact of the tests."""

    number: int


@given(body=st.dictionaries(st.text(), JSON, max_size=4), message_type=st.text(max_size=40))
def test_an_envelope_survives_the_wire(body: dict[str, object], message_type: str) -> None:
    envelope = Envelope(message_type=message_type, body=body).failed(Failure(kind="bug", reason="odd"))

    assert Envelope.from_bytes(envelope.to_bytes()) == envelope


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_envelope_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="Envelope"):
        Envelope.from_bytes(data)


def test_a_child_names_its_ancestors_the_oldest_first() -> None:
    first = Envelope.of(Told(number=1))
    second = Envelope.of(Told(number=2), parent=first)
    third = Envelope.of(Told(number=3), parent=second)

    assert third.parents == (first.message_id, second.message_id)


def test_the_chain_of_parents_keeps_the_nearest() -> None:
    envelope = Envelope.of(Told(number=0))
    for number in range(MAX_PARENTS + 5):
        parent, envelope = envelope, Envelope.of(Told(number=number), parent=envelope)

    assert len(envelope.parents) == MAX_PARENTS
    assert envelope.parents[-1] == parent.message_id


def test_the_next_attempt_is_the_same_message() -> None:
    envelope = Envelope.of(Told(number=1))

    again = envelope.again()

    assert (again.attempt, again.message_id, again.body) == (2, envelope.message_id, envelope.body)


def test_what_an_older_reader_does_not_know_of_an_envelope_rides_along() -> None:
    data = Envelope.of(Told(number=1)).to_bytes().replace(b'{"schema_version":1', b'{"hue":"red","schema_version":2')

    passed_on = Envelope.from_bytes(data).again().failed(Failure(kind="newer-schema", reason="newer")).to_bytes()

    passed = json.loads(passed_on)
    assert (passed["hue"], passed["schema_version"], passed["attempt"]) == ("red", 2, 2)


class Toned(Told):
    """The next version of a fact: a field more, whose default is what was meant before."""

    tone: str = "plain"


class Loud(Told):
    """A version that an older reader would misread."""

    VERSION: ClassVar[int] = 2


def test_a_new_field_is_sent_only_where_it_says_something() -> None:
    assert Envelope.of(Toned(number=1)).body == {"number": 1}
    assert Envelope.of(Toned(number=1, tone="high")).body == {"number": 1, "tone": "high"}


def test_a_newer_reader_reads_what_an_older_version_told() -> None:
    older = Envelope.of(Told(number=1)).model_copy(update={"message_type": "Toned"})

    assert open_fact(older, {"Toned": Toned}) == Toned(number=1, tone="plain")


def test_the_version_of_a_fact_travels_with_it() -> None:
    newer = Envelope.from_bytes(Envelope.of(Loud(number=1)).to_bytes())

    assert newer.fact_version == 2
    assert open_fact(newer, {"Loud": Loud}) == Loud(number=1)
    with pytest.raises(NewerSchema, match="version 2 of Loud is newer than 1"):
        open_fact(newer, {"Loud": Told})
