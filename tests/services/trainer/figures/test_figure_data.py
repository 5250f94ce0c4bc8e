"""The columns of a figure."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.figures.figure_data import FORMULA_SIGNS, FigureData

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12)


@given(st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), TEXTS), min_size=1, max_size=8))
def test_numbers_and_texts_come_back_from_the_csv(rows: list[tuple[float, str]]) -> None:
    data = FigureData(columns={"x": tuple(x for x, _ in rows), "name": tuple(name for _, name in rows)})

    read = list(csv.DictReader(io.StringIO(data.csv(), newline="")))

    assert [float(row["x"]) for row in read] == [x for x, _ in rows]
    assert [row["name"] for row in read] == ["'" * name.startswith(FORMULA_SIGNS) + name for _, name in rows]


def test_a_text_that_a_spreadsheet_would_compute_is_marked() -> None:
    data = FigureData(columns={"name": ('=HYPERLINK("x")', "plain"), "x": (-1.5, None)})

    lines = data.csv().splitlines()

    assert lines == ["name,x", '"\'=HYPERLINK(""x"")",-1.5', "plain,"]


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="of one length"):
        FigureData(columns={"x": (1.0, 2.0), "y": (1.0,)})


def test_rows_are_chosen_by_the_values_of_columns() -> None:
    data = FigureData(columns={"part": ("a", "b", "a"), "x": (1.0, 2.0, None), "kept": (True, True, False)})

    chosen = data.where(part="a")

    assert chosen.distinct("part") == ("a",)
    np.testing.assert_array_equal(chosen.numbers("x"), [1.0, np.nan])
    assert chosen.flags("kept").tolist() == [True, False]
