"""Independent jobs in processes of their own, told one by one as they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context


def run_all(jobs: Sequence[Callable[[], object]], *, processes: int, told: Callable[[], None] = lambda: None) -> None:
    """Run every job; `told` after each. The first failure ends it, and what was not begun is not.

    One process, or one job, runs here. Jobs have to be importable (`functools.partial` of a module's function).
    """
    if processes <= 1 or len(jobs) < 2:
        for job in jobs:
            job()
            told()
        return
    # spawned: a fork would copy the threads that draw the progress bar
    with ProcessPoolExecutor(max_workers=min(processes, len(jobs)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                told()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
