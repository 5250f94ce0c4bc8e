from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.pipeline.errors import FractureSweepError
from shared.pipeline.secrets_files import make_secret_file, read_secret_file


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "key"

    first = make_secret_file(path)
    again = make_secret_file(path)

    assert len(first) == 32
    assert again == first == read_secret_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [found.name for found in path.parent.iterdir()] == ["key"]


def test_two_secrets_differ(tmp_path: Path) -> None:
    assert make_secret_file(tmp_path / "a") != make_secret_file(tmp_path / "b")


def test_many_who_make_one_file_get_the_same_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        made = set(pool.map(lambda _: make_secret_file(tmp_path / "key"), range(16)))

    assert len(made) == 1


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_hexadecimal_digits_and_raw_bytes_are_read(tmp_path: Path, ending: str) -> None:
    secret = os.urandom(31) + b"\x0a"
    for name, content in (("hex", (secret.hex().upper() + ending).encode()), ("raw", secret)):
        path = tmp_path / name
        path.write_bytes(content)
        path.chmod(0o600)

        assert read_secret_file(path) == secret


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
def test_a_file_open_to_every_user_is_refused_with_what_to_do(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    make_secret_file(path)
    path.chmod(mode)

    for use in (read_secret_file, make_secret_file):
        with pytest.raises(FractureSweepError, match=f"chmod 600 {path}"):
            use(path)


def test_a_group_may_read_it_as_in_kubernetes(tmp_path: Path) -> None:
    secret = make_secret_file(tmp_path / "key")
    (tmp_path / "key").chmod(0o440)

    assert read_secret_file(tmp_path / "key") == secret


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 64, b"a" * 63, b"a" * 66, bytes(range(7, 40)), b"\xff" * 64])
def test_a_file_with_something_else_in_it_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(FractureSweepError, match="does not hold 32 bytes") as caught:
        read_secret_file(path)

    assert "short" not in str(caught.value)
    assert path.read_bytes() == content


def test_a_missing_file_a_folder_and_a_pipe_are_one_clear_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)

    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe"):
        with pytest.raises(FractureSweepError, match="secret file"):
            read_secret_file(path)


def test_a_place_where_none_can_be_made_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(FractureSweepError, match="cannot be made"):
        make_secret_file(tmp_path / "file" / "key")
