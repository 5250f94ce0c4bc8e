"""The rows of a CSV that people write: its header is judged first, then each row is a line with its values by column.

Comma-separated, fields with commas quoted, blank lines left out. Faults are sentences with their line, so that all of
a file can be told together.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

PAIR_COLUMNS: Final = (
    "image",
    "mask",
    "labels",
    "roi",
    "body",
    "body_labels",
    "levels",
    "study",
    "patient",
    "age",
    "sex",
)
"""Those of the CSV of pairs (docs/masks.md); a cohort file has them too, and more."""


@dataclass(frozen=True, kw_only=True)
class CsvRow:
    """One row: the line where it ends, and its values by column (stripped; '' where a row is short)."""

    line: int
    values: Mapping[str, str]


@dataclass(frozen=True, order=True)
class RowFault:
    """What is wrong in a line (0: with the whole file); `column` may be ''."""

    line: int
    column: str
    text: str

    def __str__(self) -> str:
        if not self.line:
            return self.text
        return f"line {self.line}, {self.column}: {self.text}" if self.column else f"line {self.line}: {self.text}"


def read_rows(
    text: str, *, columns: Sequence[str], required: Sequence[str], what: str
) -> tuple[tuple[CsvRow, ...], tuple[RowFault, ...]]:
    """The rows of a CSV's text, and its faults; no rows where the header is at fault. `what` names the kind of file."""
    if "\0" in text:
        return (), (RowFault(0, "", f"it holds binary data: this is no {what}"),)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            rows.append((reader.line_num, row))
    except csv.Error:
        return (), (RowFault(reader.line_num, "", "a quote is not closed or stands in the wrong place"),)
    rows = [(line, [cell.strip() for cell in row]) for line, row in rows if any(cell.strip() for cell in row)]
    if not rows:
        return (), (RowFault(0, "", f"it is empty: a {what} has a header line and one row an image"),)
    header = rows[0][1]
    faults = _header_faults(header, columns=columns, required=required)
    if faults:
        return (), tuple(faults)
    if len(rows) == 1:
        return (), (RowFault(0, "", "it has a header and no rows"),)
    read: list[CsvRow] = []
    for line, cells in rows[1:]:
        if len(cells) > len(header):
            count = f"{len(cells)} fields, the header has {len(header)} (quote fields with commas)"
            faults.append(RowFault(line, "", count))
            continue
        values = dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True))
        read.append(CsvRow(line=line, values=values))
    return tuple(read), tuple(faults)


def _header_faults(header: list[str], *, columns: Sequence[str], required: Sequence[str]) -> list[RowFault]:
    if len(header) == 1 and any(mark in header[0] for mark in ("\t", ";")):
        return [RowFault(1, "", "the fields must be separated by commas (not by tabs or semicolons)")]
    faults = []
    for name in header:
        if name in columns:
            continue
        near = difflib.get_close_matches(name.lower(), columns, n=1, cutoff=0.6)
        hint = f": did you mean {near[0]!r}?" if near else f" (known: {', '.join(columns)})"
        faults.append(f"unknown column {name!r}{hint}" if name else "a column without a name")
    faults.extend(f"column {name!r} stands twice" for name in columns if header.count(name) > 1)
    faults.extend(f"column {name!r} is missing" for name in required if name not in header)
    return [RowFault(1, "", fault) for fault in faults]
