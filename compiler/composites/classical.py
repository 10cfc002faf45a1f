"""ai.onnx.ml without its trees: scalers, encoders, linear models and support vector machines, as other operators.

Where the reference and ONNX Runtime differ the reference decides, but for labels that it gives whatever the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ...ir.dtypes import BOOL, F32, F64, I64
from ...ir.errors import ModelError, UnsupportedError
from ...ir.graph import Attribute, Constant, Value
from ..expand import Expansions, Nodes
from .scores import Attributes, class_labels, labelled, matrix, transformed

declare = Expansions()
COMPARED = 16
"""Keys up to which a lookup compares with each; with more it searches."""


def _floats(n: Nodes, x: Value) -> Value:
    """The operand in the type to compute in: f64 stays."""
    return x if x.dtype == F64 else n.cast(x, F32)


def _typed(array: np.ndarray, like: Value) -> np.ndarray:
    return np.asarray(array, like.dtype.numpy)


@declare("ai.onnx.ml.Scaler")
def scaler(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """(x - offset) * scale, for each feature or for all."""
    given, x = Attributes(attributes), _floats(n, x)
    offset, scale = given.array("offset"), given.array("scale")
    x = x if offset is None else n("Sub", x, _typed(offset, x))
    return n.cast(x if scale is None else n("Mul", x, _typed(scale, x)), F32)


@declare("ai.onnx.ml.Normalizer")
def normalizer(n: Nodes, x: Value, *, norm: str = "MAX") -> Value:
    """Rows over their greatest absolute value, or their L1 or L2 norm; rows of zeros stay."""
    x = _floats(n, x)
    op = {"MAX": "ReduceMax", "L1": "ReduceL1", "L2": "ReduceL2"}.get(norm)
    if op is None:
        raise UnsupportedError(f"the norm {norm!r}")
    size = n(op, n("Abs", x) if norm == "MAX" else x, n.dims(min(1, x.tensor.rank - 1)))
    return n.cast(n("Div", x, n("Max", size, n.like(1e-30, x))), F32)


@declare("ai.onnx.ml.Binarizer")
def binarizer(n: Nodes, x: Value, *, threshold: float = 0.0) -> Value:
    """1 above the threshold, else 0."""
    wide = x if x.dtype.is_float else n.cast(x, F32)
    return n.cast(n("Greater", wide, threshold), x.dtype)


@declare("ai.onnx.ml.Imputer")
def imputer(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """What equals a value (or is NaN) replaced, by one value for each feature or by one for all."""
    given = Attributes(attributes)
    kind = "float" if x.dtype.is_float else "int64"
    wanted, values = attributes.get(f"replaced_value_{kind}", 0), given.array(f"imputed_value_{kind}s", I64)
    if kind == "float":
        values = given.array("imputed_value_floats")
    if values is None or not isinstance(wanted, int | float):
        raise ModelError(f'it lacks the attribute "imputed_value_{kind}s"')
    hit = n("IsNaN", x) if wanted != wanted else n("Equal", x, wanted)
    return n("Where", hit, n.constant(_typed(values, x)), x)


@declare("ai.onnx.ml.ArrayFeatureExtractor")
def array_feature_extractor(n: Nodes, x: Value, y: Value) -> Value:
    """Elements of the last axis; of a vector as one row."""
    x = x if x.tensor.rank > 1 else n("Unsqueeze", x, n.dims(0))
    return n("Gather", x, n("Reshape", y, n.dims(-1)), axis=-1)


@declare("ai.onnx.ml.FeatureVectorizer")
def feature_vectorizer(n: Nodes, *parts: Value, **attributes: Attribute) -> Value:
    """Features side by side, each operand cut or filled with zeros to its number of them."""
    wanted = Attributes(attributes).array("inputdimensions", I64)
    found = []
    for position, part in enumerate(parts):
        x = n.cast(part, F32)
        x = n.reshape(x, x.shape[0], 1) if x.tensor.rank == 1 else x
        width, have = None if wanted is None else int(wanted[position]), x.shape[1]
        if width is not None and width != have:
            if not isinstance(have, int):
                raise UnsupportedError(f"operand {position} has {have} features, a number that only the run tells")
            x = n.slice(x, 1, 0, width) if have > width else n("Pad", x, n.dims(0, 0, 0, width - have))
        found.append(x)
    return n.concat(found, 1)


def lookup(n: Nodes, x: Value, keys: np.ndarray) -> Value:
    """For each element the number of the last key that equals it (as NaN does NaN), counted from 1; 0 where none does.

    Text is compared with each key by Equal, which for text is a step on the host; numbers are compared with each key,
    or searched for among many.
    """
    count = len(keys)
    numbers = np.arange(1, count + 1)
    nan = keys != keys if keys.dtype.kind == "f" else np.zeros(count, bool)
    plain, numbers_plain = keys[~nan], numbers[~nan]
    if keys.dtype == np.object_ or len(plain) <= COMPARED:
        same = n("Equal", n("Unsqueeze", x, n.dims(-1)), plain)
        found = n("ReduceMax", n("Where", same, numbers_plain, n.constant(np.array(0))), n.dims(-1), keepdims=0)
    else:
        found = _search(n, x, plain, numbers_plain)
    if nan.any():
        found = n("Where", n("IsNaN", x), n.constant(np.array(numbers[nan][-1])), found)
    return found


def _search(n: Nodes, x: Value, keys: np.ndarray, numbers: np.ndarray) -> Value:
    """Search among sorted keys in two steps: for the row of a square of keys that an element lies in, then in that."""
    unique, last = np.unique(keys[::-1], return_index=True)
    side = math.isqrt(len(unique) - 1) + 1
    filling = (0, side * side - len(unique))
    square = np.pad(unique, filling, mode="edge").reshape(side, side)
    found = np.pad(numbers[::-1][last], filling, mode="edge")
    column = n("Unsqueeze", x, n.dims(-1))

    def last_below(ordered: Value) -> Value:
        below = n.cast(n("LessOrEqual", ordered, column), I64)
        return n("Max", n("Sub", n("ReduceSum", below, n.dims(-1), keepdims=0), 1), 0)

    row = last_below(n.constant(square[:, 0].copy()))
    place = n("Add", n("Mul", row, side), last_below(n("Gather", n.constant(square), row)))
    same = n("Equal", n("Gather", n.constant(square.reshape(-1)), place), x)
    return n("Where", same, n("Gather", n.constant(found), place), n.constant(np.array(0)))


def _mapped(n: Nodes, x: Value, keys: np.ndarray, values: np.ndarray, default: object) -> Value:
    """The value of each element's key; the default where there is none."""
    table = np.empty(len(values) + 1, values.dtype)
    table[0], table[1:] = default, values
    return n("Gather", n.constant(table), lookup(n, x, keys))


