import importlib
import subprocess
import sys

import pytest

from services.trainer import torchvision_models

pytestmark = pytest.mark.trainer


def test_operators_are_declared_only_where_torchvisions_own_cannot_be_loaded() -> None:
    extension = importlib.import_module("torchvision.extension")  # only after our module, which lets it be imported

    assert (torchvision_models.DECLARED is None) == extension._has_ops()


def test_the_import_works_in_a_fresh_process_before_anything_else_of_torch() -> None:
    code = "from services.trainer.torchvision_models import resnet50; print(type(resnet50(weights=None)).__module__)"

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert ran.stdout.strip() == "torchvision.models.resnet", ran.stderr
