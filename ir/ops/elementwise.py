"""Operators that compute each element from the operands' elements at the same place."""

from __future__ import annotations

import math
from typing import Any

from ..dtypes import BOOL, BY_NAME, F32, F64, U8, U32, DType
from ..errors import UnsupportedError
from ..functions import (
    absolute,
    acos,
    acosh,
    asin,
    asinh,
    atan,
    atanh,
    cast,
    ceil,
    cos,
    cosh,
    erf,
    exp,
    expm1,
    floor,
    isnan,
    log,
    log1p,
    logical_not,
    logistic,
    maximum,
    minimum,
    power,
    remainder,
    round_even,
    shift_left,
    shift_right,
    sin,
    sinh,
    sqrt,
    tan,
    tanh,
    where,
)  # fmt: skip
from ..scalars import Scalar, bitcast, const
from ..scalars import cast as scalar_cast
from ..tensors import Tensor, elementwise
from .declare import SPECTRUM, Registry

declare = Registry()

RESULT = ("result",)
_PRECISE = {
    **dict.fromkeys(("Sin", "Cos", "Tan", "Floor", "Ceil", "Round"), ("x",)),
    **dict.fromkeys(("Exp", "Sinh", "Cosh"), RESULT),
    "Log": ("x", SPECTRUM),
}
"""What must not be rounded to 16 bits: angles, what is rounded to whole numbers, and results that soon overflow."""

E8M0 = BY_NAME["f8e8m0"]

for _name, _function in {
    "Exp": exp, "Log": log, "Tanh": tanh, "Erf": erf, "Sin": sin, "Cos": cos, "Tan": tan, "Asin": asin, "Acos": acos,
    "Atan": atan, "Sinh": sinh, "Cosh": cosh, "Asinh": asinh, "Acosh": acosh, "Atanh": atanh, "Sigmoid": logistic,
    "Abs": absolute, "Sqrt": sqrt, "Floor": floor, "Ceil": ceil, "Round": round_even, "IsNaN": isnan,
    "Not": logical_not,
}.items():  # fmt: skip

    def _apply(x: Scalar, *, _function: Any = _function) -> Scalar:
        result: Scalar = _function(x)
        return result

    declare.pointwise(_name, precise=_PRECISE.get(_name, ()))(_apply)


@declare.pointwise("Identity")
def identity(x: Scalar) -> Scalar:
    return x


@declare.pointwise("Neg")
def neg(x: Scalar) -> Scalar:
    return -x


@declare.pointwise("Reciprocal", precise=RESULT)
def reciprocal(x: Scalar) -> Scalar:
    return 1 / x


@declare.pointwise("Sign")
def sign(x: Scalar) -> Scalar:
    return (
        where(x > 0, 1, where(x < 0, -1, x))
        if x.dtype.is_float
        else where(x > 0, 1, where(x < 0, -1, const(0, x.dtype)))
    )


@declare.pointwise("Add")
def add(a: Scalar, b: Scalar) -> Scalar:
    return a + b


@declare.pointwise("Sub")
def sub(a: Scalar, b: Scalar) -> Scalar:
    return a - b


@declare.pointwise("Mul")
def mul(a: Scalar, b: Scalar) -> Scalar:
    return a * b


@declare.pointwise("Div")
def div(a: Scalar, b: Scalar) -> Scalar:
    return a / b


@declare.pointwise("Mod", precise=("a", "b"))
def mod(a: Scalar, b: Scalar, *, fmod: int = 0) -> Scalar:
    """The remainder with the divisor's sign, or with the dividend's (`fmod`)."""
    rest: Scalar = remainder(a, b)
    if fmod or a.dtype.kind == "uint":
        return rest
    zero = const(0, a.dtype)
    wrong_sign = (rest < zero) ^ (b < zero)
    return where(wrong_sign & ~rest.equal(zero), rest + b, rest)


