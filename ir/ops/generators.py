"""Operators that make tensors of sizes alone, and those that only change the element type."""

from __future__ import annotations

import math

from ..dims import Dim, Sum, ceildiv, dim_max, known_le
from ..dtypes import BOOL, F32, I64, DType, of_numpy
from ..errors import UnsupportedError
from ..functions import cast
from ..graph import Constant, TensorType
from ..scalars import Scalar, bitcast, const, index
from ..tensors import Tensor, compute
from .declare import Context, Registry, Static
from .elementwise import converted

declare = Registry()


@declare.op("ConstantOfShape", static=("input",))
def constant_of_shape(input: Static, *, value: Constant | None = None) -> Tensor:
    """One value everywhere; an f32 zero by default."""
    dtype = F32 if value is None else of_numpy(value.array.dtype)
    number = 0 if value is None else value.array.reshape(-1)[0].item()
    filling = const(number, dtype)
    result = compute(input, dtype, lambda *_: filling)
    if dtype.is_integer:
        result.lower = result.upper = int(number)
    return result


@declare.op("Range", static=("start", "limit", "delta"), precise=("result",))
def range_(
    start: Static,
    limit: Static,
    delta: Static,
    *,
    stash_type: DType = F32,
    dtype: DType | None = None,
    context: Context,
) -> Tensor:
    """start, start + delta, ... up to `limit`, exclusive; `dtype` is the type where the operands are attributes."""
    first, stop, step = start[0], limit[0], delta[0]
    given = context.types[0] if context.types else None
    if isinstance(given, TensorType):
        dtype = given.dtype
    elif dtype is None:
        dtype = F32 if isinstance(first, float) else I64
    # Exporters count in floats too: whole numbers stay exact sizes.
    first, stop, step = (
        int(v) if isinstance(v, float) and v.is_integer() and abs(v) < 1 << 24 else v for v in (first, stop, step)
    )
    if all(isinstance(value, int | Sum) for value in (first, stop, step)):
        if known_le(1, step):
            count = ceildiv(stop - first, step)
        elif known_le(step, -1):
            count = ceildiv(first - stop, -step)
        else:
            raise UnsupportedError(f"a range with the step {step}, whose sign is known only at run time")
        result = compute((dim_max(0, count),), dtype, lambda i: cast(index(first + i * step), dtype))
        if known_le(0, first) and known_le(0, step) and dtype.is_integer:
            result.lower, result.upper = 0, dim_max(first, stop - 1)
        return result
    if not all(isinstance(value, int | float) for value in (first, stop, step)):
        raise UnsupportedError(f"a range from {first} to {stop} by {step}: such a size is known only at run time")
    wide = stash_type if dtype.bits < 32 else dtype
    length = max(0, math.ceil((stop - first) / step))

    def element(i: Dim) -> Scalar:
        return cast(cast(index(i), wide) * float(step) + float(first), dtype)

    return compute((length,), dtype, element)


@declare.op("EyeLike")
def eye_like(x: Tensor, *, dtype: DType | None = None, k: int = 0) -> Tensor:
    """1 on the k-th diagonal, 0 elsewhere."""
    kind = dtype or x.dtype
    return compute(x.shape, kind, lambda i, j: cast(index(i + k).equal(index(j)), kind))


@declare.op("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return compute(x.shape, like.dtype, lambda *i: converted(x.at(i), like.dtype, bool(saturate), round_mode), x)


@declare.op("BitCast")
def bit_cast(x: Tensor, *, to: DType) -> Tensor:
    """The same bits as another type of the same width."""
    if to.bits != x.dtype.bits:
        raise UnsupportedError(f"the bits of {x.dtype} as {to}: the widths differ")
    return compute(x.shape, to, lambda *i: bitcast(x.at(i), to), x)


@declare.op("Dropout", static=("ratio", "training_mode"))
def dropout(
    x: Tensor, ratio: Static | None = None, training_mode: Static | None = None, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """`x` itself, and a mask that is true everywhere: training is not compiled."""
    if training_mode and training_mode[0] and (ratio is None or ratio[0] != 0):
        raise UnsupportedError("dropout in training mode draws random numbers; export the model for inference")
    kept = const(True, BOOL)
    return compute(x.shape, x.dtype, lambda *i: x.at(i), x), compute(x.shape, BOOL, lambda *_: kept)
