"""Quantized operators of the domain com.microsoft, as products of integers, or as what they mean between a
dequantization and a quantization.

Zero points that are absent are 0. Packed weights are unpacked by `onnxc.UnpackBits`, lowest bits first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...ir.dims import ceildiv
from ...ir.dtypes import F32, I8, I32, I64, U8, DType
from ...ir.errors import UnsupportedError
from ...ir.graph import Attribute, Value
from ...ir.ops.packed_weights import packed_codes
from ..expand import Expansions, Nodes
from .microsoft_attention import embed_layer_normalization, from_packed

declare = Expansions()


def real(n: Nodes, x: Value, scale: Value, zero: Value | None) -> Value:
    """(x - zero) * scale."""
    return n("DequantizeLinear", x, scalar(n, scale), scalar(n, zero))


def rounded(n: Nodes, x: Value, scale: Value, zero: Value | None, dtype: DType) -> Value:
    """x / scale + zero in the type of `zero`, or in `dtype` where there is none."""
    if zero is None:
        return n("QuantizeLinear", x, scalar(n, scale), output_dtype=dtype)
    return n("QuantizeLinear", x, scalar(n, scale), scalar(n, zero))


def scalar(n: Nodes, value: Value | None) -> Any:
    """A parameter of one element without axes, others as they are."""
    return n.reshape(value) if value is not None and value.shape in ((1,), (1, 1)) else value


# Integer products.


def scaled_product(
    n: Nodes,
    a: Value,
    b: Value,
    a_scale: Value,
    b_scale: Value,
    a_zero: Value | None,
    b_zero: Value | None,
    bias: Value | None,
) -> Value:
    """(a - a_zero) @ (b - b_zero) * a_scale * b_scale + bias; the parameters of b may differ by column."""
    product = n("MatMulInteger", a, b, scalar(n, a_zero), scalar(n, b_zero))
    scale = n("Mul", scalar(n, a_scale), scalar(n, b_scale))
    total = n("Mul", n.cast(product, scale.dtype), scale)
    return total if bias is None else n("Add", total, bias)


@declare("com.microsoft.MatMulIntegerToFloat")
def matmul_integer_to_float(
    n: Nodes,
    A: Value,
    B: Value,
    a_scale: Value,
    b_scale: Value,
    a_zero_point: Value | None = None,
    b_zero_point: Value | None = None,
    bias: Value | None = None,
) -> Value:
    """The product of integer matrices as reals."""
    return scaled_product(n, A, B, a_scale, b_scale, a_zero_point, b_zero_point, bias)


@declare("com.microsoft.DynamicQuantizeMatMul")
def dynamic_quantize_matmul(
    n: Nodes, A: Value, B: Value, b_scale: Value, b_zero_point: Value | None = None, bias: Value | None = None
) -> Value:
    """The product of a real matrix, quantized by its range, and an integer one."""
    a, scale, zero = n.several("DynamicQuantizeLinear", (A,), 3)
    return scaled_product(n, a, B, scale, b_scale, zero, b_zero_point, bias)


@declare("com.microsoft.QGemm")
def qgemm(
    n: Nodes,
    A: Value,
    a_scale: Value,
    a_zero_point: Value | None,
    B: Value,
    b_scale: Value,
    b_zero_point: Value | None,
    C: Value | None = None,
    y_scale: Value | None = None,
    y_zero_point: Value | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Value:
    """alpha * A @ B + C, where C is i32 in units of alpha * a_scale * b_scale; real where `y_scale` is absent."""
    a = n.transpose(A, 1, 0) if transA else A
    b = n.transpose(B, 1, 0) if transB else B
    total = n("MatMulInteger", a, b, scalar(n, a_zero_point), scalar(n, b_zero_point))
    total = total if C is None else n("Add", total, C)
    scale = n("Mul", n("Mul", scalar(n, a_scale), scalar(n, b_scale)), alpha)
    y = n("Mul", n.cast(total, F32), scale)
    return y if y_scale is None else rounded(n, y, y_scale, y_zero_point, A.dtype)


@declare("com.microsoft.QAttention")
def qattention(
    n: Nodes,
    input: Value,
    weight: Value,
    bias: Value,
    input_scale: Value,
    weight_scale: Value,
    mask_index: Value | None = None,
    input_zero_point: Value | None = None,
    weight_zero_point: Value | None = None,
    past: Value | None = None,
    *,
    num_heads: int,
    unidirectional: int = 0,
    scale: float = 0.0,
    mask_filter_value: float = -10000.0,
    do_rotary: int = 0,
    past_present_share_buffer: int = 0,
) -> tuple[Value, ...]:
    """Attention whose projection is a product of integers."""
    packed = scaled_product(
        n, input, weight, input_scale, weight_scale, input_zero_point, weight_zero_point, bias
    )  # fmt: skip
    return from_packed(
        n, packed, mask_index, past, None, num_heads, (), unidirectional, mask_filter_value, scale,
        do_rotary or past_present_share_buffer,
    )  # fmt: skip


@declare("com.microsoft.QLinearConv", "com.ms.internal.nhwc.QLinearConv")
def qlinear_conv(n: Nodes, *operands: Value | None, channels_last: int = 0, **attributes: Attribute) -> Value:
    """ONNX's operator, also for images with channels last."""
    last = channels_last or n.call.op.startswith("com.ms.internal.nhwc")
    return by_channels(n, lambda x: n("QLinearConv", x, *operands[1:], **attributes), operands[0], bool(last))


