"""The epilogue of a register tile: its sums to the outputs of a region, by vectors or from a scratch tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_min
from ....ir.dtypes import DType
from ....ir.loops import Alloc, For, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....passes.vector_step import NotVectorizable
from ...kernels.epilogue import Epilogue
from .register_tile import Tile, accumulators

# Operations of an epilogue up to which it is repeated for every vector of a tile; longer ones become a loop. Those that
# end in few bits are mostly roundings, which are a few instructions of a long expression.
REPEATED, REPEATED_NARROW = 16, 40


def finish_tile(
    outputs: Epilogue,
    tile: Tile,
    dtype: DType,
    dims: Callable[[Dim], Mapping[str, Dim]],
    first: Dim,
    valid: Callable[[int], Dim | None],
    masked: bool,
    exists: Callable[[int], Scalar] | None = None,
    count: Dim | None = None,
) -> list[Statement]:
    """The epilogue of a register tile: straight from the registers, or from a scratch tile where it is long.

    `dims(i)` are the anchor's indices in row i of the tile, all but the column, which begins at `first`. `valid(v)`
    says how many lanes of a vector are columns (None: all). Where some rows may be missing, `exists(i)` tells whether
    row i is there, and `count` how many there are.
    """
    sums, lanes = accumulators(tile, dtype), tile.lanes
    left = [valid(v) for v in range(tile.vectors)]
    known = all(item is None or isinstance(item, int) for item in left)
    along = all(outputs.column in s.free_symbols(result.offset) for result in outputs.results)
    narrow = all(result.buffer.dtype.bits <= 8 for result in outputs.results)
    most = REPEATED_NARROW if narrow else REPEATED
    if along and known and (masked or not any(left)) and outputs.cost <= most:
        try:
            return _from_registers(outputs, tile, sums, dims, first, left, exists)
        except NotVectorizable:
            pass
    scratch = Buffer("scratch", dtype, tile.rows * tile.width, "stack")
    result: list[Statement] = [Alloc(scratch)]
    for number in range(tile.rows * tile.vectors):
        result.append(Store(scratch, number * lanes, s.load(sums, number, lanes)))
    rows = tile.rows if count is None else count
    i = k.index_symbol("i", rows)
    here = dims(i)

    def extent(v: int, width: int) -> Dim:
        found = left[v]
        return width if found is None else dim_min(width, found)

    if outputs.linear(here):
        last = left[-1]
        whole = tile.width - lanes + (lanes if last is None else last) if known else extent(0, tile.width)
        inner = [outputs.loop(here, first, whole, scratch, i * tile.width, "j")]
    else:
        inner = [
            outputs.loop(here, first + v * lanes, extent(v, lanes), scratch, i * tile.width + v * lanes, f"j{v}")
            for v in range(tile.vectors)
        ]
    return [*result, For("i", rows, tuple(inner))]


def _from_registers(
    outputs: Epilogue,
    tile: Tile,
    sums: Buffer,
    dims: Callable[[Dim], Mapping[str, Dim]],
    first: Dim,
    left: Sequence[Dim | None],
    exists: Callable[[int], Scalar] | None,
) -> list[Statement]:
    result: list[Statement] = []
    for i in range(tile.rows):
        stores: list[Statement] = []
        here = dims(i)
        for v in range(tile.vectors):
            total = s.load(sums, i * tile.vectors + v, tile.lanes)
            stores += outputs.stores(here, first + v * tile.lanes, tile.lanes, total, left[v])
        result += [k.If(exists(i), tuple(stores))] if exists is not None else stores
    return result
