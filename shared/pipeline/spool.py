"""Temporary files that a killed process left behind: found at the next start, by their age.

A process that ends removes its own. One that is killed cannot, and where the folder for temporary files outlives it (a
volume of a container) they would fill the disk in time. Workers may share the folder, so only what nobody can still be
using is removed.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Final

PREFIX: Final = ".fracture-sweep-spool-"
"""What the names of our temporary folders begin with."""
ABANDONED_SECONDS: Final = 86400.0
"""Longer than anything is spooled."""


def remove_abandoned(folder: Path, *, now: float | None = None, after_seconds: float = ABANDONED_SECONDS) -> int:
    """Remove our temporary folders that nothing was written into for so long; how many there were."""
    moment = time.time() if now is None else now
    removed = 0
    for found in folder.glob(f"{PREFIX}*"):
        try:
            if found.is_dir() and not found.is_symlink() and moment - _last_written(found) > after_seconds:
                shutil.rmtree(found, ignore_errors=True)
                removed += 1
        except OSError:  # another worker was faster
            continue
    return removed


def _last_written(folder: Path) -> float:
    return max([folder.stat().st_mtime, *(path.lstat().st_mtime for path in folder.rglob("*"))])
