"""Seven classifiers: chosen on training patients alone, and the same numbers from onnxruntime as from their library."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.neighbors import KNeighborsClassifier

from services.trainer.classifier_graphs import LEAF, Tree, ensemble_graph, not_above
from services.trainer.classifiers import (
    GRIDS,
    Fitted,
    Neighbours,
    fit_platt,
    fitted,
    onnx_difference,
    search,
    to_onnx,
)
from services.trainer.results import GridPoint
from services.trainer.settings import CLASSIFIERS, ClassifierName, ClassifierSettings
from shared.fracture.bundle import Platt
from shared.fracture.classifiers import ClassifierUnusable, OnnxScore, rounded
from shared.pipeline.errors import FractureSweepError

STEEP = Platt(a=4.0, b=0.0)
"""As steep as a calibration may be: differences of scores become differences of probabilities one to one."""
PARITY = 1e-6


def _point(name: ClassifierName, place: int = 0) -> GridPoint:
    parameters = GRIDS["small"][name][place]
    return GridPoint(classifier=name, parameters=parameters, auc_mean=0.5, auc_sd=0.0)


def _rows(
    seed: int, *, count: int = 80, width: int = 6, steps: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, classes, and patients of two rows each; with `steps` few different values, so that many are equal."""
    rng = np.random.default_rng(seed)
    acute = np.repeat(rng.permutation(np.arange(count // 2) % 2), 2).astype(np.int64)
    z = rng.normal(size=(count, width))
    z[:, 0] += 1.5 * acute
    if steps is not None:
        z = np.round(z * steps) / steps
    return z, acute, np.arange(count, dtype=np.int64) // 2


def _at_and_beside(values: np.ndarray) -> np.ndarray:
    """Each row's values, the float32 values above and below them, and float64 values close beside."""
    nearest = values.astype(np.float32)
    up = np.nextafter(nearest, np.float32(np.inf)).astype(np.float64)
    down = np.nextafter(nearest, np.float32(-np.inf)).astype(np.float64)
    return np.vstack([values, nearest.astype(np.float64), up, down, values + 1e-9, values - 1e-9])


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("steps", [None, 3])
def test_onnxruntime_gives_the_librarys_calibrated_probability(
    name: ClassifierName, place: int, steps: int | None
) -> None:
    z, acute, _ = _rows(3, steps=steps)
    classifier = fitted(_point(name, place), z, acute, 11)
    asked = np.vstack([_at_and_beside(z), np.random.default_rng(4).normal(size=(50, 6)) * 3])

    difference = onnx_difference(classifier, to_onnx(classifier, 6), asked, STEEP)

    assert difference <= PARITY


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_kind_of_point_of_the_full_grid_comes_out_the_same(name: ClassifierName) -> None:
    z, acute, _ = _rows(5, count=60)
    points = GRIDS["full"][name]
    asked = np.random.default_rng(6).normal(size=(20, 6))

    for parameters in (points[0], points[len(points) // 2], points[-1]):
        point = GridPoint(classifier=name, parameters=parameters, auc_mean=0.5, auc_sd=0.0)
        classifier = fitted(point, z, acute, 1)

        assert onnx_difference(classifier, to_onnx(classifier, 6), asked, STEEP) <= PARITY


def _thresholds(onnx_bytes: bytes) -> list[tuple[int, float]]:
    """(feature, threshold) of every split of an ensemble."""
    node = next(
        node for node in onnx.load_model_from_string(onnx_bytes).graph.node if node.op_type == "TreeEnsembleRegressor"
    )
    held = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return [
        (feature, value)
        for feature, value, mode in zip(
            held["nodes_featureids"], held["nodes_values"], held["nodes_modes"], strict=True
        )
        if mode != b"LEAF"
    ]


@pytest.mark.parametrize("name", ["decision-tree", "random-forest", "extra-trees", "xgboost", "lightgbm"])
def test_a_value_at_or_beside_a_threshold_falls_on_the_librarys_side(name: ClassifierName) -> None:
    z, acute, _ = _rows(7)
    classifier = fitted(_point(name), z, acute, 2)
    data = to_onnx(classifier, 6)
    rows = []
    for number, (feature, threshold) in enumerate(_thresholds(data)[:100]):
        row = z[number % len(z)].copy()
        row[feature] = threshold
        rows.append(row)

    difference = onnx_difference(classifier, data, _at_and_beside(np.array(rows)), STEEP)

    assert len(rows) >= 3
    assert difference <= PARITY


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6, width=32))
def test_a_rounded_threshold_splits_float32_values_as_the_threshold_does(threshold: float, value: float) -> None:
    rounded_threshold = not_above(np.array([threshold]))[0]

    assert (value <= threshold) == (np.float32(value) <= rounded_threshold)


@given(st.floats(-1e3, 1e3))
def test_the_float32_neighbours_of_a_threshold_stay_on_their_sides(threshold: float) -> None:
    nearest = np.float32(threshold)
    rounded_threshold = not_above(np.array([threshold]))[0]

    for value in (nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))):
        assert (float(value) <= threshold) == bool(value <= rounded_threshold)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(CLASSIFIERS), st.integers(0, 10_000), st.sampled_from([None, 1, 4]))
