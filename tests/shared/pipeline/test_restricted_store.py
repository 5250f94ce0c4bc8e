from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.pipeline.errors import FractureSweepError, NotInStore
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.restricted_store import HEADER, KEY_CHECK, RestrictedAccess, RestrictedStore

PREFIXES = ("identities/", "named/")
SENTINEL = b"DOE^SENTINEL^JANE"
KEY = bytes(range(32))


@pytest.fixture
def raw(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def store(raw: FolderStore) -> RestrictedStore:
    return RestrictedStore(raw, PREFIXES, KEY)


def test_no_byte_of_a_restricted_object_lies_open_in_the_raw_store(raw: FolderStore, store: RestrictedStore) -> None:
    store.put("identities/a.json", SENTINEL)
    store.put("named/reports/b", SENTINEL * 1000)

    files = [path for path in raw.root.rglob("*") if path.is_file()]
    assert len(files) == 3  # with the key check
    assert not any(b"SENTINEL" in path.read_bytes() for path in files)
    assert not any(KEY[:8] in path.read_bytes() for path in files)
    assert store.get("identities/a.json") == SENTINEL


def test_what_is_not_restricted_passes_through_as_it_is(raw: FolderStore, store: RestrictedStore) -> None:
    store.put("cases/a", b"open")
    store.put("identities-of-nobody/a", b"open")

    assert raw.get("cases/a") == raw.get("identities-of-nobody/a") == b"open"


def test_two_objects_of_equal_content_look_different(raw: FolderStore, store: RestrictedStore) -> None:
    store.put("identities/a", SENTINEL)
    store.put("identities/b", SENTINEL)

    assert raw.get("identities/a")[len(HEADER) :] != raw.get("identities/b")[len(HEADER) :]


def test_a_restricted_object_is_written_once(store: RestrictedStore) -> None:
    assert store.put("identities/a", b"first") is True
    assert store.put("identities/a", b"second") is False
    assert store.get("identities/a") == b"first"


def test_without_the_key_restricted_prefixes_are_closed_and_the_rest_is_open(
    raw: FolderStore, store: RestrictedStore
) -> None:
    store.put("identities/a", SENTINEL)
    store.put("cases/a", b"open")
    closed = RestrictedStore(raw, PREFIXES, None)

    for use in (
        lambda: closed.get("identities/a"),
        lambda: closed.put("identities/b", b""),
        lambda: closed.exists("identities/a"),
        lambda: closed.delete("identities/a"),
        lambda: closed.keys("identities/"),
        lambda: closed.keys("named/reports/"),
        lambda: closed.entries("identities/"),
    ):
        with pytest.raises(RestrictedAccess, match="given no encryption key"):
            use()
    closed.check()
    assert closed.get("cases/a") == b"open"
    assert closed.put("cases/b", b"") is True
    assert list(closed.keys("")) == ["cases/a", "cases/b", KEY_CHECK]
    assert [entry.key for entry in closed.entries("")] == list(closed.keys(""))
    assert list(closed.keys("ident")) == []
    assert store.get("identities/a") == SENTINEL


def test_another_key_is_refused_before_anything_is_written_with_it(raw: FolderStore, store: RestrictedStore) -> None:
    store.check()
    other = RestrictedStore(raw, PREFIXES, os.urandom(32))

    for use in (other.check, lambda: other.put("identities/b", b"")):
        with pytest.raises(RestrictedAccess, match="does not open with this encryption key") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not raw.exists("identities/b")


def test_a_wrong_key_opens_nothing_and_says_so(raw: FolderStore, store: RestrictedStore) -> None:
    store.put("identities/a", SENTINEL)
    other = RestrictedStore(raw, PREFIXES, os.urandom(32))

    with pytest.raises(FractureSweepError, match="does not open with this encryption key"):
        other.get("identities/a")


def test_an_object_moved_to_another_key_does_not_open(raw: FolderStore, store: RestrictedStore) -> None:
    store.put("identities/a", SENTINEL)
    raw.put("identities/b", raw.get("identities/a"))

    with pytest.raises(RestrictedAccess, match="changed or moved"):
        store.get("identities/b")


@settings(deadline=None)
@given(place=st.integers(min_value=0), bit=st.integers(0, 7), cut=st.booleans())
def test_a_changed_bit_or_a_missing_end_never_opens(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int, cut: bool
) -> None:
    raw = FolderStore(tmp_path_factory.mktemp("raw") / "store")
    store = RestrictedStore(raw, PREFIXES, KEY)
    store.put("identities/a", b"some content")
    sealed = bytearray(raw.get("identities/a"))
    if cut:
        del sealed[place % len(sealed) :]
    else:
        sealed[place % len(sealed)] ^= 1 << bit
    raw.put("identities/changed", bytes(sealed))
    raw.delete("identities/a")
    raw.put("identities/a", bytes(sealed))

    with pytest.raises(RestrictedAccess):
        store.get("identities/a")


def test_an_object_that_was_never_sealed_is_refused(raw: FolderStore, store: RestrictedStore) -> None:
    raw.put("identities/open", b"plain")
    raw.put("identities/newer", HEADER[:-1] + b"\x02" + bytes(40))

    with pytest.raises(RestrictedAccess, match="not encrypted"):
        store.get("identities/open")
    with pytest.raises(RestrictedAccess, match="newer version"):
        store.get("identities/newer")


def test_what_is_not_there_is_said_with_the_key_alone(store: RestrictedStore) -> None:
    with pytest.raises(NotInStore):
        store.get("identities/nothing")
    assert not store.exists("identities/nothing")


def test_a_key_of_another_length_and_a_prefix_without_slash_are_refused(raw: FolderStore) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        RestrictedStore(raw, PREFIXES, b"short")
    with pytest.raises(ValueError, match="slash"):
        RestrictedStore(raw, ("identities",), KEY)
