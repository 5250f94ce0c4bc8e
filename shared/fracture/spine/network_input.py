"""What the segmenter's network is given: read from its card, so that training and serving cannot differ."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class NetworkInput(BaseModel):
    """A sagittal slice with its neighbours, as channels of HU scaled to 0 … 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spacing_mm: Annotated[float, Field(gt=0)] = 1.5
    offsets: tuple[int, ...] = (-4, -2, 0, 2, 4)
    """Slices to the right (below zero) and left that are the channels, in voxels."""
    window_hu: tuple[int, int] = (-300, 900)

    def scaled(self, hu: NDArray[np.float32]) -> NDArray[np.float32]:
        """HU clipped to the window and scaled to 0 … 1."""
        low, high = self.window_hu
        found: NDArray[np.float32] = (np.clip(hu, low, high) - np.float32(low)) / np.float32(high - low)
        return found
