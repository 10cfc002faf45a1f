"""Operators between real numbers and integers with a scale and a zero point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..dims import Dim, ceildiv, floordiv
from ..dtypes import F32, I32, U8, DType
from ..errors import ShapeError
from ..functions import cast, maximum, minimum, round_even
from ..rounding import rounded
from ..scalars import Scalar, const, select
from ..tensors import Indices, Tensor, assume_equal, assume_shape, elementwise, normalize_axis, view
from .contraction import convolution, kernel_extents, matrix_product, per_channel, widened_product
from .declare import Registry
from .elementwise import converted
from .movement import replaced
from .reduction import reduce_max, reduce_min
from .windows import sliding

declare = Registry()


def spread(parameter: Tensor, x: Tensor, axis: int, block_size: int = 0) -> Tensor:
    """A scale or zero point for each element of `x`: one for all, or one per position of an axis or block of it."""
    axis = normalize_axis(axis, x.rank)
    by_place = parameter.rank == 1 and not (block_size and x.rank == 1)
    if by_place and parameter.size != 1:
        assume_equal(parameter.shape[0], x.shape[axis], f"scales or zero points and the elements of axis {axis}")
    elif parameter.size != 1:
        if block_size < 1:
            raise ShapeError(f"scales or zero points of rank {parameter.rank} need a block_size above 0")
        blocks = replaced(x.shape, {axis: ceildiv(x.shape[axis], block_size)})
        assume_shape(parameter, blocks, "scales or zero points")

    def source(*i: Dim) -> Indices:
        if parameter.size == 1:
            return (0,) * parameter.rank
        if by_place:
            return (i[axis],)
        return replaced(i, {axis: floordiv(i[axis], block_size)})

    return view(parameter, x.shape, source)


def saturated(value: Scalar, zero: Scalar | None, dtype: DType, saturate: bool = True) -> Scalar:
    """A real number rounded to even, moved to the zero point, and taken into the range of the type (a float8 only where
    `saturate`)."""
    if dtype.is_float:
        return converted(value if zero is None else value + cast(zero, value.dtype), dtype, saturate)
    whole = round_even(value)
    if zero is not None:
        whole = cast(whole, F32) if whole.dtype.bits < 32 else whole
        whole = whole + cast(zero, whole.dtype)
    return cast(minimum(maximum(whole, dtype.limits[0]), dtype.limits[1]), dtype)


def quantized(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: DType, saturate: bool = True) -> Tensor:
    """round(x / scale) + zero in the given type, for operands that broadcast."""

    def element(value: Scalar, divisor: Scalar, offset: Scalar | None = None) -> Scalar:
        return saturated(rounded(cast(value, divisor.dtype) / divisor), offset, dtype, saturate)

    return elementwise(element, x, scale, *([] if zero is None else [zero]))


def shifted(x: Tensor, zero: Tensor | None) -> Tensor:
    """x - zero in i32, or in f32 where they are floats, for operands that broadcast."""
    wide = cast(x, F32 if x.dtype.is_float else I32)
    return wide if zero is None else wide - cast(zero, wide.dtype)


@declare.op("QuantizeLinear", "com.microsoft.QuantizeLinear")
def quantize_linear(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: DType | None = None,
    precision: DType | None = None,
    saturate: int = 1,
) -> Tensor:
    """x / y_scale + y_zero_point, rounded to even and saturated; the division is done in `precision`, else in the type
    of the scale if that has arithmetic of fractions."""
    dtype = y_zero_point.dtype if y_zero_point is not None else output_dtype or U8
    along = axis if x.rank > 1 else 0
    fractions = y_scale.dtype.is_float and not y_scale.dtype.is_narrow
    scale = cast(spread(y_scale, x, along, block_size), precision or (y_scale.dtype if fractions else F32))
    zero = None if y_zero_point is None else spread(y_zero_point, x, along, block_size)
    return quantized(x, scale, zero, dtype, bool(saturate))


@declare.op("DequantizeLinear", "com.microsoft.DequantizeLinear")
def dequantize_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: DType | None = None,
) -> Tensor:
    """(x - x_zero_point) * x_scale."""
    along = axis if x.rank > 1 else 0
    zero = None if x_zero_point is None else spread(x_zero_point, x, along, block_size)
    scale = cast(spread(x_scale, x, along, block_size), F32)
    return cast(cast(shifted(x, zero), F32) * scale, output_dtype or x_scale.dtype)


def dynamic_scale(low: Scalar, high: Scalar) -> Scalar:
    """The scale that takes the range from `low` to `high`, 0 in it, to u8."""
    return select(high.equal(low), const(1, high.dtype), (high - low) / const(255, high.dtype))


def dynamic_zero(low: Scalar, scale: Scalar) -> Scalar:
    """The zero point of a range that begins at `low`."""
    return saturated(-low / scale, None, U8)


@declare.op("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x in u8 with the scale and zero point that fit its range, zero included."""
    axes = tuple(range(x.rank))
    low = minimum(reduce_min(x, axes, keepdims=False), 0)
    high = maximum(reduce_max(x, axes, keepdims=False), 0)
    scale = elementwise(dynamic_scale, low, high)
    zero = elementwise(dynamic_zero, low, scale)
    return quantized(x, scale, zero, U8), scale, zero


