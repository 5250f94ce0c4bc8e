"""From a cohort's table to a bundle, and to all that is said about it.

The test rows take part in nothing before the bundle is written: it holds no number of theirs, and its bytes do not
change with them. Then they are scored through the bundle, by the arithmetic of the services.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from services.trainer.bundle_writer import (
    FittedBundle,
    classifier_file,
    golden_image,
    golden_vector,
    runnable,
    training_ranges,
    write_bundle,
)
from services.trainer.classifiers import onnx_difference, to_onnx
from services.trainer.cohort_table import CohortTable, TooSmall
from services.trainer.conformal import fit_conformal
from services.trainer.evaluation import demographics, probabilities
from services.trainer.model_card import model_card
from services.trainer.models import BRANCHES, FourModels, Rows, fit_four_models
from services.trainer.network_step import ImageFeatures, network_step
from services.trainer.random_line import has_line, random_line, random_onnx
from services.trainer.repeatability import repeatability
from services.trainer.results import (
    LABELS,
    MODEL_OF_BRANCH,
    MODELS,
    Branch,
    Chosen,
    FlowStep,
    ModelName,
    NetworkRun,
    Optimism,
    PartName,
    RandomNetwork,
    Repeatability,
    RunResult,
    Scored,
    Selection,
    SelectionStep,
)
from services.trainer.selection import Columns, Matrix, recorded
from services.trainer.settings import TrainingSettings
from services.trainer.split import held_out_of
from services.trainer.statistics import auc_delong
from services.trainer.weights import Start
from shared.fracture.bundle import (
    Bundle,
    BundleKind,
    Golden,
    GoldenVector,
    Models,
    OnnxClassifier,
    Pca,
    Thresholds,
    Training,
)
from shared.fracture.ids import digest, sha256_hex
from shared.fracture.nomogram import Sex
from shared.fracture.protocol import DtlProtocol, HcrProtocol, preset_box, preset_crop

GOLDEN_CASES: Final = 5

DeepFeatures = Callable[[bytes, DtlProtocol], Matrix]
"""ONNX bytes and protocol to the features (n rows, features) of all rows, as the deep extractor stores them."""


class Progress(Protocol):
    """Something that shows how far a run is."""

    def step(self, name: str, done: int, total: int) -> None:
        """So much of so much of a step is done."""


class Silent:
    """Progress that nobody sees."""

    def step(self, name: str, done: int, total: int) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """What the run is about, beside its table. `parameters` is the text of the pyradiomics file."""

    table: CohortTable
    flow: tuple[FlowStep, ...]
    hcr: HcrProtocol
    parameters: str
    mask_sources: tuple[str, ...]
    sha256: str
    """Of COHORT.csv."""
    phantom: bool
    warnings: tuple[str, ...] = ()
    """What is to be said of its images."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How the bundle is called. `notes`: a text of the user's that goes into the model card."""

    kind: BundleKind
    name: str
    version: str
    notes: str = ""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that came to its end."""

    bundle: Bundle
    result: RunResult


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def end(self, step: str) -> None:
        now = time.monotonic()
        self.seconds[step] = round(now - self._since, 3)
        self._since = now


def train(
    cohort: Cohort,
    settings: TrainingSettings,
    *,
    naming: Naming,
    start: Start,
    image_features: ImageFeatures,
    deep_features: DeepFeatures,
    out: Path,
    work: Path,
    processes: int = 1,
    progress: Progress | None = None,
    seconds_before: Mapping[str, float] | None = None,
) -> Trained:
    """Train on a cohort: the bundle in OUT, and what the run found.

    TooSmall and FractureSweepError where the cohort or the settings do not allow a step, with what would.
    """
    shown = progress or Silent()
    clock = _Clock()
    table = cohort.table
    test = held_out_of(table, settings)
    training = table.part(~test)
    _check_classes(training, "the training part")
    kept = repeatability(training, settings.repeatability)
    clock.end("repeatability")
    step = network_step(
        training,
        settings.network,
        start=start,
        seed=settings.seed,
        image_features=image_features,
        work=work / "network",
        progress=lambda done, total: shown.step("network, epochs", done, total),
    )
    clock.end("network")
    crop = preset_crop(settings.preset, roi=settings.roi)
    box, margin = preset_box(settings.preset)
    dtl_protocol = DtlProtocol(
        crop_hash=crop.crop_hash,
        box=box,
        box_margin_mm=margin,
        size=settings.network.image_size,
        network_sha256=sha256_hex(step.onnx),
    )
    dtl = deep_features(step.onnx, dtl_protocol)
    clock.end("deep features")
    rows = rows_of(training, kept, dtl[~test], logit=step.logit)
    four = fit_four_models(
        rows,
        settings,
        head=step.head,
        processes=processes,
        progress=lambda done, total: shown.step("out-of-fold", done, total),
    )
    clock.end("models")
    random_network = None
    if has_line(settings.network):
        onnx = random_onnx(settings.network, seed=settings.seed)
        of_random = deep_features(onnx, dtl_protocol.model_copy(update={"network_sha256": sha256_hex(onnx)}))
        random_network = random_line(
            rows_of(training, kept, of_random[~test], logit=None),
            rows_of(table.part(test), kept, of_random[test], logit=None),
            settings,
            processes=processes,
        )
        clock.end("random network beside it")
    selections = _selections(rows, four, settings, kept)
    clock.end("paths and stability")
    classifiers = {branch: to_onnx(four.classifiers[branch], four.classifiers[branch].width) for branch in BRANCHES}
    z = four.cut.columns(rows)
    differences = {
        branch: onnx_difference(four.classifiers[branch], classifiers[branch], z[branch], four.platt[branch])
        for branch in BRANCHES
    }
    conformal = fit_conformal(four.out_of_fold["fusion"], training.acute, alpha=settings.classifiers.conformal_alpha)
    models = _models(four, conformal=conformal)
    metrics = _metrics(
        training, four, settings, kept, step.run, selections, random_network=random_network, phantom=cohort.phantom
    )
    ready = runnable(models, classifiers)
    golden = _golden(models, four, training, dtl[~test], classifiers=ready, seed=settings.seed)
    image = drawn_image(settings.network.image_size, seed=settings.seed)
    bundle = write_bundle(
        out / "bundle",
        FittedBundle(
            kind=naming.kind,
            name=naming.name,
            version=naming.version,
            preset=settings.preset,
            crop=crop,
            pyradiomics_version=cohort.hcr.pyradiomics_version,
            parameters=cohort.parameters,
            hcr_names=table.hcr_names,
            network=step.onnx,
            models=models,
            nomogram=four.nomogram,
            threshold=four.thresholds["fusion"],
            distribution=training_ranges(models, hcr_names=table.hcr_names, hcr=training.hcr, dtl=dtl[~test]),
            golden=Golden(vectors=golden, image=golden_image(image, image_features(step.onnx, image[None])[0])),
            training=_training(training, settings, step.run),
            mask_sources=cohort.mask_sources,
            metrics=metrics,
            model_card=model_card(metrics, name=naming.name, kind=naming.kind, notes=naming.notes),
            image_size=settings.network.image_size,
            classifiers=classifiers,
        ),
    ).running()
    clock.end("bundle")
    scores = _scores(table, test, four, bundle, dtl)
    optimism = _optimism(scores)
    clock.end("scoring")
    result = RunResult(
        title=f"{naming.name} {naming.version}",
        phantom=cohort.phantom,
        settings=settings,
        seeds={"all": settings.seed},
        versions=_versions(bundle, cohort),
        hashes={
            "crop protocol": crop.crop_hash,
            "HCR protocol": bundle.manifest.hcr.hcr_hash,
            "DTL protocol": bundle.manifest.dtl.dtl_hash,
            "network": bundle.manifest.dtl.network_sha256,
            "feature list": bundle.manifest.hcr.feature_names_sha256,
            "COHORT.csv": cohort.sha256,
        },
        machine={"system": platform.system(), "machine": platform.machine(), "processes": str(processes)},
        seconds={**(seconds_before or {}), **clock.seconds},
        flow=cohort.flow,
        cohort=demographics(table, ["test" if held else "train" for held in test]),
        repeatability=kept,
        selections=selections,
        network=step.run,
        classifiers=tuple(
            Chosen(
                branch=branch,
                grid=four.grids[branch],
                winner=four.winners[branch],
                platt_a=four.platt[branch].a,
                platt_b=four.platt[branch].b,
                onnx_largest_difference=differences[branch],
            )
            for branch in BRANCHES
        ),
        nomogram=four.nomogram,
        scores=scores,
        optimism=optimism,
        random_network=random_network,
        conformal={"alpha": conformal.alpha, "chronic": conformal.chronic, "acute": conformal.acute},
        warnings=_warnings(cohort, settings, kept, step.run, selections, optimism, test, four),
    )
    return Trained(bundle=bundle, result=result)


def _check_classes(table: CohortTable, what: str) -> None:
    for name, value in (("acute", 1), ("chronic", 0)):
        if not (table.acute == value).any():
            raise TooSmall("training", needs=f"{name} fractures in {what}", has="none")


def rows_of(table: CohortTable, kept: Repeatability, dtl: Matrix, *, logit: Matrix | None) -> Rows:
    """The rows that models are fitted on: repeatable HCR, and DTL (or its out-of-fold logit)."""
    every = Columns(names=table.hcr_names, values=table.hcr)
    return Rows(
        hcr=Columns(names=kept.kept, values=every.of(kept.kept)),
        dtl=dtl,
        logit=logit,
        acute=table.acute,
        patient=table.patient,
        age=table.age,
        male=table.male,
    )


def _selections(rows: Rows, four: FourModels, settings: TrainingSettings, kept: Repeatability) -> tuple[Selection, ...]:
    together = four.cut.together(rows)
    of_hcr = (
        SelectionStep(step="all", features=kept.features),
        SelectionStep(step="repeatable", features=kept.kept),
    )
    found = []
    for branch in BRANCHES:
        found.append(
            recorded(
                four.cut.selected[branch],
                together,
                rows.acute,
                rows.patient,
                settings.selection,
                seed=settings.seed,
                before=of_hcr if branch == "hcr" else (),
            )
        )
    return tuple(found)


def _models(four: FourModels, *, conformal: Any) -> Models:
    """The bundle's models: the PCA cut to the components that something reads."""
    used = {*four.cut.selected["dtl"].names, *four.cut.selected["fusion"].names}
    pca = four.cut.pca
    places = [place for place, name in enumerate(pca.names) if name in used]
    linear = {
        branch: four.cut.linear[branch].model_copy(
            update={
                "platt": None,
                "classifier": OnnxClassifier(
                    kind=four.winners[branch].classifier, file=classifier_file(branch), platt=four.platt[branch]
                ),
            }
        )
        for branch in BRANCHES
    }
    return Models(
        pca=Pca(
            inputs=pca.inputs,
            mean=pca.mean,
            sd=pca.sd,
            names=tuple(pca.names[place] for place in places),
            components=tuple(pca.components[place] for place in places),
            offset=tuple(pca.offset[place] for place in places) if pca.offset else (),
        ),
        hcr=linear["hcr"],
        dtl=linear["dtl"],
        fusion=linear["fusion"],
        thresholds=Thresholds(
            hcr=four.thresholds["radiomics"],
            dtl=four.thresholds["dlr"],
            fusion=four.thresholds["fusion"],
            nomogram=four.thresholds["dlrn"],
        ),
        conformal=conformal,
    )


