"""Extraction in processes of its own (shared.pipeline.process_pool): one case each, within its budget.

The worker's process never runs pyradiomics on a case, so that its connection to the broker outlives whatever a case
does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import SimpleITK as sitk

from services.radiomics_extractor.extraction import ExtractionError, extract
from services.radiomics_extractor.settings import RadiomicsExtractorSettings
from shared.fracture.volume import mask_from_nrrd, volume_from_nrrd, wanted_memory
from shared.pipeline.process_pool import ProcessPool, cores

CaseFunction = Callable[[bytes, bytes, str], dict[str, float]]

_PRELOADED: Final = ("services.radiomics_extractor.process_pool",)


class ExtractionPool:
    """Processes that extract the features of stored crops with one parameter file."""

    def __init__(
        self, *, parameters: str, settings: RadiomicsExtractorSettings, function: CaseFunction | None = None
    ) -> None:
        self._parameters = parameters
        self._function = function or extract_stored
        self._pool = ProcessPool(
            what="the extraction",
            processes=settings.processes or cores(),
            seconds=settings.case_seconds,
            memory_gib=settings.memory_gib,
            jobs_per_process=settings.cases_per_process,
            preload=_PRELOADED,
            prepare=prepare_process,
        )

    @property
    def processes(self) -> int:
        """How many cases are extracted at once."""
        return self._pool.processes

    def extract(self, *, image: bytes, mask: bytes) -> dict[str, float]:
        """The features of a crop and its mask (bytes of NRRD files); blocks until they are there.

        Raises ExtractionError (this input has none), OverBudget (time, memory) and Retry (the process died).
        """
        return self._pool.run(self._function, image, mask, self._parameters)

    def check(self) -> None:
        """FractureSweepError where the pool takes no work any more."""
        self._pool.check()

    def close(self) -> None:
        """End the processes; what they were doing is lost."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def prepare_process() -> None:
    """Runs first in each process: one thread for ITK, since there is a process a core."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def extract_stored(image: bytes, mask: bytes, parameters: str) -> dict[str, float]:
    """Runs in a process of the pool: the features of a crop and its mask as they lie in the store."""
    try:
        return extract(_readable(volume_from_nrrd, image), _readable(mask_from_nrrd, mask), parameters=parameters)
    except RuntimeError as error:
        if wanted_memory(error):
            raise MemoryError from None
        raise RuntimeError(f"pyradiomics failed on the case: {type(error).__name__}") from error


def _readable(read: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return read(data)
    except (RuntimeError, ValueError):
        raise ExtractionError("the stored crop cannot be read; delete it and sweep the series again") from None
