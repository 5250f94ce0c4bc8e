"""The numbers of one figure as named columns: what is drawn, and what lies as CSV beside the drawing."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Cell = str | int | float | bool | None

FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")
"""A text that starts so would be computed by a spreadsheet that opens the CSV."""


@dataclass(frozen=True, kw_only=True)
class FigureData:
    """Columns of one length; `absent` says in words why there is nothing to draw."""

    columns: Mapping[str, tuple[Cell, ...]] = field(default_factory=dict)
    absent: str = ""

    def __post_init__(self) -> None:
        if len({len(column) for column in self.columns.values()}) > 1:
            raise ValueError("the columns of a figure must be of one length")

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Cell]]) -> FigureData:
        """Columns from rows that all have the same names; at least one row."""
        return cls(columns={name: tuple(row[name] for row in rows) for name in rows[0]})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column as numbers (n,), nan where it is empty."""
        return np.array([np.nan if cell is None else float(cell) for cell in self.columns[name]], dtype=np.float64)

    def texts(self, name: str) -> tuple[str, ...]:
        """A column as texts."""
        return tuple("" if cell is None else str(cell) for cell in self.columns[name])

    def flags(self, name: str) -> NDArray[np.bool_]:
        """A column of yes and no (n,)."""
        return np.array([bool(cell) for cell in self.columns[name]], dtype=np.bool_)

    def distinct(self, name: str) -> tuple[str, ...]:
        """The different texts of a column in order of appearance."""
        return tuple(dict.fromkeys(self.texts(name)))

    def where(self, **values: Cell) -> FigureData:
        """The rows in which every named column has the given value."""
        rows = [
            place
            for place in range(len(self))
            if all(self.columns[name][place] == cell for name, cell in values.items())
        ]
        return FigureData(
            columns={name: tuple(column[place] for place in rows) for name, column in self.columns.items()}
        )

    def csv(self) -> str:
        """As CSV with a header; floats with all their digits, an empty cell for nothing, lines end in a newline."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(csv_cell(name) for name in self.columns)
        for place in range(len(self)):
            writer.writerow(csv_cell(column[place]) for column in self.columns.values())
        return text.getvalue()


def csv_cell(cell: Cell) -> str:
    """One cell as text; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, str):
        return "'" + cell if cell.startswith(FORMULA_SIGNS) else cell
    return repr(cell)
