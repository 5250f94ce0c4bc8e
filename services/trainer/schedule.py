"""The learning rate of a training of a fixed number of steps."""

from __future__ import annotations

import math


def warm_cosine(step: int, *, rate: float, warm_up: int, steps: int) -> float:
    """A short linear warm-up to `rate`, then a cosine to zero."""
    if step < warm_up:
        return rate * (step + 1) / warm_up
    gone = (step - warm_up) / max(steps - warm_up, 1)
    return rate * 0.5 * (1 + math.cos(math.pi * min(gone, 1.0)))
