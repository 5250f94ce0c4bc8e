"""A model bundle: one trained, versioned model as a folder of ONNX, JSON and text, checked before a number leaves it.

What the trainer writes, these models define; what a service loads, `load_bundle` has verified: every file's SHA-256
and size, nothing missing, nothing unlisted, nothing outside the folder, no external ONNX data, no custom operator, and
golden vectors that give the expected probabilities. There is no pickle.

Text and JSON files:  models.json (`Models`), nomogram.json (`NomogramModel`), distribution.json (`Distribution`),
golden.json (`Golden`), metrics.json (any JSON object), pyradiomics.yaml (the parameter file, byte for byte),
hcr_features.txt (each name and a line feed), MODEL_CARD.md. The network: network.onnx, input (n, 1, size, size)
float32, first output (n, features) float32. All numbers of linear steps are float64 and written by `repr`.

Later kinds of classifier (ONNX, conformal thresholds) come as new fields under a new `schema_version`.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from shared.fracture.features import FeatureVector
from shared.fracture.ids import canonical_json, digest, sha256_hex
from shared.fracture.nomogram import NomogramModel, read_points, sigmoid
from shared.fracture.protocol import CropProtocol, DtlProtocol, HcrProtocol, Preset, Protocols

SCHEMA_VERSION: Final = 1
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
MAX_FILE_BYTES: Final = 512 * 1024 * 1024
GOLDEN_TOLERANCE: Final = 1e-9
"""Largest difference of a golden probability: float64 arithmetic in another order, nothing more."""

BundleKind = Literal["DEMO", "RESEARCH", "SITE"]
ClassName = Literal["chronic", "acute"]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]


class BundleError(Exception):
    """A bundle that is not to be used; the text is one sentence that says why."""


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

    schema_version: Literal[1] = SCHEMA_VERSION
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
        open_ = cls(
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
        )
        return open_.model_copy(update={"bundle_id": manifest_digest(open_)})

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
    """Standardise and project: component k = Σ_j components[k][j] · (x_j - mean_j) / sd_j.

    Fitted on training rows only. x: the DTL features in the order of `inputs` (all that the network gives). A column
    that is constant in training has sd 1. `components` holds only the rows that a model uses, named in `names`
    ("pca_000" is the component of largest variance). There is no further centring.
    """

    inputs: tuple[str, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    names: tuple[str, ...]
    components: tuple[tuple[float, ...], ...]

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        _check_standardisation("pca", self.inputs, self.mean, self.sd)
        if len(set(self.names)) != len(self.names) or len(self.names) != len(self.components):
            raise ValueError("pca: each component needs a name of its own")
        if any(len(row) != len(self.inputs) for row in self.components):
            raise ValueError("pca: a component has another length than the inputs")
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
        return {name: float(value) for name, value in zip(self.names, projected, strict=True)}


class Platt(_Frozen):
    """Calibration: P = sigmoid(a · score + b), fitted on out-of-fold scores."""

    a: float
    b: float


class LinearModel(_Frozen):
    """One linear classifier: z = (x - mean) / sd, score (rad-score) = intercept + Σ coef·z, P(acute) = sigmoid(score).

    `inputs`: the names of the selected features, HCR names or PCA component names; mean and sd over training rows.
    With `platt`, P(acute) = sigmoid(a·score + b).
    """

    kind: Literal["linear"] = "linear"
    inputs: tuple[str, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    coef: tuple[float, ...]
    intercept: float
    platt: Platt | None = None

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
        """P(acute) of a linear score."""
        return sigmoid(score if self.platt is None else self.platt.a * score + self.platt.b)


class Models(_Frozen):
    """models.json: the three classifiers; `hcr` reads HCR names, `dtl` component names, `fusion` both."""

    pca: Pca
    hcr: LinearModel
    dtl: LinearModel
    fusion: LinearModel

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
    """One input with what must come out: all HCR values (order of hcr_features.txt), all DTL values (`Pca.inputs`)."""

    hcr: tuple[float, ...]
    dtl: tuple[float, ...]
    age: int
    sex: Literal["F", "M"]
    hcr_probability: float
    dtl_probability: float
    fusion_probability: float
    nomogram_probability: float


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
    """A verified bundle. Made by `load_bundle` alone."""

    folder: Path
    manifest: Manifest
    models: Models
    nomogram: NomogramModel
    distribution: Distribution
    golden: Golden
    hcr_features: tuple[str, ...]
    pyradiomics_yaml: bytes
    metrics: dict[str, JsonValue]
    model_card: str

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
        return _read_verified(self.folder, NETWORK, self.manifest.files[NETWORK])


@dataclass(frozen=True, kw_only=True)
class LinearOutputs:
    """What the three linear models say of one case."""

    values: Mapping[str, float]
    """HCR features and PCA components by name."""
    hcr_score: float
    dtl_score: float
    fusion_score: float
    hcr_probability: float
    dtl_probability: float
    fusion_probability: float


def evaluate(models: Models, *, hcr: Mapping[str, float], dtl: NDArray[np.float64]) -> LinearOutputs:
    """Scores and probabilities of one case; `hcr` by name, `dtl` (n,) in the order of `models.pca.inputs`."""
    values = {**hcr, **models.pca.apply(dtl)}
    scores = [model.score(values) for model in (models.hcr, models.dtl, models.fusion)]
    return LinearOutputs(
        values=values,
        hcr_score=scores[0],
        dtl_score=scores[1],
        fusion_score=scores[2],
        hcr_probability=models.hcr.probability(scores[0]),
        dtl_probability=models.dtl.probability(scores[1]),
        fusion_probability=models.fusion.probability(scores[2]),
    )


def load_bundle(folder: Path) -> Bundle:
    """The bundle in a folder, verified; BundleError with one sentence where anything is not as the manifest says."""
    manifest = _read_manifest(folder)
    _check_listing(folder, manifest)
    contents = {name: _read_verified(folder, name, entry) for name, entry in sorted(manifest.files.items())}
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
    _check_models(bundle)
    _check_golden(bundle)
    return bundle


def _check_standardisation(what: str, inputs: tuple[str, ...], mean: tuple[float, ...], sd: tuple[float, ...]) -> None:
    if not inputs or len(set(inputs)) != len(inputs):
        raise ValueError(f"{what}: inputs must be at least one name, each once")
    if not len(inputs) == len(mean) == len(sd):
        raise ValueError(f"{what}: {len(inputs)} inputs, {len(mean)} means and {len(sd)} standard deviations")
    if any(value <= 0 for value in sd):
        raise ValueError(f"{what}: every standard deviation must be above zero")


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise BundleError(f"there is no bundle folder named {folder.name!r}; give the folder that holds {MANIFEST}")
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{folder.name!r} is not a bundle, it has no {MANIFEST}")
    data = path.read_bytes()
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{MANIFEST} is not JSON, so the bundle is damaged") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(f"bundle schema {version!r} is unknown, this version reads {SCHEMA_VERSION}")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{MANIFEST} does not fit its schema: {_first_error(error)}") from error
    if manifest_digest(manifest) != manifest.bundle_id or manifest_bytes(manifest) != data:
        raise BundleError(f"{MANIFEST} was changed after the bundle was made (its bundle_id does not fit)")
    return manifest


def _check_listing(folder: Path, manifest: Manifest) -> None:
    missing = [name for name in REQUIRED_FILES if name not in manifest.files]
    if missing:
        raise BundleError(f"the manifest does not list {', '.join(missing)}")
    unlisted = sorted({entry.name for entry in folder.iterdir()} - set(manifest.files) - {MANIFEST})
    if unlisted:
        raise BundleError(f"the bundle holds what its manifest does not list: {', '.join(unlisted[:5])}")


def _read_verified(folder: Path, name: str, entry: FileEntry) -> bytes:
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise BundleError(f"the bundle lacks {name}, which its manifest lists") from error
    if not stat.S_ISREG(mode):
        raise BundleError(f"{name} in the bundle is a link or a folder, only plain files are read")
    size = path.stat().st_size
    if size != entry.size or size > MAX_FILE_BYTES:
        raise BundleError(f"{name} has {size} bytes where the manifest says {entry.size}")
    data = path.read_bytes()
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


def _check_onnx(name: str, data: bytes) -> None:
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's decoders raise classes of their own
        raise BundleError(f"{name} is not an ONNX model") from error
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
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
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


def _check_golden(bundle: Bundle) -> None:
    for number, vector in enumerate(bundle.golden.vectors, start=1):
        if len(vector.hcr) != len(bundle.hcr_features) or len(vector.dtl) != len(bundle.models.pca.inputs):
            raise BundleError(f"golden vector {number} has another length than the features of the bundle")
        hcr = dict(zip(bundle.hcr_features, vector.hcr, strict=True))
        got = evaluate(bundle.models, hcr=hcr, dtl=np.array(vector.dtl))
        nomogram = read_points(bundle.nomogram, age=vector.age, sex=vector.sex, score=got.fusion_score).probability
        for what, value, expected in (
            ("HCR", got.hcr_probability, vector.hcr_probability),
            ("DTL", got.dtl_probability, vector.dtl_probability),
            ("fusion", got.fusion_probability, vector.fusion_probability),
            ("nomogram", nomogram, vector.nomogram_probability),
        ):
            if not abs(value - expected) <= GOLDEN_TOLERANCE:
                raise BundleError(
                    f"golden vector {number} gives a {what} probability of {value:.9f} where {expected:.9f} is expected"
                )


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
