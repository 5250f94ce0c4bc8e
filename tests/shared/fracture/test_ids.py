from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.fracture.ids import Pseudonyms, canonical_json, case_id, digest

KEY = bytes(range(32))


def test_another_key_gives_other_ids() -> None:
    one, other = Pseudonyms(KEY), Pseudonyms(KEY[::-1])

    assert one.study_id("1.2.3") != other.study_id("1.2.3")
    assert one.fingerprint != other.fingerprint


def test_the_same_uid_as_study_and_series_gives_two_ids() -> None:
    pseudonyms = Pseudonyms(KEY)

    assert pseudonyms.study_id("1.2.3") != pseudonyms.series_id("1.2.3")


def test_a_patient_id_of_another_issuer_is_another_patient() -> None:
    pseudonyms = Pseudonyms(KEY)

    assert pseudonyms.patient_id("7", "A") != pseudonyms.patient_id("7", "B")
    assert pseudonyms.patient_id("7A", "") != pseudonyms.patient_id("7", "A")


@given(st.lists(st.text(max_size=20), unique=True), st.randoms())
def test_an_image_hash_does_not_depend_on_the_order_of_instances(uids: list[str], random: object) -> None:
    shuffled = list(uids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert Pseudonyms(KEY).image_hash(uids) == Pseudonyms(KEY).image_hash(shuffled)


@given(st.lists(st.text(max_size=8), unique=True, min_size=1))
def test_one_instance_more_is_another_image(uids: list[str]) -> None:
    assert Pseudonyms(KEY).image_hash(uids) != Pseudonyms(KEY).image_hash([*uids, "one more uid"])


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Pseudonyms(b"short")


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"spacing": float("nan")})


@given(st.dictionaries(st.text(max_size=5), st.integers()))
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert digest(value) == digest(dict(reversed(list(value.items()))))


def test_another_mask_or_level_is_another_case() -> None:
    ids = {"series_id": "a", "image_hash": "b", "mask_hash": "c", "level": "L1"}

    assert len({case_id(**ids), case_id(**{**ids, "mask_hash": "d"}), case_id(**{**ids, "level": "L2"})}) == 3
