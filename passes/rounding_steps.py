"""What QuantizeLinear does to each element, in a few instructions: divide, round, move to the zero point, saturate.

`cast(min(max(round(x / scale) + zero, low), high))` is computed the other way round, with the same bits: first `x` is
limited to what the range of the result allows (NaN becomes its lowest value), so that everything after is finite.

- A division by a constant is a multiplication by its reciprocal and two fused multiply-adds, which give the correctly
  rounded quotient where nothing overflows or underflows (P. Markstein, "Computation of elementary functions on the IBM
  RISC System/6000 processor", 1990; N. Brisebarre, J.-M. Muller and S. K. Raina, "Accelerating correctly rounded
  floating-point division when the divisor is known in advance", 2004). Targets without them divide.
- Adding 1.5 * 2^23 rounds an f32 to an integer, half to even, which then stands in the lowest bits.

Numbers are arrays here: of one element, or for a literal of several kernels (`scalars.Varying`) of one for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from ..ir import loops
from ..ir import scalars as s
from ..ir.dtypes import F32, I8, I16, I32, U8, U16, DType
from ..ir.loops import Kernel
from ..ir.scalars import Rewriter, Scalar, bitcast, const

NARROW = (I8, U8, I16, U16)
WHOLE = 1.5 * 2.0**23
WHOLE_BITS = 0x4B400000
NOTHING = np.zeros(1)
LARGEST = 1 << 17
"""Quotients are limited to less: with a scale's rounding they are still whole numbers in f32."""
SCALES = 2.0**-64, 2.0**64
"""Constants by which is divided; with them no step of the division leaves the normal numbers but for results of 0."""


@dataclass(frozen=True)
class Steps:
    """round(value) + zero within [low, high]; `whole` is the integer zero point where it is not a number."""

    value: Scalar
    low: np.ndarray
    high: np.ndarray
    zero: np.ndarray
    whole: Scalar | None = None


def round_in_steps(kernel: Kernel, fma: bool) -> Kernel:
    """`kernel` with its quantizing expressions in their fast form, in any number of lanes."""
    return replace(kernel, body=loops.rebuild(kernel.body, _Steps(fma)))


