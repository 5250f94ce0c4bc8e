"""A valid bundle in a second, without torch: for flow tests, never for results.

The network is one random convolution, the classifiers are random coefficients on a few well-known features. It stands
on the real list of hand-crafted features, or on those of the original image alone, which extract in a tenth of the
time.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from services.trainer.bundle_writer import FittedBundle, golden_image, golden_vector, write_bundle
from shared.fracture.bundle import Bundle, Distribution, FeatureRange, Golden, LinearModel, Models, Pca, Training
from shared.fracture.features import dtl_names
from shared.fracture.nomogram import NomogramModel
from shared.fracture.protocol import CropProtocol, preset_crop

ImageTypes = Literal["original", "full"]

FEATURES: Final = 2048
SIZE: Final = 64
_KERNEL: Final = 8
_STRIDE: Final = 16
_COMPONENTS: Final = 6
_EXTRACTOR: Final = Path(__file__).parents[1] / "radiomics_extractor"
_TYPICAL: Final[dict[str, tuple[float, float]]] = {
    "original_firstorder_Mean": (170.0, 70.0),
    "original_firstorder_Entropy": (4.3, 0.6),
    "original_firstorder_Skewness": (0.8, 0.8),
    "original_glcm_Correlation": (0.5, 0.15),
    "original_glcm_Idm": (0.25, 0.07),
    "original_shape_Flatness": (0.6, 0.12),
    "original_shape_Sphericity": (0.75, 0.06),
}
"""Mean and SD of a few features in vertebral bodies, roughly: so that no random score runs away."""


def parameter_text(image_types: ImageTypes) -> str:
    """The extractor's parameter file, or the same with the original image alone."""
    text = (_EXTRACTOR / "pyradiomics.yaml").read_text(encoding="utf-8")
    if image_types == "full":
        return text
    head, rest = text.split("imageType:\n", 1)
    tail = rest[rest.index("featureClass:") :]
    return f"{head}imageType:\n  Original: {{}}\n\n{tail}"


def feature_list(image_types: ImageTypes) -> tuple[str, ...]:
    """The names of the features that `parameter_text` yields, in pyradiomics' order."""
    names = (_EXTRACTOR / "hcr_features.txt").read_text(encoding="utf-8").split()
    return tuple(name for name in names if image_types == "full" or name.startswith("original_"))


def _kernels(seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([seed, 1])
    return (rng.standard_normal((FEATURES, 1, _KERNEL, _KERNEL)) / _KERNEL).astype(np.float32)


def tiny_network(*, seed: int) -> bytes:
    """ONNX bytes: one convolution, ReLU, average pool; (n, 1, 64, 64) to (n, 2048)."""
    nodes = [
        helper.make_node(
            "Conv", ["image", "kernels"], ["y"], kernel_shape=[_KERNEL] * 2, strides=[_STRIDE] * 2, pads=[0] * 4
        ),
        helper.make_node("Relu", ["y"], ["rectified"]),
        helper.make_node("GlobalAveragePool", ["rectified"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, SIZE, SIZE])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", FEATURES])],
        [numpy_helper.from_array(_kernels(seed), "kernels")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def tiny_features(picture: NDArray[np.float32], *, seed: int) -> NDArray[np.float64]:
    """What the tiny network gives for one picture (64, 64)."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, (_KERNEL, _KERNEL))[::_STRIDE, ::_STRIDE]
    answers = np.einsum("yxij,fij->fyx", windows.astype(np.float64), _kernels(seed)[:, 0].astype(np.float64))
    return np.asarray(np.maximum(answers, 0).mean(axis=(1, 2)), dtype=np.float64)


def _models(classifier_seed: int) -> Models:
    rng = np.random.default_rng([classifier_seed, 2])
    fixed = np.random.default_rng(3)
    components = fixed.standard_normal((_COMPONENTS, FEATURES)) / np.sqrt(FEATURES)
    names = tuple(f"pca_{place:03d}" for place in range(_COMPONENTS))
    pca = Pca(
        inputs=dtl_names(FEATURES),
        mean=(0.4,) * FEATURES,
        sd=(0.15,) * FEATURES,
        names=names,
        components=tuple(tuple(float(value) for value in row) for row in components),
    )

    def linear(inputs: tuple[str, ...]) -> LinearModel:
        typical = [_TYPICAL.get(name, (0.0, 2.0)) for name in inputs]
        return LinearModel(
            inputs=inputs,
            mean=tuple(mean for mean, _ in typical),
            sd=tuple(sd for _, sd in typical),
            coef=tuple(float(value) for value in rng.normal(0, 0.4, len(inputs))),
            intercept=float(rng.normal(0, 0.2)),
        )

    features = tuple(_TYPICAL)
    return Models(pca=pca, hcr=linear(features), dtl=linear(names), fusion=linear((*features, *names)))


def write_tiny_bundle(
    folder: Path,
    *,
    seed: int = 0,
    classifier_seed: int = 0,
    network_seed: int = 0,
    image_types: ImageTypes = "full",
    crop: CropProtocol | None = None,
    mask_sources: tuple[str, ...] = (),
) -> Bundle:
    """A valid bundle of kind DEMO, untrained.

    Another `classifier_seed` gives another bundle_id with the same hcr_hash and dtl_hash; another `network_seed`
    another dtl_hash; another `seed` only other golden vectors (and so another bundle_id).
    """
    names = feature_list(image_types)
    models = _models(classifier_seed)
    nomogram = NomogramModel(
        intercept=1.3, beta_age=-0.02, beta_male=0.1, beta_score=1.0, age_range=(40.0, 90.0), score_range=(-3.0, 3.0)
    )
    rng = np.random.default_rng([seed, 4])
    picture = rng.standard_normal((SIZE, SIZE)).astype(np.float32)
    features = tiny_features(picture, seed=network_seed)
    values = np.array([rng.normal(*_TYPICAL.get(name, (1.0, 0.1))) for name in names])
    ranges = {
        name: FeatureRange(low=mean - 8 * sd, high=mean + 8 * sd)
        for name, (mean, sd) in ((name, _TYPICAL.get(name, (0.0, 10.0))) for name in models.selected)
    }
    fitted = FittedBundle(
        kind="DEMO",
        name="tiny",
        version="0",
        preset="recommended",
        crop=crop or preset_crop("recommended"),
        pyradiomics_version=version("pyradiomics-bhklab"),
        parameters=parameter_text(image_types),
        hcr_names=names,
        network=tiny_network(seed=network_seed),
        models=models,
        nomogram=nomogram,
        threshold=0.5,
        distribution=Distribution(features=ranges),
        golden=Golden(
            vectors=(
                golden_vector(models, nomogram, hcr_names=names, hcr=values, dtl=features, age=70, sex="F"),
                golden_vector(models, nomogram, hcr_names=names, hcr=values, dtl=features, age=55, sex="M"),
            ),
            image=golden_image(picture, features),
        ),
        training=Training(
            counts={"patients": 0, "cases": 0},
            seeds={"seed": seed, "classifier": classifier_seed, "network": network_seed},
            fingerprint="0" * 64,
        ),
        mask_sources=("synthetic phantom", *mask_sources),
        metrics={"note": "untrained; for tests alone"},
        model_card="# tiny\n\nUntrained: random coefficients for tests. No meaning of any kind.\n",
    )
    return write_bundle(folder, fitted)
