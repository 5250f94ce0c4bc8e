"""A model bundle: one trained, versioned model as ONNX, JSON and text, checked before a number leaves it.

It is a folder, or the one zip of that folder (bundle_files.py).

What the trainer writes, these models define; what a service loads, `load_bundle` has verified: every file's SHA-256
and size, nothing missing, nothing unlisted, nothing outside the folder, no external ONNX data, no custom operator, and
golden vectors that give the expected scores and probabilities. There is no pickle.

Text and JSON files:  models.json (`Models`), nomogram.json (`NomogramModel`), distribution.json (`Distribution`),
golden.json (`Golden`), metrics.json (any JSON object), pyradiomics.yaml (the parameter file, byte for byte),
hcr_features.txt (each name and a line feed), MODEL_CARD.md. The network: network.onnx, input (n, 1, size, size)
float32, first output (n, features) float32. All numbers of linear steps are float64 and written by `repr`.

Schema 2 adds, beside the linear score that stays: classifiers as ONNX (classifier-hcr.onnx, …; see `OnnxClassifier`),
what the linear score is, an offset of PCA components, conformal limits, a threshold for each model, and golden scores.
Schema 1 is read as before. Only whoever computes probabilities runs the classifiers (`Bundle.running`), and needs
onnxruntime for it; the linear steps are checked by every loader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from shared.fracture.bundle_files import MAX_FILE_BYTES, BundleError, BundleFiles, files_of, write_zip
from shared.fracture.classifiers import ClassifierUnusable, OnnxScore, ScoreOf
from shared.fracture.features import FeatureVector
from shared.fracture.ids import canonical_json, digest, sha256_hex
from shared.fracture.nomogram import NomogramModel, read_points, sigmoid
from shared.fracture.protocol import CropProtocol, DtlProtocol, HcrProtocol, Preset, Protocols

SCHEMA_VERSION: Final = 2
SCHEMAS_READ: Final = (1, 2)
MANIFEST: Final = "manifest.json"
NETWORK: Final = "network.onnx"
REQUIRED_FILES: Final = (
    "MODEL_CARD.md",
    "distribution.json",
    "golden.json",
    "hcr_features.txt",
    "metrics.json",
    "models.json",
    NETWORK,
    "nomogram.json",
    "pyradiomics.yaml",
)
GOLDEN_TOLERANCE: Final = 1e-9
"""Largest difference of a golden score or probability: float64 arithmetic in another order, nothing more."""
CLASSIFIER_TOLERANCE: Final = 1e-6
"""The same where a classifier answers in float32 through onnxruntime."""

BundleKind = Literal["DEMO", "RESEARCH", "SITE"]
ClassName = Literal["chronic", "acute"]
Branch = Literal["hcr", "dtl", "fusion"]
BRANCHES: Final[tuple[Branch, ...]] = ("hcr", "dtl", "fusion")
ClassifierKind = Literal["svm", "knn", "decision-tree", "random-forest", "extra-trees", "xgboost", "lightgbm"]
ScoreKind = Literal["logistic", "lasso"]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(_Frozen):
    """What the manifest keeps of a file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]

    @classmethod
    def of(cls, data: bytes) -> FileEntry:
        """The entry of a file with these bytes."""
        return cls(sha256=sha256_hex(data), size=len(data))


class Training(_Frozen):
    """What the model was fitted on.

    `counts`: patients, cases, acute, chronic, test_patients, …; `seeds`: by what they seed; `fingerprint`: SHA-256 of
    the training cases' ids; `dtl_mode`: METHOD 3; `kernels` and `kvp`: those seen in training, sorted.
    """

    counts: dict[str, int]
    seeds: dict[str, int]
    fingerprint: str
    dtl_mode: Literal["frozen", "crossfit", "in_sample"] = "frozen"
    kernels: tuple[str, ...] = ()
    kvp: tuple[float, ...] = ()


