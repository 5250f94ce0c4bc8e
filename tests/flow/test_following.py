"""submit, status --watch and export as processes of their own: followed, interrupted, gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from services.commands import following
from services.composition import bundle_of, pseudonyms_of
from services.dicom_ingest.sweep import run_sweep
from services.embedded import intake_of
from services.report_generator.export import is_current
from services.sources import source_of
from shared.pipeline.folder_store import FolderStore
from shared.pipeline.store import Store
from shared.records.ledger import FollowedSweep, sweep_ledger, sweeps
from tests.fixtures.cluster import ROOT, Cluster
from tests.fixtures.rabbitmq import until
from tests.fixtures.runs import ENCRYPTION_KEY, PSEUDONYM_KEY, Place, place
from tests.fixtures.s3 import S3Server

pytestmark = pytest.mark.timeout(600)

KEYS = {
    "FRACTURE_SWEEP_SECRETS_PSEUDONYM_KEY": PSEUDONYM_KEY,
    "FRACTURE_SWEEP_SECRETS_ENCRYPTION_KEY": ENCRYPTION_KEY,
}


class Process:
    """A command under way, with what it has written so far."""

    def __init__(self, environ: Mapping[str, str], log: Path, *arguments: str) -> None:
        self._log = log
        self._file = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services", *arguments],
            cwd=ROOT,
            env={**environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=self._file,
        )

    def said(self) -> str:
        return self._log.read_text()

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._file.close()


Start = Callable[..., Process]


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """What a shell starts in the background ignores Ctrl-C, and so would the commands that are started from here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def started(environ: Mapping[str, str], *arguments: str) -> Process:
            process = Process(environ, tmp_path / f"{arguments[0]}.log", *arguments)
            stack.callback(process.close)
            return process

        yield started


def swept(store: Store, here: Place, archive: Path, *, name: str) -> str:
    """A sweep whose series are planned and told to nobody; its id."""
    bundle = bundle_of(here.settings)
    pseudonyms = pseudonyms_of(here.settings)
    sweep_id = pseudonyms.sweep_id(name)
    run_sweep(
        source_of(archive, settings=here.settings),
        name=name,
        sweep_id=sweep_id,
        intake=intake_of(here.settings, store=store, pseudonyms=pseudonyms, bundle=bundle),
        store=store,
        protocols=bundle.manifest.protocols,
        tell=lambda fact: None,
    )
    return sweep_id


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, phantom_archive: Path) -> Path:
    """The folder of an embedded run that is done."""
    out = tmp_path_factory.mktemp("finished")
    ran = place(out / "store", tiny_bundle).run(phantom_archive, name="the night")
    assert ran.ledger.pending == 0
    return out


def test_a_finished_sweep_is_watched_to_its_end_at_once(finished: Path, start: Start) -> None:
    watching = start({**os.environ, **KEYS}, "status", "--watch", "--out", str(finished))

    assert watching.process.wait(120) == 0
    lines = watching.said().splitlines()
    assert re.fullmatch(r"sweep \w{12}: files \d+ · series 4/4 .* · reports 4/4 · dead letters 0", lines[0])
    assert "worklist" not in watching.said()


def test_a_sweep_is_found_by_its_name(finished: Path, start: Start) -> None:
    found = start({**os.environ, **KEYS}, "status", "the night", "--out", str(finished), "--json")
    assert found.process.wait(120) == 0
    assert len(json.loads(found.said())) == 1

    absent = start({**os.environ, **KEYS}, "status", "another night", "--out", str(finished))
    assert absent.process.wait(120) == 2
    assert absent.said() == "fracture-sweep: there is no such sweep\n"


