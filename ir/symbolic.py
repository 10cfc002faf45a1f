"""What shape arithmetic yields, without running it: scalar definitions evaluated over symbolic dims.

A symbolic value is an int, a dim, a float, a bool or a `Ratio` of a dim (a dim scaled in floating point on its way to
a Floor, Ceil or Cast). Whatever cannot be told is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from . import scalars as s
from .dims import Dim, Opaque, Sum, ceildiv, dim_max, dim_min, divide_exactly, floordiv, known_le, substitute
from .dtypes import BOOL, DType
from .tensors import assume_equal


@dataclass(frozen=True)
class Ratio:
    """numerator / denominator, a float; the denominator is a positive int."""

    numerator: Dim
    denominator: int


SymbolicValue: TypeAlias = int | float | bool | Dim | Ratio


def evaluate_scalar(scalar: s.Scalar, known: Callable[[str, int], SymbolicValue | None]) -> SymbolicValue | None:
    """The value of an expression whose loads, at constant offsets, are given by known(buffer name, offset)."""
    memo: dict[int, SymbolicValue | None] = {}

    def dim(value: Dim) -> Dim | None:
        if isinstance(value, int):
            return value
        failed = False

        def of(atom: Opaque) -> Dim:
            nonlocal failed
            found = run(atom.value) if isinstance(atom.value, s.Scalar) else None
            if not isinstance(found, int | Sum):
                failed = True
                return 0
            return found

        result = substitute(value, {}, of)
        return None if failed else result

    def run(node: s.Scalar) -> SymbolicValue | None:
        if id(node) not in memo:
            memo[id(node)] = _held(step(node), node.dtype)
        return memo[id(node)]

    def step(node: s.Scalar) -> SymbolicValue | None:
        if isinstance(node, s.Const):
            return node.value
        if isinstance(node, s.Index):
            return dim(node.dim)
        if isinstance(node, s.Load):
            offset = dim(node.offset)
            return known(node.buffer.name, offset) if isinstance(offset, int) else None
        if isinstance(node, s.Cast):
            return _cast(run(node.operand), node)
        if isinstance(node, s.Select):
            condition = run(node.condition)
            if condition is None or isinstance(condition, Sum | Ratio):
                return None
            return run(node.yes) if condition else run(node.no)
        if isinstance(node, s.Unary):
            operand = run(node.operand)
            return None if operand is None else _unary(node.op, operand)
        if isinstance(node, s.Binary):
            left, right = run(node.left), run(node.right)
            if left is None or right is None:
                return None
            return _binary(node.op, left, right, node.left.dtype.is_float)
        if isinstance(node, s.Reduce):
            return _reduce(node)
        return None

    def _reduce(node: s.Reduce) -> SymbolicValue | None:
        extents = [dim(extent) for _, extent in node.ranges]
        total = math.prod(e for e in extents if isinstance(e, int)) if all(isinstance(e, int) for e in extents) else -1
        if not 0 <= total <= 64:
            return None
        result: SymbolicValue | None = s.IDENTITY[node.op](node.dtype)
        first = True
        for flat in range(total):
            values: dict[str, Dim] = {}
            rest = flat
            for (name, _), extent in zip(reversed(node.ranges), reversed(extents), strict=True):
                assert isinstance(extent, int)
                values[name] = rest % extent
                rest //= extent
            item = evaluate_scalar(s.Rewriter(dims=values)(node.body), known)
            if item is None or result is None:
                return None
            result = item if first else _binary(node.op, result, item, node.dtype.is_float)
            first = False
        return result

    return run(scalar)


def _held(value: SymbolicValue | None, dtype: DType) -> SymbolicValue | None:
    """The value, or None for an integer that its type does not hold: there arithmetic wraps round."""
    if isinstance(value, bool) or not dtype.is_integer:
        return value
    if isinstance(value, int):
        return value if dtype.limits[0] <= value <= dtype.limits[1] else None
    if isinstance(value, Sum) and any(abs(coefficient) >= 1 << 62 for _, coefficient in value.terms):
        return None
    return value


def _exact(value: SymbolicValue) -> tuple[Dim, int] | None:
    """A value as an exact dim over an int denominator, where it is one."""
    if isinstance(value, Ratio):
        return value.numerator, value.denominator
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        fraction = Fraction(value)
        return (fraction.numerator, fraction.denominator) if fraction.denominator <= 1 << 30 else None
    return int(value) if isinstance(value, bool) else value, 1


def _ratio(numerator: Dim, denominator: int) -> SymbolicValue | None:
    if denominator < 0:
        numerator, denominator = -numerator, -denominator
    if denominator == 0:
        return None
    if isinstance(numerator, int):
        return numerator / denominator
    common = math.gcd(denominator, *(c for _, c in numerator.terms))
    if common > 1:
        numerator, denominator = floordiv(numerator, common), denominator // common
    return numerator if denominator == 1 else Ratio(numerator, denominator)


def _cast(value: SymbolicValue | None, node: s.Cast) -> SymbolicValue | None:
    if value is None:
        return None
    if node.dtype == BOOL:
        return None if isinstance(value, Sum | Ratio) else bool(value)
    if node.dtype.is_integer:
        if isinstance(value, Ratio):
            # Truncation is the floor of what is not negative.
            return floordiv(value.numerator, value.denominator) if known_le(0, value.numerator) else None
        if isinstance(value, float):
            return int(value) if math.isfinite(value) else None
        return int(value) if isinstance(value, bool) else value
    return value if isinstance(value, Sum | Ratio) else float(value)


def _unary(op: str, x: SymbolicValue) -> SymbolicValue | None:
    if isinstance(x, bool):
        return not x if op == "not" else None
    if isinstance(x, Ratio):
        if op == "floor":
            return floordiv(x.numerator, x.denominator)
        if op == "ceil":
            return ceildiv(x.numerator, x.denominator)
        return Ratio(-x.numerator, x.denominator) if op == "neg" else None
    if isinstance(x, Sum):
        if op in ("floor", "ceil", "round", "trunc") or (op == "abs" and known_le(0, x)):
            return x
        return -x if op == "neg" else None
    table: Mapping[str, Callable[[float], float]] = {
        "neg": lambda v: -v,
        "abs": abs,
        "floor": lambda v: type(v)(math.floor(v)),
        "ceil": lambda v: type(v)(math.ceil(v)),
        "round": lambda v: type(v)(round(v)),
        "trunc": lambda v: type(v)(math.trunc(v)),
        "sqrt": lambda v: math.sqrt(v) if v >= 0 else math.nan,
    }
    return table[op](x) if op in table and math.isfinite(x) else None


def _binary(op: str, a: SymbolicValue, b: SymbolicValue, is_float: bool) -> SymbolicValue | None:
    if isinstance(a, bool) and isinstance(b, bool):
        return {"and": a and b, "or": a or b, "xor": a != b, "eq": a == b, "ne": a != b}.get(op)
    left, right = _exact(a), _exact(b)
    if left is None or right is None:
        return None
    (p, q), (r, t) = left, right
    if op in ("add", "sub"):
        sign = 1 if op == "add" else -1
        return _value(p * t + sign * (r * q), q * t, is_float)
    if op == "mul":
        return _value(p * r, q * t, is_float)
    if op == "div":
        if is_float:
            return _quotient(p * t, q * r)
        if r == 0:
            return None
        if isinstance(p, int) and isinstance(r, int):
            return abs(p) // abs(r) * (1 if (p < 0) == (r < 0) else -1)
        return _truncated(p, r) if isinstance(r, int) or known_le(0, r) else None
    if op == "rem" and not is_float and known_le(0, p) and known_le(0, r) and r != 0:
        return p - r * floordiv(p, r)
    if op == "pow" and is_float and isinstance(p, int) and isinstance(r, int) and p >= 0:
        return _power(p / q, r / t)
    if op in ("min", "max") and q == t:
        return _value((dim_min if op == "min" else dim_max)(p, r), q, is_float)
    if op in s.COMPARISONS:
        return _compare(op, p * t, r * q)
    return None


def _power(base: float, exponent: float) -> float | None:
    try:
        return float(base**exponent)
    except (OverflowError, ZeroDivisionError):
        return None


def _truncated(p: Dim, r: Dim) -> Dim:
    """p / r rounded towards zero, as integers are divided, r being positive or a number."""
    if isinstance(r, int) and r < 0:
        p, r = -p, -r
    if known_le(p, 0):
        return -floordiv(-p, r)
    if not known_le(0, p):
        # Sizes are computed by way of differences that are positive whenever the sizes are.
        assume_equal(dim_min(p, 0), 0, "a difference of sizes that is divided")
    return floordiv(p, r)


def _quotient(numerator: Dim, denominator: Dim) -> SymbolicValue | None:
    """A float that is the ratio of two dims, where that is a number, a dim, or a dim over a number."""
    if isinstance(denominator, int):
        return _value(numerator, denominator, True)
    whole, part = divide_exactly(numerator, denominator), divide_exactly(denominator, numerator)
    if whole is not None:
        return _value(whole, 1, True)
    return 1 / part if isinstance(part, int) and part else None


def _value(numerator: Dim, denominator: Dim, is_float: bool) -> SymbolicValue | None:
    if not isinstance(denominator, int):
        return None
    if not is_float and isinstance(numerator, int) and denominator == 1:
        return numerator  # not by way of a float, which has 53 bits
    result = _ratio(numerator, denominator)
    return int(result) if not is_float and isinstance(result, float) else result


def _compare(op: str, a: Dim, b: Dim) -> bool | None:
    if op in ("eq", "ne"):
        if a == b:
            return op == "eq"
        if known_le(a + 1, b) or known_le(b + 1, a):
            return op == "ne"
        # A symbolic size is never a negative number, the marker that exporters compare shapes with.
        return None
    strict = 1 if op == "lt" else 0
    if known_le(a + strict, b):
        return True
    return False if known_le(b + 1 - strict, a) else None
