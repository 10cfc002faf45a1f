"""ai.onnx.ml without trees: against the reference, against ONNX Runtime where the reference has no meaning, and models
that scikit-learn fitted."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxc
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import make_classification
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from sklearn.svm import SVC, SVR

from .forests import Array, model_of, runtime, table

RANDOM = np.random.default_rng(3)


def check(
    model: onnx.ModelProto, inputs: Any, wanted: Any = None, tolerance: float = 1e-5, target: str = "host"
) -> None:
    """The compiled model gives what is wanted: what the reference gives, where nothing else is told."""
    wanted = ReferenceEvaluator(model).run(None, inputs) if wanted is None else wanted
    found = list(onnxc.compile(model, target=target).run(inputs).values())
    assert len(found) == len(wanted)
    for a, b in zip(found, map(np.asarray, wanted), strict=True):
        assert a.shape == b.shape
        assert a.dtype == (b.dtype if b.dtype != np.float64 else np.float32) or a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


TYPES = (np.float32, np.float64, np.int64, np.int32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", (1, 4))
def test_scaler(dtype: Any, count: int) -> None:
    x = {"x": table(RANDOM, 9, 4, dtype)}
    offset, scale = RANDOM.normal(size=(2, count)).astype(np.float32)
    model = model_of("Scaler", x, opset=1, offset=offset, scale=scale)
    check(model, x, [((x["x"] - offset) * scale).astype(np.float32)])


@pytest.mark.parametrize("norm", ("MAX", "L1", "L2"))
@pytest.mark.parametrize("dtype", TYPES)
def test_normalizer(norm: str, dtype: Any) -> None:
    x = {"x": table(RANDOM, 9, 4, dtype)}
    x["x"][2] = 0
    check(
        model_of("Normalizer", x, opset=1, norm=norm),
        x,
        None
        if x["x"].dtype.kind == "f"
        else [
            ReferenceEvaluator(model_of("Normalizer", x, opset=1, norm=norm)).run(
                None, {"x": x["x"].astype(np.float32)}
            )[0]
        ],
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_binarizer(dtype: Any) -> None:
    x = {"x": table(RANDOM, 9, 4, dtype)}
    check(model_of("Binarizer", x, opset=1, threshold=0.5), x)


@pytest.mark.parametrize("replaced", (float("nan"), 1.5))
@pytest.mark.parametrize("values", ([7.0], [7.0, 8.0, 9.0, 10.0]))
def test_imputer(replaced: float, values: list[float]) -> None:
    x = {"x": table(RANDOM, 20, 4, nan=True)}
    check(model_of("Imputer", x, opset=1, imputed_value_floats=values, replaced_value_float=replaced), x)


def test_imputer_of_integers() -> None:
    x = {"x": table(RANDOM, 20, 4, np.int64)}
    check(model_of("Imputer", x, opset=1, imputed_value_int64s=[7, 8, 9, 10], replaced_value_int64=-1), x)


@pytest.mark.parametrize("shape", ((6,), (3, 6), (2, 3, 6)))
def test_array_feature_extractor(shape: tuple[int, ...]) -> None:
    inputs = {"x": RANDOM.normal(size=shape).astype(np.float32), "y": np.array([[5, 0, 0, 2]])}
    check(model_of("ArrayFeatureExtractor", inputs, opset=1, shapes={"y": [1, 4]}), inputs)


def test_feature_vectorizer() -> None:
    inputs: dict[str, Array] = {
        "a": table(RANDOM, 5, 3),
        "b": table(RANDOM, 5, 2),
        "c": table(RANDOM, 5, 1).reshape(-1),
        "d": table(RANDOM, 5, 2),
    }
    check(model_of("FeatureVectorizer", inputs, opset=1, inputdimensions=[2, 2, 1, 4]), inputs)


@pytest.mark.parametrize("count", (1, 5, 40, 1000))
@pytest.mark.parametrize("dtype", (np.float32, np.int64))
def test_label_encoder(count: int, dtype: Any) -> None:
    """Few keys, and so many that they are searched."""
    keys = RANDOM.choice(4 * count, count, replace=False).astype(dtype) - count
    values = RANDOM.normal(size=count).astype(np.float32)
    x = {"x": np.concatenate([RANDOM.choice(keys, 50), RANDOM.integers(-9, 9, 50).astype(dtype)]).reshape(10, 10)}
    name = "keys_floats" if dtype == np.float32 else "keys_int64s"
    check(model_of("LabelEncoder", x, opset=4, values_floats=values, default_float=3.5, **{name: keys.tolist()}), x)


def test_label_encoder_of_missing_values() -> None:
    x = {"x": np.array([1.0, np.nan, 2.0, 5.0], np.float64)}
    keys, values = np.array([np.nan, 1.0, 2.0]), np.array([9, 8, 7], np.int16)
    model = model_of(
        "LabelEncoder", x, opset=4, keys_tensor=numpy_helper.from_array(keys),
        values_tensor=numpy_helper.from_array(values), default_tensor=numpy_helper.from_array(np.array([-1], np.int16)),
    )  # fmt: skip
    check(model, x, [np.array([8, 9, 7, -1], np.int16)])


@pytest.mark.parametrize("dtype", TYPES)
def test_one_hot_encoder(dtype: Any) -> None:
    x = {"x": table(RANDOM, 5, 3, dtype)}
    check(model_of("OneHotEncoder", x, opset=1, cats_int64s=[1, -2, 0, 4]), x)


@pytest.mark.parametrize("targets", (1, 3))
@pytest.mark.parametrize("transform", ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"))
def test_linear_regressor(targets: int, transform: str) -> None:
    x = {"x": table(RANDOM, 20, 4)}
    weights, intercepts = RANDOM.normal(size=4 * targets), RANDOM.normal(size=targets)
    model = model_of(
        "LinearRegressor", x, opset=1, coefficients=weights, intercepts=intercepts, targets=targets,
        post_transform=transform,
    )  # fmt: skip
    if targets > 1 or transform == "NONE":
        check(model, x, runtime(model, x))
    else:
        plain = x["x"] @ weights.reshape(4, 1) + intercepts
        logistic = 1 / (1 + np.exp(-plain))
        check(model, x, [(logistic if transform == "LOGISTIC" else np.ones_like(plain)).astype(np.float32)])


@pytest.mark.parametrize("classes", (1, 3))
@pytest.mark.parametrize("transform", ("NONE", "LOGISTIC", "SOFTMAX", "SOFTMAX_ZERO"))
def test_linear_classifier(classes: int, transform: str) -> None:
    x = {"x": table(RANDOM, 20, 4)}
    weights, intercepts = RANDOM.normal(size=4 * classes), RANDOM.normal(size=classes)
    model = model_of(
        "LinearClassifier", x, 2, opset=1, coefficients=weights, intercepts=intercepts,
        classlabels_ints=list(range(5, 5 + max(classes, 2))), post_transform=transform,
    )  # fmt: skip
    check(model, x)


def machine(machine: Any, **attributes: Any) -> dict[str, Any]:
    """The attributes of a fitted support vector machine."""
    return {
        "coefficients": machine.dual_coef_.reshape(-1),
        "kernel_params": [float(machine._gamma), float(machine.coef0), float(machine.degree)],
        "kernel_type": machine.kernel.upper(),
        "rho": machine.intercept_,
        "support_vectors": machine.support_vectors_.reshape(-1),
        **attributes,
    }


def samples(classes: int) -> tuple[Array, Array]:
    x, y = make_classification(150, 6, n_informative=4, n_classes=classes, random_state=1)
    return x.astype(np.float32), y


@pytest.mark.parametrize("kernel", ("linear", "poly", "rbf", "sigmoid"))
@pytest.mark.parametrize("classes", (2, 4))
def test_fitted_classifier(kernel: str, classes: int) -> None:
    """A classifier of scikit-learn, its labels and its scores of pairs."""
    data, y = samples(classes)
    fitted = SVC(kernel=kernel, decision_function_shape="ovo", coef0=0.5).fit(data, y)
    attributes = machine(fitted, vectors_per_class=fitted.n_support_, classlabels_ints=list(range(10, 10 + classes)))
    if classes == 2:  # scikit-learn turns the sign of two classes round
        attributes |= {"coefficients": -attributes["coefficients"], "rho": -attributes["rho"]}
    x = {"x": data[:40]}
    labels, scores = onnxc.compile(model_of("SVMClassifier", x, 2, opset=1, **attributes)).run(x).values()
    np.testing.assert_array_equal(labels, fitted.predict(x["x"]) + 10)
    wanted = fitted.decision_function(x["x"])
    wanted = np.stack([wanted, -wanted], 1) if classes == 2 else wanted
    np.testing.assert_allclose(scores, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("classes", (2, 3, 5))
@pytest.mark.parametrize("target", ("host", "cuda"))
def test_probabilities(classes: int, target: str, request: pytest.FixtureRequest) -> None:
    if target == "cuda":
        request.getfixturevalue("gpu")
    data, y = samples(min(classes, 4))
    y = np.where(data[:, 0] > 0.5, y % classes, (y + np.arange(150)) % classes)
    fitted = SVC(kernel="rbf").fit(data, y)
    pairs = classes * (classes - 1) // 2
    attributes = machine(fitted, vectors_per_class=fitted.n_support_, classlabels_ints=list(range(classes)))
    attributes |= {"prob_a": -RANDOM.uniform(1, 2, pairs), "prob_b": RANDOM.uniform(-0.2, 0.2, pairs)}
    x = {"x": data[:30]}
    model = model_of("SVMClassifier", x, 2, opset=1, **attributes)
    found = list(onnxc.compile(model, target=target).run(x).values())
    wanted = runtime(model, x)
    np.testing.assert_array_equal(found[0], wanted[0])
    # One refinement more or less is within the limit at which both stop.
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=0.005 / classes)
    assert np.mean(np.abs(found[1] - wanted[1]) > 1e-5) < 0.1
    np.testing.assert_allclose(found[1].sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("kernel", ("linear", "poly", "rbf", "sigmoid"))
@pytest.mark.parametrize("one_class", (0, 1))
def test_fitted_regressor(kernel: str, one_class: int) -> None:
    data, _ = samples(2)
    fitted = SVR(kernel=kernel, coef0=0.25).fit(data, data[:, 0] * data[:, 1])
    x = {"x": data[:40]}
    attributes = machine(fitted, n_supports=len(fitted.support_vectors_), one_class=one_class)
    model = model_of("SVMRegressor", x, opset=1, **attributes)
    wanted = fitted.predict(x["x"]).reshape(-1, 1)
    check(model, x, [(np.where(wanted > 0, 1, -1) if one_class else wanted).astype(np.float32)], tolerance=1e-3)


def sklearn_tree(tree: Any, number: int, nodes: dict[str, list[Any]]) -> None:
    """Adds a fitted tree's nodes."""
    for node in range(tree.node_count):
        leaf = tree.children_left[node] < 0
        row = (number, node, max(int(tree.feature[node]), 0), float(tree.threshold[node]))
        children = (0, 0) if leaf else (int(tree.children_left[node]), int(tree.children_right[node]))
        for name, item in zip(nodes, (*row, "LEAF" if leaf else "BRANCH_LEQ", *children), strict=True):
            nodes[name].append(item)


