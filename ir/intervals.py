"""Bounds of integer expressions: what an index that arithmetic gives can be at most and at least."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from . import scalars as s
from .dims import Dim, bounds, dim_max, dim_min
from .scalars import Scalar

Interval: TypeAlias = tuple[int | None, Dim | None]
"""Least and greatest value, None where that is not known."""

OPEN: Interval = (None, None)
_LARGEST = 1 << 61
"""What sums and products of sizes never reach."""


def interval(value: Scalar, loaded: Callable[[str], Interval]) -> Interval:
    """The bounds of an integer expression; `loaded` gives those of the elements of a buffer, by name."""
    found = _interval(value, loaded)
    if not value.dtype.is_integer:
        return OPEN
    low, high = (int(limit) for limit in value.dtype.limits)
    return _within(found, low, high) if value.dtype.bits < 64 else _within(found, -_LARGEST, _LARGEST)


def _within(found: Interval, low: int, high: int) -> Interval:
    """Bounds that arithmetic of a type keeps: where it may wrap round, nothing is known but the type's own."""
    least, greatest = found
    ends = [end for end in (least, greatest) if isinstance(end, int)]
    own: Interval = OPEN if high == _LARGEST else (low, high)
    wide = greatest is not None and not isinstance(greatest, int) and high < _LARGEST
    if wide or any(not low <= end <= high for end in ends):
        return own
    return (own[0] if least is None else least), (own[1] if greatest is None else greatest)


def _interval(value: Scalar, loaded: Callable[[str], Interval]) -> Interval:
    if isinstance(value, s.Const):
        return (int(value.value), int(value.value)) if not value.dtype.is_float else OPEN
    if isinstance(value, s.Index):
        low, _ = bounds(value.dim)
        return low, value.dim if not _varies(value.dim) else bounds(value.dim)[1]
    if isinstance(value, s.Load):
        return loaded(value.buffer.name)
    if isinstance(value, s.Cast):
        return interval(value.operand, loaded) if value.operand.dtype.is_integer else OPEN
    if isinstance(value, s.Select):
        return _select(value, loaded)
    if isinstance(value, s.Binary):
        return _binary(value, interval(value.left, loaded), interval(value.right, loaded))
    return OPEN


def _varies(dim: Dim) -> bool:
    return any(name.startswith(PROBE) for name in s.free_symbols(dim))


PROBE = "?"
"""Begins the names of indices at which a tensor's element is looked at."""


def _select(value: s.Select, loaded: Callable[[str], Interval]) -> Interval:
    yes, no = value.yes, value.no
    if isinstance(no, s.Binary) and no.op == "rem" and isinstance(yes, s.Binary) and yes.op == "add":
        # rest + divisor where their signs differ, else rest: the remainder with the divisor's sign.
        low, high = interval(no.right, loaded)
        if no.digest == yes.left.digest and no.right.digest == yes.right.digest and low is not None and low > 0:
            return 0, None if high is None else high - 1
    return union(interval(yes, loaded), interval(no, loaded))


def union(one: Interval, other: Interval) -> Interval:
    """The bounds of what lies in one of two intervals."""
    (a, b), (c, d) = one, other
    return None if a is None or c is None else min(a, c), None if b is None or d is None else dim_max(b, d)


def _binary(value: s.Binary, left: Interval, right: Interval) -> Interval:
    (a, b), (c, d) = left, right
    if value.op == "add":
        return None if a is None or c is None else a + c, None if b is None or d is None else b + d
    if value.op == "sub":
        return (a - d if a is not None and isinstance(d, int) else None), None if b is None or c is None else b - c
    if value.op == "min":
        low = None if a is None or c is None else min(a, c)
        return low, d if b is None else b if d is None else dim_min(b, d)
    if value.op == "max":
        low = c if a is None else a if c is None else max(a, c)
        return low, None if b is None or d is None else dim_max(b, d)
    if not (isinstance(a, int) and isinstance(c, int) and isinstance(d, int)):
        return OPEN
    if value.op == "mul" and isinstance(b, int):
        ends = [a * c, a * d, b * c, b * d]
        return min(ends), max(ends)
    if value.op == "rem" and c > 0:  # with the sign of the left
        return (0 if a >= 0 else 1 - d), d - 1
    return OPEN
