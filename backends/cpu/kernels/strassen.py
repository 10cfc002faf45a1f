"""Matrix products by constant weights with fewer multiplications: Strassen's method, one or two levels of it.

Rows, summed index and columns are cut in two (or four); of sums of the blocks, 7 (or 49) products are formed where the
definition forms 8 (or 64), and each is added to some blocks of the result (Strassen 1969). As in J. Huang, T. Smith,
G. Henry, R. van de Geijn, "Strassen's Algorithm Reloaded" (SC'16) only the left operand's sums pass through memory: the
weights' sums are formed and packed when the model is compiled (7/4 or 49/16 of the weights), and the result's blocks
are a few panels in the second-level cache, to which each register tile is added by a table of places and signs, so
that all products share one inner loop. The epilogue is applied to the finished panels.

A NaN or an infinity would spread to the row that its own is added to. Blocks of rows with one are computed by ten
products of the same operands in which no two rows meet (`APART`).

Sums are of numbers that were added and subtracted before. Measured against f64 on layers of transformers (normal
operands, depth 384 to 3072) the largest error is 0.5 to 2.3e-6 of the largest output at one level and up to 2.5e-6 at
two; the definition's is 0.6 to 1.4e-6. Unlike the definition's it is relative to the largest number of all rows that
are added, and a NaN or an infinity in one of them reaches the others.

Of bf16, sums of blocks are rounded to bf16, and pairs along the depth multiplied by one instruction: the error of one
level is twice that of the definition in bf16; of two levels it would be four times that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_max, dim_min, product, symbol
from ....ir.dtypes import BF16, F32, I64, U32
from ....ir.loops import Address, Alias, Alloc, Define, For, If, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue
from ..dot_products import PAIRS
from .packing import known, matrices, pairs_of
from .product import Product, flattened
from .register_tile import Tile, accumulators, choose_tile, multiply_accumulate, pieces

# Of blocks 11, 12, 21, 22: what the seven products take from the left and the right operand, and which blocks of the
# result they are added to.
LEFT = ((1, 0, 0, 1), (0, 0, 1, 1), (1, 0, 0, 0), (0, 0, 0, 1), (1, 1, 0, 0), (-1, 0, 1, 0), (0, 1, 0, -1))
RIGHT = ((1, 0, 0, 1), (1, 0, 0, 0), (0, 1, 0, -1), (-1, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 0), (0, 0, 1, 1))
RESULT = ((1, 0, 0, 1), (0, 0, 1, -1), (0, 1, 0, 1), (1, 0, 1, 0), (-1, 1, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0))
APART = (
    *((4, 3, 0, 1), (4, 1, 0, 1), (2, 3, 0, -1), (2, 2, 1, 1), (4, 4, 1, 1)),
    *((1, 1, 2, 1), (3, 3, 2, 1), (1, 2, 3, 1), (1, 4, 3, 1), (3, 2, 3, -1)),
)
"""The same result by the seven factors in which rows of one block only are summed: (number of the left factor, of the
right one, block of the result, sign)."""
UPDATES = 12
"""Blocks of the result that the seven products are added to, together."""

HEAD = 3
"""What stands before the blocks in a line of the table of products."""
PANEL_BYTES = 208 << 10
"""What finished panels may take of the stack, and (as a fifth) of the second-level cache."""
# Measured on Zen 4, one thread, weights not in a cache. Cycles to add a vector to a block of the result, and for its
# epilogue; bytes a cycle of sums of the left operand, where they fit the second-level cache, where not, and where they
# are larger than most of the last; bytes a cycle of weights from memory, and what of their time is left although they
# are fetched ahead (of as many as the definition takes, less); what a product by the definition takes beyond its
# multiply-adds.
UPDATE_CYCLES = 3.0
FINISH_CYCLES = 6.0
NEAR_BYTES_PER_CYCLE = 12.0
FAR_BYTES_PER_CYCLE = 8.0
OUTSIDE_BYTES_PER_CYCLE = 3.0
MEMORY_BYTES_PER_CYCLE = 6.0
MEMORY_SHARE = 0.2
CLASSICAL_SHARE = 0.1
CLASSICAL = 1.03
WORTH = (1.04, 1.05)
"""How many times faster each level must be than one less: it makes the weights larger by three quarters."""
CHUNK_ROWS = 96
"""Rows, at least, of a chunk of a product of many rows: fewer do not repay that all weights are read for each."""


@dataclass(frozen=True)
class Plan:
    """Levels of the method, the register tile, rows of a block (of each part of rows) whose results are in a cache at
    a time, and how long all takes, in cycles of one core; whether operands are pairs of bf16; and in how many chunks
    the rows are done, one after another, so that the left operand's sums are in a cache."""

    levels: int
    tile: Tile
    block: int
    cycles: float = 0.0
    narrow: bool = False
    chunks: int = 1

    @property
    def parts(self) -> int:
        """Parts of rows, of the summed index, and of the columns of a group of panels."""
        return 1 << self.levels

    @property
    def products(self) -> int:
        return (1, 7, 49)[self.levels]


