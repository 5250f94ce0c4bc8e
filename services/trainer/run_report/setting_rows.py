"""Every setting of a run as one flat list, with what it means and whether it differs from its preset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from services.trainer.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """One setting; `preset` is its value in the preset where that is another, else ""."""

    name: str
    value: str
    preset: str
    means: str


def setting_rows(settings: TrainingSettings) -> tuple[SettingRow, ...]:
    """All settings, nested names joined by dots; of a file its name alone, so that no path of a machine is told."""
    usual = dict(_flat(TrainingSettings.of(settings.preset), ""))
    means = dict(_descriptions(TrainingSettings, ""))
    return tuple(
        SettingRow(
            name=name,
            value=_words(value),
            preset="" if value == usual[name] else _words(usual[name]),
            means=means[name],
        )
        for name, value in _flat(settings, "")
    )


def _flat(section: BaseModel, above: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        rows += _flat(value, f"{above}{name}.") if isinstance(value, BaseModel) else [(above + name, value)]
    return rows


def _descriptions(section: type[BaseModel], above: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, field in section.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, BaseModel):
            rows += _descriptions(below, f"{above}{name}.")
        else:
            rows.append((above + name, field.description or ""))
    return rows


def _words(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Path):
        return value.name
    if isinstance(value, (tuple, list)):
        return ", ".join(_words(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
