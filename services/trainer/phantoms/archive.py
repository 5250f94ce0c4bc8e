"""A small "archive" of phantom studies in DICOM, for the demonstration and the flow tests.

Of every eight studies one has no fracture (and so no mask), one has no age and sex, one two and one three fractures.
Scans of the whole spine come without masks, whatever is broken in them: the segmenter has to find it. The truth lies
in one file beside the studies, marked as phantom; the DICOM objects do not hold it.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path

from services.trainer.phantoms.cohort import archive_patient
from services.trainer.phantoms.dicom_writer import WrittenStudy, write_dicom
from services.trainer.phantoms.rendering import render
from services.trainer.phantoms.whole_spine import render_spine, spine_patient
from shared.fracture.volume import Mask

TRUTH_FILE = "truth.csv"
SPINES_FROM = 5000
"""Numbers of the patients whose whole spine is scanned: an archive of more patients keeps them."""

Progress = Callable[[int, int], None]


def write_archive(
    folder: Path,
    *,
    patients: int,
    seed: int,
    kappa: float = 0.85,
    rtstruct: bool = False,
    spines: int = 0,
    progress: Progress | None = None,
) -> list[WrittenStudy]:
    """Write `patients` studies with masks and `spines` scans of whole spines without any, and truth.csv.

    About two seconds a study, five a whole spine. Folders have meaningless names. `progress(done, all)` is called after
    each study. ValueError for no patients at all.
    """
    if patients < 0 or spines < 0 or patients + spines < 1:
        raise ValueError(f"an archive needs at least one patient, got {patients} and {spines} whole spines")
    folder.mkdir(parents=True, exist_ok=True)
    studies, truth = [], []
    for index in range(patients + spines):
        masks: tuple[Mask, ...] = ()
        if index < patients:
            patient = archive_patient(seed=seed, index=index, kappa=kappa)
            rendered = render(patient)
            volume, masks = rendered.volume, rendered.masks
        else:
            patient = spine_patient(seed=seed, index=SPINES_FROM + index - patients, kappa=kappa)
            volume = render_spine(patient).volume
        name = hashlib.sha256(f"study/{seed}/{patient.index}".encode()).hexdigest()[:8].upper()
        study = write_dicom(patient, folder / name, volume=volume, masks=masks, rtstruct=rtstruct)
        studies.append(study)
        truth += [(study.study_uid, f.level, int(f.acute), "synthetic phantom") for f in patient.fractures]
        if progress is not None:
            progress(index + 1, patients + spines)
    with (folder / TRUTH_FILE).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["study", "level", "acute", "origin"])
        writer.writerows(truth)
    return studies
