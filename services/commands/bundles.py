"""`fracture-sweep bundle check | show | diff | pack | annotate | bridge`: what a bundle is, may it be used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.commands.terminal import EXIT_UNUSABLE
from shared.pipeline.errors import FractureSweepError

if TYPE_CHECKING:
    from shared.fracture.bundle import Bundle


def check(folder: Path) -> Bundle:
    """The bundle of a folder with every check that the services make at their start, its network's golden image too.

    BundleError with one sentence where one of them fails; FractureSweepError where onnxruntime is not installed.
    """
    from shared.fracture.bundle import load_bundle
    from shared.fracture.bundle_files import BundleError

    try:
        from services.deep_extractor.network import Network, check_golden
    except ModuleNotFoundError as error:
        raise FractureSweepError(
            f"a bundle is checked with {error.name}, which is not installed (pip install "
            "'fracture-sweep[deep-extractor]')"
        ) from None
    bundle = load_bundle(folder, run_classifiers=True)
    try:
        check_golden(Network(bundle.network_bytes(), device="cpu"), bundle.golden.image)
    except FractureSweepError as error:
        raise BundleError(str(error)) from error
    return bundle


def check_bundles(
    paths: Annotated[list[Path], typer.Argument(help="Folders or zips of bundles.", metavar="BUNDLE…")],
) -> None:
    """Load bundles as the services do, golden vectors and golden image computed; one line each.

    Exit code 2 where one is not to be used; the sentence that says why stands on standard error.
    """
    from shared.fracture.bundle_diff import summary
    from shared.fracture.bundle_files import BundleError

    refused = 0
    for path in paths:
        try:
            bundle = check(path)
        except BundleError as error:
            refused += 1
            sys.stderr.write(f"fracture-sweep: {path}: {error}\n")
        else:
            count = len(bundle.golden.vectors)
            vectors = f"{count} golden vector{' comes' if count == 1 else 's come'} out, and so does the golden image"
            typer.echo(f"{path}: {summary(bundle)}; {vectors}")
    if refused:
        raise typer.Exit(EXIT_UNUSABLE)


def show(path: Annotated[Path, typer.Argument(help="The folder or zip of a bundle.", metavar="BUNDLE")]) -> None:
    """What a bundle holds: protocols, models, thresholds, training, metrics, files."""
    from shared.fracture.bundle import load_bundle
    from shared.fracture.bundle_diff import description

    for line in description(load_bundle(path)):
        typer.echo(line)


def diff(
    old: Annotated[Path, typer.Argument(help="The older bundle, folder or zip.", metavar="OLD")],
    new: Annotated[Path, typer.Argument(help="The newer bundle, folder or zip.", metavar="NEW")],
) -> None:
    """What changed from one bundle to another, in words."""
    from shared.fracture.bundle import load_bundle
    from shared.fracture.bundle_diff import differences, summary

    bundles = load_bundle(old), load_bundle(new)
    for path, bundle in zip((old, new), bundles, strict=True):
        typer.echo(f"{path}: {summary(bundle)}")
    for line in differences(*bundles) or ("nothing changed: it is the same bundle",):
        typer.echo(line)


def pack(
    path: Annotated[Path, typer.Argument(help="The folder of a bundle.", metavar="BUNDLE")],
    file: Annotated[Path, typer.Argument(help="The zip to write.", metavar="FILE.zip")],
) -> None:
    """Write a bundle as one zip, to hand on; the same bundle gives the same bytes on every machine.

    Whatever takes the folder of a bundle takes its zip as well.
    """
    from shared.fracture.bundle import load_bundle
    from shared.fracture.ids import sha256_hex

    bundle = load_bundle(path)
    try:
        bundle.pack(file)
        typer.echo(f"{file}: {file.stat().st_size} bytes, SHA-256 {sha256_hex(file.read_bytes())}")
    except OSError as error:
        raise FractureSweepError(f"{file} cannot be written: {error.strerror}") from error


def annotate(
    path: Annotated[Path, typer.Argument(help="The folder or zip of a bundle.", metavar="BUNDLE")],
    notes: Annotated[Path, typer.Argument(help="A Markdown text: what is to be said of it.", metavar="NOTES.md")],
    out: Annotated[Path, typer.Argument(help="The folder of the new bundle.", metavar="NEW")],
    bundle_version: Annotated[str, typer.Option("--bundle-version", help="The new bundle's version.")],
) -> None:
    """Put notes into a bundle's model card: what an external validation found, or what its makers say of it later.

    Models, thresholds and features stay as they are; version and id are new.
    """
    from shared.fracture.bundle import load_bundle
    from shared.fracture.bundle_diff import differences
    from shared.fracture.bundle_files import write_folder
    from shared.fracture.bundle_notes import annotated

    bundle = load_bundle(path)
    if out.exists():
        raise FractureSweepError(f"{out} is there already: name a new folder")
    try:
        text = notes.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FractureSweepError(f"{notes} cannot be read as text: {error}") from None
    try:
        files = annotated(bundle, text, version=bundle_version)
        write_folder(out, files, check=load_bundle)
    except ValueError as error:
        raise FractureSweepError(str(error)) from error
    except OSError as error:
        raise FractureSweepError(f"{out} cannot be written: {error.strerror}") from error
    for line in differences(bundle, load_bundle(out)):
        typer.echo(line)


def bridge(
    path: Annotated[Path, typer.Argument(help="The folder or zip of a bundle.", metavar="BUNDLE")],
    cohort: Annotated[Path, typer.Argument(help="COHORT.csv with given masks (docs/cohort.md).", metavar="COHORT.csv")],
    out: Annotated[Path, typer.Option("--out", help="Where masks, numbers and the new bundle go.")],
    bundle_version: Annotated[str, typer.Option("--bundle-version", help="The new bundle's version.")],
    processes: Annotated[int, typer.Option("--processes", min=0, help="Processes at once; 0 takes every core.")] = 0,
) -> None:
    """May a bundle score the segmenter's own masks? The same vertebrae are read under both, and compared.

    Where every feature of its models agrees (ICC(2,1) of .8 and more over 30 vertebrae), OUT/bundle knows them.
    """
    from services.commands.terminal import bars, out_console
    from services.commands.training import EXTRA, Steps, place_for
    from shared.fracture.bundle import load_bundle

    try:
        from services.bridge import BUNDLE, bridge_bundle
    except ModuleNotFoundError as error:
        raise FractureSweepError(f"a bridge study needs {error.name}, which is not installed: {EXTRA}") from None
    with bars(time_left=True) as progress:
        found = bridge_bundle(
            load_bundle(path),
            cohort,
            version=bundle_version,
            place=place_for(out=out, processes=processes),
            progress=Steps(progress),
        )
    out_console.print(found.words, highlight=False)
    for one in found.failing:
        value = "undefined" if one.icc is None else f"{one.icc:.3f}"
        out_console.print(f"does not agree: {one.feature} (ICC {value})", highlight=False)
    if not found.admitted:
        out_console.print(f"not admitted: {path} does not score masks of {found.source}", highlight=False)
        raise typer.Exit(EXIT_UNUSABLE)
    out_console.print(f"bundle:  {out / BUNDLE}", highlight=False)
