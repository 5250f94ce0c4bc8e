"""The command line: `fracture-sweep …`, or `python -m services …`. The only reader of the environment.

What goes wrong in a way that a user can mend is one clear sentence on standard error and exit code 2. Exit code 1
means that a run ended with something that somebody should look at (a ledger that does not add up, pending work).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.settings import Settings
from shared.fracture.ids import short
from shared.fracture.ledger import Ledger
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.settings import Loaded, describe, load_settings

EXIT_UNUSABLE = 2
EXIT_LOOK = 1
SETTINGS_VARIABLE = "FRACTURE_SWEEP_SETTINGS"

app = typer.Typer(
    name="fracture-sweep",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they print local variables, which may name a patient
    help="Reads CT studies, finds vertebral compression fractures, and says which are acute. Research use only.",
)
dead_letters_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What was given up, and why.")
app.add_typer(dead_letters_app, name="dead-letters")

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


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress bars on standard error (plain lines where it is no terminal)."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err_console,
        transient=True,
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
    _print_worklist(json.loads(exported.worklist_json.read_text(encoding="utf-8")))
    _print_ledger(ran.ledger)
    if not ran.computed:
        out_console.print("nothing was computed: all of it was there already")
    out_console.print(f"worklist: {exported.worklist_html}")
    out_console.print(f"reports:  {out / 'reports'}  ({len(exported.reports)} studies)")
    if not ran.ledger.exact or ran.ledger.pending:
        raise typer.Exit(EXIT_LOOK)


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
    with bars() as progress:
        task = progress.add_task("files uploaded", total=None)
        submit_path(
            path,
            name=name,
            store=store,
            pseudonyms=pseudonyms,
            default_labels=labels,
            default_roi=roi,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    out_console.print(f"submitted as sweep {short(pseudonyms.sweep_id(name))}: fracture-sweep status shows how it goes")


# looking ------------------------------------------------------------------------------------------------------------
def _store(out: Path | None) -> Any:
    """The store of an embedded run's folder, or the distributed system's."""
    from services.composition import restricted
    from services.distributed import open_store
    from shared.pipeline.folder_store import FolderStore

    if out is None:
        return open_store(chosen.settings)
    if not (out / "store").is_dir():
        raise FractureSweepError(f"{out} holds no store: give the folder that `fracture-sweep run` wrote to")
    return restricted(FolderStore(out / "store"), _embedded_settings())


OutOption = Annotated[
    Path | None, typer.Option("--out", help="The folder of a `run` (default: the distributed system's store).")
]


@app.command()
def status(
    sweep: Annotated[str | None, typer.Argument(help="A sweep's id or its beginning (default: all).")] = None,
    out: OutOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """The ledgers of files, series and cases: what was found, and what became of each."""
    from shared.records.ledger import sweep_ledger, sweeps

    store = _store(out)
    found = [sweep_id for sweep_id in sweeps(store) if sweep is None or sweep_id.startswith(sweep)]
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
@dead_letters_app.command("list")
def dead_letters_list(
    out: OutOption = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Of this queue alone.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="bug, retries-exhausted, delivery-limit, …")] = None,
) -> None:
    """All dead letters: id, queue, kind, reason."""
    from shared.records.dead_letters import letters, matching, replays

    store = _store(out)
    table = Table("id", "recorded", "queue", "kind", "attempts", "replays", "reason")
    count = 0
    for letter in sorted(matching(letters(store), queue=queue, kind=kind), key=lambda one: one.recorded_at):
        count += 1
        table.add_row(
            short(letter.dead_letter_id),
            f"{letter.recorded_at:%Y-%m-%d %H:%M:%SZ}",
            letter.queue,
            letter.kind,
            str(letter.attempts),
            str(replays(store, letter)),
            letter.reason,
        )
    out_console.print(table if count else "no dead letters")


@dead_letters_app.command("show")
def dead_letters_show(
    letter_id: Annotated[str, typer.Argument(help="The id or its beginning.")], out: OutOption = None
) -> None:
    """One dead letter: reason, traceback, parents, attempts, and the message itself."""
    from shared.records.dead_letters import find

    letter = find(_store(out), letter_id)
    for name in ("dead_letter_id", "queue", "service", "kind", "reason", "message_type", "message_id", "attempts"):
        out_console.print(f"{name:>15}: {getattr(letter, name)}", markup=False)
    out_console.print(f"{'recorded_at':>15}: {letter.recorded_at.isoformat()}", markup=False)
    out_console.print(f"{'parents':>15}: {', '.join(letter.parents) or 'none'}", markup=False)
    if letter.traceback:
        out_console.print(letter.traceback, markup=False)
    out_console.print(letter.envelope, markup=False)


@dead_letters_app.command("replay")
def dead_letters_replay(
    letter_id: Annotated[str | None, typer.Argument(help="The id or its beginning (or choose by --all, …).")] = None,
    out: OutOption = None,
    every: Annotated[bool, typer.Option("--all", help="All that the filters let pass.")] = False,
    queue: Annotated[str | None, typer.Option("--queue", help="Of this queue alone.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Of this kind alone.")] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Whose reason holds this text.")] = None,
) -> None:
    """Publish dead letters again, once their cause is mended. What was done since is left alone."""
    from shared.records.dead_letters import find, letters, matching, replay

    if (letter_id is None) == (not (every or queue or kind or reason)):
        raise FractureSweepError("say which: one id, or --all, --queue, --kind, --reason")
    store = _store(out)
    wanted = (
        [find(store, letter_id)]
        if letter_id is not None
        else list(matching(letters(store), queue=queue, kind=kind, reason=reason))
    )

    def replay_all(broker: Any) -> None:
        for letter in wanted:
            out_console.print(f"{short(letter.dead_letter_id)}: {replay(store, broker, letter)}")

    if out is None:
        from services.distributed import open_broker

        broker = open_broker(chosen.settings)
        try:
            replay_all(broker)
        finally:
            broker.close()
        return
    from services.composition import bundle_of
    from services.embedded import pipeline

    settings = _embedded_settings()
    with pipeline(settings=settings, store=store, bundle=bundle_of(settings)) as running:
        replay_all(running.broker)
        running.wait_until_idle()


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
@app.command()
def phantoms(
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


@app.command("keys")
def make_keys(folder: Annotated[Path, typer.Argument(help="Where the two key files go.")]) -> None:
    """Make a site's pseudonym key and encryption key, where they are not there yet. Back them up."""
    from shared.pipeline.secrets_files import make_secret_file

    for name in ("pseudonym.key", "encryption.key"):
        make_secret_file(folder / name)
        out_console.print(f"{folder / name}")


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
        sys.stderr.write("fracture-sweep: stopped; the same command goes on from here\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
