"""Independent jobs in processes of their own, told one by one as they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")


def run_all(
    jobs: Sequence[Callable[[], T]], *, processes: int, told: Callable[[int], None] = lambda done: None
) -> list[T]:
    """Run every job; `told` after each how many are done. Results in order. The first failure ends it, the rest is not
    begun.

    One process, or one job, runs here. Jobs have to be importable (`functools.partial` of a module's function).
    """
    if processes <= 1 or len(jobs) < 2:
        found = []
        for job in jobs:
            found.append(job())
            told(len(found))
        return found
    # spawned: a fork would copy the threads that draw the progress bar
    with ProcessPoolExecutor(max_workers=min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                told(done)
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
