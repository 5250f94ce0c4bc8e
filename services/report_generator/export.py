"""A sweep's worklist and reports as plain files in a folder, with links that work there.

The store names things by hashes; a person opens `worklist.html` and follows its links. Written anew at each call,
each file aside and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import SimpleITK as sitk

from services.report_generator.page import worklist_page
from services.report_generator.study_report import StudyReport
from services.report_generator.worklist import Worklist, to_csv
from services.report_generator.worklists import newest_worklist, patients_of
from shared.fracture import keys
from shared.fracture.ids import short
from shared.fracture.ledger import Ledger
from shared.fracture.volume import mask_from_nrrd, to_sitk
from shared.pipeline.errors import FractureSweepError, NotInStore
from shared.pipeline.store import Store


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What lies where: the three worklists and the page of each study's report, by study id."""

    worklist_html: Path
    worklist_csv: Path
    worklist_json: Path
    reports: dict[str, Path]


def export_sweep(store: Store, sweep_id: str, out: Path, *, named: bool = False) -> Exported:
    """Write worklist.html, .csv, .json and reports/<study>/report.html, .json of the newest revisions into `out`.

    `named`: the restricted copies (with names) as well, under `out`/named. FractureSweepError where the sweep has no
    worklist yet, or where named copies are asked for and there are none.
    """
    worklist = newest_worklist(store, sweep_id)
    if worklist is None:
        raise FractureSweepError("the sweep has no worklist yet; let the report-generator run, then export again")
    folders = _folders(worklist.reports)
    reports = {
        study_id: _export_report(store, study_id, report_id, out / folders[study_id], named=False)
        for study_id, report_id in sorted(worklist.reports.items())
    }

    def link(study_id: str, report_id: str) -> str:
        return f"{folders[study_id]}/report.html"

    done = Exported(
        worklist_html=out / "worklist.html",
        worklist_csv=out / "worklist.csv",
        worklist_json=out / "worklist.json",
        reports=reports,
    )
    _write(done.worklist_html, worklist_page(worklist, link=link).encode())
    _write(done.worklist_csv, to_csv(worklist, link=link).encode())
    _write(done.worklist_json, worklist.to_bytes())
    if named:
        for study_id, report_id in sorted(worklist.reports.items()):
            _export_report(store, study_id, report_id, out / "named" / folders[study_id], named=True)
        page = worklist_page(worklist, link=link, patients=patients_of(store, worklist))
        _write(out / "named" / "worklist.html", page.encode())
    return done


def is_current(store: Store, ledger: Ledger) -> bool:
    """Whether the newest worklist of a sweep says what its ledger says (it is made at intervals, and at the end)."""
    worklist = newest_worklist(store, ledger.sweep_id)
    return worklist is not None and worklist.ledger == ledger.as_json()


def export_again(store: Store, out: Path) -> Exported | None:
    """Write anew what lies in a folder that was exported before (named copies too, where it has them); None else."""
    try:
        shown = Worklist.model_validate_json((out / "worklist.json").read_bytes())
    except (OSError, ValueError):
        return None
    return export_sweep(store, shown.sweep_id, out, named=(out / "named").is_dir())


def _folders(reports: dict[str, str]) -> dict[str, str]:
    shared = Counter(short(study_id) for study_id in reports)
    return {
        study_id: f"reports/{short(study_id) if shared[short(study_id)] == 1 else study_id}" for study_id in reports
    }


def _export_report(store: Store, study_id: str, report_id: str, folder: Path, *, named: bool) -> Path:
    suffixes: tuple[Literal["html", "json"], ...] = ("html", "json")
    for suffix in suffixes:
        key = (keys.named_report if named else keys.report)(study_id, report_id, suffix)
        try:
            data = store.get(key)
        except NotInStore:
            what = (
                "named copies of the reports; run with named_reports on" if named else f"the report {short(report_id)}"
            )
            raise FractureSweepError(f"the store does not hold {what}") from None
        _write(folder / f"report.{suffix}", data)
    if named:
        _export_segmentations(store, study_id, report_id, folder)
    else:
        _export_masks(store, folder)
    return folder / "report.html"


def _export_segmentations(store: Store, study_id: str, report_id: str, folder: Path) -> None:
    """The DICOM SEG objects beside a named copy."""
    shown = StudyReport.model_validate_json(store.get(keys.report(study_id, report_id, "json")))
    for series in shown.series:
        key = keys.named_segmentation(study_id, report_id, series.series_id)
        if series.spine is not None and store.exists(key):
            _write(folder / f"bodies-{short(series.series_id)}.dcm", store.get(key))


def _export_masks(store: Store, folder: Path) -> None:
    """The label maps that were made for a study, as NIfTI (VerSe's ids), where retention has not dropped them."""
    shown = StudyReport.model_validate_json((folder / "report.json").read_bytes())
    for series in shown.series:
        spine = series.spine
        if spine is None or spine.segmenter.kind == "given":
            continue
        try:
            labels = mask_from_nrrd(store.get(keys.mask(series.series_id, spine.mask_hash)))
        except NotInStore:
            continue
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "bodies.nii.gz"
            sitk.WriteImage(to_sitk(labels), str(path), useCompression=True)
            _write(folder / f"bodies-{short(series.series_id)}.nii.gz", path.read_bytes())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
