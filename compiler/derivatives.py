"""Derivatives of pointwise operators, from the scalar expressions that declare them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..ir import scalars as s
from ..ir.dtypes import DType
from ..ir.errors import UnsupportedError
from ..ir.graph import Node, TensorType, Value
from ..ir.ops import REGISTRY
from ..ir.tensors import Tensor, buffer_tensor
from .expand import Nodes

VARIADIC = ("Sum", "Mean", "Min", "Max")
"""Operators that are pointwise, of any number of operands."""

_UNARY: Mapping[str, Callable[[Nodes, Value], Value]] = {
    "log1p": lambda n, x: n("Log", n("Add", x, 1)),
    "expm1": lambda n, x: n("Sub", n("Exp", x), 1),
    "exp2": lambda n, x: n("Exp", n("Mul", x, math.log(2))),
    "log2": lambda n, x: n("Div", n("Log", x), math.log(2)),
    "trunc": lambda n, x: n("Where", n("Less", x, 0), n("Ceil", x), n("Floor", x)),
}
_UNARY_NAMES = {
    **{op: op.capitalize() for op in ("neg", "abs", "sqrt", "floor", "ceil", "round", "not", "exp", "log", "tanh")},
    **{op: op.capitalize() for op in ("erf", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh")},
    **{op: op.capitalize() for op in ("acosh", "atanh", "sigmoid")},
    "isnan": "IsNaN",
}
_BINARY_NAMES = {
    **{op: op.capitalize() for op in ("add", "sub", "mul", "div", "min", "max", "pow", "and", "or", "xor")},
    "lt": "Less",
    "le": "LessOrEqual",
    "eq": "Equal",
}


def _one_less_square(n: Nodes, x: Value) -> Value:
    return n("Sub", 1, n("Mul", x, x))


def _root(n: Nodes, x: Value, plus: float) -> Value:
    return n("Sqrt", n("Add", n("Mul", x, x), plus))


_SLOPES: Mapping[str, Callable[[Nodes, Value, Value], Value]] = {
    "neg": lambda n, x, y: n.like(-1, x),
    "abs": lambda n, x, y: n("Sign", x),
    "sqrt": lambda n, x, y: n("Div", 0.5, y),
    "exp": lambda n, x, y: y,
    "log": lambda n, x, y: n("Reciprocal", x),
    "tanh": lambda n, x, y: _one_less_square(n, y),
    "erf": lambda n, x, y: n("Mul", n("Exp", n("Neg", n("Mul", x, x))), 2 / math.sqrt(math.pi)),
    "sin": lambda n, x, y: n("Cos", x),
    "cos": lambda n, x, y: n("Neg", n("Sin", x)),
    "tan": lambda n, x, y: n("Add", n("Mul", y, y), 1),
    "asin": lambda n, x, y: n("Reciprocal", n("Sqrt", _one_less_square(n, x))),
    "acos": lambda n, x, y: n("Neg", n("Reciprocal", n("Sqrt", _one_less_square(n, x)))),
    "atan": lambda n, x, y: n("Reciprocal", n("Add", n("Mul", x, x), 1)),
    "sinh": lambda n, x, y: n("Cosh", x),
    "cosh": lambda n, x, y: n("Sinh", x),
    "asinh": lambda n, x, y: n("Reciprocal", _root(n, x, 1)),
    "acosh": lambda n, x, y: n("Reciprocal", _root(n, x, -1)),
    "atanh": lambda n, x, y: n("Reciprocal", _one_less_square(n, x)),
    "sigmoid": lambda n, x, y: n("Mul", y, n("Sub", 1, y)),
    "log1p": lambda n, x, y: n("Reciprocal", n("Add", x, 1)),
    "expm1": lambda n, x, y: n("Exp", x),
    "exp2": lambda n, x, y: n("Mul", y, math.log(2)),
    "log2": lambda n, x, y: n("Reciprocal", n("Mul", x, math.log(2))),
}
"""d op(x) / dx, from x and y = op(x)."""
_FLAT = ("floor", "ceil", "round", "trunc", "not", "isnan")


def is_pointwise(node: Node) -> bool:
    """Whether the partial derivatives of a node follow from its declaration."""
    operator = REGISTRY.get(node.op)
    return operator is not None and (operator.pointwise or node.op in VARIADIC)


class Pointwise:
    """A pointwise node as an expression of its operands, made of nodes again as far as derivatives need it."""

    def __init__(self, n: Nodes, node: Node) -> None:
        self.n, self.node = n, node
        probes: list[Tensor | None] = []
        for position, value in enumerate(node.inputs):
            probes.append(None if value is None else buffer_tensor(f"p{position}", value.dtype, ()))
        result = REGISTRY[node.op](probes, node.attributes)[0]
        assert isinstance(result, Tensor)
        self.expression = result.at(())
        self._values: dict[bytes, Value] = {}

    def slope(self, position: int) -> Value | None:
        """The partial derivative for one operand; None where it is zero everywhere."""
        return self._derivative(self.expression, f"p{position}", {})

    def _value(self, part: s.Scalar) -> Value:
        found = self._values.get(part.digest)
        if found is None:
            found = self._values[part.digest] = self._made(part)
        return found

    def _made(self, part: s.Scalar) -> Value:
        n = self.n
        if isinstance(part, s.Load):
            value = self.node.inputs[int(part.buffer.name[1:])]
            assert value is not None
            return value
        if isinstance(part, s.Const):
            return n.constant(np.array(part.value).astype(part.dtype.numpy))
        operands = [self._value(child) for child in part.children]
        if isinstance(part, s.Unary) and part.op in _UNARY_NAMES:
            return n(_UNARY_NAMES[part.op], *operands)
        if isinstance(part, s.Unary) and part.op in _UNARY:
            return _UNARY[part.op](n, operands[0])
        if isinstance(part, s.Binary) and part.op in _BINARY_NAMES:
            return n(_BINARY_NAMES[part.op], *operands)
        if isinstance(part, s.Binary) and part.op in ("ne", "rem"):
            return n("Not", n("Equal", *operands)) if part.op == "ne" else n("Mod", *operands, fmod=1)
        if isinstance(part, s.Select):
            return n("Where", *operands)
        if isinstance(part, s.Cast):
            return n.cast(operands[0], part.dtype)
        raise UnsupportedError(f"{self.node.where}: no derivative of {self.node.op} is known")

    def _derivative(self, part: s.Scalar, name: str, found: dict[bytes, Value | None]) -> Value | None:
        if part.digest not in found:
            found[part.digest] = self._slope_of(part, lambda inner: self._derivative(inner, name, found), name)
        return found[part.digest]

    def _slope_of(self, part: s.Scalar, slope: Callable[[s.Scalar], Value | None], name: str) -> Value | None:
        n = self.n
        if isinstance(part, s.Load):
            return n.like(1, self._value(part)) if part.buffer.name == name else None
        if isinstance(part, s.Const) or not part.dtype.is_float:
            return None
        inner = [None if isinstance(part, s.Select) and k == 0 else slope(c) for k, c in enumerate(part.children)]
        if all(d is None for d in inner):
            return None
        if isinstance(part, s.Unary):
            if part.op in _FLAT:
                return None
            if part.op in _SLOPES:
                x = self._value(part.operand)
                y = self._value(part) if part.op in ("sqrt", "exp", "tanh", "tan", "sigmoid", "exp2") else x
                return self._times(inner[0], _SLOPES[part.op](n, x, y))
        if isinstance(part, s.Select):
            return self._chosen(part.condition, inner[1], inner[2], part.dtype)
        if isinstance(part, s.Cast):
            assert inner[0] is not None
            return n.cast(inner[0], part.dtype) if part.operand.dtype.is_float else None
        if isinstance(part, s.Binary):
            return self._slope_of_binary(part, inner)
        raise UnsupportedError(f"{self.node.where}: no derivative of {self.node.op} is known")

    def _slope_of_binary(self, part: s.Binary, inner: Sequence[Value | None]) -> Value | None:
        n, op, (da, db) = self.n, part.op, inner
        if op in ("add", "sub"):
            db = n("Neg", db) if op == "sub" and db is not None else db
            return da if db is None else db if da is None else n("Add", da, db)
        if op in ("min", "max"):  # of equal ones the second counts: Relu has slope 0 at 0
            low, high = (part.left, part.right) if op == "min" else (part.right, part.left)
            return self._chosen(s.binary("lt", low, high), da, db, part.dtype)
        if op == "rem":
            whole = _UNARY["trunc"](n, n("Div", self._value(part.left), self._value(part.right)))
            return self._sum(da, None if db is None else n("Neg", n("Mul", db, whole)))
        a, b = (self._value(side) for side in (part.left, part.right))
        if op == "mul":
            return self._sum(self._times(da, b), self._times(db, a))
        if op == "div":
            second = None if db is None else n("Neg", n("Div", n("Mul", db, self._value(part)), b))
            return self._sum(None if da is None else n("Div", da, b), second)
        if op == "pow":
            first = None if da is None else n("Mul", da, n("Mul", b, n("Pow", a, n("Sub", b, 1))))
            return self._sum(first, None if db is None else n("Mul", db, n("Mul", self._value(part), n("Log", a))))
        raise UnsupportedError(f"{self.node.where}: no derivative of {self.node.op} is known")

    def _times(self, outer: Value | None, factor: Value) -> Value | None:
        if outer is None:
            return None
        known = self.n.known(outer)
        return factor if known is not None and known.size == 1 and known == 1 else self.n("Mul", outer, factor)

    def _sum(self, a: Value | None, b: Value | None) -> Value | None:
        return a if b is None else b if a is None else self.n("Add", a, b)

    def _chosen(self, condition: s.Scalar, yes: Value | None, no: Value | None, dtype: DType) -> Value:
        zero = self.n.constant(np.zeros((), dtype.numpy))
        return self.n("Where", self._value(condition), yes or zero, no or zero)


def is_float(value: Value | None) -> bool:
    """Whether a value is a tensor of floats: what has a derivative."""
    return value is not None and isinstance(value.type, TensorType) and value.dtype.is_float
