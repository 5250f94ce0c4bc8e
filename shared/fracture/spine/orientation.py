"""Whether a scan's header can be believed about where head and back are: the spine itself tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from shared.fracture.spine.chain import Vertebra

LEAST_BODIES: Final = 6
"""With fewer bodies their growth towards the feet says nothing."""
UPPER_PART: Final = 0.45
"""The largest bodies lie at the lower end of a spine; above this share of it they say that it is upside down …"""
SHRINKING: Final = 0.75
"""… if the lowest have less than this share of their volume."""
FEW_ARCHES: Final = 0.15
"""Fewer voxels of posterior elements than this share of the bodies' are a reason to look from the other side."""
UPSIDE_DOWN: Final = "the scan lies upside down: {}; its orientation (ImageOrientationPatient, or the affine) is wrong"
BACK_TO_FRONT: Final = (
    "front and back are exchanged: the arches of the vertebrae lie before their bodies; the scan's orientation "
    "(ImageOrientationPatient, or the affine) is wrong"
)


def upside_down(chain: Sequence[Vertebra], *, sacrum_above: bool) -> str:
    """Why head and feet must be exchanged, or "". `chain` is from head to foot; `sacrum_above`: of all bodies."""
    if sacrum_above:
        return UPSIDE_DOWN.format("the sacrum is seen above the lumbar vertebrae")
    volumes = np.array([one.volume_ml for one in chain if not one.cut_off])
    if len(volumes) >= LEAST_BODIES:
        largest = np.argsort(-volumes)[:3]
        high = float(np.median(largest)) < UPPER_PART * (len(volumes) - 1)
        if high and float(volumes[-2:].mean()) < SHRINKING * float(volumes[largest].mean()):
            return UPSIDE_DOWN.format("the vertebral bodies grow smaller towards the feet")
    return ""
