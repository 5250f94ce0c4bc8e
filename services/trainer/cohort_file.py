"""COHORT.csv: one row a fractured vertebra, with its class. docs/cohort.md describes the columns.

The table is the CSV of pairs with the columns that training needs beside. Every row is judged before anything long
starts, and all faults are told together, each with its line and column. What the columns of the pair mean (images,
masks, label maps) is judged by whoever reads them: `judge_files`. File names and ids are identifiers: they stand in
the error for the user who gave the file, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from services.trainer.conformal import least_cases
from services.trainer.settings import TrainingSettings
from services.trainer.split import SplitError, held_out_rows
from shared.fracture.csv_rows import PAIR_COLUMNS, CsvRow, RowFault, read_rows
from shared.fracture.levels import ORDER
from shared.fracture.records import OLDEST_TOLD
from shared.pipeline.errors import FractureSweepError

COLUMNS: Final = (*PAIR_COLUMNS, "level", "acute", "mask2", "mask3", "mask_source", "site", "split")
REQUIRED: Final = ("image", "mask", "patient", "age", "sex", "acute")
MAX_CSV_BYTES: Final = 50_000_000
LEAST_REPEATED: Final = 5
"""Rows with a second (or third) mask below which an ICC says nothing."""
_SHOWN_FAULTS: Final = 100

TEMPLATE: Final = (
    "image,mask,labels,roi,body,body_labels,levels,study,patient,age,sex,acute,mask2,mask3,mask_source,site,split\n"
    "dicom/0001,masks/0001.nii.gz,totalseg,vertebra,bodies/0001.nii.gz,1,L1,S-0001,P-0001,71,F,1,"
    "second/0001.nii.gz,third/0001.nii.gz,,A,train\n"
    "ct/0002.nii.gz,masks/0002.nii.gz,verse,body,,,T12,S-0002,P-0002,64,M,0,,,,B,test\n"
)
"""What `fracture-sweep train --template` prints: the header and two rows as examples."""

RepeatColumn = Literal["mask2", "mask3"]
REPEAT_COLUMNS: Final[tuple[RepeatColumn, ...]] = ("mask2", "mask3")


class CohortError(FractureSweepError):
    """COHORT.csv cannot be used; the text lists all its faults. `faults` holds them one by one, in order of lines."""

    def __init__(self, faults: Iterable[RowFault]) -> None:
        self.faults = tuple(str(fault) for fault in sorted(set(faults), key=lambda fault: (fault.line, fault)))
        shown = [f"  {fault}" for fault in self.faults[:_SHOWN_FAULTS]]
        more = [f"  … and {len(self.faults) - _SHOWN_FAULTS} more"] if len(self.faults) > _SHOWN_FAULTS else []
        count = len(self.faults)
        super().__init__("\n".join([f"the cohort file has {count} fault{'s' if count > 1 else ''}:", *shown, *more]))


@dataclass(frozen=True, kw_only=True)
class CohortRow:
    """One vertebra of the cohort: what the trainer needs of its row. `values` are the row's columns as they stand."""

    line: int
    values: Mapping[str, str]
    level: str
    patient: str
    study: str
    acute: bool
    age: int
    """Years, 90 and over as 90."""
    sex: Literal["F", "M"]
    site: str
    split: Literal["", "train", "test"]
    mask_source: str = ""
    """Who made `mask`, as a bundle's `mask_sources` has it; '' where a reader drew it."""


@dataclass(frozen=True, kw_only=True)
class FilesJudged:
    """What the files of the rows are worth: faults, and for each line a name of its image (the same for the same)."""

    faults: tuple[RowFault, ...] = ()
    images: Mapping[int, str]


JudgeFiles = Callable[[Sequence[CsvRow]], FilesJudged]


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """A row as far as it could be read: None where a value is at fault."""

    line: int
    values: Mapping[str, str]
    level: str | None
    patient: str
    study: str
    acute: bool | None
    age: int | None
    sex: Literal["F", "M"] | None
    site: str
    split: Literal["", "train", "test"] | None
    image: str = ""


