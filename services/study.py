"""`make study`: what fitting the network on the labels costs and brings, on phantoms of five seeds (METHOD 3, 11).

Each seed is a cohort of its own; each mode (in_sample, crossfit, frozen) is trained on it as a user would, with
everything else as the preset says. What each run found is a few rows of a CSV, written when the run is over: a study
that was interrupted, or that goes on on another machine, does what is not in the CSV yet. The table is made from the
CSV alone. All of it is about phantoms, and says so.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import t as student_t

from services.composition import pseudonyms_of, restricted
from services.settings import SecretSettings, Settings
from services.trainer.phantoms.training_cohort import PhantomCohort, write_training_cohort
from services.trainer.results import LABELS, MODELS, ModelName, NetworkRun, RunResult
from services.trainer.settings import TrainingSettings
from services.trainer.training import Progress
from services.training import RESULT, WORK, Place, naming, train_cohort
from shared.pipeline.folder_store import FolderStore

Mode = Literal["frozen", "crossfit", "in_sample", "in_sample_to_the_end"]
MODES: Final[Mapping[Mode, dict[str, object]]] = {
    "frozen": {"mode": "frozen"},
    "crossfit": {"mode": "crossfit"},
    "in_sample": {"mode": "in_sample"},
    "in_sample_to_the_end": {"mode": "in_sample", "patience": None},
}
"""What each changes of the network's settings. The last is fine-tuned for all epochs, with no inner fold to stop it."""
KAPPA: Final = 0.85
LIMITS: Final[tuple[tuple[ModelName, float, float], ...]] = (("radiomics", 0.80, 0.90), ("dlr", 0.80, 0.92))
"""METHOD 11: mean held-out AUC over the seeds."""
FUSION_MARGIN: Final = 0.01
"""METHOD 11: fusion is not below the better of both by more."""
_KEY: Final = "00" * 32  # phantoms have nobody to hide


