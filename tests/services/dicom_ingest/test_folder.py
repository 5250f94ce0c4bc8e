"""A folder is read whatever its nesting and names, and every file is accounted for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset

from services.dicom_ingest.folder import COPY, OTHER_IMAGE, WORSE_COPY, collect_series, read_one_series, scan_folder
from shared.pipeline.errors import FractureSweepError
from tests.fixtures.dicom_files import ct_dataset, write_dicom, write_series


def test_files_of_two_series_in_one_heap_are_told_apart(tmp_path: Path) -> None:
    write_series(tmp_path, 5, series=1, name=lambda n: f"heap/{2 * n}")
    write_series(tmp_path, 4, series=2, name=lambda n: f"heap/{2 * n + 1}.jpg")

    scan = scan_folder(tmp_path)

    assert sorted(len(group.instances) for study in scan.studies for group in study.series) == [4, 5]
    assert scan.ignored == ()


def test_one_series_spread_over_folders_is_one_series(tmp_path: Path) -> None:
    write_series(tmp_path, 6, name=lambda n: f"{n % 3}/deep/er/{n}")

    collected = read_one_series(tmp_path)

    assert collected.reasons == ()
    assert collected.instances == 6
    assert collected.description == "CT, 6 slices of 1.5 mm"


def test_symbolic_links_and_pipes_are_named_and_not_opened(tmp_path: Path) -> None:
    write_series(tmp_path / "a", 3)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "0000.dcm")
    os.mkfifo(tmp_path / "pipe")

    scan = scan_folder(tmp_path)

    assert {file.path.name: file.reason for file in scan.ignored} == {
        "loop": "a symbolic link, not followed",
        "link": "a symbolic link, not followed",
        "pipe": "not a regular file",
    }


def test_progress_counts_every_file(tmp_path: Path) -> None:
    write_series(tmp_path, 3)
    seen: list[tuple[int, int]] = []

    scan_folder(tmp_path, progress=lambda done, total: seen.append((done, total)))

    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_path_that_is_not_there_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(FractureSweepError, match="is not there"):
        scan_folder(tmp_path / "nowhere")


def test_an_image_sent_twice_is_used_once(tmp_path: Path) -> None:
    write_series(tmp_path / "a", 4)
    write_series(tmp_path / "b", 4, syntax="1.2.840.10008.1.2")

    scan = scan_folder(tmp_path)

    assert [file.reason for file in scan.ignored] == [COPY] * 4
    assert read_one_series(tmp_path).reasons == ()


def test_another_image_under_the_same_uid_is_refused_by_name(tmp_path: Path) -> None:
    write_series(tmp_path / "a", 4)
    write_dicom(tmp_path / "b", ct_dataset(1, position=(-100, -80, 31.5), pixels=np.zeros((16, 12), np.int16)))

    scan = scan_folder(tmp_path)

    assert [(file.path.name, file.reason) for file in scan.ignored] == [("b", OTHER_IMAGE)]
    assert read_one_series(tmp_path).reasons == ()


def test_of_a_whole_and_a_truncated_copy_the_whole_one_is_used(tmp_path: Path) -> None:
    write_series(tmp_path / "b", 4)
    cut = write_series(tmp_path / "a", 1)[0]
    cut.write_bytes(cut.read_bytes()[:-40])

    scan = scan_folder(tmp_path)

    assert [(file.path.parent.name, file.reason) for file in scan.ignored] == [("a", WORSE_COPY)]
    assert read_one_series(tmp_path).reasons == ()


def test_images_without_any_uid_are_grouped_by_what_they_share(tmp_path: Path) -> None:
    def nameless(_index: int, ds: Dataset) -> None:
        ds.StudyInstanceUID = ds.SeriesInstanceUID = ""

    write_series(tmp_path, 5, change=nameless)

    collected = read_one_series(tmp_path)

    assert collected.reasons == ()
    assert collected.series_instance_uid == ""
    assert len(collected.content_sha256) == 64


def test_files_without_the_dicm_prefix_are_read(tmp_path: Path) -> None:
    for index in range(4):
        ds = ct_dataset(index, position=(-100, -80, 30 + 1.5 * index))
        write_dicom(tmp_path / f"{index}", ds, prefix=False)

    collected = read_one_series(tmp_path)

    assert collected.reasons == ()
    assert collected.volume is not None
    assert int(collected.volume.voxels[2, 1, 1]) == 1000 + 200 + 10 + 1 - 1024


def test_two_patients_in_one_study_refuse_all_its_series(tmp_path: Path) -> None:
    def other_series(_index: int, ds: Dataset) -> None:
        ds.SeriesInstanceUID += ".5"
        ds.SOPInstanceUID += ".5"
        ds.PatientID = "another"

    write_series(tmp_path / "a", 4)
    write_series(tmp_path / "b", 4, change=other_series)

    scan = scan_folder(tmp_path)

    reasons = [collect_series(group).reasons[0] for study in scan.studies for group in study.series]
    assert len(reasons) == 2
    assert all(reason.startswith("two patients in one study") for reason in reasons)


def test_a_folder_with_two_series_is_no_image_of_a_pair(tmp_path: Path) -> None:
    write_series(tmp_path / "a", 4, series=1)
    write_series(tmp_path / "b", 4, series=2)

    assert read_one_series(tmp_path).reasons == ("the folder holds 2 DICOM series, one is needed",)


def test_refused_series_keep_their_instances_names_for_the_ledger(tmp_path: Path) -> None:
    write_series(tmp_path, 2)

    collected = read_one_series(tmp_path)

    assert collected.volume is None
    assert len({one.sop_instance_uid for one in collected.slices}) == 2