class Manifest(_Frozen):
    """manifest.json: what the bundle is, which protocols it needs, and every other file's SHA-256 and size.

    Made by `Manifest.seal`; written as `manifest_bytes`. `threshold` is the fusion probability from which on a case
    is called acute, frozen in training. `class_order`: probability 1 belongs to the last.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    bundle_id: str
    kind: BundleKind
    name: str
    version: str
    preset: Preset
    class_order: tuple[Literal["chronic"], Literal["acute"]] = ("chronic", "acute")
    crop: CropProtocol
    hcr: HcrProtocol
    dtl: DtlProtocol
    threshold: Annotated[float, Field(gt=0, lt=1)]
    training: Training
    mask_sources: tuple[str, ...]
    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _protocols_share_the_crop(self) -> Self:
        if not self.hcr.crop_hash == self.dtl.crop_hash == self.crop.crop_hash:
            raise ValueError("the HCR or the DTL protocol names another crop protocol")
        return self

    @classmethod
    def seal(
        cls,
        *,
        kind: BundleKind,
        name: str,
        version: str,
        preset: Preset,
        crop: CropProtocol,
        hcr: HcrProtocol,
        dtl: DtlProtocol,
        threshold: float,
        training: Training,
        mask_sources: tuple[str, ...],
        files: Mapping[str, bytes],
    ) -> Manifest:
        """The manifest over these files (name → bytes, all but the manifest), with the bundle's id in it."""
        return cls(
            bundle_id="",
            kind=kind,
            name=name,
            version=version,
            preset=preset,
            crop=crop,
            hcr=hcr,
            dtl=dtl,
            threshold=threshold,
            training=training,
            mask_sources=mask_sources,
            files={key: FileEntry.of(data) for key, data in files.items()},
        ).sealed()

    def sealed(self) -> Self:
        """The manifest with the id that its content has."""
        return self.model_copy(update={"bundle_id": manifest_digest(self)})

    @property
    def protocols(self) -> Protocols:
        """What the messages of this bundle's cases carry."""
        return Protocols(
            crop_hash=self.crop.crop_hash,
            hcr_hash=self.hcr.hcr_hash,
            dtl_hash=self.dtl.dtl_hash,
            bundle_id=self.bundle_id,
        )


def manifest_digest(manifest: Manifest) -> str:
    """The bundle's id: SHA-256 of the canonical manifest without the field `bundle_id`."""
    return digest(manifest.model_dump(mode="json", exclude={"bundle_id"}))


