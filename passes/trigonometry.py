"""sin, cos, tan and their inverses as arithmetic (see `passes.math`, which has the measured errors)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ..ir import scalars as s
from ..ir.dtypes import F32, F64, I64, U32, U64
from ..ir.scalars import Scalar, bitcast, select
from .float_arithmetic import choose, fma, horner, magnitude, quick_two_sum, shifted, sign_bit, two_product, with_sign
from .math_tables import ATAN, SIN_COS, TWO_OVER_PI, TWO_OVER_PI_BITS

_PI_2, _PI_2_LOW = math.pi / 2, 6.123233995736766e-17
_PI_4, _PI_4_LOW = math.pi / 4, 3.061616997868383e-17
_WORD = 0xFFFFFFFF


def _window(size: Scalar, limbs: int, levels: int, fraction: int) -> tuple[list[Scalar], Scalar, Scalar]:
    """The 32-bit limbs of the part of 2/pi that decides size*2/pi modulo 4, and the mantissa's low and high limb."""
    bits = bitcast(size, U64) if size.dtype == F64 else s.cast(bitcast(size, U32), U64)
    exponent = shifted(bits, "shr", fraction)
    mantissa = (bits & ((1 << fraction) - 1)) | (1 << fraction)
    # size = mantissa * 2^e: the bit of 2/pi whose product with the mantissa's lowest weighs 2^1 comes first.
    zeros = 64
    bias = (1 << (size.dtype.bits - fraction - 2)) - 1
    position = exponent - (bias + fraction + 2 - zeros)
    word, within = shifted(position, "shr", 5), position & 31
    count = (1 << levels) + limbs - 1
    entries: list[Scalar] = [
        s.const(TWO_OVER_PI >> max(TWO_OVER_PI_BITS + zeros - 32 * k - 64, 0) & (1 << 64) - 1, U64)
        for k in range(count)
    ]
    for level in reversed(range(levels)):
        taken = s.binary("ne", word & (1 << level), s.const(0, U64))
        entries = [select(taken, entries[k + (1 << level)], entries[k]) for k in range(limbs + (1 << level) - 1)]
    parts = [shifted(s.binary("shl", entry, within), "shr", 32) for entry in entries]
    return parts, mantissa & _WORD, shifted(mantissa, "shr", 32)


