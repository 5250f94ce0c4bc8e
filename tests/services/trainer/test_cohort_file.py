from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.cohort_file import (
    COLUMNS,
    TEMPLATE,
    CohortError,
    CohortRow,
    FilesJudged,
    parse_cohort,
    read_cohort,
)
from services.trainer.settings import TrainingSettings
from shared.fracture.csv_rows import CsvRow, RowFault

FEW: dict[str, Any] = {
    "selection": {"folds": 2},
    "classifiers": {"folds": 2, "out_of_fold": 2, "conformal_alpha": 0.45},
    "repeatability": {"method": "none"},
    "split": {"test_share": 0.4},
}


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings.of("recommended", {**FEW, **changes})


def files(rows: Sequence[CsvRow]) -> FilesJudged:
    """Every file is there, and each text names its own."""
    return FilesJudged(images={row.line: row.values.get("image", "") for row in rows})


def cohort(*changes: dict[str, str], count: int = 12, without: Sequence[str] = ()) -> str:
    """A good cohort of `count` patients, then one row for each of `changes` (of a patient of its own)."""
    rows = []
    for number in range(count + len(changes)):
        row = {
            "image": f"{number}.nii",
            "mask": f"m{number}.nii",
            "levels": "L1",
            "study": f"S{number}",
            "patient": f"P{number}",
            "age": "70",
            "sex": "F",
            "acute": str(number % 2),
            "site": "A" if number % 3 else "B",
            "split": "test" if number % 4 < 2 else "train",
            "mask2": "",
            "mask3": "",
        }
        rows.append({**row, **(changes[number - count] if number >= count else {})})
    header = [name for name in rows[0] if name not in without]
    return "\n".join([",".join(header), *(",".join(row[name] for name in header) for row in rows)]) + "\n"


def faults(text: str, **changes: Any) -> tuple[str, ...]:
    with pytest.raises(CohortError) as caught:
        parse_cohort(text, settings=settings(**changes), judge_files=files)
    return caught.value.faults


def test_a_row_holds_what_the_trainer_needs() -> None:
    changed = {"age": "93", "sex": "M", "acute": "1", "levels": "T12", "site": "", "split": "train"}

    rows = parse_cohort(cohort(changed), settings=settings(), judge_files=files)

    last = rows[-1]
    assert isinstance(last, CohortRow)
    assert (last.level, last.patient, last.study, last.acute) == ("T12", "P12", "S12", True)
    assert (last.age, last.sex, last.site, last.split, last.line) == (90, "M", "", "train", 14)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"acute": "2"}, "line 14, acute: '2' is neither 1 (acute) nor 0 (chronic)"),
        ({"acute": ""}, "line 14, acute: is empty: say 1 (acute) or 0 (chronic)"),
        ({"age": "121"}, "line 14, age: '121' is no age in whole years from 0 to 120"),
        ({"age": "-3"}, "line 14, age: '-3' is no age in whole years from 0 to 120"),
        ({"age": ""}, "line 14, age: is empty: the nomogram needs it"),
        ({"sex": "f"}, "line 14, sex: 'f' is neither F nor M"),
        ({"sex": ""}, "line 14, sex: is empty: the nomogram needs it"),
        ({"levels": "L7"}, "line 14, levels: 'L7' is no level (C1…C7, T1…T13, L1…L6, S1)"),
        ({"levels": "L1;L2"}, "line 14, levels: 'L1;L2' names several: one row is one vertebra"),
        ({"levels": ""}, "line 14, levels: is empty: one row is one vertebra, say which"),
        ({"patient": ""}, "line 14, patient: is empty: training and test are split by patient"),
        ({"split": "both"}, "line 14, split: 'both' is neither train nor test"),
        ({"patient": "P0", "sex": "M"}, "line 14, sex: differs from line 2, the same patient"),
        ({"study": "S0"}, "line 14, study: belongs to another patient in line 2"),
        (
            {"image": "0.nii", "levels": "L2", "study": "S0"},
            "line 14, patient: differs from line 2, which names the same",
        ),
        (
            {"image": "0.nii", "patient": "P0", "study": "S0"},
            "line 14, levels: L1 of this image stands in line 2 already",
        ),
        (
            {"patient": "P0", "split": "train"},
            "line 14, split: the patient is test in line 2: a patient lies in both splits",
        ),
    ],
)
def test_a_fault_of_a_row_has_its_line_and_column(change: dict[str, str], sentence: str) -> None:
    found = faults(cohort(change))

    assert any(fault.startswith(sentence) for fault in found), found


