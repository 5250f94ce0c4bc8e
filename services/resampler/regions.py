"""Which voxels of a label map are the region of a level, after the body cut (METHOD 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shared.fracture.protocol import RoiKind
from shared.fracture.volume import Mask


@dataclass(frozen=True, kw_only=True)
class Region:
    """The region of one level on the source grid, and what it holds. `uncut` is the vertebra before a body cut."""

    roi: Mask
    roi_kind: RoiKind
    uncut: Mask | None = None


def region_of(labels: Mask, value: int, *, roi_kind: RoiKind, wanted: RoiKind, bodies: Mask | None) -> Region:
    """The voxels of one label; cut by `bodies` (0/1, same grid) where whole vertebrae came and bodies are wanted.

    Without a body mask the whole vertebra stays one, and the guard of the ROI kind speaks.
    """
    whole = Mask(voxels=labels.voxels == value, geometry=labels.geometry)
    if bodies is None or roi_kind == wanted or wanted == "vertebra":
        return Region(roi=whole, roi_kind=roi_kind)
    body = Mask(voxels=np.logical_and(whole.voxels, bodies.voxels), geometry=labels.geometry)
    return Region(roi=body, roi_kind="body", uncut=whole)
