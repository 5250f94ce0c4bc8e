"""Decodes compressed pixels in a process of its own: native decoders can abort the whole process on damaged data.

(python-gdcm does, on a JPEG stream that is none: `std::terminate`.) Uncompressed pixels never come here. The process is
started at the first compressed image, replaced after it died or after many images, and ends with its parent.
"""

from __future__ import annotations

import atexit
import multiprocessing
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, Final

import numpy as np
import pydicom
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessPool
from pydicom.pixels.utils import pixel_array

from services.dicom_ingest.headers import quiet_pydicom

SECONDS_AN_IMAGE: Final = 120.0
IMAGES_A_PROCESS: Final = 5000

_lock = threading.Lock()
_pool: Any = None


class DecoderDied(Exception):
    """The decoder's process ended, or did not answer in time, with this image."""


def read_values(path: Path, transfer_syntax_uid: str, decoder: str = "") -> NDArray[Any]:
    """The stored values of a file's pixels in this process; raises what pydicom and its decoders raise.

    `decoder`: pydicom's name of the one to use ('' for uncompressed pixels).
    """
    with quiet_pydicom():
        dataset = pydicom.dcmread(path, force=True)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(transfer_syntax_uid)
        return np.asarray(pixel_array(dataset, raw=True, decoding_plugin=decoder))


def _read_quietly(path: Path, transfer_syntax_uid: str, decoder: str) -> NDArray[Any] | None:
    """In the child: None instead of an exception, whose text could hold values and might not travel."""
    try:
        return read_values(path, transfer_syntax_uid, decoder)
    except Exception:
        return None


def _process() -> Any:
    global _pool
    with _lock:
        if _pool is None or not _pool.active:
            context = multiprocessing.get_context("spawn")
            _pool = ProcessPool(max_workers=1, max_tasks=IMAGES_A_PROCESS, context=context)
        return _pool


@atexit.register
def stop() -> None:
    """End the decoding process, where there is one."""
    global _pool
    with _lock:
        if _pool is not None:
            pool, _pool = _pool, None
            pool.stop()
            pool.join()


def read_values_apart(path: Path, transfer_syntax_uid: str, decoder: str) -> NDArray[Any]:
    """The stored values of a compressed file's pixels; ValueError where they cannot be decoded, DecoderDied."""
    future = _process().schedule(_read_quietly, args=(path, transfer_syntax_uid, decoder), timeout=SECONDS_AN_IMAGE)
    try:
        values = future.result()
    except (ProcessExpired, FutureTimeoutError) as error:
        raise DecoderDied from error
    if values is None:
        raise ValueError("the pixels cannot be decoded")
    return np.asarray(values)
