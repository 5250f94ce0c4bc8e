"""A series that is too much for the budget costs itself alone, and is finished once the budget is raised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from services.composition import bundle_of
from services.embedded import pipeline
from shared.fracture.volume import Geometry, Mask, Volume, to_sitk
from shared.records.dead_letters import Survey, letters, replay
from shared.records.ledger import sweep_ledger
from tests.fixtures.runs import place

pytestmark = pytest.mark.timeout(300)


def write_pair(folder: Path, name: str, *, shape_zyx: tuple[int, int, int], seed: int) -> str:
    """A scan with one vertebra of 16 mL near its first corner, and its label map; the row that names them."""
    geometry = Geometry(
        shape_zyx=shape_zyx,
        spacing_zyx=(1.0, 1.0, 1.0),
        origin_zyx=(0.0, 0.0, 0.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    hu = np.zeros(shape_zyx, dtype=np.int16)
    hu[:70, :80, :80] = np.random.default_rng(seed).integers(0, 400, (70, 80, 80))
    labels = np.zeros(shape_zyx, dtype=np.uint8)
    labels[30:50, 30:60, 30:57] = 22
    sitk.WriteImage(to_sitk(Volume(voxels=hu, geometry=geometry)), str(folder / f"{name}.nii.gz"))
    sitk.WriteImage(to_sitk(Mask(voxels=labels, geometry=geometry)), str(folder / f"{name}-mask.nii.gz"))
    return f"{name}.nii.gz,{name}-mask.nii.gz,verse,body,{name}"


def test_a_poison_series_among_good_ones_is_dead_lettered_with_its_reason_and_finished_once_there_is_more_memory(
    tmp_path: Path, tiny_bundle: Path
) -> None:
    rows = [
        write_pair(tmp_path, "good", shape_zyx=(70, 80, 80), seed=1),
        write_pair(tmp_path, "poison", shape_zyx=(400, 512, 512), seed=2),
        write_pair(tmp_path, "also-good", shape_zyx=(70, 80, 80), seed=3),
    ]
    table = tmp_path / "pairs.csv"
    table.write_text("\n".join(["image,mask,labels,roi,study", *rows]) + "\n")
    narrow = place(tmp_path / "store", tiny_bundle, resampler__memory_gib="0.8")
    ran = narrow.run(table)
    given_up = list(letters(narrow.store))

    assert ran.ledger.exact
    assert ran.ledger.pending == 0
    assert ran.ledger.series.by_state["dead-lettered"] == 1
    assert ran.ledger.cases.by_state["reported"] == ran.ledger.cases.found == 2
    assert ran.ledger.reports == ran.ledger.studies == 3
    assert [(one.queue, one.kind, one.reason) for one in given_up] == [
        ("resampler", "over-budget", "the resampling wanted more than 0.8 GiB")
    ]

    wide = place(tmp_path / "store", tiny_bundle)
    with pipeline(settings=wide.settings, store=wide.store, bundle=bundle_of(wide.settings)) as running:
        first = replay(wide.store, running.broker, Survey(wide.store).standing(given_up[0]))
        running.wait_until_idle()
        second = replay(wide.store, running.broker, Survey(wide.store).standing(given_up[0]))

    ledger = sweep_ledger(wide.store, ran.sweep_id)
    assert ledger is not None
    assert (first, second) == ("replayed", "done since")
    assert ledger.exact
    assert ledger.series.by_state["dead-lettered"] == 0
    assert ledger.cases.by_state["reported"] == ledger.cases.found == 3


def test_series_over_their_time_are_dead_lettered_and_finished_once_it_is_raised(
    tmp_path: Path, tiny_bundle: Path, phantom_archive: Path
) -> None:
    hasty = place(tmp_path / "store", tiny_bundle, resampler__series_seconds="0.0001")
    ran = hasty.run(phantom_archive)
    given_up = list(letters(hasty.store))

    assert ran.ledger.exact
    assert ran.ledger.series.by_state["dead-lettered"] == len(given_up) > 0
    assert {letter.reason for letter in given_up} == {"the resampling took more than 0.0001 s"}

    patient = place(tmp_path / "store", tiny_bundle)
    with pipeline(settings=patient.settings, store=patient.store, bundle=bundle_of(patient.settings)) as running:
        for letter in given_up:
            replay(patient.store, running.broker, Survey(patient.store).standing(letter))
        running.wait_until_idle()

    ledger = sweep_ledger(patient.store, ran.sweep_id)
    assert ledger is not None
    assert ledger.exact
    assert ledger.series.by_state["dead-lettered"] == 0
    assert ledger.cases.by_state["reported"] == ledger.cases.found > 0