def _row_zero(zero: Tensor | None, a: Tensor) -> Tensor | None:
    """The zero point of a left operand: one for all, or one per row."""
    if zero is None or zero.rank != 1 or zero.size == 1:
        return zero
    return view(zero, (*zero.shape, 1), lambda row, _: (row,))


@declare.op("MatMulInteger", heavy=True)
def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """(a - a_zero_point) @ (b - b_zero_point) in i32; zero points are one for all, per row of a or per column of b."""
    return matrix_product(shifted(a, _row_zero(a_zero_point, a)), shifted(b, b_zero_point))


@declare.op("QLinearMatMul", heavy=True)
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """The quantized product of quantized matrices."""
    product = matmul_integer(a, b, a_zero_point, b_zero_point)
    rows = _row_zero(a_scale, a)
    assert rows is not None
    scale = cast(rows, F32) * cast(b_scale, F32)
    return quantized(cast(product, F32) * scale, cast(y_scale, F32), y_zero_point, y_zero_point.dtype)


@declare.op("ConvInteger", heavy=True, spatial=True)
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution of integers, each less its zero point, in i32; the padding stands for the zero point of `x`."""
    windows = sliding(x.shape[2:], kernel_extents(x, w, kernel_shape), strides, dilations, pads, auto_pad)
    zero = None if w_zero_point is None else spread(w_zero_point, w, 0)
    x_zero = None if x_zero_point is None else spread(x_zero_point, x, 0)
    return convolution(shifted(x, x_zero), shifted(w, zero), windows, group, widened_product(I32))


@declare.op("QLinearConv", heavy=True, spatial=True)
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The quantized convolution of a quantized image; the scale of `w` may differ by filter, `b` is i32."""
    total = conv_integer(
        x, w, x_zero_point, w_zero_point, auto_pad=auto_pad, dilations=dilations, group=group,
        kernel_shape=kernel_shape, pads=pads, strides=strides,
    )  # fmt: skip
    if b is not None:
        total = total + per_channel(b, x.rank)
    scale = spread(w_scale, total, 1) * spread(x_scale, total, 1)
    y_scale, zero = spread(y_scale, total, 1), spread(y_zero_point, total, 1)
    return quantized(cast(total, F32) * scale, y_scale, zero, zero.dtype)


def _linear(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    @declare.op(name)
    def define(
        a: Tensor, a_scale: Tensor, a_zero_point: Tensor, b: Tensor, b_scale: Tensor, b_zero_point: Tensor,
        c_scale: Tensor, c_zero_point: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        left = dequantize_linear(a, a_scale, a_zero_point)
        right = dequantize_linear(b, b_scale, b_zero_point)
        return quantized(function(left, right), c_scale, c_zero_point, a.dtype)


_linear("com.microsoft.QLinearAdd", lambda a, b: a + b)
_linear("com.microsoft.QLinearMul", lambda a, b: a * b)
