"""Products of bytes less their zero points, recognised in an anchor's definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....ir import scalars as s
from ....ir.dims import linear
from ....ir.dtypes import I8, I32, U8
from ....ir.scalars import Load, Scalar
from ....passes.regions import Region
from ...kernels.product import find_factors
from .packing import known
from .product import Product, product_of


@dataclass(frozen=True)
class Integers:
    """A product of bytes that lie in memory: `zeros` are the operands' zero points, numbers or expressions in i32 over
    the indices of the result; of a constant right operand perhaps an array for [batches, columns]."""

    whole: Product
    left_zero: Scalar
    right_zero: Scalar | np.ndarray
    array: np.ndarray | None


def find_integers(region: Region) -> Integers | None:
    """The anchor's definition as a product of bytes, or None where it is not one."""
    found = find_factors(region)
    if found is None or found.total.dtype != I32 or isinstance(found.indices[-1], int):
        return None
    left, right = _centred(found.left), _centred(found.right)
    if left is None or right is None:
        return None
    whole = product_of(found, left[0], right[0])
    if whole is None or not whole.depth:
        return None
    summed = {axis.name for axis in whole.depth}
    beyond = summed | {axis.name for axis in whole.rows}
    if any(left[1].mentions(name) for name in summed) or any(right[1].mentions(name) for name in beyond):
        return None
    array = region.constants.get(whole.right.buffer.name)
    if not all(isinstance(axis.extent, int) for axis in (*whole.batch, *whole.depth, whole.column)):
        array = None
    zero = right[1] if array is None else _constant_zeros(region, whole, right[1])
    if isinstance(zero, Scalar) and not isinstance(zero, s.Const):
        array = None
        if zero.mentions(whole.column.name):
            return None
    return Integers(whole, left[1], zero, array)


def _centred(factor: Scalar) -> tuple[Load, Scalar] | None:
    """The unconditional load of a byte that a factor is, less its zero point."""
    zero: Scalar = s.const(0, I32)
    if isinstance(factor, s.Binary) and factor.op == "sub":
        zero, factor = _folded(factor.right), factor.left
    while isinstance(factor, s.Cast) and factor.dtype == I32:
        factor = factor.operand
    if isinstance(factor, Load) and factor.predicate is None and factor.dtype in (U8, I8):
        return factor, zero
    return None


def _folded(zero: Scalar) -> Scalar:
    """A zero point, as a literal where it is one."""
    plain = zero
    while isinstance(plain, s.Cast):
        plain = plain.operand
    return s.const(int(plain.value), I32) if isinstance(plain, s.Const) else zero


def _constant_zeros(region: Region, whole: Product, zero: Scalar) -> Scalar | np.ndarray:
    """The zero points of a constant's columns as an array [batches, columns] where they are constants, else as they
    are."""
    load = zero.operand if isinstance(zero, s.Cast) else zero
    array = region.constants.get(load.buffer.name) if isinstance(load, Load) and load.predicate is None else None
    if array is None:
        return zero
    assert isinstance(load, Load)
    start, axes = load.offset, (*whole.batch, whole.column)
    strides: list[int] = []
    for axis in axes:
        found = linear(start, axis.name)
        if found is None or not isinstance(found[0], int):
            return zero
        strides.append(found[0])
        start = found[1]
    if not isinstance(start, int):
        return zero
    flat, extents = np.ascontiguousarray(array).reshape(-1)[start:], [known(axis.extent) for axis in axes]
    bytes_ = [stride * flat.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(flat, extents, bytes_, writeable=False)
    return view.astype(np.int32).reshape(-1, extents[-1])


def is_zero(zero: Scalar | np.ndarray) -> bool:
    """Whether a zero point is surely 0."""
    return isinstance(zero, s.Const) and zero.value == 0
