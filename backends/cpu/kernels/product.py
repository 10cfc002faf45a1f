"""Sums of products, recognised in an anchor's definition: which axes are rows, columns, batch, and how memory lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....ir import scalars as s
from ....ir.dims import Dim, linear, symbol
from ....ir.dtypes import F32, F64, DType
from ....ir.scalars import Load, Scalar
from ....ir.tensors import Indices
from ....passes.regions import Region
from ...kernels.product import Factors, find_factors
from ..dot_products import Dot


@dataclass(frozen=True)
class Axis:
    """An axis of the result, or a summed one: the name of its index, its extent, the operands' strides along it."""

    name: str
    extent: Dim
    left: Dim
    right: Dim

    @property
    def index(self) -> Dim:
        return symbol(self.name, 0, self.extent - 1)


@dataclass(frozen=True)
class Product:
    """result[batch, rows, column] = sum over depth of left * right.

    `left` and `right` are loads whose offsets are linear in all axes: `left_start` and `right_start` are what remains
    at index 0. `element` is the anchor's element over `accumulator_leaf`, `dtype` the type of the factors: f32, f64, or
    u32 for groups of elements that follow one another along the depth and that `dot` multiplies. Right is the operand
    with columns; `batch` axes are those that both operands have, and columns before the last.
    """

    indices: Indices
    shape: tuple[Dim, ...]
    dtype: DType
    left: Load
    right: Load
    left_start: Dim
    right_start: Dim
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    column: Axis
    depth: tuple[Axis, ...]
    element: Scalar
    dot: Dot | None = None

    @property
    def sums(self) -> DType:
        """The type of the sum."""
        return self.dtype if self.dot is None else self.dot.sums


def find_product(region: Region) -> Product | None:
    """The anchor's definition as a product of two buffers' elements, or None where it is not one."""
    found = find_factors(region)
    if found is None or found.total.dtype not in (F32, F64) or isinstance(found.indices[-1], int):
        return None
    left, right = _buffer_read(found.left), _buffer_read(found.right)
    if left is None or right is None or left.dtype != right.dtype:
        return None
    return product_of(found, left, right)


def product_of(found: Factors, left: Load, right: Load) -> Product | None:
    """The product of what two loads read, or None where their offsets are not linear in the indices."""
    shape, total = found.shape, found.total
    names = [*((f"o{a}", d) for a, d in enumerate(shape) if d != 1), *found.ranges]
    axes: list[Axis] = []
    left_start, right_start = left.offset, right.offset
    for name, extent in names:
        a, b = linear(left_start, name), linear(right_start, name)
        if a is None or b is None:
            return None
        left_start, right_start = a[1], b[1]
        axes.append(Axis(name, extent, a[0], b[0]))
    own = {axis.name for axis in axes}
    if any(s.free_symbols(axis.left) & own or s.free_symbols(axis.right) & own for axis in axes):
        return None
    results = [axis for axis in axes if axis.name.startswith("o")]
    return Product(
        found.indices,
        shape,
        total.dtype,
        left,
        right,
        left_start,
        right_start,
        tuple(axis for axis in results[:-1] if axis.right != 0),
        tuple(axis for axis in results if axis.right == 0),
        results[-1],
        tuple(axis for axis in axes if not axis.name.startswith("o")),
        found.element,
    )


def _buffer_read(factor: Scalar) -> Load | None:
    """The unconditional load that a factor is, conversion to the sum's type left out."""
    while isinstance(factor, s.Cast) and factor.operand.dtype.is_float and factor.dtype.is_float:
        factor = factor.operand
    if isinstance(factor, Load) and factor.predicate is None and factor.dtype.is_float:
        return factor
    return None


def flattened(axes: Sequence[Axis], index: Dim) -> dict[str, Dim]:
    """The indices of `axes` for a position in their row-major product."""
    found: dict[str, Dim] = {}
    for axis in reversed(axes[1:]):
        found[axis.name] = index % axis.extent
        index = index // axis.extent
    if axes:
        found[axes[0].name] = index
    return found
