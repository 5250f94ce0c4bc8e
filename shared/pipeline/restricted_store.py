"""A store whose restricted prefixes are encrypted at rest, and closed to whoever has no key.

AES-256-GCM with a random nonce for each object and the object's own key (its name) as associated data: bytes moved to
another name, or changed, do not open. Everything outside the restricted prefixes passes through as it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.pipeline.errors import FractureSweepError, NewerSchema, NotInStore
from shared.pipeline.store import Entry, Store, check_key, check_prefix

HEADER: Final = b"\x93sealed\x01"
"""What a sealed object begins with; its last byte is the version of the format."""

KEY_CHECK: Final = "site/restricted-key-check"
"""A sealed object that tells another encryption key from the store's own before anything is written."""

KEY_BYTES: Final = 32
_NONCE_BYTES = 12


class RestrictedAccess(FractureSweepError):
    """A restricted object was asked for without the key, or cannot be opened with this one."""


class NewerSeal(RestrictedAccess, NewerSchema):
    """A restricted object was sealed by a newer version."""


class RestrictedStore:
    """A store around another. `prefixes` end in a slash; `key` has 32 bytes, or None for a service without access."""

    def __init__(self, inner: Store, prefixes: Sequence[str], key: bytes | None) -> None:
        if key is not None and len(key) != KEY_BYTES:
            raise ValueError(f"an encryption key has {KEY_BYTES} bytes, this one has {len(key)}")
        if not all(prefix.endswith("/") for prefix in prefixes):
            raise ValueError("a restricted prefix ends in a slash")
        self._inner = inner
        self._prefixes = tuple(check_prefix(prefix) for prefix in prefixes)
        self._cipher = None if key is None else AESGCM(key)
        self._checking = threading.Lock()
        self._key_checked = False

    def put(self, key: str, data: bytes) -> bool:
        """Write an object unless the key is taken; sealed where it is restricted."""
        if not self._restricted(check_key(key)):
            return self._inner.put(key, data)
        self._check_key_once()
        return self._inner.put(key, self._seal(key, data))

    def get(self, key: str) -> bytes:
        """The object's bytes; NotInStore where there is none, RestrictedAccess where they cannot be opened."""
        if not self._restricted(check_key(key)):
            return self._inner.get(key)
        self._need_cipher()
        return self._open(key, self._inner.get(key))

    def exists(self, key: str) -> bool:
        """Whether an object lies under the key."""
        if self._restricted(check_key(key)):
            self._need_cipher()
        return self._inner.exists(key)

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that begin with the prefix, ascending; without a key those outside the restricted prefixes."""
        if self._restricted(check_prefix(prefix)):
            self._need_cipher()
        found = self._inner.keys(prefix)
        return found if self._cipher is not None else (key for key in found if not self._restricted(key))

    def entries(self, prefix: str) -> Iterator[Entry]:
        """What `keys` lists, each with its size (sealed) and the time it was written."""
        if self._restricted(check_prefix(prefix)):
            self._need_cipher()
        found = self._inner.entries(prefix)
        return found if self._cipher is not None else (one for one in found if not self._restricted(one.key))

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        if self._restricted(check_key(key)):
            self._need_cipher()
        self._inner.delete(key)

    def free_bytes(self) -> int | None:
        """As the inner store."""
        return self._inner.free_bytes()

    def check(self) -> None:
        """As the inner store, and RestrictedAccess where this store was written with another encryption key."""
        self._inner.check()
        if self._cipher is not None:
            self._check_key_once()

    # ----------------------------------------------------------------------------------------------------------------
    def _restricted(self, key: str) -> bool:
        return key.startswith(self._prefixes)

    def _need_cipher(self) -> AESGCM:
        if self._cipher is None:
            raise RestrictedAccess(
                f"the prefixes {', '.join(self._prefixes)} are restricted, and this service was given no encryption key"
            )
        return self._cipher

    def _check_key_once(self) -> None:
        self._need_cipher()
        with self._checking:
            if not self._key_checked:
                try:
                    sealed = self._inner.get(KEY_CHECK)
                except NotInStore:
                    if not self._inner.put(KEY_CHECK, self._seal(KEY_CHECK, b"key check")):
                        sealed = self._inner.get(KEY_CHECK)
                        self._open(KEY_CHECK, sealed)
                else:
                    self._open(KEY_CHECK, sealed)
                self._key_checked = True

    def _seal(self, key: str, data: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return HEADER + nonce + self._need_cipher().encrypt(nonce, data, HEADER + key.encode())

    def _open(self, key: str, sealed: bytes) -> bytes:
        if sealed[: len(HEADER)] != HEADER:
            if sealed[: len(HEADER) - 1] == HEADER[:-1]:
                raise NewerSeal("a restricted object was sealed by a newer version: update this service")
            raise RestrictedAccess("a restricted object is not encrypted: it was not written by this system")
        body = sealed[len(HEADER) :]
        try:
            return self._need_cipher().decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], HEADER + key.encode())
        except (InvalidTag, ValueError):
            raise RestrictedAccess(
                "a restricted object does not open with this encryption key: either the key is not the one that this "
                "store was written with, or the object was changed or moved"
            ) from None