def manifest_bytes(manifest: Manifest) -> bytes:
    """The one byte form of manifest.json (sorted, indented, a line feed at the end)."""
    return (json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def model_bytes(model: BaseModel) -> bytes:
    """The bytes of a JSON file of the bundle (any model of this module but the manifest)."""
    return canonical_json(model.model_dump(mode="json")) + b"\n"


def hcr_features_bytes(names: tuple[str, ...]) -> bytes:
    """The bytes of hcr_features.txt: each name and a line feed (`HcrProtocol.feature_names_sha256` is their digest)."""
    return "".join(name + "\n" for name in names).encode()


class Pca(_Frozen):
    """Standardise and project: component k = Σ_j components[k][j] · (x_j - mean_j) / sd_j + offset[k].

    Fitted on training rows only. x: the DTL features in the order of `inputs` (all that the network gives). A column
    that is constant in training has sd 1. `components` holds only the rows that a model uses, named in `names`
    ("pca_000" is the component of largest variance). There is no further centring; `offset` () stands for zeros. The
    logit w·x + b of a fine-tuned network is one component with an offset, named "dtl_logit".
    """

    inputs: tuple[str, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    names: tuple[str, ...]
    components: tuple[tuple[float, ...], ...]
    offset: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        _check_standardisation("pca", self.inputs, self.mean, self.sd)
        if len(set(self.names)) != len(self.names) or len(self.names) != len(self.components):
            raise ValueError("pca: each component needs a name of its own")
        if any(len(row) != len(self.inputs) for row in self.components):
            raise ValueError("pca: a component has another length than the inputs")
        if self.offset and len(self.offset) != len(self.names):
            raise ValueError(f"pca: {len(self.offset)} offsets do not fit {len(self.names)} components")
        return self

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        rows = np.array(self.components, dtype=np.float64).reshape(len(self.names), len(self.inputs))
        return np.array(self.mean), np.array(self.sd), rows

    def apply(self, dtl: NDArray[np.float64]) -> dict[str, float]:
        """The named components of one DTL vector (in the order of `inputs`)."""
        mean, sd, rows = self._arrays
        standardised = (np.asarray(dtl, dtype=np.float64) - mean) / sd
        # a sum along the row, not BLAS: the same bits whatever the number of threads
        projected = (rows * standardised).sum(axis=1)
        if self.offset:
            projected = projected + np.array(self.offset, dtype=np.float64)
        return {name: float(value) for name, value in zip(self.names, projected, strict=True)}


class Platt(_Frozen):
    """Calibration: P = sigmoid(a · score + b), fitted on out-of-fold scores."""

    a: float
    b: float

    def probability(self, score: float) -> float:
        """P(acute) of a score."""
        return sigmoid(self.a * score + self.b)


class OnnxClassifier(_Frozen):
    """A classifier beside the linear score, as ONNX: P(acute) = platt(score).

    `file`: input `z` float32 (n, k), standardised in float64 first, in the order of the model's inputs; output `score`
    float32 (n, 1), a decision value, a margin or P(acute) before calibration.
    """

    kind: ClassifierKind
    file: FileName
    platt: Platt


class LinearModel(_Frozen):
    """One linear classifier: z = (x - mean) / sd, score (rad-score) = intercept + Σ coef·z, P(acute) = sigmoid(score).

    `inputs`: the names of the selected features, HCR names or PCA component names; mean and sd over training rows.
    With `platt`, P(acute) = sigmoid(a·score + b). With a `classifier` the probability is the classifier's, on the same
    z, and the linear score feeds the nomogram alone. `score_kind` lasso: the score is the LASSO's on classes 0 and 1,
    not in log odds, and a probability needs `platt` or a classifier.
    """

    kind: Literal["linear"] = "linear"
    inputs: tuple[str, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    coef: tuple[float, ...]
    intercept: float
    platt: Platt | None = None
    score_kind: ScoreKind = "logistic"
    classifier: OnnxClassifier | None = None

    @model_validator(mode="after")
    def _score_has_a_probability(self) -> Self:
        if self.score_kind == "lasso" and self.platt is None and self.classifier is None:
            raise ValueError("model: a LASSO's score is no log odds; it needs platt or a classifier")
        return self

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        _check_standardisation("model", self.inputs, self.mean, self.sd)
        if len(self.coef) != len(self.inputs):
            raise ValueError(f"model: {len(self.coef)} coefficients do not fit {len(self.inputs)} inputs")
        return self

    def z(self, values: Mapping[str, float]) -> dict[str, float]:
        """The standardised inputs."""
        return {
            name: (values[name] - mean) / sd for name, mean, sd in zip(self.inputs, self.mean, self.sd, strict=True)
        }

    def contributions(self, values: Mapping[str, float]) -> dict[str, float]:
        """coef · z of each input; with the intercept they add up to the score."""
        return {name: coef * z for (name, z), coef in zip(self.z(values).items(), self.coef, strict=True)}

    def score(self, values: Mapping[str, float]) -> float:
        """The linear score (rad-score) of named values."""
        return float(self.intercept + sum(self.contributions(values).values()))

    def probability(self, score: float) -> float:
        """P(acute) of a linear score, where no classifier stands beside it."""
        return sigmoid(score) if self.platt is None else self.platt.probability(score)


class Thresholds(_Frozen):
    """Probabilities from which on each model calls a case acute, frozen on out-of-fold training scores."""

    hcr: Annotated[float, Field(gt=0, lt=1)]
    dtl: Annotated[float, Field(gt=0, lt=1)]
    fusion: Annotated[float, Field(gt=0, lt=1)]
    nomogram: Annotated[float, Field(gt=0, lt=1)]


class Conformal(_Frozen):
    """Split-conformal prediction sets, class by class (Mondrian), on the fusion probability.

    `chronic` and `acute`: the largest nonconformity 1 - P(class) that is still accepted of that class; with them a new
    case's true class is in the set with a probability of at least 1 - `alpha`, whichever class it is, where cases are
    exchangeable. Source: Vovk, Gammerman and Shafer 2005, chapter 4.5.
    """

    alpha: Annotated[float, Field(gt=0, lt=0.5)]
    chronic: Annotated[float, Field(ge=0, le=1)]
    acute: Annotated[float, Field(ge=0, le=1)]

    def prediction_set(self, probability: float) -> tuple[ClassName, ...]:
        """The classes that are not ruled out at this P(acute), in class order: none, one or both."""
        nonconformity = nonconformities(probability)
        accepted: dict[ClassName, float] = {"chronic": self.chronic, "acute": self.acute}
        return tuple(name for name, limit in accepted.items() if nonconformity[name] <= limit)


def nonconformities(probability: float) -> dict[ClassName, float]:
    """1 - P(class) of each class at a P(acute)."""
    return {"chronic": probability, "acute": 1.0 - probability}


class Models(_Frozen):
    """models.json: the three models; `hcr` reads HCR names, `dtl` component names, `fusion` both."""

    pca: Pca
    hcr: LinearModel
    dtl: LinearModel
    fusion: LinearModel
    thresholds: Thresholds | None = None
    conformal: Conformal | None = None

    def branch(self, name: Branch) -> LinearModel:
        """One of the three by its name."""
        return {"hcr": self.hcr, "dtl": self.dtl, "fusion": self.fusion}[name]

    @property
    def classifiers(self) -> dict[Branch, OnnxClassifier]:
        """The ONNX classifiers that there are."""
        found: dict[Branch, OnnxClassifier] = {}
        for name in BRANCHES:
            classifier = self.branch(name).classifier
            if classifier is not None:
                found[name] = classifier
        return found

    @property
    def selected(self) -> tuple[str, ...]:
        """Every feature that some model reads, each once, sorted."""
        return tuple(sorted({*self.hcr.inputs, *self.dtl.inputs, *self.fusion.inputs}))

    @model_validator(mode="after")
    def _inputs_are_known(self) -> Self:
        components = set(self.pca.names)
        if set(self.dtl.inputs) - components:
            raise ValueError("the DTL model reads a component that the PCA does not give")
        if set(self.hcr.inputs) & components:
            raise ValueError("the HCR model reads PCA components")
        return self

    @model_validator(mode="after")
    def _each_classifier_has_its_file(self) -> Self:
        files = [classifier.file for classifier in self.classifiers.values()]
        if len(set(files)) != len(files) or NETWORK in files:
            raise ValueError("each classifier needs a file of its own")
        return self


class FeatureRange(_Frozen):
    """The least and largest value of a selected feature over the training cases."""

    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low lies above high")
        return self


class Distribution(_Frozen):
    """distribution.json: the range of every selected feature (`Models.selected`), unstandardised, in training."""

    features: dict[str, FeatureRange]


class GoldenVector(_Frozen):
    """One input with what must come out: all HCR values (order of hcr_features.txt), all DTL values (`Pca.inputs`).

    The linear scores came with schema 2, which demands them.
    """

    hcr: tuple[float, ...]
    dtl: tuple[float, ...]
    age: int
    sex: Literal["F", "M"]
    hcr_probability: float
    dtl_probability: float
    fusion_probability: float
    nomogram_probability: float
    hcr_score: float | None = None
    dtl_score: float | None = None
    fusion_score: float | None = None


class GoldenImage(_Frozen):
    """One network input (size x size rows, z-normalised float32) and its features from onnxruntime on the CPU.

    Passes when max |got - features| ≤ tolerance · max(1, max |features|).
    """

    pixels: tuple[tuple[float, ...], ...]
    features: tuple[float, ...]
    tolerance: Annotated[float, Field(gt=0, le=0.1)] = 1e-3


class Golden(_Frozen):
    """golden.json: checked by `load_bundle` (vectors) and by the deep extractor when it starts (image)."""

    vectors: Annotated[tuple[GoldenVector, ...], Field(min_length=1)]
    image: GoldenImage


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle. Made by `load_bundle` alone.

    `classifiers`: what the ONNX classifiers answer, by branch; there once the bundle is `running`.
    """

    folder: Path
    """Or its zip."""
    manifest: Manifest
    models: Models
    nomogram: NomogramModel
    distribution: Distribution
    golden: Golden
    hcr_features: tuple[str, ...]
    pyradiomics_yaml: bytes
    metrics: dict[str, JsonValue]
    model_card: str
    classifiers: Mapping[Branch, ScoreOf] = field(default_factory=dict)

    @property
    def bundle_id(self) -> str:
        """The hash of the manifest."""
        return self.manifest.bundle_id

    @property
    def protocols(self) -> Protocols:
        """What the messages of this bundle's cases carry."""
        return self.manifest.protocols

    def network_bytes(self) -> bytes:
        """The bytes of network.onnx, verified again as they are read."""
        return self.file_bytes(NETWORK)

    def file_bytes(self, name: str) -> bytes:
        """The bytes of a file that the manifest lists, verified again as they are read."""
        return _read_verified(files_of(self.folder), name, self.manifest.files[name])

    def files(self) -> dict[str, bytes]:
        """Every file of the bundle, its manifest too, verified again as they are read."""
        return {
            MANIFEST: manifest_bytes(self.manifest),
            **{name: self.file_bytes(name) for name in self.manifest.files},
        }

    def pack(self, path: Path) -> None:
        """Write the bundle as a zip, the same bytes wherever it is done."""
        write_zip(path, self.files())

    def running(self) -> Bundle:
        """The bundle with its ONNX classifiers ready, once they give the golden probabilities (itself without any).

        BundleError where they do not, or where onnxruntime is not installed.
        """
        if set(self.classifiers) == set(self.models.classifiers):
            return self
        ready: dict[Branch, ScoreOf] = {}
        for name, classifier in self.models.classifiers.items():
            try:
                ready[name] = OnnxScore(
                    self.file_bytes(classifier.file), width=len(self.models.branch(name).inputs)
                ).score
            except ClassifierUnusable as error:
                raise BundleError(f"{classifier.file}: {error}") from error
        running = replace(self, classifiers=ready)
        _check_golden(running)
        return running


@dataclass(frozen=True, kw_only=True)
class LinearScores:
    """The three linear scores of one case."""

    values: Mapping[str, float]
    """HCR features and PCA components by name."""
    hcr_score: float
    dtl_score: float
    fusion_score: float


@dataclass(frozen=True, kw_only=True)
class Outputs(LinearScores):
    """What the three models say of one case."""

    hcr_probability: float
    dtl_probability: float
    fusion_probability: float


def linear_scores(models: Models, *, hcr: Mapping[str, float], dtl: NDArray[np.float64]) -> LinearScores:
    """The linear scores of one case; `hcr` by name, `dtl` (n,) in the order of `models.pca.inputs`."""
    values = {**hcr, **models.pca.apply(dtl)}
    return LinearScores(
        values=values,
        hcr_score=models.hcr.score(values),
        dtl_score=models.dtl.score(values),
        fusion_score=models.fusion.score(values),
    )


def evaluate(
    models: Models,
    *,
    hcr: Mapping[str, float],
    dtl: NDArray[np.float64],
    classifiers: Mapping[Branch, ScoreOf] | None = None,
) -> Outputs:
    """Scores and probabilities of one case; `hcr` by name, `dtl` (n,) in the order of `models.pca.inputs`.

    `classifiers`: those of a bundle that is `running`; RuntimeError where a model has one that is not among them.
    """
    linear = linear_scores(models, hcr=hcr, dtl=dtl)
    scores: dict[Branch, float] = {
        "hcr": linear.hcr_score,
        "dtl": linear.dtl_score,
        "fusion": linear.fusion_score,
    }
    probability = {
        name: _probability(models.branch(name), name, score, linear.values, classifiers or {})
        for name, score in scores.items()
    }
    return Outputs(
        values=linear.values,
        hcr_score=linear.hcr_score,
        dtl_score=linear.dtl_score,
        fusion_score=linear.fusion_score,
        hcr_probability=probability["hcr"],
        dtl_probability=probability["dtl"],
        fusion_probability=probability["fusion"],
    )


def _probability(
    model: LinearModel,
    branch: Branch,
    score: float,
    values: Mapping[str, float],
    classifiers: Mapping[Branch, ScoreOf],
) -> float:
    if model.classifier is None:
        return model.probability(score)
    if branch not in classifiers:
        raise RuntimeError(f"the {branch} model's classifier is not running (see Bundle.running)")
    z = np.array(list(model.z(values).values()), dtype=np.float64)
    return model.classifier.platt.probability(classifiers[branch](z))


def load_bundle(folder: Path, run_classifiers: bool = False) -> Bundle:
    """A bundle's folder or zip, verified; BundleError with one sentence where anything is not as the manifest says.

    Golden scores are always checked, and so are the probabilities of models without an ONNX classifier. With
    `run_classifiers` the bundle comes `running`: ready to compute probabilities, all of them checked.
    """
    files = files_of(folder)
    manifest = _read_manifest(files, folder.name)
    _check_listing(files, manifest)
    contents = {name: _read_verified(files, name, entry) for name, entry in sorted(manifest.files.items())}
    for name, data in contents.items():
        if name.endswith(".onnx"):
            _check_onnx(name, data)
    bundle = Bundle(
        folder=folder,
        manifest=manifest,
        models=_parse(Models, "models.json", contents),
        nomogram=_parse(NomogramModel, "nomogram.json", contents),
        distribution=_parse(Distribution, "distribution.json", contents),
        golden=_parse(Golden, "golden.json", contents),
        hcr_features=_feature_names(contents["hcr_features.txt"]),
        pyradiomics_yaml=contents["pyradiomics.yaml"],
        metrics=_metrics(contents["metrics.json"]),
        model_card=_text("MODEL_CARD.md", contents["MODEL_CARD.md"]),
    )
    _check_protocols(bundle)
    _check_schema(bundle)
    _check_models(bundle)
    _check_classifiers(bundle, contents)
    _check_golden(bundle)
    return bundle.running() if run_classifiers else bundle


def _check_standardisation(what: str, inputs: tuple[str, ...], mean: tuple[float, ...], sd: tuple[float, ...]) -> None:
    if not inputs or len(set(inputs)) != len(inputs):
        raise ValueError(f"{what}: inputs must be at least one name, each once")
    if not len(inputs) == len(mean) == len(sd):
        raise ValueError(f"{what}: {len(inputs)} inputs, {len(mean)} means and {len(sd)} standard deviations")
    if any(value <= 0 for value in sd):
        raise ValueError(f"{what}: every standard deviation must be above zero")


def _read_manifest(files: BundleFiles, called: str) -> Manifest:
    if MANIFEST not in files.names():
        raise BundleError(f"{called!r} is not a bundle, it has no {MANIFEST}")
    data = files.read(MANIFEST, most=MAX_FILE_BYTES)
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is not JSON, so the bundle is damaged") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in SCHEMAS_READ or isinstance(version, bool):
        raise BundleError(f"bundle schema {version!r} is unknown, this version reads 1 and 2")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{MANIFEST} does not fit its schema: {_first_error(error)}") from error
    if manifest_digest(manifest) != manifest.bundle_id or manifest_bytes(manifest) != data:
        raise BundleError(f"{MANIFEST} was changed after the bundle was made (its bundle_id does not fit)")
    return manifest


def _check_listing(files: BundleFiles, manifest: Manifest) -> None:
    missing = [name for name in REQUIRED_FILES if name not in manifest.files]
    if missing:
        raise BundleError(f"the manifest does not list {', '.join(missing)}")
    unlisted = sorted(files.names() - set(manifest.files) - {MANIFEST})
    if unlisted:
        raise BundleError(f"the bundle holds what its manifest does not list: {', '.join(unlisted[:5])}")


def _read_verified(files: BundleFiles, name: str, entry: FileEntry) -> bytes:
    data = files.read(name, most=min(entry.size, MAX_FILE_BYTES))
    if len(data) != entry.size:
        raise BundleError(f"{name} has {len(data)} bytes where the manifest says {entry.size}")
    if sha256_hex(data) != entry.sha256:
        raise BundleError(f"{name} was changed after the bundle was made (its SHA-256 does not fit)")
    return data


_Model = TypeVar("_Model", bound=BaseModel)


def _parse(model: type[_Model], name: str, contents: Mapping[str, bytes]) -> _Model:
    try:
        return model.model_validate_json(contents[name])
    except ValidationError as error:
        raise BundleError(f"{name} does not fit its schema: {_first_error(error)}") from error


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "it"
    return f"{where}: {first['msg']}"


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{name} is not UTF-8 text") from error


def _feature_names(data: bytes) -> tuple[str, ...]:
    names = tuple(_text("hcr_features.txt", data).splitlines())
    if not names or len(set(names)) != len(names) or hcr_features_bytes(names) != data:
        raise BundleError("hcr_features.txt must hold each feature name once, each followed by a line feed")
    return names


def _metrics(data: bytes) -> dict[str, JsonValue]:
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise BundleError("metrics.json is not JSON") from error
    if not isinstance(raw, dict):
        raise BundleError("metrics.json must hold one JSON object")
    return raw


def _onnx_model(name: str, data: bytes) -> onnx.ModelProto:
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's decoders raise classes of their own
        raise BundleError(f"{name} is not an ONNX model") from error


def _check_onnx(name: str, data: bytes) -> None:
    model = _onnx_model(name, data)
    domains = {entry.domain for entry in model.opset_import}
    custom = {domain for domain in domains if not _is_standard(domain)}
    for graph in [model.graph, *model.functions]:
        for message in _walk(graph):
            if isinstance(message, onnx.NodeProto) and not _is_standard(message.domain):
                custom.add(message.domain)
            if isinstance(message, onnx.TensorProto) and (
                message.external_data or message.data_location == onnx.TensorProto.EXTERNAL
            ):
                raise BundleError(f"{name} keeps weights outside its own file, which a bundle may not")
    if custom or model.functions:
        raise BundleError(f"{name} uses custom operators ({', '.join(sorted(custom)) or 'local functions'})")


def _is_standard(domain: str) -> bool:
    return domain in ("", "ai.onnx", "ai.onnx.ml")


def _walk(message: Any) -> Iterator[Any]:
    """A protobuf message and every message below it."""
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            for below in value if isinstance(value, list) or hasattr(value, "append") else [value]:
                yield from _walk(below)


def _check_protocols(bundle: Bundle) -> None:
    files, manifest = bundle.manifest.files, bundle.manifest
    for name, found, held, of in (
        ("pyradiomics.yaml", files["pyradiomics.yaml"].sha256, manifest.hcr.parameters_sha256, "parameters_sha256"),
        (
            "hcr_features.txt",
            digest(list(bundle.hcr_features)),
            manifest.hcr.feature_names_sha256,
            "feature_names_sha256",
        ),
        (NETWORK, files[NETWORK].sha256, manifest.dtl.network_sha256, "network_sha256"),
    ):
        if found != held:
            raise BundleError(f"{name} is not the file that the protocol names ({of} differs)")


def _check_models(bundle: Bundle) -> None:
    models = bundle.models
    known = {*bundle.hcr_features, *models.pca.names}
    unknown = sorted(set(models.selected) - known)
    if unknown:
        raise BundleError(f"models.json reads features that nothing gives: {', '.join(unknown[:5])}")
    if set(bundle.hcr_features) & set(models.pca.names):
        raise BundleError("a PCA component has the name of an HCR feature")
    unranged = sorted(set(models.selected) - set(bundle.distribution.features))
    if unranged:
        raise BundleError(f"distribution.json lacks selected features: {', '.join(unranged[:5])}")
    image, size = bundle.golden.image, bundle.manifest.dtl.size
    if len(image.pixels) != size or any(len(row) != size for row in image.pixels):
        raise BundleError(f"the golden image must have {size} x {size} pixels")
    if len(image.features) != len(models.pca.inputs):
        raise BundleError(
            f"the golden image has {len(image.features)} features, the PCA reads {len(models.pca.inputs)}"
        )


def _check_schema(bundle: Bundle) -> None:
    """What schema 2 brought does not stand in a bundle of schema 1, which its reader would refuse."""
    models, vectors = bundle.models, bundle.golden.vectors
    if bundle.manifest.schema_version == 1:
        later = models.thresholds or models.conformal or models.pca.offset or models.classifiers
        if later or any(models.branch(name).score_kind != "logistic" for name in BRANCHES):
            raise BundleError("models.json holds what came with bundle schema 2, the manifest says 1")
        return
    for number, vector in enumerate(vectors, start=1):
        if None in (vector.hcr_score, vector.dtl_score, vector.fusion_score):
            raise BundleError(f"golden vector {number} lacks the scores that bundle schema 2 demands")
    if models.thresholds is not None and models.thresholds.fusion != bundle.manifest.threshold:
        raise BundleError("models.json and the manifest name different thresholds of the fusion model")


def _check_classifiers(bundle: Bundle, contents: Mapping[str, bytes]) -> None:
    named = {classifier.file: name for name, classifier in bundle.models.classifiers.items()}
    for file, branch in named.items():
        if file not in contents:
            raise BundleError(f"models.json names the classifier {file}, which the manifest does not list")
        _check_classifier_ends(file, contents[file], width=len(bundle.models.branch(branch).inputs))
    stray = sorted(name for name in contents if name.endswith(".onnx") and name != NETWORK and name not in named)
    if stray:
        raise BundleError(f"no model of the bundle uses {', '.join(stray)}")


def _check_classifier_ends(name: str, data: bytes, *, width: int) -> None:
    graph = _onnx_model(name, data).graph
    ends = [
        [(end.name, end.type.tensor_type.elem_type, [size.dim_value for size in end.type.tensor_type.shape.dim])]
        for end in (*graph.input, *graph.output)
    ]
    z, score = ("z", onnx.TensorProto.FLOAT, [0, width]), ("score", onnx.TensorProto.FLOAT, [0, 1])
    if ends != [[z], [score]]:
        raise BundleError(f"{name} must take z (n, {width}) and give score (n, 1), both float32")


def _check_golden(bundle: Bundle) -> None:
    """Every number that can be had: probabilities of ONNX classifiers only where the bundle is running."""
    models = bundle.models
    for number, vector in enumerate(bundle.golden.vectors, start=1):
        if len(vector.hcr) != len(bundle.hcr_features) or len(vector.dtl) != len(models.pca.inputs):
            raise BundleError(f"golden vector {number} has another length than the features of the bundle")
        hcr = dict(zip(bundle.hcr_features, vector.hcr, strict=True))
        linear = linear_scores(models, hcr=hcr, dtl=np.array(vector.dtl))
        nomogram = read_points(bundle.nomogram, age=vector.age, sex=vector.sex, score=linear.fusion_score).probability
        expected: dict[Branch, tuple[str, float, float | None, float]] = {
            "hcr": ("HCR", linear.hcr_score, vector.hcr_score, vector.hcr_probability),
            "dtl": ("DTL", linear.dtl_score, vector.dtl_score, vector.dtl_probability),
            "fusion": ("fusion", linear.fusion_score, vector.fusion_score, vector.fusion_probability),
        }
        for branch, (what, score, expected_score, expected_probability) in expected.items():
            if expected_score is not None:
                _golden(number, f"{what} score", score, expected_score, GOLDEN_TOLERANCE * max(1.0, abs(score)))
            model = models.branch(branch)
            if model.classifier is None or branch in bundle.classifiers:
                got = _probability(model, branch, score, linear.values, bundle.classifiers)
                tolerance = GOLDEN_TOLERANCE if model.classifier is None else CLASSIFIER_TOLERANCE
                _golden(number, f"{what} probability", got, expected_probability, tolerance)
        _golden(number, "nomogram probability", nomogram, vector.nomogram_probability, GOLDEN_TOLERANCE)


def _golden(number: int, what: str, value: float, expected: float, tolerance: float) -> None:
    if not abs(value - expected) <= tolerance:
        raise BundleError(f"golden vector {number} gives a {what} of {value:.9f} where {expected:.9f} is expected")


def check_features(bundle: Bundle, *, hcr: FeatureVector, dtl: FeatureVector) -> None:
    """ValueError where a vector is of another kind, list or protocol than the bundle was fitted on."""
    for vector, kind, names, protocol_hash in (
        (hcr, "hcr", bundle.hcr_features, bundle.manifest.hcr.hcr_hash),
        (dtl, "dtl", bundle.models.pca.inputs, bundle.manifest.dtl.dtl_hash),
    ):
        if vector.kind != kind:
            raise ValueError(f"{kind} features expected, {vector.kind} features given")
        if vector.protocol_hash != protocol_hash:
            raise ValueError(f"the {kind} features were made under another protocol than the bundle's")
        if vector.names != names:
            raise ValueError(f"the {kind} features have other names or another order than the bundle's")
