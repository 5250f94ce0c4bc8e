"""Sweep, collect everything that can be made again, sweep again: the numbers of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.retention import ages_of
from services.trainer.tiny_bundle import write_tiny_bundle
from shared.fracture.ledger import Ledger
from shared.records.garbage import Collected, collect, decisions
from shared.records.ledger import sweep_ledger, sweeps
from tests.fixtures.runs import ENCRYPTION_KEY, PSEUDONYM_KEY, Place, place

ROOT = Path(__file__).resolve().parents[2]
LATER = timedelta(days=400)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, phantom_archive: Path) -> Path:
    """A store with one sweep that is over. Copy it."""
    folder = tmp_path_factory.mktemp("swept") / "store"
    place(folder, tiny_bundle).run(phantom_archive)
    return folder


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    """A copy of that store of the test's own."""
    shutil.copytree(swept, tmp_path / "out" / "store")
    return tmp_path / "out" / "store"


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with another network."""
    folder = tmp_path_factory.mktemp("bundle") / "other"
    write_tiny_bundle(folder, image_types="original", network_seed=9)
    return folder


def collected(here: Place) -> Collected:
    """What a collector under the place's settings deletes 400 days from now."""
    now = datetime.now(UTC) + LATER
    return collect(here.store, decisions(here.store, ages=ages_of(here.settings.retention), now=now))


def only_ledger(here: Place) -> Ledger:
    (sweep_id,) = sweeps(here.store)
    ledger = sweep_ledger(here.store, sweep_id)
    assert ledger is not None
    return ledger


DERIVED = {"retention__derived_days": "30", "retention__features_days": "30"}


def test_a_sweep_with_another_network_after_everything_derived_was_dropped_gives_the_same_numbers(
    swept: Path, folder: Path, tmp_path: Path, tiny_bundle: Path, other_bundle: Path, phantom_archive: Path
) -> None:
    shutil.copytree(swept, tmp_path / "undisturbed")
    undisturbed = place(tmp_path / "undisturbed", other_bundle)
    expected = undisturbed.run(phantom_archive)
    here = place(folder, tiny_bundle, **DERIVED)
    before = only_ledger(here)

    gone = [decision.key for decision in collected(here).deleted]

    assert gone
    assert not [key for key in here.store.keys("") if key.endswith(".nrrd") or key.startswith("features/")]
    assert only_ledger(here) == before

    ran = place(folder, other_bundle).run(phantom_archive)

    again, whole = here.objects("features/"), undisturbed.objects("features/")
    assert ran.ledger == expected.ledger
    assert ran.ledger.exact
    assert ran.ledger.pending == 0
    assert ran.ledger.cases.by_state["reported"] > 0
    assert again.items() <= whole.items()
    assert {key for key in whole if key not in again} <= set(gone)
    for prefix in ("outcomes/classified/", "cases/", "volumes/", "masks/", "reports/"):
        assert here.objects(prefix) == undisturbed.objects(prefix)
    assert not list(here.store.keys("dead-letters/"))


def test_the_same_sweep_after_everything_derived_was_dropped_computes_nothing(
    folder: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    here = place(folder, tiny_bundle, **DERIVED)
    before = only_ledger(here)
    collected(here)

    ran = here.run(phantom_archive)

    assert not ran.computed
    assert ran.ledger == before
    assert not list(here.store.keys("features/"))


def test_a_ledger_that_was_collected_is_gone_as_a_whole_and_a_new_sweep_begins_anew(
    folder: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    ages = {f"retention__{name}_days": "30" for name in ("derived", "features", "results", "ledger", "identities")}
    here = place(folder, tiny_bundle, **ages)
    before = only_ledger(here)

    collected(here)

    assert [key for key in here.store.keys("") if not key.startswith("site/")] == []
    assert here.run(phantom_archive).ledger == before


def gc(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "S3_"))}
    return subprocess.run(
        [sys.executable, "-m", "services", "gc", "--out", str(out), *arguments],
        cwd=ROOT,
        env={
            **own,
            "COLUMNS": "300",
            "FRACTURE_SWEEP_SECRETS_PSEUDONYM_KEY": PSEUDONYM_KEY,
            "FRACTURE_SWEEP_SECRETS_ENCRYPTION_KEY": ENCRYPTION_KEY,
            "FRACTURE_SWEEP_RETENTION_DERIVED_DAYS": "30",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_explains_before_it_deletes(folder: Path) -> None:
    ago = datetime.now(UTC).timestamp() - 40 * 24 * 3600
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (ago, ago))
    volume = next(path.relative_to(folder).as_posix() for path in sorted(folder.glob("volumes/*/*.nrrd")))

    dry = gc(folder.parent, "--dry-run")
    one = gc(folder.parent, "--explain", volume)
    plan = gc(folder.parent, "--explain", next(iter(sorted(folder.glob("plans/*/*/*")))).relative_to(folder).as_posix())
    nothing = gc(folder.parent, "--explain", "volumes/nothing")

    assert (dry.returncode, one.returncode, plan.returncode, nothing.returncode) == (0, 0, 0, 2)
    assert "older than retention.derived_days = 30; it is made again when its study is swept again" in dry.stdout
    assert "nothing was deleted" in dry.stdout
    assert "would be deleted: older than retention.derived_days = 30" in one.stdout
    assert "is kept: a ledger is computed from it" in plan.stdout
    assert "no object lies under this key" in nothing.stderr
    assert (folder / volume).is_file()

    done = gc(folder.parent, "--json")

    told = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert volume in told["deleted"]
    assert told["classes"]["derived"]["going"]["objects"] == len(told["deleted"])
    assert not list(folder.rglob("*.nrrd"))
    assert gc(folder.parent, "--json").stdout.count('"key"') == 0
