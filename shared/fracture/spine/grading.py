"""Height loss, Genant's grade and shape of each body, and the gate: which vertebra the classifier is asked about.

The anterior and the posterior window of `heights` stand at 15 and 85 % of the depth, so the heights at the edges,
which is where a reader sets the marks, follow by the line through both; without that a wedge is under-read by a
quarter. Loss against the neighbours is not optional: a crush of 40 % reads 12 % within its own body.

Genant HK et al. 1993, J Bone Miner Res 8:1137 (grades); Grigoryan M et al. 2003 (six-point morphometry).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shared.fracture.spine.gate import Decision, GateSettings, Shape
from shared.fracture.spine.heights import ANTERIOR_WINDOW, POSTERIOR_WINDOW, Heights, MeasuredBody

GENANT: Final = (0.20, 0.25, 0.40)
"""Height loss from which on a deformity is mild (grade 1), moderate (2), severe (3)."""
NEIGHBOUR_REACH: Final = 2
MIN_NEIGHBOURS: Final = 2
SLOPE_RANGE_MM: Final = (-0.5, 1.5)
"""By how much a posterior height can change from one level to the next below: steeper lines are noise."""
_EDGE: Final = (sum(ANTERIOR_WINDOW) / 2) / (sum(POSTERIOR_WINDOW) / 2 - sum(ANTERIOR_WINDOW) / 2)


@dataclass(frozen=True, kw_only=True)
class ChainBody:
    """One body of a chain, from head to foot. `measured` is None where its heights cannot be read."""

    measured: MeasuredBody | None
    step_mm: float
    """Of the source voxels along the body's axis."""
    fault: str = ""
    """Why it is not to be judged, and no neighbour of others (cut off by the scan, metal, …)."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How much height a body has lost, as a share."""

    within: float
    neighbours: float | None
    """None with fewer than two usable neighbours."""
    crush: float | None
    """Of the posterior height alone, against the neighbours."""
    biconcave: float
    """Of the middle against the posterior height."""
    wedge: float
    """Of the anterior against the posterior height."""

    @property
    def value(self) -> float:
        """The larger of loss within and loss against the neighbours."""
        return self.within if self.neighbours is None else max(self.within, self.neighbours)


@dataclass(frozen=True, kw_only=True)
class Graded:
    """What the heights of a body come to."""

    loss: Loss
    low: float
    high: float
    """The band of `loss.value` under small changes of frame and surface."""
    expected_mm: float | None
    neighbours: tuple[int, ...]
    """The places in the chain that `expected_mm` was read from."""
    grade: int
    borderline: bool
    """The band crosses a limit of the grades."""
    shape: Shape


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the gate says of a body, and why in one sentence."""

    decision: Decision
    reason: str
    warnings: tuple[str, ...] = ()


def edges(heights: Heights) -> tuple[float, float]:
    """Anterior and posterior height at the edges of the body (mm), by the line through both windows."""
    slope = (heights.posterior - heights.anterior) * _EDGE
    return max(heights.anterior - slope, 0.0), heights.posterior + slope


def grade_of(loss: float) -> int:
    """Genant's semiquantitative grade, 0 to 3."""
    return sum(loss >= limit for limit in GENANT)


def losses(heights: Heights, *, expected_mm: float | None) -> Loss:
    """The losses of a body, given the posterior height that its neighbours lead to expect."""
    anterior, posterior = edges(heights)
    least = min(anterior, heights.middle, posterior)
    return Loss(
        within=1.0 - min(anterior, heights.middle) / posterior,
        neighbours=None if expected_mm is None else 1.0 - least / expected_mm,
        crush=None if expected_mm is None else 1.0 - posterior / expected_mm,
        biconcave=1.0 - heights.middle / posterior,
        wedge=1.0 - anterior / posterior,
    )


def expected_heights(chain: Sequence[ChainBody]) -> list[tuple[float | None, tuple[int, ...]]]:
    """For each body the posterior height that its unfractured neighbours lead to expect, and which those are.

    Bodies that turn out to have lost a mild deformity's height are taken out, the worst first, until none is left.
    """
    posterior = [None if b.measured is None or b.fault else edges(b.measured.heights)[1] for b in chain]
    sound = {
        n
        for n, body in enumerate(chain)
        if posterior[n] is not None and body.measured is not None
        and losses(body.measured.heights, expected_mm=None).within < GENANT[0]
    }  # fmt: skip
    while True:
        found = [_expected(n, posterior, sound) for n in range(len(chain))]
        worst, most = None, GENANT[0]
        for n in sound:
            measured, (expected, _) = chain[n].measured, found[n]
            if measured is None or expected is None:
                continue
            lost = losses(measured.heights, expected_mm=expected).neighbours or 0.0
            if lost >= most:
                worst, most = n, lost
        if worst is None:
            return found
        sound.discard(worst)


