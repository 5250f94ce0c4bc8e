"""The store in a folder: for one machine, or for several that share a file system with hard links.

An object is written aside, made durable, and then hard-linked to its final name. Linking creates a name or fails, and
never replaces one: that is what makes "written once" hold between processes, where a rename would overwrite. A reader
finds either no file or the whole of it. What a dead writer left aside is removed by age.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from shared.pipeline.errors import FractureSweepError, NotInStore, StoreFull, StoreUnavailable
from shared.pipeline.store import Entry, check_key, check_prefix

ASIDE: Final = ".aside"
"""The folder of unfinished objects under the root. No key begins with a dot, so none can lie there."""

LEFTOVER_SECONDS: Final = 24 * 3600.0
"""An unfinished object that was not written to for so long has lost its writer."""

_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,199}\Z")
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FOLDER_OF_A_KEY = "not a store key: one key is the folder of another"
_LINK_ATTEMPTS = 100


class FolderStore:
    """Objects as files `root/key`. The folder is made when it is not there (readable by its owner alone)."""

    def __init__(self, root: Path, *, leftover_seconds: float = LEFTOVER_SECONDS) -> None:
        self.root = root.absolute()
        self._aside = self.root / ASIDE
        self._leftover_seconds = leftover_seconds
        with self._explained():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._aside.mkdir(exist_ok=True)

    def put(self, key: str, data: bytes) -> bool:
        """Write an object unless the key is taken: True when written now, False when it was there already."""
        final = self.root / check_key(key)
        if self.exists(key):
            return False
        with self._explained():
            aside = self._write_aside(data)
            try:
                return self._link(aside, final)
            finally:
                with suppress(FileNotFoundError):
                    aside.unlink()

    def get(self, key: str) -> bytes:
        """The object's bytes; NotInStore where there is none."""
        path = self.root / check_key(key)
        with self._explained():
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                self._check_there()
                raise NotInStore(key) from None

    def exists(self, key: str) -> bool:
        """Whether an object lies under the key."""
        path = self.root / check_key(key)
        with self._explained():
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                self._check_there()
                return False
            return not _is_folder(found)

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys that begin with the prefix, ascending; one folder is read at a time."""
        folder, _, beginning = check_prefix(prefix).rpartition("/")
        return self._walk(folder + "/" if folder else "", beginning)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """What `keys` lists, each with its size and the time it was written."""
        found = map(self._entry, self.keys(prefix))
        return (entry for entry in found if entry is not None)

    def delete(self, key: str) -> None:
        """Remove an object, and folders that are empty then; nothing happens where there is none."""
        path = self.root / check_key(key)
        with self._explained():
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                self._check_there()
                return
            except OSError:
                if path.is_dir():
                    return
                raise
            for folder in path.parents:
                if folder == self.root or not _remove_empty(folder):
                    _sync_folder(folder)
                    break

    def free_bytes(self) -> int | None:
        """What the folder's file system has left for this user (a quota of the user's own is not seen)."""
        with self._explained():
            self._check_there()
            return shutil.disk_usage(self.root).free

    def check(self) -> None:
        """Write, link and remove a probe, and clear what dead writers left; see the contract for the errors."""
        with self._explained():
            self._check_there()
            self._remove_leftovers()
            probe = self._write_aside(b"probe")
            linked = probe.with_suffix(".linked")
            try:
                self._hard_link(probe, linked)
                linked.unlink()
            finally:
                probe.unlink()

    # ----------------------------------------------------------------------------------------------------------------
    def _write_aside(self, data: bytes) -> Path:
        path = self._aside / uuid.uuid4().hex
        self._check_there()
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with open(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        return path

    def _link(self, aside: Path, final: Path) -> bool:
        for _ in range(_LINK_ATTEMPTS):
            try:
                self._make_folders(final.parent)
                self._hard_link(aside, final)
                won: bool | None = True
            except FileNotFoundError:
                won = None
            except NotADirectoryError:
                raise ValueError(_FOLDER_OF_A_KEY) from None
            except FileExistsError:
                won = _won_after_all(aside, final)
            if won is not None:
                _sync_folder(final.parent)
                return won
        raise StoreUnavailable(f"the store folder {self.root} is being emptied by another program: stop that first")

    def _hard_link(self, path: Path, link: Path) -> None:
        try:
            os.link(path, link)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            raise FractureSweepError(
                f"the file system of the store folder {self.root} has no hard links ({os.strerror(error.errno)}), so "
                "nothing can be written once there: put the store on a local disk (ext4, xfs, btrfs, zfs) or NFS, or "
                "use an S3 server"
            ) from None

    def _make_folders(self, folder: Path) -> None:
        if folder == self.root or folder.is_dir():
            return
        self._make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)

    def _walk(self, folder: str, beginning: str) -> Iterator[str]:
        with self._explained():
            try:
                with os.scandir(self.root / folder) as found:
                    names = [
                        entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name
                        for entry in found
                        if entry.name.startswith(beginning) and _NAME.match(entry.name)
                    ]
            except (FileNotFoundError, NotADirectoryError):
                self._check_there()
                return
        for name in sorted(names):  # with its slash a folder sorts where its keys do: a-b < a.b < a/b < a0
            if name.endswith("/"):
                yield from self._walk(folder + name, "")
            else:
                yield folder + name

    def _entry(self, key: str) -> Entry | None:
        """The entry of a listed key; None where it went away meanwhile."""
        with self._explained():
            try:
                found = (self.root / key).stat()
            except (FileNotFoundError, NotADirectoryError):
                self._check_there()
                return None
        return Entry(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))

    def _remove_leftovers(self) -> None:
        oldest = time.time() - self._leftover_seconds
        with os.scandir(self._aside) as found:
            for entry in found:
                with suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime < oldest:
                        os.unlink(entry.path)

    def _check_there(self) -> None:
        if not self._aside.is_dir():
            raise StoreUnavailable(
                f"the store folder {self.root} is gone ({ASIDE} is missing in it): is its disk still mounted?"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """OSErrors in the body become the store's own errors. They never name a key's file."""
        try:
            yield
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else type(error).__name__
            if error.errno in _FULL:
                raise StoreFull(f"the store folder {self.root} has no room: {why}") from None
            if error.errno == errno.EXDEV:
                raise FractureSweepError(
                    f"a folder inside the store folder {self.root} lies on another file system: mount it as a whole"
                ) from None
            if error.errno in (errno.EACCES, errno.EROFS):
                raise StoreUnavailable(
                    f"the store folder {self.root} cannot be used by user {os.geteuid()}: {why}; give it read and "
                    "write permission, or choose another folder"
                ) from None
            raise StoreUnavailable(f"the store folder {self.root} cannot be used: {why}") from None


def _won_after_all(aside: Path, final: Path) -> bool | None:
    """After "exists": whether the final name is ours, or None where it (or its folder) went away meanwhile."""
    try:
        found = final.stat()
    except (FileNotFoundError, NotADirectoryError):
        if any(parent.is_file() for parent in final.parents):
            raise ValueError(_FOLDER_OF_A_KEY) from None
        return None
    if _is_folder(found):
        raise ValueError(_FOLDER_OF_A_KEY)
    # over NFS a link that worked is answered with "exists" when its first answer was lost
    return os.path.samestat(found, aside.stat())


def _is_folder(found: os.stat_result) -> bool:
    return stat.S_ISDIR(found.st_mode)


def _remove_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
