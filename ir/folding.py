"""What binary expressions are without being computed: exact foldings of literals, indices and neutral operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from . import scalars as s
from .dims import Dim, known_le
from .dtypes import BOOL, F32, I32, I64

if TYPE_CHECKING:
    from .scalars import Scalar

_INDEX_OPS: Mapping[str, Callable[[Dim, Dim], Dim]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


def folded(op: str, left: Scalar, right: Scalar) -> Scalar | None:
    """What `left op right` is for operands of one lane, where that is known without computing it; else None."""
    a = left.value if isinstance(left, s.Const) else None
    b = right.value if isinstance(right, s.Const) else None
    if left.dtype == I32 and op in ("add", "sub") and isinstance(left, s.Varying) and b is not None:
        return s.varying([value + b if op == "add" else value - b for value in left.values], I32)
    whole = left.dtype == I64 and isinstance(left, s.Const | s.Index) and isinstance(right, s.Const | s.Index)
    if whole and op in _INDEX_OPS:
        return s.index(_INDEX_OPS[op](s.as_dim(left), s.as_dim(right)))
    if op == "mul" and (a == 1 or b == 1):
        return right if a == 1 else left
    if op == "div" and b == 1:
        return left
    if left.dtype.is_integer and op in ("add", "sub") and b == 0:
        return left
    if left.dtype.is_integer and op == "add" and a == 0:
        return right
    if left.dtype == BOOL and op == "and" and (a is not None or b is not None):
        known, other = (a, right) if a is not None else (b, left)
        return other if known else s.const(False, BOOL)
    if left.dtype == BOOL and op == "or" and (a is not None or b is not None):
        known, other = (a, right) if a is not None else (b, left)
        return s.const(True, BOOL) if known else other
    if op in s.COMPARISONS and a is not None and b is not None and left.dtype != F32:
        return s.const({"lt": a < b, "le": a <= b, "eq": a == b, "ne": a != b}[op], BOOL)
    if whole and op in s.COMPARISONS:
        return _compare_indices(op, left, right)
    return None


def _compare_indices(op: str, left: Scalar, right: Scalar) -> Scalar | None:
    a, b = s.as_dim(left), s.as_dim(right)
    if op == "le":
        return s.const(True, BOOL) if known_le(a, b) else s.const(False, BOOL) if known_le(b + 1, a) else None
    if op == "lt":
        return s.const(True, BOOL) if known_le(a + 1, b) else s.const(False, BOOL) if known_le(b, a) else None
    if a == b or known_le(a + 1, b) or known_le(b + 1, a):
        return s.const((a == b) == (op == "eq"), BOOL)
    return None
