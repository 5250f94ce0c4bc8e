from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from services.trainer.phantoms.archive import write_archive
from services.trainer.phantoms.cohort import SIGNS, Patient
from services.trainer.phantoms.rendering import LABELS, SPINE_LEVELS
from services.trainer.phantoms.whole_spine import WholeSpine, render_spine, spine_patient
from shared.fracture.spine.chain import from_bodies, measured_chain
from shared.fracture.spine.findings import findings_of
from shared.fracture.spine.gate import GateSettings
from shared.fracture.spine.record import Finding

LEVELS = SPINE_LEVELS[:-1]


def _coarse(patient: Patient) -> Patient:
    return replace(patient, spacing_zyx=(1.5, 1.0, 1.0), slice_thickness_mm=1.5)


def _with(patient: Patient, *, loss: float, deformity: str = "wedge") -> Patient:
    """The patient with one fracture of L2 and no sign but its shape."""
    fracture = replace(
        spine_patient(seed=3, index=0).fractures[0],
        level="L2",
        strengths=dict.fromkeys(SIGNS, 0.0),
        height_loss=loss,
        deformity=deformity,  # type: ignore[arg-type]
    )
    return replace(patient, fractures=(fracture,))


def _findings(spine: WholeSpine) -> dict[str, Finding]:
    labels = spine.bodies.voxels
    bodies, kept = from_bodies(
        labels, [LABELS[level] for level in LEVELS], spacing_zyx=spine.bodies.geometry.spacing_zyx
    )
    assert len(kept) == len(LEVELS)
    chain = measured_chain(bodies)
    return {one.level: one for one in findings_of(LEVELS, chain, limits=GateSettings())}


@pytest.fixture(scope="module")
def healthy() -> WholeSpine:
    return render_spine(_coarse(spine_patient(seed=3, index=3)))


def test_every_fourth_whole_spine_has_no_fracture() -> None:
    counts = [len(spine_patient(seed=3, index=index).fractures) for index in range(8)]

    assert [n == 0 for n in counts] == [False, False, False, True] * 2


def test_the_same_patient_gives_the_same_voxels(healthy: WholeSpine) -> None:
    again = render_spine(_coarse(spine_patient(seed=3, index=3)))

    assert np.array_equal(again.volume.voxels, healthy.volume.voxels)


def test_all_bodies_from_the_ninth_thoracic_to_the_fifth_lumbar_are_there_whole(healthy: WholeSpine) -> None:
    found = _findings(healthy)

    assert [one.decision for one in found.values()] == ["not-fractured"] * len(LEVELS)
    assert all(5 < one.volume_ml < 70 for one in found.values())
    heights = [one.posterior_mm.value for one in found.values() if one.posterior_mm is not None]
    assert len(heights) == len(LEVELS)
    assert heights[-1] > heights[0]


@pytest.mark.parametrize("deformity", ["wedge", "biconcave", "crush"])
def test_a_fracture_of_two_fifths_is_found_by_its_heights_and_no_other_is(deformity: str) -> None:
    patient = _coarse(spine_patient(seed=3, index=3))

    found = _findings(render_spine(_with(patient, loss=0.4, deformity=deformity)))

    assert {level for level, one in found.items() if one.decision == "fractured"} == {"L2"}
    assert found["L2"].loss is not None
    assert found["L2"].loss.value == pytest.approx(0.4, abs=0.1)


def test_ribs_sacrum_and_skin_are_where_levels_are_counted_from(healthy: WholeSpine) -> None:
    volume, bodies = healthy.volume, healthy.bodies.voxels
    sy, sx = volume.geometry.spacing_zyx[1:]

    def beside(level: str) -> float:
        """Millilitres of bone at the place where a rib of a vertebra would begin."""
        k, j, i = (int(np.mean(axis)) for axis in np.nonzero(bodies == LABELS[level]))
        half = int(np.ptp(np.nonzero(bodies == LABELS[level])[2]) / 2)
        near = volume.voxels[
            k - 6 : k + 7,
            j + int(4 / sy) : j + int(34 / sy),
            np.r_[i - half - int(24 / sx) : i - half - int(6 / sx), i + half + int(6 / sx) : i + half + int(24 / sx)],
        ]
        return float((near > 180).sum() * np.prod(volume.geometry.spacing_zyx) / 1000)

    assert all(beside(level) > 0.5 for level in ("T10", "T11", "T12"))
    assert all(beside(level) < 0.1 for level in ("L1", "L2", "L3", "L4"))
    assert (volume.voxels[:, -1] < -900).mean() > 0.3
    below = np.nonzero(bodies == LABELS["L5"])[0].min() - int(20 / volume.geometry.spacing_zyx[0])
    sacrum = volume.voxels[:below] > 150
    assert sacrum.sum() * np.prod(volume.geometry.spacing_zyx) / 1000 > 8


def test_whole_spines_of_an_archive_bring_no_masks_and_are_the_same_in_a_larger_one(tmp_path: Path) -> None:
    alone = write_archive(tmp_path / "alone", patients=0, spines=1, seed=2)
    beside = write_archive(tmp_path / "beside", patients=1, spines=1, seed=2)

    assert [study.segmentation is None for study in beside] == [False, True]
    assert beside[1].study_uid == alone[0].study_uid
    assert {pydicom.dcmread(path, stop_before_pixels=True).Modality for path in alone[0].images} == {"CT"}
    assert (tmp_path / "alone" / "truth.csv").read_text().count("synthetic phantom") == len(
        spine_patient(seed=2, index=5000).fractures
    )


def test_an_archive_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one patient"):
        write_archive(tmp_path, patients=0, seed=2)
