"""run, service, submit: studies go in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from services.commands.chosen import chosen, embedded_settings
from services.commands.following import print_exported
from services.commands.terminal import Bars, bars, log_at, out_console
from shared.fracture.ids import short
from shared.pipeline.errors import FractureSweepError


def run(
    path: Annotated[Path, typer.Argument(help="A folder of DICOM (any nesting, any file names), or a CSV of pairs.")],
    out: Annotated[Path, typer.Option("--out", help="Where results go: worklist, reports, and the store.")],
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="The sweep's name (default: the input's absolute path).")
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", help="Label map of all masks of a CSV: totalseg, verse, or a JSON file.")
    ] = None,
    roi: Annotated[str | None, typer.Option("--roi", help="What all masks of a CSV hold: body or vertebra.")] = None,
    named: Annotated[
        bool, typer.Option("--named", help="Also write reports with patient names, under OUT/named.")
    ] = False,
) -> None:
    """Score a folder or a CSV of pairs on this machine, without any server."""
    from services.composition import bundle_of, pseudonyms_of, restricted
    from services.embedded import run as run_embedded
    from services.report_generator.export import export_sweep
    from services.sources import source_of
    from shared.pipeline.folder_store import FolderStore

    if not path.exists():
        raise FractureSweepError(f"{path} is not there: give a folder of DICOM or a CSV of pairs")
    if named:
        chosen.overrides["report_generator.named_reports"] = "true"
    settings = embedded_settings()
    log_at(settings.log.level)
    bundle = bundle_of(settings)
    pseudonyms = pseudonyms_of(settings)
    store = restricted(FolderStore(out / "store"), settings)
    store.check()
    with bars() as progress:
        looking = progress.add_task("files looked at", total=None)
        source = source_of(
            path,
            settings=settings,
            default_labels=labels,
            default_roi=roi,
            progress=lambda done, total: progress.update(looking, completed=done, total=total or None),
        )
        ran = run_embedded(
            source,
            name=sweep or str(path.resolve()),
            settings=settings,
            store=store,
            pseudonyms=pseudonyms,
            bundle=bundle,
            progress=Bars(progress),
        )
    exported = export_sweep(store, ran.sweep_id, out, named=named)
    note = "" if ran.computed else "nothing was computed: all of it was there already"
    print_exported(exported, ran.ledger, out, note=note)


def service(name: Annotated[str, typer.Argument(help="dicom-ingest, segmenter, resampler, … or recorder.")]) -> None:
    """Run one worker of the distributed system (RabbitMQ and S3) until SIGTERM."""
    from services.distributed import run_service
    from shared.pipeline.logs import configure

    settings = chosen.settings
    configure(level=settings.log.level, stream=sys.stderr, service=name, pretty=False)
    raise typer.Exit(run_service(name, settings))


def submit(
    path: Annotated[Path, typer.Argument(help="A folder of DICOM, or a CSV of pairs.")],
    sweep: Annotated[
        str | None, typer.Option("--sweep", help="The sweep's name (default: the input's absolute path).")
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", help="As for run.")] = None,
    roi: Annotated[str | None, typer.Option("--roi", help="As for run.")] = None,
) -> None:
    """Upload a folder or a CSV of pairs to the distributed system's inbox. Safe to repeat after an interruption."""
    from services.composition import pseudonyms_of
    from services.dicom_ingest.inbox import submit as submit_path
    from services.distributed import open_store
    from services.sources import source_of

    if not path.exists():
        raise FractureSweepError(f"{path} is not there: give a folder of DICOM or a CSV of pairs")
    settings = chosen.settings
    pseudonyms = pseudonyms_of(settings)
    if not path.is_dir():
        source_of(path, settings=settings, default_labels=labels, default_roi=roi)  # all faults now, not at night
    store = open_store(settings)
    name = sweep or str(path.resolve())
    with bars(of_bytes=True) as progress:
        read = progress.add_task("read", total=None)
        sent = progress.add_task("uploaded", total=None)
        submitted = submit_path(
            path,
            name=name,
            store=store,
            pseudonyms=pseudonyms,
            default_labels=labels,
            default_roi=roi,
            min_free_bytes=settings.pressure.min_free_bytes,
            hashing=lambda done, total: progress.update(read, completed=done, total=total),
            progress=lambda done, total: progress.update(sent, completed=done, total=total),
        )
    there = submitted.files - submitted.uploaded
    out_console.print(
        f"{submitted.uploaded} files uploaded" + (f", {there} were there already" if there else ""), highlight=False
    )
    sweep_id = short(pseudonyms.sweep_id(name))
    out_console.print(f"submitted as sweep {sweep_id}: fracture-sweep status --watch {sweep_id} shows how it goes")
