"""A small "archive" of phantom studies in DICOM, for the demonstration and the flow tests.

Of every eight studies one has no fracture (and so no mask), one has no age and sex, one two and one three fractures.
The truth lies in one file beside the studies, marked as phantom; the DICOM objects do not hold it.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path

from services.trainer.phantoms.cohort import archive_patient
from services.trainer.phantoms.dicom_writer import WrittenStudy, write_dicom
from services.trainer.phantoms.rendering import render

TRUTH_FILE = "truth.csv"

Progress = Callable[[int, int], None]


def write_archive(
    folder: Path,
    *,
    patients: int,
    seed: int,
    kappa: float = 0.85,
    rtstruct: bool = False,
    progress: Progress | None = None,
) -> list[WrittenStudy]:
    """Write `patients` studies into folders with meaningless names, and truth.csv; about two seconds a study.

    `progress(done, all)` is called after each study. ValueError for no patients at all.
    """
    if patients < 1:
        raise ValueError(f"an archive needs at least one patient, got {patients}")
    folder.mkdir(parents=True, exist_ok=True)
    studies, truth = [], []
    for index in range(patients):
        patient = archive_patient(seed=seed, index=index, kappa=kappa)
        rendered = render(patient)
        name = hashlib.sha256(f"study/{seed}/{index}".encode()).hexdigest()[:8].upper()
        study = write_dicom(patient, folder / name, volume=rendered.volume, masks=rendered.masks, rtstruct=rtstruct)
        studies.append(study)
        truth += [(study.study_uid, f.level, int(f.acute), "synthetic phantom") for f in patient.fractures]
        if progress is not None:
            progress(index + 1, patients)
    with (folder / TRUTH_FILE).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["study", "level", "acute", "origin"])
        writer.writerows(truth)
    return studies