def by_channels(n: Nodes, function: Callable[[Value], Value], x: Value | None, last: bool) -> Value:
    """A function of images [N, C, *spatial] of one [N, *spatial, C] where the channels are last."""
    assert x is not None
    if not last:
        return function(x)
    rank = x.tensor.rank
    y = function(n.transpose(x, 0, rank - 1, *range(1, rank - 1)))
    return n.transpose(y, 0, *range(2, rank), 1)


# Between a dequantization and a quantization.


def _pointwise(name: str, function: Callable[..., Value]) -> None:
    @declare(name)
    def define(
        n: Nodes,
        X: Value,
        X_scale: Value,
        X_zero_point: Value | None,
        Y_scale: Value,
        Y_zero_point: Value | None = None,
        **attributes: Any,
    ) -> Value:
        y = function(n, real(n, X, X_scale, X_zero_point), **attributes)
        return rounded(n, y, Y_scale, Y_zero_point, X.dtype)


def _softmax(n: Nodes, x: Value, *, opset: int = 13, axis: int | None = None) -> Value:
    if opset >= 13:
        return n("Softmax", x, axis=-1 if axis is None else axis)
    flat = n("Flatten", x, axis=1 if axis is None else axis % x.tensor.rank)
    return n.reshape(n("Softmax", flat, axis=-1), *x.shape)


def _global_average(n: Nodes, x: Value, *, channels_last: int = 0) -> Value:
    return by_channels(n, lambda image: n("GlobalAveragePool", image), x, bool(channels_last))


def _average(n: Nodes, x: Value, *, channels_last: int = 0, **attributes: Attribute) -> Value:
    last = channels_last or n.call.op.startswith("com.ms.internal.nhwc")
    return by_channels(n, lambda image: n("AveragePool", image, **attributes), x, bool(last))


def _mean(n: Nodes, x: Value, *, axes: Sequence[int] = (), keepdims: int = 1) -> Value:
    return n("ReduceMean", x, n.dims(*axes) if axes else None, keepdims=keepdims)