@declare.pointwise("Pow", precise=RESULT)
def pow_(a: Scalar, b: Scalar) -> Scalar:
    """a to the power b, in a's type; b may have another."""
    if a.dtype == b.dtype:
        result: Scalar = power(a, b)
        return result
    if a.dtype.is_integer and b.dtype.is_integer:
        return power(a, cast(b, a.dtype))
    wide = F64 if F64 in (a.dtype, b.dtype) or (a.dtype.is_integer and a.dtype.bits > 16) else F32
    return cast(power(cast(a, wide), cast(b, wide)), a.dtype)


@declare.pointwise("And")
def and_(a: Scalar, b: Scalar) -> Scalar:
    return a & b


@declare.pointwise("Or")
def or_(a: Scalar, b: Scalar) -> Scalar:
    return a | b


@declare.pointwise("Xor")
def xor(a: Scalar, b: Scalar) -> Scalar:
    return a ^ b


@declare.pointwise("BitwiseAnd")
def bitwise_and(a: Scalar, b: Scalar) -> Scalar:
    return a & b


@declare.pointwise("BitwiseOr")
def bitwise_or(a: Scalar, b: Scalar) -> Scalar:
    return a | b


@declare.pointwise("BitwiseXor")
def bitwise_xor(a: Scalar, b: Scalar) -> Scalar:
    return a ^ b


@declare.pointwise("BitwiseNot")
def bitwise_not(a: Scalar) -> Scalar:
    return ~a


@declare.pointwise("BitShift")
def bit_shift(a: Scalar, b: Scalar, *, direction: str) -> Scalar:
    """a shifted by b bits; to the right, signed numbers keep their sign however far. Negative b are far too (numpy)."""
    if direction == "LEFT":
        return shift_left(a, b)
    far = a.dtype.bits - 1
    return shift_right(a, where(b < 0, far, minimum(b, far)) if a.dtype.kind == "int" else b)


@declare.pointwise("Equal")
def equal(a: Scalar, b: Scalar) -> Scalar:
    return a.equal(b)


@declare.pointwise("Less")
def less(a: Scalar, b: Scalar) -> Scalar:
    return a < b


@declare.pointwise("LessOrEqual")
def less_or_equal(a: Scalar, b: Scalar) -> Scalar:
    return a <= b


@declare.pointwise("Greater")
def greater(a: Scalar, b: Scalar) -> Scalar:
    return a > b


@declare.pointwise("GreaterOrEqual")
def greater_or_equal(a: Scalar, b: Scalar) -> Scalar:
    return a >= b


@declare.pointwise("Where")
def where_(condition: Scalar, yes: Scalar, no: Scalar) -> Scalar:
    result: Scalar = where(condition, yes, no)
    return result


def _variadic(combine: Any) -> Any:
    def define(*operands: Tensor) -> Tensor:
        def element(*values: Scalar) -> Scalar:
            result = values[0]
            for value in values[1:]:
                result = combine(result, value)
            return result

        return elementwise(element, *operands)

    return define


declare.op("Min")(_variadic(minimum))
declare.op("Max")(_variadic(maximum))
declare.op("Sum")(_variadic(lambda a, b: a + b))


@declare.op("Mean")
def mean(*operands: Tensor) -> Tensor:
    total: Tensor = _variadic(lambda a, b: a + b)(*operands)
    return total / float(len(operands))


def _as_power_of_two(x: Scalar, saturate: bool, round_mode: str) -> Scalar:
    """The float8 of an exponent alone (e8m0) nearest to |x|, at or above it ("up"), or at or below ("down")."""
    bits = bitcast(cast(x, F32), U32)
    exponent, fraction = shift_right(bits, 23) & 0xFF, bits & 0x7FFFFF
    half = 0x400000
    more = {
        "up": fraction > 0,
        "nearest": (fraction > half) | (fraction.equal(half) & (exponent > 0)),
        "down": const(False, BOOL),
    }[round_mode]
    rounded = where(more & (exponent < (0xFE if saturate else 0xFF)), exponent + 1, exponent)
    return bitcast(cast(rounded, U8), E8M0)


