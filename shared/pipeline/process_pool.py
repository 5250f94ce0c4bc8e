"""Work in processes of its own: one job each at a time, recycled, with a budget of time and of memory.

A process that dies, hangs or grows takes its own job with it and nobody else's; the worker's process, with its
connection to the broker, outlives whatever a job does. Each process has a pipe of its own. (pebble's pool, which stood
here first, shares one channel and one lock: an idle process that the system killed left the pool broken for good, and
every case after it was dead-lettered as a bug.)

How a job can end: with its result or exception; over its time (killed, OverBudget); over its memory (MemoryError under
RLIMIT_AS, OverBudget); its process gone (Retry, since the system may have been short of memory through no fault of the
job). A job killed by signal 9 each time it was tried becomes an over-budget dead letter: that is what the system's
out-of-memory killer looks like, and all that can be known of it.

A process's temporary files lie in a folder that goes with it. Only a process that died sooner than its parent leaves
work behind: one whose parent was killed ends when it is done.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Final, ParamSpec, Self, TypeVar

from shared.pipeline.errors import OVER_BUDGET, FractureSweepError, OverBudget, Retry
from shared.pipeline.spool import PREFIX

P = ParamSpec("P")
T = TypeVar("T")

LOG = logging.getLogger("fracture_sweep.process_pool")

START_SECONDS: Final = 120.0
"""How long a new process may take to import what it needs."""
_GIB: Final = 2**30
_END_SECONDS: Final = 10.0
_DYING_SECONDS: Final = 5.0
"""How long a process whose pipe has ended may take to say how it died."""
_SIGKILL: Final = 9
_OOM_SCORE: Final = "500"
"""Where the system runs out of memory, it takes a process of a pool before the worker (proc(5), oom_score_adj)."""

_process_lock = threading.Lock()
_preloaded: list[str] = []


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ProcessPool:
    """Processes that run jobs, each within a budget.

    `what` names the work in reasons ("the extraction"). `memory_gib` is address space, 0 sets no limit. A process is
    replaced after `jobs_per_process`. `preload` names modules that a process finds imported, `prepare` runs
    first in it.
    """

    def __init__(
        self,
        *,
        what: str,
        processes: int,
        seconds: float,
        memory_gib: float,
        jobs_per_process: int,
        preload: Sequence[str] = (),
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.processes = processes
        self._what = what
        self._seconds = seconds
        self._memory_gib = memory_gib
        self._jobs_per_process = jobs_per_process
        self._prepare = prepare
        self._context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            with _process_lock:  # one server for all pools of this process: it preloads for all of them
                _preloaded.extend(name for name in preload if name not in _preloaded)
                self._context.set_forkserver_preload(list(_preloaded))
        self._closed = threading.Event()
        self._running: set[_Process] = set()
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._free.put(None)  # started when there is work

    def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `job`, a function of a module, computed in a process of the pool; blocks until it is there.

        Raises what the job raises, OverBudget (time, memory) and Retry (the process died).
        """
        process = self._free.get()
        keep = False
        try:
            if process is not None and not process.alive:  # killed while it was idle: nothing is lost
                self._ended(process)
                process = None
            if process is None:
                process = self._started()
            answer = self._answer(process, (job, args, kwargs))
            process.jobs += 1
            keep = process.jobs < self._jobs_per_process and not answer.out_of_memory
        finally:
            if not keep:
                self._ended(process)
            self._free.put(process if keep else None)
        if answer.out_of_memory:
            raise OverBudget(self._memory_reason())
        if answer.error is not None:
            raise answer.error from _InProcess(answer.traceback)
        result: T = answer.result
        return result

    def check(self) -> None:
        """FractureSweepError where the pool takes no work any more."""
        if self._closed.is_set():
            raise FractureSweepError(f"the processes of {self._what} were stopped; restart the worker")

    def close(self) -> None:
        """End the processes; what they were doing is lost."""
        self._closed.set()
        with _process_lock:
            running = list(self._running)
        for process in running:
            self._ended(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> _Process:
        with _process_lock:
            self.check()
            process = _Process(self._context, int(self._memory_gib * _GIB), self._prepare)
            self._running.add(process)
        if not process.readable(START_SECONDS):
            self._ended(process)
            raise Retry(f"a process for {self._what} did not start within {START_SECONDS:g} s")
        try:
            process.receive()
        except _Died:
            self._ended(process, patience=_DYING_SECONDS)
            raise Retry(f"a process for {self._what} could not start ({process.exit})") from None
        return process

    def _ended(self, process: _Process | None, *, patience: float = 0.0) -> None:
        if process is not None:
            process.end(patience=patience)
            with _process_lock:
                self._running.discard(process)

    def _answer(self, process: _Process, task: tuple[Any, ...]) -> _Answer:
        try:
            process.send(task)
            answer = self._received(process, START_SECONDS)
            return self._received(process, self._seconds) if answer.begun else answer
        except _Died:
            process.end(patience=_DYING_SECONDS)
        reason = f"{self._what} process died ({process.exit})"
        if process.killed and not self._closed.is_set():
            raise Retry(reason, exhausted=OVER_BUDGET)
        raise Retry(reason)

    def _received(self, process: _Process, seconds: float) -> _Answer:
        if not process.readable(seconds):
            raise OverBudget(f"{self._what} took more than {seconds:g} s")
        return process.receive()

    def _memory_reason(self) -> str:
        if self._memory_gib > 0:
            return f"{self._what} wanted more than {self._memory_gib:g} GiB"
        return f"{self._what} wanted more memory than there is"


class _Died(Exception):
    """The process is gone and gave no answer."""


class _InProcess(Exception):
    """Shows the traceback of the process in which an error was raised."""

    def __str__(self) -> str:
        return f"in a process of the pool:\n{self.args[0]}"


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What a process sends back: that it has begun (what it had to import is there, its time runs), then the end."""

    begun: bool = False
    result: Any = None
    error: BaseException | None = None
    traceback: str = ""
    out_of_memory: bool = False


class _Process:
    """One process, its pipe and its folder of temporary files. Made and asked under `_process_lock` alone.

    (multiprocessing looks after all its children whenever it starts one; two threads that ask after the same child at
    once can lose its exit code.)
    """

    def __init__(self, context: Any, memory_bytes: int, prepare: Callable[[], None] | None) -> None:
        self.jobs = 0
        self._exit_code: int | None = None
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self._pipe: Connection
        self._pipe, far = context.Pipe()
        arguments = (far, memory_bytes, self._folder.name, prepare)
        self._process: Any = context.Process(target=serve_jobs, args=arguments, daemon=True)
        try:
            self._process.start()
        except BaseException:
            self._pipe.close()
            self._folder.cleanup()
            raise
        finally:
            far.close()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        with _process_lock:
            return bool(self._process.is_alive())

    @property
    def killed(self) -> bool:
        """Whether signal 9 ended it."""
        return self._exit_code == -_SIGKILL

    @property
    def exit(self) -> str:
        """How it ended, in words."""
        if self._exit_code is None:
            return "it cannot be ended"
        if self._exit_code < 0:
            return f"signal {-self._exit_code}" + (": out of memory?" if self.killed else "")
        return f"exit code {self._exit_code}"

    def readable(self, seconds: float) -> bool:
        """Wait until it has answered or is gone: False where neither came in time."""
        try:
            return bool(wait([self._pipe, self._process.sentinel], timeout=seconds))
        except OSError:  # closed under our hands
            return True

    def send(self, task: tuple[Any, ...]) -> None:
        """Give it a job."""
        try:
            self._pipe.send(task)
        except OSError:
            raise _Died from None

    def receive(self) -> _Answer:
        """Its answer, where it gave one."""
        try:
            if not self._pipe.poll():
                raise _Died
            answer: _Answer = self._pipe.recv()
        except (EOFError, OSError):
            raise _Died from None
        return answer

    def end(self, *, patience: float) -> None:
        """Kill it unless it ends by itself within `patience` seconds, and remove what it left."""
        wait([self._process.sentinel], timeout=patience)
        with _process_lock:
            if self._process.is_alive():
                self._process.kill()
        wait([self._process.sentinel], timeout=_END_SECONDS)
        with _process_lock:
            self._exit_code = self._process.exitcode
        self._pipe.close()
        self._folder.cleanup()


def serve_jobs(pipe: Connection, memory_bytes: int, folder: str, prepare: Callable[[], None] | None) -> None:
    """The life of a process of the pool: limits first, then one job after the other until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the worker drains
    tempfile.tempdir = folder
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(_OOM_SCORE)
    limit_memory(memory_bytes)
    if prepare is not None:
        prepare()
    pipe.send(_Answer(begun=True))
    with contextlib.suppress(EOFError, OSError):  # no more work, or no more worker
        while _served(pipe):
            pass


def _served(pipe: Connection) -> bool:
    """Do one job; whether another may follow (not where memory ran out: what is left of it is in pieces)."""
    try:
        job, args, kwargs = pipe.recv()
    except MemoryError:
        answer = _Answer(out_of_memory=True)
    except ImportError as error:
        answer = _Answer(error=error, traceback=traceback.format_exc())
    else:
        # another worker of the same spool takes a folder that was idle for a day for an abandoned one
        os.makedirs(tempfile.gettempdir(), exist_ok=True)
        pipe.send(_Answer(begun=True))
        answer = _answer_of(job, args, kwargs)
    try:
        pipe.send(answer)
    except OSError:
        raise
    except MemoryError:
        answer = _Answer(out_of_memory=True)
        pipe.send(answer)
    except Exception as error:  # not everything can travel through a pipe
        reason = f"the result or error of a job cannot be sent back ({type(error).__name__})"
        pipe.send(_Answer(error=RuntimeError(reason), traceback=answer.traceback))
    return not answer.out_of_memory


def _answer_of(job: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Answer:
    try:
        return _Answer(result=job(*args, **kwargs))
    except MemoryError:
        return _Answer(out_of_memory=True)
    except BaseException as error:
        return _Answer(error=error, traceback=traceback.format_exc())


def limit_memory(memory_bytes: int) -> None:
    """Limit the address space of this process, where the system can; 0 sets no limit."""
    if memory_bytes <= 0:
        return
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system, or a lower one holds
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
