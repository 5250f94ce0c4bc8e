"""Extraction in processes of its own: one case each, recycled, with a budget of time and memory.

A process that dies takes its own case with it and nobody else's. The worker's process never runs pyradiomics on a case,
so that its connection to the broker outlives whatever a case does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import Any, Final, Self

import SimpleITK as sitk
from pebble import ProcessExpired, ProcessPool

from services.radiomics_extractor.extraction import ExtractionError, extract
from services.radiomics_extractor.settings import RadiomicsExtractorSettings
from shared.fracture.volume import mask_from_nrrd, volume_from_nrrd
from shared.pipeline.errors import FractureSweepError, OverBudget, Retry

CaseFunction = Callable[[bytes, bytes, str], dict[str, float]]

_PRELOADED: Final = ["services.radiomics_extractor.extraction"]
_GIB: Final = 2**30


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ExtractionPool:
    """Processes that extract the features of stored crops with one parameter file."""

    def __init__(
        self, *, parameters: str, settings: RadiomicsExtractorSettings, function: CaseFunction | None = None
    ) -> None:
        self.processes = settings.processes or cores()
        self._parameters = parameters
        self._function = function or extract_stored
        self._settings = settings
        context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        if os.name == "posix":
            context.set_forkserver_preload(_PRELOADED)
        self._pool: Any = ProcessPool(
            max_workers=self.processes,
            max_tasks=settings.cases_per_process,
            initializer=prepare_process,
            initargs=(int(settings.memory_gib * _GIB),),
            context=context,
        )

    def extract(self, *, image: bytes, mask: bytes) -> dict[str, float]:
        """The features of a crop and its mask (bytes of NRRD files); blocks until they are there.

        Raises ExtractionError (this input has none), OverBudget (time, memory) and Retry (the process died).
        """
        future = self._pool.schedule(
            self._function, args=(image, mask, self._parameters), timeout=self._settings.case_seconds
        )
        try:
            found: dict[str, float] = future.result()
        except FutureTimeoutError:
            raise OverBudget(f"the extraction took more than {self._settings.case_seconds:g} s") from None
        except MemoryError:
            raise OverBudget(f"the extraction wanted more than {self._settings.memory_gib:g} GiB") from None
        except ProcessExpired as error:
            raise Retry(f"the extraction process died ({_exit_of(error.exitcode)})") from None
        return found

    def check(self) -> None:
        """FractureSweepError where the pool takes no work any more."""
        if not self._pool.active:
            raise FractureSweepError("the pool of extraction processes has stopped; restart the worker")

    def close(self) -> None:
        """End the processes; what they were doing is lost."""
        self._pool.stop()
        self._pool.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def prepare_process(memory_bytes: int) -> None:
    """Runs first in each process: one thread for ITK, since there is a process a core, and the limit of memory."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    if memory_bytes <= 0:
        return
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system, or a lower one holds
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def extract_stored(image: bytes, mask: bytes, parameters: str) -> dict[str, float]:
    """Runs in a process of the pool: the features of a crop and its mask as they lie in the store."""
    try:
        return extract(_readable(volume_from_nrrd, image), _readable(mask_from_nrrd, mask), parameters=parameters)
    except RuntimeError as error:  # ITK's only class, also for memory
        if "alloc" in str(error).lower():
            raise MemoryError from None
        raise RuntimeError(f"pyradiomics failed on the case: {type(error).__name__}") from error


def _readable(read: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return read(data)
    except (RuntimeError, ValueError) as error:
        if "alloc" in str(error).lower():
            raise MemoryError from None
        raise ExtractionError("the stored crop cannot be read; delete it and sweep the series again") from None


def _exit_of(code: int) -> str:
    if code < 0:
        return f"signal {-code}" + (": out of memory?" if code == -9 else "")
    return f"exit code {code}"
