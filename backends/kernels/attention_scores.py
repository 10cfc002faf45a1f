"""The scores of an attention as an expression over one product: what a kernel evaluates, and what it may leave out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...ir import scalars as s
from ...ir.dims import Dim, Opaque, atoms, dim_max, dim_min, known_le, linear, substitute
from ...ir.dtypes import BF16, BOOL, F16, F32, I64, DType
from ...ir.scalars import Scalar
from ...ir.tensors import all_of

PRODUCT = "product"
"""The tensor whose elements are the products of queries and keys."""
QUERY, KEY = "query", "key"
"""Symbols of a score's place."""
MODERATE = 1e4
"""Numbers up to which exponents of 2 may be scaled before they are subtracted."""
DECISIVE = -1e30
"""What is added to or stands for scores below this leaves nothing of them beside any score of a model."""
LOG2_E = math.log2(math.e)
LOWEST = -math.inf
_HALF = (F16, BF16)


@dataclass(frozen=True)
class Bound:
    """A limit of the keys, as a dim over QUERY, in which it rises or not."""

    limit: Dim
    rises: bool

    def over(self, first: Dim, last: Dim, greatest: bool) -> Dim:
        """The greatest or least limit of the queries from `first` to `last`."""
        return substitute(self.limit, {QUERY: last if greatest == self.rises else first})


@dataclass(frozen=True)
class Score:
    """`value` times the positive number `scale` is the score.

    Both are f32; `value` is over `Element(PRODUCT, ...)` and the symbols QUERY and KEY. `moderate`: what is added to
    products is not large, but for -inf. Only keys from `starts` on and below `ends` can have another score than -inf;
    those have the score `seen`.
    """

    value: Scalar
    scale: float
    moderate: bool
    starts: tuple[Bound, ...] = ()
    ends: tuple[Bound, ...] = ()
    seen: Scalar | None = None

    @property
    def reads(self) -> frozenset[str]:
        """Symbols on which it depends what is read from memory."""
        loads = [part for part in s.walk(self.value) if isinstance(part, s.Load)]
        return frozenset(name for load in loads for name in load.free)

    def first_key(self, first: Dim, last: Dim) -> Dim:
        """The least key that counts for queries from `first` to `last`."""
        return dim_max(0, *(bound.over(first, last, False) for bound in self.starts))

    def end_key(self, first: Dim, last: Dim, keys: Dim) -> Dim:
        """The key from which on none counts for queries from `first` to `last`."""
        return dim_min(keys, *(bound.over(first, last, True) for bound in self.ends))

    def is_seen(self, first: Dim, last: Dim, key: Dim, end: Dim) -> Scalar:
        """Whether all keys from `key` to before `end` count for all of the queries."""
        starts = [s.index(bound.over(first, last, True)) <= s.index(key) for bound in self.starts]
        ends = [s.index(end) <= s.index(bound.over(first, last, False)) for bound in self.ends]
        return all_of([*starts, *ends])


def with_product(value: Scalar, product: Scalar) -> Scalar:
    """An expression of a score for a product that is known."""
    return s.Rewriter(lambda part: product if isinstance(part, s.Element) and part.tensor == PRODUCT else None)(value)


def number(value: float) -> Scalar:
    return s.const(value, F32)


def base_of(score: Score, greatest: Scalar) -> Scalar:
    """What the scores of a row are compared with; 0 for a row that has none yet, whose weights are all 0 then."""
    found = s.select(greatest.equal(LOWEST), number(0), greatest)
    return found * number(score.scale * LOG2_E) if score.moderate else found


def power(score: Score, value: Scalar, base: Scalar) -> Scalar:
    """e to a score less the greatest one. Large numbers must be subtracted before they are scaled: what rounding leaves
    of their difference would be large too."""
    factor = number(score.scale * LOG2_E)
    return s.unary("exp2_estimate", s.fma(value, factor, -base) if score.moderate else (value - base) * factor)


