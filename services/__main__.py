"""The command line: `fracture-sweep …`, or `python -m services …`. The only reader of the environment.

What goes wrong in a way that a user can mend is one clear sentence on standard error and exit code 2. Exit code 1
means that a run ended with something that somebody should look at (a ledger that does not add up, pending work).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from services.settings import Settings
from shared.fracture.ids import short
from shared.fracture.ledger import Ledger
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.settings import Loaded, describe, load_settings

if TYPE_CHECKING:
    from shared.pipeline.broker import Broker
    from shared.records.dead_letters import Filter, Standing

EXIT_UNUSABLE = 2
EXIT_LOOK = 1
EXIT_STOPPED = 130
SETTINGS_VARIABLE = "FRACTURE_SWEEP_SETTINGS"


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
dead_letters_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What was given up, and why.")
app.add_typer(dead_letters_app, name="dead-letters")
phantoms_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Synthetic studies: an archive to sweep, or a cohort to train on.",
)
app.add_typer(phantoms_app, name="phantoms")

out_console = Console(soft_wrap=True)
err_console = Console(stderr=True, soft_wrap=True)


class Chosen:
    """What the options before the command chose."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.overrides: dict[str, str] = {}
        self._loaded: Loaded[Settings] | None = None

    def loaded(self, **more: str) -> Loaded[Settings]:
        """The settings that hold; `more` are overrides of a command's own options (`a__b` for a.b)."""
        if self._loaded is None or more:
            overrides = {**self.overrides, **{name.replace("__", "."): value for name, value in more.items()}}
            self._loaded = load_settings(
                Settings,
                environ=os.environ,
                file=self.file,
                overrides=overrides,
                ignored_variables=(SETTINGS_VARIABLE,),
            )
        return self._loaded

    def forget(self) -> None:
        """Load anew: an override was added."""
        self._loaded = None

    @property
    def settings(self) -> Settings:
        """The values."""
        return self.loaded().values


chosen = Chosen()


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


# running ------------------------------------------------------------------------------------------------------------
class Bars:
    """Progress on a terminal: studies read, and cases that have an end."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._studies = progress.add_task("studies read", total=None)
        self._cases = progress.add_task("cases done", total=None)

    def studies(self, done: int, total: int) -> None:
        """So many studies of so many were read."""
        self._progress.update(self._studies, completed=done, total=total)

    def cases(self, done: int, found: int) -> None:
        """So many cases have an end, of so many found until now."""
        self._progress.update(self._cases, completed=done, total=found or None)


class StepBars:
    """Progress on a terminal of a job of several steps: a bar each, from when it is first told of."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """So many of so many are done of a step."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)


@contextmanager
def bars(*, of_bytes: bool = False, time_left: bool = False) -> Iterator[Progress]:
    """Progress bars on standard error (nothing where it is no terminal)."""
    measures: tuple[ProgressColumn, ...] = (
        (DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
        if of_bytes
        else (MofNCompleteColumn(), TimeElapsedColumn(), *((TimeRemainingColumn(),) if time_left else ()))
    )
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<14}"),
        BarColumn(),
        *measures,
        console=err_console,
        transient=True,
        disable=not err_console.is_terminal,
    ) as progress:
        yield progress


def _log(level: str) -> None:
    from shared.pipeline.logs import configure

    configure(level=level, stream=sys.stderr, service="fracture-sweep", pretty=sys.stderr.isatty())


def _embedded_settings() -> Settings:
    """The settings of a run of the user's own: keys are made at the first run where none are named."""
    from services.embedded import default_key_folder
    from shared.pipeline.secrets_files import make_secret_file

    settings = chosen.settings
    folder = default_key_folder(os.environ)
    more: dict[str, str] = {}
    if settings.secrets.pseudonym_key is None:
        more["secrets__pseudonym_key"] = make_secret_file(folder / "pseudonym.key").hex()
    if settings.secrets.encryption_key is None:
        more["secrets__encryption_key"] = make_secret_file(folder / "encryption.key").hex()
    return chosen.loaded(**more).values if more else settings


@app.command()
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
    settings = _embedded_settings()
    _log("WARNING" if settings.log.level == "INFO" else settings.log.level)
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
    _print_exported(exported, ran.ledger, out, note=note)