def choose_plan(found: Product, target: Target, levels: int = 1) -> Plan | None:
    """The fastest plan of at most `levels` levels; None where the definition is about as fast, or sizes do not fit."""
    sizes = [axis.extent for axis in (*found.rows, *found.depth, found.column)]
    narrow = found.left.dtype == BF16 and PAIRS.name in target.dot_products
    if found.batch or not found.depth or found.dtype != F32 or not (narrow or found.left.dtype == F32):
        return None
    if not all(isinstance(size, int) and size > 0 for size in sizes) or found.depth[-1].left != 1:
        return None
    rows, depth = (known(product(axis.extent for axis in axes)) for axes in (found.rows, found.depth))
    columns, lanes = known(found.column.extent), target.lanes(32)
    weights = depth * columns * found.left.dtype.bytes / MEMORY_BYTES_PER_CYCLE
    arithmetic = CLASSICAL * rows * (depth // (1 + narrow)) * -(-columns // lanes) / target.multiply_adds
    least = max(arithmetic, weights) + CLASSICAL_SHARE * weights
    best = None
    for level in range(1, (1 if narrow else levels) + 1):
        chunks = [n for n in range(1, max(1, rows // CHUNK_ROWS) + 1) if rows % n == 0]
        plans = [plan for n in chunks if (plan := _plan(found, target, level, rows, depth, columns, n)) is not None]
        plan = min(plans, key=lambda plan: plan.cycles, default=None)
        if plan is None or plan.cycles * WORTH[level - 1] > least:
            break
        best, least = plan, plan.cycles
    return best


def _plan(
    found: Product, target: Target, levels: int, rows: int, depth: int, columns: int, chunks: int = 1
) -> Plan | None:
    """What so many levels cost; None where the operands cannot be cut so."""
    parts, lanes, rows = 1 << levels, target.lanes(32), rows // chunks
    outer, inner = known(found.depth[0].extent), known(found.depth[-1].extent)
    if outer % parts or (inner // parts if len(found.depth) == 1 else inner) % lanes:
        return None
    height, wide = -(-rows // parts), -(-columns // (parts * lanes))
    if rows < 2 * parts or wide * lanes * parts > 2 * columns:
        return None
    narrow = found.left.dtype == BF16
    steps = depth // parts // (1 + narrow)
    tile = choose_tile(height, wide * lanes, steps, F32, target)
    room = min(PANEL_BYTES, target.l2_bytes // 5) // (parts * parts * tile.width * F32.bytes)
    if room < tile.rows:
        return None
    blocks = -(-height // (room // tile.rows * tile.rows))
    block = min(height, -(-height // (blocks * tile.rows)) * tile.rows)
    plan = Plan(levels, tile, block, narrow=narrow, chunks=chunks)
    vectors = height * sum(size * count for size, count in pieces(wide, tile.vectors))
    arithmetic = plan.products * vectors * steps / target.multiply_adds
    moved = vectors * (UPDATES**levels * UPDATE_CYCLES + parts * parts * FINISH_CYCLES)
    sums = (rows * depth + plan.products * height * (depth // parts)) * found.left.dtype.bytes
    near, outside = sums <= target.l2_bytes * 3 // 4, sums > target.l3_bytes * 5 // 8
    sums_rate = NEAR_BYTES_PER_CYCLE if near else OUTSIDE_BYTES_PER_CYCLE if outside else FAR_BYTES_PER_CYCLE
    weights = plan.products * steps * wide * lanes * F32.bytes / MEMORY_BYTES_PER_CYCLE
    if plan.products * steps * tile.width * F32.bytes > target.l2_bytes * 3 // 4:
        weights *= -(-height // block)  # every block of rows reads its panels from behind the second-level cache
    cycles = max(arithmetic + moved, weights) + MEMORY_SHARE * weights + sums / sums_rate
    return replace(plan, cycles=chunks * cycles)


def coefficients(table: Sequence[Sequence[int]], levels: int) -> np.ndarray:
    """[products, row of blocks, column of blocks] of `levels` levels: the table's products with itself."""
    once = np.array(table, np.int64).reshape(7, 2, 2)
    result = np.ones((1, 1, 1), np.int64)
    for _ in range(levels):
        result = np.kron(result, once)
    return result


class Strassen:
    """The kernels of one product."""

    def __init__(self, region: Region, found: Product, outputs: Epilogue, array: np.ndarray, plan: Plan) -> None:
        self.region, self.found, self.outputs, self.array = region, found, outputs, array
        self.plan, self.tile, self.lanes = plan, plan.tile, plan.tile.lanes
        self.rows = known(product(axis.extent for axis in found.rows)) // plan.chunks
        self.start: Dim = symbol("start", 0, (plan.chunks - 1) * self.rows) if plan.chunks > 1 else 0
        self.depth = known(product(axis.extent for axis in found.depth)) // plan.parts
        self.columns = known(found.column.extent)
        self.height = -(-self.rows // plan.parts)
        self.missing = self.height * plan.parts - self.rows
        self.kept, self.factors = (BF16, U32) if plan.narrow else (F32, F32)
        self.steps = self.depth // (1 + plan.narrow)
        # One vector more: rows whose distance is a power of two would fall into the same sets of the cache.
        self.step = self.depth + self.lanes * (1 + plan.narrow)
        self.groups = [*self._groups()]
        self.sums = Buffer("sums", self.kept, plan.products * self.height * self.step)
        vectors = sum(count * each for _, count, each in self.groups)
        self.packed = Buffer("packed", self.factors, plan.products * self.steps * vectors * self.lanes)
        self.most = 2**plan.levels  # blocks that one product is added to
        self.entries = plan.products + len(APART) ** plan.levels
        self.places = Buffer("places", I64, self.entries * (HEAD + self.most))
        self.signs = Buffer("signs", F32, self.entries * self.most)
        self.blocks = Buffer("blocks", F32, plan.parts**2 * plan.block * self.tile.width, "stack")

    def _groups(self) -> Iterator[tuple[int, int, int]]:
        """(first, count, vectors of a part) of groups of panels that are as many columns as there are parts."""
        parts = self.plan.parts
        vectors = -(-self.columns // self.lanes)
        full, rest = divmod(vectors, parts * self.tile.vectors)
        if full and not rest and self.columns % self.lanes:
            full, rest = full - 1, parts * self.tile.vectors  # the last one ends within a vector
        if full:
            yield 0, full, self.tile.vectors
        if rest:
            yield full, 1, -(-rest // parts)

    def lowered(self) -> Lowered:
        method = "strassen" if self.plan.levels == 1 else f"strassen{self.plan.levels}"
        left = call(self.region, f"{self.kept}_{method}_sums", tuple(self._sums()), (self.sums,))
        buffers = (self.sums, self.packed, self.places, self.signs)
        multiply = call(self.region, f"{self.kept}_{method}_{self.tile}", self._body(), buffers, shared=True)
        made: dict[str, Callable[[], np.ndarray]] = {
            self.packed.name: self._pack,
            self.places.name: lambda: self._table()[0],
            self.signs.name: lambda: self._table()[1],
        }
        calls: tuple[Call, ...] = (left, multiply)
        if self.plan.chunks > 1:
            starts = [(n * self.rows,) for n in range(self.plan.chunks)]
            calls = tuple(replace(each, sizes=start) for start in starts for each in (left, multiply))
        return Lowered(calls, (self.sums,), made)

    # Constants

    def _pack(self) -> np.ndarray:
        """Sums of the weights' blocks: [group of panels][product][depth][columns of a part]."""
        (weights,) = matrices(self.found, self.array)
        parts, products = self.plan.parts, self.plan.products
        result = np.empty(known(self.packed.size), self.factors.numpy)
        at = column = 0
        for _, count, vectors in self.groups:
            width = vectors * self.lanes
            for _ in range(count):
                here = weights[:, column : column + parts * width].astype(np.float32)
                if here.shape[1] != parts * width:
                    here = np.pad(here, ((0, 0), (0, parts * width - here.shape[1])))
                size = products * self.steps * width
                into = result[at : at + size].reshape(products, self.steps, width)
                made = np.empty((products, self.depth, width), np.float32) if self.plan.narrow else into
                _weight_sums(here.reshape(parts, self.depth, parts, width).swapaxes(1, 2), made)
                if self.plan.narrow:
                    into[...] = pairs_of(made.astype(BF16.numpy))
                at, column = at + size, column + parts * width
        return result

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """A line for each product: its left and right factor, how many blocks of the result it is added to, and which;
        and their signs. First those of the method, then those that keep rows apart."""
        places = np.zeros((self.entries, HEAD + self.most), np.int64)
        signs = np.zeros((self.entries, self.most), np.float32)
        for number, blocks in enumerate(coefficients(RESULT, self.plan.levels)):
            (where,) = np.nonzero(blocks.reshape(-1))
            places[number, :HEAD] = number, number, len(where)
            places[number, HEAD : HEAD + len(where)] = where
            signs[number, : len(where)] = blocks.reshape(-1)[where]
        apart = [(0, 0, 0, 0, 1)]  # left, right, row and column of blocks, sign
        for _ in range(self.plan.levels):
            apart = [
                (7 * left + a, 7 * right + b, 2 * i + block // 2, 2 * j + block % 2, sign * c)
                for left, right, i, j, sign in apart
                for a, b, block, c in APART
            ]
        for number, (left, right, i, j, sign) in enumerate(apart, self.plan.products):
            places[number, : HEAD + 1] = left, right, 1, i * self.plan.parts + j
            signs[number, 0] = sign
        return places.reshape(-1), signs.reshape(-1)

    # Sums of the left operand's blocks

    def _sums(self) -> Iterator[Statement]:
        whole = self.height - self.missing
        row = k.index_symbol("row", whole)
        if whole:
            yield For("row", whole, tuple(self._row_sums(row, self.plan.parts)), "parallel")
        if self.missing:
            last = whole + k.index_symbol("last", self.missing)
            yield For("last", self.missing, tuple(self._row_sums(last, self.plan.parts - 1)))

    def _row_sums(self, row: Dim, there: int) -> Iterator[Statement]:
        """The sums of one row of each part of rows, of which the first `there` have it; behind the first product's,
        a vector that tells by a NaN whether all their numbers are finite."""
        parts, found, lanes = self.plan.parts, self.found, self.lanes
        extents = [known(axis.extent) for axis in found.depth]
        extents[0] //= parts
        extents[-1] //= lanes
        at = [k.index_symbol(axis.name, extent) for axis, extent in zip(found.depth, extents, strict=True)]
        at[-1] = at[-1] * lanes
        half = known(found.depth[0].extent) // parts * found.depth[0].left
        inside = sum((index * axis.left for index, axis in zip(at, found.depth, strict=True)), 0)
        body: list[Statement] = []
        blocks: list[list[Scalar]] = []
        for i in range(parts):
            where = flattened(found.rows, self.start + row + i * self.height)
            start = found.left_start + inside + sum((where[axis.name] * axis.left for axis in found.rows), 0)
            line: list[Scalar] = []
            for j in range(parts):
                there_is = s.cast(s.load(found.left.buffer, start + j * half, lanes), F32)
                line.append(_named(body, f"block{i}_{j}", there_is if i < there else s.const(0, F32, lanes)))
            blocks.append(line)
        position: Dim = row * self.step
        odd = Buffer("odd", F32, 1, "register", lanes)
        total = _named(body, "total", reduce(add, (value for line in blocks for value in line)))
        body.append(Store(odd, 0, s.fma(total, s.const(0, F32, lanes), s.load(odd, 0, lanes))))
        offset: Dim = 0
        for axis, index in zip(found.depth, at, strict=True):
            offset = offset * axis.extent + index
        for number, value in enumerate(_left_sums(body, blocks)):
            into = number * (self.height * self.step) + position + offset
            body.append(Store(self.sums, into, s.cast(value, self.kept)))
        for axis, extent in reversed([*zip(found.depth, extents, strict=True)]):
            body = [For(axis.name, extent, tuple(body))]
        yield Define(odd, s.const(0, F32, lanes))
        yield from body
        yield Store(self.sums, position + self.depth, s.cast(s.load(odd, 0, lanes), self.kept))

    # The products. Tasks: (group of panels, block of rows), blocks of one group following one another

    def _body(self) -> Iterator[Statement]:
        yield self._tasks()

    def _tasks(self) -> Statement:
        block = self.plan.block
        blocks = -(-self.height // block)
        tasks = sum(count for _, count, _ in self.groups) * blocks
        task = k.index_symbol("task", tasks)
        first: Dim = symbol("block", 0, blocks - 1) * block
        rows: Dim = block
        here: list[Statement] = [Let("block", task % blocks), Let("group", task // blocks), Alloc(self.blocks)]
        if self.height % block:
            here.append(Let("rows", dim_min(block, self.height - first)))
            rows = symbol("rows", 0, block)
        here += self._choice(first, rows)
        inner: tuple[Statement, ...] = ()
        for group in reversed(self.groups):
            statements = tuple(self._group(*group, first, rows))
            condition = s.index(symbol("group")) < s.index(group[0] + group[1])
            inner = (If(condition, statements, inner),) if inner else statements
        return For("task", tasks, (*here, *inner), "parallel")

    def _choice(self, first_row: Dim, rows: Dim) -> Iterator[Statement]:
        """Names the lines of the table to go by for these rows."""
        products, lanes = self.plan.products, self.lanes
        odd, row = Buffer("odd", F32, 1, "register", lanes), k.index_symbol("line", rows)
        mark = s.cast(s.load(self.sums, (first_row + row) * self.step + self.depth, lanes), F32)
        yield Define(odd, s.const(0, F32, lanes))
        yield For("line", rows, (Store(odd, 0, s.load(odd, 0, lanes) + mark),))
        whole = Buffer("whole", F32, 1, "register")
        yield Define(whole, s.Horizontal(F32, 1, "add", s.load(odd, 0, lanes)))
        finite = s.binary("eq", s.load(whole, 0), s.load(whole, 0))
        yield Let("begin", s.select(finite, s.const(0, I64), s.const(products, I64)))
        yield Let("count", s.select(finite, s.const(products, I64), s.const(self.entries - products, I64)))

    def _group(self, first: int, count: int, vectors: int, first_row: Dim, rows: Dim) -> Iterator[Statement]:
        """All products of one group of panels and one block of rows, then their epilogue."""
        plan, lanes, width = self.plan, self.lanes, vectors * self.lanes
        group: Dim = symbol("group", 0, first + count - 1) if count != 1 else first
        size = plan.parts**2 * plan.block * width
        clear = Store(self.blocks, k.index_symbol("clear", size // lanes) * lanes, s.const(0, F32, lanes))
        yield For("clear", size // lanes, (clear,))
        factor = symbol("right_factor", 0, plan.products - 1)
        # Groups before this one are as wide as the tile.
        right = group * (plan.products * self.steps * self.tile.width) + factor * (self.steps * width)
        step = self.tile.rows
        full = rows // step
        tile = k.index_symbol("tile", full)
        entry = (symbol("begin", 0, plan.products) + symbol("product", 0, self.entries - 1)) * (HEAD + self.most)
        body: list[Statement] = [
            *(Let(f"{side}_factor", s.load(self.places, entry + at)) for at, side in enumerate(("left", "right"))),
            For("tile", full, tuple(self._tile(Tile(step, vectors, lanes), right, first_row, tile * step, tile))),
        ]
        if self.height % step:
            small = Tile(self.height % step, vectors, lanes)
            statements = tuple(self._tile(small, right, first_row, full * step, full))
            body.append(If(s.const(0, I64) < s.index(rows - full * step), statements))
        yield For("product", symbol("count", 1, self.entries), tuple(body))
        yield self._finish(group * (plan.parts * self.tile.width), width, first_row, rows)

    def _tile(self, tile: Tile, start: Dim, first_row: Dim, row: Dim, number: Dim) -> Iterator[Statement]:
        """One product's register tile, added to the blocks of the result it belongs to; the `number`th of its panel."""
        plan, lanes, depth = self.plan, self.lanes, self.steps
        entry = symbol("begin", 0, plan.products) + symbol("product", 0, self.entries - 1)
        which, line = symbol("left_factor", 0, plan.products - 1), entry * (HEAD + self.most)
        left, right, c = Buffer("left", self.factors), Buffer("right", self.factors), k.index_symbol("c", depth)
        row_step = self.step // (1 + plan.narrow)
        yield Alias(left, self.sums, (which * self.height + first_row + row) * self.step)
        yield Alias(right, self.packed, start)
        # While the tiles of a panel use it, they fetch the next one, each its share: weights come from memory.
        tiles = -(-plan.block // self.tile.rows)
        lines = -(-tile.width // (tiles * lanes))
        share = -(-tile.width // (tiles * lines))
        ahead = depth * tile.width + (number * depth + c) * (share * lines)
        fetch = [Intrinsic("prefetch", (Address(right, ahead + line * share),)) for line in range(lines)]
        yield from multiply_accumulate(
            tile,
            F32,
            [("c", depth)],
            lambda i: s.load(left, i * row_step + c),
            lambda v: s.load(right, c * tile.width + v * lanes, lanes),
            beside=fetch,
            dot=PAIRS if self.plan.narrow else None,
        )
        sums, target = accumulators(tile, F32), k.index_symbol("target", self.most)
        sign, into = Buffer("sign", F32, 1, "register", lanes), Buffer("into", F32)
        place = symbol("place", 0, plan.parts**2 - 1)
        update: list[Statement] = [
            Let("place", s.load(self.places, line + HEAD + target)),
            Define(sign, s.widen(s.load(self.signs, entry * self.most + target), lanes)),
            Alias(into, self.blocks, (place * plan.block + row) * tile.width),
        ]
        for i in range(tile.rows * tile.vectors):
            total = s.fma(s.load(sign, 0, lanes), s.load(sums, i, lanes), s.load(into, i * lanes, lanes))
            update.append(Store(into, i * lanes, total))
        yield Let("targets", s.load(self.places, line + 2))
        yield For("target", symbol("targets", 1, self.most), tuple(update))

    def _finish(self, column: Dim, width: int, first_row: Dim, rows: Dim) -> Statement:
        """The epilogue of all blocks of the result."""
        plan = self.plan
        i, j = k.index_symbol("down", plan.parts), k.index_symbol("across", plan.parts)
        count: Dim = rows
        if self.missing:
            count = dim_max(0, dim_min(rows, self.rows - i * self.height - first_row))
        row = k.index_symbol("line", count)
        here = flattened(self.found.rows, self.start + i * self.height + first_row + row)
        start = ((i * plan.parts + j) * plan.block + row) * width
        base = column + j * width
        partial = isinstance(column, int) and column + plan.parts * width > self.columns
        extent: Dim = dim_max(0, dim_min(width, self.columns - base)) if partial else width
        line = self.outputs.loop(here, base, extent, self.blocks, start, "column")
        return For("down", plan.parts, (For("across", plan.parts, (For("line", count, (line,)),)),))


def _left_sums(body: list[Statement], blocks: Sequence[Sequence[Scalar]], stem: str = "sum") -> list[Scalar]:
    """The products' left factors of a square of blocks, level by level."""
    if len(blocks) == 1:
        return [blocks[0][0]]
    half = len(blocks) // 2
    result: list[Scalar] = []
    for number, signs in enumerate(LEFT):
        inner: list[list[Scalar]] = []
        for i in range(half):
            inner.append([])
            for j in range(half):
                quarters = [blocks[p * half + i][q * half + j] for p in (0, 1) for q in (0, 1)]
                terms = [(sign, quarter) for sign, quarter in zip(signs, quarters, strict=True) if sign]
                terms.sort(key=lambda term: -term[0])
                total = terms[0][1]
                if len(terms) == 2:
                    total = total + terms[1][1] if terms[1][0] > 0 else total - terms[1][1]
                inner[-1].append(_named(body, f"{stem}{number}_{i}_{j}", total))
        result += _left_sums(body, inner, f"{stem}{number}_")
    return result


def _weight_sums(blocks: np.ndarray, into: np.ndarray) -> None:
    """The products' right factors of a square of blocks [parts, parts, depth, columns], level by level."""
    if len(blocks) == 1:
        into[0] = blocks[0, 0]
        return
    half, each = len(blocks) // 2, len(into) // 7
    for number, signs in enumerate(RIGHT):
        quarters = [blocks[p * half : (p + 1) * half, q * half : (q + 1) * half] for p in (0, 1) for q in (0, 1)]
        terms = [(sign, quarter) for sign, quarter in zip(signs, quarters, strict=True) if sign]
        terms.sort(key=lambda term: -term[0])
        total = terms[0][1]
        if len(terms) == 2:
            total = total + terms[1][1] if terms[1][0] > 0 else total - terms[1][1]
        _weight_sums(total, into[number * each : (number + 1) * each])


def _named(body: list[Statement], name: str, value: Scalar) -> Scalar:
    """A register variable with the value."""
    register = Buffer(name, F32, 1, "register", value.lanes)
    body.append(Define(register, value))
    return s.load(register, 0, value.lanes)
