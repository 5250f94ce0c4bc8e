"""What a user meets: help, one clear sentence for what goes wrong, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.__main__ import app

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "S3_"))}
    return subprocess.run(
        [sys.executable, "-m", "services", *arguments],
        cwd=ROOT,
        env={**own, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("run", "--help"),
        ("service", "--help"),
        ("submit", "--help"),
        ("status", "--help"),
        ("export", "--help"),
        ("dead-letters", "--help"),
        ("dead-letters", "replay", "--help"),
        ("phantoms", "archive", "--help"),
        ("phantoms", "cohort", "--help"),
        ("gc", "--help"),
        ("segment", "--help"),
        ("train-segmenter", "--help"),
        ("settings", "--help"),
    ],
)
def test_help_is_there_for_every_command(arguments: tuple[str, ...]) -> None:
    ran = CliRunner().invoke(app, arguments)

    assert ran.exit_code == 0
    assert "Usage:" in ran.output


@pytest.mark.parametrize(
    ("arguments", "environ", "sentence"),
    [
        (("run", "/not/there", "--out", "OUT"), {}, "/not/there is not there"),
        (("run", "README.md", "--out", "OUT"), {}, "neither a folder of DICOM nor a CSV"),
        (("run", "CSV", "--out", "OUT"), {}, "unknown column"),
        (("run", "docs", "--out", "OUT", "--labels", "x"), {"FRACTURE_SWEEP_BUNDLE_PATH": "/none"}, "bundle"),
        (("status", "--out", "/not/there"), {}, "holds no store"),
        (("status", "--watch", "--json", "--out", "OUT"), {}, "do not go together"),
        (("export", "--out", "OUT"), {}, "no store is named"),
        (("gc", "--out", "/not/there"), {}, "holds no store"),
        (("gc",), {"FRACTURE_SWEEP_RETENTION_DERIVED_DAYS": "0"}, "FRACTURE_SWEEP_RETENTION_DERIVED_DAYS"),
        (("service", "no-such-service"), {}, "no service is called"),
        (("service", "segmenter"), {}, "no store is named"),
        (("settings",), {"FRACTURE_SWEEP_WORKER_HEALTH_PORT": "many"}, "FRACTURE_SWEEP_WORKER_HEALTH_PORT"),
        (("settings",), {"FRACTURE_SWEEP_WORKER_HEALTH_POT": "1"}, "FRACTURE_SWEEP_WORKER_HEALTH_PORT"),
        (("--set", "nonsense", "settings"), {}, "NAME=VALUE"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_2(
    arguments: tuple[str, ...], environ: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("imag,mask\na,b\n")
    places = {"OUT": str(tmp_path / "out"), "CSV": str(table)}
    arguments = tuple(places.get(part, part) for part in arguments)

    ran = command(*arguments, HOME=str(tmp_path), **environ)

    assert ran.returncode == 2, ran.stderr
    assert sentence in ran.stderr
    assert "Traceback" not in ran.stderr + ran.stdout


def test_an_unreachable_broker_is_one_sentence_without_the_password(tmp_path: Path) -> None:
    ran = command(
        "dead-letters",
        "replay",
        "--all",
        RABBITMQ_HOST="127.0.0.1",
        RABBITMQ_PORT="9",
        RABBITMQ_USERNAME="someone",
        RABBITMQ_PASSWORD="sesame-open",
        S3_ENDPOINT="127.0.0.1:9",
        S3_ACCESS_KEY="someone",
        S3_SECRET_KEY="sesame-open",
        S3_SECURE="false",
        S3_RETRIES="0",
    )

    assert ran.returncode == 2, ran.stderr
    assert "127.0.0.1:9" in ran.stderr
    assert "sesame-open" not in ran.stderr + ran.stdout
    assert "Traceback" not in ran.stderr


def test_settings_show_where_they_come_from_and_hide_secrets(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("ab" * 32)

    ran = command("settings", FRACTURE_SWEEP_SECRETS_PSEUDONYM_KEY_FILE=str(secret), LOG_LEVEL="DEBUG", COLUMNS="400")

    assert ran.returncode == 0, ran.stderr
    assert "LOG_LEVEL" in ran.stdout
    assert "abab" not in ran.stdout
