"""segment, mask-cohort, train-segmenter, evaluate-segmenter: masks of our own, and the network that makes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from services.commands.chosen import chosen
from services.commands.terminal import bars, log_at, out_console
from services.commands.training import EXTRA, Steps
from shared.pipeline.errors import FractureSweepError

if TYPE_CHECKING:
    from services.segmenter.settings import SegmenterSettings
    from services.trainer.segmentation.judging import Share


def segment(
    image: Annotated[Path, typer.Argument(help="A NIfTI file, or a folder with one DICOM series.")],
    out: Annotated[Path, typer.Option("--out", help="Where bodies.nii.gz, vertebrae.json and the pictures go.")],
    network: Annotated[
        Path | None, typer.Option("--network", help="Folder of a segmenter's network (default: segmenter.network).")
    ] = None,
) -> None:
    """Find the vertebral bodies of one CT, with levels, heights, grades and the gate's decision."""
    from services.segmentation_by_hand import segment_image

    settings = chosen.settings
    log_at(settings.log.level)
    asked = _with_network(settings.segmenter, network)
    found = segment_image(image, out, ingest=settings.dicom_ingest, settings=asked)
    table = Table("level", "anterior", "middle", "posterior", "height loss", "Genant", "gate")
    for one in found.vertebrae.findings:
        heights = [
            "–" if height is None else f"{height.value:.1f}"
            for height in (one.anterior_mm, one.middle_mm, one.posterior_mm)
        ]
        loss = "–" if one.loss is None else f"{one.loss.value:.0%} ({one.loss.low:.0%} to {one.loss.high:.0%})"
        grade = "–" if one.grade is None else f"{one.grade} {'' if one.shape == 'none' else one.shape}".strip()
        table.add_row(one.level, *heights, loss, grade, one.decision)
    out_console.print(table)
    for sentence in (*found.vertebrae.doubts, *found.vertebrae.warnings):
        out_console.print(f"note: {sentence}", highlight=False)
    for path in found.files:
        out_console.print(str(path), highlight=False)
    out_console.print(found.vertebrae.research_use, highlight=False)


