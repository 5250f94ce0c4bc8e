"""What intake may be told: limits that protect the machine, tolerances of geometry, and when to wait."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

GIB: Final = 1 << 30


class PressureSettings(BaseModel):
    """When ingest waits before it takes the next series. No part of a manifest's id: it decides when, not what."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_cases_under_way: Annotated[int, Field(ge=0)] = 2000
    """From so many cases under way on, ingest takes no new series; it goes on at nine tenths of it. 0: no limit."""
    min_free_gib: Annotated[float, Field(ge=0)] = 2.0
    """With less free space in the store (GiB) ingest takes no new series and submit refuses; it goes on a tenth above.
    0: no watermark. A small default, so that a laptop's disk will do; a hospital's store deserves 50 or more."""
    poll_seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """How often a waiting ingest looks again, and for how long an answer about free space holds."""

    @property
    def min_free_bytes(self) -> int:
        """The watermark in bytes."""
        return int(self.min_free_gib * GIB)


class IngestSettings(BaseModel):
    """Limits and tolerances of intake; `model_dump()` goes into the manifest's id, they decide what a series is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seg_roi: Literal["body", "vertebra"] | None = None
    """What the segments of a DICOM SEG hold whose codes and labels do not say it; none: such a mask is refused."""
    max_rows_columns: Count = 4096
    """Rows or Columns above it are refused before memory is taken."""
    max_frames: Count = 5000
    """Frames of one instance."""
    max_instance_bytes: Count = 1 << 30
    """Decoded bytes of one instance."""
    max_series_bytes: Count = 4 << 30
    """Decoded bytes (int16) of one series."""
    max_inflated_bytes: Count = 256 << 20
    """What a deflated file may grow to."""
    min_slices: Count = 3
    """Fewer slices make no volume."""
    max_axial_tilt_degrees: Positive = 45.0
    """Between the slice normal and the patient's head-foot axis; above it a stack is sagittal, coronal or oblique."""
    max_gantry_tilt_degrees: Positive = 0.2
    """Between the slice normal and the line of the slices' positions."""
    spacing_tolerance: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of the slice spacing by which single steps may differ."""
    same_position_mm: Positive = 0.01
    """Slices closer than this lie at one position."""
    in_plane_tolerance_mm: Positive = 0.1
    """How far slices may be shifted against each other within their plane."""
    orientation_tolerance: Positive = 1e-3
    """Difference of direction cosines that still counts as one orientation."""
    max_scored_spacing_mm: Positive = 3.0
    """Coarser slice spacing is one more reason where a series is refused for another (METHOD 10 judges it by case)."""
