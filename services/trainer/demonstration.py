"""`python -m services.trainer.demonstration`: the demonstration bundle, from nothing to a verified folder.

Everything is kept in the work folder as it is made (rows of features, slabs, checkpoints), so that an interrupted run
goes on. The extractors are the services' own functions, handed over here: the only module of the trainer that knows
other services.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.deep_extractor.network import Network
from services.radiomics_extractor.extraction import default_parameters, extract, hcr_protocol
from services.trainer.bundle_writer import FittedBundle, golden_image, golden_vector, training_ranges, write_bundle
from services.trainer.cohort_extraction import CohortRows, CohortSpec, extract_cohort
from services.trainer.fusion import Rows, Scores, fit_models, out_of_fold, score_rows
from services.trainer.model_card import model_card
from services.trainer.network import ResNet, initialised, resnet50, to_onnx
from services.trainer.nomogram_fitting import fit_nomogram
from services.trainer.phantoms.cohort import KERNEL_NAME
from services.trainer.pretraining import TARGETS, PretrainingSpec, pretrain, slabs
from services.trainer.selection import varying
from services.trainer.split import held_out
from services.trainer.statistics import auc_delong, confusion, delong_test, performance, youden_threshold
from shared.fracture.bundle import Bundle, Golden, Models, Training
from shared.fracture.ids import digest
from shared.fracture.nomogram import NomogramModel, Sex, read_points

NAME: Final = "phantom-demonstration"
VERSION: Final = "1"
COHORT_SEED: Final = 20230
PRETRAINING_SEED: Final = 77001
SPLIT_SEED: Final = 8
FOLD_SEED: Final = 10
_GOLDEN_CASES: Final = 5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `make bundle` does, in numbers."""

    cohort: CohortSpec
    pretraining: PretrainingSpec
    folds: int
    processes: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """One network's models with the scores that judge them."""

    models: Models
    dtl: NDArray[np.float64]
    training: Scores
    test: Scores


def network_features(onnx: bytes, images: NDArray[np.float32]) -> NDArray[np.float64]:
    """The features (n, features) of pictures (n, size, size), as the deep extractor computes them on the CPU."""
    return np.array(Network(onnx, device="cpu", intra_op_threads=1).features(list(images)))


class _Clock:
    """How long each stage took; what the work folder keeps adds up over runs, what is done anew each time does not."""

    def __init__(self, work: Path) -> None:
        self.path = work / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, stage: str, started: float, *, anew: bool = False) -> None:
        before = 0.0 if anew else self.seconds.get(stage, 0.0)
        self.seconds[stage] = before + time.monotonic() - started
        self.path.write_text(json.dumps(self.seconds), encoding="utf-8")

    @property
    def hours(self) -> float:
        """In halves, at least one: the card is to stay the same when a run takes a minute longer."""
        return max(round(sum(self.seconds.values()) / 1800), 1) / 2


def _progress(stage: str) -> Callable[[int, int], None]:
    def tell(done: int, all_: int) -> None:
        end = "\n" if done == all_ or not sys.stderr.isatty() else ""
        if sys.stderr.isatty() or done == all_ or done % 20 == 0:
            print(f"\r{stage}: {done} of {all_}", end=end, file=sys.stderr, flush=True)

    return tell


def pretrained(recipe: Recipe, *, work: Path) -> ResNet:
    """The backbone after its pre-training, or as far as the work folder has it and then on."""
    pictures, targets = slabs(
        recipe.pretraining, work=work, processes=recipe.processes, progress=_progress("phantom slabs")
    )
    torch.set_num_threads(recipe.threads)
    backbone = resnet50(seed=recipe.pretraining.seed)
    tell = _progress("pre-training, steps")
    pretrain(
        backbone,
        pictures,
        targets,
        recipe.pretraining,
        work=work,
        report=lambda step, _: tell(step, recipe.pretraining.steps),
    )
    return backbone


def _rows(cohort: CohortRows, dtl: NDArray[np.float64]) -> Rows:
    return Rows(hcr_names=cohort.hcr_names, hcr=cohort.hcr, dtl=dtl, acute=cohort.acute, patient=cohort.patient)


def _fit(cohort: CohortRows, onnx: bytes, test: NDArray[np.bool_], *, folds: int, stage: str) -> _Fit:
    dtl = network_features(onnx, cohort.images)
    rows = _rows(cohort, dtl)
    training = rows.part(~test)
    models = fit_models(training)
    return _Fit(
        models=models,
        dtl=dtl,
        training=out_of_fold(training, folds=folds, seed=FOLD_SEED, progress=_progress(stage)),
        test=score_rows(models, rows.part(test)),
    )


def _auc(acute: NDArray[np.int64], scores: NDArray[np.float64]) -> dict[str, float]:
    found = auc_delong(acute, scores)
    return {"auc": round(found.value, 6), "low": round(found.low, 6), "high": round(found.high, 6)}


