"""status, export: what became of a sweep, and its results as files."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from services.commands.chosen import OutOption, chosen, embedded_settings, store_of
from services.commands.terminal import EXIT_LOOK, EXIT_STOPPED, err_console, out_console
from shared.fracture.faults import group_of
from shared.fracture.ids import short
from shared.fracture.ledger import Ledger
from shared.fracture.records import basis_alone
from shared.pipeline.errors import FractureSweepError

WORKLIST_SECONDS: Final = 120.0
"""How long an export waits for the worklist of a finished sweep: it is made anew when the sweep is closed."""


def _sweeps_called(store: Any, wanted: str, out: Path | None) -> list[str]:
    """The sweeps whose id begins like this; where there is none, the one of this name (or of this path)."""
    from services.composition import pseudonyms_of
    from shared.records.ledger import sweeps

    known = list(sweeps(store))
    found = [sweep_id for sweep_id in known if sweep_id.startswith(wanted)]
    if found:
        return found
    settings = chosen.settings if out is None else embedded_settings()
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
    store = store_of(out)
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

    store = store_of(out)
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


def export(
    out: Annotated[Path, typer.Option("--out", help="Where worklist and reports go.")],
    sweep: Annotated[
        str | None, typer.Argument(help="A sweep's id, its beginning, or its name (default: the newest).")
    ] = None,
    named: Annotated[
        bool, typer.Option("--named", help="Also the reports with patient names, under OUT/named.")
    ] = False,
) -> None:
    """Write a sweep's worklist and reports out of the distributed system's store, as `run` leaves them.

    Of a sweep that is through, the worklist that says so is waited for; exit code 1 where it does not come.
    """
    from services.report_generator.export import export_sweep
    from shared.records.ledger import sweep_ledger

    store = store_of(None)
    sweep_id = _one_sweep(store, sweep)
    if sweep_id is None:
        raise FractureSweepError(
            "there is no such sweep: see fracture-sweep status" if sweep else "there is no sweep yet"
        )
    ledger = sweep_ledger(store, sweep_id)
    if ledger is None:
        raise FractureSweepError("the sweep is gone from the store: see fracture-sweep status")
    current = _wait_for_worklist(store, ledger)
    exported = export_sweep(store, sweep_id, out, named=named)
    if not current:
        err_console.print(
            f"this worklist is OLDER than the sweep: after {WORKLIST_SECONDS:g} s the report-generator has not made it "
            "anew. See that it runs, then export again",
            style="bold red",
            highlight=False,
        )
    print_exported(exported, ledger, out, complete=current)


def _wait_for_worklist(store: Any, ledger: Ledger) -> bool:
    """Whether the worklist says what the ledger of a finished sweep says, after some waiting where it is behind."""
    from services.report_generator.export import is_current

    if ledger.pending:
        return True  # under way: the newest worklist is as good as it gets
    end = time.monotonic() + WORKLIST_SECONDS
    told = False
    while not is_current(store, ledger):
        if time.monotonic() > end:
            return False
        if not told:
            err_console.print("waiting for the worklist of the finished sweep ...")
            told = True
        time.sleep(1)
    return True


def print_exported(exported: Any, ledger: Ledger, out: Path, *, note: str = "", complete: bool = True) -> None:
    """Worklist, ledger and where the files lie; exit code 1 where somebody should look."""
    _print_worklist(json.loads(exported.worklist_json.read_text(encoding="utf-8")))
    _print_ledger(ledger)
    if note:
        out_console.print(note)
    out_console.print(f"worklist: {exported.worklist_html}")
    out_console.print(f"reports:  {out / 'reports'}  ({len(exported.reports)} studies)")
    if not ledger.exact or ledger.pending or not complete:
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
            alike: Counter[str] = Counter()  # two bodies hardly ever have lost the same height
            for reason, number in tally.reasons.get(state, {}).items():
                alike[group_of(reason)] += number
            why = "; ".join(f"{number} × {reason}" for reason, number in alike.most_common())
            if count or state in ("pending", "reported", "planned"):
                table.add_row("", state, str(count), why)
    out_console.print(table)
    if not ledger.exact:
        err_console.print("the ledger does not add up: please report this", style="bold red")


def _print_worklist(worklist: dict[str, Any]) -> None:
    bases = Counter(basis_alone(row["fracture_basis"]) for row in worklist["rows"])
    caption = "; ".join(f"{count} × {basis}" for basis, count in sorted(bases.items()))
    table = Table(title="worklist (acute first)", caption=caption or None)
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
            row["predicted"] + (" ?" if row.get("indeterminate") else ""),
            *(shown(row[name]) for name in numbers),
        )
    out_console.print(table)
    if any(row.get("indeterminate") for row in worklist["rows"]):
        out_console.print("? = indeterminate: MRI recommended")
    for line in (worklist["demonstration"], worklist["research_use"]):
        if line:
            out_console.print(line, style="bold")