def score_of(value: Scalar) -> Score:
    """What is known of the expression `value` of a score, of a float type."""
    wide = _Widened()(value)
    value, scale = _factored(wide)
    starts: list[Bound] = []
    ends: list[Bound] = []
    rest = wide
    for test in _comparisons(wide):
        for holds in (True, False):
            bound = _bound(test, not holds) if _is_masked(wide, test, holds) else None
            if bound is not None:
                (starts if bound[1] else ends).append(bound[0])
                rest = _Assuming(test, not holds)(rest)
    seen, same = _factored(rest)
    if same != scale:
        seen = rest
    known = (starts or ends) and (same == scale or scale == 1)
    return Score(value, scale or 1.0, _is_moderate(value), tuple(starts), tuple(ends), seen if known else None)


class _Widened(s.Rewriter):
    """Halves as f32: they are read and explicitly converted as before, but arithmetic rounds no more than any in f32:
    what is never stored need not be rounded at each operator (`ir.rounding`)."""

    def rebuild(self, scalar: Scalar) -> Scalar:
        if isinstance(scalar, s.Cast) and scalar.dtype in _HALF:
            if isinstance(scalar.operand, s.Cast) and scalar.operand.operand.dtype == scalar.dtype:
                return self(scalar.operand.operand)
            return s.cast(_rounded(self(scalar.operand), scalar.dtype), F32)
        if scalar.dtype not in _HALF:
            return super().rebuild(scalar)
        if isinstance(scalar, s.Const):
            return s.const(scalar.value, F32)
        if isinstance(scalar, s.Element):
            return s.Element(F32, 1, scalar.tensor, scalar.indices)
        rebuilt = super().rebuild(scalar)
        return s.cast(rebuilt, F32) if isinstance(scalar, s.Load) else rebuilt


def _rounded(value: Scalar, dtype: DType) -> Scalar:
    """The value converted to a half type; of a literal, a literal."""
    if not isinstance(value, s.Const):
        return s.cast(value, dtype)
    with np.errstate(over="ignore"):
        return s.const(float(np.asarray(value.value).astype(dtype.numpy)), dtype)


def _factored(value: Scalar) -> tuple[Scalar, float | None]:
    """(rest, factor) with value = rest * factor, as far as factors are positive numbers; None for what any factor
    leaves as it is or as good, 0 and what is DECISIVE."""
    if isinstance(value, s.Const) and (value.value == 0 or value.value <= DECISIVE):
        return value, None
    if isinstance(value, s.Binary) and value.op in ("mul", "div"):
        for number, other in ((value.right, value.left), (value.left, value.right)):
            if (
                isinstance(number, s.Const)
                and 0 < number.value < math.inf
                and (value.op == "mul" or number is value.right)
            ):
                rest, factor = _factored(other)
                own = float(number.value) if value.op == "mul" else 1 / number.value
                return rest, None if factor is None else factor * own
    if isinstance(value, s.Select):
        parts = [_factored(part) for part in (value.yes, value.no)]
    elif isinstance(value, s.Binary) and value.op == "add":
        parts = [_factored(part) for part in (value.left, value.right)]
    else:
        return value, 1.0
    factors = {factor for _, factor in parts if factor is not None}
    if len(factors) > 1:
        return value, 1.0
    (one, _), (other, _) = parts
    rest = s.select(value.condition, one, other) if isinstance(value, s.Select) else s.binary("add", one, other)
    return rest, factors.pop() if factors else None


def _is_moderate(value: Scalar) -> bool:
    """Whether no number in it is large but -inf, and none comes from memory."""
    if isinstance(value, s.Const):
        return abs(value.value) <= MODERATE or value.value == -math.inf
    if isinstance(value, s.Load | s.Cast):
        return False
    parts = (value.yes, value.no) if isinstance(value, s.Select) else value.children
    return all(map(_is_moderate, parts))


# What masks leave out.


def _comparisons(value: Scalar) -> Iterator[s.Binary]:
    """Comparisons of indices in which the key occurs."""
    for part in s.walk(value):
        if isinstance(part, s.Binary) and part.op in ("lt", "le") and part.left.dtype == I64 and part.mentions(KEY):
            yield part


