"""Envelopes: what goes over the wire comes back, and the chain of parents is bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from shared.pipeline.envelope import MAX_PARENTS, Envelope, Failure

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


def test_fields_of_a_newer_schema_are_left_alone() -> None:
    data = Envelope.of(Told(number=1)).to_bytes().replace(b'{"schema_version":1', b'{"hue":"red","schema_version":2')

    assert Envelope.from_bytes(data).schema_version == 2
