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

from services.study import phantom_run
from services.trainer.results import RunResult
from services.trainer.settings import TrainingSettings
from services.trainer.training import Silent

DEMO = Path(__file__).resolve().parents[1] / "deploy" / "bundles" / "demo.toml"


def measured(folder: Path, *, patients: int, tiny: bool, weights: Path | None) -> RunResult:
    """A run on so many phantom patients, from the folder where it is there."""
    asked = tomllib.loads(DEMO.read_text(encoding="utf-8"))
    start = {"random_start": True, "weights": None} if weights is None else {"weights": str(weights)}
    asked["network"] |= {**start, "architecture": "tiny" if tiny else "resnet50"}
    return phantom_run(
        folder,
        TrainingSettings.of("recommended", asked),
        run="run",
        title="benchmark",
        patients=patients,
        seed=7,
        processes=len(os.sched_getaffinity(0)),
        progress=Silent(),
    )


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