def _table(given: Attributes, name: str) -> np.ndarray | None:
    found = given.values.get(f"{name}_tensor")
    if isinstance(found, Constant):
        return found.array.reshape(-1)
    return next(
        (
            a
            for s, t in (("strings", I64), ("int64s", I64), ("floats", F32))
            if (a := given.array(f"{name}_{s}", t)) is not None
        ),
        None,
    )


@declare("ai.onnx.ml.LabelEncoder")
def label_encoder(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """Keys to values; in version 1 texts to their positions and back."""
    given = Attributes(attributes)
    classes = given.array("classes_strings")
    if classes is not None:
        positions = np.arange(len(classes))
        keys, values = (classes, positions) if x.dtype.kind == "string" else (positions, classes)
    else:
        keys, values = _table(given, "keys"), _table(given, "values")  # type: ignore[assignment]
    if keys is None or values is None or len(keys) != len(values):
        raise ModelError("it needs as many values as keys")
    tensor = given.values.get("default_tensor")
    kind = {"f": "float", "i": "int64", "u": "int64"}.get(values.dtype.kind, "string")
    default: object = {"float": -0.0, "int64": -1, "string": "_Unused"}[kind]
    if isinstance(tensor, Constant):
        default = tensor.array.reshape(-1)[0]
    elif f"default_{kind}" in given.values and not isinstance(given.values.get("values_tensor"), Constant):
        default = given.values[f"default_{kind}"]
    if keys.dtype != np.object_:
        keys = keys.astype(x.dtype.numpy)
    return _mapped(n, x, keys, values, default)


@declare("ai.onnx.ml.CategoryMapper")
def category_mapper(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """Texts to numbers, or numbers to texts."""
    given = Attributes(attributes)
    texts, numbers = given.required("cats_strings"), given.required("cats_int64s", I64)
    if len(texts) != len(numbers):
        raise ModelError("it needs as many texts as numbers")
    if x.dtype.kind == "string":
        return _mapped(n, x, texts, numbers, given.integer("default_int64", -1))
    return _mapped(n, x, numbers, texts, given.text("default_string", "_Unused"))


@declare("ai.onnx.ml.OneHotEncoder")
def one_hot_encoder(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """1 at the category that equals the element, along a new last axis; zeros where none does."""
    given = Attributes(attributes)
    categories = given.array("cats_strings") if x.dtype.kind == "string" else given.required("cats_int64s", I64)
    if categories is None:
        raise ModelError('it lacks the attribute "cats_strings"')
    categories = categories if categories.dtype == np.object_ else _typed(categories, x)
    return n.cast(n("Equal", n("Unsqueeze", x, n.dims(-1)), categories), F32)


def _linear(n: Nodes, x: Value, weights: np.ndarray, bias: np.ndarray | None) -> Value:
    """x @ weights^T + bias, for weights [targets, features]."""
    others = () if bias is None or not bias.size else (_typed(bias, x),)
    return n("Gemm", x, _typed(weights, x), *others, transB=1)


@declare("ai.onnx.ml.LinearRegressor")
def linear_regressor(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """x @ coefficients + intercepts."""
    given, rows = Attributes(attributes), matrix(n, x, F64 if x.dtype == F64 else F32)
    weights = given.required("coefficients").reshape(given.integer("targets", 1), -1)
    scores = _linear(n, rows, weights, given.array("intercepts"))
    return n.cast(transformed(n, scores, given.text("post_transform", "NONE")), F32)


@declare("ai.onnx.ml.LinearClassifier")
def linear_classifier(n: Nodes, x: Value, **attributes: Attribute) -> tuple[Value | None, Value]:
    """The label of the greatest score, and the scores; one score for two classes stands for the second one."""
    given, rows = Attributes(attributes), matrix(n, x, F64 if x.dtype == F64 else F32)
    labels, transform = class_labels(given, "classlabels_ints"), given.text("post_transform", "NONE")
    intercepts = given.array("intercepts")
    flat = given.required("coefficients")
    columns = rows.shape[1]
    targets = len(flat) // columns if isinstance(columns, int) and columns else len(labels)
    targets = targets if intercepts is None else len(intercepts)
    scores = _linear(n, rows, flat.reshape(targets, -1), intercepts)
    if targets == 1 and len(labels) == 2:
        scores = n.concat([n("Neg", scores), scores], 1)
    elif targets == 1:
        positive = n("Squeeze", n("GreaterOrEqual", scores, 0.0), n.dims(1))
        none = np.array([0 if labels.dtype != np.object_ else "", labels[0]], labels.dtype)
        return labelled(n, none, n.cast(positive, I64)), n.cast(transformed(n, scores, transform), F32)
    chosen = n("ArgMax", scores, axis=1, keepdims=0)
    return labelled(n, labels, chosen), n.cast(transformed(n, scores, transform), F32)


def _kernel(n: Nodes, x: Value, vectors: np.ndarray, given: Attributes) -> Value:
    """The kernel function of each row and each support vector: [rows, vectors]."""
    parameters = given.array("kernel_params")
    gamma, offset, degree = (float(p) for p in (np.zeros(3) if parameters is None else parameters))
    kind = given.text("kernel_type", "LINEAR")
    products = _linear(n, x, vectors, None)
    if kind == "LINEAR":
        return products
    if kind == "RBF":
        # |x - v|^2 as x.x - 2 x.v + v.v would lose what little the two differ by.
        differences = n("Sub", n("Unsqueeze", x, n.dims(1)), _typed(vectors, x))
        return n("Exp", n("Mul", n("ReduceSumSquare", differences, n.dims(2), keepdims=0), -gamma))
    scaled = n("Add", n("Mul", products, gamma), offset)
    if kind == "POLY":
        return n("Pow", scaled, degree)
    if kind == "SIGMOID":
        return n("Tanh", scaled)
    raise UnsupportedError(f"the kernel {kind!r}")


@declare("ai.onnx.ml.SVMRegressor")
def svm_regressor(n: Nodes, x: Value, **attributes: Attribute) -> Value:
    """Kernels with the support vectors, weighted; without any, a linear model. `one_class` keeps the sign alone."""
    given, rows = Attributes(attributes), matrix(n, x, F64 if x.dtype == F64 else F32)
    count, weights = given.integer("n_supports", 0), given.required("coefficients")
    if count:
        rows = _kernel(n, rows, given.required("support_vectors").reshape(count, -1), given)
    scores = _linear(n, rows, weights.reshape(1, -1), given.required("rho")[:1])
    if given.integer("one_class", 0):
        scores = n("Where", n("Greater", scores, 0), n.like(1, scores), n.like(-1, scores))
    return n.cast(transformed(n, scores, given.text("post_transform", "NONE")), F32)


@declare("ai.onnx.ml.SVMClassifier")
def svm_classifier(n: Nodes, x: Value, **attributes: Attribute) -> tuple[Value | None, Value]:
    """The class that most pairs of classes vote for, with the pairs' scores or, from these, the classes' probabilities;
    without support vectors the class of the greatest linear score."""
    given, rows = Attributes(attributes), matrix(n, x, F64 if x.dtype == F64 else F32)
    labels, transform = class_labels(given, "classlabels_ints"), given.text("post_transform", "NONE")
    classes, counts = len(labels), given.array("vectors_per_class", I64)
    flat, rho, slopes = given.required("coefficients"), given.required("rho"), given.array("prob_a")
    if counts is None or not counts.sum():
        scores = _linear(n, rows, flat.reshape(classes, -1), rho[:1])
        chosen = n("ArgMax", scores, axis=1, keepdims=0)
        return labelled(n, labels, chosen), n.cast(transformed(n, scores, transform), F32)
    pairs, total, ends = list(combinations(range(classes), 2)), int(counts.sum()), np.cumsum([0, *counts])
    weights, coefficients = np.zeros((len(pairs), total), np.float32), flat.reshape(-1, total)
    for row, (i, j) in zip(weights, pairs, strict=True):
        for own, other in ((i, j - 1), (j, i)):
            part = slice(ends[own], ends[own + 1])
            row[part] = coefficients[other, part]
    scores = _linear(n, _kernel(n, rows, given.required("support_vectors").reshape(total, -1), given), weights, rho)
    if len(rho) < len(pairs):
        raise ModelError(f"it has {len(rho)} values rho for {len(pairs)} pairs of classes")
    wins, losses = (np.eye(classes)[[pair[side] for pair in pairs]] for side in (0, 1))
    first = n("Greater", scores, 0)
    votes = [n("MatMul", n.cast(v, rows.dtype), _typed(m, rows)) for v, m in ((first, wins), (n("Not", first), losses))]
    chosen = n("ArgMax", n("Add", *votes), axis=1, keepdims=0)
    if slopes is not None:
        scores = _probabilities(n, scores, slopes, given.required("prob_b"), classes, pairs)
    elif classes == 2 and transform != "PROBIT":
        scores = n.concat([n("Neg", scores), scores], 1)
    return labelled(n, labels, chosen), n.cast(transformed(n, scores, transform), F32)


def _probabilities(
    n: Nodes, scores: Value, slopes: np.ndarray, offsets: np.ndarray, classes: int, pairs: list[tuple[int, int]]
) -> Value:
    """The classes' probabilities from those of pairs, by the second method of Wu, Lin & Weng (2004), as libsvm has it:
    a fixed point of quadratic forms, refined until it moves by less than 0.005 / classes, a hundred times at most."""
    raw = n("Sigmoid", n("Neg", n("Add", n("Mul", scores, _typed(slopes, scores)), _typed(offsets, scores))))
    wins = n("Clip", raw, n.like(1e-7, scores), n.like(1 - 1e-7, scores))
    first, second = (np.zeros((len(pairs), classes * classes)) for _ in range(2))
    for k, (i, j) in enumerate(pairs):
        first[k, i * classes + j], second[k, j * classes + i] = 1, 1
    parts = [n("MatMul", w, _typed(m, w)) for w, m in ((wins, first), (n("Sub", 1, wins), second))]
    ratios = n("Reshape", n("Add", *parts), n.dims(-1, classes, classes))
    turned = n.transpose(ratios, 0, 2, 1)
    squares = n("ReduceSumSquare", ratios, n.dims(1), keepdims=0)
    eye = _typed(np.eye(classes), scores)
    form = n("Sub", n("Mul", n("Unsqueeze", squares, n.dims(2)), eye), n("Mul", ratios, turned))
    start = n("Add", n("Mul", squares, 0), 1 / classes)
    rows = [n("Squeeze", part, n.dims(1)) for part in n.split(form, [1] * classes, 1)]

    def refine(state: Sequence[Value]) -> tuple[Value, Sequence[Value]]:
        before, active = state
        p = before
        gradient = n("Squeeze", n("MatMul", form, n("Unsqueeze", p, n.dims(2))), n.dims(2))
        value = n("ReduceSum", n("Mul", p, gradient), n.dims(1))
        moves = n("ReduceMax", n("Abs", n("Sub", gradient, value)), n.dims(1))
        going = n("And", active, n("Not", n("Less", moves, 0.005 / classes)))
        for k, row in enumerate(rows):
            own, slope = n.slice(row, 1, k, k + 1), n.slice(gradient, 1, k, k + 1)
            step = n("Div", n("Sub", value, slope), own)
            size = n("Add", step, 1)
            change = n("Mul", step, n("Add", n("Mul", step, own), n("Mul", slope, 2)))
            value = n("Div", n("Div", n("Add", value, change), size), size)
            gradient = n("Div", n("Add", gradient, n("Mul", step, row)), size)
            p = n("Div", n("Add", p, n("Mul", step, eye[k])), size)
        after = n("Where", going, p, before)
        anyone = n.cast(n("ReduceMax", n.cast(going, F32), keepdims=0), BOOL)
        return anyone, [after, going]

    found, _ = n.loop(100, [start, n("Less", n.slice(start, 1, 0, 1), 2.0)], refine)
    return found
