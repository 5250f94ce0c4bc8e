"""The distributed system's inbox: a folder or a CSV of pairs, uploaded whole, read by ingest, then emptied.

It lies under a restricted prefix and is encrypted at rest. A submission counts only when its list, written last, is
there; a half upload is resumed by submitting the same thing again. Two ingest workers keep apart by a lease that runs
out, so that a dead one blocks nobody.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict

from services.dicom_ingest.settings import GIB
from shared.fracture import keys
from shared.fracture.ids import Pseudonyms, digest, sha256_hex
from shared.fracture.records import Record
from shared.pipeline.errors import FractureSweepError, NotInStore
from shared.pipeline.store import Store
from shared.records.archive import find_record, read_record, write_record

PATH_COLUMNS = ("image", "mask", "body", "labels")
"""The columns of a CSV of pairs that name files."""


class SubmittedFile(BaseModel):
    """Restricted: one uploaded file under its path relative to what was submitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    key: str
    sha256: str


class Submission(Record):
    """Restricted: what was submitted, in order."""

    submission_id: str
    kind: Literal["folder", "pairs"]
    name: str
    files: tuple[SubmittedFile, ...]
    default_labels: str | None = None
    default_roi: str | None = None


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a submit did: of so many files it uploaded those that were not there."""

    submission_id: str
    files: int
    uploaded: int


class Lease(Record):
    """Who reads a submission until when."""

    owner: str
    until: datetime


def _walk(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def files_of_pairs(table: Path) -> tuple[str, list[tuple[str, Path]]]:
    """The CSV with its paths rewritten to the names that the files get in the inbox, and those files.

    A file or folder that a row names becomes `data/<n>/<name>`. Rows are not judged here: ingest does, all at once.
    """
    rows = list(csv.reader(io.StringIO(table.read_text(encoding="utf-8-sig"))))
    if not rows:
        raise FractureSweepError(f"{table} is empty: a CSV of pairs has a header line and one row an image")
    header = [name.strip() for name in rows[0]]
    names: dict[Path, str] = {}
    found: list[tuple[str, Path]] = []

    def renamed(value: str) -> str:
        path = (table.parent / value).resolve()
        if not value or not path.exists():
            return value
        if path not in names:
            names[path] = f"data/{len(names):06d}/{path.name}"
            if path.is_dir():
                found.extend((f"{names[path]}/{file.relative_to(path).as_posix()}", file) for file in _walk(path))
            else:
                found.append((names[path], path))
        return names[path]

    places = [index for index, name in enumerate(header) if name in PATH_COLUMNS]
    for row in rows[1:]:
        for place in places:
            if place < len(row):
                row[place] = ";".join(renamed(part.strip()) for part in row[place].split(";"))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue(), found


def submit(
    path: Path,
    *,
    name: str,
    store: Store,
    pseudonyms: Pseudonyms,
    default_labels: str | None = None,
    default_roi: str | None = None,
    min_free_bytes: int = 0,
    hashing: Callable[[int, int], None] = lambda done, total: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Submitted:
    """Upload a folder, or a CSV of pairs with all that it names. What is there already is not uploaded again.

    Each file is read twice: first all are hashed, for the submission's id is that of its contents; `hashing` and
    `progress` tell of the bytes read and uploaded. FractureSweepError, before anything is uploaded, where the store
    would have less than `min_free_bytes` left.
    """
    check_room(store, needed=0, min_free_bytes=min_free_bytes)
    contents: list[tuple[str, Path | bytes]]
    kind: Literal["folder", "pairs"]
    if path.is_dir():
        kind, contents = "folder", [(file.relative_to(path).as_posix(), file) for file in _walk(path)]
    else:
        text, files = files_of_pairs(path)
        kind, contents = "pairs", [("pairs.csv", text.encode()), *files]
    if not contents:
        raise FractureSweepError(f"{path} holds no file: nothing to submit")
    hashed: list[tuple[str, Path | bytes, str]] = []
    sizes = [len(source) if isinstance(source, bytes) else source.stat().st_size for _, source in contents]
    total = sum(sizes)
    read = 0
    for (relative, source), size in zip(contents, sizes, strict=True):
        hashed.append((relative, source, sha256_hex(_bytes_of(source))))
        read += size
        hashing(read, total)
    listing = [[relative, sha256] for relative, _, sha256 in hashed]
    options = {"labels": default_labels, "roi": default_roi}
    submission_id = pseudonyms.content_id("submission", digest([name, kind, listing, options]).encode())
    names = [keys.inbox_file(submission_id, number) for number in range(len(hashed))]
    there = set(store.keys(keys.inbox_files(submission_id))) & set(names)
    missing = sum(size for key, size in zip(names, sizes, strict=True) if key not in there)
    check_room(store, needed=missing, min_free_bytes=min_free_bytes)
    stored: list[SubmittedFile] = []
    sent = 0
    for key, (relative, source, sha256), size in zip(names, hashed, sizes, strict=True):
        if key not in there:
            data = _bytes_of(source)
            if sha256_hex(data) != sha256:
                raise FractureSweepError(
                    "a file changed while it was submitted: submit again when nothing writes there"
                )
            store.put(key, data)
        stored.append(SubmittedFile(path=relative, key=key, sha256=sha256))
        sent += size
        progress(sent, total)
    write_record(
        store,
        keys.inbox_submission(submission_id),
        Submission(
            submission_id=submission_id,
            kind=kind,
            name=name,
            files=tuple(stored),
            default_labels=default_labels,
            default_roi=default_roi,
        ),
    )
    return Submitted(submission_id=submission_id, files=len(names), uploaded=len(names) - len(there))


def check_room(store: Store, *, needed: int, min_free_bytes: int) -> None:
    """FractureSweepError where the store would have less than the watermark left; unknown room is enough."""
    free = store.free_bytes() if min_free_bytes else None
    if free is not None and free - needed < min_free_bytes:
        upload = f" and the upload needs {needed / GIB:.2f}" if needed else ""
        raise FractureSweepError(
            f"the store has {free / GIB:.2f} GiB left{upload}, with a watermark of {min_free_bytes / GIB:g} GiB "
            "(pressure.min_free_gib): make room, or submit less at a time"
        )


def _bytes_of(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def waiting(store: Store) -> Iterator[Submission]:
    """The complete submissions, in key order."""
    for key in list(store.keys(keys.INBOX)):
        if key.endswith("/submission.json"):
            yield read_record(store, key, Submission)


def fetch(submission: Submission, *, store: Store, into: Path) -> Path:
    """Write a submission's files under a folder; returns the folder, or the CSV of pairs in it.

    Raises FractureSweepError where a file is gone or changed, or a path would leave the folder.
    """
    root = into.resolve()
    for file in submission.files:
        relative = PurePosixPath(file.path)
        target = (root / relative).resolve()
        if relative.is_absolute() or not target.is_relative_to(root):
            raise FractureSweepError("a submission names a path outside its own folder: it is not read")
        try:
            data = store.get(file.key)
        except NotInStore:
            raise FractureSweepError("a file of a submission is gone from the inbox: submit it again") from None
        if sha256_hex(data) != file.sha256:
            raise FractureSweepError("a file of a submission was changed in the inbox: submit it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return root / "pairs.csv" if submission.kind == "pairs" else root


def empty(submission: Submission, *, store: Store) -> None:
    """Remove a submission after it was read: its list first, so that no half of it is ever taken for a whole."""
    store.delete(keys.inbox_submission(submission.submission_id))
    for key in list(store.keys(f"{keys.INBOX}{submission.submission_id}/")):
        store.delete(key)


def take_lease(store: Store, submission_id: str, *, owner: str, now: datetime, seconds: float) -> bool:
    """Whether this worker may read the submission now: no lease, its own, or one that ran out.

    Leases that were renewed are removed: a reader may wait for days. A lease that went while it was looked at was
    renewed just then, so it is another's.
    """
    prefix = f"{keys.INBOX}{submission_id}/leases/"
    held = sorted(store.keys(prefix))
    if held:
        last = find_record(store, held[-1], Lease)
        if last is None or (last.owner != owner and last.until > now.astimezone(UTC)):
            return False
    number = int(held[-1].removeprefix(prefix)) + 1 if held else 1
    taken = write_record(store, f"{prefix}{number:08d}", Lease(owner=owner, until=now + timedelta(seconds=seconds)))
    if taken:
        for old in held:
            store.delete(old)
    return taken
