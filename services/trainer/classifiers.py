"""Seven classifiers, which of them is taken, its calibration, and its form as ONNX (METHOD 5).

Chosen by cross-validation over training patients alone. Everything is fitted and asked on z rounded to float32, as a
service will round it, so that no value can lie on one side of a tree's threshold here and on the other there. Seeds are
given and each library has one thread: the same rows give the same classifier, to the bit, on one machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier

from services.trainer.classifier_graphs import (
    LEAF,
    Distance,
    Kernel,
    Tree,
    ensemble_graph,
    kernel_graph,
    neighbours_graph,
    not_above,
)
from services.trainer.folds import Folds, patients_by_class, stratified_folds
from services.trainer.results import GridPoint
from services.trainer.settings import CLASSIFIERS, ClassifierName, ClassifierSettings
from shared.fracture.bundle import Platt
from shared.fracture.classifiers import OnnxScore, rounded
from shared.pipeline.errors import FractureSweepError

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]
Parameters = Mapping[str, Any]

FOREST_TREES: Final = 200
_SMALL_TREES: Final = 20
_PLATT_STEPS: Final = 200


class Fitted(Protocol):
    """A classifier that was fitted on z (n, width)."""

    @property
    def width(self) -> int:
        """How many inputs it reads."""

    def score(self, z: Matrix) -> Matrix:
        """Scores (n,) of z (n, width), larger towards acute: a decision value, a margin, or P(acute)."""

    def graph(self) -> bytes:
        """It as ONNX."""


def _grid(**choices: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(choices, values, strict=True)) for values in product(*choices.values()))


_FOREST: Final = _grid(
    trees=(FOREST_TREES,), max_depth=(3, 6, None), min_samples_leaf=(1, 5), max_features=("sqrt", 0.3)
)
_SMALL_FOREST: Final = _grid(trees=(_SMALL_TREES,), max_depth=(3,), min_samples_leaf=(1, 5), max_features=("sqrt",))
GRIDS: Final[dict[Literal["full", "small"], dict[ClassifierName, tuple[dict[str, Any], ...]]]] = {
    "full": {
        "svm": (
            *_grid(kernel=("linear",), C=(0.001, 0.01, 0.1, 1.0)),
            *_grid(kernel=("rbf",), C=(0.1, 1.0, 10.0, 100.0), gamma_factor=(0.1, 0.3, 1.0, 3.0)),
        ),
        "knn": _grid(neighbours=(3, 5, 7, 9, 11, 15, 21, 31), distance=("euclidean", "manhattan")),
        "decision-tree": _grid(max_depth=(2, 3, 4, 6), min_samples_leaf=(5, 10, 20), criterion=("gini", "entropy")),
        "random-forest": _FOREST,
        "extra-trees": _FOREST,
        "xgboost": _grid(trees=(50, 150), learning_rate=(0.05, 0.1), max_depth=(2, 3), reg_lambda=(1.0, 10.0)),
        "lightgbm": _grid(trees=(50, 150), learning_rate=(0.05, 0.1), num_leaves=(4, 8), min_data_in_leaf=(10, 20)),
    },
    "small": {
        "svm": _grid(kernel=("linear", "rbf"), C=(0.1,), gamma_factor=(1.0,)),
        "knn": _grid(neighbours=(5, 9), distance=("euclidean",)),
        "decision-tree": _grid(max_depth=(2, 3), min_samples_leaf=(5,), criterion=("gini",)),
        "random-forest": _SMALL_FOREST,
        "extra-trees": _SMALL_FOREST,
        "xgboost": _grid(trees=(_SMALL_TREES,), learning_rate=(0.1,), max_depth=(2,), reg_lambda=(1.0,)),
        "lightgbm": _grid(trees=(_SMALL_TREES,), learning_rate=(0.1,), num_leaves=(4,), min_data_in_leaf=(5,)),
    },
}
"""Points of each grid, at most 24, in "small" at most 2. `gamma_factor`: an RBF's gamma times the number of inputs."""


