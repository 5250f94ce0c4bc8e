from __future__ import annotations

import csv
from pathlib import Path

import pydicom
import pytest
from typer.testing import CliRunner

from services.__main__ import app
from services.trainer.phantoms import training_cohort
from services.trainer.phantoms.training_cohort import PhantomCohort, patients_held_out, write_training_cohort
from shared.pipeline.errors import FractureSweepError

COHORT = PhantomCohort(patients=3, seed=4, readers=1)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def dicom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dicom")
    write_training_cohort(folder, COHORT, processes=1)
    return folder


def test_each_fracture_is_a_row_with_its_files_and_what_the_headers_say(dicom: Path) -> None:
    table = rows(dicom / "COHORT.csv")

    patients = [COHORT.patient(index) for index in range(3)]
    fractures = [(patient, fracture) for patient in patients for fracture in patient.fractures]
    assert [(row["levels"], row["acute"]) for row in table] == [(f.level, str(int(f.acute))) for _, f in fractures]
    for row, (patient, _) in zip(table, fractures, strict=True):
        files = [path for path in (dicom / row["image"]).iterdir() if path != dicom / row["mask"]]
        header = pydicom.dcmread(files[0])
        assert (header.PatientAge, header.PatientSex) == (f"{int(row['age']):03d}Y", row["sex"])
        assert header.PatientID == row["patient"]
        assert pydicom.dcmread(dicom / row["mask"]).Modality == "SEG"
        assert len(files) == len({path.name for path in files}) > 10
        assert int(row["age"]) == patient.age
    assert "PHANTOM" in (dicom / "README.txt").read_text()


def test_the_first_training_patients_have_masks_of_three_readers(dicom: Path) -> None:
    table = rows(dicom / "COHORT.csv")

    repeated = {row["patient"] for row in table if row["mask2"]}
    first = next(row["patient"] for row in table if row["split"] == "train")
    assert repeated == {first}
    for row in table:
        if row["mask2"]:
            masks = [pydicom.dcmread(dicom / row[name]).PixelData for name in ("mask", "mask2", "mask3")]
            assert len(set(masks)) == 3


def test_what_is_there_is_not_made_again(dicom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(dicom)
    monkeypatch.setattr(training_cohort, "render", None)
    told: list[tuple[int, int]] = []

    write_training_cohort(dicom, COHORT, processes=1, progress=lambda done, total: told.append((done, total)))

    assert contents(dicom) == before
    assert told == [(3, 3)]


def test_an_interrupted_cohort_goes_on_and_comes_out_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = PhantomCohort(patients=2, seed=4, readers=1, nifti=True)
    render, made = training_cohort.render, []

    def once(*arguments: object, **more: object) -> object:
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return render(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(training_cohort, "render", once)
    with pytest.raises(KeyboardInterrupt):
        write_training_cohort(tmp_path / "a", small, processes=1)
    assert not (tmp_path / "a" / "COHORT.csv").exists()

    write_training_cohort(tmp_path / "a", small, processes=1)
    write_training_cohort(tmp_path / "b", small, processes=1)

    assert len(made) == 2 + 1 + 2
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not [name for name in contents(tmp_path / "a") if name.startswith(".")]


def test_a_folder_of_another_cohort_is_refused(dicom: Path) -> None:
    with pytest.raises(FractureSweepError, match="another seed and kappa"):
        write_training_cohort(dicom, PhantomCohort(patients=3, seed=5, kappa=0.5), processes=1)


def test_a_fifth_of_the_patients_is_for_the_test() -> None:
    cohort = PhantomCohort(patients=50, seed=2)

    test = patients_held_out(cohort)

    classes = {acute for index in test for acute in [f.acute for f in cohort.patient(index).fractures]}
    assert 8 <= len(test) <= 12
    assert classes == {True, False}
    assert test == patients_held_out(cohort)


def test_the_command_makes_a_cohort_in_several_processes(tmp_path: Path) -> None:
    arguments = ["phantoms", "cohort", str(tmp_path), "--patients", "2", "--seed", "1", "--nifti", "--processes", "2"]

    ran = CliRunner().invoke(app, arguments)

    assert ran.exit_code == 0, ran.output
    assert "synthetic, no clinical meaning" in ran.output
    assert len({row["patient"] for row in rows(tmp_path / "COHORT.csv")}) == 2
