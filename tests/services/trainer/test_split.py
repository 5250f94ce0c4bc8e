import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.split import held_out


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
