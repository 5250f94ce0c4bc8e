from __future__ import annotations

import csv
from pathlib import Path

import pytest

from services.report_generator.export import export_sweep
from services.report_generator.service import build
from services.report_generator.settings import ReportGeneratorSettings
from services.report_generator.study_report import StudyReport
from services.report_generator.worklist import Worklist
from shared.fracture.ids import digest
from shared.fracture.messages import SweepClosed
from shared.pipeline.errors import FractureSweepError
from shared.pipeline.store import Store
from tests.services.report_generator.pages import Page
from tests.services.report_generator.sample import (
    SampleBundle,
    SampleCase,
    SampleStudy,
    fact_of,
    write_identity,
    write_study,
    write_sweep,
)

STUDIES = (SampleStudy(name="a"), SampleStudy(name="b", cases=(SampleCase(level="S1", end="not-evaluated"),)))


def swept(store: Store, bundle: SampleBundle, *, named: bool = False) -> str:
    service = build(store=store, bundle=bundle, settings=ReportGeneratorSettings(named_reports=named))
    sweep_id = write_sweep(store, "night", STUDIES, bundle, closed=True)
    for study in STUDIES:
        write_study(store, study, bundle)
        write_identity(store, study)
        fact = fact_of(study, bundle)
        list(service.handlers[type(fact)](fact))
    list(service.handlers[SweepClosed](SweepClosed(sweep_id=sweep_id)))
    return sweep_id


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_sweep_becomes_a_folder_of_plain_files(store: Store, bundle: SampleBundle, tmp_path: Path) -> None:
    out = tmp_path / "out"

    done = export_sweep(store, swept(store, bundle), out)

    reports = {f"reports/{study.study_id[:12]}/report.{suffix}" for study in STUDIES for suffix in ("html", "json")}
    assert files_in(out) == {"worklist.html", "worklist.csv", "worklist.json", *reports}
    assert set(done.reports) == {study.study_id for study in STUDIES}
    Worklist.model_validate_json(done.worklist_json.read_bytes())
    for page in done.reports.values():
        StudyReport.model_validate_json(page.with_suffix(".json").read_bytes())


def test_every_link_of_the_exported_pages_leads_to_a_file(store: Store, bundle: SampleBundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export_sweep(store, swept(store, bundle, named=True), out, named=True)

    for page in (done.worklist_html, out / "named" / "worklist.html"):
        links = [value for tag, _, value in Page(page.read_text()).asked if tag == "a"]
        assert links
        assert all((page.parent / value).is_file() for value in links)
    with done.worklist_csv.open(newline="") as stream:
        assert all((out / row["report"]).is_file() for row in csv.DictReader(stream))


def test_names_are_exported_when_asked_for_alone(store: Store, bundle: SampleBundle, tmp_path: Path) -> None:
    sweep_id = swept(store, bundle, named=True)

    export_sweep(store, sweep_id, tmp_path / "plain")
    export_sweep(store, sweep_id, tmp_path / "both", named=True)

    assert not [path for path in files_in(tmp_path / "plain") if path.startswith("named/")]
    texts = [path.read_text() for path in (tmp_path / "plain").rglob("*") if path.is_file()]
    assert not [text for text in texts if "MUSTERFRAU" in text]
    assert "MUSTERFRAU, ERIKA DR" in (tmp_path / "both" / "named" / "worklist.html").read_text()


def test_named_copies_that_were_never_written_are_asked_for_in_vain(
    store: Store, bundle: SampleBundle, tmp_path: Path
) -> None:
    sweep_id = swept(store, bundle)

    with pytest.raises(FractureSweepError, match="named_reports"):
        export_sweep(store, sweep_id, tmp_path / "out", named=True)


def test_a_sweep_without_a_worklist_is_one_clear_sentence(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FractureSweepError, match="no worklist yet"):
        export_sweep(store, digest("nothing"), tmp_path / "out")


def test_an_export_again_replaces_the_files(store: Store, bundle: SampleBundle, tmp_path: Path) -> None:
    sweep_id = swept(store, bundle)
    done = export_sweep(store, sweep_id, tmp_path / "out")
    before = done.worklist_html.read_bytes()
    done.worklist_html.write_text("old")

    export_sweep(store, sweep_id, tmp_path / "out")

    assert done.worklist_html.read_bytes() == before