def test_all_faults_are_told_together_in_the_order_of_their_lines() -> None:
    def judge(rows: Sequence[CsvRow]) -> FilesJudged:
        return FilesJudged(images={}, faults=(RowFault(3, "mask", "'m1.nii' does not exist"),))

    with pytest.raises(CohortError) as caught:
        parse_cohort(cohort({"age": "x", "sex": "y"}, {"acute": "z"}), settings=settings(), judge_files=judge)

    assert caught.value.faults == (
        "line 3, mask: 'm1.nii' does not exist",
        "line 14, age: 'x' is no age in whole years from 0 to 120",
        "line 14, sex: 'y' is neither F nor M",
        "line 15, acute: 'z' is neither 1 (acute) nor 0 (chronic)",
    )
    assert str(caught.value).startswith("the cohort file has 4 faults:\n  line 3, mask")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "it is empty: a cohort file has a header line and one row an image"),
        ("image,mask,patient,age,sex,acute,levels\n", "it has a header and no rows"),
        ("image;mask;patient\n", "line 1: the fields must be separated by commas (not by tabs or semicolons)"),
        ("image,mask,patient,age,sex,levels\na,b,c,1,F,L1\n", "line 1: column 'acute' is missing"),
        ("image,mask,patient,age,sex,acut\na,b,c,1,F,1\n", "line 1: unknown column 'acut': did you mean 'acute'?"),
        ("image,mask,patient,age,sex,acute\na,b,c,1,F,1\n", "line 1: column 'levels' is missing"),
        (
            "image,mask,patient,age,sex,acute,level,levels\na,b,c,1,F,1,L1,L1\n",
            "line 1: columns 'level' and 'levels' mean the same: leave one out",
        ),
        ('image,mask\n"a,b\n', "line 2: a quote is not closed or stands in the wrong place"),
        ("image\0", "it holds binary data: this is no cohort file"),
    ],
)
def test_a_file_that_is_no_cohort_file_is_told_what_it_lacks(text: str, sentence: str) -> None:
    assert sentence in faults(text)


def test_one_class_alone_is_refused() -> None:
    text = cohort().replace(",0,A", ",1,A").replace(",0,B", ",1,B")

    assert faults(text) == ("one class alone: the cohort needs acute and chronic vertebrae, all 12 rows are acute",)


def test_fewer_patients_than_folds_are_refused_step_by_step() -> None:
    many = {"selection": {"folds": 10}, "classifiers": {"folds": 5, "out_of_fold": 8, "conformal_alpha": 0.1}}

    found = faults(cohort(), **many)

    has = "the training part has 4"
    of_each_class = [
        (
            f"too few patients with {word} fractures: the classifiers' folds (classifiers.folds) need 5, {has}",
            f"too few patients with {word} fractures: the out-of-fold scores (classifiers.out_of_fold) need 8, {has}",
            f"too few {word} vertebrae: the limits of the prediction sets (classifiers.conformal_alpha) need 9, {has}",
        )
        for word in ("acute", "chronic")
    ]
    assert set(found) == {
        "too few patients: the LASSO's folds (selection.folds) need 10, the training part has 8",
        *of_each_class[0],
        *of_each_class[1],
    }


def test_the_folds_of_a_network_count_where_it_is_cross_fitted() -> None:
    crossfit = {"network": {"mode": "crossfit", "crossfit_folds": 9}}

    assert faults(cohort(), **crossfit) == tuple(
        f"too few patients with {word} fractures: the network's folds (network.crossfit_folds) need 9, "
        "the training part has 4"
        for word in ("acute", "chronic")
    )


