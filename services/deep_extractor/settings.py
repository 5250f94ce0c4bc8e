"""What the deep extractor may be told; nothing here changes a number of the CPU's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Device = Literal["auto", "cpu", "cuda"]


class DeepExtractorSettings(BaseModel):
    """Device, threads, and how much of what waits is taken at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Device = Field(
        default="auto",
        description="Where the network runs; cuda fails at start where CUDA cannot be had, auto takes the CPU then.",
    )
    intra_op_threads: Annotated[int, Field(ge=0, le=256)] = Field(
        default=1, description="Threads of one run of the network; 0 takes every core."
    )
    batch_size: Annotated[int, Field(ge=1, le=256)] = Field(
        default=16, description="How many waiting cases are handled as one batch."
    )
    batch_wait_seconds: Annotated[float, Field(ge=0, le=60)] = Field(
        default=0.2, description="How long a batch that is not full waits for the next case."
    )
    batch_seconds: Annotated[float, Field(gt=0)] = Field(
        default=120.0,
        description="A batch on which the network works longer is stopped and its cases run again one by one; one that "
        "takes longer alone is dead-lettered as over budget.",
    )
