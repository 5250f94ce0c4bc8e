"""`bundle bridge`: may a bundle that was fitted on given masks score the segmenter's own?

A classifier sees other texture and shape in masks of another maker. So the same vertebrae are read under both: the
given masks of a cohort, and those that the segmenter makes of the same images. Every feature that some model of the
bundle reads has to come out nearly the same, ICC(2,1) >= .8 over at least 30 vertebrae. Only then is the maker written
into the bundle's `mask_sources`, with what was found in its model card.

OUT/automatic.csv, OUT/masks/   the cohort under automatic masks
OUT/bridge.json                 what was found
OUT/bundle                      the bundle with the new source, where it is admitted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from services.automatic_masks import masks_of, write_cohort
from services.cohort.assembly import Cohort
from services.cohort.rows import images_of, read_rows_with_files
from services.segmenter.service import Network, built_in_of
from services.trainer.bundle_writer import selected_columns
from services.trainer.cohort_table import CohortTable
from services.trainer.evaluation import probabilities
from services.trainer.results import LABELS, ModelName
from services.trainer.settings import TrainingSettings
from services.trainer.statistics.auc import auc_if_any
from services.trainer.statistics.icc import icc_agreement
from services.trainer.training import Progress
from services.training import Place, is_phantom, read_cohort
from shared.fracture.bundle import Bundle, load_bundle
from shared.fracture.bundle_files import write_folder
from shared.fracture.bundle_notes import admitted
from shared.pipeline.errors import FractureSweepError

ADMITTED_FROM: Final = 0.8
LEAST_CASES: Final = 30
REPORT: Final = "bridge.json"
BUNDLE: Final = "bundle"
COHORT: Final = "automatic.csv"


class FeatureAgreement(BaseModel):
    """ICC(2,1) of one feature under given and under automatic masks, with its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feature: str
    icc: float | None
    low: float | None
    high: float | None

    @property
    def agrees(self) -> bool:
        """Whether it reaches the limit."""
        return self.icc is not None and self.icc >= ADMITTED_FROM


class ModelAgreement(BaseModel):
    """One model under both masks: AUC each, and how far its probability moves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelName
    given_auc: float | None
    automatic_auc: float | None
    mean_difference: float
    largest_difference: float
    other_side: int
    """So many cases fall on the other side of the bundle's threshold."""


