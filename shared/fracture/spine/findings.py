"""A measured chain as findings: what the record of a spine holds of each vertebra."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.fracture.spine.chain import Vertebra
from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.grading import ChainBody, Graded, grade_of, graded, judge
from shared.fracture.spine.heights import Heights, MeasuredBody
from shared.fracture.spine.record import Banded, Finding


def findings_of(
    levels: Sequence[str],
    chain: Sequence[Vertebra],
    *,
    limits: GateSettings,
    faults: Sequence[str] = (),
    gaps: Sequence[str] = (),
) -> tuple[Finding, ...]:
    """The findings of a measured chain, from head to foot.

    `faults`: why a body is not to be judged ("" where it is), beside those that its place in the scan gives.
    `gaps`: what says that bodies are missing, fragments, or two in one; then none is called fractured.
    """
    known = list(faults) or [""] * len(chain)
    bodies = [
        ChainBody(measured=one.measured, step_mm=one.step_mm, fault=one.chain_body().fault or fault)
        for one, fault in zip(chain, known, strict=True)
    ]
    grades = graded(bodies)
    return tuple(
        _finding(level, vertebra, body, grade, levels=levels, limits=limits, doubt=gaps[0] if gaps else "")
        for level, vertebra, body, grade in zip(levels, chain, bodies, grades, strict=True)
    )


def _finding(
    level: str,
    vertebra: Vertebra,
    body: ChainBody,
    grade: Graded | None,
    *,
    levels: Sequence[str],
    limits: GateSettings,
    doubt: str,
) -> Finding:
    verdict = judge(body, grade, settings=limits, doubt=doubt)
    centre = np.asarray(vertebra.frame.centre_zyx, dtype=float)
    return Finding(
        level=level,
        centre_zyx=(round(float(centre[0]), 2), round(float(centre[1]), 2), round(float(centre[2]), 2)),
        volume_ml=round(vertebra.volume_ml, 3),
        **_heights(vertebra.measured),
        **({} if grade is None else _grade(grade, levels)),
        decision=verdict.decision,
        reason=verdict.reason,
        warnings=verdict.warnings,
    )


def _heights(measured: MeasuredBody | None) -> dict[str, Banded]:
    if measured is None:
        return {}

    def banded(name: str) -> Banded:
        def of(heights: Heights) -> float:
            return round(float(getattr(heights, name)), 2)

        values = [of(measured.heights), *map(of, measured.perturbed)]
        return Banded(value=values[0], low=min(values), high=max(values))

    return {f"{name}_mm": banded(name) for name in ("anterior", "middle", "posterior")}


def _grade(grade: Graded, levels: Sequence[str]) -> dict[str, object]:
    def share(value: float) -> float:
        return round(float(value), 4) + 0.0  # no minus zero

    return {
        "expected_mm": None if grade.expected_mm is None else round(grade.expected_mm, 2),
        "neighbours": tuple(levels[n] for n in grade.neighbours),
        "loss": Banded(value=share(grade.loss.value), low=share(grade.low), high=share(grade.high)),
        "loss_within": share(grade.loss.within),
        "loss_neighbours": None if grade.loss.neighbours is None else share(grade.loss.neighbours),
        "grade": grade.grade,
        "grade_low": grade_of(grade.low),
        "grade_high": grade_of(grade.high),
        "shape": grade.shape,
    }
