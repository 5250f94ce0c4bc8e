"""Settings from defaults, a TOML file, the environment, secret files and the command line, in rising order.

A wrong setting stops a nightly run before it begins, so all faults are found at once, and each says which setting,
where its value came from, what it was (unless secret) and what is allowed. A name that is a little wrong is a fault
too: a setting that silently keeps its default is worse than one that is refused.

The settings are a pydantic model whose fields are models again (sections) or plain values, without aliases. A field
`port` of the section `rabbitmq` is `rabbitmq.port` in the file and on the command line, and in the environment
`FRACTURE_SWEEP_RABBITMQ_PORT` or the name that it declares: `Field(json_schema_extra={"env": "RABBITMQ_PORT"})`; the
same name with `_FILE` behind it is a path to a file that holds the value. Nothing here reads `os.environ`: the entry
point hands its variables in.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, get_args, get_origin

import annotated_types
from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError

from shared.pipeline.errors import FractureSweepError

PREFIX: Final = "FRACTURE_SWEEP_"
HIDDEN: Final = "•••"
DEFAULT: Final = "default"

_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_[0-9]+_(TCP|UDP|SCTP)(_|$)|_PORT$")
"""What Kubernetes puts into each pod's environment for a Service whose name begins like our prefix."""

Model = TypeVar("Model", bound=BaseModel)


class SettingsError(FractureSweepError):
    """Settings that cannot be used. `faults` has one sentence each."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        head = "1 setting is wrong:" if len(self.faults) == 1 else f"{len(self.faults)} settings are wrong:"
        super().__init__("\n".join((head, *(f"  - {fault}" for fault in self.faults))))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting that a model has: its names, what it takes, and what it is for."""

    path: tuple[str, ...]
    env: str
    allowed: str
    doc: str
    secret: bool
    required: bool
    default: Any
    annotation: Any

    @property
    def name(self) -> str:
        """Its name in the file and on the command line: `section.name`."""
        return ".".join(self.path)


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[Model]):
    """Settings that hold, and where each came from (setting name → origin; `default` where nobody set it)."""

    values: Model
    origins: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """One line of `fracture-sweep settings`; a secret value is hidden."""

    setting: str
    value: str
    origin: str
    allowed: str
    doc: str
    env: str


@dataclass(frozen=True, kw_only=True)
class _Given:
    value: Any
    origin: str


# what a model has ----------------------------------------------------------------------------------------------------
def settings_of(model: type[BaseModel], *, prefix: str = PREFIX) -> tuple[Setting, ...]:
    """Every setting of a model, in its order; TypeError where two of them would share a name in the environment."""
    found = tuple(_settings(model, (), prefix))
    names: dict[str, str] = {}
    for setting in found:
        for name in (setting.env, setting.env + "_FILE"):
            if name in names:
                raise TypeError(f"the settings {names[name]} and {setting.name} share the variable {name}")
            names[name] = setting.name
    return found


