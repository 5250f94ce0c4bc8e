"""Who was scanned and how, out of headers: identity (restricted), age and sex for the nomogram, acquisition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from datetime import date
from typing import Final, Literal

from services.dicom_ingest.collected import PatientIdentity
from services.dicom_ingest.headers import InstanceHeader
from shared.fracture.records import Acquisition, Demographics

OLDEST: Final = 90
"""Ages above it are kept as this one: they would single a patient out."""

_AGE: Final = re.compile(r"^(\d{1,3})([DWMY])$")
_DAYS: Final = {"D": 1, "W": 7, "M": 30.4375, "Y": 365.25}


def identity_of(instances: Sequence[InstanceHeader]) -> PatientIdentity:
    """The identity that a set of instances gives: of each attribute the first value that is not empty."""
    found = PatientIdentity()
    for instance in instances:
        other = instance.shared.identity
        if other is found:
            continue
        missing = {
            field.name: getattr(other, field.name)
            for field in fields(PatientIdentity)
            if not getattr(found, field.name) and getattr(other, field.name)
        }
        found = replace(found, **missing) if missing else found
    return found


def are_two_patients(identities: Iterable[PatientIdentity]) -> bool:
    """Whether identities contradict each other. What one does not say contradicts nothing."""
    known = list(dict.fromkeys(identities))
    ids = {(i.patient_id, i.issuer_of_patient_id) for i in known if i.patient_id}
    if len({patient_id for patient_id, _ in ids}) > 1 or len({issuer for _, issuer in ids if issuer}) > 1:
        return True
    if len({i.patient_birth_date for i in known if i.patient_birth_date}) > 1:
        return True
    return not ids and len({_comparable(i.patient_name) for i in known if i.patient_name}) > 1


def _comparable(name: str) -> str:
    return re.sub(r"[\s^=]+", " ", name).strip().casefold()


def _date(value: str) -> date | None:
    digits = value.replace(".", "").replace("-", "")[:8]
    if len(digits) != 8 or not digits.isdigit():
        return None
    try:
        return date(int(digits[:4]), int(digits[4:6]), int(digits[6:]))
    except ValueError:
        return None


def age_years(patient_age: str, birth_date: str, study_date: str) -> int | None:
    """Whole years: PatientAge, else StudyDate − PatientBirthDate; 90 and over as 90; None where neither makes sense.

    A birth date that is the study's date is what de-identifiers leave, and counts as none.
    """
    stated = _AGE.match(patient_age.strip().upper())
    if stated:
        number, unit = int(stated.group(1)), stated.group(2)
        years = number if unit == "Y" else int(number * _DAYS[unit] / _DAYS["Y"])
        if years > 0 or number > 0:
            return min(years, OLDEST)
    born, studied = _date(birth_date), _date(study_date)
    if born is None or studied is None or studied <= born:
        return None
    years = studied.year - born.year - ((studied.month, studied.day) < (born.month, born.day))
    return min(years, OLDEST) if years <= 130 else None


def sex_of(patient_sex: str) -> Literal["F", "M"] | None:
    """F or M; anything else (O, empty) is unknown."""
    value = patient_sex.strip().upper()
    return "F" if value == "F" else "M" if value == "M" else None


def demographics_of(instances: Sequence[InstanceHeader]) -> Demographics:
    """Age and sex, as far as the headers say."""
    identity = identity_of(instances)
    stated = next((i.shared.patient_age for i in instances if i.shared.patient_age), "")
    return Demographics(
        age_years=age_years(stated, identity.patient_birth_date, identity.study_date),
        sex=sex_of(identity.patient_sex),
    )


def acquisition_of(instances: Sequence[InstanceHeader], *, slice_spacing_mm: float | None = None) -> Acquisition:
    """What the scanner did. Of each attribute the first value that is given."""
    frames = [frame for instance in instances for frame in instance.frames[:1]]
    shared = [instance.shared for instance in instances]
    return Acquisition(
        kvp=next((f.kvp for f in frames if f.kvp), None),
        convolution_kernel=next((f.convolution_kernel for f in frames if f.convolution_kernel), None),
        slice_thickness_mm=next((f.slice_thickness_mm for f in frames if f.slice_thickness_mm), None),
        slice_spacing_mm=slice_spacing_mm,
        contrast_agent=next((s.contrast_agent for s in shared if s.contrast_agent is not None), None),
        manufacturer=next((s.manufacturer for s in shared if s.manufacturer), None),
        modality=next((s.modality for s in shared if s.modality), "CT"),
    )
