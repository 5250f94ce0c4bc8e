"""Classifiers as ONNX graphs with the input `z` float32 (n, k) and the output `score` float32 (n, 1).

The graphs are written here, from the fitted numbers, and not by converters (docs/decisions/0014). A float64 threshold
of a tree becomes the largest float32 that is not above it, so that for float32 values "x <= t" stays what it was;
rounded to the nearest, a value between both would go to the other side. Kernels, distances and the sum over trees are
computed in float64 inside the graph. The bytes follow from the numbers alone.

Only operators of ai.onnx and ai.onnx.ml, at opsets that onnxruntime has known for years.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET: Final = 17
ML_OPSET: Final = 3
IR_VERSION: Final = 8
LEAF: Final = -1

Kernel = Literal["linear", "rbf"]
Distance = Literal["euclidean", "manhattan"]
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """A fitted tree; node 0 is its root. A row goes left where x <= threshold, or x < threshold where it is `strict`.

    x and threshold are float32. `feature` (nodes,) is LEAF at a leaf; `left` and `right` (nodes,) are places of nodes;
    `value` (nodes,) float64 is read at leaves alone.
    """

    feature: NDArray[np.int64]
    threshold: NDArray[np.float32]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: Array
    strict: bool = False


def not_above(threshold: Array) -> NDArray[np.float32]:
    """The largest float32 values that are not above these: for float32 x, x <= t and x <= not_above(t) are the same."""
    with np.errstate(over="ignore"):
        nearest = threshold.astype(np.float32)
    above = nearest.astype(np.float64) > threshold
    return np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest).astype(np.float32)


def ensemble_graph(trees: Sequence[Tree], *, width: int, factor: float = 1.0, base: float = 0.0) -> bytes:
    """ONNX bytes of score = base + factor · Σ values of the leaves that a row falls into.

    Each tree is a target of its own; they are added in float64, so that the sum cannot depend on their order.
    """
    standing = [tree for tree in trees if tree.feature[0] != LEAF]
    constant = base + factor * sum(float(tree.value[0]) for tree in trees if tree.feature[0] == LEAF)
    graph = _Graph(width)
    if standing:
        graph.nodes.append(_ensemble_node(standing))
        graph.add("Cast", ["leaves"], "leaves64", to=TensorProto.DOUBLE)
    else:  # no tree ever split: the same score for every row
        graph.constant("no", np.zeros((width, 1), dtype=np.float32))
        graph.add("MatMul", ["z", "no"], "nothing")
        graph.add("Cast", ["nothing"], "leaves64", to=TensorProto.DOUBLE)
    graph.constant("columns", np.array([1], dtype=np.int64))
    graph.constant("factor", np.array(factor))
    graph.constant("base", np.array(constant))
    graph.add("ReduceSum", ["leaves64", "columns"], "sum", keepdims=1)
    graph.add("Mul", ["sum", "factor"], "scaled")
    graph.add("Add", ["scaled", "base"], "score64")
    return graph.to_bytes()


def _ensemble_node(trees: Sequence[Tree]) -> onnx.NodeProto:
    nodes: dict[str, Any] = {
        name: []
        for name in (
            "nodes_treeids",
            "nodes_nodeids",
            "nodes_featureids",
            "nodes_modes",
            "nodes_values",
            "nodes_truenodeids",
            "nodes_falsenodeids",
            "target_treeids",
            "target_nodeids",
            "target_ids",
            "target_weights",
        )
    }
    for number, tree in enumerate(trees):
        for place, feature in enumerate(tree.feature.tolist()):
            leaf = feature == LEAF
            nodes["nodes_treeids"].append(number)
            nodes["nodes_nodeids"].append(place)
            nodes["nodes_featureids"].append(0 if leaf else feature)
            nodes["nodes_modes"].append("LEAF" if leaf else "BRANCH_LT" if tree.strict else "BRANCH_LEQ")
            nodes["nodes_values"].append(0.0 if leaf else float(tree.threshold[place]))
            nodes["nodes_truenodeids"].append(0 if leaf else int(tree.left[place]))
            nodes["nodes_falsenodeids"].append(0 if leaf else int(tree.right[place]))
            if leaf:
                nodes["target_treeids"].append(number)
                nodes["target_nodeids"].append(place)
                nodes["target_ids"].append(number)
                nodes["target_weights"].append(float(tree.value[place]))
    return helper.make_node(
        "TreeEnsembleRegressor",
        ["z"],
        ["leaves"],
        domain="ai.onnx.ml",
        n_targets=len(trees),
        aggregate_function="SUM",
        post_transform="NONE",
        **nodes,
    )


def kernel_graph(*, kernel: Kernel, gamma: float, support: Array, weight: Array, intercept: float) -> bytes:
    """ONNX bytes of score = intercept + Σ weight_i · K(support_i, z), support (m, k): an SVM's decision value.

    K is the dot product, or exp(-gamma · |support_i - z|²).
    """
    graph = _Graph(support.shape[1])
    graph.rows("support", support)
    if kernel == "linear":
        graph.add("Mul", ["row", "support"], "products")
        graph.constant("last", np.array([2], dtype=np.int64))
        graph.add("ReduceSum", ["products", "last"], "likeness", keepdims=0)
    else:
        graph.distances("support", "euclidean")
        graph.constant("minus_gamma", np.array(-gamma))
        graph.add("Mul", ["distance", "minus_gamma"], "exponent")
        graph.add("Exp", ["exponent"], "likeness")
    graph.constant("weight", weight[None])
    graph.constant("intercept", np.array(intercept))
    graph.constant("columns", np.array([1], dtype=np.int64))
    graph.add("Mul", ["likeness", "weight"], "terms")
    graph.add("ReduceSum", ["terms", "columns"], "sum", keepdims=1)
    graph.add("Add", ["sum", "intercept"], "score64")
    return graph.to_bytes()


def neighbours_graph(*, rows: Array, acute: NDArray[np.int64], neighbours: int, distance: Distance) -> bytes:
    """ONNX bytes of score = the acute share of the nearest training rows (m, k); see `classifiers.Neighbours`."""
    graph = _Graph(rows.shape[1])
    graph.rows("training", rows)
    graph.distances("training", distance)
    graph.constant("count", np.array([neighbours], dtype=np.int64))
    graph.constant("columns", np.array([1], dtype=np.int64))
    graph.constant("acute", acute.astype(np.float64)[None])
    graph.constant("neighbours", np.array(float(neighbours)))
    graph.add("TopK", ["distance", "count"], "nearest", "places", axis=1, largest=0, sorted=1)
    graph.add("ReduceMax", ["nearest"], "reach", axes=[1], keepdims=1)
    graph.add("Less", ["distance", "reach"], "is_nearer")
    graph.add("Equal", ["distance", "reach"], "is_last")
    for name in ("nearer", "last"):
        graph.add("Cast", [f"is_{name}"], name, to=TensorProto.DOUBLE)
        graph.add("ReduceSum", [name, "columns"], f"{name}_count", keepdims=1)
        graph.add("Mul", [name, "acute"], f"{name}_acute_rows")
        graph.add("ReduceSum", [f"{name}_acute_rows", "columns"], f"{name}_acute", keepdims=1)
    graph.add("Sub", ["neighbours", "nearer_count"], "places_left")
    graph.add("Div", ["places_left", "last_count"], "share")
    graph.add("Mul", ["share", "last_acute"], "shared_acute")
    graph.add("Add", ["nearer_acute", "shared_acute"], "all_acute")
    graph.add("Div", ["all_acute", "neighbours"], "score64")
    return graph.to_bytes()


class _Graph:
    """A graph in the making: from `z` to `score64`, which ends as `score`."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: NDArray[Any]) -> None:
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name))

    def add(self, operator: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, list(inputs), list(outputs), **attributes))

    def rows(self, name: str, rows: Array) -> None:
        """Fixed rows (1, m, k), and z as `row` (n, 1, k), both float64."""
        self.constant(name, rows[None])
        self.constant("middle", np.array([1], dtype=np.int64))
        self.add("Cast", ["z"], "z64", to=TensorProto.DOUBLE)
        self.add("Unsqueeze", ["z64", "middle"], "row")

    def distances(self, rows: str, distance: Distance) -> None:
        """`distance` (n, m): the squared Euclidean one, or the sum of absolute differences."""
        self.constant("features", np.array([2], dtype=np.int64))
        self.add("Sub", ["row", rows], "difference")
        if distance == "euclidean":
            self.add("Mul", ["difference", "difference"], "parts")
        else:
            self.add("Abs", ["difference"], "parts")
        self.add("ReduceSum", ["parts", "features"], "distance", keepdims=0)

    def to_bytes(self) -> bytes:
        self.add("Cast", ["score64"], "score", to=TensorProto.FLOAT)
        graph = helper.make_graph(
            self.nodes,
            "classifier",
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", self.width])],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 1])],
            self._constants,
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)],
            ir_version=IR_VERSION,
            producer_name="fracture-sweep",
        )
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString(deterministic=True))