def _fraction(size: Scalar, limbs: int, levels: int, fraction: int) -> list[Scalar]:
    """size*2/pi modulo 4 in units of 2^62 below, as 64-bit words: the last limbs are only for the carries."""
    parts, low, high = _window(size, limbs, levels, fraction)
    carry: Scalar = s.const(0, U64)
    columns: list[Scalar] = []
    for k in reversed(range(limbs)):
        product = parts[k] * low
        total, above = (product & _WORD) + carry, shifted(product, "shr", 32)
        if fraction > 31 and k + 1 < limbs:
            other = parts[k + 1] * high
            total, above = total + (other & _WORD), above + shifted(other, "shr", 32)
        carry = above + shifted(total, "shr", 32)
        columns.insert(0, total & _WORD)
    return [shifted(columns[k], "shl", 32) | columns[k + 1] for k in range(0, limbs - limbs // 3, 2)]


def _reduced(x: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """(quadrant modulo 4, r, rest of r) in f64, with |x| = quadrant*pi/2 + r and |r| <= pi/4.

    After Payne & Hanek 1983. f32 has no rest. The product with 2/pi is made in integers, of just the bits that matter.
    """
    size = magnitude(x)
    words = _fraction(size, 3, 3, 23) if x.dtype == F32 else _fraction(size, 6, 6, 52)
    small = size < _PI_4
    quadrant = shifted(words[0] + (1 << 61), "shr", 62)
    signed = bitcast(words[0] - shifted(quadrant, "shl", 62), I64)
    quadrant = select(small, s.const(0, U64), quadrant)
    unit, unit_low = _PI_2 * 2.0**-62, _PI_2_LOW * 2.0**-62
    if x.dtype == F32:
        return quadrant, select(small, s.cast(size, F64), s.cast(signed, F64) * unit), s.const(0.0, F64)
    top = s.cast(signed & ~0x7FF, F64)
    below = fma(s.cast(words[1], F64), 2.0**-64, s.cast(signed & 0x7FF, F64))
    high, low = quick_two_sum(top, below)
    r, rest = two_product(high, s.const(unit, F64, high.lanes))
    rest = fma(low, unit, fma(high, unit_low, rest))
    return quadrant, select(small, size, r), choose(small, 0.0, rest)


def _sin_and_cos(r: Scalar, rest: Scalar) -> tuple[Scalar, Scalar]:
    """sin and cos of r + rest, |r| <= pi/4."""
    sin, cos = SIN_COS[r.dtype]
    square = r * r
    half = square * 0.5
    sine = r + fma(r * square, horner(square, sin), rest)
    near_one = 1 - half
    correction = fma(square * square, horner(square, cos), s.unary("neg", r * rest))
    return sine, near_one + (((1 - near_one) - half) + correction)


def _in_quadrant(x: Scalar, start: int) -> tuple[Scalar, Scalar]:
    """(sin or cos of |x| + start*pi/2, the quadrant)."""
    quadrant, r, rest = _reduced(x)
    quadrant = quadrant + start
    sine, cosine = _sin_and_cos(s.cast(r, x.dtype), s.cast(rest, x.dtype))
    odd = s.binary("ne", quadrant & 1, s.const(0, U64))
    value = select(odd, cosine, sine)
    negative = s.binary("ne", quadrant & 2, s.const(0, U64))
    value = select(negative, s.unary("neg", value), value)
    return choose(magnitude(x) < math.inf, value, math.nan), quadrant


def _sin(x: Scalar) -> Scalar:
    return with_sign(_in_quadrant(x, 0)[0], sign_bit(x))


def _cos(x: Scalar) -> Scalar:
    return _in_quadrant(x, 1)[0]


def _tan(x: Scalar) -> Scalar:
    quadrant, r, rest = _reduced(x)
    sine, cosine = _sin_and_cos(r, rest)  # In f64 for f32 too, where the quotient of two f32 were not exact enough.
    odd = s.binary("ne", quadrant & 1, s.const(0, U64))
    value = s.cast(select(odd, s.unary("neg", cosine), sine) / select(odd, sine, cosine), x.dtype)
    return choose(magnitude(x) < math.inf, with_sign(value, sign_bit(x)), math.nan)


def _atan(x: Scalar) -> Scalar:
    """By (x - 1)/(x + 1) in the middle and -1/x above (after Cephes)."""
    size = magnitude(x)
    above, middle = s.as_scalar(math.sqrt(2) + 1, F64) < size, s.as_scalar(math.sqrt(2) - 1, F64) < size
    numerator = choose(above, -1.0, select(middle, size - 1, size))
    denominator = select(above, size, choose(middle, size + 1, 1.0))
    z = numerator / denominator
    square = z * z
    zero = s.const(0, F64)
    start = choose(above, _PI_2, choose(middle, _PI_4, zero))
    start_low = choose(above, _PI_2_LOW, choose(middle, _PI_4_LOW, zero))
    return with_sign(start + (fma(z * square, horner(square, ATAN), start_low) + z), sign_bit(x))


def _asin(x: Scalar) -> Scalar:
    return _atan(x / s.unary("sqrt", (1 - x) * (1 + x)))


def _acos(x: Scalar) -> Scalar:
    return _atan(s.unary("sqrt", (1 - x) / (1 + x))) * 2


# asin, acos and atan are for f64 alone.
FUNCTIONS: Mapping[str, Callable[[Scalar], Scalar]] = {
    "sin": _sin, "cos": _cos, "tan": _tan, "asin": _asin, "acos": _acos, "atan": _atan,
}  # fmt: skip
