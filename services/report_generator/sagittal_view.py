"""The picture of a vertebra in its report: one sagittal slice in the bone window, the mask's outline, a scale.

A crop's axes run towards superior, posterior and left (shared.fracture.crop), so a sagittal slice is drawn with its
rows turned over: head on top, and the patient's front on the reader's left.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.fracture.volume import Mask, Volume

WINDOW_WIDTH_HU: Final = 1500
WINDOW_LEVEL_HU: Final = 500
ENLARGEMENT: Final = 4
"""Picture elements a voxel, interpolated, so that a browser does not show squares."""
SCALE_BARS_MM: Final = (50, 20, 10, 5, 2)

Point = tuple[float, float]
Edge = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class SagittalView:
    """One slice, ready to be drawn: x runs from anterior to posterior, y from superior to inferior, in millimetres."""

    png: bytes
    width_mm: float
    height_mm: float
    outlines: tuple[tuple[Point, ...], ...]
    """Closed lines around the mask, through the middles of its pixels' outer edges."""
    slice_number: int
    """From 1, counted from the patient's right."""
    slices: int
    scale_bar_mm: int

    @property
    def data_uri(self) -> str:
        """The picture as a `data:` address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")

    @property
    def path(self) -> str:
        """The outlines as the `d` attribute of an SVG path."""
        return " ".join("M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in loop) + " Z" for loop in self.outlines)


def sagittal_view(image: Volume, mask: Mask, *, slice_index: int) -> SagittalView:
    """The view of one sagittal slice of a crop; `slice_index` on the left-right axis (axis 2)."""
    spacing_zyx = image.geometry.spacing_zyx
    hu = np.asarray(image.voxels[::-1, :, slice_index], dtype=np.float64)
    inside = np.asarray(mask.voxels[::-1, :, slice_index]) != 0
    rows, columns = hu.shape
    height_mm, width_mm = rows * spacing_zyx[0], columns * spacing_zyx[1]
    loops = tuple(tuple((x * spacing_zyx[1], y * spacing_zyx[0]) for x, y in loop) for loop in outlines_of(inside))
    return SagittalView(
        png=_png(bone_window(hu), size=(round(width_mm * ENLARGEMENT), round(height_mm * ENLARGEMENT))),
        width_mm=width_mm,
        height_mm=height_mm,
        outlines=loops,
        slice_number=slice_index + 1,
        slices=image.voxels.shape[2],
        scale_bar_mm=next((bar for bar in SCALE_BARS_MM if bar <= width_mm / 3), 1),
    )


def bone_window(hu: NDArray[np.float64]) -> NDArray[np.uint8]:
    """HU as grey values: black at level - width/2 and below, white at level + width/2 and above."""
    low = WINDOW_LEVEL_HU - WINDOW_WIDTH_HU / 2
    grey = np.clip((hu - low) / WINDOW_WIDTH_HU, 0.0, 1.0) * 255.0
    return np.asarray(np.round(grey), dtype=np.uint8)


def outlines_of(inside: NDArray[np.bool_]) -> tuple[tuple[Point, ...], ...]:
    """Closed lines around a two-dimensional mask, in pixels (x, y) from the upper left corner of the first pixel.

    The line joins the middles of the outer edges of the mask's pixels; pixels that touch at a corner alone are
    outlined each on its own.
    """
    following = _outer_edges(np.asarray(inside, dtype=bool))
    loops: list[tuple[Point, ...]] = []
    while following:
        start = next(iter(following))
        loop: list[Point] = []
        edge: Edge | None = (start, following[start].pop(0))
        while edge is not None:
            (x0, y0), (x1, y1) = edge
            loop.append(((x0 + x1) / 2, (y0 + y1) / 2))
            if not following[edge[0]]:
                del following[edge[0]]
            edge = _next_edge(edge, following)
        loops.append(tuple(loop))
    return tuple(loops)


def _outer_edges(inside: NDArray[np.bool_]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    # Each pixel's edges run clockwise (on the screen), so that the mask lies on the right hand of every edge.
    padded = np.pad(inside, 1)
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, column in np.argwhere(inside).tolist():
        y, x = int(row), int(column)
        if not padded[y, x + 1]:
            following.setdefault((x, y), []).append((x + 1, y))
        if not padded[y + 1, x + 2]:
            following.setdefault((x + 1, y), []).append((x + 1, y + 1))
        if not padded[y + 2, x + 1]:
            following.setdefault((x + 1, y + 1), []).append((x, y + 1))
        if not padded[y + 1, x]:
            following.setdefault((x, y + 1), []).append((x, y))
    return following


def _next_edge(edge: Edge, following: dict[tuple[int, int], list[tuple[int, int]]]) -> Edge | None:
    (x0, y0), (x1, y1) = edge
    choices = following.get((x1, y1))
    if not choices:
        return None
    right = (x1 - (y1 - y0), y1 + (x1 - x0))
    target = right if right in choices else choices[0]
    choices.remove(target)
    return (x1, y1), target


def _png(grey: NDArray[np.uint8], *, size: tuple[int, int]) -> bytes:
    picture = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