def _is_masked(value: Scalar, test: s.Binary, holds: bool) -> bool:
    """Whether a score counts for nothing where the test gives this."""
    found = _Assuming(test, holds)(value)
    if not isinstance(found, s.Const):
        return False
    if found.value == -math.inf:
        return True
    # A large number instead is as good where another key has a score that is no such number.
    other = _Assuming(test, not holds)(value)
    plain = not any(isinstance(part, s.Load | s.Select) for part in s.walk(other))
    bound = _bound(test, not holds)
    sees = bound is not None and not bound[1] and bound[0].rises and known_le(1, bound[0].over(0, 0, True))
    return found.value <= DECISIVE and plain and sees


def _bound(test: s.Binary, holds: bool) -> tuple[Bound, bool] | None:
    """The keys for which a comparison gives `holds`: from a limit on (True) or below it (False). None where that limit
    is not the same along the way of a query."""
    least = 0 if test.op == "le" else 1
    split = linear(s.as_dim(test.right) - s.as_dim(test.left), KEY)
    if split is None or split[0] not in (1, -1):
        return None
    sign, rest = split  # the test holds where sign * key + rest >= least
    limit = least - rest if sign == 1 else rest - least + 1
    along = linear(limit, QUERY)
    read = [atom.value for atom in atoms(limit) if isinstance(atom, Opaque)]
    if any(isinstance(value, Scalar) and value.mentions(QUERY) for value in read):
        return None
    if along is None or not isinstance(along[0], int):
        return None
    return Bound(limit, along[0] >= 0), (sign == 1) == holds


def _follows(test: s.Binary, known: s.Binary, holds: bool) -> bool | None:
    """What a comparison gives where another one gives `holds`; None where both are possible."""
    given, asked = _bound(known, holds), _bound(test, True)
    if given is None or asked is None:
        return None
    (mine, from_on), (limit, wants_from_on) = (given[0].limit, given[1]), (asked[0].limit, asked[1])
    if from_on == wants_from_on:
        return True if known_le(*((limit, mine) if from_on else (mine, limit))) else None
    return False if known_le(*((limit, mine) if from_on else (mine, limit))) else None


class _Assuming(s.Rewriter):
    """An expression in which a test is known; what -inf is added to or multiplied with is -inf."""

    def __init__(self, test: s.Binary, holds: bool) -> None:
        super().__init__()
        self._test, self._holds = test, holds

    def rebuild(self, scalar: Scalar) -> Scalar:
        if scalar == self._test:
            return s.const(self._holds, BOOL)
        if isinstance(scalar, s.Binary) and scalar.op in ("lt", "le") and scalar.left.dtype == I64:
            known = _follows(scalar, self._test, self._holds)
            if known is not None:
                return s.const(known, BOOL)
        found = super().rebuild(scalar)
        if isinstance(found, s.Cast) and found.dtype in _HALF:
            return _rounded(found.operand, found.dtype)
        if isinstance(found, s.Binary) and found.dtype == F32:
            parts = found.left, found.right
            numbers = [part.value for part in parts if isinstance(part, s.Const)]
            if found.op in ("add", "min") and any(number <= DECISIVE for number in numbers):
                return s.const(min(numbers), F32)
            if found.op == "mul" and -math.inf in numbers and max(numbers) > 0:
                return s.const(-math.inf, F32)
            if found.op == "mul" and 0 in numbers and all(map(_is_finite, parts)):
                return s.const(0, F32)
            if found.op == "add" and 0 in numbers:
                return next((part for part in parts if not (isinstance(part, s.Const) and part.value == 0)), parts[0])
        return found


def _is_finite(value: Scalar) -> bool:
    """Whether a value is one of some finite numbers."""
    if isinstance(value, s.Const):
        return math.isfinite(value.value)
    return isinstance(value, s.Select) and _is_finite(value.yes) and _is_finite(value.no)