def empty_nodes() -> dict[str, list[Any]]:
    names = ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids")
    return {f"nodes_{name}": [] for name in names}


def test_fitted_forest() -> None:
    """A random forest of scikit-learn: every leaf adds to every class."""
    data, y = samples(3)
    fitted = RandomForestClassifier(15, max_depth=7, random_state=0).fit(data, y)
    nodes = empty_nodes()
    leaves: dict[str, list[Any]] = {f"class_{name}": [] for name in ("treeids", "nodeids", "ids", "weights")}
    for number, estimator in enumerate(fitted.estimators_):
        sklearn_tree(estimator.tree_, number, nodes)
        for node in np.flatnonzero(estimator.tree_.children_left < 0):
            shares = estimator.tree_.value[node, 0]
            for label, share in enumerate(shares / shares.sum() / 15):
                for values, item in zip(leaves.values(), (number, int(node), label, float(share)), strict=True):
                    values.append(item)
    x = {"x": data}
    model = model_of("TreeEnsembleClassifier", x, 2, classlabels_int64s=[0, 1, 2], **nodes, **leaves)
    check(model, x, [fitted.predict(data), fitted.predict_proba(data).astype(np.float32)])


def test_fitted_boosting() -> None:
    data, y = samples(2)
    fitted = GradientBoostingRegressor(n_estimators=30, random_state=0, init="zero").fit(data, y + data[:, 0])
    nodes = empty_nodes()
    leaves: dict[str, list[Any]] = {f"target_{name}": [] for name in ("treeids", "nodeids", "ids", "weights")}
    for number, (estimator,) in enumerate(fitted.estimators_):
        sklearn_tree(estimator.tree_, number, nodes)
        for node in np.flatnonzero(estimator.tree_.children_left < 0):
            weight = float(estimator.tree_.value[node, 0, 0]) * fitted.learning_rate
            for values, item in zip(leaves.values(), (number, int(node), 0, weight), strict=True):
                values.append(item)
    x = {"x": data}
    check(
        model_of("TreeEnsembleRegressor", x, n_targets=1, **nodes, **leaves),
        x,
        [fitted.predict(data).reshape(-1, 1).astype(np.float32)],
    )