def read_cohort(
    path: Path, *, settings: TrainingSettings, judge_files: JudgeFiles, fitting: bool = True
) -> tuple[CohortRow, ...]:
    """The rows of a cohort file. CohortError with all its faults.

    `fitting`: the rows are to be trained on, so that the split, the folds and the repeated masks of the settings are
    judged too; without it (an external validation) both classes are enough.
    """
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise CohortError([RowFault(0, "", f"it is larger than {MAX_CSV_BYTES} bytes: this is no cohort file")])
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CohortError([RowFault(0, "", "it is not UTF-8 text: save it as CSV UTF-8")]) from None
    except OSError:
        raise CohortError([RowFault(0, "", f"{path} cannot be read")]) from None
    return parse_cohort(text, settings=settings, judge_files=judge_files, fitting=fitting)


def parse_cohort(
    text: str, *, settings: TrainingSettings, judge_files: JudgeFiles, fitting: bool = True
) -> tuple[CohortRow, ...]:
    """The rows of a cohort file's text. CohortError with all its faults."""
    rows, found = read_rows(text, columns=COLUMNS, required=REQUIRED, what="cohort file")
    if not rows:
        raise CohortError(found)
    faults = list(found)
    faults += _level_columns(rows)
    judged = judge_files(rows)
    faults += judged.faults
    drafts = [_draft(row, judged.images.get(row.line, ""), faults) for row in rows]
    faults += _contradictions(drafts)
    faults += _same_vertebra(drafts)
    if fitting:
        faults += _split_faults(drafts, settings, header=rows[0].values)
        faults += _fitting_faults(drafts, settings)
    else:
        faults += _class_faults([draft.acute for draft in drafts], part="the cohort")
    if faults:
        raise CohortError(faults)
    return tuple(_finished(draft) for draft in drafts)


def _level_columns(rows: Sequence[CsvRow]) -> list[RowFault]:
    present = [name for name in ("level", "levels") if name in rows[0].values]
    if not present:
        return [RowFault(1, "", "column 'levels' is missing")]
    if len(present) == 2:
        return [RowFault(1, "", "columns 'level' and 'levels' mean the same: leave one out")]
    return []


def _draft(row: CsvRow, image: str, faults: list[RowFault]) -> _Draft:
    values = row.values

    def fault(column: str, text: str) -> None:
        faults.append(RowFault(row.line, column, text))

    patient = values.get("patient", "")
    if not patient:
        fault("patient", "is empty: training and test are split by patient")
    acute: bool | None = None
    match values.get("acute", ""):
        case "1":
            acute = True
        case "0":
            acute = False
        case "":
            fault("acute", "is empty: say 1 (acute) or 0 (chronic)")
        case other:
            fault("acute", f"{other!r} is neither 1 (acute) nor 0 (chronic)")
    split: Literal["", "train", "test"] | None = None
    match values.get("split", ""):
        case "train":
            split = "train"
        case "test":
            split = "test"
        case "":
            split = ""
        case other:
            fault("split", f"{other!r} is neither train nor test")
    return _Draft(
        line=row.line,
        values=values,
        level=_level(values, fault),
        patient=patient,
        study=values.get("study", ""),
        acute=acute,
        age=_age(values.get("age", ""), fault),
        sex=_sex(values.get("sex", ""), fault),
        site=values.get("site", ""),
        split=split,
        image=image,
    )


Fault = Callable[[str, str], None]


def _level(values: Mapping[str, str], fault: Fault) -> str | None:
    column = "levels" if "levels" in values else "level"
    value = values.get(column, "")
    if not value:
        fault(column, "is empty: one row is one vertebra, say which")
    elif ";" in value:
        fault(column, f"{value!r} names several: one row is one vertebra")
    elif value not in ORDER:
        fault(column, f"{value!r} is no level (C1…C7, T1…T13, L1…L6, S1)")
    else:
        return value
    return None


def _age(value: str, fault: Fault) -> int | None:
    if not value:
        fault("age", "is empty: the nomogram needs it")
    elif not re.fullmatch(r"[0-9]{1,3}", value) or int(value) > 120:
        fault("age", f"{value!r} is no age in whole years from 0 to 120")
    else:
        return min(int(value), OLDEST_TOLD)
    return None


def _sex(value: str, fault: Fault) -> Literal["F", "M"] | None:
    match value:
        case "F":
            return "F"
        case "M":
            return "M"
        case "":
            fault("sex", "is empty: the nomogram needs it")
        case _:
            fault("sex", f"{value!r} is neither F nor M")
    return None


