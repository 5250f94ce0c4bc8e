from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from services.segmenter.plugged_in import (
    CommandRefused,
    PluggedIn,
    plug_in,
    read_declaration,
    read_labels,
    run_command,
)
from services.segmenter.service import build
from services.segmenter.settings import SegmenterSettings
from shared.fracture import keys
from shared.fracture.messages import MasksReady, SeriesStored
from shared.fracture.protocol import Protocols
from shared.fracture.records import MaskRecord
from shared.fracture.spine.record import SpineRecord
from shared.fracture.volume import Volume, to_nrrd
from shared.pipeline.errors import FractureSweepError, OverBudget, Reject
from shared.pipeline.folder_store import FolderStore
from shared.records.archive import read_record, write_record
from tests.fixtures.spine_network import SOUND, ct_of, lumbar
from tests.fixtures.spines import DrawnBody
from tests.services.segmenter.test_service import Here, manifest

ROOT = Path(__file__).resolve().parents[3]
LEVELS = ("T12", "L1", "L2", "L3", "L4", "L5")
SPINE = (SOUND, SOUND, DrawnBody(anterior=15, middle=20, posterior=26), SOUND, SOUND, SOUND)


def declared(folder: Path, how: str = "well", **more: Any) -> Path:
    """A declaration of the stand-in, which fails as it is told to."""
    python = sys.executable
    lines: dict[str, Any] = {
        "name": "stand-in",
        "version_command": [python, "-m", "tests.fixtures.stand_in_segmenter", "--version"],
        "command": [python, "-m", "tests.fixtures.stand_in_segmenter", "{image}", "{output}", how],
        "labels": "totalseg",
        "roi": "vertebra",
        **more,
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in lines.items() if value is not None)
    path = folder / "command.toml"
    path.write_text(
        text
        + f'[environment]\nPYTHONPATH = "{ROOT}"\n'
        + '[[failures]]\ncontains = "were not found"\nreason = "its weights are not installed"\n'
    )
    return path


@pytest.fixture(scope="module")
def scan() -> Volume:
    return ct_of(lumbar(bodies=SPINE))


def plugged(tmp_path: Path, how: str = "well", **more: Any) -> PluggedIn:
    return plug_in(read_declaration(declared(tmp_path, how, **more)))


def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_a_command_gives_a_label_map_on_the_scan_s_grid(tmp_path: Path, scan: Volume) -> None:
    command = plugged(tmp_path)

    labels, levels = read_labels(command, run_command(command, scan, work(tmp_path)), scan)

    assert labels.geometry == scan.geometry
    assert set(levels) == set(LEVELS)
    drawn = lumbar(bodies=SPINE).whole
    assert np.array_equal(labels.voxels == levels["L5"], drawn == 6)


def test_its_version_is_asked_for_and_its_way_of_being_called_is_part_of_it(tmp_path: Path) -> None:
    one = plugged(tmp_path).note
    other = plugged(tmp_path, "exit").note
    slow = plugged(tmp_path, seconds=5.0, memory_gib=3.0).note

    assert one.version == "stand-in 1.2.3"
    assert one.sha256 != other.sha256
    assert slow.sha256 == one.sha256  # what it may cost does not change what it says


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("exit", "ended with exit code 3; the worker's log has what it said"),
        ("weights", "stand-in: its weights are not installed"),
        ("nothing", "ended well and left no label map"),
    ],
)
def test_a_command_that_fails_says_why(tmp_path: Path, scan: Volume, how: str, said: str) -> None:
    with pytest.raises(CommandRefused, match=said):
        run_command(plugged(tmp_path, how), scan, work(tmp_path))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no image", "cannot be read as an image"),
        ("other grid", "lies on another grid than the scan"),
        ("unknown", "holds labels that its declaration does not know: 200"),
        ("organs", "holds no vertebra"),
        ("empty", "holds no vertebra"),
        ("floats", "holds values that are no labels"),
    ],
)
def test_a_label_map_that_is_none_says_why(tmp_path: Path, scan: Volume, how: str, said: str) -> None:
    command = plugged(tmp_path, how)

    with pytest.raises(CommandRefused, match=said):
        read_labels(command, run_command(command, scan, work(tmp_path)), scan)


