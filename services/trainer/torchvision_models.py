"""torchvision's residual networks, also where its compiled operators cannot be loaded.

torchvision's wheel is linked to CUDA. Beside a CPU build of torch its library `_C.so` does not load, and
`import torchvision` fails at the first operator that it wants to describe (nms, then qnms), though the networks use
neither. So where the import fails for that reason alone, the two operators are declared (without any code behind
them) and it is tried again; where the library loads, nothing is declared, since two declarations of one operator
are an error. Only the import of this module may bring torchvision in.
"""

from __future__ import annotations

import importlib
import sys
from typing import Final

import torch

_OPERATORS: Final = ("nms", "qnms")
_SIGNATURE: Final = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _declared_operators() -> torch.library.Library | None:
    """The declarations, which last as long as they are held; None where torchvision needs none."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(operator + _SIGNATURE)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    return library


DECLARED: Final = _declared_operators()

from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, resnet50  # noqa: E402  (after the declaration)

__all__ = ["DECLARED", "BasicBlock", "Bottleneck", "ResNet", "resnet50"]