_pointwise("com.microsoft.QLinearSigmoid", lambda n, x: n("Sigmoid", x))
_pointwise("com.microsoft.QLinearLeakyRelu", lambda n, x, alpha=0.01: n("LeakyRelu", x, alpha=alpha))
_pointwise("com.microsoft.QLinearSoftmax", _softmax)
_pointwise("com.microsoft.QLinearGlobalAveragePool", _global_average)
_pointwise("com.microsoft.QLinearAveragePool", _average)
_pointwise("com.ms.internal.nhwc.QLinearAveragePool", _average)
_pointwise("com.microsoft.QLinearReduceMean", _mean)


@declare("com.microsoft.QLinearWhere")
def qlinear_where(
    n: Nodes,
    condition: Value,
    X: Value,
    x_scale: Value,
    x_zero_point: Value,
    Y: Value,
    y_scale: Value,
    y_zero_point: Value,
    z_scale: Value,
    z_zero_point: Value,
) -> Value:
    """X where the condition holds, else Y, in another scale."""
    x, y = real(n, X, x_scale, x_zero_point), real(n, Y, y_scale, y_zero_point)
    return rounded(n, n("Where", condition, x, y), z_scale, z_zero_point, X.dtype)


@declare("com.microsoft.QLinearConcat")
def qlinear_concat(n: Nodes, Y_scale: Value, Y_zero_point: Value, *inputs: Value, axis: int) -> Value:
    """Tensors one after another in another scale; each comes with its scale and its zero point."""
    parts = [
        rounded(n, real(n, *inputs[k : k + 3]), Y_scale, Y_zero_point, inputs[k].dtype)
        for k in range(0, len(inputs), 3)
    ]  # fmt: skip
    return n.concat(parts, axis)


@declare("com.microsoft.MulInteger")
def mul_integer(n: Nodes, A: Value, A_zero_point: Value | None, B: Value, B_zero_point: Value | None = None) -> Value:
    """(A - A_zero_point) * (B - B_zero_point) in i32."""

    def shifted(x: Value, zero: Value | None) -> Value:
        wide = n.cast(x, I32)
        return wide if zero is None else n("Sub", wide, n.cast(scalar(n, zero), I32))

    return n("Mul", shifted(A, A_zero_point), shifted(B, B_zero_point))


@declare("com.microsoft.QEmbedLayerNormalization")
def qembed_layer_normalization(
    n: Nodes,
    input_ids: Value,
    segment_ids: Value | None,
    word_embedding: Value,
    position_embedding: Value,
    segment_embedding: Value | None,
    gamma: Value,
    beta: Value,
    mask: Value | None,
    word_scale: Value,
    position_scale: Value,
    segment_scale: Value | None,
    gamma_scale: Value,
    beta_scale: Value,
    word_zero: Value,
    position_zero: Value,
    segment_zero: Value | None,
    gamma_zero: Value,
    beta_zero: Value,
    *,
    epsilon: float = 1e-12,
) -> tuple[Value | None, ...]:
    """EmbedLayerNormalization of quantized tables."""
    segment = None
    if segment_embedding is not None and segment_scale is not None:
        segment = real(n, segment_embedding, segment_scale, segment_zero)
    return embed_layer_normalization(
        n, input_ids, segment_ids, real(n, word_embedding, word_scale, word_zero),
        real(n, position_embedding, position_scale, position_zero), segment, real(n, gamma, gamma_scale, gamma_zero),
        real(n, beta, beta_scale, beta_zero), mask, epsilon=epsilon,
    )  # fmt: skip


# Weights of a few bits.


def unpacked(n: Nodes, packed: Value, count: Any, bits: int, high_first: int = 0) -> Value:
    """The first `count` numbers of `bits` bits along the last axis of bytes."""
    refuse_odd(bits)
    return n("onnxc.UnpackBits", packed, n.dims(count), bits=bits, high_first=high_first)


def refuse_odd(bits: int) -> None:
    """Raises UnsupportedError where numbers of so many bits do not fill bytes."""
    if bits not in (2, 4, 8):
        raise UnsupportedError(f"weights of {bits} bits; there are 2, 4 and 8")