def _contradictions(drafts: Sequence[_Draft]) -> list[RowFault]:
    """What rows of one patient, study or image must agree in."""
    faults = []
    by_patient: dict[str, _Draft] = {}
    by_study: dict[str, _Draft] = {}
    by_image: dict[str, _Draft] = {}
    for row in drafts:
        if row.patient:
            first = by_patient.setdefault(row.patient, row)
            if row.sex and first.sex and row.sex != first.sex:
                faults.append(RowFault(row.line, "sex", f"differs from line {first.line}, the same patient"))
            if row.split and first.split and row.split != first.split:
                text = f"the patient is {first.split} in line {first.line}: a patient lies in both splits"
                faults.append(RowFault(row.line, "split", text))
        if row.study:
            first = by_study.setdefault(row.study, row)
            if row.patient != first.patient:
                faults.append(RowFault(row.line, "study", f"belongs to another patient in line {first.line}"))
        if row.image:
            first = by_image.setdefault(row.image, row)
            for column, ours, theirs in (
                ("patient", row.patient, first.patient),
                ("study", row.study, first.study),
                ("age", row.age, first.age),
            ):
                if ours is not None and theirs is not None and ours != theirs:
                    text = f"differs from line {first.line}, which names the same image"
                    faults.append(RowFault(row.line, column, text))
    return faults


def _same_vertebra(drafts: Sequence[_Draft]) -> list[RowFault]:
    faults = []
    seen: dict[tuple[str, str], int] = {}
    for row in drafts:
        if row.image and row.level:
            first = seen.setdefault((row.image, row.level), row.line)
            if first != row.line:
                column = "levels" if "levels" in row.values else "level"
                faults.append(RowFault(row.line, column, f"{row.level} of this image stands in line {first} already"))
    return faults


def _split_faults(drafts: Sequence[_Draft], settings: TrainingSettings, *, header: Mapping[str, str]) -> list[RowFault]:
    by = settings.split.by
    if by == "column":
        if "split" not in header:
            return [RowFault(1, "", "column 'split' is missing, and the settings split by it (split.by = column)")]
        return [
            RowFault(row.line, "split", "is empty, and the settings split by this column")
            for row in drafts
            if row.split == ""
        ]
    if by == "site":
        if "site" not in header:
            return [RowFault(1, "", "column 'site' is missing, and the settings split by it (split.by = site)")]
        faults = [
            RowFault(row.line, "site", "is empty, and the settings split by it") for row in drafts if not row.site
        ]
        sites = sorted({row.site for row in drafts if row.site})
        wanted = settings.split.test_site
        if not wanted:
            text = "split.test_site is not set, and the settings split by site (split.by = site)"
            return [*faults, RowFault(0, "", text)]
        if wanted not in sites:
            known = ", ".join(sites) or "none"
            return [*faults, RowFault(0, "", f"split.test_site is {wanted!r}, which no row has (there are: {known})")]
        at_site = {row.patient: row.line for row in drafts if row.patient and row.site == wanted}
        return faults + [
            RowFault(row.line, "site", f"the patient is of the site that is held out in line {at_site[row.patient]}")
            for row in drafts
            if row.patient in at_site and row.site and row.site != wanted
        ]
    return []


def _class_faults(classes: Sequence[bool | None], *, part: str) -> list[RowFault]:
    known = {acute for acute in classes if acute is not None}
    if len(known) != 1 or None in classes:
        return []
    word = "acute" if known == {True} else "chronic"
    count = len(classes)
    rows = f"all {count} rows are" if count > 1 else "its only row is"
    return [RowFault(0, "", f"one class alone: {part} needs acute and chronic vertebrae, {rows} {word}")]


def _fitting_faults(drafts: Sequence[_Draft], settings: TrainingSettings) -> list[RowFault]:
    """Whether the cohort is large enough for every step; nothing where its rows are at fault themselves."""
    alone = _class_faults([draft.acute for draft in drafts], part="the cohort")
    if alone:
        return alone
    test = _held_out(drafts, settings)
    if test is None:
        return []
    training = [row for row, out in zip(drafts, test, strict=True) if not out]
    sizes = size_faults(
        patient=[row.patient for row in drafts],
        acute=[bool(row.acute) for row in drafts],
        test=test,
        settings=settings,
    )
    return sizes + _repeat_faults(training, settings)


