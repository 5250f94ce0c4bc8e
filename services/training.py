"""`train` and `evaluate`: a cohort's files through the nightly run's services, then what is fitted or judged on them.

Everything that a run makes lies in its folder, so that the same command goes on after an interruption: features in
the store, the network's checkpoints, and the results of steps that take long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.cohort.assembly import Cohort
from services.cohort.deep import deep_features
from services.cohort.protocols import extraction_of, extraction_of_bundle
from services.cohort.table import cohort_table
from services.settings import Settings
from services.trainer.evaluation import evaluation
from services.trainer.results import LABELS, Evaluation, Optimism, RandomNetwork, RunResult
from services.trainer.run_report.writing import write_evaluation_report, write_run_report
from services.trainer.settings import TrainingSettings
from services.trainer.tables import Table, evaluation_tables, tables
from services.trainer.training import Cohort as TrainingCohort
from services.trainer.training import Naming, Progress, Trained, train
from services.trainer.weights import starting_weights
from shared.fracture.bundle import Bundle
from shared.fracture.ids import Pseudonyms
from shared.fracture.protocol import DtlProtocol
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.store import Store

RESULT: Final = "run.json"
EVALUATION: Final = "evaluation.json"
REPORT: Final = "report"
TABLES: Final = "tables"
WORK: Final = "work"
PHANTOM_SITE: Final = "PHANTOM"
"""What the sites of phantom cohorts begin with."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a cohort is run: the settings of the services, the site's pseudonyms, the store, and the folder of it."""

    app: Settings
    pseudonyms: Pseudonyms
    store: Store
    out: Path
    processes: int
    work: Path | None = None
    """What makes an interrupted run go on; OUT/work where none is named. Runs on one cohort may share it."""

    @property
    def work_folder(self) -> Path:
        """`work`, or OUT/work."""
        return self.work or self.out / WORK


def is_phantom(sites: Sequence[str]) -> bool:
    """Whether a cohort holds phantoms; with one of them no result says anything about patients."""
    return any(site.startswith(PHANTOM_SITE) for site in sites)


def naming(kind: str | None, *, name: str, version: str, notes: str) -> Naming:
    """How the bundle is to be called; FractureSweepError for a kind that nobody may choose."""
    if kind not in (None, "RESEARCH", "SITE"):
        raise FractureSweepError(f"the kind {kind!r} cannot be chosen: RESEARCH or SITE (of phantoms it is DEMO)")
    return Naming(kind="SITE" if kind == "SITE" else "RESEARCH", name=name, version=version, notes=notes)


def optimism_line(one: Optimism) -> str:
    """In-sample beside out-of-fold and held out, in one line."""
    held = "–" if one.held_out is None else f"{one.held_out:.3f}"
    return f"{LABELS[one.model]}: AUC in-sample {one.in_sample:.3f}, out-of-fold {one.out_of_fold:.3f}, held out {held}"


def random_network_line(one: RandomNetwork) -> str:
    """DLR of a network that learned nothing, in one line."""
    held = "–" if one.held_out is None else f"{one.held_out:.3f}"
    return f"{LABELS['dlr']} with a random network instead: AUC out-of-fold {one.out_of_fold:.3f}, held out {held}"


