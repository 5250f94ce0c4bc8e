"""A fitted model as a bundle: the files, their manifest, and the loader's own word that it would take it.

Nothing here knows the time or the machine, so the same model gives the same bytes. The folder is made aside and
renamed, so that nobody ever loads half a bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from shared.fracture.bundle import (
    MANIFEST,
    NETWORK,
    Branch,
    Bundle,
    BundleKind,
    Distribution,
    FeatureRange,
    Golden,
    GoldenImage,
    GoldenVector,
    Manifest,
    Models,
    Training,
    evaluate,
    hcr_features_bytes,
    load_bundle,
    manifest_bytes,
    model_bytes,
)
from shared.fracture.bundle_files import write_folder
from shared.fracture.classifiers import OnnxScore, ScoreOf
from shared.fracture.ids import digest, sha256_hex
from shared.fracture.nomogram import NomogramModel, Sex, read_points
from shared.fracture.protocol import CropProtocol, DtlProtocol, HcrProtocol, Preset, preset_box


@dataclass(frozen=True, kw_only=True)
class FittedBundle:
    """All that a bundle is written from; `network` are the ONNX bytes, `parameters` the pyradiomics file's text.

    `classifiers`: the ONNX bytes of those that `models` names, by branch.
    """

    kind: BundleKind
    name: str
    version: str
    preset: Preset
    crop: CropProtocol
    pyradiomics_version: str
    parameters: str
    hcr_names: tuple[str, ...]
    network: bytes
    models: Models
    nomogram: NomogramModel
    threshold: float
    distribution: Distribution
    golden: Golden
    training: Training
    mask_sources: tuple[str, ...]
    metrics: Mapping[str, JsonValue]
    model_card: str
    image_size: int = 64
    classifiers: Mapping[Branch, bytes] = field(default_factory=dict)

    @property
    def hcr(self) -> HcrProtocol:
        """The HCR protocol that the model was fitted under."""
        return HcrProtocol(
            crop_hash=self.crop.crop_hash,
            pyradiomics_version=self.pyradiomics_version,
            parameters_sha256=sha256_hex(self.parameters.encode()),
            feature_names_sha256=digest(list(self.hcr_names)),
        )

    @property
    def dtl(self) -> DtlProtocol:
        """The DTL protocol that the model was fitted under."""
        box, box_margin_mm = preset_box(self.preset)
        return DtlProtocol(
            crop_hash=self.crop.crop_hash,
            box=box,
            box_margin_mm=box_margin_mm,
            size=self.image_size,
            network_sha256=sha256_hex(self.network),
        )


def classifier_file(branch: Branch) -> str:
    """The name under which a branch's classifier lies in the bundle."""
    return f"classifier-{branch}.onnx"


def runnable(models: Models, classifiers: Mapping[Branch, bytes]) -> dict[Branch, ScoreOf]:
    """The ONNX classifiers of models as a service runs them."""
    return {
        branch: OnnxScore(data, width=len(models.branch(branch).inputs)).score for branch, data in classifiers.items()
    }


def write_bundle(folder: Path, fitted: FittedBundle) -> Bundle:
    """Write the bundle (replacing a folder that is there) and load it as a service would; BundleError if it cannot."""
    files = {
        NETWORK: fitted.network,
        "models.json": model_bytes(fitted.models),
        "nomogram.json": model_bytes(fitted.nomogram),
        "distribution.json": model_bytes(fitted.distribution),
        "golden.json": model_bytes(fitted.golden),
        "metrics.json": (
            json.dumps(dict(fitted.metrics), sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        ).encode(),
        "pyradiomics.yaml": fitted.parameters.encode(),
        "hcr_features.txt": hcr_features_bytes(fitted.hcr_names),
        "MODEL_CARD.md": fitted.model_card.encode(),
        **{classifier_file(branch): data for branch, data in fitted.classifiers.items()},
    }
    manifest = Manifest.seal(
        kind=fitted.kind,
        name=fitted.name,
        version=fitted.version,
        preset=fitted.preset,
        crop=fitted.crop,
        hcr=fitted.hcr,
        dtl=fitted.dtl,
        threshold=fitted.threshold,
        training=fitted.training,
        mask_sources=fitted.mask_sources,
        files=files,
    )
    check = partial(load_bundle, run_classifiers=True)
    write_folder(folder, {**files, MANIFEST: manifest_bytes(manifest)}, check=check)
    return load_bundle(folder, run_classifiers=True)


def golden_vector(
    models: Models,
    nomogram: NomogramModel,
    *,
    hcr_names: Sequence[str],
    hcr: NDArray[np.float64],
    dtl: NDArray[np.float64],
    age: int,
    sex: Sex,
    classifiers: Mapping[Branch, ScoreOf] | None = None,
) -> GoldenVector:
    """One case with the scores and probabilities that the models give for it (`classifiers` of `runnable`)."""
    values = {name: float(value) for name, value in zip(hcr_names, hcr, strict=True)}
    got = evaluate(models, hcr=values, dtl=dtl, classifiers=classifiers)
    return GoldenVector(
        hcr=tuple(float(value) for value in hcr),
        dtl=tuple(float(value) for value in dtl),
        age=age,
        sex=sex,
        hcr_probability=got.hcr_probability,
        dtl_probability=got.dtl_probability,
        fusion_probability=got.fusion_probability,
        nomogram_probability=read_points(nomogram, age=age, sex=sex, score=got.fusion_score).probability,
        hcr_score=got.hcr_score,
        dtl_score=got.dtl_score,
        fusion_score=got.fusion_score,
    )


def golden_image(picture: NDArray[np.float32], features: NDArray[np.float64]) -> GoldenImage:
    """One picture with the features that the network gives for it."""
    return GoldenImage(
        pixels=tuple(tuple(float(value) for value in row) for row in picture),
        features=tuple(float(value) for value in features),
    )


def selected_columns(
    models: Models, *, hcr_names: Sequence[str], hcr: NDArray[np.float64], dtl: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Every feature that some model reads, over the rows of hcr (n, features) and dtl (n, features)."""
    columns = {name: hcr[:, place] for place, name in enumerate(hcr_names)}
    components = [models.pca.apply(row) for row in dtl]
    for name in models.pca.names:
        columns[name] = np.array([row[name] for row in components])
    return {name: columns[name] for name in models.selected}


def training_ranges(
    models: Models, *, hcr_names: Sequence[str], hcr: NDArray[np.float64], dtl: NDArray[np.float64]
) -> Distribution:
    """The least and largest value of every selected feature over training rows hcr (n, features), dtl (n, features)."""
    columns = selected_columns(models, hcr_names=hcr_names, hcr=hcr, dtl=dtl)
    ranges = {name: FeatureRange(low=float(column.min()), high=float(column.max())) for name, column in columns.items()}
    return Distribution(features=ranges)
