"""Narrow floats are rounded where ONNX rounds them: at every tensor of a definition, in fused kernels too.

In registers f16 and bf16 are f32, and storing rounds. What one operator of a fused group hands to the next is never
stored, so it is rounded by a conversion, and a fused model gives what its operators give one by one. Sums, and the
steps of a scalar function, are f32. (The precision pass makes graphs whose values inside a group are f32: nothing to
round there.)
"""

from __future__ import annotations

from . import scalars as s
from .dtypes import BF16, F16, F32
from .scalars import Scalar

_EXACT = frozenset({"neg", "abs", "min", "max", "floor", "ceil", "round", "rint", "trunc"})
"""Operations whose result is representable where the operands are: integers near a float are floats of its type."""


def rounded(scalar: Scalar) -> Scalar:
    """The expression, rounded to its type if that is a narrow float and f32 arithmetic may give what is not one."""
    return scalar if _is_rounded(scalar) else converted(scalar)


def converted(scalar: Scalar) -> Scalar:
    """The expression, rounded to its type if that is a narrow float."""
    return s.Cast(scalar.dtype, scalar.lanes, s.cast(scalar, F32)) if scalar.dtype in (F16, BF16) else scalar


def _is_rounded(scalar: Scalar) -> bool:
    if scalar.dtype not in (F16, BF16) or isinstance(scalar, s.Load | s.Const | s.Cast | s.Bitcast | s.Element):
        return True
    if isinstance(scalar, s.Select):
        return _is_rounded(scalar.yes) and _is_rounded(scalar.no)
    if isinstance(scalar, s.Unary | s.Binary):
        return scalar.op in _EXACT and all(map(_is_rounded, scalar.children))
    return isinstance(scalar, s.Reduce) and scalar.op in _EXACT and _is_rounded(scalar.body)
