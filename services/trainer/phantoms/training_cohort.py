"""A phantom cohort for training, as a research group would bring its own: images, readers' masks and COHORT.csv.

    DIR/COHORT.csv      one row a fractured vertebra
    DIR/studies/NAME    a CT series in DICOM with the first reader's SEG (or NAME.nii.gz)
    DIR/readers         masks of the second and third readers, of some training patients
    DIR/README.txt      that all of it is synthetic
    DIR/cohort.json     what it was made with

A patient depends on the seed and its number alone, so an interrupted cohort goes on, and a larger one keeps what is
there. Each patient is written aside and renamed when it is whole. `fracture-sweep run DIR/studies` sweeps the same
studies without knowing their classes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import SimpleITK as sitk

from services.trainer.in_processes import run_all
from services.trainer.phantoms.cohort import Patient, draw_patient
from services.trainer.phantoms.dicom_writer import write_dicom
from services.trainer.phantoms.rendering import Rendered, render
from services.trainer.split import held_out
from shared.fracture.csv_rows import PAIR_COLUMNS
from shared.fracture.volume import Mask, Volume, to_sitk
from shared.pipeline.errors import FractureSweepError

COHORT_FILE: Final = "COHORT.csv"
SPEC_FILE: Final = "cohort.json"
READ_ME: Final = "README.txt"
COLUMNS: Final = (
    *PAIR_COLUMNS,
    "acute",
    "mask2",
    "mask3",
    "site",
    "split",
)
SITES: Final = 3
TEST_SHARE: Final = 0.2

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class PhantomCohort:
    """Which cohort: `readers` training patients have masks of a second and a third reader; `nifti` instead of DICOM."""

    patients: int
    seed: int
    kappa: float = 0.85
    readers: int = 30
    nifti: bool = False

    def patient(self, index: int) -> Patient:
        """The patient of a number."""
        return draw_patient(seed=self.seed, index=index, kappa=self.kappa)

    def name(self, index: int) -> str:
        """The patient's file name, which means nothing."""
        return hashlib.sha256(f"cohort/{self.seed}/{index}".encode()).hexdigest()[:10].upper()


def patients_held_out(cohort: PhantomCohort) -> frozenset[int]:
    """The numbers of the patients whose `split` is test: a fifth, with acute and chronic ones alike."""
    rows = [(index, f.acute) for index in range(cohort.patients) for f in cohort.patient(index).fractures]
    number = np.array([index for index, _ in rows], dtype=np.int64)
    acute = np.array([acute for _, acute in rows], dtype=np.int64)
    chosen = held_out(number, acute, share=TEST_SHARE, seed=cohort.seed)
    return frozenset(int(index) for index in number[chosen])


def repeated_patients(cohort: PhantomCohort, test: frozenset[int]) -> frozenset[int]:
    """The training patients with masks of three readers: the first ones."""
    return frozenset([index for index in range(cohort.patients) if index not in test][: cohort.readers])


def write_training_cohort(
    folder: Path, cohort: PhantomCohort, *, processes: int = 0, progress: Progress = lambda done, total: None
) -> Path:
    """Write what is not there yet; returns the path of COHORT.csv, which is written last.

    `processes`: 0 takes every core. FractureSweepError where the folder holds a cohort of another seed, kappa or kind.
    """
    if cohort.patients < 1:
        raise FractureSweepError(f"a cohort needs at least one patient, not {cohort.patients}")
    _claim(folder, cohort)
    test = patients_held_out(cohort)
    repeated = repeated_patients(cohort, test)
    one = partial(_write_patient, cohort=cohort, folder=folder)
    jobs = {index: index in repeated for index in range(cohort.patients)}
    missing = [index for index, readers in jobs.items() if not _complete(folder, cohort, index, readers=readers)]
    done = cohort.patients - len(missing)
    progress(done, cohort.patients)
    run_all(
        [partial(one, index, readers=jobs[index]) for index in missing],
        processes=processes or len(os.sched_getaffinity(0)),
        told=lambda more: progress(done + more, cohort.patients),
    )
    _write_aside(folder / READ_ME, _read_me(cohort))
    path = folder / COHORT_FILE
    _write_aside(path, _table(folder, cohort, test=test, repeated=repeated))
    return path


