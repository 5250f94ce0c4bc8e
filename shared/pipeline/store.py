"""The store: objects written once under keys, read whole.

Contract (tests/contract/test_store.py holds every implementation to it): a reader never sees half an object; of two
writers of one key exactly one is told True; a key is lower-case letters, digits, `-`, `_`, `.` and `/`, without empty
parts, `.` or `..`; no key is the folder of another (`a` beside `a/b`: a file system cannot hold both, so ValueError);
`keys` and `entries` list in ascending order, page by page, without reading the objects. Any method raises
StoreUnavailable while the store cannot be reached, which the worker treats like Retry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple, Protocol

_KEY = re.compile(r"(?=.{1,512}\Z)[a-z0-9_-][a-z0-9._-]{0,199}(/[a-z0-9_-][a-z0-9._-]{0,199})*\Z")


def check_key(key: str) -> str:
    """The key itself; ValueError where it breaks the contract's alphabet."""
    if not _KEY.match(key):
        raise ValueError(f"not a store key: {key!r}")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself: empty, or the beginning of a key; ValueError where no key can begin with it."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


class Entry(NamedTuple):
    """One object in a listing: its key, its bytes as they lie there, and when it was written (UTC)."""

    key: str
    bytes: int
    modified_at: datetime


class Store(Protocol):
    """Any place that keeps objects."""

    def put(self, key: str, data: bytes) -> bool:
        """Write an object unless the key is taken: True when written now, False when it was there already."""

    def get(self, key: str) -> bytes:
        """The object's bytes; NotInStore where there is none."""

    def exists(self, key: str) -> bool:
        """Whether an object lies under the key."""

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that begin with the prefix, ascending."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """What `keys` lists, each with its size and the time it was written."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def free_bytes(self) -> int | None:
        """How many more bytes the store can take, or None where it cannot say."""

    def check(self) -> None:
        """StoreUnavailable where it cannot be used now, FractureSweepError where it never can (no conditional put)."""
