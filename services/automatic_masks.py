"""The segmenter's masks in the place of a cohort's given ones: to bridge a bundle to them, or to fit one on them.

Which automatic body is which given one is told by what covers it (services.trainer.segmentation.matching); the
automatic mask keeps the given level.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from services.cohort.image_pass import read_image
from services.cohort.rows import CohortImage, images_of, read_rows_with_files
from services.dicom_ingest.settings import IngestSettings
from services.segmenter.segmentation import NotSegmentable, segment
from services.segmenter.series_spine import BuiltIn, network_in
from services.segmenter.service import Network, built_in_of
from services.segmenter.settings import SegmenterSettings
from services.trainer.cohort_file import CohortRow
from services.trainer.in_processes import run_all
from services.trainer.segmentation.matching import matches
from services.trainer.settings import TrainingSettings
from services.trainer.training import Progress
from shared.fracture.levels import VERSE
from shared.fracture.volume import Mask, to_sitk
from shared.pipeline.errors import FractureSweepError

MASKS: Final = "masks"
COHORT: Final = "COHORT.csv"
_VALUE: Final = {level: value for value, level in VERSE.items()}
_COLUMNS: Final = (
    "image", "mask", "labels", "roi", "levels", "study", "patient", "age", "sex", "acute", "mask3", "mask_source",
    "site", "split",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AutomaticMask:
    """The label map (VerSe's values) that holds a row's body, and the Dice of that body with the given one."""

    path: Path
    dice: float


@dataclass(frozen=True, kw_only=True)
class MaskedCohort:
    """What came of a cohort under automatic masks: its file, and how many rows found their body."""

    path: Path
    source: str
    rows: int
    found: int
    mean_dice: float


def mask_cohort(
    cohort: Path,
    out: Path,
    *,
    segmenter: SegmenterSettings,
    ingest: IngestSettings,
    repeated: int,
    processes: int,
    progress: Progress,
) -> MaskedCohort:
    """Write OUT/COHORT.csv: the same vertebrae under the segmenter's masks, those that it does not find left out.

    The given masks of the first `repeated` training patients stand in `mask3`, as another reader's: then a feature that
    comes out otherwise under them is not repeatable. CohortError, FractureSweepError.
    """
    settings = TrainingSettings.of("recommended", {"roi": "body"})
    maker = built_in_of(segmenter)
    out.mkdir(parents=True, exist_ok=True)
    rows, judge = read_rows_with_files(cohort, settings=settings, roi="body", fitting=False, progress=progress.step)
    images = list(images_of(rows, judge, columns=("mask",)))
    if repeated and not all(_may_repeat(image) for image in images):
        raise FractureSweepError(
            "the given masks cannot stand beside automatic ones as another reader's: they are no NIfTI maps of bodies "
            "with VerSe's values; say --repeated 0"
        )
    made = masks_of(
        images, base=cohort.parent, out=out, maker=maker, ingest=ingest, processes=processes, progress=progress
    )
    kept = [row for row in rows if row.line in made]
    if not kept:
        raise FractureSweepError(f"of {len(rows)} rows the segmenter found none")
    patients = list(dict.fromkeys(row.patient for row in kept if row.split != "test"))
    path = out / COHORT
    write_cohort(
        path, kept, images=images, made=made, source=maker.note.source, repeated=frozenset(patients[:repeated])
    )
    return MaskedCohort(
        path=path,
        source=maker.note.source,
        rows=len(rows),
        found=len(kept),
        mean_dice=float(np.mean([made[row.line].dice for row in kept])),
    )


def _may_repeat(image: CohortImage) -> bool:
    """Whether the given masks can be read by the columns that describe the automatic ones."""
    return len(image.pair.masks) == 1 and all(
        not mask.dicom and not mask.bodies and mask.roi == "body" and dict(mask.labels.levels) == dict(VERSE)
        for mask in image.pair.masks
    )


def masks_of(
    images: Sequence[CohortImage],
    *,
    base: Path,
    out: Path,
    maker: Network,
    ingest: IngestSettings,
    processes: int,
    progress: Progress,
) -> dict[int, AutomaticMask]:
    """By the line of each row whose body the segmenter found: its mask, below OUT/masks."""
    network = BuiltIn(folder=maker.network.folder, threads=1 if processes > 1 else maker.network.threads)
    (out / MASKS).mkdir(parents=True, exist_ok=True)
    jobs = [
        partial(
            _masked,
            image,
            base=base.resolve(),
            path=out / MASKS / f"{image.content[:12]}-{maker.note.sha256[:8]}.nii.gz",
            network=network,
            ingest=ingest,
        )
        for image in images
    ]
    found: dict[int, AutomaticMask] = {}
    for of_image in run_all(
        jobs, processes=processes, told=lambda done: progress.step("images segmented", done, len(images))
    ):
        found.update(of_image)
    return found


def _masked(
    image: CohortImage, *, base: Path, path: Path, network: BuiltIn, ingest: IngestSettings
) -> dict[int, AutomaticMask]:
    """The segmenter's mask of an image, each given body's level written over the automatic body that covers it."""
    _, series = read_image(image, base=base, limits=ingest)
    if series.volume is None or series.mask is None:
        return {}
    given = _bodies(series.mask.labels, series.mask.body)
    bodies = {  # a level that VerSe has no value for (S1) cannot stand in the map, and is scored by nobody
        row.line: given == series.mask.levels[row.level]
        for row in image.rows
        if row.level in series.mask.levels and row.level in _VALUE
    }
    if path.exists():
        found = matches(bodies, sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkUInt8)))
        return {line: AutomaticMask(path=path, dice=match.dice) for line, match in found.items() if not match.merged}
    try:
        labels = segment(series.volume, network_in(network.folder, network.threads)).labels.voxels
    except NotSegmentable:
        return {}
    found = {line: match for line, match in matches(bodies, labels).items() if not match.merged}
    made = np.zeros_like(labels)
    for row in image.rows:
        if row.line in found:
            made[labels == found[row.line].label] = _VALUE[row.level]
    aside = path.with_name(f".{path.name}")
    sitk.WriteImage(to_sitk(Mask(voxels=made, geometry=series.volume.geometry)), str(aside), useCompression=True)
    aside.replace(path)
    return {line: AutomaticMask(path=path, dice=match.dice) for line, match in found.items()}


def _bodies(labels: Mask, body: Mask | None) -> NDArray[np.uint8]:
    """A label map cut down to bodies, where a mask of them came along."""
    inside = labels.voxels if body is None else np.where(body.voxels != 0, labels.voxels, 0)
    return inside.astype(np.uint8)


def write_cohort(
    path: Path,
    rows: Sequence[CohortRow],
    *,
    images: Sequence[CohortImage],
    made: Mapping[int, AutomaticMask],
    source: str,
    repeated: Collection[str],
) -> None:
    """A cohort file of rows under automatic masks, in their order; the given mask of `repeated` patients as `mask3`."""
    image_of = {row.line: image for image in images for row in image.rows}

    def shown(file: Path) -> str:
        return os.path.relpath(file.resolve(), path.parent.resolve())

    aside = path.with_suffix(".part")
    with aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            pair = image_of[row.line].pair
            given = pair.masks[0].masks if row.patient in repeated else ()
            writer.writerow(
                {
                    "image": shown(pair.image),
                    "mask": shown(made[row.line].path),
                    "labels": "verse",
                    "roi": "body",
                    "levels": row.level,
                    "study": row.study,
                    "patient": row.patient,
                    "age": row.age,
                    "sex": row.sex,
                    "acute": int(row.acute),
                    "mask3": ";".join(map(shown, given)),
                    "mask_source": source,
                    "site": row.site,
                    "split": row.split,
                }
            )
    aside.replace(path)
