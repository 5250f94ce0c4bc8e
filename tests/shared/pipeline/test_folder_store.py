from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.pipeline.errors import FractureSweepError, NotInStore, StoreFull, StoreUnavailable
from shared.pipeline.folder_store import ASIDE, FolderStore


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "new" / "store")


def failing(number: int) -> object:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_the_folder_is_made_and_open_to_its_owner_alone(store: FolderStore) -> None:
    assert store.root.is_dir()
    assert store.root.stat().st_mode & 0o077 == 0


def test_an_object_is_a_plain_file_under_its_key(store: FolderStore) -> None:
    store.put("a/b.json", b"{}")

    assert (store.root / "a" / "b.json").read_bytes() == b"{}"
    assert list((store.root / ASIDE).iterdir()) == []


def test_another_process_sees_what_was_put(store: FolderStore) -> None:
    store.put("a/b", b"1")

    second = FolderStore(store.root)

    assert second.get("a/b") == b"1"
    assert second.put("a/b", b"2") is False


def test_folders_that_became_empty_go_with_their_last_object(store: FolderStore) -> None:
    store.put("a/b/c", b"")
    store.put("a/d", b"")

    store.delete("a/b/c")

    assert sorted(path.name for path in store.root.iterdir()) == [ASIDE, "a"]
    assert list((store.root / "a").iterdir()) == [store.root / "a" / "d"]


def test_files_that_are_no_keys_are_not_listed(store: FolderStore) -> None:
    store.put("a", b"")
    (store.root / ".DS_Store").write_bytes(b"")
    (store.root / "Read Me.txt").write_bytes(b"")
    (store.root / "lost+found").mkdir()

    assert list(store.keys("")) == ["a"]


def test_a_writer_killed_in_the_middle_leaves_no_object(store: FolderStore) -> None:
    program = (
        "import os, sys; from pathlib import Path; from shared.pipeline.folder_store import FolderStore\n"
        "os.fsync = lambda handle: os._exit(9)\n"
        "FolderStore(Path(sys.argv[1])).put('a', b'x' * 1000)"
    )

    done = subprocess.run([sys.executable, "-c", program, str(store.root)], check=False, cwd=Path(__file__).parents[3])

    assert done.returncode == 9
    assert len(list((store.root / ASIDE).iterdir())) == 1
    assert not store.exists("a")
    assert store.put("a", b"y") is True


def test_what_dead_writers_left_is_removed_by_age(store: FolderStore) -> None:
    old, young = store.root / ASIDE / "old", store.root / ASIDE / "young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)

    store.check()

    assert not old.exists()
    assert young.exists()


def test_check_leaves_nothing_behind(store: FolderStore) -> None:
    store.check()

    assert list(store.root.iterdir()) == [store.root / ASIDE]
    assert list((store.root / ASIDE).iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_refused(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))

    with pytest.raises(FractureSweepError, match=r"no hard links .* local disk .* S3 server") as caught:
        store.check()

    assert not isinstance(caught.value, StoreUnavailable)
    assert list((store.root / ASIDE).iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_asks_for_a_later_attempt(store: FolderStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))

    with pytest.raises(StoreFull, match="no room"):
        store.put("a", b"x")

    assert list((store.root / ASIDE).iterdir()) == []
    assert not store.exists("a")


def test_the_room_is_that_of_the_disk_as_a_user_may_fill_it(store: FolderStore) -> None:
    disk = os.statvfs(store.root)

    free = store.free_bytes()

    assert free is not None
    assert abs(free - disk.f_bavail * disk.f_frsize) < 1 << 30


def test_the_room_of_a_folder_that_is_gone_is_an_outage(store: FolderStore) -> None:
    (store.root / ASIDE).rmdir()

    with pytest.raises(StoreUnavailable, match="is gone"):
        store.free_bytes()


def test_a_folder_on_another_file_system_is_named_as_the_cause(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EXDEV))

    with pytest.raises(FractureSweepError, match="another file system"):
        store.put("a/b", b"x")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_one_clear_sentence(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "open", failing(number))

    with pytest.raises(StoreUnavailable, match="permission") as caught:
        store.put("a", b"x")

    assert "\n" not in str(caught.value)
    assert str(store.root) in str(caught.value)


def test_a_disk_that_fails_is_unavailable(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))

    with pytest.raises(StoreUnavailable, match="cannot be used"):
        store.check()


def test_a_root_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(StoreUnavailable, match="cannot be used"):
        FolderStore(tmp_path / "file" / "store")


def test_a_disk_that_was_unmounted_is_not_mistaken_for_an_empty_store(store: FolderStore) -> None:
    store.put("a/b", b"")
    store.root.rename(store.root.with_name("elsewhere"))
    store.root.mkdir()

    for use in (
        lambda: store.get("a/b"),
        lambda: store.exists("a/b"),
        lambda: store.put("a/c", b""),
        lambda: store.delete("a/b"),
        lambda: list(store.keys("a/")),
        store.check,
    ):
        with pytest.raises(StoreUnavailable, match="mounted"):
            use()
    assert list(store.root.iterdir()) == []


def test_no_error_names_the_key(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EIO))

    with pytest.raises(StoreUnavailable) as caught:
        store.put("sentinel/key", b"")

    assert "sentinel" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_link_that_worked_though_the_answer_was_lost_counts_as_won(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(path: Path, name: Path) -> None:
        link(path, name)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", link_twice)

    assert store.put("a/b", b"mine") is True
    assert store.put("a/b", b"other") is False


def test_a_folder_removed_between_making_and_linking_is_made_again(
    store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link
    times = iter(range(10))

    def link_third_time(path: Path, name: Path) -> None:
        if next(times) < 2:
            name.parent.rmdir()
        link(path, name)

    monkeypatch.setattr(os, "link", link_third_time)

    assert store.put("a/b", b"x") is True
    assert store.get("a/b") == b"x"


def test_a_missing_key_is_not_a_broken_store(store: FolderStore) -> None:
    with pytest.raises(NotInStore):
        store.get("a")
