"""A contraction as a batch of matrix products: [batch, row, depth] times [batch, depth, column]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ....ir import scalars as s
from ....ir.dims import Dim, product, symbol
from ....ir.dtypes import I8, U8, DType
from ....ir.scalars import Scalar
from ....passes.regions import Region
from ...kernels.epilogue import Epilogue, Result, accumulator_leaf, epilogue
from ...kernels.product import Factors, find_factors, shape_position
from .contraction import Contraction
from .finish import BATCH, COLUMN, DEPTH, ROW
from .loaders import Matrix


@dataclass(frozen=True)
class Problem:
    """A product: its sums, and the operands as expressions over the symbols batch, row, column and depth."""

    sums: Contraction
    left: Matrix
    right: Matrix


def find_problem(region: Region) -> tuple[Factors, Problem | None] | None:
    """The anchor as matrix products, or None where it is no sum of products; the problem is None where an output needs
    other sums than its own."""
    found = find_factors(region)
    if found is None:
        return None
    axes = [(str(index), found.shape[shape_position(str(index))]) for index in found.indices if index != 0]
    batch = [axis for axis in axes if found.left.mentions(axis[0]) and found.right.mentions(axis[0])]
    columns = [axis for axis in axes if found.right.mentions(axis[0]) and axis not in batch]
    rows = [axis for axis in axes if axis not in batch and axis not in columns]
    groups = {BATCH: batch, ROW: rows, COLUMN: columns, DEPTH: list(found.ranges)}
    extents = {name: product(extent for _, extent in group) for name, group in groups.items()}
    indices = {name: symbol(name, 0, extent - 1) if extent != 1 else 0 for name, extent in extents.items()}
    dims = {name: index for group in groups for name, index in _unflattened(groups[group], indices[group]).items()}
    at = s.Rewriter(dims=dims)
    left, right = (_narrow(at(factor)) for factor in (found.left, found.right))
    if region.anchor is not None and region.anchor.op == "onnxc.PackedMatMul" and left.dtype.bits == 16:
        right = s.cast(right, left.dtype)  # for tensor cores, as ONNX Runtime does it
    if not {left.dtype, right.dtype} <= {I8, U8}:  # bytes of both kinds are multiplied as they are
        wide = next((t for t in (left.dtype, right.dtype) if _holds(t, left.dtype, right.dtype)), found.total.dtype)
        left, right = s.cast(left, wide), s.cast(right, wide)
    last = next(index for index in reversed(found.indices) if index != 0)
    outputs = epilogue(region, found.indices, found.shape, found.element, str(last), found.total.dtype)
    if outputs is None:
        return found, None
    dtype = found.total.dtype
    over_tile = Epilogue(tuple(_over_tile(result, at, dtype) for result in outputs.results), COLUMN, dtype)
    return found, Problem(
        Contraction(extents[BATCH], extents[ROW], extents[COLUMN], extents[DEPTH], dtype, over_tile),
        Matrix("left", left, ROW, (extents[ROW], extents[DEPTH])),
        Matrix("right", right, COLUMN, (extents[COLUMN], extents[DEPTH])),
    )


def _over_tile(result: Result, at: s.Rewriter, dtype: DType) -> Result:
    """A result over batch, row and column."""
    leaf = accumulator_leaf(dtype, symbol(COLUMN))
    sums = s.Rewriter(lambda node: leaf if isinstance(node, s.Load) and node.buffer.name == leaf.buffer.name else None)
    return replace(result, offset=at.dim(result.offset), value=sums(at(result.value)))


def _unflattened(axes: Sequence[tuple[str, Dim]], index: Dim) -> dict[str, Dim]:
    """The indices of axes for a position in their row-major product."""
    found: dict[str, Dim] = {}
    for name, extent in reversed(axes[1:]):
        found[name] = index % extent
        index = index // extent
    if axes:
        found[axes[0][0]] = index
    return found


def _narrow(factor: Scalar) -> Scalar:
    """A factor without the exact conversions to the type of the sum."""
    while isinstance(factor, s.Cast) and _exact(factor.operand.dtype, factor.dtype):
        factor = factor.operand
    return factor


def _exact(source: DType, wanted: DType) -> bool:
    """Whether every value of one type is one of the other, which is wider."""
    if source.is_float or wanted.is_float:
        return source.is_float and wanted.is_float and source.bits < wanted.bits
    fits = source.kind == wanted.kind or wanted.kind == "int"
    return source.is_integer and wanted.is_integer and source.bits < wanted.bits and fits


def _holds(wide: DType, *others: DType) -> bool:
    """Whether every value of the others is one of a type."""
    return all(other == wide or _exact(other, wide) for other in others)
