"""The main job in one process: what is computed once is not computed again, and what changed is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from services.trainer.tiny_bundle import write_tiny_bundle
from shared.fracture.volume import Mask, to_sitk, volume_from_sitk
from shared.records.ledger import sweep_plan, sweep_states
from tests.fixtures.runs import Place, place


def scored(here: Place) -> dict[str, dict[str, object]]:
    """Classification by key of the result."""
    return {key: json.loads(data)["classification"] for key, data in here.objects("outcomes/classified/").items()}


@pytest.fixture
def here(tmp_path: Path, tiny_bundle: Path) -> Place:
    return place(tmp_path / "store", tiny_bundle)


def test_every_case_of_a_phantom_archive_is_reported(here: Place, phantom_archive: Path) -> None:
    ran = here.run(phantom_archive)

    assert ran.ledger.exact
    assert ran.ledger.pending == 0
    assert ran.ledger.cases.found > 0
    assert ran.ledger.cases.by_state["dead-lettered"] == 0
    assert ran.ledger.cases.by_state["reported"] > 0
    assert ran.ledger.reports == ran.ledger.studies
    assert len(list(here.store.keys("worklists/"))) > 0


def test_a_run_repeated_computes_nothing(here: Place, phantom_archive: Path) -> None:
    first = here.run(phantom_archive)
    before = here.objects("cases/", "features/", "outcomes/", "reports/", "volumes/", "plans/")

    second = here.run(phantom_archive)

    assert (first.computed, second.computed) == (True, False)
    assert here.objects("cases/", "features/", "outcomes/", "reports/", "volumes/", "plans/") == before


def test_another_classifier_recomputes_scores_and_reports_and_no_features(
    here: Place, phantom_archive: Path, tmp_path: Path
) -> None:
    here.run(phantom_archive)
    features, results = here.objects("features/"), scored(here)
    write_tiny_bundle(tmp_path / "other", image_types="original", classifier_seed=9)

    ran = place(tmp_path / "store", tmp_path / "other").run(phantom_archive)

    assert ran.computed
    assert here.objects("features/") == features
    assert len(scored(here)) == 2 * len(results)
    assert ran.ledger.reports == ran.ledger.studies


def test_another_network_recomputes_the_deep_features_alone(here: Place, phantom_archive: Path, tmp_path: Path) -> None:
    here.run(phantom_archive)
    hcr, dtl = here.objects("features/hcr/"), here.objects("features/dtl/")
    write_tiny_bundle(tmp_path / "other", image_types="original", network_seed=9)

    place(tmp_path / "store", tmp_path / "other").run(phantom_archive)

    assert here.objects("features/hcr/") == hcr
    assert len(here.objects("features/dtl/")) == 2 * len(dtl)


def images_of(archive: Path) -> dict[str, list[Path]]:
    """The CT files of an archive by series, in the order of their positions."""
    found: dict[str, list[tuple[float, Path]]] = {}
    for path in archive.rglob("*"):
        if path.is_file() and path.name != "truth.csv":
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            if ds.Modality == "CT":
                found.setdefault(ds.SeriesInstanceUID, []).append((float(ds.ImagePositionPatient[2]), path))
    return {uid: [path for _, path in sorted(files)] for uid, files in found.items()}


def test_one_more_slice_supersedes_the_result(here: Place, phantom_archive: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    shutil.copytree(phantom_archive, archive)
    last = next(iter(images_of(archive).values()))[-1]
    shutil.move(last, tmp_path / "late")
    before = here.run(archive)
    shutil.move(tmp_path / "late", last)

    after = here.run(archive)

    assert after.computed
    assert after.ledger.exact
    assert after.ledger.cases.by_state["superseded"] > 0
    assert after.ledger.cases.by_state["reported"] == before.ledger.cases.by_state["reported"]


def test_another_mask_makes_a_new_case(here: Place, tmp_path: Path, phantom_archive: Path) -> None:
    files = next(iter(images_of(phantom_archive).values()))
    folder = tmp_path / "series"
    folder.mkdir()
    for path in files:
        shutil.copy(path, folder / path.name)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in files])
    image = reader.Execute()
    sitk.WriteImage(image, str(tmp_path / "image.nii.gz"))
    geometry = volume_from_sitk(image).geometry
    depth, height, width = geometry.shape_zyx
    ran = []
    for size in (12, 14):
        voxels = np.zeros(geometry.shape_zyx, dtype=np.uint8)
        half = [max(2, round(size / s)) for s in geometry.spacing_zyx]
        z, y, x = depth // 2, height // 2, width // 2
        voxels[z - half[0] : z + half[0], y - half[1] : y + half[1], x - half[2] : x + half[2]] = 20
        sitk.WriteImage(to_sitk(Mask(voxels=voxels, geometry=geometry)), str(tmp_path / "mask.nii.gz"))
        (tmp_path / "pairs.csv").write_text("image,mask,labels,roi\nimage.nii.gz,mask.nii.gz,verse,body\n")
        ran.append(here.run(tmp_path / "pairs.csv"))

    assert [one.ledger.cases.by_state["reported"] for one in ran] == [1, 1]
    assert ran[1].ledger.cases.by_state["superseded"] == 1


def test_a_report_says_by_what_the_fracture_is_known(here: Place, phantom_archive: Path) -> None:
    ran = here.run(phantom_archive)

    plan = sweep_plan(here.store, ran.sweep_id)
    assert plan is not None
    for state in sweep_states(here.store, plan).values():
        page = here.store.get(f"reports/{state.study_id}/{state.report_id}.html").decode()
        if any(case.state(report_written=True) == "reported" for case in state.cases):
            assert "fracture given by the mask, not assessed" in page
        assert "no clinical meaning" in page
