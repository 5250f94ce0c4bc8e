"""The way of the cohort as boxes: how many came in, who was left out and why, and how the rest was parted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.trainer.results import Judged

PART_TITLES: Final = {"train": "Training", "test": "Test, held out"}


@dataclass(frozen=True, kw_only=True)
class FlowBox:
    """One box of the diagram with what left after it (reason, rows)."""

    title: str
    patients: int
    cases: int
    acute: int
    chronic: int
    left_out: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CohortFlow:
    """The boxes from top to bottom, then side by side the parts that the rest was split into."""

    steps: tuple[FlowBox, ...]
    parts: tuple[FlowBox, ...]


def cohort_flow(result: Judged) -> CohortFlow:
    """The diagram of a run: its steps, and the parts as the rows of the cohort say."""
    steps = tuple(
        FlowBox(
            title=step.step,
            patients=step.patients,
            cases=step.cases,
            acute=step.acute,
            chronic=step.chronic,
            left_out=tuple(sorted(step.left_out.items(), key=lambda pair: (-pair[1], pair[0]))),
        )
        for step in result.flow
    )
    parts = []
    titles = PART_TITLES if any(row.part == "train" for row in result.cohort) else {"test": "Scored"}
    for part, title in titles.items():
        rows = [row for row in result.cohort if row.part == part]
        if rows:
            acute = sum(row.acute for row in rows)
            parts.append(
                FlowBox(
                    title=title,
                    patients=len({row.patient for row in rows}),
                    cases=len(rows),
                    acute=acute,
                    chronic=len(rows) - acute,
                )
            )
    return CohortFlow(steps=steps, parts=tuple(parts))


def sites(result: Judged) -> tuple[tuple[str, int, int], ...]:
    """Each site with its patients and vertebrae, the largest first."""
    rows: dict[str, list[int]] = {}
    for row in result.cohort:
        rows.setdefault(row.site, []).append(row.patient)
    counted = [(site, len(set(patients)), len(patients)) for site, patients in rows.items()]
    return tuple(sorted(counted, key=lambda each: (-each[2], each[0])))
