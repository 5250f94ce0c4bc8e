"""`make study`: what fitting the network on the labels costs and brings, on phantoms of five seeds (METHOD 3, 11).

Each seed is a cohort of its own; each mode (in_sample, crossfit, frozen) is trained on it as a user would, with
everything else as the preset says. What is done lies in the folder and is not done again. The table that comes out
is of phantoms, and says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, get_args

import numpy as np

from services.composition import pseudonyms_of, restricted
from services.settings import SecretSettings, Settings
from services.trainer.phantoms.training_cohort import PhantomCohort, write_training_cohort
from services.trainer.results import LABELS, MODELS, ModelName, RunResult
from services.trainer.settings import DtlMode, TrainingSettings
from services.training import RESULT, Place, naming, train_cohort
from shared.pipeline.folder_store import FolderStore

MODES: Final[tuple[DtlMode, ...]] = get_args(DtlMode)
LIMITS: Final[Mapping[ModelName, tuple[float, float]]] = {"radiomics": (0.80, 0.90), "dlr": (0.80, 0.92)}
"""METHOD 11: mean held-out AUC over the seeds."""
FUSION_MARGIN: Final = 0.01
"""METHOD 11: fusion is not below the better of both by more."""
_KEY: Final = "00" * 32  # phantoms have nobody to hide


class _Lines:
    """Progress in lines."""

    def __init__(self, what: str) -> None:
        self.what = what

    def step(self, name: str, done: int, total: int) -> None:
        """So much of so much of a step is done."""
        if done == total or (total > 20 and done % (total // 10) == 0):
            sys.stderr.write(f"{self.what}: {name} {done} of {total}\n")


def one_run(
    seed: int, mode: DtlMode, *, out: Path, patients: int, weights: Path, changes: dict[str, dict[str, object]]
) -> RunResult:
    """The run of one seed and mode, from the folder where it is there."""
    folder = out / f"seed-{seed}"
    result = folder / mode / RESULT
    if result.exists():
        return RunResult.model_validate_json(result.read_text(encoding="utf-8"))
    cohort = PhantomCohort(patients=patients, seed=seed, kappa=0.85, readers=30, nifti=True)
    csv = write_training_cohort(folder / "cohort", cohort)
    app = Settings(secrets=SecretSettings.model_validate({"pseudonym_key": _KEY, "encryption_key": _KEY}))
    network = {"mode": mode, "weights": str(weights)}
    own = {"seed": seed, "split": {"by": "column"}, "network": {**changes.get("network", {}), **network}}
    settings = TrainingSettings.of("recommended", {**changes, **own})
    place = Place(
        app=app,
        pseudonyms=pseudonyms_of(app),
        store=restricted(FolderStore(folder / "store"), app),
        out=folder / mode,
        processes=len(os.sched_getaffinity(0)),
    )
    name = naming(None, name=f"study-{seed}-{mode}", version="1", notes="")
    return train_cohort(csv, settings, place=place, naming=name, progress=_Lines(f"seed {seed}, {mode}")).result


def table(runs: Mapping[tuple[int, DtlMode], RunResult]) -> str:
    """The comparison as Markdown: mean and SD over the seeds, and the limits of METHOD 11."""
    seeds = sorted({seed for seed, _ in runs})
    lines = [
        "| mode | model | in-sample AUC | out-of-fold AUC | held-out AUC, mean (SD) | least to largest |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    held: dict[DtlMode, dict[ModelName, float]] = {}
    for mode in [mode for mode in MODES if any((seed, mode) in runs for seed in seeds)]:
        held[mode] = {}
        for model in MODELS:
            rows = [
                one
                for seed in seeds
                if (seed, mode) in runs
                for one in runs[seed, mode].optimism
                if one.model == model and one.held_out is not None
            ]
            out = np.array([one.held_out for one in rows], dtype=np.float64)
            held[mode][model] = float(out.mean())
            spread = f" ({out.std(ddof=1):.3f})" if len(out) > 1 else ""
            lines.append(
                f"| `{mode}` | {LABELS[model]} | {np.mean([one.in_sample for one in rows]):.3f} | "
                f"{np.mean([one.out_of_fold for one in rows]):.3f} | {out.mean():.3f}{spread} | "
                f"{out.min():.3f} to {out.max():.3f} |"
            )
    lines += ["", f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), {len(os.sched_getaffinity(0))} cores. PHANTOMS."]
    for mode, of in held.items():
        for model, (low, high) in LIMITS.items():
            inside = "within" if low <= of[model] <= high else "OUTSIDE"
            lines.append(f"- `{mode}`, {LABELS[model]}: {of[model]:.3f}, {inside} {low:.2f} to {high:.2f}.")
        better = max(of["radiomics"], of["dlr"])
        verdict = "holds" if of["fusion"] >= better - FUSION_MARGIN else "does NOT hold"
        lines.append(f"- `{mode}`: fusion {of['fusion']:.3f}, not below {better:.3f} by more than .01: {verdict}.")
    return "\n".join(lines) + "\n"


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m services.study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder; what lies there is not done again")
    parser.add_argument("--weights", type=Path, required=True, help="weights that the network starts from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--patients", type=int, default=365)
    asked = parser.parse_args(given)
    runs: dict[tuple[int, DtlMode], RunResult] = {}
    for seed in asked.seeds:
        for mode in asked.modes:
            runs[seed, mode] = one_run(
                seed, mode, out=asked.out, patients=asked.patients, weights=asked.weights, changes={}
            )
            (asked.out / "table.md").write_text(table(runs), encoding="utf-8")
    sys.stdout.write(table(runs))


if __name__ == "__main__":
    main()