@app.command()
def service(name: Annotated[str, typer.Argument(help="dicom-ingest, segmenter, resampler, … or recorder.")]) -> None:
    """Run one worker of the distributed system (RabbitMQ and S3) until SIGTERM."""
    from services.distributed import run_service
    from shared.pipeline.logs import configure

    settings = chosen.settings
    configure(level=settings.log.level, stream=sys.stderr, service=name, pretty=False)
    raise typer.Exit(run_service(name, settings))


@app.command()
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


# looking ------------------------------------------------------------------------------------------------------------
def _store(out: Path | None) -> Any:
    """The store of an embedded run's folder, or the distributed system's."""
    if out is None:
        from services.distributed import open_store

        return open_store(chosen.settings)
    from services.composition import restricted
    from shared.pipeline.folder_store import FolderStore

    if not (out / "store").is_dir():
        raise FractureSweepError(f"{out} holds no store: give the folder that `fracture-sweep run` wrote to")
    return restricted(FolderStore(out / "store"), _embedded_settings())


OutOption = Annotated[
    Path | None, typer.Option("--out", help="The folder of a `run` (default: the distributed system's store).")
]


def _sweeps_called(store: Any, wanted: str, out: Path | None) -> list[str]:
    """The sweeps whose id begins like this; where there is none, the one of this name (or of this path)."""
    from services.composition import pseudonyms_of
    from shared.records.ledger import sweeps

    known = list(sweeps(store))
    found = [sweep_id for sweep_id in known if sweep_id.startswith(wanted)]
    if found:
        return found
    settings = chosen.settings if out is None else _embedded_settings()
    if settings.secrets.pseudonym_key is None:
        if not re.fullmatch("[0-9a-f]{4,64}", wanted):
            raise FractureSweepError(
                f"{wanted!r} is no sweep's id, and a name is found with the site's pseudonym key alone: give the id "
                "(submit prints it), or name the key in FRACTURE_SWEEP_SECRETS_PSEUDONYM_KEY_FILE"
            )
        return []
    pseudonyms = pseudonyms_of(settings)
    names = {pseudonyms.sweep_id(wanted), pseudonyms.sweep_id(str(Path(wanted).resolve()))}
    return [sweep_id for sweep_id in known if sweep_id in names]


def _one_sweep(store: Any, wanted: str | None, out: Path | None = None) -> str | None:
    """The sweep that is meant (None given: the newest), or None where there is none such."""
    from shared.records.ledger import newest_sweep

    if wanted is None:
        return newest_sweep(store)
    found = _sweeps_called(store, wanted, out)
    if len(found) > 1:
        raise FractureSweepError(f"{len(found)} sweeps begin with {wanted}: give more of the id")
    return found[0] if found else None


@app.command()
def status(
    sweep: Annotated[
        str | None, typer.Argument(help="A sweep's id, its beginning, or its name (default: all).")
    ] = None,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow one sweep (default: the newest) until nothing of it is pending.")
    ] = False,
) -> None:
    """The ledgers of files, series and cases: what was found, and what became of each."""
    from shared.records.ledger import sweep_ledger, sweeps

    if watch:
        if as_json:
            raise FractureSweepError("--watch and --json do not go together: ask for --json again and again instead")
        _watch(sweep, out)
        return
    store = _store(out)
    found = list(sweeps(store)) if sweep is None else _sweeps_called(store, sweep, out)
    if not found:
        raise FractureSweepError("there is no such sweep" if sweep else "there is no sweep yet")
    ledgers = [ledger for ledger in (sweep_ledger(store, sweep_id) for sweep_id in found) if ledger is not None]
    if as_json:
        sys.stdout.write(json.dumps([ledger.as_json() for ledger in ledgers], indent=2) + "\n")
    else:
        for ledger in ledgers:
            _print_ledger(ledger)
    if not all(ledger.exact for ledger in ledgers):
        raise typer.Exit(EXIT_LOOK)


