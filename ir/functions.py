"""Mathematical functions for operator declarations; each takes scalars or tensors."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, overload

from . import scalars as s
from .dtypes import BOOL, DType
from .tensors import Tensor, TensorLike, elementwise, lifted

Operand = TypeVar("Operand", Tensor, s.Scalar)


class UnaryFunction(Protocol):
    """A function of one scalar, or of each element of a tensor."""

    def __call__(self, x: Operand, /) -> Operand: ...


class BinaryFunction(Protocol):
    """A function of two scalars, or of broadcast tensors; Python numbers take the first operand's type."""

    def __call__(self, x: Operand, y: Operand | float, /) -> Operand: ...


def _unary(op: str) -> UnaryFunction:
    return lifted(lambda x: s.unary(op, x))  # type: ignore[return-value]


def _binary(op: str) -> BinaryFunction:
    return lifted(lambda x, y: s.binary(op, *_pair(x, y)))  # type: ignore[return-value]


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


@overload
def where(condition: s.Scalar, yes: s.ScalarLike, no: s.ScalarLike) -> s.Scalar: ...
@overload
def where(condition: Tensor, yes: TensorLike, no: TensorLike) -> Tensor: ...
def where(condition: Any, yes: Any, no: Any) -> Tensor | s.Scalar:
    """`yes` where the condition holds, else `no`; Python numbers take the other branch's type."""
    dtype = next(o.dtype for o in (yes, no) if isinstance(o, Tensor | s.Scalar))

    def element(*found: s.Scalar) -> s.Scalar:
        rest = iter(found)
        c, a, b = (next(rest) if isinstance(o, Tensor) else o for o in (condition, yes, no))
        return s.select(s.as_scalar(c, BOOL), s.as_scalar(a, dtype), s.as_scalar(b, dtype))

    present = [operand for operand in (condition, yes, no) if isinstance(operand, Tensor)]
    return elementwise(element, *present) if present else element()


def cast(x: Operand, dtype: DType) -> Operand:
    """`x` converted as ONNX's Cast does; `x` itself where that is its type."""
    if x.dtype == dtype:
        return x
    return elementwise(lambda v: s.cast(v, dtype), x) if isinstance(x, Tensor) else s.cast(x, dtype)
