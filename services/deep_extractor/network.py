"""The bundle's ONNX network, run so that a picture's features do not depend on what waits beside it.

The same case must have the same features embedded and distributed, whatever the batch and the number of threads. A
run's shape is therefore fixed by the device alone: on the CPU each picture runs by itself, on CUDA pictures run in
frames of 32, padded with zeros. Measured with a ResNet50 on ONNX Runtime 1.32 (AVX2, two cores): alone or in batches of
2, 3, 4, 8 and 16, with 1 to 4 threads, all bits equal; alone costs 15 ms a picture where a batch of 16 costs 10, which
is nothing beside the 3 s of radiomics. Other processors have other kernels, so the rule stays. CUDA's and the CPU's
features agree within the golden image's tolerance, which is checked at each start.

int8 weights with DequantizeLinear are unfolded once, when the session is made (`disable_quant_qdq`): 13 ms, not 24.
The trainer computes through this module too, so that what the classifier was fitted on is what it is given.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from services.deep_extractor.settings import Device
from shared.fracture.bundle import GoldenImage
from shared.pipeline.errors import FractureSweepError, OverBudget

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
CUDA_FRAME: Final = 32
"""Pictures in one run on CUDA; part of what makes a result repeatable, hence no setting."""
_WARNINGS_AND_WORSE: Final = 3


class Network:
    """A loaded network. FractureSweepError where it cannot be loaded, or the device that was demanded is not there.

    `seconds` is what the pictures of one call may take together.
    """

    def __init__(
        self, onnx: bytes, *, device: Device = "auto", intra_op_threads: int = 1, seconds: float | None = None
    ) -> None:
        self._seconds = seconds
        available = onnxruntime.get_available_providers()
        if device == "cuda" and CUDA not in available:
            raise FractureSweepError(
                "the setting device is cuda, but this onnxruntime has no CUDA (install onnxruntime-gpu, or set auto)"
            )
        self._session = self._open(
            onnx, cuda=device != "cpu" and CUDA in available, intra_op_threads=intra_op_threads or (os.cpu_count() or 1)
        )
        self.provider: str = self._session.get_providers()[0]
        """What the session really got: the GPU wheel names CUDA where there is none."""
        if device == "cuda" and self.provider != CUDA:
            raise FractureSweepError(
                f"the setting device is cuda, but the network got {self.provider} (is a GPU with its driver there?)"
            )
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or len(outputs[0].shape) != 2:
            raise FractureSweepError("the network must take (n, 1, size, size) and give (n, features)")
        self._input, self._output = inputs[0].name, outputs[0].name

    @staticmethod
    def _open(onnx: bytes, *, cuda: bool, intra_op_threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op_threads
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = _WARNINGS_AND_WORSE
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # TF32 keeps ten bits of mantissa, and an exhaustive search may choose another algorithm each time
        on_cuda = (CUDA, {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})
        try:
            return onnxruntime.InferenceSession(onnx, options, providers=[on_cuda, CPU] if cuda else [CPU])
        except Exception as error:  # onnxruntime's exceptions have no public base
            raise FractureSweepError(f"the network cannot be loaded by onnxruntime ({type(error).__name__})") from error

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Where it really runs."""
        return "cuda" if self.provider == CUDA else "cpu"

    @property
    def provenance(self) -> dict[str, str]:
        """What may matter of this run later, beside the protocol."""
        return {"execution_provider": self.provider, "onnxruntime": str(onnxruntime.__version__)}

    def features(self, pictures: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float64]]:
        """The features of pictures (size, size), each as float64 (the float32 values, exactly).

        OverBudget where they take too long: onnxruntime looks at its flag between two operators of the network.
        """
        options = onnxruntime.RunOptions()
        overdue = threading.Event()

        def stop() -> None:
            overdue.set()
            options.terminate = True

        timer = None if self._seconds is None else threading.Timer(self._seconds, stop)
        try:
            if timer is not None:
                timer.daemon = True
                timer.start()
            return self._features(pictures, options)
        except Exception:  # onnxruntime's exceptions have no public base
            if overdue.is_set():
                raise OverBudget(f"the network took more than {self._seconds:g} s") from None
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _features(self, pictures: Sequence[NDArray[np.float32]], options: Any) -> list[NDArray[np.float64]]:
        frame = CUDA_FRAME if self.provider == CUDA else 1
        found: list[NDArray[np.float64]] = []
        for start in range(0, len(pictures), frame):
            part = pictures[start : start + frame]
            stack = np.zeros((frame, 1, *part[0].shape), dtype=np.float32)
            stack[: len(part), 0] = part
            values = self._session.run([self._output], {self._input: stack}, options)[0]
            found += [row.astype(np.float64) for row in values[: len(part)]]
        return found


def check_golden(network: Network, golden: GoldenImage) -> float:
    """The largest difference from the bundle's golden features; FractureSweepError above the golden tolerance."""
    expected = np.asarray(golden.features, dtype=np.float64)
    got = network.features([np.asarray(golden.pixels, dtype=np.float32)])[0]
    if got.shape != expected.shape:
        raise FractureSweepError(f"the network gives {got.size} features, its golden image has {expected.size}")
    difference = float(np.abs(got - expected).max())
    allowed = golden.tolerance * max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed:
        raise FractureSweepError(
            f"on {network.provider} the golden image's features differ by {difference:.2g}, allowed is {allowed:.2g}"
        )
    return difference
