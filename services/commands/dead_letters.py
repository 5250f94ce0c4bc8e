"""dead-letters list, show, replay: what was given up, and why."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from services.commands.chosen import OutOption, chosen, embedded_settings, store_of
from services.commands.terminal import EXIT_LOOK, log_at, out_console, plain
from shared.fracture.ids import short
from shared.pipeline.errors import FractureSweepError

if TYPE_CHECKING:
    from shared.pipeline.broker import Broker
    from shared.records.dead_letters import Filter, Standing

QueueOption = Annotated[str | None, typer.Option("--queue", help="Of this queue alone.")]
KindOption = Annotated[str | None, typer.Option("--kind", help="Of this kind alone (see docs/runbook.md).")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Whose reason holds this text.")]
StudyOption = Annotated[str | None, typer.Option("--study", help="About the study whose id begins so.")]
CaseOption = Annotated[str | None, typer.Option("--case", help="About the case whose id begins so.")]
SinceOption = Annotated[
    str | None, typer.Option("--since", help="Recorded since then: an age (90m, 12h, 7d) or a time in UTC.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]


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


def list_letters(
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
    found = Survey(store_of(out)).matching(wanted, states=states)
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
            Text(plain(letter.queue)),
            Text(plain(letter.kind)),
            str(letter.attempts),
            one.state,
            str(len(one.replays)),
            Text(plain(letter.reason)),
        )
    out_console.print(table)
    out_console.print(_counted(one.state for one in found))


def _counted(states: Iterable[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in Counter(states).items())


def show(
    letter_id: Annotated[str, typer.Argument(help="The id or its beginning.")],
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """One dead letter: reason, what to do, traceback, parents, attempts, earlier replays, and the message itself."""
    from shared.records.dead_letters import Survey

    found = Survey(store_of(out)).find(letter_id)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json(), indent=2) + "\n")
        return

    def line(name: str, value: object) -> None:
        out_console.print(f"{name:>15}: {plain(str(value))}", markup=False, highlight=False)

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
        out_console.print(plain(letter.traceback), markup=False, highlight=False)
    out_console.print(plain(letter.envelope), markup=False, highlight=False)


def replay_letters(
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
    store = store_of(out)
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
    out_console.print(f"{short(one.letter.dead_letter_id)}: {plain(what)}", markup=False, highlight=False)


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
    settings = embedded_settings()
    log_at(settings.log.level)
    with pipeline(settings=settings, store=store, bundle=bundle_of(settings)) as running:
        replay_due(running.broker)
        running.wait_until_idle()
    export_again(store, out)
