import numpy as np
import pytest

from services.trainer.phantoms.cohort import SIGNS, archive_patient, cohort, draw_patient


def test_a_patient_depends_on_seed_and_index_alone() -> None:
    alone = draw_patient(seed=5, index=7)

    among_others = list(cohort(patients=9, seed=5))[7]

    assert alone == among_others
    assert alone != draw_patient(seed=6, index=7)


def test_the_signs_go_with_the_classes_and_kappa_takes_the_difference_away() -> None:
    def shares(kappa: float) -> dict[str, float]:
        fractures = [f for patient in cohort(patients=600, seed=1, kappa=kappa) for f in patient.fractures]
        return {
            sign: float(
                np.mean([f.has(sign) for f in fractures if f.acute])
                - np.mean([f.has(sign) for f in fractures if not f.acute])
            )
            for sign in SIGNS
        }

    full, none = shares(1.0), shares(0.0)

    assert min(full[sign] for sign in ("band", "step", "lucent_line", "swelling")) > 0.2
    assert max(full[sign] for sign in ("sclerosis", "osteophytes")) < -0.2
    assert max(abs(difference) for difference in none.values()) < 0.1


def test_acute_patients_are_younger_and_chronic_fractures_lower() -> None:
    patients = list(cohort(patients=600, seed=2, kappa=1.0))

    ages = {True: [], False: []}
    losses = {True: [], False: []}
    for patient in patients:
        for fracture in patient.fractures:
            ages[fracture.acute].append(patient.age)
            losses[fracture.acute].append(fracture.height_loss)

    assert np.mean(ages[True]) < np.mean(ages[False]) - 2
    assert np.mean(losses[True]) < np.mean(losses[False]) - 0.03


def test_a_patient_has_one_to_four_fractures_within_five_levels() -> None:
    counts = {len(patient.fractures) for patient in cohort(patients=300, seed=3)}

    assert counts == {1, 2, 3, 4}


def test_an_archive_holds_a_patient_without_a_fracture_and_one_without_age_and_sex() -> None:
    patients = [archive_patient(seed=1, index=index) for index in range(8)]

    assert [len(patient.fractures) == 0 for patient in patients].count(True) == 1
    assert [(patient.age, patient.sex) for patient in patients].count((None, None)) == 1
    assert {2, 3} <= {len(patient.fractures) for patient in patients}


def test_kappa_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        draw_patient(seed=0, index=0, kappa=1.5)