class StudyRow(BaseModel):
    """One model of one run: AUCs, the held-out one with DeLong's interval, and under which circumstances."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int
    mode: Mode
    model: ModelName
    patients: int
    in_sample: float
    out_of_fold: float
    held_out: float
    held_out_low: float
    held_out_high: float
    random_out_of_fold: float
    """Of DLR with a random network: the same in every row of a seed."""
    random_held_out: float
    networks: int
    """That were fine-tuned, and those whose weights are of an epoch in which the backbone had moved."""
    moved: int
    weights: str
    minutes: float
    """Of the whole run, as far as it was not done before (features are shared among the modes of a seed)."""
    cores: int


class _Lines:
    """Progress in lines."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.last = ("", -1)

    def step(self, name: str, done: int, total: int) -> None:
        """So much of so much of a step is done."""
        told = done == total or (total > 20 and done % (total // 10) == 0)
        if told and self.last != (name, done):
            self.last = (name, done)
            sys.stderr.write(f"{self.what}: {name} {done} of {total}\n")


def phantom_run(
    folder: Path,
    settings: TrainingSettings,
    *,
    run: str,
    title: str,
    patients: int,
    seed: int,
    processes: int,
    progress: Progress,
) -> RunResult:
    """A training on phantoms in FOLDER/`run`, from there where it is done; runs of one folder share all features."""
    result = folder / run / RESULT
    if result.exists():
        return RunResult.model_validate_json(result.read_text(encoding="utf-8"))
    table = write_training_cohort(
        folder / "cohort",
        PhantomCohort(patients=patients, seed=seed, kappa=KAPPA, readers=30, nifti=True),
        processes=processes,
        progress=lambda done, total: progress.step("phantom patients", done, total),
    )
    app = Settings(secrets=SecretSettings.model_validate({"pseudonym_key": _KEY, "encryption_key": _KEY}))
    place = Place(
        app=app,
        pseudonyms=pseudonyms_of(app),
        store=restricted(FolderStore(folder / "store"), app),
        out=folder / run,
        work=folder / WORK,
        processes=processes,
    )
    name = naming(None, name=title, version="1", notes="")
    return train_cohort(table, settings, place=place, naming=name, progress=progress).result


def one_run(seed: int, mode: Mode, *, out: Path, patients: int, weights: Path, processes: int) -> RunResult:
    """The run of one seed and mode, from the folder where it is there."""
    network = {**MODES[mode], "weights": str(weights)}
    return phantom_run(
        out / f"seed-{seed}",
        TrainingSettings.of("recommended", {"seed": seed, "split": {"by": "column"}, "network": network}),
        run=mode,
        title=f"study-{seed}-{mode}",
        patients=patients,
        seed=seed,
        processes=processes,
        progress=_Lines(f"seed {seed}, {mode}"),
    )


def moved(network: NetworkRun) -> tuple[int, int]:
    """How many networks were fine-tuned, and how many have weights of an epoch in which the backbone had moved."""
    taken = []
    for fold in {one.fold for one in network.epochs}:
        epochs = [one for one in network.epochs if one.fold == fold]
        measured = [one for one in epochs if one.inner_loss is not None]
        best = min(measured, key=lambda one: one.inner_loss or 0.0) if measured else epochs[-1]
        taken.append(best.backbone_rate > 0)
    return len(taken), sum(taken)


def rows_of(result: RunResult, *, seed: int, mode: Mode, patients: int, cores: int) -> tuple[StudyRow, ...]:
    """What the table needs of a run."""
    line = result.random_network
    if line is None or line.held_out is None:
        raise ValueError("a run of the study has held-out rows and a random network beside it")
    networks, with_moved = moved(result.network)
    found = []
    for one in result.optimism:
        held = result.scored(one.model, "test").auc()
        if held is None:
            raise ValueError("a run of the study has both classes among its held-out rows")
        found.append(
            StudyRow(
                seed=seed,
                mode=mode,
                model=one.model,
                patients=patients,
                in_sample=round(one.in_sample, 6),
                out_of_fold=round(one.out_of_fold, 6),
                held_out=round(held.value, 6),
                held_out_low=round(held.low, 6),
                held_out_high=round(held.high, 6),
                random_out_of_fold=round(line.out_of_fold, 6),
                random_held_out=round(line.held_out, 6),
                networks=networks,
                moved=with_moved,
                weights=result.network.weights,
                minutes=round(sum(result.seconds.values()) / 60, 1),
                cores=cores,
            )
        )
    return tuple(found)


def read_rows(path: Path) -> tuple[StudyRow, ...]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return ()
    with path.open(newline="", encoding="utf-8") as stream:
        return tuple(StudyRow.model_validate(row) for row in csv.DictReader(stream))


def write_rows(path: Path, rows: Iterable[StudyRow]) -> None:
    """Write the CSV, aside and renamed, by seed, mode and model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, StudyRow.model_fields, lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda one: (one.seed, tuple(MODES).index(one.mode), MODELS.index(one.model))):
            writer.writerow(row.model_dump())
    aside.replace(path)


def _mean_words(values: Sequence[float]) -> str:
    """Mean with the 95 % interval of Student's t over the seeds; the mean alone of one seed."""
    mean, reach = _mean(values)
    return f"{mean:.3f}" if math.isnan(reach) else f"{mean:.3f} ({mean - reach:.3f} to {mean + reach:.3f})"


def _mean(values: Sequence[float]) -> tuple[float, float]:
    of: NDArray[np.float64] = np.array(values, dtype=np.float64)
    if len(of) < 2:
        return float(of.mean()), math.nan
    reach = float(student_t.ppf(0.975, len(of) - 1)) * float(of.std(ddof=1)) / math.sqrt(len(of))
    return float(of.mean()), reach


def table(rows: Sequence[StudyRow]) -> str:
    """The comparison as Markdown: means over the seeds with intervals, and the limits of METHOD 11."""
    seeds = sorted({row.seed for row in rows})
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    lines = [
        "| mode | model | seeds | in-sample AUC | out-of-fold AUC | held-out AUC | least to largest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    held: dict[tuple[Mode, ModelName], dict[int, float]] = {}
    for mode in modes:
        for model in MODELS:
            of = [row for row in rows if (row.mode, row.model) == (mode, model)]
            held[mode, model] = {row.seed: row.held_out for row in of}
            lines.append(
                f"| `{mode}` | {LABELS[model]} | {len(of)} | {_mean_words([row.in_sample for row in of])} | "
                f"{_mean_words([row.out_of_fold for row in of])} | {_mean_words([row.held_out for row in of])} | "
                f"{min(row.held_out for row in of):.3f} to {max(row.held_out for row in of):.3f} |"
            )
    random = {row.seed: (row.random_out_of_fold, row.random_held_out) for row in rows}
    out_of_fold, of_random = zip(*random.values(), strict=True)
    lines.append(
        f"| random network | {LABELS['dlr']} | {len(seeds)} | | {_mean_words(out_of_fold)} | "
        f"{_mean_words(of_random)} | {min(of_random):.3f} to {max(of_random):.3f} |"
    )
    lines += ["", f"PHANTOMS. Means over seeds {', '.join(map(str, seeds))}, 95 % intervals of Student's t over them."]
    lines += ["", *_judgements(held, modes), *_differences(held, modes), *_moved(rows, modes)]
    return "\n".join(lines) + "\n"


def _judgements(held: dict[tuple[Mode, ModelName], dict[int, float]], modes: Sequence[Mode]) -> list[str]:
    """Whether the phantoms are as hard as METHOD 11 asks."""
    lines = []
    for mode in modes:
        mean = {model: float(np.mean(list(held[mode, model].values()))) for model in MODELS}
        for model, low, high in LIMITS:
            inside = "within" if low <= mean[model] <= high else "OUTSIDE"
            lines.append(f"- `{mode}`, {LABELS[model]}: {mean[model]:.3f}, {inside} {low:.2f} to {high:.2f}.")
        better = max(mean["radiomics"], mean["dlr"])
        verdict = "holds" if mean["fusion"] >= better - FUSION_MARGIN else "does NOT hold"
        lines.append(f"- `{mode}`: fusion {mean['fusion']:.3f}, not below {better:.3f} by more than .01: {verdict}.")
    return lines


def _differences(held: dict[tuple[Mode, ModelName], dict[int, float]], modes: Sequence[Mode]) -> list[str]:
    """Crossfit against frozen, seed by seed."""
    if not {"crossfit", "frozen"} <= set(modes):
        return []
    lines = []
    for model in MODELS:
        crossfit, frozen = held["crossfit", model], held["frozen", model]
        both = sorted(crossfit.keys() & frozen.keys())
        if both:
            words = _mean_words([crossfit[seed] - frozen[seed] for seed in both])
            lines.append(f"- {LABELS[model]}, `crossfit` minus `frozen`, held out, {len(both)} seeds: {words}.")
    return lines


def _moved(rows: Sequence[StudyRow], modes: Sequence[Mode]) -> list[str]:
    """Whether the early stop let the fine-tuning of the backbone through."""
    lines = []
    for mode in modes:
        of = {row.seed: (row.networks, row.moved) for row in rows if row.mode == mode and row.networks}
        if of:
            networks, moved = (sum(counts) for counts in zip(*of.values(), strict=True))
            lines.append(
                f"- `{mode}`: {moved} of {networks} fine-tuned networks have weights of an epoch in which the backbone "
                "had moved."
            )
    return lines


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m services.study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder; what lies there is not done again")
    parser.add_argument("--rows", type=Path, help="CSV of what was found; what stands there is not done again")
    parser.add_argument("--weights", type=Path, help="what the network starts from; none: print the table alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 11, 12, 13, 14])
    parser.add_argument("--modes", nargs="+", choices=tuple(MODES), default=list(MODES))
    parser.add_argument("--patients", type=int, default=365)
    parser.add_argument("--processes", type=int, default=0, help="processes at once; 0 takes every core")
    asked = parser.parse_args(given)
    path = asked.rows or asked.out / "study.csv"
    cores = len(os.sched_getaffinity(0))
    for seed in asked.seeds if asked.weights is not None else ():
        for mode in asked.modes:
            rows = read_rows(path)
            if not any((row.seed, row.mode, row.patients) == (seed, mode, asked.patients) for row in rows):
                result = one_run(
                    seed,
                    mode,
                    out=asked.out,
                    patients=asked.patients,
                    weights=asked.weights,
                    processes=asked.processes or cores,
                )
                found = rows_of(result, seed=seed, mode=mode, patients=asked.patients, cores=cores)
                write_rows(path, (*read_rows(path), *found))  # read again: two of us may share the seeds
    sys.stdout.write(table(read_rows(path)))


if __name__ == "__main__":
    main()
