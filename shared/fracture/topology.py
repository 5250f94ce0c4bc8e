"""Who hears what: every queue of the system and the facts bound to it, on one screen.

Every worker declares all of it, whichever starts first: a publish to an exchange with no bound queue is confirmed and
lost. For each queue there are two more, `<queue>.retry` (delayed retries) and `<queue>.dead` (dead letters, read by
the recorder).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXCHANGE: Final = "fracture"

DICOM_INGEST: Final = "dicom-ingest"
SEGMENTER: Final = "segmenter"
RESAMPLER: Final = "resampler"
RADIOMICS_EXTRACTOR: Final = "radiomics-extractor"
DEEP_EXTRACTOR: Final = "deep-extractor"
FUSION_CLASSIFIER: Final = "fusion-classifier"
REPORT_GENERATOR: Final = "report-generator"
WORKLIST: Final = "worklist"
RECORDER: Final = "recorder"

QUEUES: Final[Mapping[str, tuple[str, ...]]] = {
    SEGMENTER: ("SeriesStored",),
    RESAMPLER: ("MasksReady",),
    RADIOMICS_EXTRACTOR: ("CaseReady",),
    DEEP_EXTRACTOR: ("CaseReady",),
    FUSION_CLASSIFIER: ("FeaturesExtracted",),
    REPORT_GENERATOR: (
        "StudyRejected",
        "SeriesRejected",
        "SeriesDeadLettered",
        "CaseNotEvaluated",
        "CaseRejected",
        "CaseDeadLettered",
        "FractureClassified",
    ),
    WORKLIST: ("SweepPlanned", "SweepClosed", "ReportWritten"),
}
"""Queue → the facts that it hears. The worklist's queue is served by the report-generator too."""

SERVICES: Final[Mapping[str, tuple[str, ...]]] = {
    DICOM_INGEST: (),
    SEGMENTER: (SEGMENTER,),
    RESAMPLER: (RESAMPLER,),
    RADIOMICS_EXTRACTOR: (RADIOMICS_EXTRACTOR,),
    DEEP_EXTRACTOR: (DEEP_EXTRACTOR,),
    FUSION_CLASSIFIER: (FUSION_CLASSIFIER,),
    REPORT_GENERATOR: (REPORT_GENERATOR, WORKLIST),
    RECORDER: tuple(f"{queue}.dead" for queue in QUEUES),
}
"""Service → the queues that it consumes. dicom-ingest is told nothing: it looks where studies arrive."""

TELLS: Final[Mapping[str, tuple[str, ...]]] = {
    DICOM_INGEST: ("SweepPlanned", "SweepClosed", "StudyRejected", "SeriesStored", "SeriesRejected"),
    SEGMENTER: ("MasksReady", "SeriesRejected"),
    RESAMPLER: ("CaseReady", "CaseNotEvaluated", "CaseRejected", "SeriesRejected"),
    RADIOMICS_EXTRACTOR: ("FeaturesExtracted", "CaseRejected"),
    DEEP_EXTRACTOR: ("FeaturesExtracted", "CaseRejected"),
    FUSION_CLASSIFIER: ("FractureClassified", "CaseNotEvaluated", "CaseRejected"),
    REPORT_GENERATOR: ("ReportWritten",),
    RECORDER: ("SeriesDeadLettered", "CaseDeadLettered"),
}
"""Service → the facts that it tells; a test holds each service's imports to what it hears and tells."""