def test_any_rows_score_the_same_in_onnx(name: ClassifierName, seed: int, steps: int | None) -> None:
    z, acute, _ = _rows(seed, count=40, width=3, steps=steps)
    classifier = fitted(_point(name), z, acute, seed)
    asked = np.vstack([z, np.random.default_rng([seed, 1]).normal(size=(10, 3)) * 100])

    assert onnx_difference(classifier, to_onnx(classifier, 3), asked, STEEP) <= PARITY


def test_the_trees_of_an_ensemble_add_up_whatever_their_order() -> None:
    rng = np.random.default_rng(0)

    def stump(value: float) -> Tree:
        return Tree(
            feature=np.array([0, LEAF, LEAF]),
            threshold=np.array([0.0, 0.0, 0.0], dtype=np.float32),
            left=np.array([1, -1, -1]),
            right=np.array([2, -1, -1]),
            value=np.array([0.0, value, -value]),
        )

    trees = [stump(float(value)) for value in rng.normal(size=50) * 10.0 ** rng.integers(-6, 3, size=50)]

    one = OnnxScore(ensemble_graph(trees, width=2), width=2).score(np.array([-1.0, 0.0]))
    other = OnnxScore(ensemble_graph(trees[::-1], width=2), width=2).score(np.array([-1.0, 0.0]))

    assert one == other
    assert one == pytest.approx(sum(float(np.float32(tree.value[1])) for tree in trees), rel=1e-6)


def test_an_ensemble_that_never_split_gives_its_constant() -> None:
    leaf = Tree(
        feature=np.array([LEAF]),
        threshold=np.zeros(1, dtype=np.float32),
        left=np.array([-1]),
        right=np.array([-1]),
        value=np.array([0.25]),
    )

    score = OnnxScore(ensemble_graph([leaf, leaf], width=3, base=1.0), width=3)

    assert score.score(np.array([5.0, -5.0, 1e30])) == 1.5


@pytest.mark.parametrize("name", ["lightgbm", "decision-tree"])
def test_a_classifier_of_too_few_rows_to_split_is_a_constant_in_onnx_too(name: ClassifierName) -> None:
    z, acute, _ = _rows(8, count=8)
    classifier = fitted(_point(name), z, acute, 1)

    assert onnx_difference(classifier, to_onnx(classifier, 6), z, STEEP) <= PARITY


