"""pyradiomics on one crop, with nothing between: the same values as its own command line on the stored crop.

The text of the parameter file travels in the bundle, since it is part of what a feature's value means. The list of
names is found by running the file once on a small probe, so that an installed pyradiomics that would answer with
another set is caught at start and not in the middle of a sweep.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from radiomics.featureextractor import RadiomicsFeatureExtractor

from shared.fracture.ids import digest, sha256_hex
from shared.fracture.protocol import HcrProtocol
from shared.fracture.volume import Geometry, Mask, Volume, to_sitk

PARAMETER_FILE: Final = Path(__file__).with_name("pyradiomics.yaml")
FEATURE_LIST_FILE: Final = Path(__file__).with_name("hcr_features.txt")
NGTDM_PARAMETER_FILE: Final = Path(__file__).with_name("pyradiomics_ngtdm.yaml")
NGTDM_FEATURE_LIST_FILE: Final = Path(__file__).with_name("hcr_features_ngtdm.txt")

FeatureSet = Literal["paper", "paper+ngtdm"]
_FILES: Final[Mapping[FeatureSet, tuple[Path, Path]]] = {
    "paper": (PARAMETER_FILE, FEATURE_LIST_FILE),
    "paper+ngtdm": (NGTDM_PARAMETER_FILE, NGTDM_FEATURE_LIST_FILE),
}
_IMAGE_TYPE: Final = re.compile(r"^  (\w+):.*\n(?:^    .*\n)*", re.MULTILINE)

DISTRIBUTION: Final = "pyradiomics-bhklab"
"""The installable fork of pyradiomics; its values are bit-identical to pyradiomics 3.0.1."""

_SILENT = logging.CRITICAL + 10


class ExtractionError(ValueError):
    """The features of this crop cannot be had: an unusable region of interest, or values that are not finite."""


class ParameterError(ValueError):
    """The parameter file is not one that this extractor may run: invalid, or it would cut the crop again."""


def default_parameters(features: FeatureSet = "paper") -> str:
    """The text of a parameter file that is shipped: 1,648 features, or 1,743 with NGTDM."""
    return _FILES[features][0].read_text(encoding="utf-8")


def frozen_feature_names(features: FeatureSet = "paper") -> tuple[str, ...]:
    """The shipped list of the names that `default_parameters` yields, in pyradiomics' order."""
    return tuple(_FILES[features][1].read_text(encoding="utf-8").split())


def parameters_for(features: FeatureSet, image_types: Sequence[str] | None = None) -> str:
    """A shipped parameter file with some of its image types alone (pyradiomics' names; `LoG:3` is one sigma in mm).

    ParameterError for an image type that the file does not have.
    """
    text = default_parameters(features)
    if image_types is None:
        return text
    head, rest = text.split("imageType:\n", 1)
    block, tail = rest.split("\nfeatureClass:", 1)
    known = {match.group(1): match.group(0) for match in _IMAGE_TYPE.finditer(block)}
    sigmas = [name.removeprefix("LoG:") for name in image_types if name.startswith("LoG:")]
    wanted = {"LoG" if name.startswith("LoG:") else name for name in image_types}
    unknown = sorted(wanted - set(known))
    if unknown:
        raise ParameterError(
            f"unknown image type {unknown[0]!r}: there are {', '.join(known)} (and LoG:3 for one sigma)"
        )
    if sigmas and "LoG" not in image_types:
        if not all(re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,3})?", sigma) and float(sigma) > 0 for sigma in sigmas):
            raise ParameterError("LoG: takes a sigma in mm, such as LoG:3")
        known["LoG"] = f"  LoG:\n    sigma: [{', '.join(f'{float(sigma)}' for sigma in sigmas)}]\n"
    kept = "".join(entry for name, entry in known.items() if name in wanted)
    return f"{head}imageType:\n{kept}\nfeatureClass:{tail}"


def extract(image: Volume, mask: Mask, *, parameters: str) -> dict[str, float]:
    """The features of one crop, named and ordered as pyradiomics prints them (diagnostics left out).

    `image` int16 HU and `mask` 0/1 on one grid, `parameters` the text of a pyradiomics parameter file. Raises
    ExtractionError (the region is unusable, a value is not finite) and ParameterError.
    """
    if not image.geometry.same_grid(mask.geometry):
        raise ExtractionError("image and mask are on different grids; crop them together")
    if not mask.voxels.any():
        raise ExtractionError("the mask of the crop is empty")
    extractor = _extractor(parameters)
    try:
        found: dict[str, Any] = extractor.execute(to_sitk(image), to_sitk(mask))
    except ValueError as error:
        raise ExtractionError(f"pyradiomics refuses the region of interest: {error}") from error
    features = {name: _real(name, value) for name, value in found.items()}
    bad = [name for name, value in features.items() if not math.isfinite(value)]
    if bad:
        raise ExtractionError(f"{len(bad)} of {len(features)} features are not finite, the first is {bad[0]}")
    return features


def _real(name: str, value: Any) -> float:
    """A feature as float64. Newer numpy gives eigenvalues (of shape) as complex numbers, imaginary part 0."""
    number = complex(np.asarray(value).item())
    if number.imag != 0:
        raise ExtractionError(f"the feature {name} is a complex number: the region of interest is degenerate")
    return number.real


@functools.lru_cache(maxsize=8)
def feature_names(parameters: str) -> tuple[str, ...]:
    """The names that the installed pyradiomics gives for a parameter file, in its order, from a run on a probe."""
    edge = 20
    rng = np.random.default_rng(1)
    identity = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    geometry = Geometry(
        shape_zyx=(edge, edge, edge), spacing_zyx=(1.0, 1.0, 1.0), origin_zyx=(0.0, 0.0, 0.0), direction_zyx=identity
    )
    inside = np.zeros(geometry.shape_zyx, dtype=np.uint8)
    inside[6:14, 6:14, 6:14] = 1
    image = Volume(voxels=rng.integers(-100, 600, geometry.shape_zyx).astype(np.int16), geometry=geometry)
    return tuple(extract(image, Mask(voxels=inside, geometry=geometry), parameters=parameters))


def hcr_protocol(*, parameters: str, crop_hash: str) -> HcrProtocol:
    """What the features of these parameters on these crops are, with the installed pyradiomics."""
    return HcrProtocol(
        crop_hash=crop_hash,
        pyradiomics_version=version(DISTRIBUTION),
        parameters_sha256=sha256_hex(parameters.encode()),
        feature_names_sha256=digest(list(feature_names(parameters))),
    )


@functools.lru_cache(maxsize=8)
def _extractor(parameters: str) -> Any:
    for name in ("radiomics", "pykwalify"):
        logging.getLogger(name).setLevel(_SILENT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parameters.yaml"
        path.write_text(parameters, encoding="utf-8")
        try:
            extractor = RadiomicsFeatureExtractor(str(path))
        except Exception as error:  # pykwalify and ruamel raise classes of their own, without a common base
            raise ParameterError(f"the pyradiomics parameter file is not valid: {error}") from error
    if extractor.settings["resampledPixelSpacing"] is not None or extractor.settings["preCrop"]:
        raise ParameterError(
            "the parameter file sets resampledPixelSpacing or preCrop, which cut the crop again; remove them"
        )
    if extractor.settings["label"] != 1:
        raise ParameterError("the mask of a crop is 1 inside; set label: 1 in the parameter file or leave it out")
    extractor.addProvenance(False)
    return extractor
