"""The built-in network, run over the sagittal slices of a volume: first some of them all over, then all near the spine.

A scan is mostly not spine. Every sixth slice says where the bodies are; only a box around them is looked at slice by
slice, which takes a quarter of the time and of the memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from shared.fracture.crop import Box
from shared.fracture.spine.network_card import NetworkCard
from shared.pipeline.errors import FractureSweepError

COARSE_STEP: Final = 6
BATCH: Final = 4
BESIDE_MM: Final = 54.0
"""How far to both sides of the bodies every slice is looked at: the ribs begin there."""
BEFORE_MM: Final = 30.0
BEHIND_MM: Final = 66.0
ALONG_MM: Final = 24.0
MIN_SPINE_MM2: Final = 150.0
"""Less "body" in a slice counts for nothing when the spine is looked for."""
_WARNINGS_AND_WORSE: Final = 3


@dataclass(frozen=True, kw_only=True)
class ClassMaps:
    """What the network says inside a box of a volume (array indices): the share of "body", and the likeliest class."""

    box: Box
    body: NDArray[np.uint8]
    """0 to 255."""
    classes: NDArray[np.uint8]


class SpineNetwork:
    """A loaded network. FractureSweepError where onnxruntime cannot load it. `threads`: 0 takes every core."""

    def __init__(self, card: NetworkCard, onnx: bytes, *, threads: int = 0) -> None:
        self.card = card
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.log_severity_level = _WARNINGS_AND_WORSE
        options.use_deterministic_compute = True
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no public base
            raise FractureSweepError(f"the segmenter's network cannot be loaded ({type(error).__name__})") from error

    def probabilities(self, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, channels, height, width) to (n, classes, height, width); the sides may have any length."""
        height, width = pictures.shape[2:]
        multiple = self.card.multiple
        padding = ((0, 0), (0, 0), (0, -height % multiple), (0, -width % multiple))
        padded = np.pad(pictures, padding, mode="edge")
        found: NDArray[np.float32] = self._session.run(["probabilities"], {"pictures": padded})[0]
        return found[:, :, :height, :width]

    def maps(self, hu: NDArray[np.int16]) -> ClassMaps | None:
        """What a volume (z, y, x; axes towards superior, posterior, left; the card's spacing) shows.

        None where nothing in it looks like vertebral bodies.
        """
        box = self._around_spine(hu)
        if box is None:
            return None
        shape = tuple(high - low for low, high in box)
        body = np.zeros(shape, dtype=np.uint8)
        classes = np.zeros(shape, dtype=np.uint8)
        rows, columns = slice(*box[0]), slice(*box[1])
        value = self.card.value("body")
        for start in range(box[2][0], box[2][1], BATCH):
            chosen = range(start, min(start + BATCH, box[2][1]))
            shares = self.probabilities(self._pictures(hu, chosen, rows, columns))
            for place, slice_index in enumerate(chosen):
                body[:, :, slice_index - box[2][0]] = np.rint(255 * shares[place, value])
                classes[:, :, slice_index - box[2][0]] = shares[place].argmax(axis=0)
        return ClassMaps(box=box, body=body, classes=classes)

    def _pictures(self, hu: NDArray[np.int16], chosen: range, rows: slice, columns: slice) -> NDArray[np.float32]:
        given = self.card.given
        pictures = np.empty(
            (len(chosen), len(given.offsets), rows.stop - rows.start, columns.stop - columns.start), dtype=np.float32
        )
        for place, middle in enumerate(chosen):
            for channel, offset in enumerate(given.offsets):
                side = min(max(middle + offset, 0), hu.shape[2] - 1)
                pictures[place, channel] = given.scaled(hu[rows, columns, side].astype(np.float32))
        return pictures

    def _around_spine(self, hu: NDArray[np.int16]) -> Box | None:
        """The box around what looks like bodies in some of the slices."""
        spacing = self.card.given.spacing_mm
        everything = slice(0, hu.shape[0]), slice(0, hu.shape[1])
        places = range(min(COARSE_STEP // 2, hu.shape[2] - 1), hu.shape[2], COARSE_STEP)
        seen: dict[int, NDArray[np.bool_]] = {}
        for middle in places:
            shares = self.probabilities(self._pictures(hu, range(middle, middle + 1), *everything))
            found = shares[0].argmax(axis=0) == self.card.value("body")
            if float(found.sum()) * spacing**2 >= MIN_SPINE_MM2:
                seen[middle] = found
        if not seen:
            return None
        columns = _heaviest_run(sorted(seen), {middle: int(found.sum()) for middle, found in seen.items()})
        together = np.any([seen[middle] for middle in columns], axis=0)
        z, y = np.flatnonzero(together.any(axis=1)), np.flatnonzero(together.any(axis=0))

        def around(low: int, high: int, size: int, before: float, after: float) -> tuple[int, int]:
            return max(low - round(before / spacing), 0), min(high + round(after / spacing) + 1, size)

        return (
            around(int(z[0]), int(z[-1]), hu.shape[0], ALONG_MM, ALONG_MM),
            around(int(y[0]), int(y[-1]), hu.shape[1], BEFORE_MM, BEHIND_MM),
            around(columns[0], columns[-1], hu.shape[2], BESIDE_MM, BESIDE_MM),
        )


def _heaviest_run(places: list[int], weight: dict[int, int]) -> list[int]:
    """Of the runs of neighbouring slices the one with the most in it: a hip that looks like a body is another run."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place - runs[-1][-1] <= COARSE_STEP:
            runs[-1].append(place)
        else:
            runs.append([place])
    return max(runs, key=lambda run: sum(weight[place] for place in run))