def _golden(
    models: Models,
    four: FourModels,
    training: CohortTable,
    dtl: Matrix,
    *,
    classifiers: Mapping[Branch, Any],
    seed: int,
) -> tuple[GoldenVector, ...]:
    """Golden vectors around the training means; drawn, since a bundle is handed on and holds no patient's values."""
    rng = np.random.default_rng([seed, 1])
    vectors = []
    for number in range(GOLDEN_CASES):
        sex: Sex = "M" if number % 2 else "F"
        vectors.append(
            golden_vector(
                models,
                four.nomogram,
                hcr_names=training.hcr_names,
                hcr=training.hcr.mean(axis=0) + training.hcr.std(axis=0) * rng.standard_normal(training.hcr.shape[1]),
                dtl=dtl.mean(axis=0) + dtl.std(axis=0) * rng.standard_normal(dtl.shape[1]),
                age=int(rng.integers(50, 90)),
                sex=sex,
                classifiers=classifiers,
            )
        )
    return tuple(vectors)


def drawn_image(size: int, *, seed: int) -> NDArray[np.float32]:
    """A picture of noise, mean 0 and SD 1: what the network's export is checked on at every start."""
    noise = np.random.default_rng([seed, 2]).standard_normal((size, size))
    return np.asarray((noise - noise.mean()) / noise.std(), dtype=np.float32)


