"""exp, log, tanh, erf, pow... as arithmetic: polynomials, selects and exponent bits, without branches or tables.

No target has these functions in vectors, so every backend computes them by the expressions made here; the trigonometric
ones are in `passes.trigonometry`. What is relied on is IEEE arithmetic as written (nothing reassociated); Fma may round
once or twice. f16 and bf16 are computed in f32. The coefficients come from `tools.fit_polynomials`.

Largest measured errors in units of the last place, subnormal arguments and results included, where Fma rounds once
(twice):

| | f32 | f64 | | f32 | f64 |
|---|---|---|---|---|---|
| exp | 0.9 (1.2) | 0.9 (1.1) | sin, cos | 1.6 | 0.9 |
| exp2 | 0.9 (1.2) | 1.0 (1.2) | tan | 0.5 | 2.4 |
| expm1 | 1.5 (1.5) | 1.8 (1.9) | asin | 0.5 | 2.4 |
| log | 1.0 (1.1) | 1.3 (1.5) | acos | 0.5 | 2.1 |
| log2 | 1.2 (1.3) | 1.4 (1.2) | atan | 0.5 | 1.6 |
| log1p | 1.6 (1.6) | 1.6 (1.6) | sinh | 0.5 | 2.5 |
| tanh | 1.6 (1.6) | 1.4 (1.4) | cosh | 0.5 | 1.6 |
| erf | 1.1 (1.1) | 0.9 (1.0) | asinh, acosh | 0.5 | 2.0 |
| sigmoid | 1.8 (1.9) | 1.6 (1.6) | atanh | 0.5 | 2.1 |
| pow | 0.5 | 1.0 (1.3) | | | |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from ..ir import loops
from ..ir import scalars as s
from ..ir.dtypes import BF16, F16, F32, F64, I32, I64, U64
from ..ir.loops import Kernel
from ..ir.scalars import Rewriter, Scalar, ScalarLike, bitcast, select
from .float_arithmetic import (
    at_least,
    at_most,
    choose,
    fma,
    horner,
    magnitude,
    quick_two_sum,
    shifted,
    sign_bit,
    two_product,
    with_sign,
)
from .math_tables import DOUBLE, FORMATS, POW, Format
from .trigonometry import FUNCTIONS

# Exponentials.


def _reduced(x: Scalar, kind: Format, offset: int, low: ScalarLike = 0) -> tuple[Scalar, Scalar]:
    """(r, bits) with x + low = n*ln(2) + r and |r| <= ln(2)/2: n + `offset` is in the lowest bits."""
    magic = kind.magic + offset
    shifted_n = fma(x, math.log2(math.e), magic)
    n = shifted_n - magic
    r = fma(n, -kind.ln2_high, x)
    r = fma(n, -kind.ln2_low, r)
    return (r if low == 0 else r + low), bitcast(shifted_n, kind.bits)


def _exp_reduced(r: Scalar, kind: Format) -> Scalar:
    return horner(r, (1.0, 1.0, *kind.exp))


def _scale(x: Scalar, bits: Scalar, kind: Format) -> Scalar:
    """x * 2^n, the lowest bits being n + 2*bias: by two factors, as a subnormal result needs more than one."""
    half = shifted(bits, "shr", 1)
    first = bitcast(shifted(half, "shl", kind.fraction), kind.dtype)
    second = bitcast(shifted(bits - half, "shl", kind.fraction), kind.dtype)
    return x * first * second


def _exp(x: Scalar) -> Scalar:
    kind = FORMATS[x.dtype]
    r, bits = _reduced(at_least(at_most(x, kind.exp_high), kind.exp_low), kind, 2 * kind.bias)
    return _scale(_exp_reduced(r, kind), bits, kind)


def _exp_normal(x: Scalar) -> Scalar:
    """exp where neither x is infinite nor exp(x) subnormal or infinite."""
    kind = FORMATS[x.dtype]
    r, bits = _reduced(x, kind, kind.bias)
    return _exp_reduced(r, kind) * bitcast(shifted(bits, "shl", kind.fraction), kind.dtype)


def _exp2(x: Scalar) -> Scalar:
    kind = FORMATS[x.dtype]
    x = at_least(at_most(x, kind.bias + 1.0), -kind.bias - kind.fraction - 0.0)
    magic = kind.magic + 2 * kind.bias
    shifted_n = x + magic
    r = x - (shifted_n - magic)
    value = horner(r, (1.0, *kind.exp2)) if kind.exp2 else _exp_reduced(r * math.log(2), kind)
    return _scale(value, bitcast(shifted_n, kind.bits), kind)


def _expm1(x: Scalar) -> Scalar:
    """2^n (e^r - 1) + (2^n - 1), halved so that 2^n stays finite."""
    kind = FORMATS[x.dtype]
    top, bottom = kind.exp_high, -math.log(2) * (kind.fraction + 3)
    r, bits = _reduced(at_least(at_most(x, top), bottom), kind, kind.bias - 1)
    scale = bitcast(shifted(bits, "shl", kind.fraction), kind.dtype)
    small = fma(r * r, horner(r, kind.exp), r)
    result = fma(scale, small, scale - 0.5) * 2
    return choose(s.as_scalar(0.0, x.dtype).equal(x), x, result)


def _sigmoid(x: Scalar) -> Scalar:
    """e/(1 + e) with e = exp(x), both times a power of two by which no e is subnormal: only the quotient may be.

    Most of the rounding error of 1 + e is made good where e is less than 1: elsewhere it counts less.
    """
    kind = FORMATS[x.dtype]
    top, power = math.log(2) * (kind.fraction + 2), (kind.bias + 1) // 2  # beyond `top` it is 1
    one = 2.0**power
    r, bits = _reduced(at_least(at_most(x, top), kind.exp_low), kind, kind.bias + power)
    e = _exp_reduced(r, kind) * bitcast(shifted(bits, "shl", kind.fraction), kind.dtype)
    denominator = e + one
    excess = (denominator - one) - e
    quotient = e / denominator
    return fma(quotient * choose(x < 0, 1 / one, s.const(0.0, x.dtype)), excess, quotient)


def _tanh(x: Scalar) -> Scalar:
    kind = FORMATS[x.dtype]
    size, square = magnitude(x), x * x
    near = fma(square * size, horner(square, kind.tanh), size)
    clamped = at_most(size, kind.tanh_top)
    far = 1 - 2 / (_exp_normal(clamped + clamped) + 1)
    return with_sign(select(size < kind.tanh_split, near, far), sign_bit(x))


def _erf(x: Scalar) -> Scalar:
    kind = FORMATS[x.dtype]
    size, square = magnitude(x), x * x
    near = fma(horner(square, kind.erf), size, size)
    clamped = at_most(size, kind.erf_top)
    exponent = fma(horner(clamped, kind.erf_tail), clamped, clamped)
    far = 1 - _exp_normal(s.unary("neg", exponent))
    return with_sign(select(size < kind.erf_split, near, far), sign_bit(x))


# Logarithms.


def _split(x: Scalar, center: float) -> tuple[Scalar, Scalar]:
    """(m, e) with x = m * 2^e and m in [center, 2*center), for positive x, subnormal ones too."""
    kind = FORMATS[x.dtype]
    subnormal = x < 2.0 ** (1 - kind.bias)
    normal = select(subnormal, x * 2.0 ** (kind.fraction + 1), x)
    above, exponent = _exponent_above(normal, center)
    m = bitcast(bitcast(normal, kind.bits) - above, kind.dtype)
    return m, exponent + choose(subnormal, -1.0 - kind.fraction, s.const(0, kind.dtype))


def _exponent_above(x: Scalar, center: float) -> tuple[Scalar, Scalar]:
    """The exponent e of x relative to [center, 2*center): as bits in place, and as a number."""
    kind = FORMATS[x.dtype]
    difference = bitcast(x, kind.bits) - bitcast(s.const(center, kind.dtype), kind.bits)
    in_place = difference & (((1 << kind.dtype.bits) - 1) ^ ((1 << kind.fraction) - 1))
    if kind.dtype == F32:
        return in_place, s.cast(bitcast(in_place, I32), F32) * 2.0**-kind.fraction
    # No target but AVX-512 converts i64 vectors: add to the bits of a number whose last bit counts one.
    whole = shifted(bitcast(in_place, I64), "shr", kind.fraction)
    magic = s.const(kind.magic, F64)
    return in_place, bitcast(whole + bitcast(magic, I64), F64) - magic


def _log_factor(f: Scalar) -> Scalar:
    """(log(1 + f) - f) / f^2 for |f| <= 1/3."""
    return fma(f, horner(f, FORMATS[f.dtype].log), -0.5)


def _log_near_one(f: Scalar) -> Scalar:
    return fma(f * f, _log_factor(f), f)


def _log_special(x: Scalar, result: Scalar, pole: float) -> Scalar:
    """The cases of a logarithm with the given pole: NaN, infinity, the pole, and below it."""
    beyond = choose(x.equal(pole), -math.inf, s.const(math.nan, x.dtype))
    finite = select(x < math.inf, result, x)
    return select(s.as_scalar(pole, x.dtype) < x, finite, beyond)


def _log(x: Scalar) -> Scalar:
    m, exponent = _split(x, 2 / 3)
    return _log_special(x, fma(exponent, math.log(2), _log_near_one(m - 1)), 0.0)


def _log2(x: Scalar) -> Scalar:
    """The exponent and the mantissa's own bits first, which cancel without rounding."""
    m, exponent = _split(x, 2 / 3)
    f = m - 1
    rest = fma(f * f * _log_factor(f), math.log2(math.e), f * (math.log2(math.e) - 1))
    return _log_special(x, (exponent + f) + rest, 0.0)


