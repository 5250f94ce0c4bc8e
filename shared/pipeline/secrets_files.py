"""Secret files: 32 random bytes for a pseudonym key or an encryption key, made once and kept by the site.

Losing one cannot be mended (ids change, restricted objects stay closed), so a file is never replaced, and one that
other users could read is refused rather than used.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from shared.pipeline.errors import FractureSweepError

SECRET_BYTES: Final = 32


def make_secret_file(path: Path) -> bytes:
    """The secret in the file, which is made (64 hexadecimal digits, mode 0600) when it is not there."""
    if not path.exists():
        try:
            _create(path, secrets.token_hex(SECRET_BYTES).encode(), mode=0o600)
        except OSError as error:
            raise FractureSweepError(f"the secret file {path} cannot be made: {error.strerror}") from None
    return read_secret_file(path)


def keep_secret_text(path: Path, text: str) -> str:
    """What stands in the file, which is made with `text` when it is not there; never replaced.

    Every user may read the file itself, as containers must that run under another user: its folder keeps it (0700).
    """
    try:
        if not path.exists():
            _create(path, text.encode(), mode=0o444)
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise FractureSweepError(f"the secret file {path} cannot be made or read: {error.strerror}") from None


def read_secret_file(path: Path) -> bytes:
    """The 32 bytes of a secret file (raw, or as 64 hexadecimal digits); FractureSweepError where it cannot be used.

    The group may read it, because Kubernetes gives mounted secrets to a pod's group.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            mode = os.fstat(handle).st_mode
            content = file.read(4096)
    except OSError as error:
        raise FractureSweepError(f"the secret file {path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise FractureSweepError(f"the secret file {path} is not a file")
    if mode & 0o007:
        raise FractureSweepError(f"the secret file {path} is open to every user of this machine: chmod 600 {path}")
    if len(content) == SECRET_BYTES:
        return content
    try:
        secret = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise FractureSweepError(
            f"the secret file {path} does not hold {SECRET_BYTES} bytes or {2 * SECRET_BYTES} hexadecimal digits: "
            "restore it, or remove it to have a new one made (ids and restricted objects of the old one are lost then)"
        )
    return secret


def _create(path: Path, text: bytes, *, mode: int) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(handle, "wb") as file:
            file.write(text + b"\n")
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return  # another process made it meanwhile: that one counts
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        aside.unlink()
