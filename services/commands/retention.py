"""gc: what is old enough goes, and what would go can be explained."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.table import Table

from services.commands.chosen import OutOption, chosen, store_of
from services.commands.terminal import bars, out_console
from shared.fracture.ids import short


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

    store, ages, now = store_of(out), ages_of(chosen.settings.retention), datetime.now(UTC)
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