def _nomogram_scores(
    model: NomogramModel, cohort: CohortRows, rows: NDArray[np.bool_], fusion: NDArray[np.float64]
) -> NDArray[np.float64]:
    sexes: list[Sex] = ["M" if male else "F" for male in cohort.male[rows]]
    return np.array(
        [
            read_points(model, age=float(age), sex=sex, score=float(score)).probability
            for age, sex, score in zip(cohort.age[rows], sexes, fusion, strict=True)
        ]
    )


def _command(recipe: Recipe) -> str:
    return (
        "python -m services.trainer.demonstration --out deploy/bundles/demo --work build/bundle"
        f" --patients {recipe.cohort.patients} --kappa {recipe.cohort.kappa:g} --pictures {recipe.pretraining.pictures}"
        f" --steps {recipe.pretraining.steps} --folds {recipe.folds}"
    )


def train(recipe: Recipe, *, out: Path, work: Path, parameters: str | None = None) -> Bundle:
    """Make the demonstration bundle in `out`, keeping and using what lies in `work`.

    `parameters`: the text of another pyradiomics parameter file than the shipped one.
    """
    work.mkdir(parents=True, exist_ok=True)
    clock = _Clock(work)
    parameters = parameters or default_parameters()
    protocol = hcr_protocol(parameters=parameters, crop_hash=recipe.cohort.crop.crop_hash)

    started = time.monotonic()
    cohort = extract_cohort(
        recipe.cohort,
        extractor=partial(extract, parameters=parameters),
        extractor_id=protocol.hcr_hash,
        work=work,
        processes=recipe.processes,
        progress=_progress("phantom patients"),
    )
    clock.add("cohort", started)
    started = time.monotonic()
    onnx = to_onnx(pretrained(recipe, work=work), size=recipe.cohort.image_size)
    random_onnx = to_onnx(
        initialised(ResNet(), seed=recipe.pretraining.seed, zero_residual=False).eval(), size=recipe.cohort.image_size
    )
    clock.add("pre-training", started)

    started = time.monotonic()
    test = held_out(cohort.patient, cohort.acute, seed=SPLIT_SEED)
    fit = _fit(cohort, onnx, test, folds=recipe.folds, stage="folds")
    random_fit = _fit(cohort, random_onnx, test, folds=recipe.folds, stage="folds, random network")
    nomogram = fit_nomogram(
        acute=cohort.acute[~test], age=cohort.age[~test], male=cohort.male[~test], score=fit.training.fusion
    )
    threshold = youden_threshold(cohort.acute[~test], fit.training.fusion_probability)
    clock.add("fitting", started, anew=True)

    metrics = _metrics(
        recipe,
        cohort,
        test,
        fit=fit,
        random_fit=random_fit,
        nomogram=nomogram,
        threshold=threshold,
        hours=clock.hours,
        pyradiomics=protocol.pyradiomics_version,
    )
    training_rows = _rows(cohort, fit.dtl).part(~test)
    golden_rows = np.flatnonzero(test)[:_GOLDEN_CASES]
    vectors = tuple(
        golden_vector(
            fit.models,
            nomogram,
            hcr_names=cohort.hcr_names,
            hcr=cohort.hcr[row],
            dtl=fit.dtl[row],
            age=int(cohort.age[row]),
            sex="M" if cohort.male[row] else "F",
        )
        for row in golden_rows
    )
    fitted = FittedBundle(
        kind="DEMO",
        name=NAME,
        version=VERSION,
        preset=recipe.cohort.preset,
        crop=recipe.cohort.crop,
        pyradiomics_version=protocol.pyradiomics_version,
        parameters=parameters,
        hcr_names=cohort.hcr_names,
        network=onnx,
        models=fit.models,
        nomogram=nomogram,
        threshold=threshold,
        distribution=training_ranges(
            fit.models, hcr_names=cohort.hcr_names, hcr=training_rows.hcr, dtl=training_rows.dtl
        ),
        golden=Golden(vectors=vectors, image=golden_image(cohort.images[golden_rows[0]], fit.dtl[golden_rows[0]])),
        training=_training(recipe, cohort, test),
        mask_sources=("synthetic phantom",),
        metrics=metrics,
        model_card=model_card(metrics),
        image_size=recipe.cohort.image_size,
    )
    return write_bundle(out, fitted)


def _training(recipe: Recipe, cohort: CohortRows, test: NDArray[np.bool_]) -> Training:
    kernels = {KERNEL_NAME[kernel] for kernel, no in zip(cohort.kernel, test, strict=True) if not no}  # type: ignore[index]
    return Training(
        counts=_counts(cohort, test),
        seeds={
            "cohort": recipe.cohort.seed,
            "pretraining": recipe.pretraining.seed,
            "split": SPLIT_SEED,
            "folds": FOLD_SEED,
        },
        fingerprint=digest(
            [
                [recipe.cohort.cache_key, int(number), level]
                for number, level, no in zip(cohort.patient, cohort.level, test, strict=True)
                if not no
            ]
        ),
        dtl_mode="frozen",
        kernels=tuple(sorted(kernels)),
        kvp=tuple(float(value) for value in np.unique(cohort.kvp[~test])),
    )


