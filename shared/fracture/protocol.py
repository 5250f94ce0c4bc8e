"""What a feature's value depends on beside the image, each part with its hash (docs: METHOD 1 to 3, DESIGN "Ids").

A message carries `Protocols`, so that a worker with another bundle cannot silently answer with other numbers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from shared.fracture.ids import digest

RoiKind = Literal["body", "vertebra"]
Preset = Literal["paper", "recommended"]
BoxRule = Literal["tight", "square"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CropProtocol(_Frozen):
    """How the crop of one vertebra is made (METHOD 1)."""

    roi: RoiKind = "body"
    roi_margin_mm: float = 25.0
    spacing_mm: float = 1.0
    window_hu: tuple[int, int] = (-250, 1250)
    image_interpolator: Literal["bspline"] = "bspline"
    mask_interpolator: Literal["nearest"] = "nearest"
    source_margin_voxels: int = 12
    dtype: Literal["int16"] = "int16"
    version: int = 1

    @property
    def crop_hash(self) -> str:
        """The id of this protocol."""
        return digest({"crop": self.model_dump(mode="json")})


class HcrProtocol(_Frozen):
    """How hand-crafted features are extracted from a crop (METHOD 2)."""

    crop_hash: str
    pyradiomics_version: str
    parameters_sha256: str
    feature_names_sha256: str

    @property
    def hcr_hash(self) -> str:
        """The id of this protocol."""
        return digest({"hcr": self.model_dump(mode="json")})


class DtlProtocol(_Frozen):
    """How deep features are extracted from a crop (METHOD 3)."""

    crop_hash: str
    box: BoxRule
    box_margin_mm: float
    size: int = 64
    network_sha256: str
    version: int = 1

    @property
    def dtl_hash(self) -> str:
        """The id of this protocol."""
        return digest({"dtl": self.model_dump(mode="json")})


class Protocols(_Frozen):
    """The hashes that a message carries. `bundle_id` is absent while features are made for training."""

    crop_hash: str
    hcr_hash: str
    dtl_hash: str
    bundle_id: str | None = None

    @property
    def scope(self) -> str:
        """Under which the terminal records of a case lie: the bundle, or the protocol where there is none."""
        return self.bundle_id or digest({"crop": self.crop_hash, "hcr": self.hcr_hash, "dtl": self.dtl_hash})


def preset_crop(preset: Preset, *, roi: RoiKind = "body") -> CropProtocol:
    """The crop of a preset: 10 mm around the mask as printed in the paper's tool, 25 mm recommended."""
    return CropProtocol(roi=roi, roi_margin_mm=10.0 if preset == "paper" else 25.0)


def preset_box(preset: Preset) -> tuple[BoxRule, float]:
    """The slice's box of a preset: tight (paper), or square, longer side + 10 mm (recommended)."""
    return ("tight", 0.0) if preset == "paper" else ("square", 10.0)
