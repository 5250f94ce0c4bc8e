"""`evaluate-segmenter`: the network and the gate on scans of known height loss. Synthetic; it says nothing of patients.

OUT/bodies.csv      a row a body and scan
OUT/summary.json    sensitivity, specificity, height errors by slice thickness
OUT/losses.png      measured against true loss, with its numbers as losses.csv
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import SimpleITK as sitk
from pydantic import BaseModel, ConfigDict

from services.segmenter.segmentation import NotSegmentable, label_of
from services.segmenter.series_spine import BuiltIn, network_in, segmented
from services.trainer.figures.catalogue import write_figures
from services.trainer.figures.run_figure import RunFigure
from services.trainer.segmentation.anatomy import Anatomy, anatomy_of_vertebrae
from services.trainer.segmentation.judging import (
    HEIGHTS,
    JudgedBody,
    Summary,
    draw_losses,
    judged_bodies,
    loss_data,
    summaries,
    true_heights,
)
from services.trainer.segmentation.known_loss import GRID_MM, SLICES_MM, KnownScan, scans_of_anatomy, scans_of_phantom
from shared.fracture.levels import VERSE
from shared.fracture.spine.gate import GateSettings
from shared.fracture.volume import mask_from_sitk
from shared.pipeline.errors import FractureSweepError

SUMMARY: Final = "summary.json"
BODIES: Final = "bodies.csv"
FIGURE: Final = "losses"

Progress = Callable[[str, int, int], None]


class SegmenterEvaluation(BaseModel):
    """What `summary.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    note: str = "SYNTHETIC scans: computer-made, no patients. They say nothing of how well real fractures are found."
    network: str
    network_sha256: str
    seed: int
    limits: GateSettings
    summaries: tuple[Summary, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be judged: `stretches` of the label map (VerSe ids, whole vertebrae), and phantoms of whole spines."""

    network: BuiltIn
    label_map: Path | None
    stretches: int
    spines: int
    seed: int
    slices_mm: Sequence[float] = SLICES_MM


def evaluate_segmenter(
    asked: Asked, out: Path, *, limits: GateSettings, progress: Progress = lambda name, done, total: None
) -> SegmenterEvaluation:
    """Judge a network; FractureSweepError where the label map cannot be used."""
    network = network_in(asked.network.folder, asked.network.threads)
    rows: list[JudgedBody] = []
    total = asked.stretches * (asked.label_map is not None) + asked.spines
    if not total:
        raise FractureSweepError("nothing to judge: give --label-map and --stretches, or --spines")
    for done, scans in enumerate(_sources(asked), start=1):
        rows += _judged(scans, network=asked.network, limits=limits)
        progress("spines judged", done, total)
    found = SegmenterEvaluation(
        network=f"{network.card.name} {network.card.version}",
        network_sha256=network.card.network_sha256,
        seed=asked.seed,
        limits=limits,
        summaries=summaries(rows),
    )
    _write(out, rows, found)
    return found


def _sources(asked: Asked) -> Iterator[Iterator[KnownScan]]:
    if asked.label_map is not None:
        anatomy = read_label_map(asked.label_map)
        for number in range(asked.stretches):
            yield scans_of_anatomy(anatomy, seed=asked.seed, number=number, slices_mm=asked.slices_mm)
    for number in range(asked.spines):
        yield scans_of_phantom(seed=asked.seed, number=number, slices_mm=asked.slices_mm)


def read_label_map(path: Path) -> Anatomy:
    """The anatomy of a label map of whole vertebrae with VerSe's ids."""
    try:
        labels = mask_from_sitk(sitk.ReadImage(str(path), sitk.sitkUInt8))
    except RuntimeError:
        raise FractureSweepError(
            f"{path} cannot be read as an image: give a NIfTI label map with VerSe's ids"
        ) from None
    return anatomy_of_vertebrae(labels, VERSE, name=path.name.split(".")[0], spacing_mm=GRID_MM)


def _judged(scans: Iterator[KnownScan], *, network: BuiltIn, limits: GateSettings) -> list[JudgedBody]:
    """The bodies of one spine at every thickness; true heights are read at the first, the finest."""
    rows: list[JudgedBody] = []
    heights: Mapping[int, tuple[float, float, float]] = {}
    for scan in scans:
        heights = heights or true_heights(scan)
        judge = partial(judged_bodies, scan, true_heights=heights)
        try:
            found, findings = segmented(scan.volume, network, limits=limits)
        except NotSegmentable:
            rows += judge(labels=None, findings=(), values={})
            continue
        values = {level: label_of(level) for level in found.named.levels}
        rows += judge(labels=found.labels, findings=findings, values=values)
    return rows


def _write(out: Path, rows: Sequence[JudgedBody], found: SegmenterEvaluation) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / BODIES).open("w", newline="", encoding="utf-8") as stream:
        plain = [name for name in JudgedBody.model_fields if not name.endswith("heights")]
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*plain, *(f"true_{name}_mm" for name in HEIGHTS), *(f"{name}_mm" for name in HEIGHTS)])
        for row in rows:
            nothing = ("", "", "")
            cells = [getattr(row, name) for name in plain]
            heights = [
                value if value == "" else round(float(value), 3)
                for value in (*(row.true_heights or nothing), *(row.heights or nothing))
            ]
            writer.writerow(["" if cell is None else cell for cell in cells] + heights)
    (out / SUMMARY).write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_figures(
        (
            RunFigure(
                name=FIGURE,
                title="Height loss as measured against true height loss",
                caption=found.note,
                section="performance",
                data=loss_data(rows),
                draw=draw_losses,
                phantom=True,
            ),
        ),
        out,
    )