def _expected(place: int, posterior: Sequence[float | None], sound: set[int]) -> tuple[float | None, tuple[int, ...]]:
    near = sorted(n for n in sound if n != place and abs(n - place) <= NEIGHBOUR_REACH)
    values = [(float(n - place), posterior[n]) for n in near]
    known = [(x, y) for x, y in values if y is not None]
    if len(known) < MIN_NEIGHBOURS:
        return None, tuple(near)
    x: NDArray[np.float64] = np.array([a for a, _ in known])
    y: NDArray[np.float64] = np.array([b for _, b in known])
    slopes = [(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x))]
    slope = float(np.clip(np.median(slopes), *SLOPE_RANGE_MM))
    return float(np.median(y - slope * x)), tuple(near)


def graded(chain: Sequence[ChainBody]) -> list[Graded | None]:
    """The grade of each body of a chain; None where its heights cannot be read or it is not to be judged."""
    found: list[Graded | None] = []
    for body, (expected, near) in zip(chain, expected_heights(chain), strict=True):
        if body.measured is None or body.fault:
            found.append(None)
            continue
        loss = losses(body.measured.heights, expected_mm=expected)
        others = [losses(heights, expected_mm=expected).value for heights in body.measured.perturbed]
        low, high = min([loss.value, *others]), max([loss.value, *others])
        grade = grade_of(loss.value)
        found.append(
            Graded(
                loss=loss,
                low=low,
                high=high,
                expected_mm=expected,
                neighbours=near,
                grade=grade,
                borderline=grade_of(low) != grade or grade_of(high) != grade,
                shape=_shape(loss) if grade else "none",
            )
        )
    return found


def _shape(loss: Loss) -> Shape:
    """By which of anterior, middle and posterior height has lost most."""
    if loss.crush is not None and loss.crush >= GENANT[0]:
        return "crush"
    return "biconcave" if loss.biconcave > loss.wedge else "wedge"


def judge(body: ChainBody, grade: Graded | None, *, settings: GateSettings, doubt: str = "") -> Judged:
    """What the gate says of a body. `doubt`: why bodies may not be what they seem; then none is fractured."""
    if body.fault:
        return Judged(decision="not-evaluable", reason=body.fault)
    if body.step_mm > settings.max_step_mm + settings.step_tolerance_mm:
        return Judged(
            decision="not-evaluable",
            reason=f"heights are not read from steps of {body.step_mm:.1f} mm along the body's axis "
            f"(at most {settings.max_step_mm:g} mm)",
        )
    if grade is None:
        return Judged(decision="not-evaluable", reason="the heights of the body cannot be read")
    thick = body.step_mm > settings.thick_step_mm + settings.step_tolerance_mm
    warnings = []
    if thick:
        warnings.append(f"heights read from steps of {body.step_mm:.1f} mm: wider limits hold")
    if grade.loss.neighbours is None:
        warnings.append("fewer than two usable neighbours: height loss within the body alone")
    if grade.borderline:
        warnings.append(
            f"borderline: a height loss of {grade.low:.0%} to {grade.high:.0%} crosses a limit of Genant's grades"
        )
    review, fractured = (
        (settings.thick_review_from, settings.thick_fractured_from)
        if thick
        else (settings.review_from, settings.fractured_from)
    )
    lost = grade.loss.value
    words = f"height loss {max(lost, 0):.0%} ({max(grade.low, 0):.0%} to {max(grade.high, 0):.0%})"
    if lost >= fractured and doubt:
        reason = f"{words}, at or above {fractured:.0%}, but {doubt}; a person has to look"
        return Judged(decision="review", reason=reason, warnings=tuple(warnings))
    if lost >= fractured:
        return Judged(decision="fractured", reason=f"{words}, at or above {fractured:.0%}", warnings=tuple(warnings))
    if lost >= review:
        return Judged(
            decision="review",
            reason=f"mild deformity: {words}, between {review:.0%} and {fractured:.0%}; a person has to look",
            warnings=tuple(warnings),
        )
    return Judged(decision="not-fractured", reason=f"{words}, below {review:.0%}", warnings=tuple(warnings))
