"""A segmenter and its gate judged on scans of known height loss: body by body, then by slice thickness.

A body that was missed, or merged with another, counts as not called; so does "review". True losses of 30 % and more are
what has to be called fractured, 20 % and less what must not be; what lies between is reported apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import numpy as np
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from services.trainer.figures.figure_data import Cell, FigureData
from services.trainer.figures.style import DTL_COLOUR, HCR_COLOUR, LIMIT_COLOUR, SOFT, light_grid, new_figure
from services.trainer.segmentation.known_loss import KnownScan
from services.trainer.segmentation.matching import matches
from services.trainer.statistics.performance import wilson
from shared.fracture.spine.chain import from_bodies, measured_chain
from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.record import Finding
from shared.fracture.volume import Mask

MUST_BE_CALLED: Final = 0.30
MUST_NOT_BE_CALLED: Final = 0.20
HEIGHTS: Final = ("anterior", "middle", "posterior")

Heights = tuple[float, float, float]
Fate = Literal["found", "missed", "merged"]


class JudgedBody(BaseModel):
    """One body of one scan: the truth, and what the segmenter said of it. Heights in mm, front to back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    origin: str
    scan: int
    slice_mm: float
    level: str
    deformity: str
    true_loss: float
    fate: Fate
    dice: float | None = None
    named: str = ""
    loss: float | None = None
    decision: str = ""
    true_heights: Heights | None = None
    heights: Heights | None = None

    @property
    def called(self) -> bool:
        """Whether the gate lets it through to the classifier."""
        return self.decision == "fractured"


class Share(BaseModel):
    """A share with Wilson's 95 % interval; bodies of one scan are counted as if they were independent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int
    of: int
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def over(cls, flags: Sequence[bool]) -> Share:
        """The share of those that are true."""
        if not flags:
            return cls(count=0, of=0)
        found = wilson(sum(flags), len(flags))
        return cls(count=found.count, of=found.of, value=found.value, low=found.low, high=found.high)


class HeightError(BaseModel):
    """Measured minus true, in mm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: str
    bodies: int
    mean: float
    sd: float
    largest: float


class Summary(BaseModel):
    """What came of the bodies of one origin at one slice thickness."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    origin: str
    slice_mm: float
    bodies: int
    missed: Share
    dice: float | None
    sensitivity: Share
    """True loss of MUST_BE_CALLED and more: called fractured."""
    specificity: Share
    """True loss of MUST_NOT_BE_CALLED and less: not called fractured."""
    between: Share
    """Between both: called fractured."""
    review: Share
    """Of all bodies: sent to a person."""
    not_evaluable: Share
    errors: tuple[HeightError, ...]


def judged_bodies(
    scan: KnownScan,
    *,
    labels: Mask | None,
    findings: Sequence[Finding],
    values: Mapping[str, int],
    true_heights: Mapping[int, Heights],
) -> list[JudgedBody]:
    """Each known body of a scan against what was found. `values`: level → value in `labels`, None where none is."""
    truth = scan.truth.voxels
    found = matches(
        {body.label: truth == body.label for body in scan.bodies},
        np.zeros_like(truth) if labels is None else labels.voxels,
    )
    of_value = {values[one.level]: one for one in findings if one.level in values}
    rows = []
    for body in scan.bodies:
        row = {
            "origin": scan.origin,
            "scan": scan.number,
            "slice_mm": scan.slice_mm,
            "level": body.level,
            "deformity": body.deformity or "none",
            "true_loss": round(body.loss, 4),
            "true_heights": true_heights.get(body.label),
        }
        match = found.get(body.label)
        if match is None or match.label not in of_value:
            rows.append(JudgedBody(**row, fate="missed"))
        elif match.merged:
            rows.append(JudgedBody(**row, fate="merged"))
        else:
            one = of_value[match.label]
            rows.append(
                JudgedBody(
                    **row,
                    fate="found",
                    dice=round(match.dice, 4),
                    named=one.level,
                    loss=None if one.loss is None else one.loss.value,
                    decision=one.decision,
                    heights=_heights(one),
                )
            )
    return rows


def _heights(finding: Finding) -> Heights | None:
    known = (finding.anterior_mm, finding.middle_mm, finding.posterior_mm)
    if known[0] is None or known[1] is None or known[2] is None:
        return None
    return known[0].value, known[1].value, known[2].value


def true_heights(scan: KnownScan) -> dict[int, Heights]:
    """The heights of a scan's true bodies, by their labels; read as those of a mask are."""
    there = [body.label for body in scan.bodies]
    bodies, kept = from_bodies(scan.truth.voxels, there, spacing_zyx=scan.truth.geometry.spacing_zyx)
    found: dict[int, Heights] = {}
    for label, vertebra in zip(kept, measured_chain(bodies), strict=True):
        if vertebra.measured is not None:
            heights = vertebra.measured.heights
            found[label] = (heights.anterior, heights.middle, heights.posterior)
    return found


