"""train, evaluate: from a cohort to a bundle, and a bundle judged on another cohort."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from services.commands.chosen import embedded_settings
from services.commands.terminal import bars, log_at, out_console
from shared.pipeline.errors import FractureSweepError

if TYPE_CHECKING:
    from services.trainer.results import Scored
    from services.trainer.settings import TrainingSettings
    from services.training import Place

EXTRA: Final = "pip install 'fracture-sweep[trainer,torch]'"
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store", help="The folder of a `run` whose store is used, so that what it extracted is not extracted again."
    ),
]
ProcessesOption = Annotated[int, typer.Option("--processes", min=0, help="Processes at once; 0 takes every core.")]


class Steps:
    """Progress bars, one a step, made when the step is first heard of."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def step(self, name: str, done: int, total: int) -> None:
        """So much of so much of a step is done."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)


def train(
    cohort: Annotated[Path | None, typer.Argument(help="COHORT.csv (docs/cohort.md).", metavar="COHORT.csv")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder; what was begun there goes on.")] = None,
    preset: Annotated[str, typer.Option("--preset", help="paper, or recommended.")] = "recommended",
    settings_file: Annotated[
        Path | None, typer.Option("--training", help="A TOML file of training settings, over the preset.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--change", help="One training setting, over all others: network.epochs=20", metavar="NAME=VALUE"),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="The bundle's name.")] = "acute-or-chronic",
    bundle_version: Annotated[str, typer.Option("--bundle-version", help="The bundle's version.")] = "1",
    kind: Annotated[
        str | None, typer.Option("--kind", help="RESEARCH (default) or SITE; a bundle of phantoms is always DEMO.")
    ] = None,
    notes: Annotated[Path | None, typer.Option("--notes", help="A text that goes into the model card.")] = None,
    store: StoreOption = None,
    processes: ProcessesOption = 0,
    template: Annotated[bool, typer.Option("--template", help="Print a COHORT.csv to begin with, and stop.")] = False,
) -> None:
    """Train on a cohort: from COHORT.csv to a bundle, with every table, figure and statistic in OUT."""
    from services.trainer.cohort_file import TEMPLATE

    if template:
        sys.stdout.write(TEMPLATE)
        return
    if cohort is None or out is None:
        raise FractureSweepError("say what to train on and where: fracture-sweep train COHORT.csv --out RUN")
    training = _training()
    settings = training_settings(preset, file=settings_file, changes=change or [])
    place = _place(training, out=out, store=store, processes=processes)
    with bars(time_left=True) as progress:
        trained = training.train_cohort(
            cohort,
            settings,
            place=place,
            naming=training.naming(kind, name=name, version=bundle_version, notes=_text(notes)),
            progress=Steps(progress),
        )
    result = trained.result
    out_console.print(_results(result.title, result.scores))
    for one in result.optimism:
        out_console.print(training.optimism_line(one), highlight=False)
    if result.random_network is not None:
        out_console.print(training.random_network_line(result.random_network), highlight=False)
    for warning in result.warnings:
        out_console.print(f"note: {warning}", highlight=False)
    out_console.print(f"bundle:  {trained.bundle.folder}  ({trained.bundle.bundle_id[:12]})", highlight=False)
    out_console.print(f"report:  {out / training.REPORT / 'report.html'}", highlight=False)


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="The folder or zip of a bundle.", metavar="BUNDLE")],
    cohort: Annotated[Path, typer.Argument(help="COHORT.csv (docs/cohort.md).", metavar="COHORT.csv")],
    out: Annotated[Path, typer.Option("--out", help="Where report, tables and numbers go.")],
    store: StoreOption = None,
    processes: ProcessesOption = 0,
) -> None:
    """Judge a bundle on a cohort that it was not trained on: external validation, nothing is fitted."""
    from shared.fracture.bundle import load_bundle

    training = _training()
    loaded = load_bundle(bundle)
    place = _place(training, out=out, store=store, processes=processes)
    with bars(time_left=True) as progress:
        found = training.evaluate_cohort(loaded, cohort, place=place, progress=Steps(progress))
    out_console.print(_results(found.title, found.scores))
    for warning in found.warnings:
        out_console.print(f"note: {warning}", highlight=False)
    out_console.print(f"report:  {out / training.REPORT / 'report.html'}", highlight=False)


def training_settings(preset: str, *, file: Path | None, changes: list[str]) -> TrainingSettings:
    """The preset, a file over it, and single changes over both; FractureSweepError with all faults."""
    from pydantic import ValidationError

    from services.trainer.settings import PRESETS, TrainingSettings

    if preset not in PRESETS:
        raise FractureSweepError(f"there is no preset {preset!r}: there are {', '.join(PRESETS)}")
    chosen: Literal["paper", "recommended"] = "paper" if preset == "paper" else "recommended"
    laid: dict[str, Any] = {}
    if file is not None:
        try:
            laid = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise FractureSweepError(f"{file} cannot be read as TOML: {error}") from None
    for text in changes:
        path, sign, value = text.partition("=")
        if not sign:
            raise FractureSweepError(f"--change takes NAME=VALUE, not {text!r}")
        _put(laid, path.strip().split("."), _value(value.strip()))
    try:
        return TrainingSettings.of(chosen, laid)
    except ValidationError as error:
        faults = [
            f"  {'.'.join(str(part) for part in one['loc']) or 'settings'}: {one['msg']}"
            for one in error.errors(include_url=False, include_input=False)
        ]
        raise FractureSweepError("\n".join([f"the training settings have {len(faults)} faults:", *faults])) from None


def _value(text: str) -> Any:
    """A value as TOML has it; what is none is taken as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(into: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        below = into.setdefault(part, {})
        if not isinstance(below, dict):
            raise FractureSweepError(f"{'.'.join(path)} lies below a setting that is no section")
        into = below
    into[path[-1]] = value


def _training() -> Any:
    """services.training; FractureSweepError where what it needs is not installed."""
    try:
        from services import training
    except ModuleNotFoundError as error:
        raise FractureSweepError(f"training needs {error.name}, which is not installed: {EXTRA}") from None
    return training


def _place(training: Any, *, out: Path, store: Path | None, processes: int) -> Place:
    from services.composition import pseudonyms_of, restricted
    from shared.pipeline.folder_store import FolderStore

    app = embedded_settings()
    log_at(app.log.level)
    if store is not None and not (store / "store").is_dir():
        raise FractureSweepError(f"{store} holds no store: give the folder that `fracture-sweep run` wrote to")
    kept = restricted(FolderStore((store or out) / "store"), app)
    kept.check()
    place: Place = training.Place(
        app=app,
        pseudonyms=pseudonyms_of(app),
        store=kept,
        out=out,
        processes=processes or len(os.sched_getaffinity(0)),
    )
    return place


def place_for(*, out: Path, processes: int) -> Place:
    """A place with a store of its own; FractureSweepError where training is not installed."""
    return _place(_training(), out=out, store=None, processes=processes)


def _text(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FractureSweepError(f"{path} cannot be read as text: {error}") from None


def _results(title: str, scores: tuple[Scored, ...]) -> Table:
    """AUC by model and part."""
    from services.trainer.results import LABELS

    table = Table("model", "part", "vertebrae", "AUC", "95 % interval", title=title)
    for one in scores:
        auc = one.auc()
        numbers = (
            ("–", "too few of a class") if auc is None else (f"{auc.value:.3f}", f"{auc.low:.3f} to {auc.high:.3f}")
        )
        table.add_row(LABELS[one.model], one.part.replace("_", "-"), str(len(one.acute)), *numbers)
    return table
