"""Log lines: JSON with bound fields; of libraries that quote datasets no text."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from shared.pipeline.logs import configure

SECRET = "DOE^JANE"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = io.StringIO()
    configure(level="DEBUG", service="resampler", stream=stream, pretty=False)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:] = before
    root.setLevel(level)


def read(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_its_fields(lines: io.StringIO) -> None:
    logging.getLogger("fracture_sweep.worker").info("done", extra={"fields": {"case_id": "abc", "level": "mine"}})

    (line,) = read(lines)
    assert (line["level"], line["service"], line["message"], line["case_id"]) == ("INFO", "resampler", "done", "abc")
    assert line["time"].endswith("+00:00")


@pytest.mark.parametrize("name", ["pika.connection", "pynetdicom.acse", "urllib3", "pydicom"])
def test_libraries_are_heard_from_warning_on(lines: io.StringIO, name: str) -> None:
    logging.getLogger(name).setLevel(logging.DEBUG)

    logging.getLogger(name).info(SECRET)

    assert lines.getvalue() == ""


def test_of_libraries_that_quote_datasets_the_place_alone_is_kept(lines: io.StringIO) -> None:
    logging.getLogger("pydicom").warning("Invalid value %s", SECRET)
    warnings.warn(f"Invalid value {SECRET}", stacklevel=1)

    first, second = read(lines)
    assert SECRET not in lines.getvalue()
    assert "test_logs:" in first["message"]
    assert "withheld" in second["message"]


def test_of_an_exception_type_and_place_are_kept(lines: io.StringIO) -> None:
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("fracture_sweep").exception("failed")

    (line,) = read(lines)
    assert line["exception"].startswith("ValueError at ")
    assert SECRET not in lines.getvalue()


def test_a_person_reads_text(lines: io.StringIO) -> None:
    stream = io.StringIO()
    configure(stream=stream, pretty=True)

    logging.getLogger("fracture_sweep").warning("slow", extra={"fields": {"seconds": 3}})

    assert stream.getvalue().rstrip().endswith("warning slow  seconds=3")
