"""What holds for a command: the settings that its user chose, and the store that it is about."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from services.settings import Settings
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.settings import Loaded, load_settings

SETTINGS_VARIABLE = "FRACTURE_SWEEP_SETTINGS"


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


def embedded_settings() -> Settings:
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


def store_of(out: Path | None) -> Any:
    """The store of an embedded run's folder, or the distributed system's."""
    if out is None:
        from services.distributed import open_store

        return open_store(chosen.settings)
    from services.composition import restricted
    from shared.pipeline.folder_store import FolderStore

    if not (out / "store").is_dir():
        raise FractureSweepError(f"{out} holds no store: give the folder that `fracture-sweep run` wrote to")
    return restricted(FolderStore(out / "store"), embedded_settings())


OutOption = Annotated[
    Path | None, typer.Option("--out", help="The folder of a `run` (default: the distributed system's store).")
]
