"""The synthetic volumes of a training, made once and kept, sagittal slice by sagittal slice.

Each is a pair of .npy files (left-right, up, back) that are read by the slice without loading the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.trainer.in_processes import run_all
from services.trainer.segmentation.anatomy import load_anatomy
from services.trainer.segmentation.synthesis import synthesise

Progress = Callable[[int, int], None]


def paths(folder: Path, index: int) -> tuple[Path, Path]:
    """Where HU and labels of a volume lie."""
    return folder / f"{index:06d}-hu.npy", folder / f"{index:06d}-labels.npy"


def _made(index: int, *, anatomies: Sequence[Path], seed: int, folder: Path) -> int:
    made = synthesise(load_anatomy(anatomies[index % len(anatomies)]), seed=seed, index=index)
    hu, labels = paths(folder, index)
    _write(hu, made.hu)
    _write(labels, made.labels)
    return index


def _write(path: Path, voxels: NDArray[np.generic]) -> None:
    aside = path.with_suffix(".part")
    with aside.open("wb") as stream:
        np.save(stream, np.ascontiguousarray(voxels.transpose(2, 0, 1)), allow_pickle=False)
    aside.replace(path)


def make_volumes(
    folder: Path, *, anatomies: Sequence[Path], count: int, seed: int, processes: int, progress: Progress
) -> None:
    """Make those of `count` volumes that are not there yet; the anatomies take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [n for n in range(count) if not all(path.exists() for path in paths(folder, n))]
    done = count - len(missing)
    progress(done, count)
    one = partial(_made, anatomies=tuple(anatomies), seed=seed, folder=folder)
    run_all(
        [partial(one, index) for index in missing], processes=processes, told=lambda more: progress(done + more, count)
    )


def read_volume(folder: Path, index: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """HU and labels of a volume (left-right, up, back), mapped from the disk."""
    hu, labels = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths(folder, index))
    return hu, labels
