"""What the fusion classifier may be told: how much strangeness of a case is marked, and how much is refused."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]


class FusionClassifierSettings(BaseModel):
    """Shares of the selected features that lie outside the range seen in training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warn_outside_fraction: Fraction = Field(
        default=0.1, description="Above this share of selected features outside the training range a case is warned of."
    )
    max_outside_fraction: Fraction = Field(
        default=1.0,
        description="Above this share of selected features outside the training range a case is not evaluated; "
        "1 evaluates every case.",
    )
