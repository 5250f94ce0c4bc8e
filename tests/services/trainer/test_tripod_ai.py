"""The TRIPOD+AI checklist of a run."""

from __future__ import annotations

import csv
import io

import pytest

from services.trainer.tripod_ai import OPEN, checklist, checklist_csv, checklist_markdown, count_sentence
from tests.fixtures.run_results import HOSTILE, VARIANTS, full_result, make_result

FOR_A_PERSON = {"2", "3a", "3b", "3c", "5b", "6c", "8b", "8c", "18a", "18b", "18c", "18d", "18e", "19", "25"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_are_27_items_and_52_subitems_in_every_run(variant: str) -> None:
    items = checklist(VARIANTS[variant]())

    numbers = [item.number for item in items]
    assert len(set(numbers)) == 52
    assert sorted({int(number.rstrip("abcdefg")) for number in numbers}) == list(range(1, 28))
    assert {item.number for item in items if item.state == "open"} >= FOR_A_PERSON


def test_the_ethics_of_patients_stay_open_and_phantoms_need_none() -> None:
    of_patients = {item.number: item for item in checklist(make_result(patients=40, phantom=False))}
    of_phantoms = {item.number: item for item in checklist(make_result(patients=40))}

    assert of_patients["17"].state == "open"
    assert of_phantoms["17"].state == "filled"


def test_the_run_fills_in_what_it_knows() -> None:
    items = {item.number: item for item in checklist(full_result())}

    assert "292 patients, 402 vertebrae, 227 acute" in items["12a"].answer
    assert "1,648 hand-crafted features" in items["9a"].answer
    assert "ab" * 32 in items["12g"].answer
    assert "-250 to 1250 HU" in items["7"].answer


def test_without_held_out_patients_the_comparison_stays_open_and_the_limit_is_named() -> None:
    items = {item.number: item for item in checklist(VARIANTS["no test part, perturbed masks"]())}

    assert items["20c"].state == "open"
    assert "no rows were held out" in items["26"].answer
    assert "out-of-fold training rows" in items["23a"].answer


def test_the_csv_has_a_row_for_each_subitem_and_the_count_agrees() -> None:
    items = checklist(full_result())

    rows = list(csv.DictReader(io.StringIO(checklist_csv(items))))

    waiting = [row for row in rows if row["what the run knows"] == OPEN]
    assert len(rows) == 52
    assert all(row["state"] == "open" for row in waiting)
    assert f"and {len(waiting)} are open" in count_sentence(items)


def test_markdown_is_a_table_that_no_text_of_the_run_breaks() -> None:
    text = checklist_markdown(checklist(make_result(patients=40, title="a | b\n" + HOSTILE)))

    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 52
    assert all(len(line.replace("\\|", "").split("|")) == 7 for line in table)
    assert "<script" not in text.replace("\\<", "")
