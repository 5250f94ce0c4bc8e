from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.trainer.segmentation.anatomy import Anatomy
from services.trainer.segmentation.appearance import draw_appearance
from services.trainer.segmentation.scanner import OUTSIDE_HU, draw_scanner, scanned
from services.trainer.segmentation.synthesis import elastic, rotation, synthesise
from services.trainer.segmentation.tissues import CODE, IGNORED, NETWORK_CLASSES
from services.trainer.segmentation.volumes import make_volumes, paths, read_volume

SHAPE = (64, 64, 32)


def test_the_same_number_gives_the_same_volume_and_another_number_another(anatomy: Anatomy) -> None:
    one, two = (synthesise(anatomy, seed=5, index=3, shape=SHAPE) for _ in range(2))
    other = synthesise(anatomy, seed=5, index=4, shape=SHAPE)

    assert np.array_equal(one.hu, two.hu)
    assert np.array_equal(one.labels, two.labels)
    assert not np.array_equal(one.hu, other.hu)


def test_a_volume_holds_hu_and_the_network_s_classes(anatomy: Anatomy) -> None:
    for index in range(6):
        made = synthesise(anatomy, seed=1, index=index, shape=SHAPE)

        assert made.hu.dtype == np.int16
        assert made.hu.min() >= OUTSIDE_HU
        assert made.hu.max() <= 3071
        assert set(np.unique(made.labels).tolist()) <= {*range(len(NETWORK_CLASSES)), IGNORED}
        assert made.labels.shape == made.hu.shape == made.vertebra.shape == SHAPE
        assert not made.vertebra[made.labels == 0].any()


def test_what_the_scan_does_not_show_has_no_label(anatomy: Anatomy) -> None:
    for index in range(12):
        made = synthesise(anatomy, seed=2, index=index, shape=SHAPE)
        hidden = made.hu == OUTSIDE_HU
        if hidden.mean() > 0.3:
            assert (made.labels[hidden] == 0).mean() > 0.99
            return
    pytest.fail("none of twelve volumes had a limited field of view")


def test_bone_of_the_spine_is_brighter_than_the_fat_around_it(anatomy: Anatomy) -> None:
    rng = np.random.default_rng(0)

    looks = [draw_appearance(rng) for _ in range(200)]

    assert all(look.mean[CODE["body"]] > look.mean[CODE["fat"]] for look in looks)
    assert 0.5 < np.mean([look.trabecular < 110 for look in looks]) < 0.75  # most spines that matter are osteopenic


def test_thick_slices_blur_along_the_patient_alone() -> None:
    hu = np.zeros((60, 20, 20), dtype=np.float32)
    hu[30:] = 1000
    rng = np.random.default_rng(0)
    quiet = {"blur_mm": 0.01, "sharpening": 0.0, "noise_hu": 0.0, "noise_sigma": 0.5}

    def width(slice_mm: float) -> float:
        scanner = draw_scanner(rng, slice_mm=slice_mm)
        column = scanned(hu, type(scanner)(slice_mm=slice_mm, **quiet), np.random.default_rng(1))[:, 10, 10]
        return float(((column > 100) & (column < 900)).sum())

    assert width(5.0) > width(1.0)


def test_noise_has_the_scanner_s_size() -> None:
    scanner = draw_scanner(np.random.default_rng(0), slice_mm=1.5)
    loud = type(scanner)(slice_mm=1.5, blur_mm=0.5, sharpening=0.0, noise_hu=50.0, noise_sigma=0.5)

    found = scanned(np.zeros((40, 40, 40), dtype=np.float32), loud, np.random.default_rng(1))

    assert 35 < float(found.std()) < 55


def test_an_elastic_displacement_is_smooth_and_no_farther_than_told() -> None:
    field = elastic((40, 30, 20), np.random.default_rng(3), 6.0)

    assert np.abs(field).max() == pytest.approx(6.0)
    assert np.abs(np.diff(field, axis=0)).max() < 1.5


def test_a_rotation_is_one() -> None:
    matrix = rotation(np.deg2rad(np.array([7.0, -12.0, 4.0])))

    assert matrix @ matrix.T == pytest.approx(np.eye(3))
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_volumes_are_made_once_and_lie_slice_by_slice(anatomy_file: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    arguments = {"anatomies": [anatomy_file], "count": 2, "seed": 1, "processes": 1}
    make_volumes(tmp_path, progress=lambda done, total: told.append((done, total)), **arguments)
    before = [path.stat().st_mtime_ns for n in range(2) for path in paths(tmp_path, n)]

    make_volumes(tmp_path, progress=lambda done, total: told.append((done, total)), **arguments)

    assert [path.stat().st_mtime_ns for n in range(2) for path in paths(tmp_path, n)] == before
    assert told == [(0, 2), (1, 2), (2, 2), (2, 2)]
    hu, labels = read_volume(tmp_path, 1)
    assert hu.shape == labels.shape == (64, 176, 112)
    assert (hu.dtype, labels.dtype) == (np.int16, np.uint8)


def test_half_a_volume_is_made_again(anatomy_file: Path, tmp_path: Path) -> None:
    arguments = {"anatomies": [anatomy_file], "count": 1, "seed": 1, "processes": 1, "progress": lambda d, t: None}
    make_volumes(tmp_path, **arguments)
    whole = paths(tmp_path, 0)[1].read_bytes()
    paths(tmp_path, 0)[1].unlink()

    make_volumes(tmp_path, **arguments)

    assert paths(tmp_path, 0)[1].read_bytes() == whole
