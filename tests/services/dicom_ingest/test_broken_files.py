"""Every kind of broken input has its own reason, and costs only itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.dicom_ingest.folder import FolderScan, collect_series, read_one_series, scan_folder
from services.dicom_ingest.settings import IngestSettings
from tests.fixtures.broken_dicom import FILES, SERIES, deflated, make_broken_inputs, raw_deflate
from tests.fixtures.dicom_files import write_series


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], FolderScan]:
    folder = tmp_path_factory.mktemp("broken")
    expected = make_broken_inputs(folder)
    write_series(folder / "good one", 6, series=5000)
    return folder, expected, scan_folder(folder)


def reasons_below(scan: FolderScan, folder: Path) -> list[tuple[str, ...]]:
    return [
        collect_series(group).reasons
        for study in scan.studies
        for group in study.series
        if any(folder in instance.path.parents for instance in group.instances)
    ]


def test_there_are_more_than_thirty_kinds(broken: tuple[Path, dict[str, str], FolderScan]) -> None:
    assert len(broken[1]) >= 30


@pytest.mark.parametrize("name", SERIES)
def test_a_broken_series_is_refused_with_its_reason(name: str, broken: tuple[Path, dict[str, str], FolderScan]) -> None:
    folder, expected, scan = broken

    found = reasons_below(scan, folder / name)

    assert found
    assert all(reasons for reasons in found)
    assert any(expected[name] in reason for reasons in found for reason in reasons), found


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_ignored_with_its_reason(name: str, broken: tuple[Path, dict[str, str], FolderScan]) -> None:
    folder, expected, scan = broken

    found = [file.reason for file in scan.ignored if file.path == folder / "files" / name]

    assert len(found) == 1
    assert expected[f"files/{name}"] in found[0]


def test_a_good_series_beside_them_is_read(broken: tuple[Path, dict[str, str], FolderScan]) -> None:
    folder, _, scan = broken

    assert reasons_below(scan, folder / "good one") == [()]
    assert reasons_below(scan, folder / "files" / "other_image") == [()]


def test_every_file_is_accounted_for(broken: tuple[Path, dict[str, str], FolderScan]) -> None:
    folder, _, scan = broken

    assert scan.found == sum(1 for path in folder.rglob("*") if path.is_file())


def test_no_reason_names_a_patient_a_uid_or_a_path(broken: tuple[Path, dict[str, str], FolderScan]) -> None:
    folder, _, scan = broken

    texts = [reason for reasons in reasons_below(scan, folder) for reason in reasons]
    texts += [file.reason for file in scan.ignored]

    for text in texts:
        assert "Doe" not in text
        assert "1.2.826.0.1" not in text
        assert str(folder) not in text
        assert ".dcm" not in text


def test_a_deflated_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    path = deflated(tmp_path / "bomb.dcm", raw_deflate(bytes(5_000_000)))

    scan = scan_folder(path, IngestSettings(max_inflated_bytes=1_000_000))

    assert [file.reason for file in scan.ignored] == ["deflated data grows beyond the limit of 1000000 bytes"]


def test_a_series_beyond_the_memory_limit_is_refused_unread(tmp_path: Path) -> None:
    write_series(tmp_path, 6)

    collected = read_one_series(tmp_path, IngestSettings(max_series_bytes=1000))

    assert collected.volume is None
    assert collected.reasons == ("the series would take 2304 bytes of memory, the limit is 1000",)
