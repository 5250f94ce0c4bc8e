"""What a feature is, read from its name: its class, its branch, and a label that is short enough for an axis."""

from __future__ import annotations

import re
from typing import Final

from shared.fracture.features import HCR_CLASSES

DTL: Final = "DTL"
CLASS_TITLES: Final = {**HCR_CLASSES, DTL: "DTL"}

_COMPONENT = re.compile(r"pca_(\d+)\Z")
_LOG = re.compile(r"log-sigma-(\d+)-(\d+)-mm-3D\Z")


def feature_class(name: str) -> str:
    """pyradiomics' class of a hand-crafted feature, or DTL for what came from the network."""
    parts = name.split("_", 2)
    return parts[1] if len(parts) == 3 and parts[1] in HCR_CLASSES else DTL


def is_hcr(name: str) -> bool:
    """Whether a feature is a hand-crafted one."""
    return feature_class(name) != DTL


def feature_label(name: str) -> str:
    """ "wavelet-HLL_glcm_Correlation" reads "GLCM Correlation · wavelet HLL"; pca_004 reads "DTL component 5"."""
    component = _COMPONENT.match(name)
    if component:
        return f"DTL component {int(component.group(1)) + 1}"
    if not is_hcr(name):
        return name
    image, kind, feature = name.split("_", 2)
    label = f"{CLASS_TITLES[kind]} {feature}"
    log = _LOG.match(image)
    if image == "original":
        return label
    if log:
        return f"{label} · LoG {int(log.group(1))}.{log.group(2)[0]} mm"
    return f"{label} · {image.replace('-', ' ')}"
