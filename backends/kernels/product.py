"""Sums of products of two operands, recognised in an anchor's definition, whatever the operator is called."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir import scalars as s
from ...ir.dims import Dim
from ...ir.scalars import Scalar
from ...ir.tensors import Indices
from ...passes.nests import all_reductions
from ...passes.regions import Region
from .epilogue import accumulator_leaf, anchor_indices


@dataclass(frozen=True)
class Factors:
    """anchor[indices] = element(sum over the ranges of left * right).

    `left` and `right` are expressions over the indices (`o0`, `o1`, ... and the names of the ranges), of which `right`
    is one that the last index (of an axis longer than 1) occurs in and `left` one that it does not. `element` reads the
    sum as `accumulator_leaf`.
    """

    indices: Indices
    shape: tuple[Dim, ...]
    total: s.Reduce
    left: Scalar
    right: Scalar
    element: Scalar

    @property
    def ranges(self) -> tuple[tuple[str, Dim], ...]:
        """Names and extents of the summed indices, those of one element left out."""
        return tuple((name, extent) for name, extent in self.total.ranges if extent != 1)


def find_factors(region: Region) -> Factors | None:
    """The anchor's definition as a sum of products, or None where it is not one."""
    if region.anchor_output is None or region.anchor_output.kind == "opaque":
        return None
    shape = region.anchor_output.shape
    indices = anchor_indices(shape)
    names = [str(index) for index in indices if not isinstance(index, int)]
    if not names or 0 in shape:
        return None
    value = region.anchor_output.at(indices)
    sums = all_reductions(value)
    if len(sums) != 1 or sums[0].op != "add":
        return None
    total = sums[0]
    body = s.Rewriter(dims={name: 0 for name, extent in total.ranges if extent == 1})(total.body)
    if not (isinstance(body, s.Binary) and body.op == "mul"):
        return None
    column = names[-1]
    left, right = sorted((body.left, body.right), key=lambda factor: factor.mentions(column))
    if left.mentions(column) or not right.mentions(column):
        return None
    leaf = accumulator_leaf(total.dtype, indices[shape_position(column)])
    element = s.Rewriter(lambda node: leaf if node.digest == total.digest else None)(value)
    if all_reductions(element):
        return None
    return Factors(indices, shape, total, left, right, element)


def shape_position(name: str) -> int:
    """The axis of an index that `anchor_indices` named."""
    return int(name[1:])