def unpacked_weights(
    n: Nodes, packed: Value, scales: Value, zero_points: Value | None, bits: int, block_size: int
) -> Value:
    """Real weights [*rows, width] of packed ones [*rows, bytes], with a scale and a zero point for each block of a row.

    Zero points are packed bytes, or reals, or 2^(bits - 1).
    """
    weights = unpacked(n, packed, scales.shape[-1] * block_size, bits)
    shape, blocks = weights.shape, scales.shape
    if zero_points is not None and zero_points.dtype != U8:
        centred = n(
            "Sub", n.reshape(n.cast(weights, scales.dtype), *blocks, block_size), column(n, zero_points, blocks)
        )
        return n.reshape(n("Mul", centred, column(n, scales, blocks)), *shape)
    if zero_points is None:
        zero = n.expand(n.constant(np.array(1 << (bits - 1), np.uint8)), *blocks)
    else:
        zero = unpacked(n, n.reshape(zero_points, *blocks[:-1], ceildiv(blocks[-1] * bits, 8)), blocks[-1], bits)
    return n("DequantizeLinear", weights, scales, zero, axis=-1, block_size=block_size)


def column(n: Nodes, x: Value, shape: Sequence[Any]) -> Value:
    return n.reshape(x, *shape, 1)


@declare("com.microsoft.MatMulNBits")
def matmul_nbits(
    n: Nodes,
    A: Value,
    B: Value,
    scales: Value,
    zero_points: Value | None = None,
    g_idx: Value | None = None,
    bias: Value | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Value:
    """A @ W' + bias for weights W [N, K] of a few bits, in blocks along K; `g_idx` [K] tells each column's block."""
    if weight_prepacked:
        raise UnsupportedError("weights that are packed for a certain GPU (weight_prepacked)")
    refuse_odd(bits)
    blocks = ceildiv(K, block_size)
    packed = n.reshape(B, N, blocks * (block_size * bits // 8))
    scales = n.reshape(scales, N, blocks)
    if g_idx is None and all(n.known(value) is not None for value in (B, scales, zero_points) if value is not None):
        points, zeros = n.known(zero_points), None
        if points is not None and points.dtype == np.uint8:
            shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
            every = (points.reshape(N, -1, 1) >> shifts) & np.uint8((1 << bits) - 1)
            points = every.reshape(N, -1)[:, : -(-K // block_size)]
        if points is not None:
            zeros = n.constant(points.reshape(N, -1))
        product = n(
            "onnxc.PackedMatMul", A, packed, scales, zeros, depth=K, bits=bits, block_size=block_size,
            accuracy_level=accuracy_level,
        )  # fmt: skip
    elif g_idx is None:
        weights = n.slice(unpacked_weights(n, packed, scales, zero_points, bits, block_size), 1, 0, K)
        product = n("com.microsoft.FusedMatMul", A, weights, transB=1)
    else:
        weights = _grouped(n, packed, scales, zero_points, n.slice(g_idx, 0, 0, K), bits, K)
        product = n("com.microsoft.FusedMatMul", A, weights, transB=1)
    return product if bias is None else n("Add", product, bias)


def _grouped(
    n: Nodes, packed: Value, scales: Value, zero_points: Value | None, groups: Value, bits: int, width: int
) -> Value:
    """Weights whose columns take scale and zero point from the blocks that `groups` [width] names."""
    weights = n.cast(unpacked(n, packed, width, bits), scales.dtype)
    if zero_points is None:
        zero = n.like(1 << (bits - 1), scales)
    else:
        if zero_points.dtype == U8:
            rows, blocks = scales.shape
            zero_points = unpacked(n, n.reshape(zero_points, rows, ceildiv(blocks * bits, 8)), blocks, bits)
        zero = n("Gather", n.cast(n.reshape(zero_points, *scales.shape), scales.dtype), groups, axis=1)
    return n("Mul", n("Sub", weights, zero), n("Gather", scales, groups, axis=1))


@declare("com.microsoft.GatherBlockQuantized")
def gather_block_quantized(
    n: Nodes,
    data: Value,
    indices: Value,
    scales: Value,
    zero_points: Value | None = None,
    *,
    gather_axis: int = 0,
    quantize_axis: int = 1,
    block_size: int = 128,
    bits: int = 4,
) -> Value:
    """Rows of a table of a few bits, whose blocks along `quantize_axis` have scales and zero points."""
    rank = data.tensor.rank
    along, blocked = gather_axis % rank, quantize_axis % rank
    apart = along != blocked
    whole = apart and blocked == rank - 1 and data.shape[-1] == scales.shape[-1] * block_size
    found = in_bytes(n, data, scales, zero_points) if whole and data.dtype.bits < 8 else None
    if found is not None:
        data, zero_points, bits = found

    def chosen(x: Value | None) -> Any:
        if x is None or not apart:
            return x
        if x.dtype.is_integer and x.dtype.bits < 8:  # Gather takes bytes at least
            x = n.cast(x, I8 if x.dtype.limits[0] < 0 else U8)
        return n("Gather", x, indices, axis=along)

    packed = data.dtype == U8
    data, scales, zeros = chosen(data), chosen(scales), chosen(zero_points)
    blocked += indices.tensor.rank - 1 if apart and blocked > along else 0
    if packed:
        if blocked != data.tensor.rank - 1 or not apart:
            raise UnsupportedError("packed bytes that are not in blocks along the last axis")
        table = unpacked_weights(n, data, scales, zeros, bits, block_size)
    else:
        table = n("DequantizeLinear", data, scales, zeros, axis=blocked, block_size=block_size or data.shape[blocked])
    return table if apart else n("Gather", table, indices, axis=along)


def in_bytes(n: Nodes, data: Value, scales: Value, zero_points: Value | None) -> tuple[Value, Value | None, int] | None:
    """A constant table of less than 8 bits, and its zero points, as packed bytes: an element would take a byte. None
    where they are no constants."""
    bits, array, zeros, low = data.dtype.bits, n.known(data), n.known(zero_points), int(data.dtype.limits[0])
    if array is None or (zero_points is not None and zeros is None):
        return None
    if zeros is None and low == 0:
        zeros = np.zeros([int(str(extent)) for extent in scales.shape], np.int8)

    def packed(codes: np.ndarray) -> Value:
        return n.constant(packed_codes(codes.astype(np.int8) - np.int8(low), bits))

    return packed(array), None if zeros is None else packed(zeros), bits


FP4 = (0.0, 5.208333333e-03, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the 16 codes mean: FP4 of bitsandbytes (the upper half is the lower one negated), NF4 after Dettmers 2023."""


@declare("com.microsoft.MatMulBnb4")
def matmul_bnb4(
    n: Nodes,
    A: Value,
    B: Value,
    absmax: Value,
    *,
    K: int,
    N: int,
    block_size: int,
    quant_type: int,
    transB: int = 1,
    training_mode: int = 0,
) -> Value:
    """A @ W' (or A @ W) for weights W [N, K] of 4-bit codes, each run of `block_size` with its largest magnitude."""
    table = np.array(NF4 if quant_type else (*FP4, *(-value for value in FP4)), np.float32)
    codes = unpacked(n, n.reshape(B, 1, ceildiv(N * K, 2)), N * K, 4, high_first=1)
    values = n("Gather", n.cast(n.constant(table), absmax.dtype), n.cast(n.reshape(codes, N * K), I64), axis=0)
    blocks = ceildiv(N * K, block_size)
    largest = n.expand(n.reshape(absmax, blocks, 1), blocks, block_size)
    scale = n.slice(n.reshape(largest, blocks * block_size), 0, 0, N * K)
    weights = n.reshape(n("Mul", values, scale), N, K)
    return n("com.microsoft.FusedMatMul", A, weights, transB=int(bool(transB)))
