"""Where masks come from, what the gate decides, and what one series may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from shared.fracture.spine.gate import Gate, GateSettings

MaskSource = Literal["built-in", "command", "off"]
BUILT_IN_NETWORK: Final = Path(__file__).resolve().parents[2] / "deploy" / "segmenters" / "built-in"
"""The network that comes with the project."""


class SegmenterSettings(GateSettings):
    """The source of masks, the gate with its limits, and the budget of time and memory of a series."""

    source: MaskSource = Field(
        default="built-in",
        description="Who makes the masks of series that come without: our own network, a plugged-in command, nobody "
        "(then such series are refused, and no heights are read).",
    )
    gate: Gate = Field(
        default="auto",
        description="Whose vertebrae the height gate keeps from being scored: auto, those of automatic masks; all, "
        "those of given masks too.",
    )
    network: Path = Field(default=BUILT_IN_NETWORK, description="Folder of the built-in segmenter's network.")
    command: Path | None = Field(
        default=None, description="TOML file that declares the plugged-in command (docs/segmentation.md)."
    )
    coarsest_mm: Annotated[float, Field(gt=0)] = Field(
        default=6.0,
        description="A series whose slices lie farther apart gets no automatic masks. Above max_step_mm bodies are "
        "found, named and shown, and their heights are not read.",
    )
    threads: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0, description="Threads of one segmentation; 0 takes every core."
    )
    series_at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Series segmented at once; each holds its whole volume in memory."
    )
    series_seconds: Annotated[float, Field(gt=0)] = Field(
        default=900.0, description="A series that takes longer is stopped and dead-lettered as over budget."
    )
    memory_gib: Annotated[float, Field(ge=0)] = Field(
        default=16.0,
        description="Address space that the process of a series may take; a series that wants more is dead-lettered as "
        "over budget. 0 sets no limit.",
    )

    @property
    def limits(self) -> GateSettings:
        """The gate's limits alone."""
        return GateSettings(**{name: getattr(self, name) for name in GateSettings.model_fields})