def converted(x: Scalar, to: DType, saturate: bool = True, round_mode: str = "up") -> Scalar:
    """x in another type; what exceeds a float8 becomes its greatest value where `saturate`."""
    if "string" in (to.kind, x.dtype.kind):
        raise UnsupportedError("conversion between text and numbers is not compiled")
    if x.dtype == to:
        return x
    if to == E8M0:
        return _as_power_of_two(x, saturate, round_mode)
    return scalar_cast(x, to, saturate and to.is_narrow)


@declare.pointwise("Cast")
def cast_(x: Scalar, *, to: DType, saturate: int = 1, round_mode: str = "up") -> Scalar:
    return converted(x, to, bool(saturate), round_mode)


@declare.pointwise("IsInf")
def isinf(x: Scalar, *, detect_negative: int = 1, detect_positive: int = 1) -> Scalar:
    positive, negative = x.equal(math.inf), x.equal(-math.inf)
    never = const(False, BOOL)
    return (positive if detect_positive else never) | (negative if detect_negative else never)


@declare.pointwise("Clip")
def clip(x: Scalar, low: Scalar | None = None, high: Scalar | None = None) -> Scalar:
    if low is not None:
        x = maximum(x, low)
    return x if high is None else minimum(x, high)


@declare.pointwise("Relu")
def relu(x: Scalar) -> Scalar:
    result: Scalar = maximum(x, 0)
    return result


@declare.pointwise("LeakyRelu")
def leaky_relu(x: Scalar, *, alpha: float = 0.01) -> Scalar:
    return where(x < 0, x * alpha, x)


@declare.pointwise("PRelu")
def prelu(x: Scalar, slope: Scalar) -> Scalar:
    return where(x < 0, x * slope, x)


@declare.pointwise("ThresholdedRelu")
def thresholded_relu(x: Scalar, *, alpha: float = 1.0) -> Scalar:
    return where(x > alpha, x, 0)


@declare.pointwise("Elu")
def elu(x: Scalar, *, alpha: float = 1.0) -> Scalar:
    return where(x < 0, expm1(x) * alpha, x)


@declare.pointwise("Celu")
def celu(x: Scalar, *, alpha: float = 1.0) -> Scalar:
    return where(x < 0, expm1(x / alpha) * alpha, x)


@declare.pointwise("Selu")
def selu(x: Scalar, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Scalar:
    return where(x < 0, expm1(x) * (alpha * gamma), x * gamma)


@declare.pointwise("Gelu")
def gelu(x: Scalar, *, approximate: str = "none") -> Scalar:
    if approximate == "tanh":
        return x * 0.5 * (tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1)
    return x * 0.5 * (erf(x * math.sqrt(0.5)) + 1)


@declare.pointwise("HardSigmoid")
def hard_sigmoid(x: Scalar, *, alpha: float = 0.2, beta: float = 0.5) -> Scalar:
    result: Scalar = minimum(maximum(x * alpha + beta, 0), 1)
    return result


@declare.pointwise("HardSwish")
def hard_swish(x: Scalar) -> Scalar:
    return x * hard_sigmoid(x, alpha=1 / 6, beta=0.5)


@declare.pointwise("Mish")
def mish(x: Scalar) -> Scalar:
    return x * tanh(softplus(x))


@declare.pointwise("Softplus")
def softplus(x: Scalar) -> Scalar:
    """log(1 + exp(x)), without overflow for large x."""
    return maximum(x, 0) + log1p(exp(-absolute(x)))


@declare.pointwise("Softsign")
def softsign(x: Scalar) -> Scalar:
    return x / (absolute(x) + 1)


@declare.pointwise("Swish")
def swish(x: Scalar, *, alpha: float = 1.0) -> Scalar:
    return x * logistic(x * alpha)


@declare.pointwise("Shrink")
def shrink(x: Scalar, *, bias: float = 0.0, lambd: float = 0.5) -> Scalar:
    real = cast(x, x.dtype if x.dtype.is_float else F64 if x.dtype.bits > 16 else F32)
    moved = where(real < -lambd, real + bias, where(real > lambd, real - bias, const(0, real.dtype)))
    return cast(moved, x.dtype)
