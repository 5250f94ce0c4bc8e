"""Under which protocols a cohort's features are made: of the training settings, or of a bundle that is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.trainer.settings import HcrSettings, TrainingSettings
from shared.fracture.bundle import Bundle
from shared.fracture.ids import digest
from shared.fracture.protocol import (
    BoxRule,
    CropProtocol,
    DtlProtocol,
    HcrProtocol,
    Protocols,
    preset_box,
    preset_crop,
)
from shared.pipeline.errors import FractureSweepError

NO_NETWORK: Final = digest({"dtl": "no network is known yet"})
"""In the place of a dtl_hash while a network is still to be fitted."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Under which protocols a cohort's features are made."""

    crop: CropProtocol
    hcr: HcrProtocol
    parameters: str
    """The text of pyradiomics' parameter file."""
    box: BoxRule
    box_margin_mm: float
    size: int

    @property
    def protocols(self) -> Protocols:
        """What the messages carry."""
        return Protocols(crop_hash=self.crop.crop_hash, hcr_hash=self.hcr.hcr_hash, dtl_hash=NO_NETWORK)

    def dtl(self, network_sha256: str) -> DtlProtocol:
        """The protocol of the deep features of a network."""
        return DtlProtocol(
            crop_hash=self.crop.crop_hash,
            box=self.box,
            box_margin_mm=self.box_margin_mm,
            size=self.size,
            network_sha256=network_sha256,
        )


def extraction_of(settings: TrainingSettings) -> Extraction:
    """The protocols of the settings. FractureSweepError for image types that there are not."""
    from services.radiomics_extractor.extraction import hcr_protocol

    crop = preset_crop(settings.preset, roi=settings.roi)
    parameters = parameters_of(settings.hcr)
    box, margin = preset_box(settings.preset)
    return Extraction(
        crop=crop,
        hcr=hcr_protocol(parameters=parameters, crop_hash=crop.crop_hash),
        parameters=parameters,
        box=box,
        box_margin_mm=margin,
        size=settings.network.image_size,
    )


def parameters_of(settings: HcrSettings) -> str:
    """The parameter file of the settings. FractureSweepError for image types that there are not."""
    from services.radiomics_extractor.extraction import ParameterError, parameters_for

    try:
        return parameters_for(settings.features, settings.image_types)
    except ParameterError as error:
        raise FractureSweepError(f"hcr.image_types: {error}") from None


def extraction_of_bundle(bundle: Bundle) -> Extraction:
    """The protocols of a bundle, for an external validation."""
    manifest = bundle.manifest
    return Extraction(
        crop=manifest.crop,
        hcr=manifest.hcr,
        parameters=bundle.pyradiomics_yaml.decode("utf-8"),
        box=manifest.dtl.box,
        box_margin_mm=manifest.dtl.box_margin_mm,
        size=manifest.dtl.size,
    )