def size_faults(
    *, patient: Sequence[Hashable], acute: Sequence[bool], test: Sequence[bool], settings: TrainingSettings
) -> list[RowFault]:
    """Which steps need more patients than there are: each says what it needs, and what the cohort has."""
    faults = []
    for part, out in (("the training part", False), ("the test part", True)):
        classes = [one for one, held in zip(acute, test, strict=True) if held is out]
        faults += _class_faults(classes, part=part)
        if not classes:
            faults.append(RowFault(0, "", f"too few patients: {part} of the split has none"))
    training = [(who, one) for who, one, held in zip(patient, acute, test, strict=True) if not held]
    patients = len({who for who, _ in training})
    needs = [("patients", "the LASSO's folds (selection.folds)", settings.selection.folds, patients)]
    in_each_class = [
        ("the classifiers' folds (classifiers.folds)", settings.classifiers.folds),
        ("the out-of-fold scores (classifiers.out_of_fold)", settings.classifiers.out_of_fold),
    ]
    if settings.network.mode == "crossfit":
        in_each_class.append(("the network's folds (network.crossfit_folds)", settings.network.crossfit_folds))
    limits = least_cases(settings.classifiers.conformal_alpha)
    for wanted, word in ((True, "acute"), (False, "chronic")):
        of = [who for who, one in training if one is wanted]
        needs += [(f"patients with {word} fractures", step, need, len(set(of))) for step, need in in_each_class]
        what = "the limits of the prediction sets (classifiers.conformal_alpha)"
        needs.append((f"{word} vertebrae", what, limits, len(of)))
    faults += [
        RowFault(0, "", f"too few {of}: {step} need {need}, the training part has {have}")
        for of, step, need, have in needs
        if have < need
    ]
    return faults


def _repeat_faults(training: Sequence[_Draft], settings: TrainingSettings) -> list[RowFault]:
    method = settings.repeatability.method
    have = {column: sum(1 for row in training if row.values.get(column)) for column in REPEAT_COLUMNS}
    if method in ("auto", "masks"):
        faults = [
            RowFault(
                0,
                "",
                f"too few rows with {column}: repeatability needs {LEAST_REPEATED} training rows, there are {count} "
                "(give more, or none)",
            )
            for column, count in have.items()
            if 0 < count < LEAST_REPEATED
        ]
        if method == "masks" and not any(have.values()):
            need = f"it needs {LEAST_REPEATED} training rows with mask2 or mask3, there are 0"
            faults.append(RowFault(0, "", f"repeatability.method is masks: {need}"))
        if faults or any(have.values()):
            return faults
    if method in ("auto", "perturbation") and len(training) < LEAST_REPEATED:
        text = f"too few rows: repeatability needs {LEAST_REPEATED} training rows, there are {len(training)}"
        return [RowFault(0, "", text)]
    return []


def _held_out(drafts: Sequence[_Draft], settings: TrainingSettings) -> Sequence[bool] | None:
    """Which rows will be held out, or None where faults of the rows leave it open."""
    if any(row.acute is None or not row.patient or row.split is None for row in drafts):
        return None
    try:
        test = held_out_rows(
            patient=patient_numbers([row.patient for row in drafts]),
            acute=np.array([bool(row.acute) for row in drafts], dtype=np.int64),
            split=[row.split or "" for row in drafts],
            site=[row.site for row in drafts],
            settings=settings.split,
            seed=settings.seed,
        )
    except SplitError:  # its cause stands among the faults already
        return None
    return [bool(out) for out in test]


def patient_numbers(patients: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Patients as numbers from 0 on, in the order in which they first come."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(patient, len(numbers)) for patient in patients], dtype=np.int64)


def _finished(draft: _Draft) -> CohortRow:
    if draft.level is None or draft.acute is None or draft.age is None or draft.sex is None or draft.split is None:
        raise RuntimeError(f"line {draft.line} of the cohort file has a fault that was not told")
    return CohortRow(
        line=draft.line,
        values=draft.values,
        level=draft.level,
        patient=draft.patient,
        study=draft.study,
        acute=draft.acute,
        age=draft.age,
        sex=draft.sex,
        site=draft.site,
        split=draft.split,
        mask_source=draft.values.get("mask_source", ""),
    )
