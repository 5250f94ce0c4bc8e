"""The HTML pages: self-contained, without script, drawn from the models of study_report and worklist alone.

A page asks no host for anything: pictures are `data:` addresses, drawings are inline SVG, and a content security
policy in the page itself forbids the rest. Jinja2 escapes every value.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from services.report_generator.feature_names import feature_in_words
from services.report_generator.nomogram_drawing import NomogramDrawing, draw
from services.report_generator.sagittal_view import WINDOW_LEVEL_HU, WINDOW_WIDTH_HU, SagittalView
from services.report_generator.study_report import CaseReport, StudyReport
from services.report_generator.worklist import Worklist
from shared.fracture.bundle import ClassifierKind
from shared.fracture.ids import short
from shared.fracture.keys import SpineView
from shared.fracture.records import basis_alone

MINUS: Final = "\N{MINUS SIGN}"
MASK_SOURCES: Final = {
    "dicom-seg": "DICOM SEG",
    "rtstruct": "DICOM RTSTRUCT",
    "nifti": "NIfTI label map",
    "automatic": "automatic segmentation",
}
CLASSIFIERS: Final[dict[ClassifierKind, str]] = {
    "svm": "SVM",
    "knn": "k nearest neighbours",
    "decision-tree": "decision tree",
    "random-forest": "random forest",
    "extra-trees": "extra trees",
    "xgboost": "XGBoost",
    "lightgbm": "LightGBM",
}


@dataclass(frozen=True, kw_only=True)
class PatientShown:
    """Restricted: who a named copy is about. Values that the study's records disagree on are joined."""

    name: str
    patient_id: str
    accession_number: str
    study_date: str


@dataclass(frozen=True, kw_only=True)
class _Card:
    case: CaseReport
    view: SagittalView | None
    drawing: NomogramDrawing | None
    strongest: float


def study_page(
    report: StudyReport,
    *,
    views: Mapping[str, SagittalView],
    spines: Mapping[str, Mapping[SpineView, bytes]] | None = None,
    patient: PatientShown | None = None,
) -> str:
    """The page of a study's report.

    `views` by case id, `spines` (PNG of the whole spine) by series id; where one is missing the page says so.
    """
    return (
        _templates()
        .get_template("study_report.html.j2")
        .render(
            report=report,
            cards=[_card(case, views.get(case.case_id)) for case in report.scored],
            patient=patient,
            spines={
                series_id: {view: _data_uri(png) for view, png in pictures.items()}
                for series_id, pictures in (spines or {}).items()
            },
            window_width=WINDOW_WIDTH_HU,
            window_level=WINDOW_LEVEL_HU,
            mask_sources=MASK_SOURCES,
            classifiers=CLASSIFIERS,
        )
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def worklist_page(
    worklist: Worklist,
    *,
    link: Callable[[str, str], str],
    patients: Mapping[str, PatientShown] | None = None,
) -> str:
    """The page of a sweep's worklist. `link` gives the address of a report from (study_id, report_id)."""
    return (
        _templates()
        .get_template("worklist.html.j2")
        .render(worklist=worklist, link=link, patients=patients, linked=dict(worklist.reports))
    )


def _card(case: CaseReport, view: SagittalView | None) -> _Card:
    result = case.result
    shown = None if result is None else result.nomogram
    return _Card(
        case=case,
        view=view,
        drawing=None
        if result is None or shown is None
        else draw(shown.model, shown.reading, score=result.fusion_score),
        strongest=max((abs(push.contribution) for push in (result.contributions if result else ())), default=1.0)
        or 1.0,
    )


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("services.report_generator", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "short": short,
        "percent": _percent,
        "fixed": _fixed,
        "signed": _signed,
        "basis_alone": basis_alone,
        "significant": _significant,
        "words": feature_in_words,
        "dicom_date": _dicom_date,
    }
    return environment


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _fixed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def _significant(value: float) -> str:
    return f"{value:.4g}".replace("-", MINUS)


def _dicom_date(value: str) -> str:
    return f"{value[:4]}-{value[4:6]}-{value[6:]}" if len(value) == 8 and value.isdigit() else value
