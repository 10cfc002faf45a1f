"""Tree ensembles against ONNX Runtime and the reference: every kind of node, missing values, classes, aggregates."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxc
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxc.compiler.importer import import_model
from onnxc.ir.export import to_onnx

from .forests import BRANCHES, forest, leaves_of, model_of, runtime, table


def agree(model: Any, inputs: Any, tolerance: float = 1e-5, target: str = "host") -> None:
    """The compiled model gives what ONNX Runtime gives."""
    found = list(onnxc.compile(model, target=target).run(inputs).values())
    wanted = runtime(model, inputs)
    assert len(found) == len(wanted)
    for a, b in zip(reversed(found), reversed(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", (1, 7, 8, 300))
@pytest.mark.parametrize("modes", (("BRANCH_LEQ",), *((mode,) for mode in BRANCHES[1:]), BRANCHES))
def test_regressor_modes(modes: tuple[str, ...], rows: int) -> None:
    random = np.random.default_rng(len(modes) + rows)
    nodes, leaves = forest(random, 5, 6, 7, modes)
    attributes = nodes | leaves_of("target", leaves, [0] * len(leaves), random.normal(size=len(leaves)))
    x = {"x": table(random, rows, 7)}
    agree(model_of("TreeEnsembleRegressor", x, n_targets=1, **attributes), x)


@pytest.mark.parametrize("mode", ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GT", "BRANCH_GTE", "BRANCH_EQ"))
def test_missing_values(mode: str) -> None:
    random = np.random.default_rng(5)
    nodes, leaves = forest(random, 9, 5, 3, (mode,), missing=True)
    attributes = nodes | leaves_of("target", leaves, [0] * len(leaves), random.normal(size=len(leaves)))
    x = {"x": table(random, 200, 3, nan=True)}
    agree(model_of("TreeEnsembleRegressor", x, n_targets=1, **attributes), x)


@pytest.mark.parametrize("dtype", (np.float32, np.float64, np.int64, np.int32))
@pytest.mark.parametrize("aggregate", ("SUM", "AVERAGE", "MIN", "MAX"))
def test_several_targets(aggregate: str, dtype: Any) -> None:
    random = np.random.default_rng(11)
    nodes, leaves = forest(random, 6, 4, 5)
    ids = [int(i) for i in random.integers(0, 3, len(leaves))]
    attributes = nodes | leaves_of("target", leaves, ids, random.normal(size=len(leaves)))
    x = {"x": table(random, 50, 5, dtype)}
    # ONNX Runtime has no kernel for integers.
    floats = {"x": x["x"].astype(np.float32)} if dtype in (np.int64, np.int32) else x
    plain = model_of("TreeEnsembleRegressor", floats, n_targets=3, aggregate_function=aggregate, **attributes)
    agree(plain, floats)
    # ONNX Runtime adds no base value where no leaf adds to a target, the reference does.
    base = [0.5, -0.25, 2.0]
    model = model_of(
        "TreeEnsembleRegressor", x, n_targets=3, aggregate_function=aggregate, base_values=base, **attributes
    )
    wanted = runtime(plain, floats)[0] + np.float32(base)
    np.testing.assert_allclose(onnxc.compile(model).run(x)["y0"], wanted, rtol=1e-5, atol=1e-5)


def test_double_thresholds() -> None:
    """Thresholds and features that differ only in f64, given as tensors."""
    random = np.random.default_rng(12)
    nodes, leaves = forest(random, 6, 4, 5)
    ids = [0] * len(leaves)
    attributes = nodes | leaves_of("target", leaves, ids, random.normal(size=len(leaves)))
    x = {"x": table(random, 50, 5, np.float64) + random.choice([-1e-12, 0, 1e-12], (50, 5))}
    for name in ("nodes_values", "target_weights"):
        attributes[f"{name}_as_tensor"] = helper.make_tensor(name, 11, [len(attributes[name])], attributes.pop(name))
    agree(model_of("TreeEnsembleRegressor", x, n_targets=1, **attributes), x)


@pytest.mark.parametrize("transform", ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO", "PROBIT"))
@pytest.mark.parametrize("positive", (True, False))
@pytest.mark.parametrize("base", (0, 1))
def test_binary_classifier(transform: str, positive: bool, base: int) -> None:
    """Leaves of one class alone: the score is that of the positive class."""
    random = np.random.default_rng(13)
    nodes, leaves = forest(random, 3, 4, 5)
    low = 0.05 if positive else -0.3
    attributes = nodes | leaves_of("class", leaves, [0] * len(leaves), random.uniform(low, 0.3, len(leaves)))
    if base:
        attributes["base_values"] = [0.05]
    x = {"x": table(random, 60, 5)}
    model = model_of("TreeEnsembleClassifier", x, 2, classlabels_int64s=[7, -3], post_transform=transform, **attributes)
    if transform == "PROBIT":  # ONNX Runtime has one column, and leaves the second as it was in memory
        scores = onnxc.compile(model).run(x)["y1"]
        np.testing.assert_allclose(scores[:, 1], runtime(model, x)[1][:, 0], rtol=1e-4, atol=1e-5)
    else:
        agree(model, x)


@pytest.mark.parametrize("transform", ("NONE", "LOGISTIC", "SOFTMAX"))
@pytest.mark.parametrize("low", (0.01, -0.5))
@pytest.mark.parametrize("base", ([], [0.1]))
def test_positive_class_alone(transform: str, low: float, base: list[float]) -> None:
    """Leaves of the second class alone."""
    random = np.random.default_rng(20)
    nodes, leaves = forest(random, 3, 4, 5)
    attributes = nodes | leaves_of("class", leaves, [1] * len(leaves), random.uniform(low, 0.5, len(leaves)))
    x = {"x": table(random, 60, 5)}
    attributes |= {"base_values": base} if base else {}
    model = model_of("TreeEnsembleClassifier", x, 2, classlabels_int64s=[7, -3], post_transform=transform, **attributes)
    agree(model, x)


@pytest.mark.parametrize("transform", ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"))
@pytest.mark.parametrize("classes", (3, 5))
def test_several_classes(transform: str, classes: int) -> None:
    random = np.random.default_rng(14)
    nodes, leaves = forest(random, 12, 5, 6)
    ids = [int(i) for i in random.integers(0, classes, len(leaves))]
    attributes = nodes | leaves_of("class", leaves, ids, random.normal(size=len(leaves)))
    x = {"x": table(random, 90, 6)}
    labels = list(range(10, 10 + classes))
    agree(
        model_of("TreeEnsembleClassifier", x, 2, classlabels_int64s=labels, post_transform=transform, **attributes), x
    )


def branches(random: np.random.Generator, dtype: Any) -> dict[str, Any]:
    """The attributes of a TreeEnsemble of two trees with every mode, sets of members among them."""
    modes = np.array([6, 0, 1, 4, 6, 5, 2, 3], np.uint8)
    members = np.array([1.0, 1.5, -2.0, np.nan, -1.0, -0.5, 2.0, 2.5, np.nan], dtype)
    return {
        "nodes_modes": numpy_helper.from_array(modes),
        "nodes_splits": numpy_helper.from_array(np.array([0, 0.5, 1, -1, 0, 1.5, 0, -0.5], dtype)),
        "nodes_featureids": [0, 1, 2, 0, 1, 2, 0, 1],
        "nodes_truenodeids": [1, 3, 0, 1, 5, 6, 2, 3],
        "nodes_trueleafs": [0, 0, 1, 1, 0, 0, 1, 1],
        "nodes_falsenodeids": [2, 4, 5, 6, 7, 8, 7, 9],
        "nodes_falseleafs": [0, 1, 1, 1, 0, 1, 0, 1],
        "tree_roots": [0, 4],
        "leaf_weights": numpy_helper.from_array(random.normal(size=10).astype(dtype)),
        "leaf_targetids": [0, 1, 1, 0, 1, 0, 0, 1, 0, 1],
        "membership_values": numpy_helper.from_array(members),
        "n_targets": 2,
    }


@pytest.mark.parametrize("dtype", (np.float32, np.float64, np.float16))
def test_members(dtype: Any) -> None:
    random = np.random.default_rng(15)
    attributes = branches(random, dtype)
    x = {"x": table(random, 100, 3, dtype)}
    model = model_of("TreeEnsemble", x, opset=5, **attributes)
    (found,) = onnxc.compile(model).run(x).values()
    (wanted,) = ReferenceEvaluator(model).run(None, x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, wanted, rtol=2e-3 if dtype == np.float16 else 1e-6)


def test_members_of_missing_values() -> None:
    """NaN is a member where the node says so."""
    random = np.random.default_rng(16)
    attributes = branches(random, np.float32) | {"nodes_missing_value_tracks_true": [1, 0, 1, 1, 0, 1, 0, 1]}
    x = {"x": table(random, 100, 3, nan=True)}
    model = model_of("TreeEnsemble", x, opset=5, **attributes)
    (found,) = onnxc.compile(model).run(x).values()
    np.testing.assert_allclose(found, ReferenceEvaluator(model).run(None, x)[0], rtol=1e-6)


@pytest.mark.parametrize("targets", (1, 3))
@pytest.mark.parametrize("aggregate", ("SUM", "MIN"))
def test_exported(targets: int, aggregate: str) -> None:
    """The graph as ONNX, in which the trees are operators that every engine has."""
    random = np.random.default_rng(19)
    nodes, leaves = forest(random, 4, 4, 5, missing=True, modes=BRANCHES[:4])
    ids = [int(i) for i in random.integers(0, targets, len(leaves))]
    attributes = nodes | leaves_of("target", leaves, ids, random.normal(size=len(leaves)))
    x = {"x": table(random, 30, 5, nan=True)}
    model = model_of("TreeEnsembleRegressor", x, n_targets=targets, aggregate_function=aggregate, **attributes)
    (found,) = ReferenceEvaluator(to_onnx(import_model(model))).run(None, x)
    np.testing.assert_allclose(found, runtime(model, x)[0], rtol=1e-5, atol=1e-6)


def test_malformed_trees() -> None:
    random = np.random.default_rng(17)
    nodes, leaves = forest(random, 2, 3, 4)
    attributes = nodes | leaves_of("target", leaves, [0] * len(leaves), random.normal(size=len(leaves)))
    x = {"x": table(random, 4, 4)}
    for change, text in (
        ({"nodes_truenodeids": [0] * len(nodes["nodes_modes"])}, "no trees|cycle"),
        ({"nodes_truenodeids": [99] * len(nodes["nodes_modes"])}, "no node"),
        ({"target_ids": [1] * len(leaves)}, "target 1 of 1"),
        ({"nodes_featureids": [9] * len(nodes["nodes_modes"])}, "10 features"),
    ):
        with pytest.raises(onnxc.OnnxcError, match=text):
            onnxc.compile(model_of("TreeEnsembleRegressor", x, n_targets=1, **(attributes | change)))


@pytest.mark.parametrize("targets", (1, 3))
def test_on_gpu(gpu: None, targets: int) -> None:
    random = np.random.default_rng(18)
    nodes, leaves = forest(random, 4, 4, 5, missing=True, modes=BRANCHES[:4])
    ids = [int(i) for i in random.integers(0, targets, len(leaves))]
    attributes = nodes | leaves_of("target", leaves, ids, random.normal(size=len(leaves)))
    x = {"x": table(random, 70, 5, nan=True)}
    agree(model_of("TreeEnsembleRegressor", x, n_targets=targets, **attributes), x, target="cuda")
