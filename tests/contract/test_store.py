"""The contract of shared/pipeline/store.py, held by every store."""

from __future__ import annotations

import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.pipeline.errors import NotInStore
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.minio_store import MinioStore
from shared.pipeline.restricted_store import RestrictedStore
from shared.pipeline.store import Store, check_key, check_prefix
from tests.fixtures.memory_store import MemoryStore

STORES = ["folder", "memory", pytest.param("minio", marks=pytest.mark.s3), "restricted", "restricted-elsewhere"]


@pytest.fixture(scope="module", params=STORES)
def any_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store of each kind for the whole module: each test keeps to a prefix of its own."""
    kind: str = request.param
    if kind == "minio":
        server = request.getfixturevalue("s3_server")
        store: Store = MinioStore(server.settings(f"contract-{uuid.uuid4().hex[:12]}"))
    elif kind == "memory":
        store = MemoryStore()
    else:
        store = FolderStore(tmp_path_factory.mktemp(kind) / "store")
        if kind != "folder":
            prefixes = ("t/",) if kind == "restricted" else ("named/",)
            store = RestrictedStore(store, prefixes, os.urandom(32))
    store.check()
    return store


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


@pytest.fixture
def here() -> str:
    """A prefix that no other test uses."""
    return f"t/{uuid.uuid4().hex}/"


def test_what_was_put_is_read_back(store: Store, here: str) -> None:
    written = store.put(here + "a.json", b"one")

    assert written is True
    assert store.get(here + "a.json") == b"one"
    assert store.exists(here + "a.json")


def test_the_room_that_is_left_is_a_number_or_not_known(store: Store) -> None:
    free = store.free_bytes()

    assert free is None if isinstance(store, MinioStore) else free is not None and free > 0


def test_a_key_is_written_once(store: Store, here: str) -> None:
    store.put(here + "a", b"first")

    again = store.put(here + "a", b"second")

    assert again is False
    assert store.get(here + "a") == b"first"


def test_an_object_may_be_empty(store: Store, here: str) -> None:
    assert store.put(here + "empty", b"") is True
    assert store.get(here + "empty") == b""
    assert store.exists(here + "empty")
    assert store.put(here + "empty", b"more") is False
    assert list(store.keys(here)) == [here + "empty"]


def test_an_object_of_fifty_megabytes_comes_back_unchanged(store: Store, here: str) -> None:
    data = os.urandom(1 << 20) * 50

    written = store.put(here + "volume", data)
    again = store.put(here + "volume", data[:-1])

    assert (written, again) == (True, False)
    assert store.get(here + "volume") == data


def test_what_is_not_there_is_said(store: Store, here: str) -> None:
    store.put(here + "a/b", b"")

    for key in (here + "nothing", here + "a", here + "a/b/c", here + "no/such/folder"):
        assert not store.exists(key)
        with pytest.raises(NotInStore):
            store.get(key)


def test_deleting_twice_does_no_harm_and_frees_the_key(store: Store, here: str) -> None:
    store.put(here + "x/a", b"first")

    store.delete(here + "x/a")
    store.delete(here + "x/a")
    store.delete(here + "never")

    assert not store.exists(here + "x/a")
    assert list(store.keys(here)) == []
    assert store.put(here + "x/a", b"second") is True
    assert store.get(here + "x/a") == b"second"


def test_deleting_a_folder_of_keys_removes_none_of_them(store: Store, here: str) -> None:
    store.put(here + "a/b", b"kept")

    store.delete(here + "a")

    assert store.get(here + "a/b") == b"kept"


def test_a_key_that_is_the_folder_of_another_is_refused(store: Store, here: str) -> None:
    store.put(here + "a/b", b"")

    with pytest.raises(ValueError, match="folder of another"):
        store.put(here + "a", b"")


def test_keys_come_in_ascending_order_whatever_the_folders(store: Store, here: str) -> None:
    names = ["a/b", "a/c/d", "a-b", "a.b", "a-b.c/d", "a0", "a_", "a-/x", "b", "0", "-", "_/a"]
    for name in names:
        store.put(here + name, b"")

    found = list(store.keys(here))

    assert found == sorted(here + name for name in names)


def test_a_prefix_may_end_inside_a_name(store: Store, here: str) -> None:
    for name in ("case-1/a", "case-10", "case-2", "dog"):
        store.put(here + name, b"")

    assert list(store.keys(here + "case-1")) == [here + "case-1/a", here + "case-10"]
    assert list(store.keys(here + "case-1/")) == [here + "case-1/a"]
    assert list(store.keys(here + "cat")) == []
    assert list(store.keys(here + "dog/")) == []
    assert list(store.keys(here + "no/such/folder/")) == []


def test_entries_are_the_keys_with_size_and_time(store: Store, here: str) -> None:
    before = datetime.now(UTC) - timedelta(minutes=5)
    for name in ("a-b", "a/b", "a.b", "b/empty"):
        store.put(here + name, b"" if name == "b/empty" else name.encode() * 7)

    found = list(store.entries(here))

    assert [entry.key for entry in found] == list(store.keys(here)) == sorted(entry.key for entry in found)
    assert all(before < entry.modified_at < datetime.now(UTC) + timedelta(minutes=5) for entry in found)
    assert all(entry.modified_at.utcoffset() == timedelta(0) for entry in found)
    assert [entry.key for entry in store.entries(here + "a/")] == [here + "a/b"]
    assert list(store.entries(here + "nothing/")) == []


def test_an_entry_has_the_bytes_that_lie_there(store: Store, here: str) -> None:
    store.put(here + "small", b"")
    store.put(here + "large", bytes(100_000))

    large, small = store.entries(here)

    assert large.bytes - small.bytes == 100_000
    assert small.bytes in (0, 8 + 12 + 16)  # sealed: header, nonce and tag


def test_an_object_that_goes_away_while_it_is_listed_is_left_out_or_listed(store: Store, here: str) -> None:
    for i in range(30):
        store.put(f"{here}{i:02d}", b"x")

    found = []
    for entry in store.entries(here):
        found.append(entry.key)
        store.delete(f"{here}{len(found) + 5:02d}")

    assert found == sorted(set(found))
    assert {f"{here}{i:02d}" for i in range(6)} <= set(found)


def test_eleven_hundred_keys_are_listed_in_order_page_by_page(store: Store, here: str) -> None:
    keys = sorted(f"{here}{i // 100:02d}{'-x' if i % 3 else ''}/{i:05d}.json" for i in range(1100))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: store.put(key, b""), keys))

    found = list(store.keys(here))

    assert found == keys


def test_listing_goes_on_while_objects_come_and_go(store: Store, here: str) -> None:
    for i in range(40):
        store.put(f"{here}{i:02d}/x", b"")

    found = []
    for key in store.keys(here):
        found.append(key)
        store.delete(key)

    assert len(found) == 40
    assert list(store.keys(here)) == []


def test_of_sixteen_writers_one_wins_and_readers_see_whole_objects(store: Store, here: str) -> None:
    size = 8 << 20
    key = here + "raced"
    start = threading.Barrier(17)
    done = threading.Event()
    seen: list[tuple[int, int]] = []

    def write(n: int) -> bool:
        data = bytes([n]) * size
        start.wait()
        return store.put(key, data)

    def read() -> None:
        start.wait()
        while not done.is_set():
            try:
                data = store.get(key)
            except NotInStore:
                done.wait(0.002)
                continue
            seen.append((len(data), len(set(data[:: 1 << 12]))))
            done.wait(0.02)

    with ThreadPoolExecutor(17) as pool:
        reading = pool.submit(read)
        won = list(pool.map(write, range(16)))
        done.set()
        reading.result()

    assert won.count(True) == 1
    assert store.get(key) == bytes([won.index(True)]) * size
    assert all(length == size and values == 1 for length, values in seen)


def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(store: Store, here: str) -> None:
    def come_and_go(n: int) -> bool:
        key = f"{here}shared/{n % 4}/{n}"
        written = store.put(key, b"x")
        store.delete(key)
        return written and not store.exists(key)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(come_and_go, range(80)))


WEIRD = [
    "", "/", "/a", "a/", "a//b",
    ".", "..", "../a", "a/../b", "a/./b", ".hidden", "a/.b", ".aside/x", "A", "a b", "a\\b",
    "a\n", "ä", "a\x00", "a%2e%2e", "~", "a:b", "x" * 201, "/".join(["x" * 100] * 6),
]  # fmt: skip


@pytest.mark.parametrize("key", WEIRD)
def test_a_weird_key_is_refused_by_every_method(store: Store, key: str) -> None:
    for method in (store.get, store.exists, store.delete):
        with pytest.raises(ValueError, match="not a store key"):
            method(key)
    with pytest.raises(ValueError, match="not a store key"):
        store.put(key, b"")
    if key and not key.endswith("/"):
        with pytest.raises(ValueError, match="not a store key"):
            store.keys(key)


@pytest.mark.parametrize("prefix", ["..", "../", "/", "a//", "a/../", ".aside/"])
def test_a_weird_prefix_is_refused(store: Store, prefix: str) -> None:
    for method in (store.keys, store.entries):
        with pytest.raises(ValueError, match="not a store key"):
            method(prefix)


@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("./-_aA0"), max_size=40))
def test_a_checked_key_stays_below_the_root(text: str) -> None:
    root = Path("/root/store")
    try:
        key = check_key(text)
    except ValueError:
        return

    path = Path(os.path.normpath(root / key))

    assert path.relative_to(root).as_posix() == key
    assert key == key.lower()
    assert check_prefix(key) == key
    assert check_prefix(key + "/") == key + "/"


PARTS = st.from_regex(r"[a-c_-][a-c.-]{0,3}", fullmatch=True)
KEYS = st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), min_size=1, max_size=12, unique=True)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=KEYS)
def test_any_set_of_keys_is_listed_in_order(store: Store, names: list[str]) -> None:
    here = f"t/{uuid.uuid4().hex}/"
    apart = [name for name in names if not any(other.startswith(name + "/") for other in names)]
    for name in apart:
        store.put(here + name, name.encode())

    assert list(store.keys(here)) == sorted(here + name for name in apart)
    assert all(store.get(here + name) == name.encode() for name in apart)
