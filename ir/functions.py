"""Mathematical functions for operator declarations; each takes scalars or tensors."""

from __future__ import annotations

from typing import Any

from . import scalars as s
from .dtypes import BOOL, DType
from .tensors import Tensor, elementwise, lifted


def _unary(op: str) -> Any:
    return lifted(lambda x: s.unary(op, x))


def _binary(op: str) -> Any:
    return lifted(lambda x, y: s.binary(op, *_pair(x, y)))


def _pair(x: s.ScalarLike, y: s.ScalarLike) -> tuple[s.Scalar, s.Scalar]:
    dtype = x.dtype if isinstance(x, s.Scalar) else y.dtype  # type: ignore[union-attr]
    return s.as_scalar(x, dtype), s.as_scalar(y, dtype)


exp, log, tanh, erf, sin, cos, tan = (_unary(op) for op in ("exp", "log", "tanh", "erf", "sin", "cos", "tan"))
asin, acos, atan, sinh, cosh = (_unary(op) for op in ("asin", "acos", "atan", "sinh", "cosh"))
asinh, acosh, atanh, log1p, expm1, logistic = (
    _unary(op) for op in ("asinh", "acosh", "atanh", "log1p", "expm1", "sigmoid")
)
absolute, sqrt, floor, ceil, round_even, trunc = (
    _unary(op) for op in ("abs", "sqrt", "floor", "ceil", "round", "trunc")
)
isnan, logical_not = _unary("isnan"), _unary("not")
minimum, maximum, power, remainder = (_binary(op) for op in ("min", "max", "pow", "rem"))
shift_left, shift_right = _binary("shl"), _binary("shr")


def where(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`; Python numbers take the other branch's type."""

    def pick(c: s.Scalar, a: s.Scalar, b: s.Scalar) -> s.Scalar:
        return s.select(c, a, b)

    if any(isinstance(operand, Tensor) for operand in (condition, yes, no)):
        dtype = next(o.dtype for o in (yes, no) if isinstance(o, Tensor | s.Scalar))
        present = [o for o in (condition, yes, no) if isinstance(o, Tensor)]

        def element(*found: s.Scalar) -> s.Scalar:
            rest = iter(found)
            operands = [next(rest) if isinstance(o, Tensor) else o for o in (condition, yes, no)]
            return pick(s.as_scalar(operands[0], BOOL), s.as_scalar(operands[1], dtype), s.as_scalar(operands[2], dtype))

        return elementwise(element, *present)
    dtype = next(o.dtype for o in (yes, no) if isinstance(o, s.Scalar))
    return pick(condition, s.as_scalar(yes, dtype), s.as_scalar(no, dtype))


def cast(x: Any, dtype: DType) -> Any:
    """`x` converted as ONNX's Cast does."""
    return elementwise(lambda v: s.cast(v, dtype), x) if isinstance(x, Tensor) else s.cast(x, dtype)
