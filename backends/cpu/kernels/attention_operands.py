"""Operands of an attention where they lie in memory, or copied to where a kernel can read them."""

from __future__ import annotations

from dataclasses import replace

from ....ir import scalars as s
from ....ir.dims import Dim, linear, product, symbol
from ....ir.dtypes import F32, I8, U8
from ....ir.scalars import Buffer, Load, Scalar
from ....ir.target import Target
from ....ir.tensors import Indices, Tensor, flat_offset
from ....passes.nests import build_nests
from ....passes.regions import Call, Region
from ...kernels.attention_problem import CHANNEL, ROW, Matrix, Problem
from ...kernels.attention_scores import number
from ...kernels.calls import call


def readable(
    region: Region, problem: Problem, matrix: Matrix, name: str, by_vectors: bool, target: Target
) -> tuple[Matrix, tuple[Call, Buffer] | None]:
    """The matrix where it can be read in place, else one of f32 in memory and the call that writes it.

    `by_vectors`: channels are read by vectors.
    """
    lanes = target.lanes(32)
    strides = strides_of(matrix.value)
    if strides is not None and (
        not by_vectors or (strides[1] == 1 and (target.has("avx512vl") or matrix.channels % lanes == 0))
    ):
        return matrix, None
    padded = -(-matrix.channels // lanes) * lanes if by_vectors else matrix.channels
    shape = (*(axis.extent for axis in problem.axes), matrix.rows, padded)
    names = (*(axis.name for axis in problem.axes), ROW, CHANNEL)

    def element(indices: Indices) -> Scalar:
        value = real(matrix, s.Rewriter(dims=dict(zip(names, indices, strict=True)))(matrix.value))
        exists = s.index(indices[-1]) < s.index(matrix.channels)
        return value if padded == matrix.channels else s.select(exists, value, number(0))

    buffer = Buffer(f"{name}_copy", F32, product(shape))
    copy = call(region, f"attention_{name}", build_nests([(buffer, Tensor(shape, F32, element, "map"))]), (buffer,))
    at = tuple(0 if extent == 1 else symbol(name, 0, extent - 1) for name, extent in zip(names, shape, strict=True))
    return replace(matrix, value=s.load(buffer, flat_offset(at, shape)), zero=None), (copy, buffer)


def real(matrix: Matrix, read: Scalar) -> Scalar:
    """What is read of a matrix as f32, its zero point subtracted."""
    value = s.cast(read, F32)
    return value if matrix.zero is None else value - s.widen(s.cast(matrix.zero, F32), value.lanes)


def memory_of(matrix: Matrix, name: str) -> Buffer:
    """A pointer to elements of a matrix that is read in place."""
    return Buffer(name, matrix.value.dtype)


def strides_of(value: Scalar) -> tuple[Dim, Dim] | None:
    """How far apart rows and channels of a matrix lie; None where it is no array of f32 or of 8-bit integers, or they
    lie unevenly."""
    if not isinstance(value, Load) or value.predicate is not None or value.dtype not in (F32, I8, U8):
        return None
    found = [linear(value.offset, name) for name in (ROW, CHANNEL)]
    if any(split is None or {ROW, CHANNEL} & s.free_symbols(split[0]) for split in found):
        return None
    (rows, _), (channels, _) = (split for split in found if split is not None)
    return rows, channels


def element_at(matrix: Matrix, row: Dim, channel: Dim) -> tuple[Buffer, Dim]:
    """Where an element lies of a matrix that is read in place."""
    assert isinstance(matrix.value, Load)
    return matrix.value.buffer, s.Rewriter(dims={ROW: row, CHANNEL: channel}).dim(matrix.value.offset)