@pytest.mark.parametrize("distance", ["euclidean", "manhattan"])
def test_without_equal_distances_neighbours_are_scikit_learns(distance: str) -> None:
    z, acute, _ = _rows(9)
    asked = np.random.default_rng(10).normal(size=(40, 6)).astype(np.float32).astype(np.float64)
    z = z.astype(np.float32).astype(np.float64)
    library = KNeighborsClassifier(n_neighbors=7, metric=distance, algorithm="brute").fit(z, acute)

    own = Neighbours.of(z.astype(np.float32), acute, {"neighbours": 7, "distance": distance}, 0).score(asked)

    np.testing.assert_allclose(own, library.predict_proba(asked)[:, 1], atol=1e-12)


def test_rows_that_are_equally_far_share_the_places_that_are_left() -> None:
    rows = np.array([[0.0], [1.0], [1.0], [1.0], [9.0]], dtype=np.float32)
    acute = np.array([1, 1, 0, 0, 1], dtype=np.int64)

    neighbours = Neighbours.of(rows, acute, {"neighbours": 2, "distance": "euclidean"}, 0)
    turned = Neighbours.of(rows[::-1].copy(), acute[::-1].copy(), {"neighbours": 2, "distance": "euclidean"}, 0)

    # the row at 0, and one place for the three at 1, of which one is acute
    expected = (1 + 1 / 3) / 2
    assert neighbours.score(np.array([[0.0]])) == pytest.approx([expected])
    assert turned.score(np.array([[0.0]])) == pytest.approx([expected])
    assert OnnxScore(to_onnx(neighbours, 1), width=1).score(np.array([0.0])) == pytest.approx(expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_same_seed_gives_the_same_bytes(name: ClassifierName) -> None:
    z, acute, _ = _rows(12)

    def made() -> bytes:
        return to_onnx(fitted(_point(name), z, acute, 5), 6)

    assert made() == made()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_graph_has_one_input_one_output_and_standard_operators(name: ClassifierName) -> None:
    z, acute, _ = _rows(13)

    model = onnx.load_model_from_string(to_onnx(fitted(_point(name), z, acute, 5), 6))

    assert [one.name for one in model.graph.input] == ["z"]
    assert [one.name for one in model.graph.output] == ["score"]
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx.ml"}
    assert {entry.domain for entry in model.opset_import} == {"", "ai.onnx.ml"}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_score_does_not_depend_on_what_is_scored_beside_it(name: ClassifierName) -> None:
    z, acute, _ = _rows(14)
    score = OnnxScore(to_onnx(fitted(_point(name), z, acute, 5), 6), width=6)

    together = score.scores(z[:10])

    assert together.tolist() == [score.score(row) for row in z[:10]]
    assert len(set(together.tolist())) > 1


def test_the_search_covers_the_grids_and_takes_the_largest_mean() -> None:
    z, acute, patient = _rows(15)
    told: list[tuple[int, int]] = []

    points, winner = search(
        z, acute, patient, ClassifierSettings(grid="small"), 1, lambda done, of: told.append((done, of))
    )

    assert {point.classifier for point in points} == set(CLASSIFIERS)
    assert winner.auc_mean == max(point.auc_mean for point in points) > 0.7
    assert told == [(number, len(points)) for number in range(1, len(points) + 1)]


def test_of_equal_points_the_simpler_classifier_wins() -> None:
    z, acute, patient = _rows(16)
    z[:, 0] = 20.0 * acute + z[:, 0] / 100

    points, winner = search(z, acute, patient, ClassifierSettings(grid="small"), 1)

    assert sum(point.auc_mean == 1.0 for point in points) > 2
    assert winner.classifier == next(p.classifier for p in points if p.auc_mean == 1.0) == "svm"


def test_only_the_classifiers_that_were_asked_for_are_searched() -> None:
    z, acute, patient = _rows(17)
    asked = ClassifierSettings(grid="small", names=("decision-tree", "knn"))

    points, _ = search(z, acute, patient, asked, 1)

    assert [point.classifier for point in points] == ["knn", "knn", "decision-tree", "decision-tree"]


def test_the_search_is_the_same_again() -> None:
    z, acute, patient = _rows(18, count=60)

    assert search(z, acute, patient, ClassifierSettings(grid="small"), 3) == search(
        z, acute, patient, ClassifierSettings(grid="small"), 3
    )


def test_no_grid_is_larger_than_it_may_be() -> None:
    assert all(1 <= len(points) <= 24 for points in GRIDS["full"].values())
    assert all(1 <= len(points) <= 2 for points in GRIDS["small"].values())


def test_too_few_patients_for_the_folds_are_counted() -> None:
    z, acute, patient = _rows(19, count=16)

    with pytest.raises(FractureSweepError, match=r"at least 5 training patients with an acute.*there are 4 and 4"):
        search(z, acute, patient, ClassifierSettings(grid="small"), 1)


def test_neighbours_that_a_fold_does_not_have_are_left_out() -> None:
    z, acute, patient = _rows(20, count=24)

    points, _ = search(z, acute, patient, ClassifierSettings(names=("knn",)), 1)

    assert {point.parameters["neighbours"] for point in points} == {3, 5, 7, 9, 11, 15}


def test_the_calibration_is_the_maximum_of_the_likelihood_on_smoothed_targets() -> None:
    rng = np.random.default_rng(21)
    scores = rng.normal(size=60) * 3 + 5
    labels = (rng.random(60) < 1 / (1 + np.exp(5 - scores))).astype(np.int64)
    positive, negative = labels.sum(), (1 - labels).sum()
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(beta: np.ndarray) -> float:
        linear = beta[0] * scores + beta[1]
        return float((np.logaddexp(0, linear) - target * linear).sum())

    found = fit_platt(scores, labels)

    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000})
    np.testing.assert_allclose([found.a, found.b], best.x, rtol=1e-5)
    assert np.mean([found.probability(float(score)) for score in scores]) == pytest.approx(target.mean())