class _Steps(Rewriter):
    def __init__(self, fma: bool) -> None:
        super().__init__()
        self.fma = fma
        self.narrowed: set[bytes] = set()
        self.sizes: dict[bytes, float] = {}
        self.reals: dict[bytes, tuple[Scalar, np.ndarray]] = {}

    def rebuild(self, scalar: Scalar) -> Scalar:
        result = super().rebuild(scalar)
        wider = isinstance(result, s.Cast) and isinstance(result.operand, s.Cast) and result.dtype in (I32, F32)
        if wider and result.operand.digest in self.narrowed:  # type: ignore[attr-defined]
            return s.cast(result.operand.operand, result.dtype)  # type: ignore[attr-defined]  # dequantized at once
        if isinstance(result, s.Cast) and result.dtype == F32 and result.operand.dtype == I32:
            return self._real(result.operand) or result
        if isinstance(result, s.Cast) and result.dtype in NARROW and result.operand.dtype == F32:
            steps = _matched(result.operand)
            if steps is not None:
                whole = self._rounded(steps)
                self.sizes[whole.digest] = max(_most(steps.low), _most(steps.high))
                result = s.cast(whole, result.dtype)
                self.narrowed.add(result.digest)
        return result

    def _real(self, whole: Scalar) -> Scalar | None:
        """A rounded integer, perhaps less a constant, as a real: what was added to round it is taken off as one."""
        less = _integer(whole.right) if isinstance(whole, s.Binary) and whole.op == "sub" else None
        if less is not None and isinstance(whole, s.Binary) and whole.left.digest in self.reals:
            total, base = self.reals[whole.left.digest]
        elif whole.digest in self.reals:
            less, (total, base) = NOTHING, self.reals[whole.digest]
        else:
            return None
        if _most(less) >= LARGEST:
            return None
        result = total - literal(base + less, F32, total.lanes)
        self.sizes[result.digest] = size(whole, self.sizes)
        return result

    def _rounded(self, steps: Steps) -> Scalar:
        """The integer, i32."""
        lanes = steps.value.lanes
        least, most = steps.low - steps.zero, steps.high - steps.zero
        limits: tuple[Scalar, Scalar] = literal(least, F32, lanes), literal(most, F32, lanes)
        value, divisor = steps.value, _divisor(steps.value)
        if size(value, self.sizes) < LARGEST and steps.whole is None:
            # Limited as an integer, which packing instructions do themselves.
            if divisor is not None and isinstance(value, s.Binary) and self.fma:
                value = _quotient(value.left, divisor)
            bits = s.cast(s.unary("round", value), I32)
            if steps.zero.any():
                bits = bits + literal(steps.zero, I32, lanes)
            limits = literal(steps.low, I32, lanes), literal(steps.high, I32, lanes)
            return s.binary("min", s.binary("max", bits, limits[0]), limits[1])
        if steps.whole is not None:
            moved = s.cast(steps.whole, F32)
            value = _limited(value, limits[0] - moved, limits[1] - moved)
        elif divisor is None:
            value = _limited(value, *limits)
        else:
            assert isinstance(value, s.Binary)
            ends = (literal((limit * divisor).astype(np.float32), F32, lanes) for limit in (least, most))
            x = _limited(value.left, *ends)
            value = _quotient(x, divisor) if self.fma else s.binary("div", x, value.right)
        total = value + const(WHOLE, F32, lanes)
        bits = bitcast(total, I32)
        if steps.whole is not None:
            return bits - const(WHOLE_BITS, I32, lanes) + s.cast(steps.whole, I32)
        result = bits - literal(WHOLE_BITS - steps.zero, I32, lanes)
        self.reals[result.digest] = total, WHOLE - steps.zero
        return result


def saturating(value: Scalar, fma: bool, sizes: Mapping[bytes, float]) -> tuple[Scalar, bool] | None:
    """An i32 of which `value`, quantized to 8 bits, is the saturation, and whether that is because no more is to be
    limited; None where it is no quantized value. `sizes` are as of `size`."""
    steps = _Steps(fma)
    steps.sizes.update(sizes)
    if not (isinstance(value, s.Cast) and value.dtype in (I8, U8) and value.operand.dtype == F32):
        return None
    found = _matched(steps(value.operand))
    if found is None:
        return None
    result, (low, high) = steps._rounded(found), value.dtype.limits
    if isinstance(result, s.Binary) and result.op == "min" and (found.low == low).all() and (found.high == high).all():
        assert isinstance(result.left, s.Binary)
        return result.left.left, True
    return result, False


def literal(numbers: np.ndarray, dtype: DType, lanes: int) -> Scalar:
    """Numbers as a literal."""
    return s.varying(numbers.tolist(), dtype, lanes)


def _limited(x: Scalar, least: Scalar, most: Scalar) -> Scalar:
    """`x` within limits, the lower one where it is NaN: two instructions."""
    x = s.select(least < x, x, least)
    return s.select(x < most, x, most)


def _quotient(x: Scalar, divisor: np.ndarray) -> Scalar:
    """x / divisor, correctly rounded."""
    inverse = literal(np.float32(1) / divisor.astype(np.float32), F32, x.lanes)
    estimate = x * inverse
    rest = s.fma(estimate, literal(-divisor, F32, x.lanes), x)
    return s.fma(rest, inverse, estimate)


def _divisor(value: Scalar) -> np.ndarray | None:
    """The constant by which a quotient divides."""
    divisor = _number(value.right) if isinstance(value, s.Binary) and value.op == "div" else None
    return divisor if divisor is not None and ((SCALES[0] <= divisor) & (divisor <= SCALES[1])).all() else None


def _most(numbers: np.ndarray) -> float:
    """The greatest magnitude."""
    return float(np.abs(numbers).max())