@pytest.mark.parametrize(
    ("split", "without", "sentence"),
    [
        ({"by": "column"}, ("split",), "line 1: column 'split' is missing, and the settings split by it"),
        ({"by": "site", "test_site": "A"}, ("site",), "line 1: column 'site' is missing, and the settings split by it"),
        ({"by": "site"}, (), "split.test_site is not set"),
        ({"by": "site", "test_site": "C"}, (), "split.test_site is 'C', which no row has (there are: A, B)"),
    ],
)
def test_a_split_that_the_columns_do_not_give_is_refused(
    split: dict[str, str], without: tuple[str, ...], sentence: str
) -> None:
    assert any(fault.startswith(sentence) for fault in faults(cohort(without=without), split=split))


def test_a_row_without_the_column_that_splits_is_refused() -> None:
    text = cohort({"split": "", "site": ""})

    by_column, by_site = faults(text, split={"by": "column"}), faults(text, split={"by": "site", "test_site": "B"})

    assert by_column == ("line 14, split: is empty, and the settings split by this column",)
    assert by_site == ("line 14, site: is empty, and the settings split by it",)


def test_a_patient_of_two_sites_cannot_be_split_by_site() -> None:
    found = faults(cohort({"patient": "P0", "site": "A", "split": "test"}), split={"by": "site", "test_site": "B"})

    assert found == ("line 14, site: the patient is of the site that is held out in line 2",)


@pytest.mark.parametrize("column", ["mask2", "mask3"])
def test_too_few_repeated_masks_say_how_many_there_are(column: str) -> None:
    repeated = [{column: "again.nii", "split": "train"}] * 3
    other = [{column: "again.nii", "split": "test"}] * 9
    by_column = {"split": {"by": "column"}, "repeatability": {"method": "auto"}}

    found = faults(cohort(*repeated, *other), **by_column)

    assert found == (
        f"too few rows with {column}: repeatability needs 5 training rows, there are 3 (give more, or none)",
    )


def test_masks_that_the_settings_demand_and_nobody_gives_are_missed() -> None:
    found = faults(cohort(), repeatability={"method": "masks"})

    assert found == ("repeatability.method is masks: it needs 5 training rows with mask2 or mask3, there are 0",)


def test_an_external_validation_needs_both_classes_and_nothing_else() -> None:
    text = cohort(count=2, without=("split", "site"))

    rows = parse_cohort(text, settings=TrainingSettings(), judge_files=files, fitting=False)

    assert [row.acute for row in rows] == [False, True]


def test_the_template_is_read_by_the_parser_itself() -> None:
    rows = parse_cohort(TEMPLATE, settings=TrainingSettings(), judge_files=files, fitting=False)

    assert [(row.level, row.acute, row.split) for row in rows] == [("L1", True, "train"), ("T12", False, "test")]
    assert set(TEMPLATE.splitlines()[0].split(",")) == set(COLUMNS) - {"level"}


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.csv"
    latin.write_bytes("image,mask\nähre,b\n".encode("latin-1"))

    for path, sentence in ((tmp_path / "none.csv", "cannot be read"), (latin, "it is not UTF-8 text")):
        with pytest.raises(CohortError, match=sentence):
            read_cohort(path, settings=settings(), judge_files=files)


CELL = st.one_of(
    st.sampled_from(["", "1", "0", "F", "M", "L1", "T12", "70", "train", "test", "a.nii", "P1", "A", ";", '"', "é"]),
    st.text(max_size=4),
)
TABLE = st.lists(st.lists(CELL, min_size=1, max_size=len(COLUMNS)).map(",".join), max_size=8)


@given(
    header=st.one_of(st.just(",".join(name for name in COLUMNS if name != "level")), st.text(max_size=30)),
    lines=TABLE,
    fitting=st.booleans(),
    by=st.sampled_from(["random", "column", "site"]),
)
def test_any_text_is_a_table_or_faults(header: str, lines: list[str], fitting: bool, by: str) -> None:
    text = "\n".join([header, *lines])
    chosen = settings(split={"by": by, "test_site": "A"}, repeatability={"method": "auto"})

    try:
        rows = parse_cohort(text, settings=chosen, judge_files=files, fitting=fitting)
    except CohortError as error:
        told = error.faults
    else:
        told = ("none",)
        assert {row.acute for row in rows} == {True, False}
        assert all(0 <= row.age <= 90 and row.patient for row in rows)

    assert told
