"""Matrix products: MatMul, Gemm, contractions by Einsum and whatever else is a sum of products of two operands.

The right operand is packed into panels as wide as the register tile (constants when the model is compiled), the left
one is read where it lies. Per panel, which stays in the second-level cache, the row tiles follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_min, linear, product, symbol
from ....ir.dtypes import I64
from ....ir.loops import Alias, For, If, Let, Statement
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, epilogue, through_memory
from ...kernels.operands import affine, copied, joined
from . import delayed
from .division import TASKS_PER_THREAD, divides_rows, row_blocks
from .dots import dots
from .epilogue import finish_tile
from .packing import Columns, Panels, by_columns, first_lanes, known, matrices, pack_call, packed
from .product import Product, find_product, flattened
from .register_tile import Starts, Tile, choose_tile, multiply_accumulate, remainders
from .strassen import Strassen, choose_plan

# Row tiles in one task of a parallel loop, at least: shorter tasks do not repay their start.
TASK_TILES = 4


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region whose anchor sums products of two buffers' elements; None for any other."""
    found = find_product(region)
    if found is None:
        return with_copies(region, lambda changed: schedule(changed, target))
    outputs = epilogue(region, found.indices, found.shape, found.element, found.column.name, found.dtype)
    if outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    array = region.constants.get(found.right.buffer.name)
    if not all(isinstance(axis.extent, int) for axis in (*found.batch, *found.depth, found.column)):
        array = None  # the other operand's sizes, of which only the run tells that they are those of the constant
    plan = choose_plan(found, target, target.strassen) if array is not None and target.strassen else None
    if plan is not None:
        assert array is not None
        return Strassen(region, found, outputs, array, plan).lowered()
    in_place = dots(region, target, found, outputs) if array is None else None
    if in_place is not None:
        return in_place
    made = _Gemm(region, target, found, outputs, array)
    if made.rows == 1 and array is None and not made.in_place:
        return None  # One row by a matrix that lies the other way: a loop nest reads it once, in order.
    return made.lowered()


def with_copies(region: Region, schedule: Callable[[Region], Lowered | None]) -> Lowered | None:
    """The schedule on copies of operands that cannot be read where they lie; None where that changes nothing."""
    if region.anchor is None or region.anchor.op in ("Conv", "ConvInteger"):
        return None
    odd = [i for i, x in enumerate(region.operands[:2]) if x is not None and x.kind != "opaque" and affine(x) is None]
    if not odd:
        return None
    changed, copies = copied(region, odd)
    return joined(copies, schedule(changed))