def _watch(wanted: str | None, out: Path | None) -> None:
    """Follow a sweep until nothing of it is pending; Ctrl-C leaves the sweep alone."""
    from rich.live import Live

    from services.sweep_watch import Bars as WatchBars
    from services.sweep_watch import Lines, Shown, watch
    from shared.records.ledger import FollowedSweep, sweep_ledger

    store = _store(out)
    followed: dict[str, FollowedSweep] = {}

    def look() -> Ledger | None:
        if not followed:
            sweep_id = _one_sweep(store, wanted, out)
            if sweep_id is None:
                return None
            followed[sweep_id] = FollowedSweep(store, sweep_id)
        ((sweep_id, sweep),) = followed.items()
        ledger = sweep.ledger()
        # what looks finished is read once more in full
        return sweep_ledger(store, sweep_id) if ledger is not None and not ledger.pending else ledger

    def finished(ledger: Ledger) -> bool:
        return not ledger.pending and ledger.files.found > 0 and not _still_in_inbox(store, ledger.sweep_id, out)

    def follow(shown: Shown) -> Ledger:
        return watch(look, finished=finished, shown=shown)

    try:
        if out_console.is_terminal:
            with Live(console=out_console, transient=True, auto_refresh=False) as live:
                ledger = follow(WatchBars(live))
        else:
            ledger = follow(Lines(lambda line: print(line, flush=True)))
    except KeyboardInterrupt:
        sys.stderr.write("fracture-sweep: left; the sweep goes on, and the same command watches it again\n")
        raise typer.Exit(EXIT_STOPPED) from None
    _print_ledger(ledger)
    if not ledger.exact:
        raise typer.Exit(EXIT_LOOK)


def _still_in_inbox(store: Any, sweep_id: str, out: Path | None) -> bool:
    """Whether ingest is not through with a sweep's submission (False where we have no keys to look)."""
    from services.composition import pseudonyms_of
    from services.dicom_ingest.inbox import waiting

    secrets = chosen.settings.secrets
    if out is not None or secrets.pseudonym_key is None or secrets.encryption_key is None:
        return False
    pseudonyms = pseudonyms_of(chosen.settings)
    return any(pseudonyms.sweep_id(submission.name) == sweep_id for submission in waiting(store))


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="Where worklist and reports go.")],
    sweep: Annotated[
        str | None, typer.Argument(help="A sweep's id, its beginning, or its name (default: the newest).")
    ] = None,
    named: Annotated[
        bool, typer.Option("--named", help="Also the reports with patient names, under OUT/named.")
    ] = False,
) -> None:
    """Write a sweep's worklist and reports out of the distributed system's store, as `run` leaves them."""
    from services.report_generator.export import export_sweep
    from shared.records.ledger import sweep_ledger

    store = _store(None)
    sweep_id = _one_sweep(store, sweep)
    if sweep_id is None:
        raise FractureSweepError(
            "there is no such sweep: see fracture-sweep status" if sweep else "there is no sweep yet"
        )
    exported = export_sweep(store, sweep_id, out, named=named)
    ledger = sweep_ledger(store, sweep_id)
    if ledger is None:
        raise FractureSweepError("the sweep is gone from the store: see fracture-sweep status")
    _print_exported(exported, ledger, out)


def _print_exported(exported: Any, ledger: Ledger, out: Path, *, note: str = "") -> None:
    """Worklist, ledger and where the files lie; exit code 1 where somebody should look."""
    _print_worklist(json.loads(exported.worklist_json.read_text(encoding="utf-8")))
    _print_ledger(ledger)
    if note:
        out_console.print(note)
    out_console.print(f"worklist: {exported.worklist_html}")
    out_console.print(f"reports:  {out / 'reports'}  ({len(exported.reports)} studies)")
    if not ledger.exact or ledger.pending:
        raise typer.Exit(EXIT_LOOK)


def _print_ledger(ledger: Ledger) -> None:
    table = Table(title=f"sweep {short(ledger.sweep_id)}: {ledger.studies} studies, {ledger.reports} reports")
    table.add_column("ledger")
    table.add_column("state")
    table.add_column("count", justify="right")
    table.add_column("leading reasons", overflow="fold")
    ignored = "; ".join(f"{count} × {reason}" for reason, count in ledger.files.ignored.items())
    table.add_row("files", "found", str(ledger.files.found), "")
    table.add_row("", "part of a series", str(ledger.files.in_series), "")
    table.add_row("", "ignored", str(sum(ledger.files.ignored.values())), ignored)
    for name, tally in (("series", ledger.series), ("cases", ledger.cases)):
        table.add_section()
        table.add_row(name, "found", str(tally.found), "")
        for state, count in tally.by_state.items():
            why = "; ".join(f"{number} × {reason}" for reason, number in tally.reasons.get(state, {}).items())
            if count or state in ("pending", "reported", "planned"):
                table.add_row("", state, str(count), why)
    out_console.print(table)
    if not ledger.exact:
        err_console.print("the ledger does not add up: please report this", style="bold red")


