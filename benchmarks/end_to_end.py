"""How fast the embedded run is, end to end, and where its time goes.

Prints cases a minute, the share of wall time × cores that went into the handlers' own computing (the rest is intake,
store, bus and waiting), and the peak memory of the process tree, and of its largest worker process.

    python benchmarks/end_to_end.py --patients 12 --spines 2

`--spines`: so many scans of whole spines beside them, which come without masks.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil

from services.composition import bundle_of, restricted
from services.embedded import run
from services.settings import SecretSettings, Settings
from services.sources import source_of
from services.trainer.phantoms.archive import write_archive
from shared.fracture.ids import Pseudonyms
from shared.fracture.topology import RADIOMICS_EXTRACTOR, RESAMPLER, SEGMENTER
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.metrics import Metrics

WITH_A_POOL = (SEGMENTER, RESAMPLER, RADIOMICS_EXTRACTOR)


class Watch:
    """The peak memory of this process and its children, sampled ten times a second."""

    def __init__(self) -> None:
        self.total = self.largest_child = 0
        self.child_cpu: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.1):
            sizes = []
            for child in me.children(recursive=True):
                try:
                    sizes.append(child.memory_info().rss)
                    self.child_cpu[child.pid] = sum(child.cpu_times()[:2])
                except psutil.Error:
                    continue
            self.largest_child = max([self.largest_child, *sizes])
            self.total = max(self.total, me.memory_info().rss + sum(sizes))


def handling_seconds(metrics: Metrics) -> dict[str, float]:
    """Seconds that each service's handlers took, from its own metric."""
    found: dict[str, float] = {}
    for family in metrics.registry.collect():
        if family.name == "fracture_sweep_handling_seconds":
            for sample in family.samples:
                if sample.name.endswith("_sum"):
                    service = sample.labels["service"]
                    found[service] = found.get(service, 0.0) + sample.value
    return found


def main() -> None:
    """Run it once and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=12)
    parser.add_argument("--spines", type=int, default=0)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    key = bytes(32).hex()
    settings = Settings(secrets=SecretSettings.model_validate({"pseudonym_key": key, "encryption_key": key}))
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "archive"
        write_archive(archive, patients=arguments.patients, spines=arguments.spines, seed=arguments.seed)
        bundle = bundle_of(settings)
        figures = {}
        for what in ("first run", "the same again"):
            store = restricted(FolderStore(Path(folder) / "store"), settings)
            metrics = Metrics()
            before = sum(os.times()[:2])
            start = time.perf_counter()
            with Watch() as watch:
                ran = run(
                    source_of(archive, settings=settings),
                    name="benchmark",
                    settings=settings,
                    store=store,
                    pseudonyms=Pseudonyms(bytes(32)),
                    bundle=bundle,
                    metrics=metrics,
                )
            seconds = time.perf_counter() - start
            computing = sum(watch.child_cpu.values())
            parent = sum(os.times()[:2]) - before
            handling = handling_seconds(metrics)
            # a handler with a pool waits for its processes: their own CPU time counts instead
            own = computing + sum(spent for service, spent in handling.items() if service not in WITH_A_POOL)
            figures[what] = {
                "cases": ran.ledger.cases.found,
                "seconds": round(seconds, 1),
                "cases a minute": round(60 * ran.ledger.cases.found / seconds, 1),
                "share of wall time x cores in the handlers' own computing": round(own / seconds / cores, 2),
                "of it in the processes of pools (segmentation, crops, HCR)": round(computing / seconds / cores, 2),
                "CPU share of the parent process (intake, store and bus too)": round(parent / seconds / cores, 2),
                "seconds in handlers": {service: round(spent, 1) for service, spent in sorted(handling.items())},
                "peak memory of all processes, MiB": round(watch.total / 2**20),
                "peak memory of the largest process of a pool, MiB": round(watch.largest_child / 2**20),
            }
    print(
        json.dumps(
            {"cores": cores, "phantom patients": arguments.patients, "whole spines": arguments.spines, **figures},
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
