"""What weights of a few bits need beyond ONNX's operators."""

from __future__ import annotations

from ..dims import Dim, floordiv, modulo
from ..dtypes import I32, U8
from ..functions import cast, shift_right
from ..scalars import Scalar, binary, const, index
from ..tensors import Tensor, compute
from .declare import Registry, Static

declare = Registry()


@declare.op("onnxc.UnpackBits", static=("count",))
def unpack_bits(packed: Tensor, count: Static, *, bits: int, high_first: int = 0) -> Tensor:
    """The first `count` numbers of 2, 4 or 8 bits along the last axis of bytes, each as a byte; the first number is in
    the lowest bits, or in the highest."""
    each = 8 // bits

    def element(*i: Dim) -> Scalar:
        byte = cast(packed.at((*i[:-1], floordiv(i[-1], each))), I32)
        place = modulo(i[-1], each)
        shift = cast(index((each - 1 - place if high_first else place) * bits), I32)
        return cast(binary("and", shift_right(byte, shift), const((1 << bits) - 1, I32)), U8)

    if bits == 8:
        return packed
    return compute((*packed.shape[:-1], count[0]), U8, element, packed)
