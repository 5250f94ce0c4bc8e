"""The report as files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from services.trainer.figures.catalogue import run_figures
from services.trainer.run_report.writing import write_run_report
from tests.fixtures.run_results import hcr_names, make_result

FULL = make_result(patients=60, names=hcr_names()[::13], most=12, folds=(), kinds=(), test=False)
RESULT = FULL.model_copy(update={"selections": FULL.selections[2:]})
TABLES = [("table-1", "<table><tbody><tr><td>Age</td></tr></tbody></table>")]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_run_gives_the_same_files_to_the_byte(tmp_path: Path) -> None:
    report = write_run_report(RESULT, TABLES, tmp_path / "first")
    write_run_report(RESULT, TABLES, tmp_path / "second")

    first = digests(tmp_path / "first")
    drawn = [figure.name for figure in run_figures(RESULT) if not figure.data.absent]
    assert report == tmp_path / "first" / "report.html"
    assert set(first) == {
        "report.html",
        "tripod-ai.csv",
        "tripod-ai.md",
        *(f"figures/{name}.{kind}" for name in drawn for kind in ("svg", "png", "csv")),
    }
    assert first == digests(tmp_path / "second")
