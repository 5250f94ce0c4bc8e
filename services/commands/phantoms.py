"""phantoms archive, phantoms cohort: synthetic studies, to sweep or to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.commands.terminal import bars, out_console
from shared.pipeline.errors import FractureSweepError


def archive(
    folder: Annotated[Path, typer.Argument(help="Where the studies go.")],
    patients: Annotated[int, typer.Option("--patients", min=0, help="How many patients.")] = 8,
    spines: Annotated[
        int, typer.Option("--spines", min=0, help="How many scans of a whole spine, without masks, beside them.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same studies.")] = 1,
    kappa: Annotated[
        float, typer.Option("--kappa", min=0.0, max=1.0, help="How different acute and chronic phantoms are.")
    ] = 0.85,
) -> None:
    """Make phantom studies in DICOM (CT series + DICOM SEG): synthetic, for demonstration and tests."""
    from services.trainer.phantoms.archive import write_archive

    if patients + spines < 1:
        raise FractureSweepError("an archive needs at least one patient: give --patients or --spines")

    with bars() as progress:
        task = progress.add_task("phantoms made", total=patients + spines)
        write_archive(
            folder,
            patients=patients,
            spines=spines,
            seed=seed,
            kappa=kappa,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    out_console.print(f"{patients + spines} phantom patients in {folder} (synthetic, no clinical meaning)")


def cohort(
    folder: Annotated[Path, typer.Argument(help="Where the cohort goes; one that was begun there is gone on with.")],
    patients: Annotated[int, typer.Option("--patients", min=1, help="How many patients.")] = 365,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same cohort.")] = 7,
    kappa: Annotated[
        float, typer.Option("--kappa", min=0.0, max=1.0, help="How different acute and chronic phantoms are.")
    ] = 0.85,
    readers: Annotated[
        int, typer.Option("--readers", min=0, help="So many training patients have masks of three readers.")
    ] = 30,
    nifti: Annotated[bool, typer.Option("--nifti", help="NIfTI in the place of DICOM; quicker.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=0, help="Patients at once; 0 takes every core.")] = 0,
) -> None:
    """Make a phantom cohort with its COHORT.csv, to train on: synthetic, no clinical meaning."""
    from services.trainer.phantoms.training_cohort import PhantomCohort, write_training_cohort

    asked = PhantomCohort(patients=patients, seed=seed, kappa=kappa, readers=readers, nifti=nifti)
    with bars(time_left=True) as progress:
        task = progress.add_task("phantoms made", total=patients)
        path = write_training_cohort(
            folder,
            asked,
            processes=processes,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    out_console.print(f"{patients} phantom patients, table {path} (synthetic, no clinical meaning)")