def test_a_label_map_may_be_named_by_a_pattern(tmp_path: Path, scan: Volume) -> None:
    command = plugged(
        tmp_path,
        output="*put.nii.gz",
        command=[sys.executable, "-m", "tests.fixtures.stand_in_segmenter", "{image}", "{work}/one-output.nii.gz"],
    )

    assert run_command(command, scan, work(tmp_path)).name == "one-output.nii.gz"


def test_two_label_maps_are_one_too_many(tmp_path: Path, scan: Volume) -> None:
    script = "import sys; [open(f'{sys.argv[1]}/{n}.nii.gz', 'w').write('x') for n in 'ab']"
    command = plugged(
        tmp_path, output="*.nii.gz", image="in/image.nii.gz", command=[sys.executable, "-c", script, "{work}"]
    )

    with pytest.raises(CommandRefused, match="left 2 label maps"):
        run_command(command, scan, work(tmp_path))


def test_values_in_a_range_of_others_are_no_vertebra(tmp_path: Path, scan: Volume) -> None:
    command = plugged(tmp_path, "unknown", others=[[150, 250]])

    _, levels = read_labels(command, run_command(command, scan, work(tmp_path)), scan)

    assert set(levels) == {"T12", "L1", "L2", "L3", "L4"}


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, scan: Volume) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}

    with pytest.raises(OverBudget, match="took more than 3 s"):
        run_command(plugged(tmp_path, "hang", seconds=3.0), scan, work(tmp_path))

    deadline = time.monotonic() + 10
    while {p.pid for p in psutil.Process().children(recursive=True)} - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not {process.pid for process in psutil.Process().children(recursive=True)} - before
    assert not [p for p in psutil.process_iter(["cmdline"]) if "time.sleep(600)" in " ".join(p.info["cmdline"] or [])]


@pytest.mark.skipif(sys.platform != "linux", reason="a process of another cannot be limited there")
def test_a_command_that_wants_too_much_memory_fails(tmp_path: Path, scan: Volume) -> None:
    with pytest.raises(CommandRefused, match="ended with exit code 1"):
        run_command(plugged(tmp_path, "memory", memory_gib=4.0), scan, work(tmp_path))