def test_on_a_terminal_a_watch_draws_bars(finished: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "services", "status", "--watch", "--out", str(finished)],
        cwd=ROOT,
        env={**os.environ, **KEYS, "TERM": "xterm", "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # Linux answers EIO at the end
        while piece := os.read(ours, 4096):
            written += piece

    assert process.wait(120) == 0
    text = written.decode()
    assert "━" in text
    assert "dead letters 0" in text
    os.close(ours)


def test_ctrl_c_leaves_a_watch_and_not_the_sweep(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path, start: Start
) -> None:
    here = place(tmp_path / "out" / "store", tiny_bundle)
    sweep_id = swept(here.store, here, phantom_archive, name="n")
    watching = start({**os.environ, **KEYS}, "status", "--watch", sweep_id[:12], "--out", str(tmp_path / "out"))
    until(lambda: "4 pending" in watching.said(), 60, "the first line")

    assert watching.interrupt() == 130
    assert watching.said().splitlines()[1:] == [
        "fracture-sweep: left; the sweep goes on, and the same command watches it again"
    ]


def test_a_followed_sweep_shows_the_ledger_of_the_store(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    here = place(tmp_path / "store", tiny_bundle)
    sweep_id = swept(here.store, here, phantom_archive, name="a sweep")
    followed = FollowedSweep(here.store, sweep_id)

    before = followed.ledger()
    ran = here.run(phantom_archive)

    assert before is not None
    assert before.pending == 4
    assert followed.ledger() == followed.ledger() == sweep_ledger(here.store, sweep_id) == ran.ledger


@pytest.mark.s3
def test_a_watch_waits_for_a_store_that_is_away(
    private_s3_server: S3Server, tiny_bundle: Path, phantom_archive: Path, tmp_path: Path, start: Start
) -> None:
    server = private_s3_server
    environ = {
        "S3_ENDPOINT": f"127.0.0.1:{server.port}",
        "S3_ACCESS_KEY": server.access_key,
        "S3_SECRET_KEY": server.secret_key,
        "S3_BUCKET": "watched",
        "S3_SECURE": "false",
        "S3_RETRIES": "0",
    }
    with Cluster({**environ, "FRACTURE_SWEEP_BUNDLE_PATH": str(tiny_bundle)}, tmp_path / "logs") as cluster:
        swept(cluster.store(), Place(store=cluster.store(), settings=cluster.settings), phantom_archive, name="n")
        watching = start(cluster.environ, "status", "--watch")
        until(lambda: "4 pending" in watching.said(), 60, "the first line")

        server.kill()
        until(lambda: "waiting for the store" in watching.said(), 60, "the outage")
        server.start()
        until(lambda: watching.said().count("4 pending") == 2, 90, "the store again")

        assert watching.interrupt() == 130


@pytest.mark.s3
def test_ctrl_c_in_the_middle_of_a_submit_and_the_same_command_uploads_the_rest(
    tmp_path: Path, s3_environ: dict[str, str], start: Start
) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    for number in range(600):
        (folder / f"{number:04d}").write_bytes(os.urandom(100_000))
    with Cluster(s3_environ, tmp_path / "logs") as cluster:
        store = cluster.store()

        def uploaded() -> list[str]:
            return [key for key in store.keys("inbox/") if "/files/" in key]

        submitting = start(cluster.environ, "submit", str(folder))
        until(lambda: len(uploaded()) > 5, 120, "the first files")

        assert submitting.interrupt() == 130
        assert submitting.said() == "fracture-sweep: stopped; the same command goes on from here\n"
        first = len(uploaded())
        assert 5 < first < 600

        again = cluster.command("submit", str(folder))

        assert again.returncode == 0, again.stderr
        assert again.stdout.startswith(f"{600 - first} files uploaded, {first} were there already\n")
        assert len(uploaded()) == 600
        assert sum(key.endswith("/submission.json") for key in store.keys("inbox/")) == 1


@pytest.mark.s3
def test_a_store_under_the_watermark_refuses_a_submit_in_one_sentence(
    tmp_path: Path, s3_environ: dict[str, str], s3_server: S3Server, phantom_archive: Path
) -> None:
    environ = {
        **s3_environ,
        "S3_FREE_SPACE_URL": f"http://127.0.0.1:{s3_server.port + 8}/metrics",
        "S3_FREE_SPACE_METRIC": 'SeaweedFS_volumeServer_resource{type="avail"}',
        "FRACTURE_SWEEP_PRESSURE_MIN_FREE_GIB": "10000000",
    }
    with Cluster(environ, tmp_path / "logs") as cluster:
        refused = cluster.command("submit", str(phantom_archive))

        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
        assert "pressure.min_free_gib" in refused.stderr
        assert list(cluster.store().keys("inbox/")) == []


@pytest.mark.rabbitmq
@pytest.mark.s3
def test_a_sweep_is_watched_from_its_submit_to_its_end_and_exported(
    tmp_path: Path,
    rabbitmq_environ: dict[str, str],
    s3_environ: dict[str, str],
    tiny_bundle: Path,
    phantom_archive: Path,
    start: Start,
) -> None:
    environ = {**rabbitmq_environ, **s3_environ, "FRACTURE_SWEEP_BUNDLE_PATH": str(tiny_bundle)}
    environ["FRACTURE_SWEEP_REPORT_GENERATOR_NAMED_REPORTS"] = "true"
    with Cluster(environ, tmp_path / "logs") as cluster:
        watching = start(cluster.environ, "status", "--watch", "tonight")
        assert cluster.command("submit", str(phantom_archive), "--sweep", "tonight").returncode == 0
        cluster.start()

        code = watching.process.wait(300)

        assert code == 0, watching.said()
        lines = watching.said().splitlines()
        assert lines[0] == "waiting for the sweep to be read"
        assert "dead letters 0" in lines[1]
        ledger = cluster.ledger("tonight")
        assert ledger is not None
        assert (ledger.pending, ledger.exact) == (0, True)

        # at once: a worklist that is behind the ledger is waited for, never shown as if it were the whole
        exported = cluster.command("export", "tonight", "--out", str(tmp_path / "out"), "--named")

        assert exported.returncode == 0, exported.stderr
        assert "worklist (acute first)" in exported.stdout
        worklist = json.loads((tmp_path / "out" / "worklist.json").read_text())
        assert len(list((tmp_path / "out" / "reports").glob("*/report.html"))) == 4
        assert len(list((tmp_path / "out" / "named" / "reports").glob("*/report.html"))) == 4
        assert len(worklist["rows"]) == ledger.cases.by_state["reported"]
        absent = cluster.command("export", "no such sweep", "--out", str(tmp_path / "none"))
        assert absent.returncode == 2
        assert "there is no such sweep" in absent.stderr


def test_a_worklist_that_is_behind_its_sweep_is_exported_with_a_warning_and_exit_code_1(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FolderStore(finished / "store")
    (sweep_id,) = sweeps(store)
    ledger = sweep_ledger(store, sweep_id)
    assert ledger is not None
    assert is_current(store, ledger)
    behind = replace(ledger, reports=ledger.reports + 1)
    monkeypatch.setattr(following, "store_of", lambda out: store)
    monkeypatch.setattr(following, "WORKLIST_SECONDS", 0.5)
    monkeypatch.setattr("shared.records.ledger.sweep_ledger", lambda store, sweep_id: behind)

    with pytest.raises(typer.Exit) as ended:
        following.export(out=tmp_path / "out", sweep=sweep_id)

    assert ended.value.exit_code == 1
    assert "OLDER than the sweep" in capsys.readouterr().err
