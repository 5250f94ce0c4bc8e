"""What the radiomics extractor may be told: how many processes, and what one case may cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class RadiomicsExtractorSettings(BaseModel):
    """Processes, and the budget of time and memory of one case; nothing here changes a number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: Annotated[int, Field(ge=0, le=512)] = Field(
        default=0, description="Cases extracted at once, each in a process of its own; 0 takes every core."
    )
    cases_per_process: Annotated[int, Field(ge=1)] = Field(
        default=100, description="After so many cases a process is replaced by a new one, since long-lived ones leak."
    )
    case_seconds: Annotated[float, Field(gt=0)] = Field(
        default=600.0, description="A case that takes longer is stopped and dead-lettered as over budget."
    )
    memory_gib: Annotated[float, Field(ge=0)] = Field(
        default=8.0,
        description="Address space that one process may take; a case that wants more is dead-lettered as over budget. "
        "0 sets no limit.",
    )
