"""What the resampler may be told: the limits of the guards, how many series run at once, and what one may cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.fracture.guards import GuardSettings


class ResamplerSettings(GuardSettings):
    """The guards' limits, the series under way at once, and the budget of time and memory of one."""

    series_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Series handled at once; each holds its whole volume and masks in memory."
    )
    series_seconds: Annotated[float, Field(gt=0)] = Field(
        default=900.0, description="A series whose cases take longer is stopped and dead-lettered as over budget."
    )
    memory_gib: Annotated[float, Field(ge=0)] = Field(
        default=16.0,
        description="Address space that the process of a series may take; a series that wants more is dead-lettered as "
        "over budget. 0 sets no limit.",
    )
