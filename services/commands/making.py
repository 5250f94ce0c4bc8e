"""keys, secrets, prepare-store, settings: what is made or shown before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from services.commands.chosen import chosen
from services.commands.terminal import out_console
from shared.pipeline.settings import describe


def make_keys(folder: Annotated[Path, typer.Argument(help="Where the two key files go.")]) -> None:
    """Make a site's pseudonym key and encryption key, where they are not there yet. Back them up."""
    from shared.pipeline.secrets_files import make_secret_file

    for name in ("pseudonym.key", "encryption.key"):
        make_secret_file(folder / name)
        out_console.print(f"{folder / name}")


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


def prepare_store() -> None:
    """Make the bucket of the distributed store where it is not there, as a user who may."""
    from services.distributed import open_store, patiently

    settings = chosen.settings
    patiently(lambda: open_store(settings), seconds=settings.worker.start_seconds)
    bucket = settings.s3.bucket if settings.s3 is not None else ""
    out_console.print(f"the bucket {bucket} is there, and the server keeps to conditional writes")


def show_settings() -> None:
    """Every setting: what holds, where it came from, what is allowed. Secrets are hidden."""
    table = Table("setting", "value", "from", "variable", "allowed", "what it is")
    for row in describe(chosen.loaded()):
        table.add_row(row.setting, row.value, row.origin, row.env, row.allowed, row.doc)
    out_console.print(table)
