"""The whole spine in two pictures, sagittal and coronal, along its own curve: masks, levels, heights, decisions.

A plane through a spine that bends to the side misses half of it. Each row of a picture is taken where the spine is at
that height, so all bodies stand in one picture.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.fracture.crop import reoriented
from shared.fracture.keys import SpineView
from shared.fracture.spine.record import Finding
from shared.fracture.volume import Mask, Volume

PIXEL_MM: Final = 0.6
BEFORE_MM: Final = 55.0
BEHIND_MM: Final = 60.0
BESIDE_MM: Final = 55.0
ALONG_MM: Final = 20.0
TEXT_PIXELS: Final = 165
"""Room for words beside the picture."""
WINDOW_HU: Final = (-250, 1250)
COLOURS: Final = {
    "fractured": (255, 82, 82),
    "review": (255, 193, 7),
    "not-fractured": (102, 204, 128),
    "not-evaluable": (150, 170, 200),
}
_FONT_PIXELS: Final = 13
_MAX_PIXELS: Final = 2400


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A vertebra of the pictures, and its value in the label map."""

    finding: Finding
    label: int


def spine_pictures(scan: Volume, labels: Mask, shown: Sequence[Shown]) -> dict[SpineView, bytes]:
    """PNG files by view; none where nothing is to be shown. `labels` on the scan's grid."""
    if not shown:
        return {}
    image, masks = reoriented(scan), reoriented(labels)
    centres = np.array([one.finding.centre_zyx for one in shown], dtype=np.float64)
    spacing = np.asarray(image.geometry.spacing_zyx)
    extent = np.asarray(image.geometry.shape_zyx) * spacing
    low = max(float(centres[:, 0].min()) - 15 - ALONG_MM, 0.0)
    high = min(float(centres[:, 0].max()) + 15 + ALONG_MM, float(extent[0] - spacing[0]))
    pixel = max(PIXEL_MM, (high - low) / _MAX_PIXELS)
    rows = np.arange(high, low, -pixel)
    order = np.argsort(centres[:, 0])
    along = [np.interp(rows, centres[order, 0], centres[order, axis]) for axis in (1, 2)]
    found: dict[SpineView, bytes] = {}
    views: tuple[tuple[SpineView, int, float, float], ...] = (
        ("sagittal", 1, BEFORE_MM, BEHIND_MM),
        ("coronal", 2, BESIDE_MM, BESIDE_MM),
    )
    for view, across, before, after in views:
        middle = float(centres[:, across].mean())
        columns = np.arange(middle - before, middle + after, pixel)
        other = along[1] if across == 1 else along[0]
        grey, values = _plane(image.voxels, masks.voxels, rows, columns, other, across=across, spacing=spacing)
        found[view] = _drawn(grey, values, shown, rows=rows, columns=columns, across=across, pixel=pixel)
    return found


def _plane(
    voxels: NDArray[np.generic],
    labels: NDArray[np.generic],
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
    other: NDArray[np.float64],
    *,
    across: int,
    spacing: NDArray[np.float64],
) -> tuple[NDArray[np.float32], NDArray[np.generic]]:
    """HU (linear in the plane) and labels (nearest) at rows and columns in mm; `other`: the third place of each row."""
    third = 3 - across
    index = {
        0: rows / spacing[0],
        across: columns / spacing[across],
        third: np.clip(np.rint(other / spacing[third]).astype(int), 0, voxels.shape[third] - 1),
    }
    inside = (index[across] >= 0) & (index[across] <= voxels.shape[across] - 1)
    row = np.clip(index[0], 0, voxels.shape[0] - 1)
    column = np.clip(index[across], 0, voxels.shape[across] - 1)

    def at(values: NDArray[np.generic], r: NDArray[np.intp], c: NDArray[np.intp]) -> NDArray[np.generic]:
        places = [r[:, None], c[None, :], index[third][:, None]]
        taken: NDArray[np.generic] = values[tuple(places[(0, across, third).index(axis)] for axis in range(3))]
        return taken

    r0, c0 = np.floor(row).astype(int), np.floor(column).astype(int)
    r1, c1 = np.minimum(r0 + 1, voxels.shape[0] - 1), np.minimum(c0 + 1, voxels.shape[across] - 1)
    wr, wc = (row - r0).astype(np.float32)[:, None], (column - c0).astype(np.float32)[None, :]
    grey = (
        at(voxels, r0, c0).astype(np.float32) * (1 - wr) * (1 - wc)
        + at(voxels, r1, c0).astype(np.float32) * wr * (1 - wc)
        + at(voxels, r0, c1).astype(np.float32) * (1 - wr) * wc
        + at(voxels, r1, c1).astype(np.float32) * wr * wc
    )
    grey[:, ~inside] = WINDOW_HU[0]
    values = at(labels, np.rint(row).astype(int), np.rint(column).astype(int)).copy()
    values[:, ~inside] = 0
    return grey, values


def _drawn(
    grey: NDArray[np.float32],
    values: NDArray[np.generic],
    shown: Sequence[Shown],
    *,
    rows: NDArray[np.float64],
    columns: NDArray[np.float64],
    across: int,
    pixel: float,
) -> bytes:
    low, high = WINDOW_HU
    base = np.clip((grey - low) / (high - low), 0, 1) * 255
    picture = np.repeat(base[:, :, None], 3, axis=2).astype(np.uint8)
    for one in shown:
        mine = values == one.label
        edge = mine & ~(_shifted(mine, 1, 0) & _shifted(mine, -1, 0) & _shifted(mine, 0, 1) & _shifted(mine, 0, -1))
        picture[edge] = COLOURS[one.finding.decision]
    margin = np.zeros((picture.shape[0], TEXT_PIXELS, 3), dtype=np.uint8)
    drawn = Image.fromarray(np.concatenate([picture, margin], axis=1))
    pen = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=_FONT_PIXELS)
    for one in shown:
        finding = one.finding
        y = float((rows[0] - finding.centre_zyx[0]) / pixel)
        x = float((finding.centre_zyx[across] - columns[0]) / pixel)
        colour = COLOURS[finding.decision]
        pen.text((x, y), finding.level, fill=colour, font=font, anchor="mm", stroke_width=2, stroke_fill=(0, 0, 0))
        pen.text((picture.shape[1] + 6, y), _words(finding), fill=colour, font=font, anchor="lm")
    stream = io.BytesIO()
    drawn.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def _shifted(mask: NDArray[np.bool_], down: int, right: int) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    height, width = mask.shape
    shifted: NDArray[np.bool_] = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
    return shifted


def _words(finding: Finding) -> str:
    heights = (finding.anterior_mm, finding.middle_mm, finding.posterior_mm)
    if any(height is None for height in heights):
        return finding.decision
    three = "/".join(f"{height.value:.0f}" for height in heights if height is not None)
    lost = "" if finding.loss is None else f"  {max(finding.loss.value, 0.0) + 0.0:.0%}"
    return f"{three} mm{lost}"
