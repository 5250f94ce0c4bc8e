"""What the resampler may be told: the limits of the guards, and how many series it holds in memory at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.fracture.guards import GuardSettings


class ResamplerSettings(GuardSettings):
    """The guards' limits, and the series under way at once."""

    series_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Series handled at once; each holds its whole volume and masks in memory."
    )