def _log1p(x: Scalar) -> Scalar:
    """log(1 + x) with (1 + x) 2^-e - 1 = x 2^-e + (2^-e - 1) without the rounding of 1 + x (after N. Juffa)."""
    kind = FORMATS[x.dtype]
    in_place, exponent = _exponent_above(x + 1, 2 / 3)
    scaled = bitcast(bitcast(x, kind.bits) - in_place, kind.dtype)
    four = bitcast(bitcast(s.const(4.0, kind.dtype), kind.bits) - in_place, kind.dtype)
    f = scaled + fma(four, 0.25, -1.0)
    result = fma(exponent, math.log(2), _log_near_one(f))
    return _log_special(x, choose(x.equal(0.0), x, result), -1.0)


# Hyperbolic functions and their inverses, in f64.


def _sinh(x: Scalar) -> Scalar:
    size = magnitude(x)
    large = s.as_scalar(709.0, F64) < size
    e = _expm1(select(large, size * 0.5, size))
    value = select(large, (e + 1) * 0.5 * (e + 1), (e + e / (e + 1)) * 0.5)
    return with_sign(value, sign_bit(x))


def _cosh(x: Scalar) -> Scalar:
    size = magnitude(x)
    large = s.as_scalar(709.0, F64) < size
    e = _exp(select(large, size * 0.5, size))
    return select(large, e * 0.5 * e, fma(e, 0.5, 0.5 / e))


