"""What is known of a series' spine: levels, heights, grades and the gate's decision, vertebra by vertebra.

Lies in the store under `keys.spine`, is written by the segmenter and read by the resampler (which cases are to be
scored) and the report generator. Every number that is measured stands with its band.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.fracture.ids import digest
from shared.fracture.records import Record, Warned
from shared.fracture.spine.gate import Decision, Gate, GateSettings, Shape
from shared.fracture.spine.naming import LevelsFrom

MEASURING_VERSION = 2
"""Rises whenever the same scan or mask would be named, measured or judged otherwise."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Banded(_Frozen):
    """A measured number, and the least and the largest that small changes of frame and surface give."""

    value: float
    low: float
    high: float


class Finding(_Frozen):
    """One vertebra. Heights in mm, losses as shares; None where they cannot be read."""

    level: str
    centre_zyx: tuple[float, float, float]
    """mm from the first voxel of the reoriented volume (shared.fracture.crop.reoriented)."""
    volume_ml: float
    anterior_mm: Banded | None = None
    middle_mm: Banded | None = None
    posterior_mm: Banded | None = None
    expected_mm: float | None = None
    """The posterior height that its unfractured neighbours lead to expect."""
    neighbours: tuple[str, ...] = ()
    loss: Banded | None = None
    """The larger of the two below."""
    loss_within: float | None = None
    loss_neighbours: float | None = None
    grade: Annotated[int, Field(ge=0, le=3)] | None = None
    """Genant's."""
    grade_low: Annotated[int, Field(ge=0, le=3)] | None = None
    grade_high: Annotated[int, Field(ge=0, le=3)] | None = None
    shape: Shape = "none"
    decision: Decision
    reason: str
    warnings: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The height loss in one line, for people."""
        if self.loss is None or self.grade is None:
            return self.reason
        value, low, high = (max(share, 0.0) for share in (self.loss.value, self.loss.low, self.loss.high))
        band = f"{value:.0%} ({low:.0%} to {high:.0%})"
        return f"height loss {band}, Genant grade {self.grade}{'' if self.shape == 'none' else f' {self.shape}'}"


class SegmenterNote(_Frozen):
    """What made a mask: the built-in network, a plugged-in command, or nobody of ours (given)."""

    kind: Literal["built-in", "command", "given"]
    name: str = ""
    version: str = ""
    sha256: str = ""
    """Of the network, or of the command's declaration."""

    @property
    def source(self) -> str:
        """What a bundle calls masks of this maker (Manifest.mask_sources)."""
        return f"{self.kind} {self.name} {self.version} {self.sha256[:16]}"


class SpineRecord(Record):
    """The spine of one series under one mask."""

    series_id: str
    mask_hash: str
    segmenter: SegmenterNote
    levels_from: LevelsFrom
    doubts: tuple[str, ...] = ()
    """Why the levels are uncertain; none where they are named."""
    gate: Gate
    gated: bool
    """Whether the decisions decide: `auto` gates automatic masks, and only annotates given ones."""
    limits: GateSettings
    findings: tuple[Finding, ...]
    """From head to foot."""
    warnings: tuple[Warned, ...] = ()

    def finding(self, level: str) -> Finding | None:
        """The finding of a level."""
        return next((one for one in self.findings if one.level == level), None)


def rules_of(*, gate: Gate, limits: GateSettings) -> dict[str, object]:
    """What decides beside the mask: a change of it can change which vertebra is scored."""
    return {"version": MEASURING_VERSION, "gate": gate, "limits": limits.model_dump(mode="json")}


def spine_hash(*, mask_hash: str, gate: Gate, limits: GateSettings) -> str:
    """The id of a spine record: what it is made from, and the rules."""
    return digest({"mask": mask_hash, "spine": rules_of(gate=gate, limits=limits)})
