"""From COHORT.csv to a table of features: each row has its features in the end, or the reason why it has not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from services.cohort.assembly import Assembly, Cohort
from services.cohort.image_pass import INDEX_FOLDER, ImagePass
from services.cohort.perturbed import with_perturbed
from services.cohort.protocols import Extraction, extraction_of
from services.cohort.rows import (
    MASK_COLUMNS,
    Progress,
    images_of,
    read_rows_with_files,
    silent,
)
from services.composition import claim
from services.settings import Settings
from services.trainer.cohort_file import CohortError, size_faults
from services.trainer.settings import TrainingSettings
from services.trainer.split import check_disjoint, held_out_of
from shared.fracture.csv_rows import RowFault
from shared.fracture.ids import Pseudonyms, sha256_hex
from shared.pipeline.store import Store


def cohort_table(
    csv: Path,
    settings: TrainingSettings,
    *,
    app: Settings,
    pseudonyms: Pseudonyms,
    store: Store,
    out: Path,
    extraction: Extraction | None = None,
    fitting: bool = True,
    progress: Progress = silent,
) -> Cohort:
    """The features of every row of a cohort file, and why some rows have none.

    `store`: where sweeps keep theirs too, or one of its own; `out`: a folder for what makes an interrupted run go on.
    Without `fitting` (external validation, with the bundle's `extraction`) rows are neither split nor repeated.
    CohortError with all faults of the file; SplitError where training and test rows are not apart after all.
    """
    chosen = extraction or extraction_of(settings)
    rows, judge = read_rows_with_files(csv, settings=settings, roi=chosen.crop.roi, fitting=fitting, progress=progress)
    by_masks = fitting and settings.repeatability.method in ("auto", "masks")
    images = tuple(images_of(rows, judge, columns=MASK_COLUMNS if by_masks else ("mask",)))
    claim(store, pseudonyms)
    run = ImagePass(app=app, store=store, extraction=chosen, pseudonyms=pseudonyms, folder=out / INDEX_FOLDER)
    found = run.extracted(images, base=csv.parent.resolve(), progress=progress)
    cohort = Assembly(rows=rows, images=images, found=found, run=run, progress=progress).cohort(
        fingerprint=sha256_hex(csv.read_bytes())
    )
    if not fitting:
        return cohort
    test = held_out_of(cohort.table, settings)
    check_disjoint(test, cohort.groups)
    if cohort.left_out:
        faults = size_faults(
            patient=[int(number) for number in cohort.table.patient],
            acute=[bool(acute) for acute in cohort.table.acute],
            test=[bool(out) for out in test],
            settings=settings,
        )
        if faults:
            why = Counter(one.group for one in cohort.left_out if one.column == "mask")
            told = [RowFault(0, "", f"{count} rows were left out: {reason}") for reason, count in why.items()]
            raise CohortError([*faults, *told])
    method = settings.repeatability.method
    if method == "perturbation" or (method == "auto" and not cohort.table.repeats):
        return with_perturbed(cohort, ~test, settings=settings, app=app, store=store, progress=progress)
    return cohort
