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


def test_an_empty_folder_is_nothing_to_submit(store: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()

    with pytest.raises(FractureSweepError, match="no file"):
        submit(tmp_path / "nothing", name="n", store=store, pseudonyms=PSEUDONYMS)