def test_what_a_command_says_goes_into_the_log_and_not_into_the_reason(
    tmp_path: Path, scan: Volume, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(CommandRefused) as refused:
        run_command(plugged(tmp_path, "exit"), scan, work(tmp_path))

    assert "something went wrong" not in str(refused.value)
    assert "something went wrong" in str(caplog.records[-1].__dict__["fields"]["said"])


def test_a_command_does_not_see_the_worker_s_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRACTURE_SWEEP_SECRETS_PSEUDONYM_KEY", "11" * 32)
    shown = tmp_path / "shown.txt"
    script = f"import os; open({str(shown)!r}, 'w').write(repr(sorted(os.environ)))"
    path = declared(tmp_path, command=[sys.executable, "-c", script, "{image}", "{output}"])
    command = plug_in(read_declaration(path))

    with pytest.raises(CommandRefused):
        run_command(command, ct_of(lumbar()), work(tmp_path))

    assert "PATH" in shown.read_text()
    assert "SECRET" not in shown.read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"version": "1"}, "give a version, or a version_command"),
        ({"version_command": None}, "give a version, or a version_command"),
        ({"command": ["tool", "{image}"]}, r"no part names \{output\}"),
        ({"command": ["tool", "{output}"]}, r"no part names \{image\}"),
        ({"labels": "mine"}, "labels"),
        ({"roi": "spine"}, "roi"),
        ({"output": "../outside.nii.gz"}, "output"),
        ({"output": "/etc/labels.nii.gz"}, "output"),
        ({"unknown": 1}, "unknown"),
        ({"name": "A name"}, "name"),
        ({"seconds": 0}, "seconds"),
    ],
)
def test_a_declaration_s_faults_are_told(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(FractureSweepError, match=said):
        read_declaration(declared(tmp_path, **more))


def test_a_table_of_labels_is_checked_whole(tmp_path: Path) -> None:
    path = declared(tmp_path, labels=None)
    path.write_text(path.read_text() + '[labels]\n"0" = "L1"\n"7" = "L9"\n"8" = "L2"\n"9" = "L2"\n"10" = ""\n')

    with pytest.raises(FractureSweepError) as refused:
        read_declaration(path)

    for fault in ("'0' is no label value", "'L9' is no level", "L2 has two values"):
        assert fault in str(refused.value)


@pytest.mark.parametrize("text", ["this is = = no TOML", "\x00"])
def test_a_file_that_is_no_declaration_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "command.toml"
    path.write_text(text)

    with pytest.raises(FractureSweepError, match="no TOML"):
        read_declaration(path)


def test_a_tool_that_is_not_there_is_said_when_the_worker_starts(tmp_path: Path) -> None:
    path = declared(tmp_path, command=["no-such-segmenter", "{image}", "{output}"])

    with pytest.raises(FractureSweepError, match="no program 'no-such-segmenter' on PATH"):
        build(store=FolderStore(tmp_path / "store"), settings=SegmenterSettings(source="command", command=path))


def test_a_version_that_cannot_be_had_is_said_too(tmp_path: Path) -> None:
    path = declared(tmp_path, version_command=[sys.executable, "-c", "raise SystemExit(4)"])

    with pytest.raises(FractureSweepError, match="ended with exit code 4"):
        plug_in(read_declaration(path))


# in the service --------------------------------------------------------------------------------------------------
A, B, C, IMAGE = "a" * 64, "b" * 64, "c" * 64, "9" * 64
FACT = SeriesStored(study_id=A, series_id=B, manifest_id=C, protocols=Protocols(crop_hash=A, hcr_hash=B, dtl_hash=C))


def told(store: FolderStore, path: Path) -> MasksReady:
    service = build(store=store, settings=SegmenterSettings(source="command", command=path), pool=Here())
    (fact,) = service.handlers[SeriesStored](FACT)
    assert isinstance(fact, MasksReady)
    return fact


@pytest.fixture
def store(tmp_path: Path, scan: Volume) -> FolderStore:
    found = FolderStore(tmp_path / "store")
    found.put(keys.volume(B, IMAGE), to_nrrd(scan))
    write_record(found, keys.manifest(B, C), manifest())
    return found


def test_a_command_s_vertebrae_are_cut_named_measured_and_gated(store: FolderStore, tmp_path: Path) -> None:
    fact = told(store, declared(tmp_path))

    masks = read_record(store, keys.mask_record(B, fact.mask_hash), MaskRecord)
    spine = read_record(store, keys.spine(B, fact.spine_hash or ""), SpineRecord)
    assert (masks.source, masks.roi_kind) == ("automatic", "body")
    assert tuple(masks.levels) == LEVELS
    assert spine.segmenter.name == "stand-in"
    assert spine.gated
    assert {one.level: one.decision for one in spine.findings} == dict.fromkeys(LEVELS, "not-fractured") | {
        "L2": "fractured"
    }


def test_names_that_cannot_be_right_are_not_passed_on(store: FolderStore, tmp_path: Path) -> None:
    fact = told(store, declared(tmp_path, "gap"))

    spine = read_record(store, keys.spine(B, fact.spine_hash or ""), SpineRecord)
    assert spine.levels_from == "nothing"
    assert [one.level for one in spine.findings] == ["B05", "B04", "B03", "B02", "B01"]
    assert any("no body is found (L3)" in doubt for doubt in spine.doubts)


def test_a_command_that_fails_costs_its_series_alone(store: FolderStore, tmp_path: Path) -> None:
    with pytest.raises(Reject, match="its weights are not installed"):
        told(store, declared(tmp_path, "weights"))

    assert not list(store.keys("masks/"))
    assert told(store, declared(tmp_path)).mask_hash


@pytest.mark.parametrize(
    "path", sorted((ROOT / "deploy" / "segmenters" / "commands").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_ready_made_declarations_can_be_read(path: Path) -> None:
    found = read_declaration(path)

    assert found.name == path.stem
    levels = found.table.levels
    assert {"T1", "L5"} <= set(levels.values())
