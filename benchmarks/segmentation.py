"""What the segmenter costs on a large scan: `python benchmarks/segmentation.py`.

A scan of 512 x 512 x 400 voxels of 1 mm with a phantom's whole spine in it is segmented in a process of its own, beside
the reading of the same volume alone: time, and peak memory. PHANTOM: it says nothing of how well bodies are found.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.segmenter.series_spine import BuiltIn, compute_spine
from services.segmenter.settings import BUILT_IN_NETWORK
from services.trainer.phantoms.whole_spine import render_spine, spine_patient
from shared.fracture.spine.gate import GateSettings
from shared.fracture.volume import Geometry, Volume, to_nrrd, volume_from_nrrd_file

SHAPE_ZYX = (400, 512, 512)


def scan(shape_zyx: tuple[int, int, int]) -> Volume:
    """A phantom's whole spine in a trunk of fat, as large as a scan of chest and abdomen."""
    rng = np.random.default_rng(1)
    patient = replace(spine_patient(seed=1, index=0), spacing_zyx=(1.0, 1.0, 1.0), slice_thickness_mm=1.0)
    spine = render_spine(patient).volume.voxels
    hu: NDArray[np.int16] = np.full(shape_zyx, -1000, dtype=np.int16)
    y, x = np.mgrid[: shape_zyx[1], : shape_zyx[2]]
    trunk = np.hypot((y - shape_zyx[1] / 2) / 120, (x - shape_zyx[2] / 2) / 160) < 1
    for plane in hu:
        plane[trunk] = -90 + rng.integers(-12, 12, size=int(trunk.sum()), dtype=np.int16)
    spine = spine[: shape_zyx[0]]
    at = [(n - m) // 2 for n, m in zip(shape_zyx, spine.shape, strict=True)]
    box = tuple(slice(low, low + m) for low, m in zip(at, spine.shape, strict=True))
    hu[box] = np.where(trunk[box[1:]], spine, hu[box])
    return Volume(
        voxels=hu,
        geometry=Geometry(
            shape_zyx=shape_zyx,
            spacing_zyx=(1.0, 1.0, 1.0),
            origin_zyx=(0.0, 0.0, 0.0),
            direction_zyx=((1, 0, 0), (0, 1, 0), (0, 0, 1)),
        ),
    )


def _read(path: Path, network: Path, threads: int) -> int:
    return int(volume_from_nrrd_file(path).voxels.size > 0)


def _segment(path: Path, network: Path, threads: int) -> int:
    return len(compute_spine(path, BuiltIn(folder=network, threads=threads), limits=GateSettings()).findings)


Job = Callable[[Path, Path, int], int]


def _measured(job: Job, path: Path, network: Path, threads: int, answer: multiprocessing.SimpleQueue[object]) -> None:
    begun = time.perf_counter()
    try:
        found: object = job(path, network, threads)
    except ValueError as error:  # a network that finds no spine in a drawing
        found = str(error)
    seconds = time.perf_counter() - begun
    answer.put((found, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def measured(job: Job, path: Path, network: Path, threads: int) -> tuple[object, float, float]:
    """Result, seconds and peak resident GiB of a job in a fresh process."""
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.SimpleQueue[object] = context.SimpleQueue()
    process = context.Process(target=_measured, args=(job, path, network, threads, answer))
    process.start()
    found = answer.get()
    process.join()
    if not isinstance(found, tuple):
        raise TypeError("a process gave no measurement")
    return found[0], float(found[1]), float(found[2])


def main(given: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", type=Path, default=BUILT_IN_NETWORK, help="folder of a segmenter's network")
    parser.add_argument("--slices", type=int, default=SHAPE_ZYX[0])
    parser.add_argument("--threads", type=int, default=0, help="0 takes every core")
    asked = parser.parse_args(given)
    shape = (asked.slices, *SHAPE_ZYX[1:])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "volume.nrrd"
        path.write_bytes(to_nrrd(scan(shape)))
        reading = measured(_read, path, asked.network, asked.threads)
        segmenting = measured(_segment, path, asked.network, asked.threads)
    size = " x ".join(map(str, shape[::-1]))
    cores = len(os.sched_getaffinity(0))
    sys.stdout.write(f"PHANTOM of {size} voxels of 1 mm, {cores} cores, {asked.threads or cores} threads\n")
    sys.stdout.write("| | seconds | peak GiB |\n| --- | --- | --- |\n")
    sys.stdout.write(f"| reading the volume alone | {reading[1]:.1f} | {reading[2]:.2f} |\n")
    sys.stdout.write(f"| reading, segmenting, measuring, drawing | {segmenting[1]:.1f} | {segmenting[2]:.2f} |\n")
    sys.stdout.write(f"found: {segmenting[0]} bodies; {segmenting[1] / max(reading[1], 1e-9):.1f} times the reading\n")


if __name__ == "__main__":
    main()
