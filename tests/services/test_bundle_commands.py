"""`fracture-sweep bundle …` as a person types it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.__main__ import bundle_app
from shared.fracture.bundle import load_bundle
from shared.fracture.bundle_files import BundleError
from shared.fracture.bundle_notes import with_notes
from shared.pipeline.errors import FractureSweepError
from tests.fixtures.small_bundle import reseal, stump, write_classifier_bundle, write_small_bundle

ROOT = Path(__file__).resolve().parents[2]
RUNNER = CliRunner()


def test_check_says_of_each_bundle_that_it_comes_out(tmp_path: Path) -> None:
    linear, classifiers = write_small_bundle(tmp_path / "a"), write_classifier_bundle(tmp_path / "b")

    done = RUNNER.invoke(bundle_app, ["check", str(linear), str(classifiers)])

    lines = done.stdout.splitlines()
    assert done.exit_code == 0
    assert [line.split(": ", 1)[0] for line in lines] == [str(linear), str(classifiers)]
    assert all(line.endswith("1 golden vector comes out, and so does the golden image") for line in lines)
    assert "classifiers: hcr svm, fusion random-forest" in lines[1]


def test_check_refuses_with_one_sentence_and_goes_on(tmp_path: Path) -> None:
    wrong, right = write_classifier_bundle(tmp_path / "wrong"), write_small_bundle(tmp_path / "right")
    (wrong / "classifier-hcr.onnx").write_bytes(stump(width=2, feature=0, left=0.0, right=9.0))
    reseal(wrong)

    done = RUNNER.invoke(bundle_app, ["check", str(wrong), str(right)])

    assert done.exit_code == 2
    assert done.stderr.startswith(f"fracture-sweep: {wrong}: golden vector 1 gives a HCR probability of")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.startswith(f"{right}: ")


def test_check_computes_the_golden_image_too(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "bundle")
    before, mark, after = (folder / "golden.json").read_text().partition('"features":[')
    (folder / "golden.json").write_text(f"{before}{mark}9{after}")
    reseal(folder)

    done = RUNNER.invoke(bundle_app, ["check", str(folder)])

    assert done.exit_code == 2
    assert "the golden image's features differ by" in done.stderr


def test_show_describes_a_bundle(tmp_path: Path) -> None:
    done = RUNNER.invoke(bundle_app, ["show", str(write_classifier_bundle(tmp_path / "bundle"))])

    assert done.exit_code == 0
    assert "fusion model: 3 features, lasso score" in done.stdout


def test_diff_says_what_changed_and_when_nothing_did(tmp_path: Path) -> None:
    old, new = write_small_bundle(tmp_path / "old"), write_small_bundle(tmp_path / "new", threshold=0.25)

    changed = RUNNER.invoke(bundle_app, ["diff", str(old), str(new)])
    same = RUNNER.invoke(bundle_app, ["diff", str(old), str(old)])

    assert "threshold of the fusion model: 0.5 → 0.25" in changed.stdout.splitlines()
    assert same.stdout.splitlines()[-1] == "nothing changed: it is the same bundle"
    assert changed.exit_code == same.exit_code == 0


def test_a_folder_that_is_no_bundle_is_an_error_of_the_bundle(tmp_path: Path) -> None:
    done = RUNNER.invoke(bundle_app, ["show", str(tmp_path)])

    assert isinstance(done.exception, BundleError)


@pytest.mark.parametrize("command", ["show", "check"])
def test_the_command_line_refuses_with_exit_code_2_and_one_sentence(tmp_path: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services", "bundle", command, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "it has no manifest" in done.stderr


def test_a_packed_bundle_is_checked_shown_and_compared_like_its_folder(tmp_path: Path) -> None:
    folder, file = write_classifier_bundle(tmp_path / "bundle"), tmp_path / "bundle.zip"

    packed = RUNNER.invoke(bundle_app, ["pack", str(folder), str(file)])

    assert packed.exit_code == 0
    assert hashlib.sha256(file.read_bytes()).hexdigest() in packed.stdout
    for command, tail in (("check", "so does the golden image"), ("show", ""), ("diff", "")):
        both = [str(folder)] if command == "diff" else []
        done = RUNNER.invoke(bundle_app, [command, *both, str(file)])
        assert done.exit_code == 0, done.output
        assert tail in done.stdout
    assert "it is the same bundle" in done.stdout


def test_a_zip_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "bundle")

    done = RUNNER.invoke(bundle_app, ["pack", str(folder), str(tmp_path / "not" / "there.zip")])

    assert isinstance(done.exception, FractureSweepError)
    assert "cannot be written: No such file or directory" in str(done.exception)


def test_notes_go_into_the_model_card_and_nothing_else_changes(tmp_path: Path) -> None:
    folder, notes, new = write_classifier_bundle(tmp_path / "bundle"), tmp_path / "notes.md", tmp_path / "new"
    notes.write_text("External validation: AUC 0.8 on 40 patients.\n")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    done = RUNNER.invoke(bundle_app, ["annotate", str(folder), str(notes), str(new), "--bundle-version", "9"])

    assert done.exit_code == 0, done.output
    assert "MODEL_CARD.md" in done.stdout
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    after = {file.name: file.read_bytes() for file in new.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"MODEL_CARD.md", "manifest.json"}
    card = after["MODEL_CARD.md"].decode()
    assert card.endswith("## Notes of its makers\nExternal validation: AUC 0.8 on 40 patients.\n")
    bundle = load_bundle(new, run_classifiers=True)
    assert bundle.manifest.version == "9"
    assert bundle.bundle_id != load_bundle(folder).bundle_id
    assert with_notes(card, "other").count("## Notes of its makers") == 1
    assert with_notes(card, "") == before["MODEL_CARD.md"].decode()


@pytest.mark.parametrize(
    ("notes", "out", "version", "sentence"),
    [
        ("notes.md", "bundle", "9", "is there already"),
        ("none.md", "new", "9", "cannot be read as text"),
        ("notes.md", "new", "1.0.0", "two bundles would go by one name"),
    ],
)
def test_notes_that_cannot_be_put_in_say_why(notes: str, out: str, version: str, sentence: str, tmp_path: Path) -> None:
    write_small_bundle(tmp_path / "bundle")
    (tmp_path / "notes.md").write_text("words")
    arguments = [str(tmp_path / "bundle"), str(tmp_path / notes), str(tmp_path / out), "--bundle-version", version]

    done = RUNNER.invoke(bundle_app, ["annotate", *arguments])

    assert isinstance(done.exception, FractureSweepError)
    assert sentence in str(done.exception)
    assert not (tmp_path / "new").exists()
