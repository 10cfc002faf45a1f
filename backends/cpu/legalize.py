"""Scalar expressions in terms of what the target has: no operation may become a call of a library function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...ir import scalars as s
from ...ir.dtypes import BF16, BOOL, F16, F32, F64, I32, I64, U16, U32, U64, DType
from ...ir.intrinsics import LOOKUP
from ...ir.scalars import Scalar
from ...ir.target import Target
from . import packs
from .dot_products import find, split

_BITS: Mapping[DType, DType] = {F32: U32, F64: U64}
_MANTISSA: Mapping[DType, int] = {F32: 23, F64: 52}


@dataclass(frozen=True, eq=False)
class Given(Scalar):
    """A value that is already in an SSA register."""

    text: str


def like(value: s.Number, scalar: Scalar) -> Scalar:
    """A literal of the type and lanes of another expression."""
    return s.const(value, scalar.dtype, scalar.lanes)


def known_constant(scalar: Scalar) -> s.Number | None:
    """The value of a literal, or of a literal in every lane."""
    if isinstance(scalar, s.Broadcast):
        scalar = scalar.operand
    return scalar.value if isinstance(scalar, s.Const) else None


def expand(scalar: Scalar, target: Target) -> Scalar | None:
    """`scalar` by other operations, where the target has none for it; those may need expanding too. Else None."""
    if isinstance(scalar, s.Unary):
        if scalar.op in _ROUNDINGS and target.architecture == "x86_64" and not target.has("sse4.1"):
            return _round(scalar.op, scalar.operand)
        if scalar.op == "reciprocal_estimate":
            return s.binary("div", like(1, scalar), scalar.operand)
        if scalar.op == "exp2_estimate":
            return _power_of_two(scalar.operand)
    elif isinstance(scalar, s.Binary):
        if scalar.left.dtype.is_integer and scalar.op in ("div", "rem", "shl", "shr"):
            return _guarded_integer(scalar.op, scalar.left, scalar.right)
        if scalar.left.dtype.is_float and scalar.op == "rem":
            return _remainder(scalar.left, scalar.right)
    elif isinstance(scalar, s.Fma):
        if not target.fma or not scalar.dtype.is_float:
            return s.binary("add", s.binary("mul", scalar.a, scalar.b), scalar.c)
    elif isinstance(scalar, s.Cast):
        return _float_to_integer(scalar.operand, scalar.dtype)
    elif isinstance(scalar, s.Horizontal) and scalar.operand.lanes > 1 and scalar.dtype != BOOL:
        if scalar.op == "add" and scalar.dtype.is_integer:
            return None  # in any order; LLVM 22 makes one quarter of the sum of a tree behind bytes that it multiplies
        return _horizontal(scalar.op, scalar.operand)
    elif isinstance(scalar, s.Call) and scalar.name in packs.PACKS:
        return None if packs.instructions(scalar, target) else packs.spelt_out(scalar)
    elif isinstance(scalar, s.Call) and scalar.name != LOOKUP and find(scalar, target) is None:
        return split(scalar, target)
    return None


# 2^r = 1 + r p(r) for |r| <= 1/2, to 9e-8 of the result.
_POWER = (0.693147004, 0.240222424, 0.0555073358, 0.009671513, 0.00132647273)
_WHOLE = 1.5 * 2.0**23
"""Added to an f32, it leaves the nearest integer in the lowest bits."""


def _power_of_two(x: Scalar) -> Scalar:
    """2^x of f32 below 128, with 0 for what is subnormal."""
    low = like(-127.0, x)
    x = s.select(s.binary("lt", x, low), low, x)
    magic = like(_WHOLE + 127, x)
    shifted = s.binary("add", x, magic)
    r = s.binary("sub", x, s.binary("sub", shifted, magic))
    value = like(_POWER[-1], x)
    for coefficient in (*_POWER[-2::-1], 1.0):
        value = s.fma(value, r, like(coefficient, x))
    bits = s.binary("shl", s.bitcast(shifted, U32), s.const(_MANTISSA[F32], U32, x.lanes))
    return s.binary("mul", value, s.bitcast(bits, F32))


def _horizontal(op: str, vector: Scalar) -> Scalar:
    """A tree of halves, so that the order of additions is the same on every target."""
    while vector.lanes > 1:
        half = vector.lanes // 2
        assert vector.lanes == 2 * half, "horizontal operations need a power of two of lanes"
        low, high = (
            s.Shuffle(vector.dtype, half, vector, vector, tuple(range(start, start + half))) for start in (0, half)
        )
        vector = s.binary(op, low, high)
    return vector


_ROUNDINGS = ("floor", "ceil", "trunc", "round")


def _round(op: str, x: Scalar) -> Scalar:
    """Adding and subtracting 2^mantissa rounds to an integer, half to even; then one step corrects the direction."""
    dtype = x.dtype if x.dtype == F64 else F32
    sign_bit = s.const(1 << (dtype.bits - 1), _BITS[dtype], x.lanes)
    magic = s.const(2.0 ** _MANTISSA[dtype], dtype, x.lanes)
    zero, one = s.const(0, dtype, x.lanes), s.const(1, dtype, x.lanes)

    def with_sign_of_x(magnitude: Scalar) -> Scalar:
        bits = s.bitcast(s.unary("abs", magnitude), _BITS[dtype])
        return s.bitcast(bits | (s.bitcast(x, _BITS[dtype]) & sign_bit), dtype)

    x = s.cast(x, dtype)
    size = s.unary("abs", x)
    rounded = (size + magic) - magic
    if op == "trunc":
        rounded = rounded - s.select(size < rounded, one, zero)
    elif op == "floor":
        signed = with_sign_of_x(rounded)
        rounded = signed - s.select(x < signed, one, zero)
    elif op == "ceil":
        signed = with_sign_of_x(rounded)
        rounded = signed + s.select(signed < x, one, zero)
    return s.select(size < magic, with_sign_of_x(rounded), x)


def _guarded_integer(op: str, a: Scalar, b: Scalar) -> Scalar:
    """Division and shifts with the cases defined that trap or are undefined in hardware."""
    constant = known_constant(b)
    bare = s.Binary(a.dtype, a.lanes, f"bare_{op}", a, b)
    zero = like(0, a)
    if op in ("shl", "shr"):
        width = a.dtype.bits
        if constant is not None:
            return bare if 0 <= constant < width else zero
        inside = b < like(width, b)
        if b.dtype.kind == "int":
            inside = inside & (like(0, b) <= b)
        return s.select(inside, replace(bare, right=s.select(inside, b, zero)), zero)
    if constant is not None and constant not in (0, -1):
        return bare
    # By -1 the only quotient that overflows traps; a / -1 = -a and a % -1 = a % 1 = 0.
    special = b.equal(zero)
    minus_one = b.equal(like(-1, b)) if b.dtype.kind == "int" else None
    by_one = special if minus_one is None else special | minus_one
    result: Scalar = replace(bare, right=s.select(by_one, like(1, b), b))
    if op == "rem":
        return result
    if minus_one is not None:
        result = s.select(minus_one, zero - a, result)
    return s.select(special, zero, result)


def _remainder(a: Scalar, b: Scalar) -> Scalar:
    """C's fmod, in f64: exact for quotients below 2^53. The sign is the dividend's."""
    x, y = s.cast(a, F64), s.cast(b, F64)
    quotient = s.unary("trunc", x / y)
    rest = s.fma(s.unary("neg", quotient), y, x)
    size, step = s.unary("abs", x), s.unary("abs", y)
    # The rounded quotient may be one too far: then the rest has the other sign.
    sign = s.const(1 << 63, U64, a.lanes)
    signs = (s.bitcast(rest, U64) ^ s.bitcast(x, U64)) & sign
    wrong = (~signs.equal(s.const(0, U64, a.lanes))) & ~rest.equal(like(0, rest))
    rest = s.select(wrong, s.unary("abs", s.unary("abs", rest) - step), s.unary("abs", rest))
    signed = s.bitcast((s.bitcast(rest, U64) & ~sign) | (s.bitcast(x, U64) & sign), F64)
    infinite = step.equal(like(float("inf"), step)) & (size < like(float("inf"), size))
    return s.cast(s.select(infinite, x, signed), a.dtype)


def _float_to_integer(x: Scalar, dtype: DType) -> Scalar | None:
    """By way of i32 and i64, with wrapping below that, as numpy on x86 does; None where it is one conversion."""
    if not x.dtype.is_float or not dtype.is_integer or dtype in (I32, I64):
        return None
    if dtype.bits < 32:
        return s.cast(s.cast(x, I32), dtype)
    if dtype == U32:
        return s.cast(s.cast(x, I64), dtype)
    x = s.cast(x, x.dtype if x.dtype == F64 else F32)
    half = like(2.0**63, x)
    high = s.bitcast(s.cast(x - half, I64), U64) ^ s.const(1 << 63, U64, x.lanes)
    return s.select(x < half, s.bitcast(s.cast(x, I64), U64), high)


def narrow_bits(x: Scalar, dtype: DType) -> Scalar:
    """The bits (u16) of an f32 rounded to f16 or bf16, half to even; NaN stays NaN."""
    bits = s.bitcast(x, U32)

    def number(value: int) -> Scalar:
        return like(value, bits)

    def shifted(value: Scalar, by: int) -> Scalar:
        return s.binary("shr", value, number(by))

    if dtype == BF16:
        rounded = bits + number(0x7FFF) + (shifted(bits, 16) & number(1))
        quiet = bits | number(0x400000)
        return s.cast(shifted(s.select(s.unary("isnan", x), quiet, rounded), 16), U16)
    # After F. Giesen's float_to_half_fast3_rtne: the subnormal result by an addition that aligns the mantissa.
    sign = bits & number(0x80000000)
    size = bits ^ sign
    special = s.select(number(0x7F800000) < size, number(0x7E00), number(0x7C00))
    aligned = s.bitcast(s.bitcast(size, F32) + s.const(0.5, F32, x.lanes), U32) - number(0x3F000000)
    normal = shifted(size + number(0xC8000FFF) + (shifted(size, 13) & number(1)), 13)
    half = s.select(size < number(0x47800000), s.select(size < number(0x38800000), aligned, normal), special)
    return s.cast(half | shifted(sign, 16), U16)


def widened_bits(bits: Scalar, dtype: DType) -> Scalar:
    """The f32 that the bits (u16) of an f16 or bf16 mean."""
    wide = s.cast(bits, U32)

    def number(value: int) -> Scalar:
        return like(value, wide)

    if dtype == BF16:
        return s.bitcast(s.binary("shl", wide, number(16)), F32)
    size = s.binary("shl", wide & number(0x7FFF), number(13))
    exponent = size & number(0x0F800000)
    normal = size + number(0x38000000)
    special = size + number(0x70000000)
    subnormal = s.bitcast(s.bitcast(size + number(0x38800000), F32) - s.const(2.0**-14, F32, bits.lanes), U32)
    merged = s.select(
        exponent.equal(number(0x0F800000)), special, s.select(exponent.equal(number(0)), subnormal, normal)
    )
    sign = s.binary("shl", wide & number(0x8000), number(16))
    return s.bitcast(merged | sign, F32)


def has_half_conversions(target: Target) -> bool:
    """Whether f16 <-> f32 are instructions."""
    return target.has("f16c") or target.has("avx512f") or target.architecture == "aarch64"


HALF = (F16, BF16)
