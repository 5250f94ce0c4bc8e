"""A feature's name in words: "wavelet-HLL_glcm_Correlation" reads as "GLCM correlation, wavelet HLL"."""

from __future__ import annotations

import re
from typing import Final

from shared.fracture.features import HCR_CLASSES

ACRONYMS: Final = frozenset({"Idm", "Idmn", "Id", "Idn", "Imc1", "Imc2"})
"""GLCM's inverse differences and informational measures of correlation."""
NETWORK_LOGIT: Final = "dtl_logit"
_COMPONENT = re.compile(r"pca_(\d+)\Z")
_LOG = re.compile(r"log-sigma-(\d+)-(\d+)-mm-3D\Z")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=\d)(?=[A-Z][a-z])")


def feature_in_words(name: str) -> str:
    """The name of an HCR feature, a PCA component or the network's logit in words; any other name unchanged."""
    if name == NETWORK_LOGIT:
        return "Deep features, the network's logit"
    component = _COMPONENT.match(name)
    if component:
        return f"Deep features, component {int(component.group(1)) + 1}"
    parts = name.split("_", 2)
    if len(parts) != 3 or parts[1] not in HCR_CLASSES:
        return name
    image, feature_class, feature = parts
    words = feature.upper() if feature in ACRONYMS else " ".join(word.lower() for word in _CAMEL.split(feature))
    return f"{HCR_CLASSES[feature_class]}: {words}{_image_in_words(image)}"


def _image_in_words(image: str) -> str:
    if image == "original":
        return ""
    log = _LOG.match(image)
    if log:
        return f", Laplacian of Gaussian {int(log.group(1))}.{log.group(2)[0]} mm"
    if image.startswith("wavelet-"):
        return f", wavelet {image.removeprefix('wavelet-')}"
    return f", {image} of the image"
