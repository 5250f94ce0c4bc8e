"""All settings of the system in one tree; each service's own stand in its folder.

Nothing here imports what only one service needs (onnxruntime, pyradiomics, …): every worker reads the same tree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.config import JsonDict

from services.deep_extractor.settings import DeepExtractorSettings
from services.dicom_ingest.settings import IngestSettings, PressureSettings
from services.fusion_classifier.settings import FusionClassifierSettings
from services.radiomics_extractor.settings import RadiomicsExtractorSettings
from services.report_generator.settings import ReportGeneratorSettings
from services.resampler.settings import ResamplerSettings
from services.segmenter.settings import SegmenterSettings
from shared.pipeline.minio_store import StoreSettings
from shared.pipeline.rabbit_broker import BrokerSettings
from shared.pipeline.worker import STUCK_SECONDS

DEMO_BUNDLE = Path(__file__).resolve().parents[1] / "deploy" / "bundles" / "demo"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SecretSettings(_Section):
    """The two keys of a site, each 64 hexadecimal digits (`fracture-sweep keys` makes them)."""

    pseudonym_key: SecretStr | None = Field(
        default=None, description="Keys the pseudonymous ids. Lost, results cannot be joined to studies again."
    )
    encryption_key: SecretStr | None = Field(
        default=None, description="Encrypts the restricted prefixes of the store. Lost, they cannot be read."
    )


class LogSettings(_Section):
    """Log lines are JSON, on standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="The least level that is written.", json_schema_extra={"env": "LOG_LEVEL"}
    )


class WorkerSettings(_Section):
    """The worker loop of every service."""

    max_attempts: Annotated[int, Field(ge=1, le=100)] = Field(
        default=5, description="How often a message is tried before it goes to the dead letters."
    )
    start_seconds: Annotated[float, Field(ge=0, le=3600)] = Field(
        default=60.0, description="How long a starting worker waits for a broker or store that is not there yet."
    )
    stuck_seconds: Annotated[float, Field(gt=0)] = Field(
        default=STUCK_SECONDS,
        description="A message under way for longer makes /healthz fail and ends the worker's process; it comes again, "
        "until the delivery limit gives it up. Keep it above every budget.",
    )
    health_host: str = Field(default="0.0.0.0", description="Where /healthz, /readyz and /metrics listen.")  # noqa: S104
    health_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8080, description="Port of /healthz, /readyz and /metrics; 0 takes a free one."
    )


class BundleSettings(_Section):
    """The model bundle."""

    path: Path = Field(default=DEMO_BUNDLE, description="Folder of the model bundle that scores.")


class InboxSettings(_Section):
    """How dicom-ingest looks after the inbox in the distributed system."""

    poll_seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        default=5.0, description="How often the inbox is looked at."
    )
    lease_seconds: Annotated[float, Field(gt=0)] = Field(
        default=60.0,
        description="A submission belongs to its reader for so long; the reader renews it, a dead one's runs out.",
    )
    close_seconds: Annotated[float, Field(gt=0)] = Field(
        default=15.0, description="How often open sweeps are looked at, to close those with nothing pending."
    )


Days = Annotated[int, Field(ge=1, le=36500)] | None
_DAYS_ALLOWED: JsonDict = {"allowed": "a whole number, at least 1, at most 36500 (or nothing)"}


class RetentionSettings(_Section):
    """How many days `fracture-sweep gc` keeps what is done; unset keeps it for ever (docs/retention.md)."""

    derived_days: Days = Field(
        default=None,
        description="Volumes, label maps and crops: made again when the study is swept again.",
        json_schema_extra=_DAYS_ALLOWED,
    )
    features_days: Days = Field(
        default=None,
        description="Feature vectors: computed again where they are needed.",
        json_schema_extra=_DAYS_ALLOWED,
    )
    results_days: Days = Field(
        default=None,
        description="Reports, worklists, outcomes: those that a ledger counts go with it, when both ages have passed.",
        json_schema_extra=_DAYS_ALLOWED,
    )
    ledger_days: Days = Field(
        default=None,
        description="Plans, manifests, sweeps, dead letters: a sweep or study goes as a whole, with its results.",
        json_schema_extra=_DAYS_ALLOWED,
    )
    identities_days: Days = Field(
        default=None,
        description="Names, record numbers, UIDs, file paths, and the named copies of reports.",
        json_schema_extra=_DAYS_ALLOWED,
    )
    inbox_days: Days = Field(
        default=30, description="Half uploads that nobody went on with.", json_schema_extra=_DAYS_ALLOWED
    )


class Settings(_Section):
    """Everything that can be set."""

    rabbitmq: BrokerSettings = Field(default_factory=BrokerSettings)
    s3: StoreSettings | None = None
    secrets: SecretSettings = Field(default_factory=SecretSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    bundle: BundleSettings = Field(default_factory=BundleSettings)
    dicom_ingest: IngestSettings = Field(default_factory=IngestSettings)
    inbox: InboxSettings = Field(default_factory=InboxSettings)
    pressure: PressureSettings = Field(default_factory=PressureSettings)
    retention: RetentionSettings = Field(default_factory=RetentionSettings)
    segmenter: SegmenterSettings = Field(default_factory=SegmenterSettings)
    resampler: ResamplerSettings = Field(default_factory=ResamplerSettings)
    radiomics_extractor: RadiomicsExtractorSettings = Field(default_factory=RadiomicsExtractorSettings)
    deep_extractor: DeepExtractorSettings = Field(default_factory=DeepExtractorSettings)
    fusion_classifier: FusionClassifierSettings = Field(default_factory=FusionClassifierSettings)
    report_generator: ReportGeneratorSettings = Field(default_factory=ReportGeneratorSettings)
