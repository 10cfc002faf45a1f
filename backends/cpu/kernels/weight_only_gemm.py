"""Many rows by weights of a few bits: a part of a panel is unpacked once for all rows of a task.

The part stays in the cache and is read as the panels of f32 are; sums of parts before are kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_min, linear, product, symbol
from ....ir.dtypes import F32, I32
from ....ir.loops import Alias, Alloc, Define, For, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Region
from ...kernels.epilogue import Epilogue
from .epilogue import finish_tile
from .packing import Columns
from .product import flattened
from .register_tile import Tile, accumulators, multiply_accumulate
from .weight_only_definition import last_lanes
from .weight_only_panels import PackedProduct, WeightPanels
from .weight_only_tasks import each_tile, row_tasks

PART_BYTES = 128 << 10
"""What a part of a panel may take of the stack, and (as a quarter) of the second-level cache."""
TASK_ROWS = 128
"""Rows of a task, at most: their sums are kept on the stack. So many repay unpacking."""


class ManyRows:
    """Makes the statements for many rows."""

    def __init__(
        self, region: Region, found: PackedProduct, panels: WeightPanels, outputs: Epilogue, target: Target
    ) -> None:
        self.region, self.found, self.panels, self.outputs, self.target = region, found, panels, outputs, target
        self.rows: Dim = product(axis.extent for axis in found.rows)
        self.masked = target.has("avx512vl")
        self.tile = panels.panels.tile
        self.part = self._part()
        self.parts = -(-found.padded // self.part)
        self.most = -(-TASK_ROWS // self.tile.rows) * self.tile.rows
        if isinstance(self.rows, int):
            self.most = min(self.most, -(-self.rows // self.tile.rows) * self.tile.rows)
        self.unpacked = Buffer("unpacked", F32, self.part * self.tile.width, "stack")
        self.kept = Buffer("kept_sums", F32, self.most * self.tile.width, "stack")

    def _part(self) -> int:
        """Elements along the depth of a part: whole blocks, or so much of one that they divide it."""
        found = self.found
        room = max(min(PART_BYTES, self.target.l2_bytes // 4) // (self.tile.width * F32.bytes), found.group)
        if found.block <= room:
            return min(room // found.block, found.blocks) * found.block
        if found.blocks == 1:
            return room // found.group * found.group
        groups = found.block // found.group
        most = max(d for d in range(1, groups + 1) if groups % d == 0 and d * found.group <= room)
        return most * found.group

    def body(self) -> Iterator[Statement]:
        """A task for each panel and block of rows."""
        yield row_tasks(self.panels, self.rows, self.most, (Alloc(self.unpacked), Alloc(self.kept)), self._panel)

    def _panel(self, columns: Columns, first: Dim, rows: Dim, column: Dim) -> Iterator[Statement]:
        yield from self.panels.aliases(column)
        part = symbol("part", 0, self.parts - 1)
        depth: Dim = dim_min(self.part, self.found.depth - part * self.part) if self.parts > 1 else self.found.depth
        inner: list[Statement] = [Let("part_depth", depth), *self._unpack(columns, part)]
        depth = symbol("part_depth", 0, self.part)
        inner += each_tile(
            self.rows,
            rows,
            self.tile.rows,
            lambda size, at: self._multiplied(size, columns, first, at, part, depth, column),
        )
        if self.parts > 1:
            clear = s.const(0, F32)
            count = rows * columns.vectors * self.panels.lanes
            yield For("kept", count, (Store(self.kept, symbol("kept", 0, count - 1), clear),), "vector")
        yield For("part", self.parts, tuple(inner))
        if self.parts > 1:
            yield from each_tile(
                self.rows, rows, self.tile.rows, lambda size, at: self._finished(size, columns, first, at, column)
            )

    def _unpack(self, columns: Columns, part: Dim) -> Iterator[Statement]:
        """Writes the weights of a part, [depth][column]."""
        found, lanes, panels = self.found, self.panels.lanes, self.panels
        piece = min(found.block, self.part)
        count: Dim = self.part // piece
        if found.block <= self.part and self.parts > 1:
            count = dim_min(count, found.blocks - part * count)
        groups: Dim = piece // found.group
        if found.block > self.part and found.blocks == 1:
            groups = dim_min(groups, found.padded // found.group - part * groups)
        at = k.index_symbol("piece", count)
        block = (part * self.part + at * piece) // found.block
        group = k.index_symbol("group", groups)
        first = (part * self.part + at * piece) // found.group + group
        before: list[Statement] = []
        step: list[Statement] = []

        def register(name: str, value: Scalar, into: list[Statement]) -> Scalar:
            buffer = Buffer(name, value.dtype, 1, "register", lanes)
            into.append(Define(buffer, value))
            return s.load(buffer, 0, lanes)

        whole = found.zeros is None or found.zeros.dtype.kind != "f"
        for v in range(columns.vectors):
            scale = register(f"scale{v}", panels.scale(columns, block, v), before)
            zero = panels.zero_codes(columns, block, v) if whole else panels.full_zero(columns, block, v)
            zero = register(f"zero{v}", zero, before)
            word = register(f"word{v}", panels.word(columns, first, v), step)
            for place in range(found.group):
                # Differences of integers, which take no time of the units that multiply.
                code = s.bitcast(panels.alone(word, place) - zero if whole else panels.alone(word, place), I32)
                value = s.cast(code, F32) if whole else s.cast(code, F32) - zero
                row = at * piece + group * found.group + place
                step.append(Store(self.unpacked, (row * columns.vectors + v) * lanes, value * scale))
        yield For("piece", count, (*before, For("group", groups, tuple(step))))

    def _multiplied(
        self, size: int, columns: Columns, first: Dim, at: Dim, part: Dim, depth: Dim, column: Dim
    ) -> Iterator[Statement]:
        """What a part adds to the sums of a tile."""
        tile, lanes = Tile(size, columns.vectors, self.panels.lanes), self.panels.lanes
        place = k.index_symbol("c", depth)
        aliases, left = self._left(size, first + at, part * self.part)
        yield from aliases
        yield from multiply_accumulate(
            tile,
            F32,
            [("c", depth)],
            lambda i: left(i, place),
            lambda v: s.load(self.unpacked, (place * tile.vectors + v) * lanes, lanes),
        )
        if self.parts == 1:
            yield from self._finish(tile, columns, first + at, column)
            return
        sums = accumulators(tile, F32)
        for i in range(size):
            for v in range(tile.vectors):
                there = ((at + i) * tile.vectors + v) * lanes
                total = s.load(self.kept, there, lanes) + s.load(sums, i * tile.vectors + v, lanes)
                yield Store(self.kept, there, total)

    def _finished(self, size: int, columns: Columns, first: Dim, at: Dim, column: Dim) -> Iterator[Statement]:
        """The epilogue of a tile whose sums are kept."""
        tile, lanes = Tile(size, columns.vectors, self.panels.lanes), self.panels.lanes
        sums = accumulators(tile, F32)
        yield Alloc(sums)
        for i in range(size):
            for v in range(tile.vectors):
                there = ((at + i) * tile.vectors + v) * lanes
                yield Store(sums, i * tile.vectors + v, s.load(self.kept, there, lanes))
        yield from self._finish(tile, columns, first + at, column)

    def _finish(self, tile: Tile, columns: Columns, row: Dim, column: Dim) -> list[Statement]:
        return finish_tile(
            self.outputs,
            tile,
            F32,
            lambda i: flattened(self.found.rows, row + i),
            column,
            last_lanes(columns, tile.lanes),
            self.masked,
        )

    def _left(self, size: int, row: Dim, start: Dim) -> tuple[list[Statement], Callable[[int, Dim], Scalar]]:
        """Rows of the left operand from `start` along the depth on: one pointer where rows are evenly apart."""
        found, source = self.found, self.found.left
        along = source.strides[-1]

        def offset(position: Dim) -> Dim:
            where = flattened(found.rows, position)
            return source.start + start * along + sum((where[axis.name] * axis.left for axis in found.rows), 0)

        probe = linear(offset(symbol("row", 0, self.rows - 1)), "row")
        if probe is not None and isinstance(probe[0], int) and abs(probe[0]) * size < 1 << 28:
            step, begin = probe
            rows = Buffer("rows_left", source.buffer.dtype)
            read: list[Statement] = [Alias(rows, source.buffer, step * row + begin)]
            return read, lambda i, c: s.cast(s.load(rows, c * along + i * step), F32)
        pointers = [Buffer(f"left{i}", source.buffer.dtype) for i in range(size)]
        aliases: list[Statement] = [Alias(p, source.buffer, offset(row + i)) for i, p in enumerate(pointers)]
        return aliases, lambda i, c: s.cast(s.load(pointers[i], c * along), F32)
