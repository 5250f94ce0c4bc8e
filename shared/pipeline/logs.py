"""Log lines: one JSON object each on standard error, or short text where a person looks on.

Libraries log what they hold, and ours hold DICOM: they are kept at WARNING, and of those that quote datasets even the
warnings lose their text (pydicom quotes the value that it finds odd; pynetdicom quotes a query's identifiers). Where
it happened is kept, so that the line can still be looked up.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from shared.pipeline.worker import places

QUIET: Final = (
    "dicomweb_client",
    "highdicom",
    "matplotlib",
    "minio",
    "pika",
    "PIL",
    "py.warnings",
    "pydicom",
    "pynetdicom",
    "radiomics",
    "urllib3",
)
"""Third-party loggers that are heard from WARNING on."""

WITHHELD: Final = ("dicomweb_client", "highdicom", "py.warnings", "pydicom", "pynetdicom", "radiomics")
"""Loggers whose texts may quote a dataset: place and level are kept, the text is not."""


def configure(
    *, level: str = "INFO", service: str = "", stream: TextIO | None = None, pretty: bool | None = None
) -> None:
    """Send all logging of this process to one stream (standard error), replacing what was configured before.

    `pretty` True writes text for a person, False JSON, None text where the stream is a terminal.
    """
    target = sys.stderr if stream is None else stream
    for_a_person = target.isatty() if pretty is None else pretty
    handler = logging.StreamHandler(target)
    handler.setFormatter(PrettyFormatter() if for_a_person else JsonFormatter(service=service))
    handler.addFilter(third_party_only_warns)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # pika tells each failed connection in seven lines; the broker tells it in one.
    logging.getLogger("pika").setLevel(logging.CRITICAL)


def third_party_only_warns(record: logging.LogRecord) -> bool:
    """Whether a line passes: third-party ones from WARNING on, whatever level a library gave its own loggers."""
    return record.levelno >= logging.WARNING or not _is_below(record.name, QUIET)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, service, logger, message, and the fields bound to it."""

    def __init__(self, *, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line; fields named like one of its own do not replace it."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": text_of(record),
        }
        line |= {name: value for name, value in fields_of(record).items() if name not in line}
        return json.dumps({name: value for name, value in line.items() if value != ""}, default=str)


class PrettyFormatter(logging.Formatter):
    """Time, level and message, the fields behind it, for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields = " ".join(f"{name}={value}" for name, value in fields_of(record).items() if name != "traceback")
        line = f"{time} {record.levelname.lower():7} {text_of(record)}"
        return f"{line}  {fields}" if fields else line


def text_of(record: logging.LogRecord) -> str:
    """A record's message, or where it came from when its text is withheld."""
    if _is_below(record.name, WITHHELD):
        place = f"{record.module}:{record.lineno} {record.funcName}"
        return f"a message of {record.name} ({place}), withheld since it may name a patient"
    return record.getMessage()


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """The fields given by `extra={"fields": {...}}`, and of an exception its type and place, never its text."""
    fields: dict[str, Any] = dict(getattr(record, "fields", {}))
    if record.exc_info and record.exc_info[1] is not None:
        fields["exception"] = places(record.exc_info[1])
    return fields


def _is_below(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)
