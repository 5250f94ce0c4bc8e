"""The command line: `fracture-sweep …`, or `python -m services …`. The only reader of the environment.

What goes wrong in a way that a user can mend is one clear sentence on standard error and exit code 2. Exit code 1
means that a run ended with something that somebody should look at (a ledger that does not add up, pending work).
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from services.commands import (
    bundles,
    dead_letters,
    following,
    making,
    phantoms,
    retention,
    running,
    segmenting,
    training,
)
from services.commands.chosen import SETTINGS_VARIABLE, chosen
from services.commands.terminal import EXIT_STOPPED, EXIT_UNUSABLE, out_console
from shared.pipeline.errors import FractureSweepError


class Stoppable(TyperGroup):
    """Commands that Ctrl-C ends with one sentence (typer itself would end them without a word)."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.stderr.write("fracture-sweep: stopped; the same command goes on from here\n")
            raise typer.Exit(EXIT_STOPPED) from None


app = typer.Typer(
    name="fracture-sweep",
    cls=Stoppable,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they print local variables, which may name a patient
    help="Reads CT studies, finds vertebral compression fractures, and says which are acute. Research use only.",
)

app.command()(running.run)
app.command()(running.service)
app.command()(running.submit)
app.command()(following.status)
app.command()(following.export)
app.command()(retention.gc)
app.command()(training.train)
app.command()(training.evaluate)
app.command()(segmenting.segment)
app.command("train-segmenter")(segmenting.train_segmenter)
app.command("evaluate-segmenter")(segmenting.evaluate_segmenter)
app.command("mask-cohort")(segmenting.mask_cohort)
app.command("keys")(making.make_keys)
app.command("secrets")(making.make_secrets)
app.command("prepare-store")(making.prepare_store)
app.command("settings")(making.show_settings)

letters_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What was given up, and why.")
letters_app.command("list")(dead_letters.list_letters)
letters_app.command("show")(dead_letters.show)
letters_app.command("replay")(dead_letters.replay_letters)
app.add_typer(letters_app, name="dead-letters")

bundle_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="What a bundle is, whether it is whole, and what changed."
)
bundle_app.command("check")(bundles.check_bundles)
bundle_app.command("show")(bundles.show)
bundle_app.command("diff")(bundles.diff)
bundle_app.command("pack")(bundles.pack)
bundle_app.command("annotate")(bundles.annotate)
bundle_app.command("bridge")(bundles.bridge)
app.add_typer(bundle_app, name="bundle")

phantoms_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Synthetic studies: an archive to sweep, or a cohort to train on.",
)
phantoms_app.command("archive")(phantoms.archive)
phantoms_app.command("cohort")(phantoms.cohort)
app.add_typer(phantoms_app, name="phantoms")


def _override(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise FractureSweepError(f"--set takes NAME=VALUE, not {text!r} (see `fracture-sweep settings`)")
    return name.strip(), value


def _version(asked: bool) -> None:
    if asked:
        try:
            known = version("fracture-sweep")
        except PackageNotFoundError:
            known = "(not installed)"
        out_console.print(f"fracture-sweep {known}")
        raise typer.Exit


@app.callback()
def options(
    file: Annotated[
        Path | None,
        typer.Option("--settings", help=f"A TOML file of settings (or {SETTINGS_VARIABLE}).", metavar="FILE"),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, over all others.", metavar="NAME=VALUE")
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", help="Say the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options that hold for every command."""
    from_environment = os.environ.get(SETTINGS_VARIABLE)
    chosen.file = file or (Path(from_environment) if from_environment else None)
    chosen.overrides = dict(_override(text) for text in override or [])


def _fail(sentence: str) -> int:
    sys.stderr.write(f"fracture-sweep: {sentence}\n")
    return EXIT_UNUSABLE


def main() -> None:
    """The entry point: every foreseeable error is one sentence and exit code 2."""
    from shared.fracture.bundle_files import BundleError
    from shared.pipeline.errors import Retry

    try:
        app()
    except (FractureSweepError, BundleError) as error:
        sys.exit(_fail(str(error)))
    except Retry as error:
        sys.exit(_fail(error.reason))
    except KeyboardInterrupt:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    main()
