from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.dicom_ingest.inbox import (
    Submission,
    SubmittedFile,
    empty,
    fetch,
    files_of_pairs,
    submit,
    take_lease,
    waiting,
)
from shared.fracture import keys
from shared.fracture.ids import Pseudonyms, sha256_hex
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.folder_store import FolderStore

PSEUDONYMS = Pseudonyms(bytes(32))


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "deep er").mkdir(parents=True)
    (tmp_path / "in" / "deep er" / "a.dcm").write_bytes(b"one")
    (tmp_path / "in" / "b").write_bytes(b"two")
    return tmp_path / "in"


def test_a_submitted_folder_comes_out_as_it_went_in(store: FolderStore, folder: Path, tmp_path: Path) -> None:
    submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS)

    (submission,) = waiting(store)
    out = fetch(submission, store=store, into=tmp_path / "out")

    assert (out / "deep er" / "a.dcm").read_bytes() == b"one"
    assert (out / "b").read_bytes() == b"two"


def test_an_interrupted_upload_is_no_submission_and_is_resumed(store: FolderStore, folder: Path) -> None:
    def broken(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS, progress=broken)
    assert list(waiting(store)) == []

    submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS)

    assert len(list(waiting(store))) == 1


class Counting(FolderStore):
    """A store that counts what is written into it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.puts: list[str] = []
        self.free: int | None = None

    def put(self, key: str, data: bytes) -> bool:
        self.puts.append(key)
        return super().put(key, data)

    def free_bytes(self) -> int | None:
        return self.free


def test_a_second_submit_uploads_only_what_is_missing(tmp_path: Path, folder: Path) -> None:
    store = Counting(tmp_path / "counting")

    def broken(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS, progress=broken)
    first = list(store.puts)
    second = submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS)
    third = submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS)

    files = [key for key in store.puts if "/files/" in key]
    assert len(first) == 1
    assert len(files) == len(set(files)) == 2
    assert (second.files, second.uploaded) == (2, 1)
    assert (third.files, third.uploaded) == (2, 0)


def test_progress_counts_bytes_first_read_then_uploaded(store: FolderStore, folder: Path) -> None:
    told: list[tuple[str, int, int]] = []

    submit(
        folder,
        name="n",
        store=store,
        pseudonyms=PSEUDONYMS,
        hashing=lambda done, total: told.append(("read", done, total)),
        progress=lambda done, total: told.append(("uploaded", done, total)),
    )

    assert told == [("read", 3, 6), ("read", 6, 6), ("uploaded", 3, 6), ("uploaded", 6, 6)]


@pytest.mark.parametrize(("free", "sentence"), [(99, "make room"), (105, "and the upload needs 0.00")])
def test_a_store_under_the_watermark_takes_no_submission(
    tmp_path: Path, folder: Path, free: int, sentence: str
) -> None:
    store = Counting(tmp_path / "counting")
    store.free = free

    with pytest.raises(FractureSweepError, match=sentence):
        submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS, min_free_bytes=100)

    assert store.puts == []


def test_a_file_that_changes_while_it_is_submitted_is_refused(store: FolderStore, folder: Path) -> None:
    def changed(done: int, total: int) -> None:
        (folder / "b").write_bytes(b"other")

    with pytest.raises(FractureSweepError, match="changed while it was submitted"):
        submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS, hashing=changed)

    assert list(waiting(store)) == []


def test_an_emptied_inbox_holds_nothing(store: FolderStore, folder: Path) -> None:
    submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS)
    (submission,) = waiting(store)

    empty(submission, store=store)

    assert list(store.keys(keys.INBOX)) == []


def test_a_table_brings_along_all_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "1").write_bytes(b"dicom")
    (tmp_path / "mask.nii.gz").write_bytes(b"mask")
    table = tmp_path / "pairs.csv"
    table.write_text("image,mask,age\nscan,mask.nii.gz,70\nscan,absent.nii,70\n")

    text, files = files_of_pairs(table)

    assert text.splitlines()[1] == "data/000000/scan,data/000001/mask.nii.gz,70"
    assert text.splitlines()[2] == "data/000000/scan,absent.nii,70"
    assert [name for name, _ in files] == ["data/000000/scan/1", "data/000001/mask.nii.gz"]


@pytest.mark.parametrize("path", ["../evil", "/etc/evil"])
def test_a_path_outside_the_submission_is_refused(store: FolderStore, tmp_path: Path, path: str) -> None:
    store.put("inbox/x/files/00000000", b"evil")
    submission = Submission(
        submission_id="x",
        kind="folder",
        name="n",
        files=(SubmittedFile(path=path, key="inbox/x/files/00000000", sha256=sha256_hex(b"evil")),),
    )

    with pytest.raises(FractureSweepError, match="outside"):
        fetch(submission, store=store, into=tmp_path / "out")


def test_a_changed_file_is_refused(store: FolderStore, folder: Path, tmp_path: Path) -> None:
    submit(folder, name="n", store=store, pseudonyms=PSEUDONYMS)
    (submission,) = waiting(store)
    store.delete(submission.files[0].key)
    store.put(submission.files[0].key, b"changed")

    with pytest.raises(FractureSweepError, match="changed"):
        fetch(submission, store=store, into=tmp_path / "out")


def test_a_lease_keeps_others_out_until_it_runs_out(store: FolderStore) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    assert take_lease(store, "x", owner="one", now=now, seconds=60)
    assert not take_lease(store, "x", owner="two", now=now, seconds=60)
    assert take_lease(store, "x", owner="two", now=now + timedelta(seconds=61), seconds=60)
    assert not take_lease(store, "x", owner="one", now=now + timedelta(seconds=62), seconds=60)


def test_a_lease_that_is_renewed_for_days_stays_one_object(store: FolderStore) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)

    for renewal in range(5):
        assert take_lease(store, "x", owner="one", now=now + timedelta(seconds=20 * renewal), seconds=60)

    assert len(list(store.keys("inbox/x/leases/"))) == 1
    assert not take_lease(store, "x", owner="two", now=now + timedelta(seconds=100), seconds=60)


def test_an_empty_folder_is_nothing_to_submit(store: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()

    with pytest.raises(FractureSweepError, match="no file"):
        submit(tmp_path / "nothing", name="n", store=store, pseudonyms=PSEUDONYMS)
