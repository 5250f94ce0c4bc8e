"""A worker's image holds what its own extra names and no more: so nothing else may be imported to run it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shared.fracture.topology import SERVICES

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "pydicom": "pydicom",
    "highdicom": "highdicom",
    "nibabel": "nibabel",
    "pillow": "PIL",
    "pebble": "pebble",
    "pyradiomics-bhklab": "radiomics",
    "onnxruntime": "onnxruntime",
    "jinja2": "jinja2",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "safetensors": "safetensors",
    "xgboost-cpu": "xgboost",
    "lightgbm": "lightgbm",
    "torch": "torch",
}
"""Distribution of an extra → the module that it brings."""

RUN = """
import importlib, sys

class NotInTheImage:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {absent}:
            raise ModuleNotFoundError(f'{{name}} is not in the image of {service}')
        return None

sys.meta_path.insert(0, NotInTheImage())
import services.__main__
import services.distributed
for name in {modules}:
    importlib.import_module(name)
"""


def extra(name: str) -> set[str]:
    """The distributions of an extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {requirement.partition(">")[0].partition("=")[0].partition("[")[0] for requirement in extras[name]}


@pytest.mark.parametrize("service", SERVICES)
def test_a_worker_imports_nothing_that_its_image_does_not_hold(service: str) -> None:
    absent = {module for distribution, module in MODULES.items() if distribution not in extra(service)}
    package = service.replace("-", "_")
    modules = {"dicom-ingest": ["services.inbox_worker"], "recorder": []}.get(service, [f"services.{package}.service"])

    done = subprocess.run(
        [sys.executable, "-c", RUN.format(absent=absent, service=service, modules=modules)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-800:]
