"""A bundle of schema 2: its classifiers are listed, standard, of the right shape, and give the golden probabilities."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from shared.fracture import bundle as bundle_module
from shared.fracture.bundle import (
    Bundle,
    Conformal,
    Golden,
    Models,
    Pca,
    Platt,
    Thresholds,
    evaluate,
    load_bundle,
    manifest_bytes,
    manifest_digest,
    model_bytes,
)
from shared.fracture.bundle_files import BundleError
from shared.fracture.classifiers import ClassifierUnusable
from shared.fracture.scoring import INDETERMINATE_FLAG, Classification, score
from tests.fixtures.small_bundle import (
    CLASSIFIERS,
    classifier_models,
    reseal,
    small_models,
    small_vectors,
    stump,
    write_classifier_bundle,
    write_small_bundle,
)

SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "bundles" / "demo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_classifier_bundle(tmp_path / "bundle")


def _score(bundle: Bundle, *, mean: float = 1.5) -> Classification:
    hcr, dtl = small_vectors(bundle, mean=mean)
    return score(bundle, hcr=hcr, dtl=dtl, age=60, sex="M")


def test_the_probability_is_the_classifiers_and_the_score_stays_linear(folder: Path) -> None:
    result = _score(load_bundle(folder, run_classifiers=True), mean=1.5)

    # the first input of fusion has z 0.25, so that its stump gives 0.75; hcr has z (0.25, 0.25)
    assert result.probability == pytest.approx(1 / (1 + math.exp(-(4 * 0.75 - 2))), abs=1e-7)
    assert result.hcr_probability == pytest.approx(1 / (1 + math.exp(-(2 * (0.25 + 0.25 - 0.125) - 0.5))), abs=1e-7)
    assert result.dtl_probability == pytest.approx(1 / (1 + math.exp(-result.dtl_score)))
    # pca_001 = 0 + its offset of 0.25
    assert result.score == pytest.approx(0.5 + 0.25 + 0.25 - 2 * 0.25)
    assert result.nomogram is not None
    assert result.nomogram.probability == pytest.approx(1 / (1 + math.exp(-(1 - 3 + 0.2 + 1.5 * result.score))))
    assert (result.classifier, result.score_kind) == ("random-forest", "lasso")


def test_without_its_classifiers_running_a_bundle_loads_and_does_not_answer(folder: Path) -> None:
    bundle = load_bundle(folder)

    assert not bundle.classifiers
    with pytest.raises(RuntimeError, match="the hcr model's classifier is not running"):
        _score(bundle)
    assert _score(bundle.running()) == _score(load_bundle(folder, run_classifiers=True))


def test_a_bundle_without_classifiers_is_running_as_it_is(tmp_path: Path) -> None:
    bundle = load_bundle(write_small_bundle(tmp_path / "bundle"), run_classifiers=True)

    assert bundle.running() is bundle
    assert _score(bundle).probability == _score(load_bundle(bundle.folder)).probability


def test_the_shipped_demonstration_bundle_loads_and_runs() -> None:
    bundle = load_bundle(SHIPPED, run_classifiers=True)

    assert bundle.manifest.schema_version in (1, 2)
    assert bundle.bundle_id == manifest_digest(bundle.manifest)


def test_a_bundle_of_schema_1_still_loads(tmp_path: Path) -> None:
    folder = _as_schema_1(write_small_bundle(tmp_path / "bundle"), golden_scores=False)

    bundle = load_bundle(folder, run_classifiers=True)

    assert bundle.manifest.schema_version == 1
    assert bundle.golden.vectors[0].fusion_score is None
    assert _score(bundle).prediction_set is None


def test_what_schema_2_brought_is_refused_in_a_bundle_of_schema_1(folder: Path, tmp_path: Path) -> None:
    kinds: list[Models] = [
        small_models().model_copy(update={"conformal": Conformal(alpha=0.1, chronic=0.5, acute=0.5)}),
        small_models().model_copy(
            update={"thresholds": Thresholds(hcr=0.5, dtl=0.5, fusion=0.5, nomogram=0.5)},
        ),
        small_models().model_copy(
            update={"fusion": small_models().fusion.model_copy(update={"score_kind": "lasso"})},
        ),
        small_models().model_copy(update={"pca": small_models().pca.model_copy(update={"offset": (0.0, 0.0)})}),
    ]
    folders = [write_small_bundle(tmp_path / str(number), models=models) for number, models in enumerate(kinds)]

    for one in (folder, *folders):
        assert load_bundle(one).manifest.schema_version == 2
        with pytest.raises(BundleError, match="came with bundle schema 2, the manifest says 1"):
            load_bundle(_as_schema_1(one))


def _as_schema_1(folder: Path, *, golden_scores: bool = True) -> Path:
    """The folder with a manifest of schema 1 that fits it."""
    if not golden_scores:
        golden = load_bundle(folder).golden
        vectors = tuple(
            one.model_copy(update={"hcr_score": None, "dtl_score": None, "fusion_score": None})
            for one in golden.vectors
        )
        (folder / "golden.json").write_bytes(model_bytes(Golden(vectors=vectors, image=golden.image)))
        reseal(folder)
    manifest = bundle_module.Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    old = manifest.model_copy(update={"schema_version": 1})
    sealed = old.model_copy(update={"bundle_id": manifest_digest(old)})
    (folder / "manifest.json").write_bytes(manifest_bytes(sealed))
    return folder


def test_golden_scores_are_demanded_by_schema_2(tmp_path: Path) -> None:
    folder = write_small_bundle(tmp_path / "bundle")
    golden = load_bundle(folder).golden
    without = tuple(one.model_copy(update={"dtl_score": None}) for one in golden.vectors)
    (folder / "golden.json").write_bytes(model_bytes(Golden(vectors=without, image=golden.image)))
    reseal(folder)

    with pytest.raises(BundleError, match="golden vector 1 lacks the scores"):
        load_bundle(folder)


def test_a_golden_score_that_does_not_come_out_is_refused_without_running_anything(folder: Path) -> None:
    golden = load_bundle(folder).golden
    score_of = golden.vectors[0].fusion_score
    assert score_of is not None
    wrong = (golden.vectors[0].model_copy(update={"fusion_score": score_of + 1e-6}),)
    (folder / "golden.json").write_bytes(model_bytes(Golden(vectors=wrong, image=golden.image)))
    reseal(folder)

    with pytest.raises(BundleError, match="golden vector 1 gives a fusion score of"):
        load_bundle(folder)


def test_a_classifier_that_answers_otherwise_is_refused_when_it_runs(folder: Path) -> None:
    (folder / "classifier-fusion.onnx").write_bytes(stump(width=3, feature=0, left=0.125, right=0.7501))
    reseal(folder)

    bundle = load_bundle(folder)

    with pytest.raises(BundleError, match="golden vector 1 gives a fusion probability of"):
        bundle.running()
    with pytest.raises(BundleError, match="golden vector 1 gives a fusion probability of"):
        load_bundle(folder, run_classifiers=True)


def test_a_classifier_that_the_manifest_does_not_list_is_named(folder: Path) -> None:
    (folder / "classifier-hcr.onnx").unlink()
    reseal(folder)

    with pytest.raises(BundleError, match=r"names the classifier classifier-hcr\.onnx, which the manifest does not"):
        load_bundle(folder)


def test_a_network_file_that_no_model_uses_is_named(folder: Path) -> None:
    (folder / "classifier-dtl.onnx").write_bytes(CLASSIFIERS["hcr"])
    reseal(folder)

    with pytest.raises(BundleError, match=r"no model of the bundle uses classifier-dtl\.onnx"):
        load_bundle(folder)


def _changed(change: Callable[[onnx.ModelProto], object]) -> bytes:
    model = onnx.load_model_from_string(CLASSIFIERS["hcr"])
    change(model)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (stump(width=3, feature=0, left=0.0, right=1.0), r"must take z \(n, 2\)"),
        (_changed(lambda m: setattr(m.graph.input[0], "name", "x")), r"must take z \(n, 2\)"),
        (_changed(lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 11)), "give score"),
        (_changed(lambda m: m.graph.output.append(m.graph.output[0])), "give score"),
        (_changed(lambda m: setattr(m.graph.node[0], "domain", "com.microsoft")), r"operators \(com\.microsoft\)"),
        (_changed(lambda m: m.opset_import.append(helper.make_opsetid("ai.example", 1))), r"\(ai\.example\)"),
        (b"\x80\x04pickle", "not an ONNX model"),
    ],
)
def test_a_classifier_of_another_shape_or_with_foreign_operators_is_refused(
    folder: Path, data: bytes, says: str
) -> None:
    (folder / "classifier-hcr.onnx").write_bytes(data)
    reseal(folder)

    with pytest.raises(BundleError, match=rf"classifier-hcr\.onnx .*{says}"):
        load_bundle(folder)


def test_two_thresholds_of_fusion_that_differ_are_refused(tmp_path: Path) -> None:
    thresholds = Thresholds(hcr=0.4, dtl=0.5, fusion=0.55, nomogram=0.6)

    with pytest.raises(BundleError, match="different thresholds of the fusion model"):
        load_bundle(write_classifier_bundle(tmp_path / "bundle", thresholds=thresholds))


def test_two_models_with_one_classifier_file_are_refused() -> None:
    models = classifier_models()
    assert models.hcr.classifier is not None
    shared = models.fusion.model_copy(update={"classifier": models.hcr.classifier})

    with pytest.raises(ValueError, match="a file of its own"):
        Models(pca=models.pca, hcr=models.hcr, dtl=models.dtl, fusion=shared)


def test_a_lassos_score_alone_gives_no_probability() -> None:
    raw = small_models().hcr.model_dump() | {"score_kind": "lasso"}

    with pytest.raises(ValueError, match="no log odds"):
        type(small_models().hcr).model_validate(raw)


def test_an_offset_is_added_to_each_component() -> None:
    logit = Pca(
        inputs=("dtl_0000", "dtl_0001"),
        mean=(0.0, 0.0),
        sd=(1.0, 1.0),
        names=("dtl_logit",),
        components=((2.0, -1.0),),
        offset=(0.5,),
    )

    assert logit.apply(np.array([1.0, 3.0])) == {"dtl_logit": 2.0 - 3.0 + 0.5}
    with pytest.raises(ValueError, match="2 offsets do not fit 1 components"):
        Pca.model_validate(logit.model_dump() | {"offset": (0.5, 0.5)})


def test_a_case_that_the_limits_do_not_decide_is_indeterminate(tmp_path: Path) -> None:
    def scored(conformal: Conformal | None) -> Classification:
        name = "none" if conformal is None else f"{conformal.chronic}-{conformal.acute}"
        return _score(load_bundle(write_classifier_bundle(tmp_path / name, conformal=conformal), run_classifiers=True))

    # the fusion probability is 0.731
    one, both, neither, absent = (
        scored(Conformal(alpha=0.1, chronic=0.4, acute=0.6)),
        scored(Conformal(alpha=0.1, chronic=0.8, acute=0.6)),
        scored(Conformal(alpha=0.1, chronic=0.2, acute=0.2)),
        scored(None),
    )

    assert (one.prediction_set, one.indeterminate) == (("acute",), False)
    assert (both.prediction_set, both.indeterminate) == (("chronic", "acute"), True)
    assert (neither.prediction_set, neither.indeterminate) == ((), True)
    assert (absent.prediction_set, absent.indeterminate) == (None, False)
    assert [INDETERMINATE_FLAG in result.flags for result in (one, both, neither, absent)] == [
        False,
        True,
        True,
        False,
    ]


def test_a_classification_with_its_set_survives_its_json(folder: Path) -> None:
    result = _score(load_bundle(folder, run_classifiers=True))

    assert Classification.model_validate_json(result.model_dump_json(exclude_defaults=True)) == result


def test_the_same_case_gives_the_same_bits(folder: Path) -> None:
    bundle = load_bundle(folder, run_classifiers=True)

    assert _score(bundle).model_dump_json() == _score(load_bundle(folder).running()).model_dump_json()


def test_evaluate_says_which_classifier_is_missing() -> None:
    models = classifier_models()

    with pytest.raises(RuntimeError, match="the fusion model's classifier is not running"):
        evaluate(
            models,
            hcr=dict.fromkeys(models.selected, 1.0),
            dtl=np.zeros(len(models.pca.inputs)),
            classifiers={"hcr": lambda z: 0.0},
        )


def test_without_onnxruntime_a_bundle_loads_and_says_what_it_needs_to_run(folder: Path) -> None:
    program = """
import sys
sys.modules["onnxruntime"] = None
from pathlib import Path
from shared.fracture.bundle import load_bundle
from shared.fracture.bundle_files import BundleError
bundle = load_bundle(Path(sys.argv[1]))
try:
    bundle.running()
except BundleError as error:
    print(error)
"""

    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-500:]
    assert "classifier-hcr.onnx: it needs onnxruntime, which is not installed" in done.stdout


def test_a_classifier_that_onnxruntime_cannot_load_is_refused(folder: Path) -> None:
    broken = _changed(lambda m: setattr(m.graph.node[0], "op_type", "NoSuchOperator"))
    (folder / "classifier-hcr.onnx").write_bytes(broken)
    reseal(folder)

    with pytest.raises(BundleError, match=r"classifier-hcr\.onnx: onnxruntime cannot load it") as refused:
        load_bundle(folder, run_classifiers=True)
    assert isinstance(refused.value.__cause__, ClassifierUnusable)


def test_a_calibration_is_a_sigmoid_of_the_score() -> None:
    assert Platt(a=2.0, b=-1.0).probability(0.5) == 0.5
