"""What was given up is kept with its reason, can be published again, and is left alone once it is done.

Through the real command line, in both forms: over the folder of an embedded run, and over RabbitMQ and S3.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.__main__ import app
from shared.fracture.ledger import Ledger
from shared.pipeline.errors import FractureSweepError
from tests.fixtures.cluster import KEYS, ROOT, Cluster
from tests.fixtures.runs import place

pytestmark = pytest.mark.timeout(300)

HASTY = {"FRACTURE_SWEEP_RADIOMICS_EXTRACTOR_CASE_SECONDS": "0.001"}
"""A budget that every case exceeds."""


class Site:
    """The folder of an embedded run, and the command line over it."""

    def __init__(self, out: Path, bundle: Path) -> None:
        self.out = out
        self._environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "S3_"))},
            **KEYS,
            "FRACTURE_SWEEP_BUNDLE_PATH": str(bundle),
            "FRACTURE_SWEEP_RADIOMICS_EXTRACTOR_PROCESSES": "2",
            "COLUMNS": "300",
        }

    def command(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "services", *arguments, "--out", str(self.out)],
            cwd=ROOT,
            env={**self._environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def letters(self, *filters: str) -> list[dict[str, Any]]:
        ran = self.command("dead-letters", "list", "--json", *filters)
        assert ran.returncode == 0, ran.stderr
        found: list[dict[str, Any]] = json.loads(ran.stdout)
        return found

    def ledger(self) -> dict[str, Any]:
        (ledger,) = json.loads(self.command("status", "--json").stdout)
        assert isinstance(ledger, dict)
        return ledger


@pytest.fixture(scope="module")
def given_up(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, phantom_archive: Path) -> Path:
    """A run of which every case was given up as over its budget."""
    site = Site(tmp_path_factory.mktemp("given-up") / "out", tiny_bundle)
    ran = site.command("run", str(phantom_archive), **HASTY)
    assert "dead-lettered" in ran.stdout, ran.stderr
    return site.out


@pytest.fixture
def site(tmp_path: Path, given_up: Path, tiny_bundle: Path) -> Site:
    """A copy of it."""
    shutil.copytree(given_up, tmp_path / "out")
    return Site(tmp_path / "out", tiny_bundle)


def test_dead_letters_are_listed_by_filter_and_shown_whole(site: Site) -> None:
    everything = site.letters()
    first = everything[0]

    shown = site.command("dead-letters", "show", first["dead_letter_id"][:12])
    listed = site.command("dead-letters", "list")

    assert site.ledger()["cases"]["by_state"]["dead-lettered"] == len(everything) > 1
    assert {(one["kind"], one["queue"], one["state"]) for one in everything} == {
        ("over-budget", "radiomics-extractor", "open")
    }
    assert listed.stdout.count("over-budget") == len(everything)
    assert f"{len(everything)} open" in listed.stdout
    assert site.letters("--kind", "over-budget", "--queue", "radiomics-extractor", "--since", "1h") == everything
    assert site.letters("--case", first["case_id"][:10]) == [first]
    assert first in site.letters("--study", first["study_id"][:10])
    assert site.letters("--queue", "resampler") == []
    assert site.letters("--state", "done since", "--reason", first["reason"]) == []
    assert shown.returncode == 0, shown.stderr
    assert first["reason"] in shown.stdout
    assert "raise the budget" in shown.stdout
    for known in (first["message_id"], first["case_id"], *first["parents"], '"message_type":"CaseReady"'):
        assert known in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("replay",), "say which"),
        (("replay", "ab", "--all"), "say which"),
        (("list", "--kind", "bad-luck"), "there is no kind 'bad-luck'"),
        (("list", "--queue", "nowhere"), "no queue is called 'nowhere'"),
        (("list", "--state", "lost"), "there is no state 'lost'"),
        (("list", "--since", "yesterday"), "is no time"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    ran = CliRunner().invoke(app, ("dead-letters", *arguments))

    assert isinstance(ran.exception, FractureSweepError)
    assert sentence in str(ran.exception)


def test_an_id_that_no_letter_has_is_one_sentence_and_exit_code_2(site: Site) -> None:
    ran = site.command("dead-letters", "show", "no-such-id")

    assert ran.returncode == 2
    assert "no dead letter has an id that begins with" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_dry_run_says_what_it_would_do_and_does_nothing(site: Site) -> None:
    before = site.letters()

    ran = site.command("dead-letters", "replay", "--all", "--dry-run")

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("would be replayed to radiomics-extractor") == len(before)
    assert f"{len(before)} would be replayed" in ran.stdout
    assert site.letters() == before


def test_a_replay_after_the_cause_is_mended_finishes_everything_and_the_next_one_does_nothing(site: Site) -> None:
    before = site.letters()
    objects = ("outcomes/", "features/", "reports/", "dead-letters/")

    one = site.command("dead-letters", "replay", before[0]["dead_letter_id"])
    after_one = site.letters("--state", "done since")
    rest = site.command("dead-letters", "replay", "--kind", "over-budget")
    stored = sorted(path for prefix in objects for path in (site.out / "store" / prefix).rglob("*"))
    again = site.command("dead-letters", "replay", "--all")

    assert (one.returncode, rest.returncode, again.returncode) == (0, 0, 0), one.stderr + rest.stderr
    assert [letter["dead_letter_id"] for letter in after_one] == [before[0]["dead_letter_id"]]
    assert f"{len(before) - 1} replayed; 1 left alone (1 done since)" in rest.stdout
    assert f"0 replayed; {len(before)} left alone ({len(before)} done since)" in again.stdout
    assert sorted(path for prefix in objects for path in (site.out / "store" / prefix).rglob("*")) == stored
    assert {(len(letter["replays"]), letter["state"]) for letter in site.letters()} == {(1, "done since")}
    cases = site.ledger()["cases"]
    assert cases["by_state"]["reported"] == cases["found"] == len(before)
    assert len(json.loads((site.out / "worklist.json").read_text())["rows"]) == len(before)


def test_a_replay_that_is_given_up_again_says_so_and_does_not_double_the_letters(site: Site) -> None:
    before = site.letters()

    first = site.command("dead-letters", "replay", "--all", **HASTY)
    second = site.command("dead-letters", "replay", "--all", **HASTY)

    assert (first.returncode, second.returncode) == (1, 1)
    assert f"{len(before)} replayed ({len(before)} given up again)" in first.stdout
    assert f"{len(before)} replayed ({len(before)} given up again)" in second.stdout
    assert len(site.letters()) == 3 * len(before)
    assert len(site.letters("--state", "open")) == len(before)
    ledger = site.ledger()
    assert ledger["exact"]
    assert ledger["cases"]["by_state"]["dead-lettered"] == len(before)


@pytest.fixture
def cluster(
    tmp_path: Path, rabbitmq_environ: dict[str, str], s3_environ: dict[str, str], tiny_bundle: Path
) -> Iterator[Cluster]:
    environ = {**rabbitmq_environ, **s3_environ, "FRACTURE_SWEEP_BUNDLE_PATH": str(tiny_bundle), "COLUMNS": "300"}
    with Cluster(environ, tmp_path / "logs") as running:
        yield running


def done(ledger: Ledger) -> bool:
    return ledger.pending == 0 and ledger.files.found > 0


@pytest.mark.rabbitmq
@pytest.mark.s3
def test_over_rabbitmq_and_s3_what_was_given_up_is_replayed_and_ends_as_if_nothing_had_been(
    cluster: Cluster, tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    here = place(tmp_path / "store", tiny_bundle)
    alone = here.run(phantom_archive)
    cluster.environ.update(HASTY)
    cluster.start()
    assert cluster.command("submit", str(phantom_archive)).returncode == 0
    given_up = cluster.wait(done, seconds=200)

    listed = cluster.command("dead-letters", "list", "--kind", "over-budget", "--json")
    letters = json.loads(listed.stdout)
    shown = cluster.command("dead-letters", "show", letters[0]["dead_letter_id"], "--json")
    cluster.terminate("radiomics-extractor")
    cluster.environ.update(dict.fromkeys(HASTY, "600"))
    replayed = cluster.command("dead-letters", "replay", "--reason", letters[0]["reason"])
    waiting = cluster.command("dead-letters", "replay", "--all")
    cluster.start("radiomics-extractor")
    ledger = cluster.wait(lambda one: one.cases.by_state["dead-lettered"] == 0 and done(one), seconds=200)

    assert given_up.cases.by_state["dead-lettered"] == given_up.cases.found == len(letters)
    assert json.loads(shown.stdout)["state"] == "open"
    assert replayed.returncode == 0, replayed.stderr
    assert f"{len(letters)} replayed" in replayed.stdout
    assert f"0 replayed; {len(letters)} left alone ({len(letters)} replayed)" in waiting.stdout
    assert ledger.cases.by_state == alone.ledger.cases.by_state
    store = cluster.store()
    for prefix in ("features/", "outcomes/classified/", "cases/"):
        assert {key: store.get(key) for key in store.keys(prefix)} == here.objects(prefix)
    after = cluster.command("dead-letters", "replay", "--all")
    assert f"0 replayed; {len(letters)} left alone ({len(letters)} done since)" in after.stdout
