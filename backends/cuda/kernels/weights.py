"""Constant operands of products, laid out at compile time: [batch, position, depth] in rows of whole pieces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim, linear, symbol
from ....ir.dtypes import F32
from ....ir.scalars import Buffer
from ....ir.tensors import buffer_tensor
from ....passes.regions import Lowered, Region
from .contraction import index
from .filters import ALIGNED, rounded_to_tf32
from .finish import BATCH, DEPTH
from .loaders import Matrix, as_read
from .tiles import CHUNK


def constant_view(region: Region, matrix: Matrix, batches: Dim) -> np.ndarray | None:
    """The elements of an operand that is a constant of the model, as a view [batch, position, depth]; [1, ...] where it
    is the same in all batches. None for any other operand."""
    read = as_read(matrix.value)
    array = None if read is None else region.constants.get(read.load.buffer.name)
    if read is None or array is None or read.condition is not None:
        return None
    names, extents = (BATCH, matrix.position, DEPTH), (batches, *matrix.extents)
    start = read.load.offset
    shape: list[int] = []
    strides: list[int] = []
    for name, extent in zip(names, extents, strict=True):
        split = linear(start, name)
        stride = None if split is None else split[0]
        if split is None or not isinstance(stride, int):
            return None
        start = split[1]
        size = 1 if stride == 0 and name == BATCH else extent
        if not isinstance(size, int):
            return None
        shape.append(size)
        strides.append(stride * array.itemsize)
    if not isinstance(start, int):
        return None
    flat = np.ascontiguousarray(array).reshape(-1)[start:]
    return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)


def pack(region: Region, matrix: Matrix, batches: Dim, rounded: bool) -> tuple[Region, Matrix, Lowered] | None:
    """The operand along depth in rows of whole chunks, zeros behind the last element; f32 rounded to tf32 if `rounded`.

    Gives the region with the packed buffer among its inputs, the operand as it lies there, and what makes it. None for
    an operand that is no constant.
    """
    view = constant_view(region, matrix, batches)
    if view is None:
        return None
    count, positions, depth = view.shape
    chunk = CHUNK // matrix.dtype.bytes
    pitch = -(-depth // chunk) * chunk
    buffer = Buffer(f"{matrix.side}_packed", matrix.dtype, count * positions * pitch)

    def make() -> np.ndarray:
        result = np.zeros((count, positions, pitch), view.dtype)
        result[:, :, :depth] = rounded_to_tf32(view) if rounded and matrix.dtype == F32 else view
        return result.reshape(-1)

    at = index(BATCH, count) * positions + index(matrix.position, positions)
    offset = at * pitch + symbol(DEPTH, 0, pitch - 1)
    extents = (matrix.extents[0], pitch)
    tensor = buffer_tensor(buffer.name, buffer.dtype, (buffer.size,))
    changed = replace(
        region,
        inputs=(*region.inputs, tensor),
        alignments={**region.alignments, buffer.name: ALIGNED},
    )
    return changed, replace(matrix, value=s.load(buffer, offset), extents=extents), Lowered((), (), {buffer.name: make})
