"""Feature vectors round-trip exactly and refuse what could not be read rightly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fracture.features import FeatureVector, dtl_names


def _vector(values: list[float], names: tuple[str, ...] | None = None) -> FeatureVector:
    return FeatureVector(
        kind="dtl", names=names or dtl_names(len(values)), values=np.array(values), protocol_hash="a" * 64
    )


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_every_finite_float_survives_to_the_last_bit(values: list[float]) -> None:
    vector = _vector(values)

    back = FeatureVector.from_bytes(vector.to_bytes())

    assert back.values.tobytes() == vector.values.tobytes()
    assert back == vector


def test_equal_vectors_give_equal_bytes_whatever_the_order_of_their_provenance() -> None:
    one = FeatureVector(kind="hcr", names=("a",), values=np.ones(1), protocol_hash="h", provenance={"x": "1", "y": "2"})
    two = FeatureVector(kind="hcr", names=("a",), values=np.ones(1), protocol_hash="h", provenance={"y": "2", "x": "1"})

    assert one.to_bytes() == two.to_bytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    with pytest.raises(ValueError, match="1 features are not finite: dtl_0001"):
        _vector([1.0, bad])


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="stand twice: a"):
        _vector([1.0, 2.0], names=("a", "a"))


def test_a_length_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        _vector([1.0, 2.0], names=("a",))


def test_the_values_cannot_be_changed_afterwards() -> None:
    vector = _vector([1.0])

    with pytest.raises(ValueError, match="read-only"):
        vector.values[0] = 2.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 0}, "schema 0 is unknown"),
        ({"schema": 2, "extra": 1}, "schema 2 is newer than 1"),
        ({"values": ["1.0"]}, "list of numbers"),
        ({"values": [True]}, "list of numbers"),
        ({"names": [1]}, "list of texts"),
        ({"kind": "other"}, "kind hcr or dtl"),
        ({"extra": 1}, "has the fields"),
    ],
)
def test_bytes_that_are_no_vector_are_refused(change: dict[str, object], says: str) -> None:
    raw = json.loads(_vector([1.0]).to_bytes()) | change

    with pytest.raises(ValueError, match=says):
        FeatureVector.from_bytes(json.dumps(raw).encode())


def test_bytes_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match="is JSON"):
        FeatureVector.from_bytes(b"\x80\x04")
