"""What the report-generator may be told; nothing here changes what a report says."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class ReportGeneratorSettings(BaseModel):
    """Named copies, and how often a worklist is made anew."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    named_reports: bool = Field(
        default=False,
        description="Also write copies of reports and worklists with patient name, id, accession number and study "
        "date, under the restricted prefix named/.",
    )
    worklist_every_seconds: Annotated[float, Field(ge=0, le=86400)] = Field(
        default=30.0,
        description="A running sweep's worklist is made anew at most once in this time; 0 makes it at every report.",
    )
    slots: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="How many reports one worker writes at the same time."
    )
