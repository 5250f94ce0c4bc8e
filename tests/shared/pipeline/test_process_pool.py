"""Processes with a budget: what a job does to its own process, and what it cannot do to the others."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.pipeline.errors import FractureSweepError, OverBudget, Retry
from shared.pipeline.process_pool import ProcessPool


def pool_of(processes: int = 1, **more: float) -> ProcessPool:
    budget = {"seconds": 30.0, "memory_gib": 4.0, "jobs_per_process": 100} | more
    return ProcessPool(what="the work", processes=processes, **budget)  # type: ignore[arg-type]


@pytest.fixture
def pool() -> Iterator[ProcessPool]:
    with pool_of() as running:
        yield running


def process_id() -> int:
    return os.getpid()


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def fill(gib: float) -> int:
    """Takes memory for real: every page is written."""
    return sum(len(part) for part in [b"x" * 2**26 for _ in range(int(gib * 16))])


def leave_by(number: int) -> None:
    os.kill(os.getpid(), number)


def leave_with(code: int) -> None:
    os._exit(code)


def refuse(sentence: str) -> None:
    raise ValueError(sentence)


def end_of_file() -> None:
    raise EOFError("of a job's own")


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def cannot_start() -> None:
    os._exit(4)


def unsendable() -> object:
    return threading.Lock()


def scratch() -> str:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(b"left behind")
    return file.name


def test_a_job_runs_in_a_process_of_its_own_and_the_next_in_the_same(pool: ProcessPool) -> None:
    first, second = pool.run(process_id), pool.run(process_id)

    assert first == second != os.getpid()


def test_what_a_job_raises_is_raised_with_the_traceback_of_its_process(pool: ProcessPool) -> None:
    with pytest.raises(ValueError, match="no such vertebra") as raised:
        pool.run(refuse, "no such vertebra")

    assert "in refuse" in str(raised.value.__cause__)
    assert pool.run(process_id) > 0


def test_an_end_of_file_in_a_job_is_the_jobs_own(pool: ProcessPool) -> None:
    with pytest.raises(EOFError, match="of a job's own"):
        pool.run(end_of_file)


def test_a_result_that_cannot_travel_is_an_error_of_its_job(pool: ProcessPool) -> None:
    with pytest.raises(RuntimeError, match="cannot be sent back"):
        pool.run(unsendable)
    assert pool.run(process_id) > 0


def test_a_job_over_its_time_is_killed_and_the_next_one_runs(pool: ProcessPool) -> None:
    with pool_of(seconds=0.3) as hasty, pytest.raises(OverBudget, match=r"^the work took more than 0\.3 s$"):
        hasty.run(sleep, 60.0)

    assert pool.run(process_id) > 0


def test_a_job_that_really_takes_too_much_memory_is_given_up_and_the_next_one_runs() -> None:
    with pool_of(memory_gib=2.0) as pool:
        with pytest.raises(OverBudget, match=r"^the work wanted more than 2 GiB$"):
            pool.run(fill, 3.0)

        assert pool.run(fill, 0.25) == 2**28


def test_a_job_that_is_killed_from_outside_is_tried_again_and_says_out_of_memory(pool: ProcessPool) -> None:
    with pytest.raises(Retry) as raised:
        pool.run(leave_by, signal.SIGKILL)

    assert raised.value.reason == "the work process died (signal 9: out of memory?)"
    assert raised.value.exhausted == "over-budget"
    assert pool.run(process_id) > 0


def test_a_job_that_crashes_is_tried_again_and_says_how(pool: ProcessPool) -> None:
    with pytest.raises(Retry, match=r"signal 11\)") as crashed:
        pool.run(leave_by, signal.SIGSEGV)
    with pytest.raises(Retry, match=r"exit code 3\)"):
        pool.run(leave_with, 3)

    assert crashed.value.exhausted == "retries-exhausted"


def test_neighbours_of_a_job_that_dies_are_not_touched() -> None:
    with pool_of(2) as pool, ThreadPoolExecutor(2) as threads:
        pool.run(process_id)
        neighbour = threads.submit(pool.run, sleep, 0.5)
        dying = threads.submit(pool.run, leave_by, signal.SIGKILL)

        assert neighbour.result() > 0
        with pytest.raises(Retry):
            dying.result()


def test_a_process_that_is_killed_while_idle_costs_nothing(pool: ProcessPool) -> None:
    first = pool.run(process_id)
    os.kill(first, signal.SIGKILL)
    while is_there(first):
        time.sleep(0.01)

    second = pool.run(process_id)

    assert second not in (first, os.getpid())
    pool.check()


def test_a_process_is_replaced_after_its_number_of_jobs() -> None:
    with pool_of(jobs_per_process=2) as pool:
        seen = [pool.run(process_id) for _ in range(5)]

    assert [seen.count(one) for one in dict.fromkeys(seen)] == [2, 2, 1]


def test_what_a_process_leaves_behind_goes_with_it() -> None:
    with pool_of(jobs_per_process=2) as pool:
        left = Path(pool.run(scratch))
        there = left.exists()
        pool.run(process_id)

        assert there
        assert not left.parent.exists()


def test_a_job_finds_a_folder_for_its_files_though_somebody_took_the_idle_one_for_abandoned(pool: ProcessPool) -> None:
    first = Path(pool.run(scratch))
    shutil.rmtree(first.parent)

    second = Path(pool.run(scratch))

    assert second.exists()


def test_a_closed_pool_is_not_ready_and_takes_no_work() -> None:
    pool = pool_of()
    pool.run(process_id)

    pool.close()

    with pytest.raises(FractureSweepError, match="restart the worker"):
        pool.check()
    with pytest.raises(FractureSweepError, match="restart the worker"):
        pool.run(process_id)


def test_closing_ends_what_is_under_way_and_nothing_hangs() -> None:
    pool = pool_of()
    pool.run(process_id)
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(pool.run, sleep, 60.0)
        while not working.running():
            time.sleep(0.01)
        time.sleep(0.2)

        pool.close()

        with pytest.raises((Retry, FractureSweepError)):
            working.result(20)


def test_a_job_whose_process_cannot_start_is_tried_again() -> None:
    pool = ProcessPool(what="the work", processes=1, seconds=30, memory_gib=0, jobs_per_process=1, prepare=cannot_start)

    with pool, pytest.raises(Retry, match=r"could not start \(exit code 4\)"):
        pool.run(process_id)