def _counts(cohort: CohortRows, test: NDArray[np.bool_]) -> dict[str, int]:
    return {
        "patients": len(np.unique(cohort.patient)),
        "cases": len(cohort),
        "acute": int(cohort.acute.sum()),
        "chronic": int((cohort.acute == 0).sum()),
        "training_patients": len(np.unique(cohort.patient[~test])),
        "training_cases": int((~test).sum()),
        "test_patients": len(np.unique(cohort.patient[test])),
        "test_cases": int(test.sum()),
    }


def _metrics(
    recipe: Recipe,
    cohort: CohortRows,
    test: NDArray[np.bool_],
    *,
    fit: _Fit,
    random_fit: _Fit,
    nomogram: NomogramModel,
    threshold: float,
    hours: float,
    pyradiomics: str,
) -> dict[str, Any]:
    inside, outside = cohort.acute[~test], cohort.acute[test]
    called = fit.test.fusion_probability >= threshold
    counts = confusion(outside, called)
    at_threshold = performance(counts)
    lines = {}
    for name, acute, scores, random_scores, rows in (
        ("out_of_fold", inside, fit.training, random_fit.training, ~test),
        ("held_out", outside, fit.test, random_fit.test, test),
    ):
        lines[name] = {
            "hcr": _auc(acute, scores.hcr),
            "dtl": _auc(acute, scores.dtl),
            "fusion": _auc(acute, scores.fusion),
            "nomogram": _auc(acute, _nomogram_scores(nomogram, cohort, rows, scores.fusion)),
            "random_dtl": _auc(acute, random_scores.dtl),
            "random_fusion": _auc(acute, random_scores.fusion),
        }
    paired = delong_test(outside, fit.test.fusion, fit.test.hcr)
    return {
        "origin": "synthetic phantoms; no clinical meaning",
        "command": _command(recipe),
        "preset": recipe.cohort.preset,
        "cohort": {
            **_counts(cohort, test),
            "kappa": recipe.cohort.kappa,
            "seed": recipe.cohort.seed,
            "split_seed": SPLIT_SEED,
        },
        "pretraining": {
            "steps": recipe.pretraining.steps,
            "batch": recipe.pretraining.batch,
            "pictures": recipe.pretraining.pictures,
            "seed": recipe.pretraining.seed,
            "targets": list(TARGETS),
            "kappa": 0.0,
        },
        "hcr_features": len(cohort.hcr_names),
        "training_hcr_varying": len(varying(cohort.hcr[~test], cohort.hcr_names)),
        "selected": {
            "hcr": len(fit.models.hcr.inputs),
            "dtl": len(fit.models.dtl.inputs),
            "fusion": len(fit.models.fusion.inputs),
        },
        **lines,
        "fusion_against_hcr": {"difference": round(paired.difference, 6), "p": round(paired.p, 6)},
        "threshold": threshold,
        "at_threshold": {
            **asdict(counts),
            "accuracy": round(at_threshold.accuracy.value, 6),
            "sensitivity": round(at_threshold.sensitivity.value, 6),
            "specificity": round(at_threshold.specificity.value, 6),
        },
        "pyradiomics": pyradiomics,
        "compute": {
            "processors": os.cpu_count(),
            "hours": hours,
            "python": platform.python_version(),
            "torch": version("torch"),
            "scikit_learn": version("scikit-learn"),
        },
    }


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m services.trainer.demonstration",
        description="Train the demonstration bundle on synthetic phantoms (no clinical meaning).",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle; replaced when it is there")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made on the way; used to go on")
    parser.add_argument("--patients", type=int, default=200, help="phantom patients (default 200)")
    parser.add_argument("--kappa", type=float, default=0.85, help="how far the classes differ, 0 to 1 (default 0.85)")
    parser.add_argument("--pictures", type=int, default=2500, help="slabs for the pre-training (default 2500)")
    parser.add_argument("--steps", type=int, default=700, help="pre-training steps of 32 pictures (default 700)")
    parser.add_argument("--folds", type=int, default=10, help="folds of the out-of-fold scores (default 10)")
    parser.add_argument("--processes", type=int, default=2, help="processes for phantoms and radiomics (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; part of what repeats bit for bit")
    return parser.parse_args(given)


def summary(metrics: Mapping[str, Any]) -> str:
    """The held-out lines for the terminal."""
    lines = [f"{name:14s} {auc['auc']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})" for name, auc in metrics.items()]
    return "held-out AUC on PHANTOMS, with 95 % intervals\n" + "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """The command line."""
    asked = _arguments(given)
    recipe = Recipe(
        cohort=CohortSpec(patients=asked.patients, seed=COHORT_SEED, kappa=asked.kappa),
        pretraining=PretrainingSpec(pictures=asked.pictures, steps=asked.steps, seed=PRETRAINING_SEED),
        folds=asked.folds,
        processes=asked.processes,
        threads=asked.threads,
    )
    bundle = train(recipe, out=asked.out, work=asked.work)
    held: Any = bundle.metrics["held_out"]
    size = sum(entry.size for entry in bundle.manifest.files.values()) / 1e6
    print(summary(held))
    print(f"bundle {bundle.bundle_id[:12]} in {asked.out}, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