def _asinh(x: Scalar) -> Scalar:
    size = magnitude(x)
    large = s.as_scalar(2.0**60, F64) < size
    square = size * size
    argument = select(large, size, size + square / (s.unary("sqrt", square + 1) + 1))
    return with_sign(_log1p(argument) + choose(large, math.log(2), s.const(0, F64)), sign_bit(x))


def _acosh(x: Scalar) -> Scalar:
    large = s.as_scalar(2.0**60, F64) < x
    above = x - 1
    argument = select(large, x, above + s.unary("sqrt", fma(above, above, above + above)))
    result = _log1p(argument) + choose(large, math.log(2), s.const(0, F64))
    return choose(x < 1, math.nan, result)


def _atanh(x: Scalar) -> Scalar:
    size = magnitude(x)
    return with_sign(_log1p((size + size) / (1 - size)) * 0.5, sign_bit(x))


# Powers.


def _log_pair(x: Scalar) -> tuple[Scalar, Scalar]:
    """log(x) of a positive f64 as a sum of two, to some 2^-66 of it."""
    m, exponent = _split(x, math.sqrt(0.5))
    f = m - 1
    d = m + 1
    one = d - m
    d_low = (m - (d - one)) + (1 - one)
    s_high = f / d
    p, p_low = two_product(s_high, d)
    s_low = (((f - p) - p_low) - s_high * d_low) / d
    z, z_low = two_product(s_high, s_high)
    z_low = fma(s_high + s_high, s_low, z_low)
    third = 2 / 3, 3.700743415417188e-17
    cube, cube_low = two_product(z, s.const(third[0], F64, x.lanes))
    cube_low = cube_low + z * third[1] + z_low * third[0] + z * z * horner(z, POW)
    term, term_low = two_product(cube, s_high)
    term_low = term_low + cube * s_low + cube_low * s_high
    high, low = quick_two_sum(s_high + s_high, term)
    low = low + (s_low + s_low) + term_low
    total, rest = quick_two_sum(exponent * DOUBLE.ln2_high, high)
    none = exponent.equal(0.0)
    total, rest = select(none, high, total), choose(none, 0.0, rest)
    return quick_two_sum(total, rest + low + exponent * DOUBLE.ln2_low)


