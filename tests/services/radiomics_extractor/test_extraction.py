import csv
import io
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from services.radiomics_extractor.extraction import (
    ExtractionError,
    ParameterError,
    _real,
    default_parameters,
    extract,
    feature_names,
    frozen_feature_names,
    hcr_protocol,
    parameters_for,
)
from shared.fracture.crop import crop_vertebra
from shared.fracture.ids import digest
from shared.fracture.protocol import preset_crop
from shared.fracture.volume import (
    Geometry,
    Mask,
    Volume,
    mask_from_nrrd,
    mask_from_sitk,
    to_nrrd,
    volume_from_nrrd,
    volume_from_sitk,
)

FIRST_ORDER = "imageType:\n  Original: {}\nfeatureClass:\n  firstorder:\nsetting:\n  binWidth: 25\n"


def synthetic_vertebra():
    """A scan of 1.2 mm with a superellipsoid of trabecular texture in a denser shell, and its mask."""
    geometry = Geometry(
        shape_zyx=(64, 72, 80),
        spacing_zyx=(1.2, 0.9, 0.9),
        origin_zyx=(-400.5, -20.25, 33.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    )
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in geometry.shape_zyx), indexing="ij")
    radius = np.abs(z / 0.32) ** 4 + np.abs(y / 0.42) ** 2.5 + np.abs(x / 0.5) ** 2.5
    noise = np.random.default_rng(11).normal(0, 60, geometry.shape_zyx)
    hu = np.where(radius < 0.75, 160, np.where(radius < 1.0, 480, 45)) + noise
    return Volume(voxels=hu.astype(np.int16), geometry=geometry), Mask(voxels=radius < 1.0, geometry=geometry)


def crop_of(volume, roi):
    return crop_vertebra(volume, roi, preset_crop("recommended"))


def small_crop():
    volume, roi = synthetic_vertebra()
    crop = crop_vertebra(volume, roi, preset_crop("paper"))
    return crop.image, crop.mask


def of_the_command_line(crop, folder):
    """What pyradiomics' own command line prints for the stored crop, with the shipped parameter file."""
    for name, grid in (("image", crop.image), ("mask", crop.mask)):
        (folder / f"{name}.nrrd").write_bytes(to_nrrd(grid))
    (folder / "parameters.yaml").write_text(default_parameters(), encoding="utf-8")
    command = [Path(sys.executable).with_name("pyradiomics"), "image.nrrd", "mask.nrrd", "-p", "parameters.yaml"]
    done = subprocess.run([*command, "-f", "csv"], cwd=folder, capture_output=True, text=True, check=True)
    row = next(csv.DictReader(io.StringIO(done.stdout)))
    # numpy 2.5 and later let the command line print eigenvalues as complex numbers
    kept = {name: text for name, text in row.items() if not name.startswith(("diagnostics_", "Image", "Mask"))}
    return {name: complex(text).real for name, text in kept.items()}


def as_stored(crop):
    return volume_from_nrrd(to_nrrd(crop.image)), mask_from_nrrd(to_nrrd(crop.mask))


def assert_equal_to_the_command_line(crop, folder):
    image, mask = as_stored(crop)

    ours = extract(image, mask, parameters=default_parameters())
    theirs = of_the_command_line(crop, folder)

    assert list(ours) == list(theirs)
    assert ours == theirs
    assert len(ours) == 1648


def test_values_are_those_of_the_command_line_on_a_synthetic_vertebra(tmp_path):
    assert_equal_to_the_command_line(crop_of(*synthetic_vertebra()), tmp_path)


@pytest.mark.shared_data
def test_values_are_those_of_the_command_line_on_a_real_l3_of_3_mm(shared_data, tmp_path):
    folder = shared_data / "totalseg-example"
    masks = folder / "spine_report" / "example_ct_report"
    volume = volume_from_sitk(sitk.ReadImage(str(folder / "example_ct.nii.gz")))
    labels = mask_from_sitk(sitk.ReadImage(str(masks / "totalseg.nii.gz")))
    bodies = mask_from_sitk(sitk.ReadImage(str(masks / "totalseg_vertebrae_body.nii.gz")))

    crop = crop_of(volume, replace(labels, voxels=(labels.voxels == 29) & (bodies.voxels == 1)))

    assert_equal_to_the_command_line(crop, tmp_path)


@pytest.mark.shared_data
def test_values_are_those_of_the_command_line_on_a_real_l3_of_1_5_mm(shared_data, tmp_path):
    folder = shared_data / "tptbox-l3"
    volume = volume_from_sitk(sitk.ReadImage(str(folder / "sub-ct_label-22_ct.nii.gz")))
    vertebrae = mask_from_sitk(sitk.ReadImage(str(folder / "sub-ct_seg-vert_label-22_msk.nii.gz")))
    parts = mask_from_sitk(sitk.ReadImage(str(folder / "sub-ct_seg-subreg_label-22_msk.nii.gz")))

    crop = crop_of(volume, replace(parts, voxels=np.isin(parts.voxels, (49, 50)) & (vertebrae.voxels == 22)))

    assert_equal_to_the_command_line(crop, tmp_path)


