"""What a killed process left among the temporary files."""

from __future__ import annotations

import os
import time
from pathlib import Path

from shared.pipeline.spool import PREFIX, remove_abandoned

DAY = 86400.0


def spooled(folder: Path, name: str, *, age_seconds: float) -> Path:
    inside = folder / name / "files" / "a-file"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"pixels")
    for path in (inside, inside.parent, folder / name):
        os.utime(path, (time.time() - age_seconds,) * 2)
    return folder / name


def test_a_folder_of_ours_that_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    old = spooled(tmp_path, f"{PREFIX}old", age_seconds=2 * DAY)
    young = spooled(tmp_path, f"{PREFIX}young", age_seconds=DAY / 2)
    foreign = spooled(tmp_path, "fracture-sweep-results", age_seconds=9 * DAY)

    removed = remove_abandoned(tmp_path)

    assert removed == 1
    assert not old.exists()
    assert young.exists()
    assert foreign.exists()


def test_a_folder_into_which_something_is_still_written_stays(tmp_path: Path) -> None:
    growing = spooled(tmp_path, f"{PREFIX}growing", age_seconds=2 * DAY)
    (growing / "files" / "new").write_bytes(b"pixels")

    assert remove_abandoned(tmp_path) == 0
    assert growing.exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = spooled(tmp_path / "elsewhere", "data", age_seconds=9 * DAY)
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)

    remove_abandoned(tmp_path)

    assert (elsewhere / "files" / "a-file").exists()
