"""Where a bundle's files lie: in a folder, or in a zip with the same files at its top.

The zip of a bundle is always the same bytes: names in order, nothing compressed (compressors differ between machines,
and weights hardly shrink), no times, no owners. Reading trusts neither: a name that stands twice, a folder, a link, an
encrypted or compressed-away size are refused before anything is taken from it.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

MAX_FILE_BYTES: Final = 512 * 1024 * 1024
_NO_TIME: Final = (1980, 1, 1, 0, 0, 0)
_UNIX: Final = 3
_ENCRYPTED: Final = 1


class BundleError(Exception):
    """A bundle that must not be used; the message says why in one sentence."""


class BundleFiles(Protocol):
    """The files of a bundle, unverified. Names are as they lie there; BundleError where one is no plain file."""

    def names(self) -> frozenset[str]:
        """What lies there."""

    def read(self, name: str, *, most: int) -> bytes:
        """A file; BundleError where it is missing, no plain file, or larger than `most` bytes."""


class FolderFiles:
    """The files of a folder; links are not followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> frozenset[str]:
        """What lies in the folder."""
        return frozenset(entry.name for entry in self._folder.iterdir())

    def read(self, name: str, *, most: int) -> bytes:
        """A file of the folder."""
        path = self._folder / name
        try:
            found = path.lstat()
        except OSError as error:
            raise _missing(name) from error
        if not stat.S_ISREG(found.st_mode):
            raise _no_plain_file(name)
        if found.st_size > most:
            raise _too_large(name, found.st_size, most)
        return path.read_bytes()


class ZipFiles:
    """The files of a zip, opened anew for each reading."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> frozenset[str]:
        """What lies in the zip."""
        with self._opened() as archive:
            names = [entry.filename for entry in archive.infolist()]
        if len(set(names)) != len(names):
            raise BundleError(f"{self._path.name!r} holds a name twice")
        return frozenset(names)

    def read(self, name: str, *, most: int) -> bytes:
        """A file of the zip."""
        with self._opened() as archive:
            try:
                entry = archive.getinfo(name)
            except KeyError:
                raise _missing(name) from None
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if entry.is_dir() or kind not in (0, stat.S_IFREG) or entry.flag_bits & _ENCRYPTED:
                raise _no_plain_file(name)
            if entry.file_size > most:
                raise _too_large(name, entry.file_size, most)
            try:
                with archive.open(entry) as stream:
                    data = stream.read(most + 1)
            except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, ValueError) as error:
                raise BundleError(f"{name} in {self._path.name!r} cannot be read: {error}") from error
        if len(data) > most:
            raise _too_large(name, len(data), most)
        return data

    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise BundleError(f"{self._path.name!r} is no zip that can be read: {error}") from error


def files_of(path: Path) -> BundleFiles:
    """The files of a bundle's folder or zip; BundleError where neither is there."""
    if path.is_dir():
        return FolderFiles(path)
    if path.is_file():
        return ZipFiles(path)
    raise BundleError(f"there is no bundle folder and no zip named {path.name!r}")


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    """The zip of these files, written aside and renamed; the same files give the same bytes on every machine."""
    aside = path.with_name(path.name + ".part")
    with zipfile.ZipFile(aside, "w", compression=zipfile.ZIP_STORED) as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, date_time=_NO_TIME)
            entry.create_system = _UNIX
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, data)
    aside.replace(path)


def write_folder(folder: Path, files: Mapping[str, bytes], *, check: Callable[[Path], object]) -> None:
    """The folder of these files, in the place of one that is there; written aside, and renamed once `check` passes."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, data in files.items():
        (aside / name).write_bytes(data)
    check(aside)
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def _missing(name: str) -> BundleError:
    return BundleError(f"the bundle lacks {name}, which its manifest lists")


def _no_plain_file(name: str) -> BundleError:
    return BundleError(f"{name} in the bundle is a link, a folder or encrypted; only plain files are read")


def _too_large(name: str, size: int, most: int) -> BundleError:
    return BundleError(f"{name} has {size} bytes where the manifest says {most}")