def _claim(folder: Path, cohort: PhantomCohort) -> None:
    """Bind a folder to what its files depend on (not to how many there are)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SPEC_FILE
    fixed = ("seed", "kappa", "nifti")
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name in fixed if before[name] != asdict(cohort)[name]]
        except (ValueError, KeyError, TypeError):
            raise FractureSweepError(f"{path} cannot be read: give a new folder") from None
        if other:
            raise FractureSweepError(
                f"{folder} holds a phantom cohort of another {' and '.join(other)}: give a new folder"
            )
    text = json.dumps({"origin": "synthetic phantoms; no clinical meaning", **asdict(cohort)}, indent=2) + "\n"
    _write_aside(path, text)


def _image(folder: Path, cohort: PhantomCohort, index: int) -> Path:
    return folder / "studies" / (cohort.name(index) + (".nii.gz" if cohort.nifti else ""))


def _mask(folder: Path, cohort: PhantomCohort, index: int, reader: int) -> Path:
    """The mask of a reader (0, 1, 2), where it lies or will lie."""
    name = cohort.name(index)
    if cohort.nifti:
        return folder / ("masks" if reader == 0 else "readers") / f"{name}-{reader + 1}.nii.gz"
    if reader == 0:
        return folder / "studies" / name / f"{name}-SEG"
    return folder / "readers" / f"{name}-{reader + 1}"


def _complete(folder: Path, cohort: PhantomCohort, index: int, *, readers: bool) -> bool:
    masks = [_mask(folder, cohort, index, reader) for reader in range(3 if readers else 1)]
    return _image(folder, cohort, index).exists() and all(path.exists() for path in masks)


def _write_patient(index: int, *, readers: bool, cohort: PhantomCohort, folder: Path) -> int:
    patient = cohort.patient(index)
    rendered = render(patient, readers=3 if readers else 1)
    for name in ("studies", "readers", *(["masks"] if cohort.nifti else [])):
        (folder / name).mkdir(exist_ok=True)
    (_write_nifti if cohort.nifti else _write_study)(index, patient, rendered, cohort=cohort, folder=folder)
    return index


def _write_study(index: int, patient: Patient, rendered: Rendered, *, cohort: PhantomCohort, folder: Path) -> None:
    aside = folder / f".{cohort.name(index)}.{os.getpid()}.part"
    shutil.rmtree(aside, ignore_errors=True)
    written = write_dicom(
        patient, aside / "study", volume=rendered.volume, masks=rendered.masks, others=aside / "readers"
    )
    for number, path in enumerate(written.other_segmentations, start=1):
        path.replace(_mask(folder, cohort, index, number))
    final = _image(folder, cohort, index)
    if written.segmentation is None:
        raise RuntimeError("a phantom of the cohort has no fracture and so no mask")
    written.segmentation.replace(aside / "study" / _mask(folder, cohort, index, 0).name)
    if not final.exists():
        (aside / "study").rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def _write_nifti(index: int, patient: Patient, rendered: Rendered, *, cohort: PhantomCohort, folder: Path) -> None:
    for reader, mask in enumerate(rendered.masks):
        _save_nifti(mask, _mask(folder, cohort, index, reader))
    _save_nifti(rendered.volume, _image(folder, cohort, index))


def _save_nifti(grid: Volume | Mask, path: Path) -> None:
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    sitk.WriteImage(to_sitk(grid), str(aside), useCompression=True)
    aside.replace(path)


def _table(folder: Path, cohort: PhantomCohort, *, test: frozenset[int], repeated: frozenset[int]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()

    def shown(path: Path) -> str:
        return path.relative_to(folder).as_posix()

    for index in range(cohort.patients):
        patient = cohort.patient(index)
        for fracture in patient.fractures:
            row: dict[str, object] = {
                "image": shown(_image(folder, cohort, index)),
                "mask": shown(_mask(folder, cohort, index, 0)),
                "labels": "verse" if cohort.nifti else "",
                "roi": "body",
                "levels": fracture.level,
                "study": f"PHANTOM-STUDY-{index + 1:04d}" if cohort.nifti else "",
                "patient": f"PHANTOM-{cohort.seed}-{index + 1:04d}",
                "age": patient.age,
                "sex": patient.sex,
                "acute": int(fracture.acute),
                "site": f"PHANTOM-SITE-{index % SITES + 1}",
                "split": "test" if index in test else "train",
            }
            if index in repeated:
                row["mask2"] = shown(_mask(folder, cohort, index, 1))
                row["mask3"] = shown(_mask(folder, cohort, index, 2))
            writer.writerow(row)
    return text.getvalue()


def _read_me(cohort: PhantomCohort) -> str:
    return (
        "PHANTOM COHORT. Every image, mask, age, sex and class in this folder is synthetic and has no clinical\n"
        "meaning. No number that comes of it says anything about patients.\n\n"
        f"Made by: fracture-sweep phantoms cohort --patients {cohort.patients} --seed {cohort.seed} "
        f"--kappa {cohort.kappa:g} --readers {cohort.readers}{' --nifti' if cohort.nifti else ''}\n\n"
        "COHORT.csv   one row a fractured vertebra (docs/cohort.md describes the columns)\n"
        "studies      CT series and the first reader's masks; `fracture-sweep run studies` sweeps them\n"
        "readers      masks of a second and a third reader, of some training patients\n"
    )


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