@dataclass(frozen=True, kw_only=True)
class _Svm:
    model: Any
    kernel: Kernel
    gamma: float
    width: int

    @classmethod
    def of(cls, z: NDArray[np.float32], acute: Labels, parameters: Parameters, seed: int) -> _Svm:
        gamma = float(parameters.get("gamma_factor", 1.0)) / z.shape[1]
        kernel: Kernel = parameters["kernel"]
        model = SVC(C=parameters["C"], kernel=kernel, gamma=gamma)
        return cls(model=model.fit(z.astype(np.float64), acute), kernel=kernel, gamma=gamma, width=z.shape[1])

    def score(self, z: Matrix) -> Matrix:
        return np.asarray(self.model.decision_function(rounded(z).astype(np.float64)), dtype=np.float64)

    def graph(self) -> bytes:
        return kernel_graph(
            kernel=self.kernel,
            gamma=self.gamma,
            support=np.asarray(self.model.support_vectors_, dtype=np.float64),
            weight=np.asarray(self.model.dual_coef_[0], dtype=np.float64),
            intercept=float(self.model.intercept_[0]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """The acute share of the k nearest training rows, as scikit-learn's KNeighborsClassifier gives it.

    Rows that are equally far as the k-th share the places that are left, where scikit-learn takes some of them: so the
    order of the training rows cannot change a score.
    """

    rows: Matrix
    acute: Labels
    neighbours: int
    distance: Distance

    @classmethod
    def of(cls, z: NDArray[np.float32], acute: Labels, parameters: Parameters, seed: int) -> Neighbours:
        """The training rows, kept."""
        if parameters["neighbours"] > len(z):
            raise ValueError(f"{parameters['neighbours']} neighbours cannot be found among {len(z)} rows")
        return cls(rows=z.astype(np.float64), acute=acute, **parameters)

    @property
    def width(self) -> int:
        """How many inputs it reads."""
        return int(self.rows.shape[1])

    def score(self, z: Matrix) -> Matrix:
        """Scores (n,) of z (n, width)."""
        return np.array([self._score(row) for row in rounded(z).astype(np.float64)])

    def _score(self, row: Matrix) -> float:
        difference = row - self.rows
        parts = difference * difference if self.distance == "euclidean" else np.abs(difference)
        distance = parts.sum(axis=1)
        reach = np.partition(distance, self.neighbours - 1)[self.neighbours - 1]
        nearer, last = distance < reach, distance == reach
        share = (self.neighbours - nearer.sum()) / last.sum()
        return float((self.acute[nearer].sum() + share * self.acute[last].sum()) / self.neighbours)

    def graph(self) -> bytes:
        """It as ONNX."""
        return neighbours_graph(rows=self.rows, acute=self.acute, neighbours=self.neighbours, distance=self.distance)


@dataclass(frozen=True, kw_only=True)
class _Forest:
    """Scikit-learn's trees; a score is P(acute), the mean over the trees."""

    model: Any
    width: int

    @classmethod
    def tree(cls, z: NDArray[np.float32], acute: Labels, parameters: Parameters, seed: int) -> _Forest:
        return cls(model=DecisionTreeClassifier(random_state=seed, **parameters).fit(z, acute), width=z.shape[1])

    @classmethod
    def random(cls, z: NDArray[np.float32], acute: Labels, parameters: Parameters, seed: int) -> _Forest:
        return cls._forest(RandomForestClassifier, z, acute, parameters, seed)

    @classmethod
    def extra(cls, z: NDArray[np.float32], acute: Labels, parameters: Parameters, seed: int) -> _Forest:
        return cls._forest(ExtraTreesClassifier, z, acute, parameters, seed)

    @classmethod
    def _forest(cls, kind: Any, z: NDArray[np.float32], acute: Labels, parameters: Parameters, seed: int) -> _Forest:
        others = {name: value for name, value in parameters.items() if name != "trees"}
        model = kind(n_estimators=parameters["trees"], random_state=seed, n_jobs=1, **others)
        return cls(model=model.fit(z, acute), width=z.shape[1])

    def score(self, z: Matrix) -> Matrix:
        return np.asarray(self.model.predict_proba(rounded(z))[:, 1], dtype=np.float64)

    def graph(self) -> bytes:
        trees = [_tree_of(one.tree_) for one in getattr(self.model, "estimators_", [self.model])]
        return ensemble_graph(trees, width=self.width, factor=1 / len(trees))


def _tree_of(fitted: Any) -> Tree:
    classes = np.asarray(fitted.value[:, 0, :], dtype=np.float64)
    leaf = fitted.children_left < 0
    return Tree(
        feature=np.where(leaf, LEAF, fitted.feature).astype(np.int64),
        threshold=not_above(np.asarray(fitted.threshold, dtype=np.float64)),
        left=np.asarray(fitted.children_left, dtype=np.int64),
        right=np.asarray(fitted.children_right, dtype=np.int64),
        value=classes[:, 1] / classes.sum(axis=1),
    )


@dataclass(frozen=True, kw_only=True)
class _XgBoost:
    """XGBoost's trees; a score is the margin (log odds)."""

    booster: Any
    width: int

    @classmethod
    def of(cls, z: NDArray[np.float32], acute: Labels, parameters: Parameters, seed: int) -> _XgBoost:
        import xgboost

        others = {name: value for name, value in parameters.items() if name != "trees"}
        booster = xgboost.train(
            {
                "objective": "binary:logistic",
                "base_score": 0.5,
                "tree_method": "hist",
                "subsample": 0.8,
                "colsample_bytree": 0.8,
                "seed": seed,
                "nthread": 1,
                "verbosity": 0,
                **others,
            },
            xgboost.DMatrix(z, label=acute, nthread=1),
            num_boost_round=parameters["trees"],
        )
        return cls(booster=booster, width=z.shape[1])

    def score(self, z: Matrix) -> Matrix:
        import xgboost

        margin = self.booster.predict(xgboost.DMatrix(rounded(z), nthread=1), output_margin=True)
        return np.asarray(margin, dtype=np.float64)

    def graph(self) -> bytes:
        learner = json.loads(bytes(self.booster.save_raw("json")))["learner"]
        trees = []
        for one in learner["gradient_booster"]["model"]["trees"]:
            left = np.array(one["left_children"], dtype=np.int64)
            # at a leaf its value stands where a threshold stands elsewhere
            conditions = np.array(one["split_conditions"], dtype=np.float32)
            trees.append(
                Tree(
                    feature=np.where(left < 0, LEAF, np.array(one["split_indices"], dtype=np.int64)),
                    threshold=conditions,
                    left=left,
                    right=np.array(one["right_children"], dtype=np.int64),
                    value=conditions.astype(np.float64),
                    strict=True,
                )
            )
        return ensemble_graph(trees, width=self.width)


@dataclass(frozen=True, kw_only=True)
class _LightGbm:
    """LightGBM's trees; a score is the margin (log odds)."""

    booster: Any
    width: int

    @classmethod
    def of(cls, z: NDArray[np.float32], acute: Labels, parameters: Parameters, seed: int) -> _LightGbm:
        import lightgbm

        others = {name: value for name, value in parameters.items() if name != "trees"}
        settings = {
            "objective": "binary",
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "feature_fraction": 0.8,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "use_missing": False,
            "verbosity": -1,
            **others,
        }
        booster = lightgbm.train(
            settings,
            lightgbm.Dataset(z.astype(np.float64), label=acute, params={"verbosity": -1, "num_threads": 1}),
            num_boost_round=parameters["trees"],
        )
        return cls(booster=booster, width=z.shape[1])

    def score(self, z: Matrix) -> Matrix:
        margin = self.booster.predict(rounded(z).astype(np.float64), raw_score=True, num_threads=1)
        return np.asarray(margin, dtype=np.float64)

    def graph(self) -> bytes:
        trees = [_tree_of_nodes(one["tree_structure"]) for one in self.booster.dump_model()["tree_info"]]
        return ensemble_graph(trees, width=self.width)


def _tree_of_nodes(root: Mapping[str, Any]) -> Tree:
    """LightGBM's nested nodes as arrays, the root first."""
    order = list(_nodes(root))
    if any(node.get("decision_type", "<=") != "<=" for node in order):
        raise ValueError("LightGBM splits by something else than <=")
    place = {id(node): number for number, node in enumerate(order)}

    def below(side: str) -> NDArray[np.int64]:
        return np.array([place[id(node[side])] if side in node else -1 for node in order], dtype=np.int64)

    return Tree(
        feature=np.array([node.get("split_feature", LEAF) for node in order], dtype=np.int64),
        threshold=not_above(np.array([node.get("threshold", 0.0) for node in order], dtype=np.float64)),
        left=below("left_child"),
        right=below("right_child"),
        value=np.array([node.get("leaf_value", 0.0) for node in order], dtype=np.float64),
    )


def _nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for side in ("left_child", "right_child"):
        if side in node:
            yield from _nodes(node[side])


_KINDS: Final[dict[ClassifierName, Callable[[NDArray[np.float32], Labels, Parameters, int], Fitted]]] = {
    "svm": _Svm.of,
    "knn": Neighbours.of,
    "decision-tree": _Forest.tree,
    "random-forest": _Forest.random,
    "extra-trees": _Forest.extra,
    "xgboost": _XgBoost.of,
    "lightgbm": _LightGbm.of,
}


def fitted(winner: GridPoint, z: Matrix, acute: Labels, seed: int) -> Fitted:
    """The classifier of a point of a grid, fitted on z (n, k) and acute (n,) of 0 and 1."""
    return _KINDS[winner.classifier](rounded(z), acute, winner.parameters, seed)


def search(
    z: Matrix,
    acute: Labels,
    patient: NDArray[np.int64],
    settings: ClassifierSettings,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[tuple[GridPoint, ...], GridPoint]:
    """Every point of the grids with its cross-validated AUC, and the one of the largest mean.

    z (n, k) standardised training rows, acute (n,) 0 or 1, patient (n,): no patient lies on both sides of a fold. Of
    equal points the first counts, that is, the simpler classifier (the order of CLASSIFIERS). FractureSweepError where
    there are too few patients.
    """
    folds = _folds(acute, patient, count=settings.folds, seed=seed)
    least = min(len(train) for train, _ in folds)
    asked = [
        (name, parameters)
        for name in CLASSIFIERS
        if name in settings.names
        for parameters in GRIDS[settings.grid][name]
        if parameters.get("neighbours", 0) <= least
    ]
    if not asked:
        raise FractureSweepError(
            f"the search among classifiers has no point that can be fitted on {least} rows: knn needs as many rows as "
            "it has neighbours"
        )
    points = []
    for number, (name, parameters) in enumerate(asked, start=1):
        areas = []
        for train, test in folds:
            classifier = _KINDS[name](rounded(z[train]), acute[train], parameters, seed)
            areas.append(float(roc_auc_score(acute[test], classifier.score(z[test]))))
        points.append(
            GridPoint(
                classifier=name, parameters=parameters, auc_mean=float(np.mean(areas)), auc_sd=float(np.std(areas))
            )
        )
        if progress is not None:
            progress(number, len(asked))
    return tuple(points), max(points, key=lambda point: round(point.auc_mean, 12))


def _folds(acute: Labels, patient: NDArray[np.int64], *, count: int, seed: int) -> Folds:
    """Folds of patients, those left out that lack a class on either side."""
    having = patients_by_class(patient, acute)
    if min(having) < count:
        raise FractureSweepError(
            f"the search among classifiers needs at least {count} training patients with an acute and {count} with a "
            f"chronic fracture for its {count} folds; there are {having[0]} and {having[1]}"
        )
    folds = [
        (train, test)
        for train, test in stratified_folds(patient, acute, count, seed=seed)
        if len(np.unique(acute[train])) == len(np.unique(acute[test])) == 2
    ]
    if not folds:
        raise FractureSweepError(
            "the search among classifiers finds no fold of patients with both classes on each side"
        )
    return folds


def fit_platt(scores: Matrix, labels: Labels) -> Platt:
    """P(acute) = sigmoid(a · score + b), fitted by maximum likelihood on Platt's smoothed targets.

    `scores` (n,) out-of-fold, `labels` (n,) of 0 and 1. Scores that are all equal give a = 0. Newton's method with
    halved steps. Source: Platt 1999; Lin, Lin and Weng 2007.
    """
    positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
    if not positive or not negative or not np.isfinite(scores).all():
        raise ValueError("a calibration needs finite scores of both classes")
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    middle, spread = float(scores.mean()), float(scores.std())
    prior = math.log((positive + 1) / (negative + 1))
    if spread <= 1e-12 * max(1.0, abs(middle)):
        return Platt(a=0.0, b=prior)
    x = np.column_stack([(scores - middle) / spread, np.ones(len(scores))])

    def loss(beta: Matrix) -> float:
        linear = x @ beta
        return float((np.logaddexp(0.0, linear) - target * linear).sum())

    beta = np.array([0.0, prior])
    for _ in range(_PLATT_STEPS):
        probability = 1 / (1 + np.exp(-np.clip(x @ beta, -700, 700)))
        gradient = x.T @ (probability - target)
        weight = np.maximum(probability * (1 - probability), 1e-12)
        step = np.linalg.solve((x * weight[:, None]).T @ x, gradient)
        size, before = 1.0, loss(beta)
        while size > 1e-10 and loss(beta - size * step) > before:
            size /= 2
        beta = beta - size * step
        if np.abs(size * step).max() < 1e-12:
            break
    slope = float(beta[0]) / spread
    return Platt(a=slope, b=float(beta[1]) - slope * middle)


def to_onnx(classifier: Fitted, width: int) -> bytes:
    """The classifier as ONNX: input `z` float32 (n, width), output `score` float32 (n, 1); equal bytes each time."""
    if classifier.width != width:
        raise ValueError(f"the classifier reads {classifier.width} inputs, not {width}")
    return classifier.graph()


def onnx_difference(classifier: Fitted, onnx: bytes, z: Matrix, platt: Platt) -> float:
    """The largest difference of calibrated probabilities over z (n, k) between the library and onnxruntime."""
    own = classifier.score(z)
    served = OnnxScore(onnx, width=classifier.width).scores(z)
    return max(
        abs(platt.probability(float(one)) - platt.probability(float(other)))
        for one, other in zip(own, served, strict=True)
    )