def _print_worklist(worklist: dict[str, Any]) -> None:
    bases = sorted({row["fracture_basis"] for row in worklist["rows"]})
    table = Table(title="worklist (acute first)", caption="; ".join(bases) or None)
    for column in ("study", "level", "decision", "acute", "HCR", "DTL", "nomogram"):
        right = column in ("acute", "HCR", "DTL", "nomogram")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    for row in worklist["rows"]:
        numbers = ("probability", "hcr_probability", "dtl_probability", "nomogram_probability")
        table.add_row(
            short(row["study_id"]),
            row["level"],
            row["predicted"],
            *(shown(row[name]) for name in numbers),
        )
    out_console.print(table)
    for line in (worklist["demonstration"], worklist["research_use"]):
        if line:
            out_console.print(line, style="bold")


# dead letters -------------------------------------------------------------------------------------------------------
QueueOption = Annotated[str | None, typer.Option("--queue", help="Of this queue alone.")]
KindOption = Annotated[str | None, typer.Option("--kind", help="Of this kind alone (see docs/runbook.md).")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Whose reason holds this text.")]
StudyOption = Annotated[str | None, typer.Option("--study", help="About the study whose id begins so.")]
CaseOption = Annotated[str | None, typer.Option("--case", help="About the case whose id begins so.")]
SinceOption = Annotated[
    str | None, typer.Option("--since", help="Recorded since then: an age (90m, 12h, 7d) or a time in UTC.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]


def _plain(text: str) -> str:
    """A text that may come from anywhere, without what would steer a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _filter(
    *,
    queue: str | None,
    kind: str | None,
    reason: str | None,
    study: str | None,
    case: str | None,
    since: str | None,
) -> Filter:
    from shared.fracture.topology import QUEUES
    from shared.pipeline.failures import KINDS
    from shared.records.dead_letters import Filter, moment

    if queue is not None and queue not in QUEUES:
        raise FractureSweepError(f"no queue is called {queue!r}: there are {', '.join(QUEUES)}")
    if kind is not None and kind not in KINDS:
        raise FractureSweepError(f"there is no kind {kind!r} of dead letters: there are {', '.join(KINDS)}")
    now = datetime.now(UTC)
    return Filter(
        queue=queue,
        kind=kind,
        reason=reason,
        study=study,
        case=case,
        since=None if since is None else moment(since, now=now),
    )


@dead_letters_app.command("list")
def dead_letters_list(
    out: OutOption = None,
    queue: QueueOption = None,
    kind: KindOption = None,
    reason: ReasonOption = None,
    study: StudyOption = None,
    case: CaseOption = None,
    since: SinceOption = None,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", help="That stands so alone: open, replayed, 'done since', … May be given twice."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """All dead letters, the oldest first: queue, kind, reason, and where each stands now."""
    from shared.records.dead_letters import STATES, Survey

    wanted = _filter(queue=queue, kind=kind, reason=reason, study=study, case=case, since=since)
    unknown = [one for one in state or () if one not in STATES]
    if unknown:
        raise FractureSweepError(f"there is no state {unknown[0]!r}: there are {', '.join(STATES)}")
    states = [one for one in STATES if not state or one in state]
    found = Survey(_store(out)).matching(wanted, states=states)
    if as_json:
        keep = [{**one.as_json(), "traceback": None, "envelope": None} for one in found]
        lean = [{name: value for name, value in one.items() if value is not None} for one in keep]
        sys.stdout.write(json.dumps(lean, indent=2) + "\n")
        return
    if not found:
        out_console.print("no dead letters" + (" that are meant so" if wanted.chooses or state else ""))
        return
    table = Table("id", "recorded", "queue", "kind", "attempts", "state", "replays", "reason")
    for one in found:
        letter = one.letter
        table.add_row(
            short(letter.dead_letter_id),
            f"{letter.recorded_at:%Y-%m-%d %H:%M:%SZ}",
            Text(_plain(letter.queue)),
            Text(_plain(letter.kind)),
            str(letter.attempts),
            one.state,
            str(len(one.replays)),
            Text(_plain(letter.reason)),
        )
    out_console.print(table)
    out_console.print(_counted(one.state for one in found))


def _counted(states: Iterable[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in Counter(states).items())


@dead_letters_app.command("show")
def dead_letters_show(
    letter_id: Annotated[str, typer.Argument(help="The id or its beginning.")],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """One dead letter: reason, what to do, traceback, parents, attempts, earlier replays, and the message itself."""
    from shared.records.dead_letters import Survey

    found = Survey(_store(out)).find(letter_id)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=2) + "\n")
        return

    def line(name: str, value: object) -> None:
        out_console.print(f"{name:>15}: {_plain(str(value))}", markup=False, highlight=False)

    letter = found.letter
    for name in ("dead_letter_id", "queue", "service", "kind", "reason"):
        line(name, getattr(letter, name))
    line("state", found.state)
    line("what to do", found.what_to_do)
    for name, value in found.ids.items():
        line(name, value)
    for name in ("message_type", "message_id", "attempts", "delivery_count"):
        line(name, getattr(letter, name))
    line("recorded_at", letter.recorded_at.isoformat())
    line("parents", ", ".join(letter.parents) or "none")
    line("replays", len(found.replays) or "none")
    for one in found.replays:
        line("replayed_at", f"{one.replayed_at.isoformat()} as message {one.message_id}")
    if letter.traceback:
        out_console.print(_plain(letter.traceback), markup=False, highlight=False)
    out_console.print(_plain(letter.envelope), markup=False, highlight=False)


@dead_letters_app.command("replay")
def dead_letters_replay(
    letter_id: Annotated[str | None, typer.Argument(help="The id or its beginning (or choose by --all, …).")] = None,
    out: OutOption = None,
    every: Annotated[bool, typer.Option("--all", help="All that the filters let pass.")] = False,
    queue: QueueOption = None,
    kind: KindOption = None,
    reason: ReasonOption = None,
    study: StudyOption = None,
    case: CaseOption = None,
    since: SinceOption = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also those that were replayed before and have no end yet.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be replayed, and do nothing.")] = False,
) -> None:
    """Publish dead letters again, once their cause is mended. What was done since is left alone.

    Exit code 1 where something was not readable, or (with --out, where the end is waited for) was given up again.
    """
    from shared.records.dead_letters import Survey, replay

    wanted = _filter(queue=queue, kind=kind, reason=reason, study=study, case=case, since=since)
    if (letter_id is None) == (not (every or wanted.chooses)):
        raise FractureSweepError("say which: one id, or --all, --queue, --kind, --reason, --study, --case, --since")
    store = _store(out)
    survey = Survey(store)
    chosen_ones = survey.matching(wanted) if letter_id is None else [survey.find(letter_id)]
    due: list[Standing] = []
    left: list[Standing] = []
    for one in chosen_ones:
        is_due = one.state == "open" or (one.state == "replayed" and (again or letter_id is not None))
        (due if is_due else left).append(one)
    for one in left:
        _say(one, f"left alone: {one.state}; {one.what_to_do}")
    if dry_run:
        for one in due:
            _say(one, f"would be replayed to {one.letter.queue}")

    def replay_due(broker: Broker) -> None:
        for one in due:
            _say(one, f"{replay(store, broker, one)} to {one.letter.queue}")

    given_up: list[Standing] = []
    if due and not dry_run and out is None:
        from services.distributed import open_broker

        broker = open_broker(chosen.settings)
        try:
            replay_due(broker)
        finally:
            broker.close()
    elif due and not dry_run and out is not None:
        _replay_embedded(store, out, replay_due)
        after = Survey(store)
        given_up = [now for one in due if (now := after.standing(one.letter)).state == "given up again"]
        for one in given_up:
            _say(one, f"given up again as {short(one.again)}: {after.find(one.again).letter.reason}")
    _say_replayed(due=len(due), left=left, given_up=len(given_up), dry_run=dry_run)
    if given_up or any(one.state == "not readable" for one in left):
        raise typer.Exit(EXIT_LOOK)


def _say(one: Standing, what: str) -> None:
    out_console.print(f"{short(one.letter.dead_letter_id)}: {_plain(what)}", markup=False, highlight=False)


def _say_replayed(*, due: int, left: list[Standing], given_up: int, dry_run: bool) -> None:
    if not due and not left:
        out_console.print("no dead letter is meant so: nothing to do")
        return
    summary = f"{due} {'would be ' if dry_run else ''}replayed"
    summary += f" ({given_up} given up again)" if given_up else ""
    out_console.print(summary + (f"; {len(left)} left alone ({_counted(one.state for one in left)})" if left else ""))


def _replay_embedded(store: Any, out: Path, replay_due: Callable[[Broker], None]) -> None:
    """Replay into a pipeline of this process, wait for its end, and write the worklist and reports of OUT anew."""
    from services.composition import bundle_of
    from services.embedded import pipeline
    from services.report_generator.export import export_again

    if (out / "named").is_dir():
        chosen.overrides["report_generator.named_reports"] = "true"
        chosen.forget()
    settings = _embedded_settings()
    _log("WARNING" if settings.log.level == "INFO" else settings.log.level)
    with pipeline(settings=settings, store=store, bundle=bundle_of(settings)) as running:
        replay_due(running.broker)
        running.wait_until_idle()
    export_again(store, out)


# retention ----------------------------------------------------------------------------------------------------------
@app.command()
def gc(
    out: OutOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; say what would go, and why.")] = False,
    explain: Annotated[
        str | None, typer.Option("--explain", help="Delete nothing; say why one key is kept or goes.", metavar="KEY")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every key that goes.")] = False,
) -> None:
    """Delete what is older than the settings `retention.…` say. What is under way is never touched."""
    from services.retention import ages_of, decision_json, summary
    from shared.records.garbage import collect, decisions, explained

    store, ages, now = _store(out), ages_of(chosen.settings.retention), datetime.now(UTC)
    if explain is not None:
        decision = explained(store, explain, ages=ages, now=now)
        if as_json:
            sys.stdout.write(json.dumps(decision_json(decision), indent=2) + "\n")
            return
        verdict = "would be deleted" if decision.delete else "is kept"
        detail = f" ({decision.detail})" if decision.detail else ""
        out_console.print(f"{decision.key}: class {decision.name}, {decision.age.days} days, {decision.bytes} bytes")
        out_console.print(f"{verdict}: {decision.reason}{detail}", markup=False)
        return
    found = summary(decisions(store, ages=ages, now=now))
    done = None
    if not dry_run:
        with bars() as progress:
            task = progress.add_task("objects deleted", total=len(found.going))
            done = collect(store, found.going, progress=lambda count: progress.update(task, completed=count))
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(at=now, done=done), indent=2) + "\n")
        return
    _print_classes(found, deleted=not dry_run)
    for (kind, name), why in () if done is None else done.left:
        out_console.print(f"left alone: {kind} {short(name)}: {why}", markup=False)
    if dry_run:
        _print_reasons(found)
        out_console.print("nothing was deleted (--dry-run)")


def _print_classes(found: Any, *, deleted: bool) -> None:
    goes = "deleted" if deleted else "would go"
    table = Table("class", "kept", "bytes", "oldest", goes, "bytes", "oldest", title="retention")
    for row in found.classes():
        table.add_row(
            row.name,
            *(
                text
                for heap in (row.kept, row.going)
                for text in (str(heap.objects), str(heap.bytes), f"{heap.oldest_days} days" if heap.objects else "")
            ),
        )
    out_console.print(table)


def _print_reasons(found: Any) -> None:
    table = Table("class", "", "objects", "bytes", "because")
    for row in found.reasons():
        what = "would go" if row.delete else "kept"
        table.add_row(row.name, what, str(row.heap.objects), str(row.heap.bytes), row.reason)
    out_console.print(table)


# making -------------------------------------------------------------------------------------------------------------
@phantoms_app.command("archive")
def phantom_archive(
    folder: Annotated[Path, typer.Argument(help="Where the studies go.")],
    patients: Annotated[int, typer.Option("--patients", min=1, help="How many patients.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same studies.")] = 1,
    kappa: Annotated[
        float, typer.Option("--kappa", min=0.0, max=1.0, help="How different acute and chronic phantoms are.")
    ] = 0.85,
) -> None:
    """Make phantom studies in DICOM (CT series + DICOM SEG): synthetic, for demonstration and tests."""
    from services.trainer.phantoms.archive import write_archive

    with bars() as progress:
        task = progress.add_task("phantoms made", total=patients)
        write_archive(
            folder,
            patients=patients,
            seed=seed,
            kappa=kappa,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    out_console.print(f"{patients} phantom patients in {folder} (synthetic, no clinical meaning)")


@phantoms_app.command("cohort")
def phantom_cohort(
    folder: Annotated[Path, typer.Argument(help="Where the cohort goes; one that was begun there is gone on with.")],
    patients: Annotated[int, typer.Option("--patients", min=1, help="How many patients.")] = 365,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same cohort.")] = 7,
    kappa: Annotated[
        float, typer.Option("--kappa", min=0.0, max=1.0, help="How different acute and chronic phantoms are.")
    ] = 0.85,
    readers: Annotated[
        int, typer.Option("--readers", min=0, help="So many training patients have masks of three readers.")
    ] = 30,
    nifti: Annotated[bool, typer.Option("--nifti", help="NIfTI in the place of DICOM; quicker.")] = False,
    processes: Annotated[int, typer.Option("--processes", min=0, help="Patients at once; 0 takes every core.")] = 0,
) -> None:
    """Make a phantom cohort with its COHORT.csv, to train on: synthetic, no clinical meaning."""
    from services.trainer.phantoms.training_cohort import PhantomCohort, write_training_cohort

    cohort = PhantomCohort(patients=patients, seed=seed, kappa=kappa, readers=readers, nifti=nifti)
    with bars(time_left=True) as progress:
        path = write_training_cohort(
            folder, cohort, processes=processes, progress=partial(StepBars(progress), "phantoms made")
        )
    out_console.print(f"{patients} phantom patients, table {path} (synthetic, no clinical meaning)")


@app.command("keys")
def make_keys(folder: Annotated[Path, typer.Argument(help="Where the two key files go.")]) -> None:
    """Make a site's pseudonym key and encryption key, where they are not there yet. Back them up."""
    from shared.pipeline.secrets_files import make_secret_file

    for name in ("pseudonym.key", "encryption.key"):
        make_secret_file(folder / name)
        out_console.print(f"{folder / name}")


@app.command("secrets")
def make_secrets(
    folder: Annotated[Path, typer.Argument(help="Where they go; a folder that no other user can look into.")],
    bucket: Annotated[str, typer.Option("--bucket", help="The bucket that the S3 policies name.")] = "fracture-sweep",
) -> None:
    """Make the secrets of a distributed site that are not there yet: keys, and a user a service with its own rights.

    Beside random passwords it writes what follows from them: RabbitMQ's definitions, the S3 server's identities and
    policies, Orthanc's configuration. Passwords and keys are never replaced; the rest is written anew. Back it up.
    """
    from services.provisioning import write_secrets

    files = write_secrets(folder, bucket=bucket)
    out_console.print(f"{len(files)} files in {folder}: back up pseudonym.key and encryption.key, apart from the data")


@app.command("prepare-store")
def prepare_store() -> None:
    """Make the bucket of the distributed store where it is not there, as a user who may."""
    from services.distributed import open_store, patiently

    settings = chosen.settings
    patiently(lambda: open_store(settings), seconds=settings.worker.start_seconds)
    bucket = settings.s3.bucket if settings.s3 is not None else ""
    out_console.print(f"the bucket {bucket} is there, and the server keeps to conditional writes")


@app.command("settings")
def show_settings() -> None:
    """Every setting: what holds, where it came from, what is allowed. Secrets are hidden."""
    table = Table("setting", "value", "from", "variable", "allowed", "what it is")
    for row in describe(chosen.loaded()):
        table.add_row(row.setting, row.value, row.origin, row.env, row.allowed, row.doc)
    out_console.print(table)


def _fail(sentence: str) -> int:
    sys.stderr.write(f"fracture-sweep: {sentence}\n")
    return EXIT_UNUSABLE


def main() -> None:
    """The entry point: every foreseeable error is one sentence and exit code 2."""
    from shared.fracture.bundle import BundleError
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
