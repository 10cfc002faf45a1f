"""Determinants by elimination with partial pivoting."""

from __future__ import annotations

from ...ir import functions as f
from ...ir import scalars as s
from ...ir.dims import Dim, product, symbol
from ...ir.dtypes import F32
from ...ir.loops import For, If, Let, Statement, Store
from ...ir.scalars import Buffer, Scalar, load
from ...ir.target import Target
from ...ir.tensors import Indices, flat_offset
from ...passes.regions import Lowered, Region
from .calls import Variable, call, over, present


def schedule(region: Region, target: Target) -> Lowered:
    """Each matrix is eliminated in a copy, row by row in vectors; matrices are shared among threads."""
    x = present(region, 0)
    result, tensor = region.outputs[0]
    dtype = F32 if x.dtype.bits < 32 else x.dtype
    size = x.shape[-1]
    work = Buffer("work", dtype, x.size)

    def one(where: Indices) -> list[Statement]:
        start = flat_offset((*where, 0, 0), x.shape)
        p, row, column = symbol("p", 0, size - 1), symbol("row", 0, size - 1), symbol("column", 0, size - 1)
        below, best = p + 1 + symbol("below", 0, size - 1), symbol("best_row", 0, size - 1)
        total, pivot, greatest = (Variable(name, dtype) for name in ("total", "pivot", "greatest"))
        place, swapped, factor = Variable("place"), Variable("swapped", dtype), Variable("factor", dtype)

        def at(i: Dim, j: Dim) -> Dim:
            return start + i * size + j

        def element(i: Dim, j: Dim) -> Scalar:
            return load(work, at(i, j))

        copy = Store(work, at(row, column), s.cast(x.at((*where, row, column)), dtype))
        exchange = (
            swapped.define(element(p, column)),
            Store(work, at(p, column), element(best, column)),
            Store(work, at(best, column), swapped.value),
        )
        right = p + 1 + symbol("right", 0, size - 1)
        subtract = Store(work, at(below, right), element(below, right) - factor.value * element(p, right))
        eliminate = (
            factor.define(element(below, p) / pivot.value),
            For("right", size - 1 - p, (subtract,), "vector"),
        )
        look = If(
            greatest.value < f.absolute(element(below, p)),
            (greatest.set(f.absolute(element(below, p))), place.set(s.index(below))),
        )
        step: list[Statement] = [
            greatest.define(f.absolute(element(p, p))),
            place.define(s.index(p)),
            For("below", size - 1 - p, (look,)),
            Let("best_row", place.value),
            If(
                s.index(p) < s.index(best),
                (For("column", size, exchange, "vector"), total.set(-total.value)),
            ),
            pivot.define(element(p, p)),
            total.set(total.value * pivot.value),
            If(~pivot.value.equal(0), (For("below", size - 1 - p, eliminate),)),
        ]
        return [
            For("row", size, (For("column", size, (copy,), "vector"),)),
            total.define(1),
            For("p", size, tuple(step)),
            Store(result, flat_offset(where, tensor.shape), s.cast(total.value, tensor.dtype)),
        ]

    body = over(x.shape[:-2], one, "matrix", product((size, size, size)), target)
    return Lowered((call(region, "determinant", [body], [work]),), (work,))
