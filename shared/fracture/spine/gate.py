"""The gate's limits and answers: which vertebra is asked about at all."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Shape = Literal["none", "wedge", "biconcave", "crush"]
Decision = Literal["fractured", "review", "not-fractured", "not-evaluable"]
Gate = Literal["auto", "all"]

Share = Annotated[float, Field(gt=0, lt=1)]


class GateSettings(BaseModel):
    """The limits of the gate; SEGMENTATION 3 of the design notes gives the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fractured_from: Share = Field(default=0.25, description="Height loss from which on a vertebra is fractured.")
    review_from: Share = Field(
        default=0.20, description="Height loss from which on a person has to look (mild deformity)."
    )
    thick_step_mm: Annotated[float, Field(gt=0)] = Field(
        default=1.5, description="Above this voxel step (mm) along a body's axis the wider limits hold."
    )
    thick_fractured_from: Share = Field(
        default=0.35, description="On thick slices: height loss from which on a vertebra is fractured."
    )
    thick_review_from: Share = Field(
        default=0.15, description="On thick slices: height loss from which on a person has to look."
    )
    max_step_mm: Annotated[float, Field(gt=0)] = Field(
        default=3.0, description="Above this voxel step (mm) along a body's axis heights are not read."
    )
    step_tolerance_mm: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="By how much (mm) a step may exceed its limit and still pass."
    )
