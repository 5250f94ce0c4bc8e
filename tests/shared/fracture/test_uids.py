from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import UID

from shared.fracture.uids import OUR_IMPLEMENTATION_CLASS_UID, OUR_UID_ROOT, deterministic_uid, is_our_uid


@given(st.text(max_size=20), st.lists(st.integers(), max_size=3))
def test_every_uid_of_ours_is_valid_ours_and_the_same_again(kind: str, parts: list[int]) -> None:
    uid = deterministic_uid(kind, *parts)

    assert UID(uid).is_valid
    assert len(uid) <= 64
    assert is_our_uid(uid)
    assert uid == deterministic_uid(kind, *parts)
    assert uid not in (deterministic_uid(kind, *parts, "more"), OUR_IMPLEMENTATION_CLASS_UID)


def test_uids_of_others_are_not_ours() -> None:
    assert not is_our_uid("2.25.1234")
    assert not is_our_uid("")
    assert UID(OUR_IMPLEMENTATION_CLASS_UID).is_valid
    assert OUR_UID_ROOT.endswith(".")
