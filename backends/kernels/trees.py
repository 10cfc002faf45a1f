"""Decision trees: several rows walk a tree in step, a fixed number of comparisons each, without a branch.

A walk is a chain of dependent loads; walks of `TOGETHER` rows hide each other's latency. Rows are taken in blocks, so
that a tree stays in the first-level cache while all rows of a block walk it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir import functions as f
from ...ir import scalars as s
from ...ir.dims import Dim, ceildiv, dim_min, symbol
from ...ir.dtypes import I64
from ...ir.loops import For, Let, Statement, Store
from ...ir.scalars import IDENTITY, Scalar, load
from ...ir.target import Target
from ...ir.tensors import Tensor, position_of
from ...passes.regions import Lowered, Region
from .calls import Variable, attribute, call, operand, present

TOGETHER = 8
"""Rows whose walks are interleaved: 8 to 12 loads in flight are what one core keeps up with."""
BLOCK = 128
"""Rows that walk one tree before the next: their features and sums stay in the first-level cache too."""


def schedule(region: Region, target: Target) -> Lowered:
    """Blocks of rows are shared among threads; on a GPU each thread walks for one row."""
    x, feature, threshold, children, trees, weight = (present(region, i) for i in range(6))
    first, targets_of, missing = (operand(region, i) for i in (6, 7, 8))
    result, tensor = region.outputs[0]
    rows, targets = tensor.shape
    op = attribute(region, "aggregate")
    nodes, count = feature.shape[0], trees.shape[0]
    last = x.shape[1] - 1
    whole = target.kind == "cpu"
    block, together = (BLOCK, TOGETHER) if whole else (1, 1)

    def indexed(t: Tensor, *where: Dim, upper: Dim) -> Dim:
        return s.as_dim(s.cast(t.at(where), I64), 0, upper)

    def taken(row: Dim, node: Dim) -> Scalar:
        known = isinstance(last, int)
        column = indexed(feature, node, upper=last) if known else position_of(feature, (node,), x.shape[1])
        value = x.at((row, column))
        goes = value <= threshold.at((node,))
        return goes if missing is None else goes | (f.isnan(value) & s.cast(missing.at((node,)), goes.dtype))

    def walks(start: Dim, many: int, name: str) -> Sequence[Statement]:
        """Statements by which `many` rows from `start` on walk the tree and add what its leaves hold."""
        at = [Variable(f"{name}{number}") for number in range(many)]
        here = [node.index(nodes - 1) for node in at]
        step = [
            node.set(s.cast(children.at((place, s.as_dim(s.cast(taken(start + r, place), I64), 0, 1))), I64))
            for r, (node, place) in enumerate(zip(at, here, strict=True))
        ]
        body: list[Statement] = [node.define(s.index(symbol("root", 0, nodes - 1))) for node in at]
        body.append(For(f"{name}_level", symbol("depth", 0), tuple(step)))
        for r, place in enumerate(here):
            body += added(start + r, place, f"{name}{r}")
        return body

    def added(row: Dim, leaf: Dim, name: str) -> list[Statement]:
        def into(which: Dim, value: Scalar) -> Statement:
            where = row * targets + which
            return Store(result, where, s.binary(op, load(result, where), value))

        if first is None or targets_of is None:
            return [into(0, weight.at((leaf,)))]
        entry = symbol(f"{name}_entry", 0, weight.shape[0] - 1)
        begin, end = (indexed(first, leaf + i, upper=weight.shape[0]) for i in (0, 1))
        at = symbol(f"{name}_begin", 0, weight.shape[0])
        inner = (
            Let(f"{name}_entry", at + symbol(f"{name}_k", 0)),
            into(indexed(targets_of, entry, upper=targets - 1), weight.at((entry,))),
        )
        return [Let(f"{name}_begin", begin), For(f"{name}_k", end - at, inner)]

    base = symbol("block", 0) * block
    here = symbol("rows_here", 0, block)
    group, single, cell = symbol("group", 0), symbol("single", 0), symbol("cell", 0)
    tree = symbol("tree", 0, count - 1)
    walking: list[Statement] = [
        Let("root", indexed(trees, tree, 0, upper=nodes - 1)),
        Let("depth", indexed(trees, tree, 1, upper=nodes)),
    ]
    if whole:
        walking.append(For("group", here // together, tuple(walks(base + group * together, together, "node"))))
        rest = base + (here // together) * together + single
        walking.append(For("single", here % together, tuple(walks(rest, 1, "last"))))
    else:
        walking += walks(base, 1, "node")
    identity = s.const(IDENTITY[op](tensor.dtype), tensor.dtype)
    body = For(
        "block",
        ceildiv(rows, block),
        (
            Let("rows_here", dim_min(block, rows - base) if whole else 1),
            For("cell", here * targets, (Store(result, base * targets + cell, identity),), "vector"),
            For("tree", count, tuple(walking)),
        ),
        "parallel",
    )
    return Lowered((call(region, "walk_trees", [body]),))