def test_the_shipped_parameter_file_gives_the_frozen_list_of_1648_names():
    names = feature_names(default_parameters())

    assert names == frozen_feature_names()
    assert len(names) == len(set(names)) == 1648
    classes = [name.split("_")[1] for name in names]
    counted = {one: classes.count(one) for one in sorted(set(classes))}
    assert counted == {"firstorder": 342, "glcm": 418, "gldm": 266, "glrlm": 304, "glszm": 304, "shape": 14}
    assert len({name.split("_")[0] for name in names}) == 19


def test_the_frozen_list_has_not_changed():
    digested = digest(list(frozen_feature_names()))

    assert digested == "6bba8a4f5b2aabe54818dc5488e16313da1b495e85dc6fc0c1f0a221cd2f2442"


def test_the_protocol_names_the_installed_version_the_file_and_the_list():
    protocol = hcr_protocol(parameters=FIRST_ORDER, crop_hash="a" * 64)

    assert protocol.pyradiomics_version == "3.1.4"
    assert protocol.feature_names_sha256 == digest(list(feature_names(FIRST_ORDER)))
    assert protocol != hcr_protocol(parameters=FIRST_ORDER.replace("25", "20"), crop_hash="a" * 64)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        (FIRST_ORDER + "  resampledPixelSpacing: [1, 1, 1]\n", "cut the crop again"),
        (FIRST_ORDER + "  preCrop: true\n", "cut the crop again"),
        (FIRST_ORDER + "  label: 2\n", "label: 1"),
        (FIRST_ORDER + "  no_such_setting: 1\nimageTypo: 3\n", "not valid"),
        ("imageType: [", "not valid"),
    ],
)
def test_a_parameter_file_that_may_not_be_run_is_refused(parameters, sentence):
    image, mask = small_crop()

    with pytest.raises(ParameterError, match=sentence):
        extract(image, mask, parameters=parameters)


def test_an_empty_mask_is_refused():
    image, mask = small_crop()

    with pytest.raises(ExtractionError, match="empty"):
        extract(image, replace(mask, voxels=np.zeros_like(mask.voxels)), parameters=FIRST_ORDER)


def test_a_mask_of_one_voxel_is_refused_in_pyradiomics_words():
    image, mask = small_crop()
    voxels = np.zeros_like(mask.voxels)
    voxels[10, 10, 10] = 1

    with pytest.raises(ExtractionError, match="refuses the region"):
        extract(image, replace(mask, voxels=voxels), parameters=FIRST_ORDER)


def test_image_and_mask_of_different_grids_are_refused():
    image, mask = small_crop()
    moved = replace(mask, geometry=replace(mask.geometry, origin_zyx=(0.0, 0.0, 0.0)))

    with pytest.raises(ExtractionError, match="different grids"):
        extract(image, moved, parameters=FIRST_ORDER)


def test_values_that_are_not_finite_are_refused_by_name(monkeypatch):
    image, mask = small_crop()
    from radiomics import firstorder

    monkeypatch.setattr(firstorder.RadiomicsFirstOrder, "getMeanFeatureValue", lambda self: np.array(np.nan))

    with pytest.raises(ExtractionError, match="1 of 18 features are not finite, the first is original_firstorder_Mean"):
        extract(image, mask, parameters=FIRST_ORDER)


def test_pyradiomics_logs_nothing(caplog, capfd):
    image, mask = small_crop()

    with caplog.at_level(logging.DEBUG):
        extract(image, mask, parameters=FIRST_ORDER)

    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [1.5, np.float64(1.5), np.array(1.5), np.complex128(1.5)])
def test_a_feature_without_imaginary_part_is_a_real_number(value: object) -> None:
    assert _real("shape_MajorAxisLength", value) == 1.5


def test_a_feature_with_an_imaginary_part_is_refused_by_name() -> None:
    with pytest.raises(ExtractionError, match="shape_MajorAxisLength"):
        _real("shape_MajorAxisLength", 1.5 + 0.1j)


def test_the_file_with_ngtdm_gives_the_frozen_list_of_1743_names():
    names = feature_names(default_parameters("paper+ngtdm"))

    assert names == frozen_feature_names("paper+ngtdm")
    assert len(names) == len(set(names)) == 1743
    assert [name for name in names if "_ngtdm_" not in name] == list(frozen_feature_names())


def test_fewer_image_types_give_a_part_of_the_list():
    names = feature_names(parameters_for("paper", ("LoG:3", "Original")))

    whole = frozen_feature_names()
    assert names == tuple(n for n in whole if n.startswith(("original_", "log-sigma-3-0-mm-3D_")))
    assert parameters_for("paper") == default_parameters()
    assert feature_names(parameters_for("paper+ngtdm", ("Gradient",)))[-1] == "gradient_ngtdm_Strength"


@pytest.mark.parametrize("name", ["Orignal", "LoG:", "LoG:0", "LoG:a", ""])
def test_an_image_type_that_there_is_not_is_refused(name):
    with pytest.raises(ParameterError):
        parameters_for("paper", ("Original", name))
