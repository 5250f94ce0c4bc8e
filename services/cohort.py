"""From COHORT.csv to a table of features: the nightly run's own services on the rows of a cohort, without any model.

Images go through the same intake, segmenter, resampler and radiomics extractor as in a sweep, with the same keys: what
a sweep over the same study extracted is not extracted again, and an interrupted run goes on where it stopped. No bundle
exists yet, so a message names protocols alone, and what would need one (deep features, classification, reports) has no
queue here. Afterwards each row's end is looked up in the store: it has its features, or the reason why it has not.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from services.cohort_rows import (
    MASK_COLUMNS,
    CohortImage,
    MaskColumn,
    Progress,
    images_of,
    read_rows_with_files,
    silent,
)
from services.composition import claim, teller
from services.dicom_ingest.folder import read_identified_series
from services.dicom_ingest.intake import Intake
from services.dicom_ingest.pairs_source import PairsSource
from services.dicom_ingest.pressure import Gate, PatientStore
from services.settings import Settings
from services.trainer.cohort_file import CohortError, CohortRow, patient_numbers, size_faults
from services.trainer.cohort_table import CohortTable, Repeat, Repeated
from services.trainer.perturbation import VERSION as PERTURBATION_VERSION
from services.trainer.perturbation import draw, perturbed, perturbed_rows
from services.trainer.results import FlowStep
from services.trainer.settings import HcrSettings, TrainingSettings
from services.trainer.split import check_disjoint, held_out_rows
from shared.fracture import ids, keys
from shared.fracture.bundle import Bundle
from shared.fracture.csv_rows import RowFault
from shared.fracture.features import FeatureVector
from shared.fracture.ids import Pseudonyms, digest, sha256_hex
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
from shared.fracture.protocol import (
    BoxRule,
    CropProtocol,
    DtlProtocol,
    HcrProtocol,
    Protocols,
    preset_box,
    preset_crop,
)
from shared.fracture.records import (
    CaseRecord,
    DeadLetterNote,
    MaskRecord,
    NotEvaluated,
    Rejection,
    SeriesManifest,
)
from shared.fracture.sagittal import sagittal_image
from shared.fracture.topology import QUEUES, RADIOMICS_EXTRACTOR, RESAMPLER, SEGMENTER
from shared.fracture.volume import mask_from_nrrd, to_nrrd, volume_from_nrrd
from shared.pipeline.broker import Depth
from shared.pipeline.embedded import Counted, Embedded
from shared.pipeline.errors import FractureSweepError, OverBudget, Reject, Retry
from shared.pipeline.memory_broker import MemoryBroker
from shared.pipeline.metrics import Metrics
from shared.pipeline.recorder import Recorder
from shared.pipeline.service import Service
from shared.pipeline.store import Store
from shared.pipeline.worker import Runs, Worker
from shared.records.archive import crop_files, find_record, read_record
from shared.records.outcomes import record_dead_letter

if TYPE_CHECKING:
    from services.radiomics_extractor.process_pool import ExtractionPool

NO_NETWORK: Final = digest({"dtl": "no network is known yet"})
"""In the place of a dtl_hash while a network is still to be fitted."""
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
_REPEATED: Final[Mapping[MaskColumn, Repeated]] = {"mask2": "intra", "mask3": "inter"}


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Under which protocols a cohort's features are made."""

    crop: CropProtocol
    hcr: HcrProtocol
    parameters: str
    """The text of pyradiomics' parameter file."""
    box: BoxRule
    box_margin_mm: float
    size: int

    @property
    def protocols(self) -> Protocols:
        """What the messages carry."""
        return Protocols(crop_hash=self.crop.crop_hash, hcr_hash=self.hcr.hcr_hash, dtl_hash=NO_NETWORK)

    def dtl(self, network_sha256: str) -> DtlProtocol:
        """The protocol of the deep features of a network."""
        return DtlProtocol(
            crop_hash=self.crop.crop_hash,
            box=self.box,
            box_margin_mm=self.box_margin_mm,
            size=self.size,
            network_sha256=network_sha256,
        )


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row of the cohort file that has no features under a column of masks, and why (no identifiers in it)."""

    line: int
    column: MaskColumn
    step: str
    reason: str
    group: str
    """The reason without what belongs to the one case, for counting."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """A cohort with its features. Every tuple but `flow` and `left_out` has one entry a row of the table."""

    table: CohortTable
    flow: tuple[FlowStep, ...]
    left_out: tuple[LeftOut, ...]
    ready: tuple[CaseReady, ...]
    """The cases as messages, for `deep_features`."""
    extraction: Extraction
    study: tuple[str, ...]
    """Pseudonymous, as `accession` ('' where there is none) and `image`."""
    accession: tuple[str, ...]
    image: tuple[str, ...]
    warnings: tuple[str, ...]
    fingerprint: str
    """The SHA-256 of the cohort file."""

    @property
    def groups(self) -> Mapping[str, Sequence[str | int]]:
        """What must not lie on both sides of a split (services.trainer.split.check_disjoint)."""
        patients = [int(number) for number in self.table.patient]
        return {"patient": patients, "study": self.study, "accession": self.accession, "image": self.image}


class _Indexed(BaseModel):
    """What became of an image when it was read: so that an image whose cases have ended is not read again."""

    study_id: str
    series_id: str
    manifest_id: str
    image_hash: str
    mask_hash: str | None
    accession: str


def extraction_of(settings: TrainingSettings) -> Extraction:
    """The protocols of the settings. FractureSweepError for image types that there are not."""
    from services.radiomics_extractor.extraction import hcr_protocol

    crop = preset_crop(settings.preset, roi=settings.roi)
    parameters = parameters_of(settings.hcr)
    box, margin = preset_box(settings.preset)
    return Extraction(
        crop=crop,
        hcr=hcr_protocol(parameters=parameters, crop_hash=crop.crop_hash),
        parameters=parameters,
        box=box,
        box_margin_mm=margin,
        size=settings.network.image_size,
    )


def parameters_of(settings: HcrSettings) -> str:
    """The parameter file of the settings. FractureSweepError for image types that there are not."""
    from services.radiomics_extractor.extraction import ParameterError, parameters_for

    try:
        return parameters_for(settings.features, settings.image_types)
    except ParameterError as error:
        raise FractureSweepError(f"hcr.image_types: {error}") from None


def extraction_of_bundle(bundle: Bundle) -> Extraction:
    """The protocols of a bundle, for an external validation."""
    manifest = bundle.manifest
    return Extraction(
        crop=manifest.crop,
        hcr=manifest.hcr,
        parameters=bundle.pyradiomics_yaml.decode("utf-8"),
        box=manifest.dtl.box,
        box_margin_mm=manifest.dtl.box_margin_mm,
        size=manifest.dtl.size,
    )


def cohort_table(
    csv: Path,
    settings: TrainingSettings,
    *,
    app: Settings,
    pseudonyms: Pseudonyms,
    store: Store,
    out: Path,
    extraction: Extraction | None = None,
    fitting: bool = True,
    progress: Progress = silent,
) -> Cohort:
    """The features of every row of a cohort file, and why some rows have none.

    `store`: where sweeps keep theirs too, or one of its own; `out`: a folder for what makes an interrupted run go on.
    Without `fitting` (external validation, with the bundle's `extraction`) rows are neither split nor repeated.
    CohortError with all faults of the file; SplitError where training and test rows are not apart after all.
    """
    chosen = extraction or extraction_of(settings)
    rows, judge = read_rows_with_files(csv, settings=settings, roi=chosen.crop.roi, fitting=fitting, progress=progress)
    by_masks = fitting and settings.repeatability.method in ("auto", "masks")
    images = tuple(images_of(rows, judge, columns=MASK_COLUMNS if by_masks else ("mask",)))
    claim(store, pseudonyms)
    run = _Run(app=app, store=store, extraction=chosen, pseudonyms=pseudonyms, folder=out / INDEX_FOLDER)
    found = run.extracted(images, base=csv.parent.resolve(), progress=progress)
    cohort = _Assembly(rows=rows, images=images, found=found, run=run, progress=progress).cohort(
        fingerprint=sha256_hex(csv.read_bytes())
    )
    if not fitting:
        return cohort
    test = held_out_rows(
        patient=cohort.table.patient,
        acute=cohort.table.acute,
        split=cohort.table.split,
        site=cohort.table.site,
        settings=settings.split,
        seed=settings.seed,
    )
    check_disjoint(test, cohort.groups)
    if cohort.left_out:
        faults = size_faults(
            patient=[int(number) for number in cohort.table.patient],
            acute=[bool(acute) for acute in cohort.table.acute],
            test=[bool(out) for out in test],
            settings=settings,
        )
        if faults:
            why = Counter(one.group for one in cohort.left_out if one.column == "mask")
            told = [RowFault(0, "", f"{count} rows were left out: {reason}") for reason, count in why.items()]
            raise CohortError([*faults, *told])
    method = settings.repeatability.method
    if method == "perturbation" or (method == "auto" and not cohort.table.repeats):
        return run.with_perturbed(cohort, ~test, settings=settings, progress=progress)
    return cohort


def deep_features(
    store: Store,
    ready: Sequence[CaseReady],
    *,
    network: bytes,
    protocol: DtlProtocol,
    app: Settings,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """The features (n, features) of cases by a network in ONNX, by the deep extractor's own batches and keys.

    Those that lie in the store already are not computed. FractureSweepError where a case has none.
    """
    from services.deep_extractor.network import Network
    from services.deep_extractor.service import extract_batch

    if sha256_hex(network) != protocol.network_sha256:
        raise ValueError("the protocol names another network than the one that is given")
    settings = app.deep_extractor
    loaded = Network(
        network,
        device=settings.device,
        intra_op_threads=settings.intra_op_threads,
        seconds=settings.batch_seconds,
    )
    values: list[NDArray[np.float64]] = []
    for start in range(0, len(ready), settings.batch_size):
        part = [
            one.model_copy(update={"protocols": one.protocols.model_copy(update={"dtl_hash": protocol.dtl_hash})})
            for one in ready[start : start + settings.batch_size]
        ]
        for answer in extract_batch(part, store=store, network=loaded, protocol=protocol):
            if isinstance(answer, FractureSweepError | Retry | Reject | OverBudget):
                raise FractureSweepError(f"the deep features of a case cannot be had: {answer}") from answer
            if isinstance(answer, Exception):
                raise answer
        for one in part:
            vector = FeatureVector.from_bytes(store.get(keys.dtl_features(protocol.dtl_hash, one.case_id)))
            values.append(vector.values)
        progress("deep features", len(values), len(ready))
    return np.stack(values) if values else np.empty((0, 0))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One pass of the services over the images of a cohort."""

    app: Settings
    store: Store
    extraction: Extraction
    pseudonyms: Pseudonyms
    folder: Path

    def extracted(
        self, images: Sequence[CohortImage], *, base: Path, progress: Progress
    ) -> Mapping[int, _Indexed | tuple[str, ...]]:
        """For each image's place what was stored of it, or the reasons why nothing was; its cases have ended then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found: dict[int, _Indexed | tuple[str, ...]] = {}
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

        def levels(fact: MasksReady) -> Collection[str]:
            return wanted.get((fact.series_id, fact.mask_hash), ())

        app, store = self.app, self.store
        broker = Counted(MemoryBroker())
        broker.declare(COHORT_QUEUES)
        services = [
            build_segmenter(
                store=store,
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
    ) -> tuple[_Indexed | tuple[str, ...], Fact | None]:
        """Read and store one image; the fact that tells of it."""
        limits = self.app.dicom_ingest
        source = PairsSource(
            [image.pair], read_folder=partial(read_identified_series, settings=limits), base=base, limits=limits
        )
        study = next(iter(source.studies()))
        series = next(iter(study.series))
        if series.volume is None or series.reasons:
            return series.reasons or ("no volume could be made of it",), None
        stored = intake.store_series(study.identity, series)
        if stored.fault:
            return (stored.fault,), None
        if stored.line.rejected:
            key = keys.series_rejected(stored.line.series_id, stored.line.manifest_id)
            rejection = find_record(self.store, key, Rejection)
            return ("the series was refused",) if rejection is None else rejection.reasons, None
        manifest = read_record(
            self.store, keys.manifest(stored.line.series_id, stored.line.manifest_id), SeriesManifest
        )
        accession = study.identity.accession_number
        known = _Indexed(
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

    def _indexed(self, image: CohortImage) -> _Indexed | None:
        try:
            return _Indexed.model_validate_json(self._index_path(image).read_bytes())
        except (OSError, ValueError):
            return None

    def _write_index(self, image: CohortImage, known: _Indexed) -> None:
        path = self._index_path(image)
        aside = path.with_suffix(f".{os.getpid()}.part")
        aside.write_text(json.dumps(known.model_dump(), indent=2) + "\n", encoding="utf-8")
        aside.replace(path)

    def _open_cases(self, known: _Indexed, image: CohortImage) -> list[CaseReady] | None:
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

    def case_ready(self, known: _Indexed, level: str) -> CaseReady | None:
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

    def mask_record(self, known: _Indexed) -> MaskRecord | None:
        """What the masks of an image hold."""
        if known.mask_hash is None:
            return None
        return find_record(self.store, keys.mask_record(known.series_id, known.mask_hash), MaskRecord)

    def _refused(self, case_id: str) -> bool:
        scope = self.extraction.protocols.scope
        kinds: tuple[keys.Outcome, ...] = ("not-evaluated", "rejected")
        return any(self.store.exists(keys.outcome(kind, scope, case_id)) for kind in kinds)

    # perturbation ---------------------------------------------------------------------------------------------------
    def with_perturbed(
        self, cohort: Cohort, training: NDArray[np.bool_], *, settings: TrainingSettings, progress: Progress
    ) -> Cohort:
        """The cohort with the features of perturbed masks of some training rows, as repeats of the kind intra."""
        from services.radiomics_extractor.process_pool import ExtractionPool

        table = cohort.table
        rows = perturbed_rows(table.patient, training, count=settings.repeatability.perturbed_cases, seed=settings.seed)
        kept: list[int] = []
        values: list[NDArray[np.float64]] = []
        lost: Counter[str] = Counter()
        with ExtractionPool(parameters=self.extraction.parameters, settings=self.app.radiomics_extractor) as pool:

            def one(row: int) -> NDArray[np.float64] | str:
                return self._perturbed_features(
                    table.case_id[row], names=table.hcr_names, seed=settings.seed, pool=pool
                )

            for done, (row, result) in enumerate(_in_threads(one, rows, count=pool.processes), start=1):
                progress("perturbed masks", done, len(rows))
                if isinstance(result, str):
                    lost[result] += 1
                else:
                    kept.append(row)
                    values.append(result)
        order = np.argsort(kept, kind="stable")
        repeat = Repeat(
            rows=np.array(kept, dtype=np.int64)[order],
            hcr=np.array(values, dtype=np.float64).reshape(len(kept), len(table.hcr_names))[order],
        )
        warnings = tuple(f"{count} perturbed cases were left out: {reason}" for reason, count in sorted(lost.items()))
        return replace(
            cohort,
            table=replace(table, repeats={"intra": repeat}, perturbed=True),
            warnings=(*cohort.warnings, *warnings),
        )

    def _perturbed_features(
        self, case_id: str, *, names: tuple[str, ...], seed: int, pool: ExtractionPool
    ) -> NDArray[np.float64] | str:
        """Features of a case's perturbed crop, kept under an id of their own; or why there are none."""
        from services.radiomics_extractor.extraction import ExtractionError

        own = digest({"perturbed": case_id, "seed": seed, "version": PERTURBATION_VERSION})
        hcr = self.extraction.hcr
        key = keys.hcr_features(hcr.hcr_hash, own)
        if not self.store.exists(key):
            image, mask = crop_files(self.store, self.extraction.crop.crop_hash, case_id)
            change = draw(np.random.default_rng([seed, int(case_id[:15], 16)]))
            try:
                changed = perturbed(
                    volume_from_nrrd(image),
                    mask_from_nrrd(mask),
                    change,
                    window_hu=self.extraction.crop.window_hu,
                )
                features = pool.extract(image=to_nrrd(changed[0]), mask=to_nrrd(changed[1]))
            except (ExtractionError, OverBudget, Retry, ValueError) as error:
                return str(error)
            if tuple(features) != names:
                return "pyradiomics gave another list of features"
            vector = FeatureVector(
                kind="hcr",
                names=names,
                values=np.array(list(features.values()), dtype=np.float64),
                protocol_hash=hcr.hcr_hash,
                provenance={"perturbed": str(PERTURBATION_VERSION)},
            )
            self.store.put(key, vector.to_bytes())
        return FeatureVector.from_bytes(self.store.get(key)).values


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A row's case with its features: where it lies, and what the table needs of it."""

    known: _Indexed
    ready: CaseReady
    record: CaseRecord
    hcr: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Assembly:
    """Joins the rows of a cohort with what the services left in the store."""

    rows: Sequence[CohortRow]
    images: Sequence[CohortImage]
    found: Mapping[int, _Indexed | tuple[str, ...]]
    run: _Run
    progress: Progress

    def cohort(self, *, fingerprint: str) -> Cohort:
        """The table, with the way that its rows went."""
        names = _feature_names(self.run.extraction)
        cases: dict[tuple[int, MaskColumn], _Case | LeftOut] = {}
        for place, image in enumerate(self.images):
            for row in image.rows:
                cases[(row.line, image.column)] = self._case(row, image.column, self.found[place], names)
        of_rows: dict[int, _Case | LeftOut] = {row.line: cases[(row.line, "mask")] for row in self.rows}
        self._refuse_same_images(of_rows)
        pictures = self._pictures(of_rows)
        flow = _flow(self.rows, of_rows)
        kept = [row for row in self.rows if not isinstance(of_rows[row.line], LeftOut)]
        whole = [case for row in kept if isinstance(case := of_rows[row.line], _Case)]
        if not kept:
            reasons = "; ".join(sorted({one.group for one in of_rows.values() if isinstance(one, LeftOut)})[:5])
            raise FractureSweepError(f"no vertebra of the cohort has features: {reasons}")
        numbers = dict(
            zip((row.line for row in self.rows), patient_numbers([r.patient for r in self.rows]), strict=True)
        )
        acquisitions = [case.record.acquisition for case in whole]
        table = CohortTable(
            case_id=tuple(case.ready.case_id for case in whole),
            patient=np.array([numbers[row.line] for row in kept], dtype=np.int64),
            site=tuple(row.site for row in kept),
            split=tuple(row.split for row in kept),
            level=tuple(row.level for row in kept),
            acute=np.array([row.acute for row in kept], dtype=np.int64),
            age=np.array([row.age for row in kept], dtype=np.float64),
            male=np.array([row.sex == "M" for row in kept], dtype=np.float64),
            kernel=tuple(one.convolution_kernel or "" for one in acquisitions),
            kvp=np.array([np.nan if one.kvp is None else one.kvp for one in acquisitions], dtype=np.float64),
            hcr_names=names,
            hcr=np.stack([case.hcr for case in whole]),
            images=np.stack([pictures[row.line] for row in kept]),
            repeats=self._repeats(kept, cases),
        )
        left_out = tuple(one for one in [*of_rows.values(), *cases.values()] if isinstance(one, LeftOut))
        return Cohort(
            table=table,
            flow=flow,
            left_out=tuple(sorted(set(left_out), key=lambda one: (one.line, one.column))),
            ready=tuple(case.ready for case in whole),
            extraction=self.run.extraction,
            study=tuple(case.known.study_id for case in whole),
            accession=tuple(case.known.accession for case in whole),
            image=tuple(case.known.image_hash for case in whole),
            warnings=_warnings(cases),
            fingerprint=fingerprint,
        )

    def _case(
        self, row: CohortRow, column: MaskColumn, known: _Indexed | tuple[str, ...], names: tuple[str, ...]
    ) -> _Case | LeftOut:
        def out(step: str, reasons: Sequence[str]) -> LeftOut:
            return LeftOut(
                line=row.line, column=column, step=step, reason="; ".join(reasons), group=group_of(reasons[0])
            )

        if isinstance(known, tuple):
            return out(READ, known)
        store, extraction = self.run.store, self.run.extraction
        crop_hash, hcr_hash, scope = extraction.crop.crop_hash, extraction.hcr.hcr_hash, extraction.protocols.scope
        ready = self.run.case_ready(known, row.level)
        if ready is not None:
            record = find_record(store, keys.case_record(crop_hash, ready.case_id), CaseRecord)
            if record is not None and record.guards:
                return out(GUARDS, [guard.sentence for guard in record.guards])
            key = keys.hcr_features(hcr_hash, ready.case_id)
            if record is not None and store.exists(key):
                vector = FeatureVector.from_bytes(store.get(key))
                if vector.names != names:
                    raise FractureSweepError("the store holds features of another list under this protocol")
                return _Case(known=known, ready=ready, record=record, hcr=vector.values)
            not_evaluated = find_record(store, keys.outcome("not-evaluated", scope, ready.case_id), NotEvaluated)
            if not_evaluated is not None:
                return out(GUARDS, not_evaluated.reasons)
            rejected = find_record(store, keys.outcome("rejected", scope, ready.case_id), Rejection)
            if rejected is not None:
                return out(READ if record is None else FEATURES, rejected.reasons)
            dead = find_record(store, keys.outcome("dead-lettered", scope, ready.case_id), DeadLetterNote)
            if dead is not None:
                return out(FEATURES, [dead.reason])
        refused = find_record(store, keys.series_rejected(known.series_id, known.manifest_id), Rejection)
        if refused is not None:
            return out(READ, refused.reasons)
        lost = find_record(store, keys.series_dead_lettered(scope, known.series_id, known.manifest_id), DeadLetterNote)
        if lost is not None:
            return out(READ, [lost.reason])
        masks = self.run.mask_record(known)
        if masks is not None and row.level not in {*masks.levels, *masks.refused}:
            return out(READ, ["the mask does not hold the level of the row"])
        raise RuntimeError(f"line {row.line} of the cohort file came to no end; the log has the reason")

    def _refuse_same_images(self, cases: Mapping[int, _Case | LeftOut]) -> None:
        """What only the images themselves can say: one image under two paths, after all was read."""
        seen: dict[str, CohortRow] = {}
        levels: dict[str, int] = {}
        faults = []
        for row in self.rows:
            case = cases[row.line]
            if isinstance(case, LeftOut):
                continue
            first = seen.setdefault(case.known.image_hash, row)
            if first.patient != row.patient:
                text = f"is the image of another patient in line {first.line}"
                faults.append(RowFault(row.line, "image", text))
            line = levels.setdefault(case.ready.case_id, row.line)
            if line != row.line:
                faults.append(RowFault(row.line, "image", f"{row.level} of this image stands in line {line} already"))
        if faults:
            raise CohortError(faults)

    def _pictures(self, cases: dict[int, _Case | LeftOut]) -> Mapping[int, NDArray[np.float32]]:
        """The network's input of each row, from the stored crops; a row without one is left out of `cases`."""
        extraction = self.run.extraction
        pictures: dict[int, NDArray[np.float32]] = {}
        for done, (line, case) in enumerate(list(cases.items()), start=1):
            if isinstance(case, LeftOut):
                continue
            image, mask = crop_files(self.run.store, extraction.crop.crop_hash, case.ready.case_id)
            try:
                pictures[line] = sagittal_image(
                    volume_from_nrrd(image),
                    mask_from_nrrd(mask),
                    box=extraction.box,
                    box_margin_mm=extraction.box_margin_mm,
                    size=extraction.size,
                )
            except ValueError as error:
                reason = str(error)
                cases[line] = LeftOut(line=line, column="mask", step=PICTURES, reason=reason, group=group_of(reason))
            self.progress("pictures", done, len(cases))
        return pictures

    def _repeats(
        self, kept: Sequence[CohortRow], cases: Mapping[tuple[int, MaskColumn], _Case | LeftOut]
    ) -> dict[Repeated, Repeat]:
        repeats: dict[Repeated, Repeat] = {}
        for column, kind in _REPEATED.items():
            found = [
                (place, case.hcr)
                for place, row in enumerate(kept)
                if isinstance(case := cases.get((row.line, column)), _Case)
            ]
            if found:
                repeats[kind] = Repeat(
                    rows=np.array([place for place, _ in found], dtype=np.int64),
                    hcr=np.stack([values for _, values in found]),
                )
        return repeats


READ: Final = "images and masks that can be read"
GUARDS: Final = "vertebrae that the guards let pass"
FEATURES: Final = "hand-crafted features"
PICTURES: Final = "pictures for the network"
STEPS: Final = (READ, GUARDS, FEATURES, PICTURES)
_NUMBER: Final = re.compile(r"(?<![A-Za-z0-9.])[0-9]+(\.[0-9]+)?")


def group_of(reason: str) -> str:
    """A reason without its numbers, so that equal reasons can be counted."""
    return _NUMBER.sub("…", reason)


def _flow(rows: Sequence[CohortRow], cases: Mapping[int, _Case | LeftOut]) -> tuple[FlowStep, ...]:
    """How many rows were left after each step, and why the others went."""
    left = list(rows)
    flow = [_step("rows of the cohort file", left, {})]
    for step in STEPS:
        out = Counter(one.group for row in left if isinstance(one := cases[row.line], LeftOut) and one.step == step)
        left = [row for row in left if not (isinstance(one := cases[row.line], LeftOut) and one.step == step)]
        flow.append(_step(step, left, dict(sorted(out.items()))))
    return tuple(flow)


def _step(name: str, rows: Sequence[CohortRow], left_out: dict[str, int]) -> FlowStep:
    acute = sum(row.acute for row in rows)
    return FlowStep(
        step=name,
        patients=len({row.patient for row in rows}),
        cases=len(rows),
        acute=acute,
        chronic=len(rows) - acute,
        left_out=left_out,
    )


def _warnings(cases: Mapping[tuple[int, MaskColumn], _Case | LeftOut]) -> tuple[str, ...]:
    """What a reader should know of the cases that are in the table, with how many have it and one of its sentences."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for (_, column), case in cases.items():
        if isinstance(case, _Case) and column == "mask":
            for warned in {group_of(one.sentence): one.sentence for one in case.record.warnings}.items():
                counts[warned[0]] += 1
                first.setdefault(*warned)
        elif isinstance(case, LeftOut) and column != "mask":
            reason = f"a repeated mask ({column}) was left out: {case.group}"
            counts[reason] += 1
            first.setdefault(reason, reason)
    return tuple(
        f"{count} {'row' if count == 1 else 'rows, the first'}: {first[group]}"
        for group, count in sorted(counts.items())
    )


def _feature_names(extraction: Extraction) -> tuple[str, ...]:
    from services.radiomics_extractor.extraction import feature_names

    return feature_names(extraction.parameters)


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


def _in_threads(
    one: Callable[[int], NDArray[np.float64] | str], rows: Sequence[int], *, count: int
) -> Iterator[tuple[int, NDArray[np.float64] | str]]:
    """Results as they come, at most `count` under way."""
    with ThreadPoolExecutor(max_workers=count) as threads:
        futures = {threads.submit(one, row): row for row in rows}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
