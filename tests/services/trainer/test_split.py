from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.settings import SplitSettings
from services.trainer.split import SplitError, check_disjoint, held_out, held_out_rows


@given(seed=st.integers(0, 10_000))
def test_no_patient_lies_on_both_sides(seed: int) -> None:
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, 60, size=90)
    acute = rng.integers(0, 2, size=90)

    test = held_out(patient, acute, seed=seed)

    assert not set(patient[test]) & set(patient[~test])


def test_a_fifth_of_the_patients_of_each_kind_is_held_out() -> None:
    patient, acute = np.arange(100), np.repeat([0, 1], 50)

    test = held_out(patient, acute, seed=1)

    assert test[:50].sum() == test[50:].sum() == 10


ROWS = {
    "patient": np.array([0, 0, 1, 2, 3]),
    "acute": np.array([1, 0, 1, 0, 1]),
    "split": ("train", "train", "test", "train", "test"),
    "site": ("A", "A", "B", "B", "C"),
}


@pytest.mark.parametrize(
    ("settings", "test"),
    [
        (SplitSettings(by="column"), [False, False, True, False, True]),
        (SplitSettings(by="site", test_site="B"), [False, False, True, True, False]),
    ],
)
def test_rows_are_held_out_by_column_or_by_site(settings: SplitSettings, test: list[bool]) -> None:
    assert held_out_rows(**ROWS, settings=settings, seed=1).tolist() == test


def test_a_random_split_is_the_stratified_one_and_repeats() -> None:
    rows = {**ROWS, "patient": np.arange(40), "acute": np.repeat([0, 1], 20), "split": ("",) * 40, "site": ("",) * 40}

    first, again, other = (held_out_rows(**rows, settings=SplitSettings(), seed=seed) for seed in (1, 1, 2))

    assert first.tolist() == again.tolist() == held_out(rows["patient"], rows["acute"], seed=1).tolist()
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        (SplitSettings(by="column"), {"split": ("train", "test", "test", "train", "test")}, "patient: 1 on both"),
        (SplitSettings(by="column"), {"split": ("", "train", "test", "train", "test")}, "not train or test in every"),
        (SplitSettings(by="site"), {}, "name the site"),
        (
            SplitSettings(by="site", test_site="D"),
            {},
            "no row is of the site 'D' that is to be held out",
        ),
        (SplitSettings(by="site", test_site="A"), {"site": ("A", "B", "B", "B", "C")}, "patient: 1 on both"),
    ],
)
def test_a_split_that_would_leak_or_cannot_be_made_is_refused(
    settings: SplitSettings, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SplitError, match=sentence):
        held_out_rows(**{**ROWS, **changes}, settings=settings, seed=1)


def test_unknown_accessions_belong_to_nothing() -> None:
    test = np.array([True, False, False])

    check_disjoint(test, {"accession": ["", "", "a"], "image": ["x", "y", "y"]})

    with pytest.raises(SplitError, match="not apart by image: 1 on both sides"):
        check_disjoint(test, {"accession": ["", "", "a"], "image": ["x", "x", "y"]})