def train_segmenter(
    label_maps: Annotated[
        Path,
        typer.Argument(
            help="A folder of NAME/segmentations/vertebrae_L1.nii.gz, … (TotalSegmentator's layout).",
            metavar="LABELMAPS",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The run's folder; what was begun there goes on.")],
    volumes: Annotated[int, typer.Option("--volumes", min=1, help="Synthetic CT volumes to train on.")] = 1600,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of one batch.")] = 4000,
    seed: Annotated[int, typer.Option("--seed", help="Of volumes and network.")] = 1,
    name: Annotated[str, typer.Option("--name", help="The network's name.")] = "built-in",
    network_version: Annotated[str, typer.Option("--network-version", help="The network's version.")] = "1",
    device: Annotated[str, typer.Option("--device", help="auto (CUDA where there is one), cpu, or cuda.")] = "auto",
    processes: Annotated[int, typer.Option("--processes", min=0, help="Processes at once; 0 takes every core.")] = 0,
) -> None:
    """Train the built-in segmenter on CT that is made from label maps: no patient's image goes into it."""
    chosen_device = _device(device)
    try:
        from services.trainer.segmentation.training import SegmenterTraining, train
    except ModuleNotFoundError as error:
        raise FractureSweepError(f"training needs more than is installed ({error.name}): {EXTRA}") from None
    with bars(time_left=True) as progress:
        card = train(
            label_maps,
            out,
            SegmenterTraining(volumes=volumes, steps=steps, seed=seed, name=name, version=network_version),
            device=chosen_device,
            processes=processes,
            progress=Steps(progress).step,
        )
    out_console.print(f"network: {out / 'network'}  ({card.network_sha256[:12]})", highlight=False)


def evaluate_segmenter(
    out: Annotated[Path, typer.Option("--out", help="Where the table, the figure and the summary go.")],
    network: Annotated[
        Path | None, typer.Option("--network", help="Folder of a segmenter's network (default: segmenter.network).")
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(
            "--label-map", help="NIfTI label map of whole vertebrae (VerSe's ids), not one of the training's."
        ),
    ] = None,
    stretches: Annotated[int, typer.Option("--stretches", min=0, help="So many stretches of the label map.")] = 40,
    spines: Annotated[int, typer.Option("--spines", min=0, help="So many phantoms of whole spines.")] = 12,
    seed: Annotated[int, typer.Option("--seed", help="Of fractures, tissues and scanners.")] = 101,
) -> None:
    """Judge network and gate on synthetic scans of known height loss: how many are found, how well heights are read."""
    settings = chosen.settings
    log_at(settings.log.level)
    try:
        from services.segmenter.service import built_in_of
        from services.segmenter_evaluation import Asked
        from services.segmenter_evaluation import evaluate_segmenter as judged
    except ModuleNotFoundError as error:
        raise FractureSweepError(f"judging needs more than is installed ({error.name}): {EXTRA}") from None
    asked = _with_network(settings.segmenter, network)
    built_in = built_in_of(asked).network
    with bars(time_left=True) as progress:
        found = judged(
            Asked(network=built_in, label_map=label_map, stretches=stretches, spines=spines, seed=seed),
            out,
            limits=asked.limits,
            progress=Steps(progress).step,
        )
    table = Table("spines", "slices", "bodies", "missed", "Dice", "sensitivity", "specificity", "20-30 % called")
    for one in found.summaries:
        table.add_row(
            one.origin,
            f"{one.slice_mm:g} mm",
            str(one.bodies),
            str(one.missed.count),
            "–" if one.dice is None else f"{one.dice:.3f}",
            *(_share(share) for share in (one.sensitivity, one.specificity, one.between)),
        )
    out_console.print(table)
    out_console.print(found.note, highlight=False)


def mask_cohort(
    cohort: Annotated[Path, typer.Argument(help="COHORT.csv with given masks (docs/cohort.md).", metavar="COHORT.csv")],
    out: Annotated[Path, typer.Option("--out", help="Where COHORT.csv and masks/ go; what is there stays.")],
    repeated: Annotated[
        int,
        typer.Option("--repeated", min=0, help="So many training patients keep their given mask, as another reader's."),
    ] = 30,
    processes: Annotated[int, typer.Option("--processes", min=0, help="Images at once; 0 takes every core.")] = 0,
) -> None:
    """Put the segmenter's masks into a cohort in the place of the given ones, to fit a bundle on them."""
    settings = chosen.settings
    log_at(settings.log.level)
    try:
        from services import automatic_masks
    except ModuleNotFoundError as error:
        raise FractureSweepError(f"cohorts need more than is installed ({error.name}): {EXTRA}") from None
    with bars(time_left=True) as progress:
        found = automatic_masks.mask_cohort(
            cohort,
            out,
            segmenter=settings.segmenter,
            ingest=settings.dicom_ingest,
            repeated=repeated,
            processes=processes or len(os.sched_getaffinity(0)),
            progress=Steps(progress),
        )
    out_console.print(
        f"{found.path}: {found.found} of {found.rows} vertebrae found, mean Dice {found.mean_dice:.3f} with the given "
        f"masks; made by {found.source}",
        highlight=False,
    )


def _with_network(settings: SegmenterSettings, network: Path | None) -> SegmenterSettings:
    return settings if network is None else settings.model_copy(update={"network": network})


def _share(share: Share) -> str:
    if share.value is None or share.low is None or share.high is None:
        return "–"
    return f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f}; {share.count}/{share.of})"


def _device(text: str) -> Literal["auto", "cpu", "cuda"]:
    match text:
        case "auto" | "cpu" | "cuda":
            return text
        case _:
            raise FractureSweepError(f"--device is auto, cpu or cuda, not {text!r}")