def test_on_gpu(gpu: None) -> None:
    """A pipeline: scaler, normalizer, encoder, linear model."""
    x = {"x": table(RANDOM, 20, 4)}
    for model in (
        model_of("Scaler", x, opset=1, offset=[0.5], scale=[2.0, 1.0, 3.0, -1.0]),
        model_of("Normalizer", x, opset=1, norm="L2"),
        model_of("LinearRegressor", x, opset=1, coefficients=[1.0, 2.0, 3.0, 4.0], intercepts=[0.5]),
    ):
        check(model, x, target="cuda")
    keys = list(range(-50, 50))
    numbers = {"x": table(RANDOM, 5, 3, np.int64)}
    check(
        model_of("LabelEncoder", numbers, opset=4, keys_int64s=keys, values_int64s=keys[::-1]), numbers, target="cuda"
    )


@pytest.mark.parametrize("opset", (1, 3))
def test_text_labels(opset: int) -> None:
    """A numeric classifier whose labels are text, also in the oldest opset, as exporters write it."""
    x = {"x": table(RANDOM, 20, 4)}
    model = model_of(
        "LinearClassifier", x, 2, opset=opset, coefficients=RANDOM.normal(size=12), intercepts=[0.1, 0.2, 0.3],
        classlabels_strings=["a", "b", "c"], post_transform="SOFTMAX",
    )  # fmt: skip
    labels, scores = onnxc.compile(model).run(x).values()
    wanted = runtime(model, x)
    assert labels.tolist() == wanted[0].tolist()
    np.testing.assert_allclose(scores, wanted[1], rtol=1e-5, atol=1e-6)