def _settings(model: type[BaseModel], path: tuple[str, ...], prefix: str) -> list[Setting]:
    found = []
    for name, field in model.model_fields.items():
        here = (*path, name)
        section = _section(field.annotation)
        if section is not None:
            found += _settings(section, here, prefix)
            continue
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        found.append(
            Setting(
                path=here,
                env=str(extra.get("env", prefix + "_".join(here).upper())),
                allowed=str(extra.get("allowed", _allowed(field.annotation, field.metadata))),
                doc=" ".join((field.description or "").split()),
                secret=bool(extra.get("secret", _is_secret(field.annotation))),
                required=field.is_required(),
                default=None
                if field.is_required()
                else field.get_default(call_default_factory=True, validated_data={}),
                annotation=field.annotation,
            )
        )
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model of a section (also of one that may be absent: `Section | None`), or None for a plain value."""
    for part in _alternatives(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for part in get_args(annotation) if part is not type(None))
    return (annotation,)


def _may_be_none(annotation: Any) -> bool:
    return annotation is type(None) or type(None) in get_args(annotation)


def _is_secret(annotation: Any) -> bool:
    return any(part in (SecretStr, SecretBytes) for part in _alternatives(annotation))


def _is_list(annotation: Any) -> bool:
    return any((get_origin(part) or part) in (tuple, list, set, frozenset) for part in _alternatives(annotation))


def _is_table(annotation: Any) -> bool:
    return any((get_origin(part) or part) in (dict, Mapping) for part in _alternatives(annotation))


_WORDS: Final[Mapping[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    SecretStr: "text (secret)",
    SecretBytes: "bytes (secret)",
    datetime: "a date and time (ISO 8601)",
    date: "a date (ISO 8601)",
    timedelta: "a duration (seconds, or ISO 8601)",
}


def _allowed(annotation: Any, metadata: Sequence[Any]) -> str:
    words = " or ".join(dict.fromkeys(_words(part) for part in _alternatives(annotation)))
    limits = _limits(metadata)
    nothing = " (or nothing)" if _may_be_none(annotation) else ""
    return f"{words}{', ' + limits if limits else ''}{nothing}"


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(part) for part in parts)
    if origin is typing.Annotated:
        return _allowed(parts[0], parts[1:])
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    if origin in (tuple, list, set, frozenset):
        inner = [part for part in parts if part is not Ellipsis]
        if origin is tuple and Ellipsis not in parts:
            return f"{len(inner)} values separated by commas: " + ", ".join(_words(part) for part in inner)
        return "a list separated by commas, each " + (_words(inner[0]) if inner else "text")
    if origin in (dict, Mapping):
        return "a table (as JSON in a variable)"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limits(metadata: Sequence[Any]) -> str:
    said = []
    for item in metadata:
        for limit in item if isinstance(item, annotated_types.GroupedMetadata) else (item,):
            match limit:
                case annotated_types.Ge(ge=value):
                    said.append(f"at least {value}")
                case annotated_types.Gt(gt=value):
                    said.append(f"more than {value}")
                case annotated_types.Le(le=value):
                    said.append(f"at most {value}")
                case annotated_types.Lt(lt=value):
                    said.append(f"less than {value}")
                case annotated_types.MinLen(min_length=value):
                    said.append("not empty" if value == 1 else f"of length {value} or more")
                case annotated_types.MaxLen(max_length=value):
                    said.append(f"of length {value} or less")
                case annotated_types.MultipleOf(multiple_of=value):
                    said.append(f"a multiple of {value}")
                case _:
                    pattern = getattr(limit, "pattern", None)
                    said += [f"matching {getattr(pattern, 'pattern', pattern)}"] if pattern else []
    return ", ".join(said)


# loading -------------------------------------------------------------------------------------------------------------
def load_settings(
    model: type[Model],
    *,
    environ: Mapping[str, str],
    file: Path | None,
    overrides: Mapping[str, str],
    prefix: str = PREFIX,
    ignored_variables: Collection[str] = (),
) -> Loaded[Model]:
    """The settings that hold, and where each came from; SettingsError with every fault.

    `overrides` come from the command line (setting name → text). An empty variable is as good as none, since compose
    files and manifests leave such behind; an empty override is a value. `ignored_variables` begin with the prefix and
    are no settings (the entry point reads them itself).
    """
    settings = settings_of(model, prefix=prefix)
    faults: list[str] = []
    given: dict[str, _Given] = {}
    if file is not None:
        given |= _from_file(model, file, settings, faults)
    given |= _from_environment(environ, settings, faults, prefix=prefix, ignored=ignored_variables)
    given |= _from_overrides(overrides, settings, faults)

    raw = _empty_sections(model)
    by_name = {setting.name: setting for setting in settings}
    refused = set()
    for name, one in given.items():
        fault = _misfit(by_name[name], one)
        if fault:
            faults.append(fault)
            refused.add(name)
        else:
            _put_in(raw, by_name[name].path, one.value)

    values: Model | None = None
    try:
        values = model.model_validate(raw)
    except ValidationError as error:
        faults += _explain(error, settings, given, refused)
    if faults or values is None:
        raise SettingsError(tuple(dict.fromkeys(faults)))
    origins = {setting.name: given[setting.name].origin if setting.name in given else DEFAULT for setting in settings}
    return Loaded(values=values, origins=origins)


def _from_file(model: type[BaseModel], file: Path, settings: Sequence[Setting], faults: list[str]) -> dict[str, _Given]:
    try:
        table = tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        faults.append(f"the settings file {file} cannot be read: {error.strerror or type(error).__name__}")
        return {}
    except UnicodeDecodeError:
        faults.append(f"the settings file {file} is not UTF-8 text")
        return {}
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        faults.append(f"the settings file {file} is not TOML: {error}")
        return {}
    given: dict[str, _Given] = {}
    sections = {setting.path[:depth] for setting in settings for depth in range(1, len(setting.path))}
    by_path = {setting.path: setting for setting in settings}
    known = [setting.name for setting in settings] + [".".join(section) for section in sections]

    def walk(table: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for key, value in table.items():
            here = (*path, key)
            name = ".".join(here)
            if here in by_path:
                given[name] = _Given(value=value, origin=f"{file}: {name}")
            elif here not in sections:
                faults.append(f"{name} ({file}): there is no such setting{_did_you_mean(name, known)}")
            elif isinstance(value, dict):
                walk(value, here)
            else:
                faults.append(f"{name} ({file}): this is a section, write [{name}] and its settings below")

    walk(table, ())
    return given


def _from_environment(
    environ: Mapping[str, str],
    settings: Sequence[Setting],
    faults: list[str],
    *,
    prefix: str,
    ignored: Collection[str],
) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    known = {name for setting in settings for name in (setting.env, setting.env + "_FILE")} | set(ignored)
    meant = {name.removeprefix(prefix): name for name in known}
    meant |= {"_".join(setting.path).upper(): setting.env for setting in settings}
    for name in sorted(environ):
        if name.upper().startswith(prefix) and name not in known and not _SERVICE_LINK.search(name):
            close = _did_you_mean(name.upper().removeprefix(prefix), meant)
            faults.append(f"{name} (environment): there is no such setting{close}")
    for setting in settings:
        text, path = environ.get(setting.env, ""), environ.get(setting.env + "_FILE", "")
        if text and path:
            faults.append(f"{setting.name}: both {setting.env} and {setting.env}_FILE are set; keep one of them")
        elif path:
            content = _secret_text(setting, Path(path), faults)
            if content is not None:
                given[setting.name] = _Given(
                    value=_parsed(content, setting), origin=f"file {path} (environment {setting.env}_FILE)"
                )
        elif text:
            given[setting.name] = _Given(value=_parsed(text, setting), origin=f"environment {setting.env}")
    return given


def _secret_text(setting: Setting, path: Path, faults: list[str]) -> str | None:
    where = f"{setting.name} (environment {setting.env}_FILE = {path})"
    try:
        return path.read_bytes().decode().rstrip("\r\n")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else None
        faults.append(f"{where}: the file cannot be read: {why or 'it is not UTF-8 text'}")
        return None


def _from_overrides(overrides: Mapping[str, str], settings: Sequence[Setting], faults: list[str]) -> dict[str, _Given]:
    by_name = {setting.name: setting for setting in settings}
    given: dict[str, _Given] = {}
    for name, text in overrides.items():
        if name in by_name:
            given[name] = _Given(value=_parsed(text, by_name[name]), origin="command line")
        else:
            faults.append(f"{name} (command line): there is no such setting{_did_you_mean(name, list(by_name))}")
    return given


def _parsed(text: str, setting: Setting) -> Any:
    """A text as pydantic takes it: lists from commas or JSON, tables from JSON, nothing from an empty one."""
    annotation = setting.annotation
    if text == "" and _may_be_none(annotation):
        return None
    if _is_list(annotation) or _is_table(annotation):
        stripped = text.strip()
        if stripped[:1] in ("[", "{"):
            try:
                return json.loads(stripped)
            except (ValueError, RecursionError):
                return text
        if _is_list(annotation):
            return [part.strip() for part in text.split(",")] if stripped else []
    if any(part in (int, float, bool) for part in _alternatives(annotation)):
        return text.strip()
    return text


def _misfit(setting: Setting, given: _Given) -> str | None:
    """What pydantic would let pass: `true` where a number stands, infinity and not-a-number."""
    kinds = _alternatives(setting.annotation)
    value = given.value
    if isinstance(value, bool) and bool not in kinds and any(kind in (int, float) for kind in kinds):
        return _fault(setting, given)
    if float in kinds and isinstance(value, str | float):
        try:
            finite = math.isfinite(float(value))
        except ValueError:
            return None
        return None if finite else _fault(setting, given)
    return None


def _empty_sections(model: type[BaseModel]) -> dict[str, Any]:
    """Every section that is always there, so that its own defaults hold where nothing of it is given."""
    sections = ((name, field.annotation) for name, field in model.model_fields.items())
    return {
        name: _empty_sections(section)
        for name, annotation in sections
        if (section := _section(annotation)) is not None and not _may_be_none(annotation)
    }


def _put_in(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        raw = raw.setdefault(part, {})
    raw[path[-1]] = value


def _fault(setting: Setting, given: _Given, more: str = "") -> str:
    if isinstance(given.value, str) and re.match(r"(tcp|udp|sctp)://[0-9]", given.value):
        more += "; Kubernetes sets this for a Service of that name: write enableServiceLinks: false in the pod"
    said = f"{setting.name} = {HIDDEN if setting.secret else _shown_input(given.value)} ({given.origin})"
    return f"{said}: allowed is {setting.allowed}{more}"


def _shown_input(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _explain(
    error: ValidationError, settings: Sequence[Setting], given: Mapping[str, _Given], refused: Collection[str]
) -> list[str]:
    by_path = {setting.path: setting for setting in settings}
    faults = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        place = tuple(str(part) for part in one["loc"])
        setting = next((by_path[place[:n]] for n in range(len(place), 0, -1) if place[:n] in by_path), None)
        message = re.sub(r"^(Value error|Assertion failed), ", "", one["msg"])
        if setting is None:
            faults += _explain_section(place, one["type"], message, settings)
        elif setting.name in given:
            own_words = one["type"] in ("value_error", "assertion_error") and not setting.secret
            faults.append(_fault(setting, given[setting.name], f" ({message})" if own_words else ""))
        elif setting.name not in refused:
            faults.append(_missing(setting) if one["type"] == "missing" else f"{setting.name} (default): {message}")
    return faults


def _explain_section(place: tuple[str, ...], kind: str, message: str, settings: Sequence[Setting]) -> list[str]:
    if kind == "missing":
        return [_missing(setting) for setting in settings if setting.path[: len(place)] == place and setting.required]
    return [f"{'.'.join(place)}: {message}" if place else message]


def _missing(setting: Setting) -> str:
    names = f"set {setting.env}" + (f" or {setting.env}_FILE" if setting.secret else "")
    return f"{setting.name} is needed and not set: {names}, or {setting.name} in the settings file ({setting.allowed})"


def _did_you_mean(name: str, known: Sequence[str] | Mapping[str, str]) -> str:
    """The nearest known name (of a mapping: what it stands for), as the end of a fault."""
    names = known if isinstance(known, Mapping) else {one: one for one in known}
    folded = {one.casefold(): meant for one, meant in names.items()}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)
    return f"; did you mean {folded[close[0]]}?" if close else ""


# showing -------------------------------------------------------------------------------------------------------------
def describe(loaded: Loaded[Any], *, prefix: str = PREFIX) -> list[SettingRow]:
    """What holds and where it came from, a row a setting; secrets hidden."""
    rows = []
    for setting in settings_of(type(loaded.values), prefix=prefix):
        value: Any = loaded.values
        for part in setting.path:
            value = getattr(value, part, None)
        rows.append(
            SettingRow(
                setting=setting.name,
                value=shown(value, secret=setting.secret),
                origin=loaded.origins[setting.name],
                allowed=setting.allowed,
                doc=setting.doc,
                env=setting.env,
            )
        )
    return rows


def shown(value: Any, *, secret: bool) -> str:
    """A value for people: nothing as an empty text, lists with commas, a secret as dots (an empty one as nothing)."""
    if secret:
        bare = value.get_secret_value() if isinstance(value, SecretStr | SecretBytes) else value
        return HIDDEN if bare else ""
    match value:
        case None:
            return ""
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
        case tuple() | list():
            return ", ".join(shown(one, secret=False) for one in value)
        case set() | frozenset():
            return ", ".join(sorted(shown(one, secret=False) for one in value))
        case dict():
            return json.dumps(value, default=str)
        case _:
            return str(value)


def markdown_table(model: type[BaseModel], *, prefix: str = PREFIX) -> str:
    """The settings of a model as a table for the documentation."""
    lines = ["| setting | variable | default | allowed | what for |", "| --- | --- | --- | --- | --- |"]
    for setting in settings_of(model, prefix=prefix):
        default = "(needed)" if setting.required else shown(setting.default, secret=setting.secret)
        cells = (
            f"`{setting.name}`",
            f"`{setting.env}`",
            f"`{default}`" if default else "",
            setting.allowed,
            setting.doc,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
