"""One pass of the nightly run's services over the images of a cohort, without any model.

Images go through the same intake, segmenter, resampler and radiomics extractor as in a sweep, with the same keys: what
a sweep over the same study extracted is not extracted again, and an interrupted run goes on where it stopped. No bundle
exists yet, so a message names protocols alone, and what would need one (deep features, classification, reports) has no
queue here.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from services.cohort.protocols import Extraction
from services.cohort.rows import (
    CohortImage,
    Progress,
)
from services.composition import teller
from services.dicom_ingest.collected import CollectedSeries, PatientIdentity
from services.dicom_ingest.folder import read_identified_series
from services.dicom_ingest.intake import Intake
from services.dicom_ingest.pairs_source import PairsSource
from services.dicom_ingest.pressure import Gate, PatientStore
from services.dicom_ingest.settings import IngestSettings
from services.settings import Settings
from shared.fracture import ids, keys
from shared.fracture.ids import Pseudonyms, digest
from shared.fracture.messages import (
    FACTS,
    CaseDeadLettered,
    CaseNotEvaluated,
    CaseReady,
    CaseRejected,
    Fact,
    FeaturesExtracted,
    MasksReady,
    SeriesDeadLettered,
    SeriesRejected,
)
from shared.fracture.records import (
    MaskRecord,
    Rejection,
    SeriesManifest,
)
from shared.fracture.topology import QUEUES, RADIOMICS_EXTRACTOR, RESAMPLER, SEGMENTER
from shared.pipeline.broker import Depth
from shared.pipeline.embedded import Counted, Embedded
from shared.pipeline.memory_broker import MemoryBroker
from shared.pipeline.metrics import Metrics
from shared.pipeline.recorder import Recorder
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.pipeline.worker import Runs, Worker
from shared.records.archive import find_record, read_record
from shared.records.outcomes import record_dead_letter

COHORT: Final = "cohort"
"""The queue in which the ends of cases are counted."""
_ENDS: Final = (
    FeaturesExtracted,
    CaseNotEvaluated,
    CaseRejected,
    CaseDeadLettered,
    SeriesRejected,
    SeriesDeadLettered,
)
COHORT_QUEUES: Final[Mapping[str, tuple[str, ...]]] = {
    **{queue: QUEUES[queue] for queue in (SEGMENTER, RESAMPLER, RADIOMICS_EXTRACTOR)},
    COHORT: tuple(end.__name__ for end in _ENDS),
}
"""Those of the nightly run that a cohort needs, and one that hears how each case ended."""
INDEX_FOLDER: Final = "cohort"


class Indexed(BaseModel):
    """What became of an image when it was read: so that an image whose cases have ended is not read again."""

    study_id: str
    series_id: str
    manifest_id: str
    image_hash: str
    mask_hash: str | None
    accession: str


def read_image(image: CohortImage, *, base: Path, limits: IngestSettings) -> tuple[PatientIdentity, CollectedSeries]:
    """The series of one image of a cohort, with its masks, and whose it is. `base`: what the paths are shown from."""
    source = PairsSource(
        [image.pair], read_folder=partial(read_identified_series, settings=limits), base=base, limits=limits
    )
    study = next(iter(source.studies()))
    return study.identity, next(iter(study.series))


@dataclass(frozen=True, kw_only=True)
class ImagePass:
    """One pass of the services over the images of a cohort."""

    app: Settings
    store: Store
    extraction: Extraction
    pseudonyms: Pseudonyms
    folder: Path

    def extracted(
        self, images: Sequence[CohortImage], *, base: Path, progress: Progress
    ) -> Mapping[int, Indexed | tuple[str, ...]]:
        """For each image's place what was stored of it, or the reasons why nothing was; its cases have ended then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found: dict[int, Indexed | tuple[str, ...]] = {}
        waiting: list[int] = []
        again: list[CaseReady] = []
        for place, image in enumerate(images):
            known = self._indexed(image)
            cases = None if known is None else self._open_cases(known, image)
            if known is None or cases is None:
                waiting.append(place)
            else:
                found[place] = known
                again += cases
        if not waiting and not again:
            progress("images read", len(images), len(images))
            return found
        wanted: dict[tuple[str, str], set[str]] = {}
        total = sum(len(image.rows) for image in images)
        ended = total - len(again) - sum(len(images[place].rows) for place in waiting)
        metrics = Metrics()
        with ExitStack() as stack:
            running = self._running(stack, wanted, metrics)
            tell = teller(running.broker)

            def tick() -> None:
                published = running.broker.published()
                done = sum(published.get(end.__name__, 0) for end in _ENDS if not issubclass(end, SeriesRejected))
                progress("features extracted", min(ended + done, total), total)

            def while_waiting() -> None:
                running.check()
                tick()

            gate = Gate(
                settings=self.app.pressure,
                depths=partial(_depths, running.broker),
                free_bytes=self.store.free_bytes,
                metrics=metrics,
                stop=threading.Event(),
                while_waiting=while_waiting,
            )
            intake = Intake(
                store=PatientStore(self.store, gate),
                pseudonyms=self.pseudonyms,
                protocols=self.extraction.protocols,
                judged_by=self.app.dicom_ingest.model_dump(mode="json"),
            )
            for ready in again:
                tell(ready)
            for count, place in enumerate(waiting, start=1):
                gate.admit()
                stored, fact = self._taken(images[place], intake, base=base, wanted=wanted)
                found[place] = stored
                if fact is not None:
                    tell(fact)
                progress("images read", len(images) - len(waiting) + count, len(images))
                tick()
            running.wait_until_idle(tick)
            tick()
        return found

    def _running(
        self, stack: ExitStack, wanted: Mapping[tuple[str, str], Collection[str]], metrics: Metrics
    ) -> Embedded:
        from services.radiomics_extractor.service import extractor_service
        from services.resampler.service import resampler_service
        from services.segmenter.service import build as build_segmenter
        from services.segmenter.settings import SegmenterSettings

        def levels(fact: MasksReady) -> Collection[str]:
            return wanted.get((fact.series_id, fact.mask_hash), ())

        app, store = self.app, self.store
        broker = Counted(MemoryBroker())
        broker.declare(COHORT_QUEUES)
        services = [
            # whoever made the cohort chose its masks: none is made here, and nothing is gated
            build_segmenter(
                store=store,
                settings=SegmenterSettings(source="off"),
                max_slice_spacing_mm=app.resampler.max_spacing_mm,
                tolerance_mm=app.resampler.spacing_tolerance_mm,
            ),
            resampler_service(store=store, protocol=self.extraction.crop, settings=app.resampler, wanted=levels),
            extractor_service(
                store=store,
                protocol=self.extraction.hcr,
                parameters=self.extraction.parameters,
                settings=app.radiomics_extractor,
            ),
            _ends_service(),
        ]
        workers: list[Runs] = []
        for service in services:
            stack.callback(service.close)
            workers.append(Worker(service, broker, max_attempts=app.worker.max_attempts, metrics=metrics))
        record = partial(record_dead_letter, store)
        workers.append(Recorder(broker, queues=tuple(COHORT_QUEUES), record=record, metrics=metrics))
        return stack.enter_context(Embedded(broker, workers))

    def _taken(
        self,
        image: CohortImage,
        intake: Intake,
        *,
        base: Path,
        wanted: dict[tuple[str, str], set[str]],
    ) -> tuple[Indexed | tuple[str, ...], Fact | None]:
        """Read and store one image; the fact that tells of it."""
        identity, series = read_image(image, base=base, limits=self.app.dicom_ingest)
        if series.volume is None or series.reasons:
            return series.reasons or ("no volume could be made of it",), None
        stored = intake.store_series(identity, series)
        if stored.fault:
            return (stored.fault,), None
        if stored.line.rejected:
            key = keys.series_rejected(stored.line.series_id, stored.line.manifest_id)
            rejection = find_record(self.store, key, Rejection)
            return ("the series was refused",) if rejection is None else rejection.reasons, None
        manifest = read_record(
            self.store, keys.manifest(stored.line.series_id, stored.line.manifest_id), SeriesManifest
        )
        accession = identity.accession_number
        known = Indexed(
            study_id=stored.study_id,
            series_id=manifest.series_id,
            manifest_id=manifest.manifest_id,
            image_hash=manifest.image_hash,
            mask_hash=manifest.mask_hash,
            accession=self.pseudonyms.content_id("accession", accession.encode()) if accession else "",
        )
        if manifest.mask_hash is not None:
            # told after: a worker asks for the levels when the fact reaches it
            wanted.setdefault((manifest.series_id, manifest.mask_hash), set()).update(image.levels)
            self._write_index(image, known)
        return known, stored.fact

    # the index ------------------------------------------------------------------------------------------------------
    def _index_path(self, image: CohortImage) -> Path:
        name = digest(
            {
                "content": image.content,
                "judged_by": self.app.dicom_ingest.model_dump(mode="json"),
                "site": self.pseudonyms.fingerprint,
            }
        )
        return self.folder / f"{name}.json"

    def _indexed(self, image: CohortImage) -> Indexed | None:
        try:
            return Indexed.model_validate_json(self._index_path(image).read_bytes())
        except (OSError, ValueError):
            return None

    def _write_index(self, image: CohortImage, known: Indexed) -> None:
        path = self._index_path(image)
        aside = path.with_suffix(f".{os.getpid()}.part")
        aside.write_text(json.dumps(known.model_dump(), indent=2) + "\n", encoding="utf-8")
        aside.replace(path)

    def _open_cases(self, known: Indexed, image: CohortImage) -> list[CaseReady] | None:
        """The cases of an image whose features alone are missing; None where the image has to be read again."""
        open_cases = []
        masks = self.mask_record(known)
        if masks is None:
            return None
        crop_hash, hcr_hash = self.extraction.crop.crop_hash, self.extraction.hcr.hcr_hash
        for level in sorted(image.levels):
            ready = self.case_ready(known, level)
            if ready is None:
                return None
            case_id = ready.case_id
            crop = (keys.case_image(crop_hash, case_id), keys.case_mask(crop_hash, case_id))
            there = self.store.exists(keys.case_record(crop_hash, case_id)) and all(map(self.store.exists, crop))
            if there and not self.store.exists(keys.hcr_features(hcr_hash, case_id)):
                open_cases.append(ready)
            elif not there and level in {*masks.levels, *masks.refused} and not self._refused(case_id):
                return None
        return open_cases

    def case_ready(self, known: Indexed, level: str) -> CaseReady | None:
        """The message of a case; None where the image has no mask."""
        if known.mask_hash is None:
            return None
        case_id = ids.case_id(
            series_id=known.series_id, image_hash=known.image_hash, mask_hash=known.mask_hash, level=level
        )
        return CaseReady(
            study_id=known.study_id,
            series_id=known.series_id,
            case_id=case_id,
            protocols=self.extraction.protocols,
        )

    def mask_record(self, known: Indexed) -> MaskRecord | None:
        """What the masks of an image hold."""
        if known.mask_hash is None:
            return None
        return find_record(self.store, keys.mask_record(known.series_id, known.mask_hash), MaskRecord)

    def _refused(self, case_id: str) -> bool:
        scope = self.extraction.protocols.scope
        kinds: tuple[keys.Outcome, ...] = ("not-evaluated", "rejected")
        return any(self.store.exists(keys.outcome(kind, scope, case_id)) for kind in kinds)


def _ends_service() -> Service:
    """Hears how each case ended, so that every fact of this pass has a queue and the ends can be counted."""

    def heard(fact: BaseModel) -> Iterable[BaseModel]:
        return ()

    def rejected(fact: BaseModel, reasons: tuple[str, ...]) -> Iterable[BaseModel]:
        return ()

    return Service(
        name=COHORT, queues=(COHORT,), messages=FACTS, handlers=dict.fromkeys(_ENDS, heard), rejected=rejected
    )


def _depths(broker: Counted, queues: Sequence[str]) -> Mapping[str, Depth]:
    """The depths of those queues that there are here."""
    known = {name for queue in COHORT_QUEUES for name in (queue, f"{queue}.retry")}
    return broker.depths([queue for queue in queues if queue in known])