def _power_of_size(x: Scalar, y: Scalar) -> Scalar:
    """x^y for f64 x >= 0, neither NaN."""
    high, low = _log_pair(x)
    limited = at_least(at_most(y, 2.0**65), -(2.0**65))
    product, rest = two_product(limited, high)
    rest = fma(limited, low, rest)
    inside = magnitude(product) < 746.0
    clamped = at_least(at_most(product, DOUBLE.exp_high), DOUBLE.exp_low)
    r, bits = _reduced(clamped, DOUBLE, 2 * DOUBLE.bias, choose(inside, rest, 0.0))
    result = _scale(_exp_reduced(r, DOUBLE), bits, DOUBLE)
    at_zero = choose(y < 0, math.inf, s.const(0, F64))
    at_infinity = choose(y < 0, 0.0, s.const(math.inf, F64))
    return select(x.equal(0.0), at_zero, select(x.equal(math.inf), at_infinity, result))


def _constant(scalar: Scalar) -> s.Number | None:
    scalar = scalar.operand if isinstance(scalar, s.Broadcast) else scalar
    return scalar.value if isinstance(scalar, s.Const) else None


def _float_power(x: Scalar, y: Scalar) -> Scalar:
    """C's pow, with all of its special cases."""
    simple = _simple_power(x, _constant(y))
    if simple is not None:
        return simple
    if x.dtype == F32:
        return s.cast(_general_power(s.cast(x, F64), s.cast(y, F64), exp_of_log=True), F32)
    return _general_power(x, y, exp_of_log=False)


def _general_power(x: Scalar, y: Scalar, exp_of_log: bool) -> Scalar:
    """C's pow of f64; `exp_of_log` has only the accuracy that f32 needs."""
    size = magnitude(x)
    power = _exp(y * _log(size)) if exp_of_log else _power_of_size(size, y)
    power = choose(size.equal(1.0) | y.equal(0.0), 1.0, power)
    half = y * 0.5
    whole = s.unary("floor", y).equal(y)
    odd = whole & s.binary("ne", s.unary("floor", half), half)
    power = with_sign(power, choose(odd, sign_bit(x), s.const(0, U64)))
    negative = (x < 0) & (s.as_scalar(-math.inf, F64) < x)
    power = choose(negative & ~whole, math.nan, power)
    nan = s.unary("isnan", x) | s.unary("isnan", y)
    one = x.equal(1.0) | y.equal(0.0)
    return choose(one, 1.0, choose(nan, math.nan, power))


