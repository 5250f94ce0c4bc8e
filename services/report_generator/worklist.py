"""The worklist of a sweep: every scored vertebra, acute first, then all that was not scored, and the three ledgers.

It is stored as numbered revisions. The JSON is the truth; HTML and CSV follow from it alone, so that a revision whose
writer died half-way can be finished by the next one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict

from services.report_generator.study_report import BundleNote, ScoringBundle, scored_result
from shared.fracture.bundle import ClassName
from shared.fracture.ids import digest, short
from shared.fracture.ledger import CaseStatus, SeriesStatus, StudyState, sweep_ledger
from shared.fracture.levels import sort_key
from shared.fracture.records import GIVEN_BASIS, CaseRecord, Classified, Demographics, Record, SweepPlan, Warned

FORMULA_SIGNS: Final = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a spreadsheet takes for the start of a formula."""

COLUMNS: Final = (
    "rank",
    "study",
    "series",
    "level",
    "state",
    "decision",
    "indeterminate",
    "acute_probability",
    "hcr_probability",
    "dtl_probability",
    "nomogram_probability",
    "fracture_basis",
    "age",
    "sex",
    "warnings",
    "reasons",
    "report",
    "bundle",
    "research_use",
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ScoredRow(_Frozen):
    """One scored vertebra. All probabilities are P(acute) on the row's fracture basis."""

    study_id: str
    series_id: str
    case_id: str
    level: str
    fracture_basis: str
    probability: float
    hcr_probability: float
    dtl_probability: float
    nomogram_probability: float | None
    nomogram_absent: str | None
    predicted: ClassName
    age_years: int | None
    sex: Literal["F", "M"] | None
    warnings: tuple[str, ...]
    indeterminate: bool = False
    """The bundle's conformal limits do not leave exactly one class: MRI recommended."""


class OtherRow(_Frozen):
    """One vertebra or series without a result, and why. `level` is None for a whole series."""

    study_id: str
    series_id: str
    case_id: str | None
    level: str | None
    state: str
    reasons: tuple[str, ...]


class Worklist(Record):
    """Revision n of a sweep's worklist."""

    sweep_id: str
    revision: int
    supersedes: int | None = None
    made_at: datetime
    content_hash: str
    """Of all that follows: an equal worklist makes no new revision."""
    closed: bool
    research_use: str
    demonstration: str | None
    bundle: BundleNote
    rows: tuple[ScoredRow, ...]
    others: tuple[OtherRow, ...]
    reports: dict[str, str]
    """study_id → report_id, for those reports that lie in the store."""
    ledger: dict[str, Any]


def build(
    *,
    plan: SweepPlan,
    states: Mapping[str, StudyState],
    bundle: ScoringBundle,
    cases: Callable[[str], CaseRecord | None],
    closed: bool,
    research_use: str,
    revision: int,
    made_at: datetime,
) -> Worklist:
    """The worklist of a sweep from its plan and the states of its studies; `cases` finds a case record by case id."""
    wanted = {series.series_id for series in plan.series}
    rows: list[ScoredRow] = []
    others: list[OtherRow] = []
    for state in states.values():
        for series in state.series:
            if series.planned.series_id not in wanted:
                continue
            if series.state != "planned":
                others.append(_series_row(state, series))
            for case in series.cases:
                if case.superseded:
                    continue
                if isinstance(case.outcome, Classified):
                    rows.append(_scored_row(state, case, case.outcome, record=cases(case.case_id), bundle=bundle))
                else:
                    others.append(_other_row(state, case))
    rows.sort(key=_urgency)
    others.sort(key=lambda row: (row.study_id, row.level is None, sort_key(row.level or ""), row.series_id))
    references = [(series.study_id, series.series_id, series.manifest_id) for series in plan.series]
    ledger = sweep_ledger(sweep_id=plan.sweep_id, references=references, states=states, files=plan.files)
    note = BundleNote.of(bundle.manifest)
    content: dict[str, Any] = {
        "closed": closed,
        "research_use": research_use,
        "demonstration": note.demonstration,
        "bundle": note,
        "rows": tuple(rows),
        "others": tuple(others),
        "reports": {key: state.report_id for key, state in sorted(states.items()) if state.report_written},
        "ledger": ledger.as_json(),
    }
    draft = Worklist(
        sweep_id=plan.sweep_id,
        revision=revision,
        supersedes=revision - 1 or None,
        made_at=made_at,
        content_hash="",
        **content,
    )
    hashed = draft.model_dump(mode="json", include=set(content))
    return draft.model_copy(update={"content_hash": digest(hashed)})


def _urgency(row: ScoredRow) -> tuple[bool, float, str, tuple[int, str], str]:
    return (row.predicted != "acute", -row.probability, row.study_id, sort_key(row.level), row.case_id)


def _scored_row(
    state: StudyState, case: CaseStatus, outcome: Classified, *, record: CaseRecord | None, bundle: ScoringBundle
) -> ScoredRow:
    basis = GIVEN_BASIS if record is None else record.fracture_basis
    demographics: Demographics = state.plan.demographics if record is None else record.demographics
    result = scored_result(outcome, bundle=bundle, fracture_basis=basis)
    warned: tuple[Warned, ...] = (*(() if record is None else record.warnings), *outcome.warnings)
    return ScoredRow(
        study_id=state.study_id,
        series_id=case.series_id,
        case_id=case.case_id,
        level=case.level,
        fracture_basis=basis,
        probability=result.fusion.probability,
        hcr_probability=result.hcr.probability,
        dtl_probability=result.dtl.probability,
        nomogram_probability=None if result.nomogram is None else result.nomogram.acute.probability,
        nomogram_absent=result.nomogram_absent,
        predicted=result.predicted,
        age_years=demographics.age_years,
        sex=demographics.sex,
        warnings=tuple(dict.fromkeys((*(warning.sentence for warning in warned), *result.own_flags))),
        indeterminate=result.indeterminate,
    )


def _other_row(state: StudyState, case: CaseStatus) -> OtherRow:
    return OtherRow(
        study_id=state.study_id,
        series_id=case.series_id,
        case_id=case.case_id,
        level=case.level,
        state=case.state(report_written=state.report_written),
        reasons=case.reasons,
    )


def _series_row(state: StudyState, series: SeriesStatus) -> OtherRow:
    return OtherRow(
        study_id=state.study_id,
        series_id=series.planned.series_id,
        case_id=None,
        level=None,
        state=f"series {series.state}",
        reasons=series.reasons,
    )


def to_csv(worklist: Worklist, *, link: Callable[[str, str], str]) -> str:
    """The worklist as CSV (RFC 4180), probabilities with four digits; no cell can start a spreadsheet's formula."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in _csv_rows(worklist, link):
        writer.writerow([_harmless(row.get(column, "")) for column in COLUMNS])
    return stream.getvalue()


def _csv_rows(worklist: Worklist, link: Callable[[str, str], str]) -> Iterator[dict[str, str]]:
    bundle = f"{worklist.bundle.kind} {worklist.bundle.name} {short(worklist.bundle.bundle_id)}"
    use = " ".join(filter(None, (worklist.demonstration, worklist.research_use)))

    def common(row: ScoredRow | OtherRow) -> dict[str, str]:
        report_id = worklist.reports.get(row.study_id)
        return {
            "study": short(row.study_id),
            "series": short(row.series_id),
            "level": row.level or "",
            "report": "" if report_id is None else link(row.study_id, report_id),
            "bundle": bundle,
            "research_use": use,
        }

    for rank, row in enumerate(worklist.rows, start=1):
        yield {
            **common(row),
            "rank": str(rank),
            "state": "reported" if row.study_id in worklist.reports else "pending",
            "decision": row.predicted,
            "indeterminate": "yes" if row.indeterminate else "",
            "acute_probability": f"{row.probability:.4f}",
            "hcr_probability": f"{row.hcr_probability:.4f}",
            "dtl_probability": f"{row.dtl_probability:.4f}",
            "nomogram_probability": "" if row.nomogram_probability is None else f"{row.nomogram_probability:.4f}",
            "fracture_basis": row.fracture_basis,
            "age": "" if row.age_years is None else str(row.age_years),
            "sex": row.sex or "",
            "warnings": "; ".join(row.warnings),
            "reasons": f"no nomogram: {row.nomogram_absent}" if row.nomogram_absent else "",
        }
    for other in worklist.others:
        yield {**common(other), "state": other.state, "reasons": "; ".join(other.reasons)}


def _harmless(cell: str) -> str:
    return "'" + cell if cell.lstrip(" ").startswith(FORMULA_SIGNS) else cell
