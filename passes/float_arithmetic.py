"""What expressions of floats are built from: polynomials, signs, bits, exact sums and products."""

from __future__ import annotations

from ..ir import scalars as s
from ..ir.dtypes import F32, F64, U32, U64
from ..ir.scalars import Scalar, ScalarLike, bitcast, select


def fma(a: ScalarLike, b: ScalarLike, c: ScalarLike) -> Scalar:
    """a*b + c, with numbers as literals."""
    dtype = next(value.dtype for value in (a, b, c) if isinstance(value, Scalar))
    return s.fma(s.as_scalar(a, dtype), s.as_scalar(b, dtype), s.as_scalar(c, dtype))


def horner(x: Scalar, coefficients: tuple[float, ...]) -> Scalar:
    """The polynomial with the given coefficients, the lowest power first."""
    result: ScalarLike = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        result = fma(result, x, coefficient)
    return s.as_scalar(result, x.dtype)


def choose(condition: Scalar, yes: ScalarLike, no: ScalarLike) -> Scalar:
    """`select` that takes numbers for one or both sides, f32 or f64 as the other is."""
    dtype = next(value.dtype for value in (yes, no) if isinstance(value, Scalar))
    return select(condition, s.as_scalar(yes, dtype), s.as_scalar(no, dtype))


def magnitude(x: Scalar) -> Scalar:
    return s.unary("abs", x)


def sign_bit(x: Scalar) -> Scalar:
    """The bits of x but for its sign 0."""
    return bitcast(x, U64 if x.dtype == F64 else U32) & (1 << (x.dtype.bits - 1))


def with_sign(size: Scalar, sign: Scalar) -> Scalar:
    """A number that is not negative, with a sign from `sign_bit`; the sign of a negative one is turned."""
    return bitcast(bitcast(size, sign.dtype) ^ sign, size.dtype)


def at_most(x: Scalar, limit: float) -> Scalar:
    """min(x, limit), NaN where x is: spelt so that it is one instruction of x86."""
    return choose(s.as_scalar(limit, x.dtype) < x, limit, x)


def at_least(x: Scalar, limit: float) -> Scalar:
    return choose(x < limit, limit, x)


def shifted(bits: Scalar, op: str, count: int) -> Scalar:
    return s.binary(op, bits, s.const(count, bits.dtype))


def two_product(a: Scalar, b: Scalar) -> tuple[Scalar, Scalar]:
    """(p, e) with p = round(a*b) and p + e = a*b exactly, in f64, whether Fma rounds once or twice (after Dekker)."""
    product = a * b
    mask = 0xFFFFFFFFF8000000
    a_high, b_high = (bitcast(bitcast(x, U64) & mask, F64) for x in (a, b))
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def quick_two_sum(a: Scalar, b: Scalar) -> tuple[Scalar, Scalar]:
    """(t, e) with t = round(a + b) and t + e = a + b exactly, for |a| >= |b|."""
    total = a + b
    return total, b - (total - a)


def odd_f32(x: Scalar) -> Scalar:
    """f64 to f32 rounded to odd, which makes a second rounding to a narrower type exact."""
    nearest = s.Cast(F32, x.lanes, x)
    wide = s.cast(nearest, F64)
    bits = bitcast(nearest, U32)
    too_far = s.unary("abs", x) < s.unary("abs", wide)
    toward_zero = bits - select(too_far, s.const(1, U32, x.lanes), s.const(0, U32, x.lanes))
    exact = wide.equal(x) | s.unary("isnan", x)
    return bitcast(select(exact, bits, toward_zero | 1), F32)
