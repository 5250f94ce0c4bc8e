"""Whether a scan's header can be believed about where head and back are: the spine itself tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.fracture.spine.chain import Vertebra

LEAST_BODIES: Final = 6
"""With fewer bodies their growth towards the feet says nothing."""
SHRINKING: Final = 0.75
"""Bodies grow towards the feet; where the lowest have less than this share of the highest, the scan is upside down."""
UPSIDE_DOWN: Final = "the scan lies upside down: {}; its orientation (ImageOrientationPatient, or the affine) is wrong"
BACK_TO_FRONT: Final = (
    "front and back are exchanged: the arches of the vertebrae lie before their bodies; the scan's orientation "
    "(ImageOrientationPatient, or the affine) is wrong"
)


def orientation_fault(chain: Sequence[Vertebra], *, sacrum_above: bool, arches_behind_mm: float | None) -> str:
    """Why a scan's orientation cannot be right, or "". `chain` is from head to foot; `sacrum_above`: of all bodies.

    `arches_behind_mm`: how far behind the bodies the posterior elements lie (`behind_mm`).
    """
    if sacrum_above:
        return UPSIDE_DOWN.format("the sacrum is seen above the lumbar vertebrae")
    if arches_behind_mm is not None and arches_behind_mm < 0:
        return BACK_TO_FRONT
    volumes = [one.volume_ml for one in chain if not one.cut_off]
    if len(volumes) >= LEAST_BODIES:
        third = len(volumes) // 3
        if float(np.median(volumes[-third:])) < SHRINKING * float(np.median(volumes[:third])):
            return UPSIDE_DOWN.format("the vertebral bodies grow smaller towards the feet")
    return ""


def behind_mm(arches: NDArray[np.bool_], bodies: NDArray[np.bool_], *, spacing_mm: float) -> float | None:
    """How far behind bodies arches lie: the median over the slices (axis 0) that show both; axis 1 goes to the back."""
    depth = np.arange(bodies.shape[1])
    places = []
    for part in (arches, bodies):
        rows = part.sum(axis=2)
        count = rows.sum(axis=1)
        places.append(np.where(count > 0, (rows @ depth) / np.maximum(count, 1), np.nan))
    away = places[0] - places[1]
    return None if np.isnan(away).all() else float(np.nanmedian(away)) * spacing_mm