def _training(training: CohortTable, settings: TrainingSettings, run: NetworkRun) -> Training:
    return Training(
        counts=_counts(training),
        seeds={"all": settings.seed},
        fingerprint=digest(
            sorted([case, int(acute)] for case, acute in zip(training.case_id, training.acute, strict=True))
        ),
        dtl_mode=run.mode,
        kernels=tuple(sorted({kernel for kernel in training.kernel if kernel})),
        kvp=tuple(float(value) for value in np.unique(training.kvp[np.isfinite(training.kvp)])),
    )


def _counts(table: CohortTable) -> dict[str, int]:
    return {
        "patients": len(np.unique(table.patient)),
        "cases": len(table),
        "acute": int(table.acute.sum()),
        "chronic": int((table.acute == 0).sum()),
    }


def _auc(acute: NDArray[np.int64], scores: Matrix) -> dict[str, float]:
    found = auc_delong(acute, scores)
    return {"auc": round(found.value, 6), "low": round(found.low, 6), "high": round(found.high, 6)}


def _metrics(
    training: CohortTable,
    four: FourModels,
    settings: TrainingSettings,
    kept: Repeatability,
    run: NetworkRun,
    selections: tuple[Selection, ...],
    *,
    random_network: RandomNetwork | None,
    phantom: bool,
) -> dict[str, Any]:
    """metrics.json: of training rows alone, so that a bundle does not change with the rows that are held out."""
    return {
        "origin": "synthetic phantoms; no clinical meaning" if phantom else "a site's own cohort; research use only",
        "preset": settings.preset,
        "counts": _counts(training),
        "network": {"mode": run.mode, "architecture": run.architecture, "weights": run.weights},
        "repeatability": {"method": kept.method, "limit": kept.limit, "kept": len(kept.kept), "of": len(kept.features)},
        "selected": {selection.branch: len(selection.selected) for selection in selections},
        "selection": {selection.branch: [[one.step, one.left] for one in selection.steps] for selection in selections},
        "classifiers": {
            branch: {
                "classifier": four.winners[branch].classifier,
                "cross_validated_auc": round(four.winners[branch].auc_mean, 6),
            }
            for branch in BRANCHES
        },
        "out_of_fold": {name: _auc(training.acute, four.out_of_fold[name]) for name in MODELS},
        "in_sample": {name: _auc(training.acute, four.in_sample[name]) for name in MODELS},
        "random_network": None if random_network is None else {"out_of_fold": round(random_network.out_of_fold, 6)},
        "thresholds": {name: round(four.thresholds[name], 6) for name in MODELS},
        "settings": settings.model_dump(mode="json", exclude={"network": {"weights"}}),
    }