def size(value: Scalar, sizes: Mapping[bytes, float] = MappingProxyType({})) -> float:
    """What the magnitude of a finite value is at most; infinity where nothing is known, or where it might be NaN.

    `sizes` are known of expressions, by digest.
    """
    if value.digest in sizes:
        return sizes[value.digest]
    number = _number(value)
    if number is not None:
        return _most(number)
    if isinstance(value, s.Broadcast):
        return size(value.operand, sizes)
    if isinstance(value, s.Select):
        return max(size(value.yes, sizes), size(value.no, sizes))
    if isinstance(value, s.Cast) and value.dtype in (F32, I32):
        return size(value.operand, sizes)
    if isinstance(value, s.Binary) and value.dtype in (F32, I32):
        left, right = size(value.left, sizes), size(value.right, sizes)
        if value.op in ("add", "sub"):
            return left + right
        if value.op == "mul":
            return left * right if math.inf not in (left, right) else math.inf
        if value.op in ("min", "max"):
            return max(left, right)
        divisor = _number(value.right)
        if value.op == "div" and value.dtype == F32 and divisor is not None and divisor.all():
            return left / float(np.abs(divisor).min())
    if value.dtype.is_integer and value.dtype.bits <= 16:
        return max(abs(limit) for limit in value.dtype.limits)
    return math.inf


def _matched(limited: Scalar) -> Steps | None:
    """min(max(round(value) + zero, low), high), in any order of the operands."""
    outer = _with_number(limited, "min")
    inner = _with_number(outer[0], "max") if outer is not None else None
    if outer is None or inner is None:
        return None
    (whole, low), high = inner, outer[1]
    zero, point = NOTHING, None
    if isinstance(whole, s.Binary) and whole.op == "add":
        for one, other in ((whole.left, whole.right), (whole.right, whole.left)):
            found = _number(other)
            if found is not None:
                whole, zero = one, found
                break
            if isinstance(other, s.Cast | s.Broadcast) and _whole_number(other) is not None:
                whole, point = one, _whole_number(other)
                break
    if not (isinstance(whole, s.Unary) and whole.op == "round" and whole.dtype == F32):
        return None
    numbers = np.concatenate((low, high, zero, low - zero, high - zero))
    small = bool((numbers == np.trunc(numbers)).all()) and _most(numbers) < LARGEST
    return Steps(whole.operand, low, high, zero, point) if small and (low <= high).all() else None


def _whole_number(value: Scalar) -> Scalar | None:
    """The narrow integer that was made a float."""
    if isinstance(value, s.Broadcast):
        found = _whole_number(value.operand)
        return None if found is None else s.widen(found, value.lanes)
    return value.operand if isinstance(value, s.Cast) and value.operand.dtype in NARROW else None


def _with_number(value: Scalar, op: str) -> tuple[Scalar, np.ndarray] | None:
    if not (isinstance(value, s.Binary) and value.op == op and value.dtype == F32):
        return None
    for one, other in ((value.left, value.right), (value.right, value.left)):
        number = _number(other)
        if number is not None:
            return one, number
    return None


def _integer(scalar: Scalar) -> np.ndarray | None:
    """The value of a literal, perhaps in a wider type of integers."""
    while isinstance(scalar, s.Broadcast | s.Cast) and scalar.dtype.is_integer:
        scalar = scalar.operand
    return _values(scalar) if scalar.dtype.is_integer else None


def _number(scalar: Scalar) -> np.ndarray | None:
    found = _values(scalar.operand if isinstance(scalar, s.Broadcast) else scalar)
    return found if found is not None and np.isfinite(found).all() else None


def _values(scalar: Scalar) -> np.ndarray | None:
    """The numbers that a literal stands for."""
    if isinstance(scalar, s.Const):
        return np.array([scalar.value], np.float64)
    return np.array(scalar.values, np.float64) if isinstance(scalar, s.Varying) else None
