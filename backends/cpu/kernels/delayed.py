"""Row tiles whose epilogues are done beside the multiplications of the tile after them.

A processor has several pipes for vectors, of which some multiply and all add, convert and pack. A tile's epilogue needs
the others, but stands between two runs of multiplications that are longer than what the processor looks ahead. So sums
are left in memory (in the first-level cache), and each of the next tile's first steps finishes some rows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim
from ....ir.dtypes import DType
from ....ir.loops import Alloc, For, Statement, Store
from ....ir.scalars import Buffer
from ....passes.vector_step import NotVectorizable
from ...kernels.epilogue import Epilogue
from .epilogue import REPEATED, REPEATED_NARROW
from .register_tile import CHAINS, Tile, accumulators

TILES = 4
"""Of so many tiles in a row the first and the last, whose code is there once more, are no matter."""
SHARE = 0.03
"""What the epilogue's operations, two of them in a cycle, must be of all the time of a tile for this to pay."""

Early = tuple[int, Callable[[Dim], Sequence[Statement]]]


def pays(tile: Tile, depth: Dim, tiles: Dim, outputs: Epilogue, dtype: DType) -> bool:
    """Whether the tiles of a product over `depth` steps are done so."""
    if not (isinstance(depth, int) and isinstance(tiles, int)) or dtype.is_float or tiles < TILES:
        return False
    narrow = all(result.buffer.dtype.bits <= 8 for result in outputs.results)
    if tile.rows * tile.vectors < CHAINS or outputs.cost > (REPEATED_NARROW if narrow else REPEATED):
        return False
    return outputs.cost / 2 >= SHARE * depth


def tiles(
    tile: Tile,
    depth: int,
    count: int,
    dtype: DType,
    outputs: Epilogue,
    multiply: Callable[[Dim, Early | None], Iterator[Statement]],
    dims: Callable[[Dim, Dim], Mapping[str, Dim]],
    first: Dim,
    left: Callable[[int], Dim | None],
) -> list[Statement] | None:
    """`count` tiles one after the other; None where the epilogue is no vector expression.

    `multiply(t, early)` makes the sums of tile number t, with something beside its steps. `dims(t, i)` are the indices
    of row i of tile t, whose first column is `first`, and of whose vector v `left(v)` lanes are columns (None: all).
    """
    waiting, sums = Buffer("waiting", dtype, tile.rows * tile.width, "stack"), accumulators(tile, dtype)
    per = -(-tile.rows // depth)
    steps = tile.rows // per

    def finished(number: Dim, row: Dim) -> Iterator[Statement]:
        for v in range(tile.vectors):
            total = s.load(waiting, row * tile.width + v * tile.lanes, tile.lanes)
            yield from outputs.stores(dims(number, row), first + v * tile.lanes, tile.lanes, total, left(v))

    def beside(number: Dim) -> Early:
        return steps, lambda step: [done for part in range(per) for done in finished(number, step * per + part)]

    def kept() -> list[Statement]:
        numbers = range(tile.rows * tile.vectors)
        return [Store(waiting, n * tile.lanes, s.load(sums, n, tile.lanes)) for n in numbers]

    number = k.index_symbol("tile", count - 1)
    try:
        rest = [statement for row in range(steps * per, tile.rows) for statement in finished(number, row)]
        following = For("tile", count - 1, (*multiply(number + 1, beside(number)), *rest, *kept()))
        last = For("i", tile.rows, tuple(finished(count - 1, k.index_symbol("i", tile.rows))))
    except NotVectorizable:
        return None
    return [Alloc(waiting), For("once", 1, (*multiply(0, None), *kept())), following, last]
