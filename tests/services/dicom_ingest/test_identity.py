"""Age and sex for the nomogram, and whether headers speak of one patient."""

from __future__ import annotations

import pytest

from services.dicom_ingest.collected import PatientIdentity
from services.dicom_ingest.identity import age_years, are_two_patients, sex_of


@pytest.mark.parametrize(
    ("stated", "born", "studied", "expected"),
    [
        ("067Y", "", "", 67),
        ("67Y", "19000101", "20200101", 67),
        ("095Y", "", "", 90),
        ("018M", "", "", 1),
        ("", "19500615", "20200614", 69),
        ("", "19500615", "20200615", 70),
        ("", "1950.06.15", "20200615", 70),
        ("", "19200101", "20200615", 90),
        ("old", "19500615", "20200615", 70),
        ("000Y", "", "", None),
        ("", "20200615", "20200615", None),
        ("", "20210615", "20200615", None),
        ("", "19501399", "20200615", None),
        ("", "", "20200615", None),
    ],
)
def test_age_is_the_stated_one_else_from_the_dates(stated: str, born: str, studied: str, expected: int | None) -> None:
    assert age_years(stated, born, studied) == expected


def test_sex_is_f_or_m_or_unknown() -> None:
    assert [sex_of(value) for value in ("F", "m ", "O", "", "male")] == ["F", "M", None, None, None]


def test_what_is_not_said_contradicts_nothing() -> None:
    known = PatientIdentity(patient_id="1", patient_name="Doe^Jane", patient_birth_date="19500615")

    assert not are_two_patients([known, PatientIdentity()])
    assert not are_two_patients([known, PatientIdentity(patient_id="1", patient_name="Doe-Roe^Jane")])


def test_another_id_birth_date_or_lone_name_is_another_patient() -> None:
    assert are_two_patients([PatientIdentity(patient_id="1"), PatientIdentity(patient_id="2")])
    assert are_two_patients(
        [
            PatientIdentity(patient_id="1", patient_birth_date="19500615"),
            PatientIdentity(patient_id="1", patient_birth_date="19510615"),
        ]
    )
    assert are_two_patients([PatientIdentity(patient_name="Doe^Jane"), PatientIdentity(patient_name="Roe^Jane")])
    assert not are_two_patients([PatientIdentity(patient_name="Doe^Jane"), PatientIdentity(patient_name="DOE JANE^^")])
