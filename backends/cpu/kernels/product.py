"""Sums of products, recognised in an anchor's definition: which axes are rows, columns, batch, and how memory lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ....ir import scalars as s
from ....ir.dims import Dim, linear, symbol
from ....ir.dtypes import F32, F64, DType
from ....ir.scalars import Load, Scalar
from ....ir.tensors import Indices
from ....passes.nests import all_reductions
from ....passes.regions import Region
from .epilogue import accumulator_leaf, anchor_indices


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
    at index 0. `element` is the anchor's element over `accumulator_leaf`, `dtype` the type of the sum. Right is the
    operand with columns; `batch` axes are those that both operands have, and columns before the last.
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


def find_product(region: Region) -> Product | None:
    """The anchor's definition as a product of two buffers' elements, or None where it is not one."""
    if region.anchor_output is None or not region.anchor_output.shape or region.anchor_output.kind == "opaque":
        return None
    shape = region.anchor_output.shape
    indices = anchor_indices(shape)
    if isinstance(indices[-1], int) or 0 in shape:
        return None
    value = region.anchor_output.at(indices)
    sums = all_reductions(value)
    if len(sums) != 1 or sums[0].op != "add" or sums[0].dtype not in (F32, F64):
        return None
    total = sums[0]
    body = s.Rewriter(dims={name: 0 for name, extent in total.ranges if extent == 1})(total.body)
    if not (isinstance(body, s.Binary) and body.op == "mul"):
        return None
    factors = [_buffer_read(body.left), _buffer_read(body.right)]
    column = f"o{len(shape) - 1}"
    factors.sort(key=lambda f: f is not None and column in s.free_symbols(f.offset))
    left, right = factors
    if left is None or right is None or left.dtype != right.dtype or column in s.free_symbols(left.offset):
        return None
    names = [(f"o{a}", d) for a, d in enumerate(shape) if d != 1] + [(n, d) for n, d in total.ranges if d != 1]
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
    element = s.Rewriter(
        lambda node: accumulator_leaf(total.dtype, indices[-1]) if node.digest == total.digest else None
    )(value)
    if all_reductions(element):
        return None
    return Product(
        indices,
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
        element,
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