def _simple_power(x: Scalar, exponent: s.Number | None) -> Scalar | None:
    """x to a constant power that takes a few instructions, or None."""
    if exponent is None:
        return None
    if exponent in (0.5, -0.5):
        root = choose(x.equal(-math.inf), math.inf, s.unary("sqrt", x) + 0.0)
        return root if exponent > 0 else 1 / root
    direct: Mapping[s.Number, Callable[[], Scalar]] = {
        0: lambda: s.const(1, x.dtype, x.lanes),
        1: lambda: x,
        2: lambda: x * x,
        3: lambda: x * x * x,
        -1: lambda: 1 / x,
    }
    if exponent in direct:
        return direct[exponent]()
    if x.dtype == F32 and 0 < abs(exponent) <= 16 and exponent == int(exponent):
        wide = s.cast(x, F64)
        power = _repeated(wide, int(abs(exponent)))
        return s.cast(power if exponent > 0 else 1 / power, F32)
    return None


def _repeated(x: Scalar, exponent: int) -> Scalar:
    """x to a positive constant power by squaring."""
    result: Scalar | None = None
    while exponent:
        if exponent & 1:
            result = x if result is None else result * x
        exponent >>= 1
        x = x * x if exponent else x
    assert result is not None
    return result


def _integer_power(x: Scalar, y: Scalar) -> Scalar:
    """x^y modulo 2^bits; the truncated reciprocal for y < 0 (0 for x = 0)."""
    exponent = _constant(y)
    if exponent is not None and exponent >= 0:
        return _repeated(x, int(exponent)) if exponent else s.const(1, x.dtype, x.lanes)
    one, zero = s.const(1, x.dtype), s.const(0, x.dtype)
    result: Scalar = one
    base = x
    # Odd bases repeat after 2^(bits - 2) powers, and even ones are 0 from y = bits on.
    for position in range(x.dtype.bits):
        bit = shifted(y, "shr", position) & 1
        result = result * select(bit.equal(0), one, base)
        base = base * base
    if x.dtype.kind == "uint":
        return result
    unit = x.equal(1) | x.equal(-1)
    return select(y < 0, select(unit, result, zero), result)


# Rewriting.

_FUNCTIONS: Mapping[str, Callable[[Scalar], Scalar]] = {
    "exp": _exp, "exp2": _exp2, "expm1": _expm1, "log": _log, "log2": _log2, "log1p": _log1p, "tanh": _tanh,
    "erf": _erf, "sigmoid": _sigmoid, "sinh": _sinh, "cosh": _cosh, "asinh": _asinh, "acosh": _acosh, "atanh": _atanh,
    **FUNCTIONS,
}  # fmt: skip
_THROUGH_F64 = frozenset(("sinh", "cosh", "asinh", "acosh", "atanh", "asin", "acos", "atan"))


def _function(op: str, x: Scalar) -> Scalar:
    if x.dtype in (F16, BF16):
        return s.cast(_function(op, s.cast(x, F32)), x.dtype)
    if x.dtype == F32 and op in _THROUGH_F64:
        return s.cast(_FUNCTIONS[op](s.cast(x, F64)), F32)
    return _FUNCTIONS[op](x)


def _power(x: Scalar, y: Scalar) -> Scalar:
    if x.dtype in (F16, BF16):
        return s.cast(_power(s.cast(x, F32), s.cast(y, F32)), x.dtype)
    return _float_power(x, y) if x.dtype.is_float else _integer_power(x, y)


class _Expander(Rewriter):
    def rebuild(self, scalar: Scalar) -> Scalar:
        result = super().rebuild(scalar)
        if isinstance(result, s.Unary) and result.op in s.MATH:
            return _function(result.op, result.operand)
        if isinstance(result, s.Binary) and result.op == "pow":
            return _power(result.left, result.right)
        return result


def expand_math(scalar: Scalar) -> Scalar:
    """`scalar` with its MATH functions and powers replaced by arithmetic, in any number of lanes."""
    return _Expander()(scalar)


def expand_kernel(kernel: Kernel) -> Kernel:
    """`kernel` with the functions in all of its expressions replaced, those in index dims too."""
    return replace(kernel, body=loops.rebuild(kernel.body, _Expander()))
