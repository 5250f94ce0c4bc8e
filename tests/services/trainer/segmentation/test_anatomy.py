from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from services.trainer.segmentation.anatomy import (
    Anatomy,
    fingerprint,
    load_anatomy,
    read_anatomy,
    save_anatomy,
    subjects,
    trunk,
)
from services.trainer.segmentation.tissues import (
    CODE,
    IGNORED,
    NETWORK_CLASSES,
    TISSUES,
    class_of_tissue,
    tissue_of,
)
from shared.fracture.levels import ORDER
from shared.pipeline.errors import FractureSweepError
from tests.fixtures.label_maps import LEVELS, drawn_subject, write_label_maps


def test_whole_vertebrae_become_bodies_and_arches(anatomy: Anatomy) -> None:
    drawn = drawn_subject()

    body = anatomy.tissue == CODE["body"]

    both = float((body & (drawn.bodies > 0)).sum())
    assert 2 * both / (body.sum() + (drawn.bodies > 0).sum()) > 0.93
    assert (anatomy.tissue[(drawn.arches > 0) & (drawn.bodies == 0)] == CODE["posterior"]).mean() > 0.9
    assert tuple(one.level for one in anatomy.bodies) == LEVELS
    for one, frame in zip(anatomy.bodies, drawn.frames, strict=True):
        assert one.height_mm == pytest.approx(26, abs=2)
        assert np.linalg.norm(one.frame.centre_zyx - frame.centre_zyx) < 3


def test_each_vertebra_keeps_its_own_number(anatomy: Anatomy) -> None:
    drawn = drawn_subject()

    for n, level in enumerate(LEVELS, start=1):
        assert set(anatomy.vertebra[drawn.whole == n].tolist()) == {ORDER.index(level) + 1}


def test_between_two_bodies_lies_a_disc_and_between_l5_and_the_sacrum_too(anatomy: Anatomy) -> None:
    middle = np.rint(drawn_subject().frames[0].centre_zyx / 1.5).astype(int)
    column = anatomy.tissue[:, middle[1], middle[2]][::-1]
    order = [TISSUES[value] for value, before in zip(column, [255, *column[:-1]], strict=True) if value != before]

    spine = [name for name in order if name in ("body", "disc", "sacrum")]
    assert spine == ["body", "disc"] * 6 + ["sacrum"]


def test_what_no_mask_names_inside_the_trunk_is_fat(anatomy: Anatomy) -> None:
    assert (anatomy.tissue == CODE["fat"]).sum() > (anatomy.tissue == CODE["body"]).sum()


def test_an_organ_that_the_label_set_does_not_have_is_left_out() -> None:
    assert tissue_of("not_an_organ") is None


def test_the_trunk_is_the_hull_and_a_rim() -> None:
    labelled = np.zeros((3, 60, 60), dtype=bool)
    labelled[1, 20, 20:40] = labelled[1, 40, 20:40] = True

    found = trunk(labelled)

    assert not found[0].any()
    assert found[1, 30, 30]
    assert found[1, 20 - 8, 30]
    assert not found[1, 5, 30]


def test_an_anatomy_comes_back_from_its_file(anatomy: Anatomy, tmp_path: Path) -> None:
    save_anatomy(anatomy, tmp_path / "drawn-1.npz")

    found = load_anatomy(tmp_path / "drawn-1.npz")

    assert found.name == "drawn-1"
    assert np.array_equal(found.tissue, anatomy.tissue)
    assert np.array_equal(found.vertebra, anatomy.vertebra)
    for one, two in zip(found.bodies, anatomy.bodies, strict=True):
        assert one.level == two.level
        assert one.frame.axes == pytest.approx(two.frame.axes)
        assert one.height_mm == two.height_mm


def test_masks_of_another_spacing_are_brought_to_that_of_the_maps(anatomy: Anatomy, tmp_path: Path) -> None:
    write_label_maps(tmp_path, name="coarse")
    (folder,) = subjects(tmp_path)
    for path in folder.glob("*.nii.gz"):
        image = sitk.ReadImage(str(path))
        size = [max(n // 2, 1) for n in image.GetSize()]
        coarse = sitk.Resample(
            image, size, sitk.Transform(), sitk.sitkNearestNeighbor, image.GetOrigin(), (3.0, 3.0, 3.0)
        )
        sitk.WriteImage(coarse, str(path), useCompression=True)

    found = read_anatomy(folder)

    assert np.array(found.tissue.shape) == pytest.approx(np.array(anatomy.tissue.shape), abs=2)
    assert tuple(one.level for one in found.bodies) == LEVELS


def test_a_folder_without_label_maps_says_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(FractureSweepError, match=r"NAME/segmentations/vertebrae_L1\.nii\.gz"):
        subjects(tmp_path)


def test_too_few_vertebrae_are_refused(label_maps: Path, tmp_path: Path) -> None:
    (source,) = subjects(label_maps)
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("vertebrae_L1", "vertebrae_L2", "sacrum"):
        (folder / f"{name}.nii.gz").write_bytes((source / f"{name}.nii.gz").read_bytes())

    with pytest.raises(FractureSweepError, match="fewer than three vertebrae"):
        read_anatomy(folder)


def test_masks_on_two_grids_are_refused_by_name(label_maps: Path, tmp_path: Path) -> None:
    (source,) = subjects(label_maps)
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in source.glob("*.nii.gz"):
        (folder / path.name).write_bytes(path.read_bytes())
    sitk.WriteImage(sitk.Image(9, 9, 9, sitk.sitkUInt8), str(folder / "spleen.nii.gz"))

    with pytest.raises(FractureSweepError, match="another grid"):
        read_anatomy(folder)


def test_a_subject_s_fingerprint_follows_its_masks(label_maps: Path, tmp_path: Path) -> None:
    (source,) = subjects(label_maps)
    write_label_maps(tmp_path)
    (copy,) = subjects(tmp_path)
    assert fingerprint(copy) == fingerprint(source)

    (copy / "aorta.nii.gz").unlink()

    assert fingerprint(copy) != fingerprint(source)


def test_the_network_s_classes_are_tissues_and_what_is_not_cut_is_not_judged() -> None:
    classes = dict(zip(TISSUES, class_of_tissue(), strict=True))

    assert {NETWORK_CLASSES[classes[name]] for name in ("body", "posterior", "disc", "sacrum", "rib", "hip")} == set(
        NETWORK_CLASSES[1:]
    )
    assert classes["uncut"] == IGNORED
    assert {classes[name] for name in ("air", "fat", "liver", "other-bone", "canal")} == {0}


@pytest.mark.shared_data
def test_every_organ_of_the_public_label_maps_has_a_tissue(shared_data: Path) -> None:
    folders = subjects(shared_data / "totalseg-s0327-s0328-masks")
    organs = {path.name.removesuffix(".nii.gz") for folder in folders for path in folder.glob("*.nii.gz")}

    assert len(organs) == 117
    assert [organ for organ in sorted(organs) if tissue_of(organ) is None] == []
