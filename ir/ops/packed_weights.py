"""Products with weights that stay as they are stored: codes of 2, 4 or 8 bits, with a scale for each block of them."""

from __future__ import annotations

import numpy as np

from ..dims import Dim, ceildiv, floordiv, modulo
from ..dtypes import F32, I32
from ..errors import ShapeError
from ..functions import cast, shift_right
from ..scalars import Scalar, binary, const, index
from ..tensors import Indices, Tensor, assume_equal, assume_shape, reduce_tensor
from .declare import Registry

declare = Registry()


def packed_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis as bytes, the first in the lowest bits."""
    each = 8 // bits
    full = np.pad(codes.astype(np.uint8), [*[(0, 0)] * (codes.ndim - 1), (0, -codes.shape[-1] % each)])
    parts = [full[..., place::each] << np.uint8(place * bits) for place in range(each)]
    return np.asarray(np.bitwise_or.reduce(parts))


@declare.op("onnxc.PackedMatMul", heavy=True)
def packed_matmul(
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    depth: int,
    bits: int,
    block_size: int,
    accuracy_level: int = 0,
) -> Tensor:
    """a [*, depth] @ W' for weights W [N, depth] that are (code - zero point) * scale, summed in f32: [*, N].

    codes: u8 [N, bytes], codes of a row one after the other, the first in the lowest bits; those beyond the depth mean
    nothing. scales, zero_points: [N, blocks], each for `block_size` neighbours of a row; zero points are u8 or of the
    type of the scales, where absent 2^(bits - 1). `accuracy_level` is ONNX Runtime's: with 4 a schedule may round each
    block of a row of `a` to 8 bits.
    """
    if bits not in (2, 4, 8) or block_size < 1 or a.rank < 1:
        raise ShapeError(f"weights of {bits} bits in blocks of {block_size}; there are 2, 4 and 8 bits")
    columns, each = codes.shape[0], 8 // bits
    assume_equal(a.shape[-1], depth, "the inner dimensions of the product")
    if isinstance(codes.shape[1], int) and codes.shape[1] * each < depth:
        raise ShapeError(f"rows of {codes.shape[1]} bytes hold no {depth} codes of {bits} bits")
    blocks = (columns, ceildiv(depth, block_size))
    assume_shape(scales, blocks, "scales and blocks")
    if zero_points is not None:
        assume_shape(zero_points, blocks, "zero points and blocks")
    sources = (a, codes, scales) if zero_points is None else (a, codes, scales, zero_points)

    def weight(column: Dim, place: Dim) -> Scalar:
        code = cast(codes.at((column, floordiv(place, each))), I32)
        if bits < 8:
            code = shift_right(code, cast(index(modulo(place, each) * bits), I32))
            code = binary("and", code, const((1 << bits) - 1, I32))
        block = (column, floordiv(place, block_size))
        zero = const(float(1 << (bits - 1)), F32) if zero_points is None else cast(zero_points.at(block), F32)
        return (cast(code, F32) - zero) * cast(scales.at(block), F32)

    def body(i: Indices, r: Indices) -> Scalar:
        return binary("mul", cast(a.at((*i[:-1], *r)), F32), weight(i[-1], r[0]))

    total = reduce_tensor("add", (*a.shape[:-1], columns), F32, (depth,), body, *sources)
    return cast(total, a.dtype)
