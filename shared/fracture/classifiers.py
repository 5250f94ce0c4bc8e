"""A bundle's classifier, run so that a case's score does not depend on what is scored beside it.

One row at a time, one thread, on the CPU: the same case has the same bits on every worker of one kind of processor.
z is standardised in float64 by the caller and rounded to float32 here, in one place: the trees were fitted on values
that were rounded in the same way, so a value at a threshold falls on the same side (METHOD 9).

onnxruntime is imported when a classifier is made, not before: services that only read linear steps do without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ScoreOf = Callable[[NDArray[np.float64]], float]
"""From standardised inputs z (k,) to a classifier's score."""
_LARGEST: Final = float(np.finfo(np.float32).max)
_WARNINGS_AND_WORSE: Final = 3


class ClassifierUnusable(Exception):
    """A classifier that cannot be run here; the text says why."""


def rounded(z: NDArray[np.float64]) -> NDArray[np.float32]:
    """z as float32, the nearest values; what lies beyond float32 becomes its largest. ValueError on what is no number.

    Fitting and scoring both see these values.
    """
    if np.isnan(z).any():
        raise ValueError("a standardised feature is not a number")
    return np.clip(z, -_LARGEST, _LARGEST).astype(np.float32)


class OnnxScore:
    """A classifier in ONNX: input `z` float32 (n, width), output `score` float32 (n, 1).

    ClassifierUnusable where onnxruntime is not installed, or cannot load it.
    """

    def __init__(self, onnx: bytes, *, width: int) -> None:
        self._width = width
        self._session = _session(onnx)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if [one.name for one in inputs] != ["z"] or [one.name for one in outputs] != ["score"]:
            raise ClassifierUnusable("a classifier takes z and gives score")

    def score(self, z: NDArray[np.float64]) -> float:
        """The score of one row z (width,)."""
        if z.shape != (self._width,):
            raise ValueError(f"the classifier takes {self._width} inputs, not an array of shape {z.shape}")
        found = self._session.run(["score"], {"z": rounded(z)[None]})[0]
        return float(found[0, 0])

    def scores(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """The scores (n,) of rows z (n, width), each run by itself."""
        return np.array([self.score(row) for row in z], dtype=np.float64)


def _session(onnx: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ClassifierUnusable(
            "it needs onnxruntime, which is not installed (pip install 'fracture-sweep[fusion-classifier]')"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = _WARNINGS_AND_WORSE
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no public base
        raise ClassifierUnusable(f"onnxruntime cannot load it ({type(error).__name__})") from error