def test_a_calibration_of_separable_scores_stays_finite() -> None:
    scores = np.concatenate([np.full(20, -1.0), np.full(30, 1.0)])

    found = fit_platt(scores, (scores > 0).astype(np.int64))

    assert found.probability(1.0) == pytest.approx(31 / 32, abs=1e-6)
    assert found.probability(-1.0) == pytest.approx(1 / 22, abs=1e-6)


def test_a_calibration_of_equal_scores_gives_the_share_of_the_class() -> None:
    found = fit_platt(np.full(10, 0.3), np.array([1] * 7 + [0] * 3))

    assert found.a == 0.0
    assert found.probability(0.3) == pytest.approx(8 / 12)


def test_a_calibration_of_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="both classes"):
        fit_platt(np.arange(5.0), np.ones(5, dtype=np.int64))


def test_values_beyond_float32_are_its_largest_and_no_number_is_refused() -> None:
    assert rounded(np.array([1e300, -1e300])).tolist() == [np.finfo(np.float32).max, np.finfo(np.float32).min]

    with pytest.raises(ValueError, match="not a number"):
        rounded(np.array([np.nan]))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_value_far_outside_training_has_a_finite_score(name: ClassifierName) -> None:
    z, acute, _ = _rows(22)

    score = OnnxScore(to_onnx(fitted(_point(name), z, acute, 5), 6), width=6)

    assert np.isfinite(score.score(np.array([1e30, -1e30, 0.0, 1e300, 0.0, 0.0])))


def test_a_classifier_of_another_width_is_refused() -> None:
    z, acute, _ = _rows(23)
    classifier: Fitted = fitted(_point("svm"), z, acute, 1)

    with pytest.raises(ValueError, match="reads 6 inputs, not 7"):
        to_onnx(classifier, 7)
    with pytest.raises(ValueError, match="takes 6 inputs"):
        OnnxScore(to_onnx(classifier, 6), width=6).score(np.zeros(7))


def test_bytes_that_are_no_classifier_are_refused() -> None:
    with pytest.raises(ClassifierUnusable, match="cannot load it"):
        OnnxScore(b"nothing", width=1)
