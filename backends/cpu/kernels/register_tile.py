"""Register tiles: the inner loops of matrix products and convolutions, and how large their tiles should be.

A tile of `rows` x `vectors` accumulators takes, per step of the summed index, one vector load per column of vectors and
one broadcast load per row, and feeds them to rows * vectors multiply-adds (Goto & van de Geijn 2008, without packing of
the left operand).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ....ir import scalars as s
from ....ir.dims import Dim, symbol
from ....ir.dtypes import DType
from ....ir.loops import Alloc, Define, For, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ..dot_products import Dot

# Rows of a tile: each one is a stream of its own for the prefetcher, and where the distance between rows is not a
# constant it takes a general register.
MAX_ROWS = 8
# Sums that a core must have in flight so that their latency (4 cycles) is hidden behind two multiply-adds a cycle.
CHAINS = 8
# Bytes a cycle that the second-level cache delivers, and what lies behind it.
L2_BYTES_PER_CYCLE = 24.0
L3_BYTES_PER_CYCLE = 8.0
# What one more variant of the inner loop must save of the running time to be worth its code.
VARIANT_COST = 0.015
# Rows to plan for where their number is only known at run time.
USUAL_ROWS = 120


@dataclass(frozen=True)
class Tile:
    """`rows` by `vectors` accumulators of `lanes` lanes."""

    rows: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        """Columns of the tile."""
        return self.vectors * self.lanes

    def __str__(self) -> str:
        return f"{self.rows}x{self.vectors}x{self.lanes}"


def fits(rows: int, vectors: int, target: Target, dot: Dot | None = None) -> bool:
    """Whether accumulators, a row of vectors, a broadcast and (where it is not added at once) a product have registers.

    Where a dot product of bytes is made of two of i16, both operands are there in halves, with a mask and a product."""
    if dot is not None and dot.group == 4 and dot.name not in target.dot_products:
        return rows * vectors + 2 * vectors + 4 <= target.vector_registers
    product = not target.fma if dot is None else not dot.accumulates
    return rows * vectors + vectors + 1 + product <= target.vector_registers


def cycles(rows: int, vectors: int, target: Target, rate: float) -> float:
    """Cycles of one step of the summed index; `rate` are the bytes a cycle by which the column panel arrives."""
    streamed = vectors * target.vector_bits / 8 / rate
    chains = CHAINS / 2 if rows * vectors >= CHAINS else rows * vectors / 2
    return max(rows * vectors / 2, (rows + vectors) / 2, streamed, chains) + 0.25


def pieces(extent: int, largest: int) -> list[tuple[int, int]]:
    """(size, count) of pieces that cover `extent`: full ones, then what remains."""
    full, rest = divmod(extent, largest)
    return [(size, count) for size, count in ((largest, full), (rest, 1)) if size and count]


def remainders(rows: int) -> tuple[int, ...]:
    """Sizes of the tiles that do what is left of an unknown number of rows after tiles of `rows`."""
    return (2, 1) if rows in (5, 6, 7) else tuple(size for size in (4, 2, 1) if size < rows)


def choose_tile(
    rows: Dim,
    columns: Dim,
    depth: Dim,
    dtype: DType,
    target: Target,
    repeats: int = 1,
    whole: bool = False,
    dot: Dot | None = None,
) -> Tile:
    """The tile that does rows x columns in the fewest cycles, its remainders included.

    `repeats`: how often the same columns are used with other rows. `whole`: a remainder of rows costs a whole tile.
    """
    lanes = target.lanes(dtype.bits)
    if dot is not None and dot.sums.is_integer and target.has("avx") and not target.has("avx2"):
        lanes //= 2  # Vectors of integers are half as wide as those of f32.
    narrowest = 2 if dot is None else min(lanes, 4)  # dot products are instructions of 128 bits and more
    while isinstance(columns, int) and lanes >= 2 * max(columns, narrowest):
        lanes //= 2
    row_count = rows if isinstance(rows, int) and rows > 0 else USUAL_ROWS
    vectors = -(-columns // lanes) if isinstance(columns, int) and columns > 0 else 16
    best: tuple[float, int, Tile] | None = None
    for tile_rows in range(1, min(MAX_ROWS, row_count) + 1):
        for tile_vectors in range(1, min(vectors, target.vector_registers) + 1):
            if not fits(tile_rows, tile_vectors, target, dot):
                continue
            panel = tile_vectors * lanes * dtype.bytes * (depth if isinstance(depth, int) else 512)
            again = row_count * repeats > tile_rows
            rate = math.inf if panel <= target.l1_bytes // 2 or not again else L2_BYTES_PER_CYCLE
            rate = L3_BYTES_PER_CYCLE if again and panel > target.l2_bytes * 3 // 4 else rate
            row_pieces, column_pieces = pieces(row_count, tile_rows), pieces(vectors, tile_vectors)
            if whole:
                row_pieces = [(tile_rows, -(-row_count // tile_rows))]
            total = sum(
                row_number * column_number * cycles(row_size, column_size, target, rate)
                for row_size, row_number in row_pieces
                for column_size, column_number in column_pieces
            )
            total *= 1 + VARIANT_COST * (len(row_pieces) * len(column_pieces) - 1)
            key = (total, -tile_rows, Tile(tile_rows, tile_vectors, lanes))
            if best is None or key[:2] < best[:2]:
                best = key
    assert best is not None
    return best[2]


Loops = Sequence[tuple[str, Dim]]
Reads = Callable[[int], Scalar]
Starts = Callable[[int, int], Scalar]


def accumulators(tile: Tile, dtype: DType) -> Buffer:
    """The register variables of a tile, row by row."""
    return Buffer("sum", dtype, tile.rows * tile.vectors, "register", tile.lanes)


def multiply_accumulate(
    tile: Tile,
    dtype: DType,
    loops: Loops,
    left: Reads,
    right: Reads,
    setup: Sequence[Statement] = (),
    beside: Sequence[Statement] = (),
    dot: Dot | None = None,
    start: Starts | None = None,
    early: tuple[int, Callable[[Dim], Sequence[Statement]]] | None = None,
) -> Iterator[Statement]:
    """Defines the tile's accumulators and adds to them left(row) * right(vector) over all of `loops` (outermost first).

    `left` gives a scalar of `dtype`, `right` a vector of it, over the loops' indices; or both u32, the groups of
    elements that `dot` multiplies and adds. A small tile sums in several sets of accumulators, which are added up at
    the end. `setup` comes right before the innermost loop. `start(row, vector)` is what sums begin with, else 0.
    `early`: of so many first steps of the innermost loop, what is done beside each, by its number.
    """
    sums = accumulators(tile, dtype)
    yield Alloc(sums)
    count = tile.rows * tile.vectors
    zero = s.const(0, dtype, tile.lanes)
    for number in range(count):
        yield Store(sums, number, zero if start is None else start(*divmod(number, tile.vectors)))
    name, depth = loops[-1]
    sets = 1
    while sets * count < CHAINS and not (isinstance(depth, int) and depth < 4 * sets):
        sets *= 2
    if sets == 1:
        step = tuple(_step(tile, sums, dot, left, right))
        if early is None:
            yield from _nested(loops[:-1], [*setup, For(name, depth, (*beside, *step))])
            return
        some, what = early
        later = s.Rewriter(dims={name: symbol(name, 0, depth - some - 1) + some})
        after = _step(tile, sums, dot, lambda i: later(left(i)), lambda v: later(right(v)), copy=1)
        begin = For(name, some, (*what(symbol(name, 0, some - 1)), *step))
        yield from _nested(loops[:-1], [*setup, begin, For(name, depth - some, tuple(after))])
        return
    extra = Buffer("more", dtype, (sets - 1) * count, "register", tile.lanes)
    yield Alloc(extra)
    for number in range((sets - 1) * count):
        yield Store(extra, number, zero)
    steps: list[Statement] = []
    main = depth // sets
    for copy in range(sets):
        at = s.Rewriter(dims={name: symbol(name, 0, main - 1) * sets + copy})
        into, first = (sums, 0) if copy == 0 else (extra, (copy - 1) * count)
        steps += _step(tile, into, dot, lambda i, at=at: at(left(i)), lambda v, at=at: at(right(v)), first, copy)  # type: ignore[misc]
    rest = s.Rewriter(dims={name: symbol(name, 0, depth - main * sets - 1) + main * sets})
    tail = list(_step(tile, sums, dot, lambda i: rest(left(i)), lambda v: rest(right(v))))
    inner = [For(name, main, tuple(steps)), For(name, depth - main * sets, tuple(tail))]
    yield from _nested(loops[:-1], [*setup, *inner])
    for number in range(count):
        total = s.load(sums, number, tile.lanes)
        for copy in range(sets - 1):
            total = total + s.load(extra, copy * count + number, tile.lanes)
        yield Store(sums, number, total)


def _nested(loops: Loops, inner: Sequence[Statement]) -> Sequence[Statement]:
    for index, extent in reversed(loops):
        inner = [For(index, extent, tuple(inner))]
    return inner


def _step(
    tile: Tile, sums: Buffer, dot: Dot | None, left: Reads, right: Reads, first: int = 0, copy: int = 0
) -> Iterator[Statement]:
    lanes = tile.lanes
    vectors = [right(v) for v in range(tile.vectors)]
    columns = [Buffer(f"b{copy}_{v}", value.dtype, 1, "register", lanes) for v, value in enumerate(vectors)]
    for column, value in zip(columns, vectors, strict=True):
        yield Define(column, value)
    for i in range(tile.rows):
        value = left(i)
        row = Buffer(f"a{copy}_{i}", value.dtype, 1, "register", lanes)
        yield Define(row, s.widen(value, lanes))
        for v, column in enumerate(columns):
            number = first + i * tile.vectors + v
            a, b, total = s.load(row, 0, lanes), s.load(column, 0, lanes), s.load(sums, number, lanes)
            yield Store(sums, number, s.fma(a, b, total) if dot is None else dot(total, a, b))