def _scores(
    table: CohortTable, test: NDArray[np.bool_], four: FourModels, bundle: Bundle, dtl: Matrix
) -> tuple[Scored, ...]:
    found = []
    held = probabilities(bundle, table.part(test), dtl[test]) if test.any() else None
    parts: list[tuple[PartName, NDArray[np.bool_], Mapping[ModelName, Matrix] | None]] = [
        ("train", ~test, four.in_sample),
        ("out_of_fold", ~test, four.out_of_fold),
        ("test", test, held),
    ]
    for part, rows, of in parts:
        for name in MODELS:
            if of is not None:
                found.append(
                    Scored(
                        model=name,
                        part=part,
                        patient=tuple(int(number) for number in table.patient[rows]),
                        acute=tuple(int(label) for label in table.acute[rows]),
                        probability=tuple(float(value) for value in of[name]),
                        threshold=four.thresholds[name],
                    )
                )
    return tuple(found)


def _optimism(scores: tuple[Scored, ...]) -> tuple[Optimism, ...]:
    of = {(one.model, one.part): one.auc() for one in scores}
    found = []
    for name in MODELS:
        inside, held, test = of[name, "train"], of[name, "out_of_fold"], of.get((name, "test"))
        if inside is not None and held is not None:
            found.append(
                Optimism(
                    model=name,
                    in_sample=inside.value,
                    out_of_fold=held.value,
                    held_out=None if test is None else test.value,
                )
            )
    return tuple(found)


