from dataclasses import replace

import numpy as np

from services.trainer.phantoms.cohort import SIGNS, Patient, draw_patient
from services.trainer.phantoms.rendering import LABELS, render
from shared.fracture.crop import crop_vertebra
from shared.fracture.protocol import preset_crop
from shared.fracture.volume import Mask


def _patient(**signs: float) -> Patient:
    patient = draw_patient(seed=11, index=0, fractures=1)
    fracture = replace(
        patient.fractures[0],
        strengths={**dict.fromkeys(SIGNS, 0.0), **signs},
        deformity="crush",
        height_loss=0.15,
        density_shift_hu=0.0,
    )
    return replace(patient, fractures=(fracture,), noise_hu=5.0, spacing_zyx=(1.0, 0.8, 0.8), slice_thickness_mm=1.0)


def _inside(patient: Patient) -> np.ndarray:
    rendered = render(patient)
    return rendered.volume.voxels[rendered.masks[0].voxels > 0]


def test_the_same_patient_gives_the_same_voxels() -> None:
    patient = draw_patient(seed=11, index=3)

    first, second = render(patient, readers=2), render(patient, readers=2)

    assert np.array_equal(first.volume.voxels, second.volume.voxels)
    assert np.array_equal(first.masks[1].voxels, second.masks[1].voxels)


def test_the_mask_holds_the_fractured_bodies_alone_and_each_is_of_human_size() -> None:
    patient = draw_patient(seed=11, index=4, fractures=2)

    rendered = render(patient)

    found = {int(value) for value in np.unique(rendered.masks[0].voxels)} - {0}
    assert found == {LABELS[fracture.level] for fracture in patient.fractures}
    voxel_ml = np.prod(patient.spacing_zyx) / 1000
    assert all(5 < (rendered.masks[0].voxels == value).sum() * voxel_ml < 60 for value in found)


def test_a_second_reader_draws_nearly_the_same() -> None:
    rendered = render(draw_patient(seed=11, index=5), readers=2)

    first, second = (mask.voxels > 0 for mask in rendered.masks)
    dice = 2 * (first & second).sum() / (first.sum() + second.sum())

    assert 0.9 < dice < 1.0


def test_a_healthy_patient_has_an_empty_mask() -> None:
    rendered = render(draw_patient(seed=11, index=6, fractures=0))

    assert not rendered.masks[0].voxels.any()


def test_a_crop_with_its_margin_lies_inside_the_slab() -> None:
    patient = draw_patient(seed=11, index=0, fractures=1)
    rendered = render(patient)

    roi = Mask(voxels=(rendered.masks[0].voxels > 0).astype(np.uint8), geometry=rendered.volume.geometry)
    crop = crop_vertebra(rendered.volume, roi, preset_crop("recommended"))

    assert crop.warnings == ()
    assert crop.smallest_margin_mm >= 20


def test_a_condensation_band_and_sclerosis_are_denser_and_a_cleft_holds_gas() -> None:
    plain = _inside(_patient())

    assert _inside(_patient(band=1.0)).mean() > plain.mean() + 5
    assert np.percentile(_inside(_patient(sclerosis=1.0)), 95) > np.percentile(plain, 95) + 20
    assert _inside(_patient(vacuum=1.0)).min() < plain.min() - 200


def test_swelling_changes_the_surroundings_and_not_the_body() -> None:
    plain, swollen = render(_patient()), render(_patient(swelling=1.0))

    outside = plain.masks[0].voxels == 0
    change = swollen.volume.voxels.astype(int) - plain.volume.voxels
    assert change[outside].max() > 60
    assert abs(change[~outside].mean()) < 3
