"""How the time of a training run divides over its steps, and how it grows with the cohort: phantoms, run in turn.

For each number of patients a cohort of phantoms is made (not timed) and trained on from nothing, as the demonstration
bundle is (`deploy/bundles/demo.toml`). Prints the seconds of each step, their shares, and each step's growth against
the smallest cohort.

    python benchmarks/training.py --patients 100 365 --weights build/bundle/phantom-signs.safetensors

Without --weights the network starts at random, which takes as long and finds less. The folder is kept where one is
named, and what lies there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import tomllib
from pathlib import Path

from services.composition import pseudonyms_of, restricted
from services.settings import SecretSettings, Settings
from services.trainer.phantoms.training_cohort import PhantomCohort, write_training_cohort
from services.trainer.results import RunResult
from services.trainer.settings import TrainingSettings
from services.training import RESULT, Place, naming, train_cohort
from shared.pipeline.folder_store import FolderStore

KEY = "00" * 32
DEMO = Path(__file__).resolve().parents[1] / "deploy" / "bundles" / "demo.toml"


class Silent:
    """Progress that nobody sees."""

    def step(self, name: str, done: int, total: int) -> None:
        """Nothing."""


def measured(folder: Path, *, patients: int, tiny: bool, weights: Path | None) -> RunResult:
    """A run on so many phantom patients, from the folder where it is there."""
    result = folder / "run" / RESULT
    if not result.exists():
        csv = write_training_cohort(
            folder / "cohort", PhantomCohort(patients=patients, seed=7, kappa=0.85, readers=30, nifti=True)
        )
        app = Settings(secrets=SecretSettings.model_validate({"pseudonym_key": KEY, "encryption_key": KEY}))
        asked = tomllib.loads(DEMO.read_text(encoding="utf-8"))
        start = {"random_start": True, "weights": None} if weights is None else {"weights": str(weights)}
        asked["network"] |= {**start, "architecture": "tiny" if tiny else "resnet50"}
        train_cohort(
            csv,
            TrainingSettings.of("recommended", asked),
            place=Place(
                app=app,
                pseudonyms=pseudonyms_of(app),
                store=restricted(FolderStore(folder / "store"), app),
                out=folder / "run",
                processes=len(os.sched_getaffinity(0)),
            ),
            naming=naming(None, name="benchmark", version="1", notes=""),
            progress=Silent(),
        )
    return RunResult.model_validate_json(result.read_text(encoding="utf-8"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, nargs="+", default=[100, 365])
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--tiny", action="store_true", help="the network of the tests")
    parser.add_argument("--folder", type=Path, help="kept, and gone on with")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        runs = {
            patients: measured(
                folder / str(patients),
                patients=patients,
                tiny=asked.tiny,
                weights=asked.weights,
            )
            for patients in sorted(asked.patients)
        }
    first = next(iter(runs.values())).seconds
    print(
        json.dumps(
            {
                "cores": len(os.sched_getaffinity(0)),
                "phantom patients": {
                    str(patients): {
                        "vertebrae": len(run.cohort),
                        "seconds": round(sum(run.seconds.values()), 1),
                        "steps": {
                            step: {
                                "seconds": round(spent, 1),
                                "share": round(spent / sum(run.seconds.values()), 3),
                                "times the smallest": round(spent / first[step], 2) if first.get(step) else None,
                            }
                            for step, spent in run.seconds.items()
                        },
                    }
                    for patients, run in runs.items()
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
