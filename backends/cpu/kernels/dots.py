"""Few rows by a matrix that lies transposed and is only known at run time: products as dots of its rows, in place.

Packing such an operand takes nine cycles a vector, which few rows do not repay. Here both operands are read along the
summed index, a vector at a time; a register tile holds `rows` x `columns` vectors of partial sums, each added up at the
end. Blocks of as many columns as a vector has lanes pass through a scratch tile to the epilogue.
"""

from __future__ import annotations

from collections.abc import Iterator

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, product, symbol
from ....ir.loops import Alias, Alloc, For, Let, Statement, Store
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue
from .product import Product, flattened
from .register_tile import Tile, accumulators, fits, multiply_accumulate, pieces

DEPTH_A_ROW = 16
"""Summed elements that there must be for each row: adding up the lanes of a sum takes some 8 operations. Measured: at
768 elements 3 times as fast as with packing for 2 rows, 1.5 times for 8 and alike for 48."""
COLUMNS = 4
"""Columns of a register tile."""


def dots(region: Region, target: Target, found: Product, outputs: Epilogue) -> Lowered | None:
    """The kernel of a product whose right operand lies contiguous along the summed index; None where packing it pays,
    or where sizes are only known at run time."""
    rows = product(axis.extent for axis in found.rows)
    if len(found.depth) != 1 or not isinstance(rows, int) or rows < 2:
        return None
    depth = found.depth[0]
    lanes = target.lanes(found.dtype.bits)
    if depth.left != 1 or depth.right != 1 or found.column.right == 1 or lanes < COLUMNS:
        return None
    if not isinstance(depth.extent, int) or depth.extent % lanes or depth.extent < max(rows * DEPTH_A_ROW, 4 * lanes):
        return None
    if found.left.dtype != found.dtype or not isinstance(found.column.extent, int):
        return None
    made = _Dots(found, outputs, rows, depth.extent, lanes, target)
    name = f"{found.dtype}_dots_{made.height}x{COLUMNS}x{lanes}"
    return Lowered((call(region, name, made.body(), shared=True),))


class _Dots:
    def __init__(self, found: Product, outputs: Epilogue, rows: int, depth: int, lanes: int, target: Target) -> None:
        self.found, self.outputs, self.rows, self.depth, self.lanes = found, outputs, rows, depth, lanes
        most = max(height for height in range(1, 9) if height == 1 or fits(height, COLUMNS, target))
        self.height = -(-rows // -(-rows // most))
        self.batches = product(axis.extent for axis in found.batch)
        self.columns = int(str(found.column.extent))
        self.scratch = Buffer("scratch", found.dtype, rows * lanes, "stack")

    def body(self) -> Iterator[Statement]:
        """Tasks: (batch, block of columns)."""
        blocks = ceildiv(self.columns, self.lanes)
        task = k.index_symbol("task", self.batches * blocks)
        column = symbol("block", 0, blocks - 1) * self.lanes
        here: list[Statement] = [Let("block", task % blocks), Let("batch", task // blocks), Alloc(self.scratch)]
        count: Dim = self.lanes
        if self.columns % self.lanes:
            here.append(Let("count", dim_min(self.lanes, self.columns - column)))
            count = symbol("count", 0, self.lanes)
        whole = count // COLUMNS
        group = k.index_symbol("group", whole) * COLUMNS
        here.append(For("group", whole, tuple(self._columns(column, group, COLUMNS))))
        if self.columns % COLUMNS:
            single = whole * COLUMNS + k.index_symbol("single", count - whole * COLUMNS)
            here.append(For("single", count - whole * COLUMNS, tuple(self._columns(column, single, 1))))
        row = k.index_symbol("row", self.rows)
        line = self.outputs.loop(
            {**self._batch(), **flattened(self.found.rows, row)}, column, count, self.scratch, row * self.lanes, "lane"
        )
        yield For("task", self.batches * blocks, (*here, For("row", self.rows, (line,))), "parallel")

    def _batch(self) -> dict[str, Dim]:
        return flattened(self.found.batch, symbol("batch", 0, self.batches - 1))

    def _columns(self, column: Dim, first: Dim, number: int) -> Iterator[Statement]:
        """All rows by `number` columns from `first` of a block on."""
        done = 0
        for size, count in pieces(self.rows, self.height):
            index = f"tile{done}"
            row = done + k.index_symbol(index, count) * size
            yield For(index, count, tuple(self._tile(Tile(size, number, self.lanes), row, column, first)))
            done += size * count

    def _tile(self, tile: Tile, row: Dim, column: Dim, first: Dim) -> Iterator[Statement]:
        found, lanes, batch = self.found, self.lanes, self._batch()
        lefts = [Buffer(f"left{i}", found.dtype) for i in range(tile.rows)]
        rights = [Buffer(f"right{v}", found.dtype) for v in range(tile.vectors)]
        for i, left in enumerate(lefts):
            where = flattened(found.rows, row + i)
            offset = found.left_start + sum((where[axis.name] * axis.left for axis in found.rows), 0)
            yield Alias(left, found.left.buffer, offset + sum((batch[a.name] * a.left for a in found.batch), 0))
        start = found.right_start + sum((batch[axis.name] * axis.right for axis in found.batch), 0)
        for v, right in enumerate(rights):
            yield Alias(right, found.right.buffer, start + (column + first + v) * found.column.right)
        at = k.index_symbol("c", self.depth // lanes) * lanes
        yield from multiply_accumulate(
            tile,
            found.dtype,
            [("c", self.depth // lanes)],
            lambda i: s.load(lefts[i], at, lanes),
            lambda v: s.load(rights[v], at, lanes),
        )
        for i in range(tile.rows):
            for v in range(tile.vectors):
                total = s.load(accumulators(tile, found.dtype), i * tile.vectors + v, lanes)
                place = (row + i) * lanes + first + v
                yield Store(self.scratch, place, s.Horizontal(found.dtype, 1, "add", total))