class Bridge(BaseModel):
    """What a bridge study found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phantom: bool
    source: str
    """Whose masks; as `Manifest.mask_sources` has it."""
    rows: int
    """Vertebrae of the cohort."""
    not_found: int
    """So many of them the segmenter did not find, or merged."""
    cases: int
    """So many were read under both."""
    mean_dice: float
    limit: float = ADMITTED_FROM
    least_cases: int = LEAST_CASES
    features: tuple[FeatureAgreement, ...]
    models: tuple[ModelAgreement, ...]

    @property
    def failing(self) -> tuple[FeatureAgreement, ...]:
        """The features that do not agree."""
        return tuple(one for one in self.features if not one.agrees)

    @property
    def admitted(self) -> bool:
        """Whether the bundle may score masks of the source."""
        return self.cases >= LEAST_CASES and not self.failing

    @property
    def words(self) -> str:
        """What was found, for the model card."""
        values = [one.icc for one in self.features if one.icc is not None]
        lines = [
            f"Bridged to masks of `{self.source}`: {self.cases} vertebrae of "
            f"{'PHANTOMS (no clinical meaning)' if self.phantom else 'a cohort'} read under given and under automatic "
            f"masks ({self.not_found} of {self.rows} were not found; mean Dice {self.mean_dice:.3f}). "
            f"ICC(2,1) of the {len(self.features)} features that the models read: {min(values, default=0.0):.3f} to "
            f"{max(values, default=0.0):.3f} (limit {self.limit:g}).",
            *(
                f"{LABELS[one.model]}: AUC {_shown(one.given_auc)} under given masks, {_shown(one.automatic_auc)} "
                f"under automatic ones; the probability moves by {one.mean_difference:.3f} in the mean, "
                f"{one.other_side} cases to the other side of the threshold."
                for one in self.models
            ),
        ]
        return "\n".join(f"- {line}" for line in lines)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def bridge_bundle(bundle: Bundle, cohort: Path, *, version: str, place: Place, progress: Progress) -> Bridge:
    """Study the bridge to the masks of the place's segmenter; OUT/bundle is written where they are admitted.

    FractureSweepError, CohortError.
    """
    if version == bundle.manifest.version:
        raise FractureSweepError(f"version {version} is the bundle's own: name another for the bridged one")
    maker = built_in_of(place.app.segmenter)
    if maker.note.source in bundle.manifest.mask_sources:
        raise FractureSweepError(f"the bundle knows masks of {maker.note.source} already: there is nothing to bridge")
    found = _studied(bundle, cohort, maker=maker, place=place, progress=progress)
    (place.out / REPORT).write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if found.admitted:
        files = admitted(bundle, found.source, found.words, version=version)
        write_folder(place.out / BUNDLE, files, check=partial(load_bundle, run_classifiers=True))
    return found


def _studied(bundle: Bundle, cohort: Path, *, maker: Network, place: Place, progress: Progress) -> Bridge:
    roi = bundle.manifest.crop.roi
    if roi != "body":
        raise FractureSweepError("the segmenter makes masks of bodies; the bundle was fitted on whole vertebrae")
    settings = TrainingSettings.of(bundle.manifest.preset, {"roi": roi})
    place.out.mkdir(parents=True, exist_ok=True)
    rows, judge = read_rows_with_files(cohort, settings=settings, roi=roi, fitting=False, progress=progress.step)
    images = list(images_of(rows, judge, columns=("mask",)))
    made = masks_of(
        images,
        base=cohort.parent,
        out=place.out,
        maker=maker,
        ingest=place.app.dicom_ingest,
        processes=place.processes,
        progress=progress,
    )
    if len(made) < LEAST_CASES:
        raise FractureSweepError(
            f"a bridge study needs {LEAST_CASES} vertebrae under both masks; of {len(rows)} rows the segmenter found "
            f"{len(made)}"
        )
    table_rows = [row for row in rows if row.line in made]
    automatic = place.out / COHORT
    write_cohort(automatic, table_rows, images=images, made=made, source=maker.note.source, repeated=())
    first, first_dtl = _read(bundle, cohort, place=place, progress=progress)
    second, second_dtl = _read(bundle, automatic, place=place, progress=progress)
    mine = _kept([row.line for row in rows], first)
    theirs = _kept([row.line for row in table_rows], second, first_line=2)
    both = [line for line in mine if line in theirs]
    dice = [made[line].dice for line in both]
    return _compared(
        bundle,
        (first.table, first_dtl, [mine.index(line) for line in both]),
        (second.table, second_dtl, [theirs.index(line) for line in both]),
        phantom=is_phantom(first.table.site),
        source=maker.note.source,
        rows=len(rows),
        not_found=len(rows) - len(made),
        mean_dice=round(float(np.mean(dice)), 4) if dice else 0.0,
    )


def _read(bundle: Bundle, csv: Path, *, place: Place, progress: Progress) -> tuple[Cohort, NDArray[np.float64]]:
    return read_cohort(bundle, csv, place=replace(place, work=place.work_folder / csv.stem), progress=progress)


def _kept(lines: Sequence[int], cohort: Cohort, *, first_line: int | None = None) -> list[int]:
    """The original lines of the rows of a table; a file that we wrote has a line a row from `first_line` on."""
    out = {one.line for one in cohort.left_out if one.column == "mask"}
    here = lines if first_line is None else range(first_line, first_line + len(lines))
    return [line for line, there in zip(lines, here, strict=True) if there not in out]


def _compared(
    bundle: Bundle,
    given: tuple[CohortTable, NDArray[np.float64], Sequence[int]],
    automatic: tuple[CohortTable, NDArray[np.float64], Sequence[int]],
    *,
    phantom: bool,
    source: str,
    rows: int,
    not_found: int,
    mean_dice: float,
) -> Bridge:
    readings = []
    for table, dtl, places in (given, automatic):
        columns = selected_columns(bundle.models, hcr_names=table.hcr_names, hcr=table.hcr, dtl=dtl)
        readings.append(np.stack(list(columns.values()), axis=1)[places])
    icc = icc_agreement(np.stack(readings, axis=1))
    running = bundle.running()
    one, two = (
        {name: values[places] for name, values in probabilities(running, table, dtl).items()}
        for table, dtl, places in (given, automatic)
    )
    acute = given[0].acute[np.array(given[2], dtype=np.int64)]
    models = []
    for name, before in one.items():
        after, moved = two[name], np.abs(two[name] - before)
        aucs = [auc_if_any(acute, values) for values in (before, after)]
        models.append(
            ModelAgreement(
                model=name,
                given_auc=None if aucs[0] is None else round(aucs[0].value, 4),
                automatic_auc=None if aucs[1] is None else round(aucs[1].value, 4),
                mean_difference=round(float(moved.mean()), 4),
                largest_difference=round(float(moved.max()), 4),
                other_side=int(((before >= bundle.manifest.threshold) != (after >= bundle.manifest.threshold)).sum()),
            )
        )
    return Bridge(
        phantom=phantom,
        source=source,
        rows=rows,
        not_found=not_found,
        cases=len(given[2]),
        mean_dice=mean_dice,
        features=tuple(
            FeatureAgreement(
                feature=name,
                **{
                    key: round(float(value), 4) if np.isfinite(value) else None
                    for key, value in (("icc", icc.value[n]), ("low", icc.low[n]), ("high", icc.high[n]))
                },
            )
            for n, name in enumerate(bundle.models.selected)
        ),
        models=tuple(models),
    )