class _Gemm:
    def __init__(
        self, region: Region, target: Target, found: Product, outputs: Epilogue, array: np.ndarray | None
    ) -> None:
        self.region, self.target, self.found, self.outputs, self.array = region, target, found, outputs, array
        self.rows: Dim = product(axis.extent for axis in found.rows)
        self.batches: Dim = product(axis.extent for axis in found.batch)
        self.depth: Dim = product(axis.extent for axis in found.depth)
        self.tile = choose_tile(self.rows, found.column.extent, self.depth, found.dtype, target, dot=found.dot)
        self.panels = Panels(self.tile, found.column.extent, self.depth)
        self.masked = target.has("avx512vl")
        self.in_place = array is None and self._reads_in_place()
        # Weights that are read once, by one tile of rows, stay as narrow as the model has them.
        once = array is not None and isinstance(self.rows, int) and self.rows <= self.tile.rows
        stored = found.right.dtype if once and found.dot is None else found.dtype
        self.packed = Buffer("packed", stored, self.batches * self.panels.size)
        self.by_rows = self._divides_rows()

    def _divides_rows(self) -> bool:
        rows, depth, columns = self.rows, self.depth, self.panels.columns
        if not (isinstance(rows, int) and isinstance(depth, int) and isinstance(columns, int) and self.batches == 1):
            return False
        threads, size = self.target.threads, self.found.dtype.bytes
        enough = rows >= 2 * threads * self.tile.rows
        constant = self.array is not None
        return (
            enough
            and constant
            and divides_rows(rows * depth * size, depth * columns * size, rows * columns * size, threads)
        )

    def _reads_in_place(self) -> bool:
        """Whether packing the right operand would cost more than it saves."""
        columns, rows = self.found.column, self.rows
        if columns.right != 1 or self.found.right.dtype != self.found.dtype:
            return False
        if not self.masked and not (isinstance(columns.extent, int) and columns.extent % self.tile.lanes == 0):
            return False
        narrow = isinstance(columns.extent, int) and columns.extent <= self.tile.width
        return narrow or (isinstance(rows, int) and rows <= 2 * self.tile.rows)

    def lowered(self) -> Lowered:
        name = f"{self.found.dtype}_gemm_{self.tile}"
        multiply = call(self.region, name, self._body(), (self.packed,), shared=True)
        if self.in_place:
            return Lowered((multiply,))
        if self.array is not None:
            return Lowered((multiply,), packed={self.packed.name: self._packer(self.array)})
        pack = pack_call(
            f"{self.found.dtype}_pack_x{self.tile.width}",
            self.found,
            self.panels,
            self.packed,
            self.target,
            self.region.origin,
        )
        return Lowered((pack, multiply), (self.packed,))

    def _packer(self, array: np.ndarray) -> Callable[[], np.ndarray]:
        """What makes the panels of the constant right operand."""
        return lambda: packed(matrices(self.found, array), self.panels, self.packed.dtype)

    # Tasks: (batch, panel, block of rows), blocks of one panel following one another; or (batch, block of rows, panel)
    # where threads share the rows.

    def _body(self) -> Iterator[Statement]:
        tile_rows = self.tile.rows
        block = self._block_rows()
        blocks = -(-self.rows // block) if isinstance(self.rows, int) else (self.rows + (block - 1)) // block
        tasks = self.batches * self.panels.count * blocks
        task = k.index_symbol("task", tasks)
        within = blocks * self.panels.count
        block_of, panel_of = task % blocks, task // blocks % self.panels.count
        if self.by_rows:
            block_of, panel_of = task // self.panels.count % blocks, task % self.panels.count
        here: list[Statement] = [Let("block", block_of), Let("panel", panel_of), Let("batch", task // within)]
        first_row = symbol("block", 0, blocks - 1) * block
        rows: Dim = self.rows if blocks == 1 else block
        if blocks != 1 and not (isinstance(self.rows, int) and self.rows % block == 0):
            here.append(Let("rows", dim_min(block, self.rows - first_row)))
            rows = symbol("rows", 0, block)
        inner = by_columns(
            self.panels, symbol("panel"), lambda columns: self._panel(columns, first_row, rows, tile_rows)
        )
        yield For("task", tasks, (*here, *inner), "parallel")

    def _block_rows(self) -> int:
        """Rows of one task, a multiple of the tile's."""
        tile_rows = self.tile.rows
        if not isinstance(self.rows, int):
            return 8 * tile_rows
        tiles = -(-self.rows // tile_rows)
        panels = self.panels.count if isinstance(self.panels.count, int) else 8
        batches = self.batches if isinstance(self.batches, int) else 1
        if self.by_rows:
            return -(-tiles // row_blocks(tiles, panels * batches, self.target.threads)) * tile_rows
        wanted = max(1, self.target.threads * TASKS_PER_THREAD)
        blocks = max(1, min(tiles // TASK_TILES, -(-wanted // max(1, panels * batches))))
        return -(-max(tiles, 1) // blocks) * tile_rows

    def _panel(self, columns: Columns, first_row: Dim, rows: Dim, tile_rows: int) -> Iterator[Statement]:
        """All row tiles of one panel and one block of rows."""
        panel: Dim = symbol("panel", 0, self.panels.count - 1) if columns.count != 1 else columns.first
        column = panel * self.tile.width
        full = rows // tile_rows
        tile = Tile(tile_rows, columns.vectors, self.tile.lanes)
        later = self._delayed(tile, columns, column, first_row, full)
        if later is not None:
            yield from later
        else:
            at = first_row + k.index_symbol("tile", full) * tile_rows
            yield For("tile", full, tuple(self._tile(tile, columns, column, at)))
        done = full * tile_rows
        left = rows - done
        if isinstance(self.rows, int):
            size = self.rows % tile_rows
            if size:
                small = Tile(size, columns.vectors, self.tile.lanes)
                statements = tuple(self._tile(small, columns, column, first_row + done))
                yield If(s.const(0, I64) < s.index(left), statements)
            return
        for size in remainders(tile_rows):
            count = left // size
            at = first_row + done + k.index_symbol("tile", count) * size
            small = Tile(size, columns.vectors, self.tile.lanes)
            yield For("tile", count, tuple(self._tile(small, columns, column, at)))
            done, left = done + count * size, left - count * size

    def _delayed(self, tile: Tile, columns: Columns, column: Dim, first_row: Dim, count: Dim) -> list[Statement] | None:
        """The tiles of a panel where each one's epilogue is done beside the next one's products; else None."""
        if not delayed.pays(tile, self.depth, count, self.outputs, self.found.sums) or len(self.found.depth) != 1:
            return None
        return delayed.tiles(
            tile,
            known(self.depth),
            known(count),
            self.found.sums,
            self.outputs,
            lambda number, early: self._multiplied(tile, columns, column, first_row + number * tile.rows, early),
            lambda number, i: self._indices(first_row + number * tile.rows + i),
            column,
            lambda v: self._valid(columns, column, v),
        )

    # One tile

    def _tile(self, tile: Tile, columns: Columns, column: Dim, row: Dim) -> Iterator[Statement]:
        yield from self._multiplied(tile, columns, column, row)
        yield from self._finish(tile, columns, column, row)

    def _multiplied(
        self, tile: Tile, columns: Columns, column: Dim, row: Dim, early: delayed.Early | None = None
    ) -> Iterator[Statement]:
        aliases, left = self._left(tile, row)
        yield from aliases
        alias, right = self._right(columns, column)
        yield alias
        depth = self.found.depth
        loops = [(axis.name, axis.extent) for axis in depth] or [("once", 1)]
        start = self._start(columns, column, row)
        yield from multiply_accumulate(
            tile, self.found.sums, loops, left, right, dot=self.found.dot, start=start, early=early
        )

    def _indices(self, row: Dim) -> dict[str, Dim]:
        """The anchor's indices in a row, all but the column."""
        return {**self._batch(), **flattened(self.found.rows, row)}

    def _start(self, columns: Columns, column: Dim, row: Dim) -> Starts | None:
        """What the sums of a tile begin with, where that is not 0."""
        return None

    def _batch(self) -> dict[str, Dim]:
        return flattened(self.found.batch, symbol("batch", 0, self.batches - 1))

    def _left(self, tile: Tile, row: Dim) -> tuple[list[Statement], Callable[[int], Scalar]]:
        """Row pointers: one for all rows where the distance between them is a constant."""
        found = self.found
        batch = self._batch()
        start = found.left_start
        for axis in found.batch:
            start = start + batch[axis.name] * axis.left

        def offset(position: Dim) -> Dim:
            where = flattened(found.rows, position)
            return start + sum((where[axis.name] * axis.left for axis in found.rows), 0)

        probe = linear(offset(symbol("row", 0, self.rows - 1)), "row")
        inside = sum((axis.index * axis.left for axis in found.depth), 0)
        element = found.left.buffer
        if probe is not None and isinstance(probe[0], int) and abs(probe[0]) * tile.rows < 1 << 28:
            step = probe[0]
            rows = Buffer("left", element.dtype)
            alias = Alias(rows, element, step * row + probe[1])
            return [alias], lambda i: s.cast(s.load(rows, inside + i * step), found.dtype)
        pointers = [Buffer(f"left{i}", element.dtype) for i in range(tile.rows)]
        aliases: list[Statement] = [Alias(p, element, offset(row + i)) for i, p in enumerate(pointers)]
        return aliases, lambda i: s.cast(s.load(pointers[i], inside), found.dtype)

    def _right(self, columns: Columns, column: Dim) -> tuple[Statement, Callable[[int], Scalar]]:
        found, lanes = self.found, self.tile.lanes
        panel = Buffer("right", found.dtype if self.in_place else self.packed.dtype)
        if not self.in_place:
            at = symbol("batch", 0, self.batches - 1) * self.panels.size if self.batches != 1 else 0
            inside: Dim = 0
            for axis in found.depth:
                inside = inside * axis.extent + axis.index
            inside = inside * (columns.vectors * lanes)
            alias = Alias(panel, self.packed, at + column * self.depth)
            return alias, lambda v: s.cast(s.load(panel, inside + v * lanes, lanes), found.dtype)
        batch = self._batch()
        start = found.right_start + column
        for axis in found.batch:
            start = start + batch[axis.name] * axis.right
        inside = sum((axis.index * axis.right for axis in found.depth), 0)
        alias = Alias(panel, found.right.buffer, start)

        def read(v: int) -> Scalar:
            left = self._valid(columns, column, v)
            predicate = None if left is None else first_lanes(left, lanes)
            return s.load(panel, inside + v * lanes, lanes, predicate)

        return alias, read

    def _valid(self, columns: Columns, column: Dim, v: int) -> Dim | None:
        """How many lanes of a vector are columns; None where all are."""
        if isinstance(self.found.column.extent, int):
            return columns.valid if v == columns.vectors - 1 and columns.valid != self.tile.lanes else None
        return self.found.column.extent - column - v * self.tile.lanes

    def _finish(self, tile: Tile, columns: Columns, column: Dim, row: Dim) -> list[Statement]:
        return finish_tile(
            self.outputs,
            tile,
            self.found.sums,
            lambda i: self._indices(row + i),
            column,
            lambda v: self._valid(columns, column, v),
            self.masked,
        )