def summaries(rows: Sequence[JudgedBody]) -> tuple[Summary, ...]:
    """By origin and slice thickness; phantoms and anatomies apart."""
    groups: dict[tuple[str, float], list[JudgedBody]] = {}
    for row in rows:
        groups.setdefault((row.origin, row.slice_mm), []).append(row)
    return tuple(_summary(origin, slice_mm, group) for (origin, slice_mm), group in sorted(groups.items()))


def _summary(origin: str, slice_mm: float, rows: Sequence[JudgedBody]) -> Summary:
    high = [row.called for row in rows if row.true_loss >= MUST_BE_CALLED]
    low = [not row.called for row in rows if row.true_loss <= MUST_NOT_BE_CALLED]
    between = [row.called for row in rows if MUST_NOT_BE_CALLED < row.true_loss < MUST_BE_CALLED]
    dice = [row.dice for row in rows if row.dice is not None]
    return Summary(
        origin=origin,
        slice_mm=slice_mm,
        bodies=len(rows),
        missed=Share.over([row.fate != "found" for row in rows]),
        dice=round(float(np.mean(dice)), 4) if dice else None,
        sensitivity=Share.over(high),
        specificity=Share.over(low),
        between=Share.over(between),
        review=Share.over([row.decision == "review" for row in rows]),
        not_evaluable=Share.over([row.decision == "not-evaluable" for row in rows]),
        errors=tuple(_error(name, place, rows) for place, name in enumerate(HEIGHTS)),
    )


def _error(name: str, place: int, rows: Sequence[JudgedBody]) -> HeightError:
    away = np.array(
        [row.heights[place] - row.true_heights[place] for row in rows if row.heights and row.true_heights],
        dtype=np.float64,
    )
    if not len(away):
        return HeightError(height=name, bodies=0, mean=0.0, sd=0.0, largest=0.0)
    return HeightError(
        height=name,
        bodies=len(away),
        mean=round(float(away.mean()), 3),
        sd=round(float(away.std()), 3),
        largest=round(float(np.abs(away).max()), 3),
    )


def loss_data(rows: Sequence[JudgedBody]) -> FigureData:
    """The columns of the figure: a row a body whose loss was measured."""
    shown: list[dict[str, Cell]] = [
        {"origin": row.origin, "slice_mm": row.slice_mm, "true_loss": row.true_loss, "loss": row.loss,
         "deformity": row.deformity, "decision": row.decision}
        for row in rows
        if row.loss is not None
    ]  # fmt: skip
    return FigureData.of_rows(shown) if shown else FigureData(absent="no loss was measured")


def draw_losses(data: FigureData, *, phantom: bool) -> Figure:
    """Measured against true loss, a panel a slice thickness; the gate's limit and the line of equal losses."""
    thicknesses = sorted({float(value) for value in data.numbers("slice_mm")})
    figure = new_figure(width=2.5 * len(thicknesses) + 0.6, height=3.6, phantom=phantom)
    limit = GateSettings().fractured_from
    panels = figure.subplots(1, len(thicknesses), sharex=True, sharey=True, squeeze=False)[0]
    for axes, slice_mm in zip(panels, thicknesses, strict=True):
        part = data.where(slice_mm=slice_mm)
        for kind, colour, marker in (("phantom", DTL_COLOUR, "x"), ("anatomy", HCR_COLOUR, "o")):
            is_phantom = np.array([origin == "phantom" for origin in part.texts("origin")])
            rows = is_phantom if kind == "phantom" else ~is_phantom
            axes.plot(
                part.numbers("true_loss")[rows],
                part.numbers("loss")[rows],
                linestyle="none",
                marker=marker,
                markersize=3,
                markeredgewidth=0.8,
                markerfacecolor=colour,
                markeredgecolor=colour if marker == "x" else "none",
                alpha=0.6,
                label="drawn spine" if kind == "phantom" else "label map of a real spine",
            )
        axes.plot([0, 0.6], [0, 0.6], color=SOFT, linewidth=0.8)
        axes.axhline(limit, color=LIMIT_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
        for edge in (MUST_NOT_BE_CALLED, MUST_BE_CALLED):
            axes.axvline(edge, color=SOFT, linewidth=0.6, linestyle=(0, (1, 2)))
        axes.set(title=f"{slice_mm:g} mm slices", xlabel="true height loss", xlim=(-0.02, 0.66), ylim=(-0.12, 0.75))
        light_grid(axes)
    panels[0].set_ylabel("height loss as measured")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, markerscale=2)
    return figure