def _versions(bundle: Bundle, cohort: Cohort) -> dict[str, str]:
    names = ("numpy", "scipy", "scikit-learn", "torch", "onnxruntime", "lightgbm", "fracture-sweep")
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in names},
        "pyradiomics": cohort.hcr.pyradiomics_version,
        "bundle_id": bundle.bundle_id,
    }


def _warnings(
    cohort: Cohort,
    settings: TrainingSettings,
    kept: Repeatability,
    run: NetworkRun,
    selections: tuple[Selection, ...],
    optimism: tuple[Optimism, ...],
    test: NDArray[np.bool_],
    four: FourModels,
) -> tuple[str, ...]:
    said = list(cohort.warnings)
    if cohort.phantom:
        said.append("All images are synthetic phantoms: no number here says anything about patients.")
    if run.mode == "in_sample":
        said.append(
            "The network was fitted on the labels of the very rows whose features the later steps are fitted on "
            "(in_sample, as the paper very likely did). Its out-of-fold scores are optimistic as well: the network saw "
            "those patients. Only the held-out part says how good it is."
        )
    if run.mode == "crossfit":
        said.append(
            "Out-of-fold scores use logits of networks that never saw the patient; the other rows' logits within a "
            "fold come from networks that did. Refitting all networks for each outer fold was not done."
        )
    if run.weights.startswith("random"):
        said.append("The network started from random weights, which do not learn on cohorts of this size.")
    if kept.method == "perturbation":
        said.append("Repeatability was judged by perturbed masks, not by a second reader.")
    if kept.method == "none":
        said.append("Repeatability was not judged.")
    for selection in selections:
        if selection.fallback:
            said.append(f"LASSO ({selection.branch}) kept nothing; the feature that enters its path first was taken.")
    for branch in BRANCHES:
        if four.platt[branch].a <= 0:
            said.append(
                f"{LABELS[MODEL_OF_BRANCH[branch]]}: out of fold it is no better than chance, and its calibration "
                "turned its scores around. Do not use its probability."
            )
    said += four.nomogram_notes
    for one in optimism:
        if one.flatters:
            said.append(
                f"{LABELS[one.model]}: the AUC on the rows it was fitted on, {one.in_sample:.3f}, lies "
                f"{one.in_sample - one.out_of_fold:.3f} above the out-of-fold one."
            )
    if not test.any():
        said.append("No rows are held out: nothing here was tested on patients that took no part.")
    if settings.network.random_start and settings.network.weights is None and run.mode == "frozen":
        said.append("The network's features are random projections of the picture.")
    return tuple(said)
