"""The plugged-in command with the real nnU-Net v2, on a network of random weights: mechanism only, never a result.

Needs an environment with nnU-Net (several gigabytes, `make nnunet-check` makes one and runs this); its folder stands in
NNUNET_ENVIRONMENT.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from services.segmenter.plugged_in import (
    CommandRefused,
    Declaration,
    plug_in,
    read_declaration,
    read_labels,
    run_command,
)
from shared.fracture.volume import Geometry, Volume

pytestmark = [pytest.mark.nnunet, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
SCAN = Volume(
    voxels=np.random.default_rng(1).normal(40, 60, (40, 48, 44)).astype(np.int16),
    geometry=Geometry(
        shape_zyx=(40, 48, 44),
        spacing_zyx=(2.5, 1.5, 1.5),
        origin_zyx=(-300.0, 12.0, -40.0),
        direction_zyx=((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0)),
    ),
)


@pytest.fixture(scope="module")
def environment() -> Path:
    return Path(os.environ["NNUNET_ENVIRONMENT"])


@pytest.fixture(scope="module")
def model(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    script = Path(__file__).with_name("random_model.py")
    subprocess.run([str(environment / "bin" / "python"), str(script), str(folder)], check=True, timeout=300)
    return folder


def declared(environment: Path, model: Path, **changes: object) -> Declaration:
    """The declaration that comes with the project, with this environment's program and this model's folder."""
    shipped = read_declaration(ROOT / "deploy" / "segmenters" / "commands" / "nnunet.toml")
    program, *arguments = shipped.command
    command = (
        str(environment / "bin" / program),
        *(str(model) if argument == "/models/spine" else argument for argument in arguments),
    )
    return shipped.model_copy(
        update={"command": command, "labels": {"1": "L1", "2": "L2", "3": ""}, "seconds": 500.0, **changes}
    )


def test_the_real_program_gives_a_label_map_on_the_scan_s_own_grid(
    environment: Path, model: Path, tmp_path: Path
) -> None:
    plugged = plug_in(declared(environment, model))

    path = run_command(plugged, SCAN, tmp_path)
    labels, levels = read_labels(plugged, path, SCAN)

    assert labels.geometry.same_grid(SCAN.geometry)
    assert set(np.unique(labels.voxels).tolist()) <= {0, 1, 2, 3}
    assert set(levels) <= {"L1", "L2"}
    assert sitk.ReadImage(str(path)).GetSize() == SCAN.geometry.shape_zyx[::-1]


def test_a_model_folder_that_is_not_there_has_its_reason(environment: Path, model: Path, tmp_path: Path) -> None:
    nowhere = declared(environment, model / "nowhere")
    known = nowhere.failures[0].model_copy(update={"contains": f"No such file or directory: '{model / 'nowhere'}"})
    plugged = plug_in(nowhere.model_copy(update={"failures": (known,)}))

    with pytest.raises(CommandRefused, match="its model folder is not there"):
        run_command(plugged, SCAN, tmp_path)


def test_values_that_the_declaration_does_not_know_are_refused(environment: Path, model: Path, tmp_path: Path) -> None:
    plugged = plug_in(declared(environment, model, labels={"200": "L1"}))

    path = run_command(plugged, SCAN, tmp_path)

    with pytest.raises(CommandRefused, match="labels that its declaration does not know"):
        read_labels(plugged, path, SCAN)
