"""What the operators of ai.onnx.ml share: attributes as arrays, scores and labels, the two-class rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...ir.dtypes import F32, I64, DType
from ...ir.errors import ModelError, UnsupportedError
from ...ir.graph import Attribute, Constant, Value
from ..expand import Nodes


@dataclass(frozen=True)
class Attributes:
    """A node's attributes, by name and kind. Raises ModelError for one that is required and absent."""

    values: Mapping[str, Attribute]

    def array(self, name: str, dtype: DType = F32) -> np.ndarray | None:
        """A list of numbers or texts, or the tensor `name`_as_tensor or `name`; None where it is absent or empty."""
        value = self.values.get(f"{name}_as_tensor", self.values.get(name))
        if isinstance(value, Constant):
            return value.array if value.array.size else None
        if not isinstance(value, tuple) or not value:
            return None
        return np.array(value, np.object_ if isinstance(value[0], str | bytes) else dtype.numpy)

    def required(self, name: str, dtype: DType = F32) -> np.ndarray:
        """Such an array, which must be there."""
        found = self.array(name, dtype)
        if found is None:
            raise ModelError(f'it lacks the attribute "{name}"')
        return found

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, which must be there, as a vector."""
        value = self.values.get(name)
        if not isinstance(value, Constant):
            raise ModelError(f'it lacks the attribute "{name}"')
        return np.asarray(value.array).reshape(-1)

    def integer(self, name: str, default: int) -> int:
        """An integer."""
        value = self.values.get(name, default)
        assert isinstance(value, int)
        return value

    def text(self, name: str, default: str) -> str:
        """A text."""
        return str(self.values.get(name, default))


def matrix(n: Nodes, x: Value, dtype: DType = F32) -> Value:
    """The operand as [rows, columns] of `dtype`; a vector is one row."""
    if x.tensor.rank not in (1, 2):
        raise UnsupportedError(f"it takes [rows, columns], not {x.type}")
    x = n.cast(x, dtype)
    return x if x.tensor.rank == 2 else n("Unsqueeze", x, n.dims(0))


def transformed(n: Nodes, scores: Value, transform: str) -> Value:
    """Scores [rows, classes] after a `post_transform`, as ONNX Runtime computes it."""
    if transform == "NONE":
        return scores
    if transform == "LOGISTIC":
        return n("Sigmoid", scores)
    if transform == "SOFTMAX":
        return n("Softmax", scores, axis=-1)
    if transform == "SOFTMAX_ZERO":
        return _softmax_zero(n, scores)
    if transform == "PROBIT":
        return _probit(n, scores)
    raise UnsupportedError(f"the post_transform {transform!r}")


def _softmax_zero(n: Nodes, scores: Value) -> Value:
    """Softmax that leaves zeros at zero: what is within 1e-7 of it takes no part in the sum but for itself."""
    top = n("ReduceMax", scores, n.dims(-1))
    small = n("LessOrEqual", n("Abs", scores), 1e-7)
    parts = n("Where", small, n("Mul", scores, n("Exp", n("Neg", top))), n("Exp", n("Sub", scores, top)))
    total = n("ReduceSum", parts, n.dims(-1))
    return n("Where", n("Equal", total, 0), n.like(0.5, scores), n("Div", parts, total))


def _probit(n: Nodes, scores: Value) -> Value:
    """The normal distribution's quantiles by Winitzki's approximation of the inverse error function (2008), which is
    what the reference and ONNX Runtime have."""
    x = n("Sub", n("Mul", scores, 2), 1)
    log = n("Log", n("Mul", n("Sub", 1, x), n("Add", x, 1)))
    v = n("Add", n("Mul", log, 0.5), 2 / (math.pi * 0.147))
    size = n("Sqrt", n("Sub", n("Sqrt", n("Sub", n("Mul", v, v), n("Mul", log, 1 / 0.147))), v))
    return n("Mul", n("Mul", size, math.sqrt(2)), n("Where", n("Less", x, 0), n.like(-1, x), n.like(1, x)))


def class_labels(given: Attributes, integers: str) -> np.ndarray:
    """The classes' labels, text or integers."""
    texts = given.array("classlabels_strings")
    return given.required(integers, I64) if texts is None else texts


def labelled(n: Nodes, labels: np.ndarray, chosen: Value) -> Value | None:
    """The labels of the classes with these numbers, where output 0 is read. Those that are text are picked from a
    constant of text: all but this last step of such a classifier is numeric."""
    return n("Gather", n.constant(labels), chosen) if n.wanted(0) else None


def binary_scores(n: Nodes, score: Value, transform: str, positive: bool, negated: bool = False) -> tuple[Value, Value]:
    """The scores [rows, 2] of both classes from the one [rows, 1] of the positive class, and the class's number [rows].

    As ONNX Runtime has it: where no weight is negative the score is a probability, compared with a half, and the other
    class has the rest; else it is compared with 0, and the other class has its negative (always, where `negated`, and
    before a logistic function).
    """
    half = 0.5 if positive and not negated else 0.0
    chosen = n("Squeeze", n.cast(n("Greater", score, half), I64), n.dims(1))
    if transform == "PROBIT" and not negated:  # ONNX Runtime leaves one column undefined; this is the reference's
        return transformed(n, n.concat([n("Sub", 1, score), score], 1), transform), chosen
    other = n("Sub", 1, score) if positive and not negated and transform != "LOGISTIC" else n("Neg", score)
    both = n.concat([other, score], 1)
    return (transformed(n, both, transform) if negated or transform == "LOGISTIC" else both), chosen