def image_features(onnx: bytes, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """The features (n, features) of pictures (n, size, size), as the deep extractor computes them on the CPU."""
    from services.deep_extractor.network import Network

    return np.array(Network(onnx, device="cpu", intra_op_threads=1).features(list(images)), dtype=np.float64)


def train_cohort(csv: Path, settings: TrainingSettings, *, place: Place, naming: Naming, progress: Progress) -> Trained:
    """Train on a cohort file: OUT/bundle, OUT/run.json, OUT/tables and OUT/report.

    CohortError with all faults of the file before anything long starts; TooSmall and FractureSweepError later.
    """
    trained = fit_cohort(csv, settings, place=place, naming=naming, progress=progress)
    write_results(trained.result, place.out)
    return trained


def fit_cohort(csv: Path, settings: TrainingSettings, *, place: Place, naming: Naming, progress: Progress) -> Trained:
    """The same without tables and report."""
    started = time.monotonic()
    start = starting_weights(settings.network, seed=settings.seed)  # a fault of theirs is told at once
    extraction = extraction_of(settings)
    cohort = cohort_table(
        csv,
        settings,
        app=place.app,
        pseudonyms=place.pseudonyms,
        store=place.store,
        out=place.work_folder,
        progress=progress.step,
    )
    phantom = is_phantom(cohort.table.site)
    return train(
        TrainingCohort(
            table=cohort.table,
            flow=cohort.flow,
            hcr=extraction.hcr,
            parameters=extraction.parameters,
            mask_sources=tuple(
                source or ("synthetic phantom" if phantom else "given masks") for source in cohort.mask_sources
            ),
            sha256=cohort.fingerprint,
            phantom=phantom,
            warnings=cohort.warnings,
        ),
        settings,
        naming=replace(naming, kind="DEMO") if phantom else naming,
        start=start,
        image_features=image_features,
        deep_features=partial(_deep, cohort=cohort, place=place, progress=progress),
        out=place.out,
        work=place.work_folder,
        processes=place.processes,
        progress=progress,
        seconds_before={"cohort": round(time.monotonic() - started, 3)},
    )


def _deep(
    network: bytes, protocol: DtlProtocol, *, cohort: Cohort, place: Place, progress: Progress
) -> NDArray[np.float64]:
    return deep_features(
        place.store, cohort.ready, network=network, protocol=protocol, app=place.app, progress=progress.step
    )


def write_results(result: RunResult, out: Path) -> Path:
    """OUT/run.json, OUT/tables and OUT/report; the path of the report's page."""
    _write(out / RESULT, result.model_dump_json(indent=1) + "\n")
    drawn = tables(result)
    _write_tables(drawn, out)
    return write_run_report(result, _sections(drawn), out / REPORT)


def evaluate_cohort(bundle: Bundle, csv: Path, *, place: Place, progress: Progress) -> Evaluation:
    """Judge a bundle on another cohort, with nothing fitted: OUT/evaluation.json, OUT/tables and OUT/report."""
    found = judge_cohort(bundle, csv, place=place, progress=progress)
    _write(place.out / EVALUATION, found.model_dump_json(indent=1) + "\n")
    drawn = evaluation_tables(found)
    _write_tables(drawn, place.out)
    write_evaluation_report(found, _sections(drawn), place.out / REPORT)
    return found


def judge_cohort(bundle: Bundle, csv: Path, *, place: Place, progress: Progress) -> Evaluation:
    """The same without tables and report."""
    cohort, dtl = read_cohort(bundle, csv, place=place, progress=progress)
    return evaluation(
        bundle.running(),
        cohort.table,
        dtl,
        flow=cohort.flow,
        phantom=is_phantom(cohort.table.site),
        sha256=cohort.fingerprint,
        warnings=cohort.warnings,
    )


def read_cohort(bundle: Bundle, csv: Path, *, place: Place, progress: Progress) -> tuple[Cohort, NDArray[np.float64]]:
    """A cohort under a bundle's protocols: its rows with their hand-crafted features, and the network's (rows, n)."""
    cohort = cohort_table(
        csv,
        TrainingSettings.of(bundle.manifest.preset, {"roi": bundle.manifest.crop.roi}),
        app=place.app,
        pseudonyms=place.pseudonyms,
        store=place.store,
        out=place.work_folder,
        extraction=extraction_of_bundle(bundle),
        fitting=False,
        progress=progress.step,
    )
    return cohort, _deep(bundle.network_bytes(), bundle.manifest.dtl, cohort=cohort, place=place, progress=progress)


def _sections(drawn: Sequence[Table]) -> list[tuple[str, str]]:
    """Each table's anchor in the report, and its HTML."""
    return [(table.name.replace("table", "table-"), table.to_html()) for table in drawn]


def _write_tables(drawn: Sequence[Table], out: Path) -> None:
    folder = out / TABLES
    folder.mkdir(parents=True, exist_ok=True)
    for table in drawn:
        for ending, text in (("csv", table.to_csv()), ("tex", table.to_latex()), ("html", table.to_html())):
            _write(folder / f"{table.name}.{ending}", text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
