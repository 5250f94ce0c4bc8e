"""A fitted model with any of the seven classifiers, written, loaded and scored as a service does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.trainer.bundle_writer import (
    FittedBundle,
    classifier_file,
    golden_image,
    golden_vector,
    runnable,
    training_ranges,
    write_bundle,
)
from services.trainer.classifiers import GRIDS, fit_platt, fitted, to_onnx
from services.trainer.conformal import fit_conformal
from services.trainer.results import GridPoint
from services.trainer.selection import standardisation
from services.trainer.settings import CLASSIFIERS, ClassifierName
from shared.fracture.bundle import (
    Golden,
    LinearModel,
    Models,
    OnnxClassifier,
    Pca,
    Thresholds,
    Training,
    load_bundle,
)
from shared.fracture.bundle_files import BundleError
from shared.fracture.features import FeatureVector, dtl_names
from shared.fracture.protocol import CropProtocol
from shared.fracture.scoring import Classification, score
from tests.fixtures.small_bundle import DTL_FEATURES, HCR_NAMES, NOMOGRAM, golden_picture, small_network

LOGIT = "dtl_logit"


class _Cohort:
    """Rows of features of which the first HCR one and the network's logit tell the classes apart, and a fit to them."""

    def __init__(self, kind: ClassifierName, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.acute = (np.arange(60) % 2).astype(np.int64)
        # radiomics reach 1e11, where float32 has steps of thousands
        self.hcr = rng.normal(size=(60, len(HCR_NAMES))) * 1e9 + 1e11
        self.hcr[:, 0] += 1e9 * self.acute
        self.dtl = rng.normal(size=(60, DTL_FEATURES)) + 0.3 * self.acute[:, None]
        self.pca = Pca(
            inputs=dtl_names(DTL_FEATURES),
            mean=(0.0,) * DTL_FEATURES,
            sd=(1.0,) * DTL_FEATURES,
            names=(LOGIT,),
            components=((1.0,) * DTL_FEATURES,),
            offset=(-1.5,),
        )
        self.logit = self.dtl.sum(axis=1) - 1.5
        self.values = np.column_stack([self.hcr[:, :3], self.logit])
        self.names = (*HCR_NAMES[:3], LOGIT)
        mean, deviation = standardisation(self.values)
        self.z = (self.values - mean) / deviation
        point = GridPoint(classifier=kind, parameters=GRIDS["small"][kind][0], auc_mean=0.5, auc_sd=0.0)
        self.classifier = fitted(point, self.z, self.acute, 1)
        self.platt = fit_platt(self.classifier.score(self.z), self.acute)
        self.onnx = to_onnx(self.classifier, len(self.names))
        probability = np.array([self.platt.probability(float(one)) for one in self.classifier.score(self.z)])
        self.models = Models(
            pca=self.pca,
            hcr=_linear(HCR_NAMES[:2], self.hcr[:, :2]),
            dtl=_linear((LOGIT,), self.logit[:, None]),
            fusion=_linear(
                self.names,
                self.values,
                score_kind="lasso",
                classifier=OnnxClassifier(kind=kind, file=classifier_file("fusion"), platt=self.platt),
            ),
            thresholds=Thresholds(hcr=0.4, dtl=0.45, fusion=0.5, nomogram=0.55),
            conformal=fit_conformal(probability, self.acute, alpha=0.1),
        )

    def fitted(self) -> FittedBundle:
        vectors = tuple(
            golden_vector(
                self.models,
                NOMOGRAM,
                hcr_names=HCR_NAMES,
                hcr=self.hcr[row],
                dtl=self.dtl[row],
                age=70,
                sex="F",
                classifiers=runnable(self.models, {"fusion": self.onnx}),
            )
            for row in (0, 1)
        )
        picture = golden_picture()
        return FittedBundle(
            kind="RESEARCH",
            name="fitted",
            version="1",
            preset="recommended",
            crop=CropProtocol(),
            pyradiomics_version="3.1.4",
            parameters="imageType:\n  Original: {}\n",
            hcr_names=HCR_NAMES,
            network=small_network(),
            models=self.models,
            nomogram=NOMOGRAM,
            threshold=0.5,
            distribution=training_ranges(self.models, hcr_names=HCR_NAMES, hcr=self.hcr, dtl=self.dtl),
            golden=Golden(vectors=vectors, image=golden_image(picture, np.zeros(DTL_FEATURES))),
            training=Training(counts={"cases": 60}, seeds={"all": 1}, fingerprint="f"),
            mask_sources=("phantom",),
            metrics={},
            model_card="# fitted\n",
            classifiers={"fusion": self.onnx},
        )


def _linear(names: tuple[str, ...], values: np.ndarray, **more: object) -> LinearModel:
    mean, deviation = standardisation(values)
    return LinearModel.model_validate(
        {
            "inputs": names,
            "mean": tuple(map(float, mean)),
            "sd": tuple(map(float, deviation)),
            "coef": tuple(0.3 for _ in names),
            "intercept": 0.1,
            **more,
        }
    )


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_service_gives_the_calibrated_probability_of_the_library(kind: ClassifierName, tmp_path: Path) -> None:
    cohort = _Cohort(kind)
    bundle = write_bundle(tmp_path / "bundle", cohort.fitted())

    def scored(row: int) -> Classification:
        hcr = FeatureVector(
            kind="hcr", names=HCR_NAMES, values=cohort.hcr[row], protocol_hash=bundle.protocols.hcr_hash
        )
        dtl = FeatureVector(
            kind="dtl", names=cohort.pca.inputs, values=cohort.dtl[row], protocol_hash=bundle.protocols.dtl_hash
        )
        return score(bundle, hcr=hcr, dtl=dtl, age=70, sex="F")

    found = [scored(row) for row in range(60)]

    expected = [cohort.platt.probability(float(one)) for one in cohort.classifier.score(cohort.z)]
    np.testing.assert_allclose([one.probability for one in found], expected, atol=1e-6, rtol=0)
    assert {(one.classifier, one.score_kind) for one in found} == {(kind, "lasso")}
    assert all(one.prediction_set is not None for one in found)


def test_the_same_fit_gives_the_same_bundle(tmp_path: Path) -> None:
    one = write_bundle(tmp_path / "one", _Cohort("extra-trees").fitted())
    other = write_bundle(tmp_path / "other", _Cohort("extra-trees").fitted())

    assert one.manifest.schema_version == 2
    assert one.bundle_id == other.bundle_id
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_the_range_of_the_networks_logit_is_kept_for_the_guard(tmp_path: Path) -> None:
    cohort = _Cohort("svm")

    ranges = write_bundle(tmp_path / "bundle", cohort.fitted()).distribution.features

    assert set(ranges) == {*HCR_NAMES[:3], LOGIT}
    assert ranges[LOGIT].low == pytest.approx(cohort.logit.min())
    assert ranges[LOGIT].high == pytest.approx(cohort.logit.max())


def test_a_bundle_that_does_not_load_leaves_the_old_one_in_its_place(tmp_path: Path) -> None:
    cohort = _Cohort("svm")
    old = write_bundle(tmp_path / "bundle", cohort.fitted())
    broken = FittedBundle(**{**vars(cohort.fitted()), "classifiers": {"fusion": _Cohort("svm", seed=6).onnx}})

    with pytest.raises(BundleError, match="golden vector 1 gives a fusion probability"):
        write_bundle(tmp_path / "bundle", broken)

    assert load_bundle(tmp_path / "bundle").bundle_id == old.bundle_id


def test_a_classifier_that_is_named_and_not_given_is_refused(tmp_path: Path) -> None:
    without = FittedBundle(**{**vars(_Cohort("svm").fitted()), "classifiers": {}})

    with pytest.raises(BundleError, match=r"names the classifier classifier-fusion\.onnx"):
        write_bundle(tmp_path / "bundle", without)
