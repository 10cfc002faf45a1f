"""What becomes of a block's sums: through shared memory to the outputs, by vectors as wide as alignment allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ....ir import scalars as s
from ....ir.dims import Dim, divide_exactly, linear, symbol
from ....ir.dtypes import BOOL, DType
from ....ir.loops import Alias, Barrier, Define, For, If, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Load, Scalar
from ....passes.vector_step import NotVectorizable
from ...kernels.epilogue import Epilogue
from .tiles import CHUNK, Multiplier, Tile, counter, unrolled

_UNROLLED = 8  # vectors of one thread, up to which loads of all of them may be under way together
_WIDEST = 8  # columns in a vector
_VECTOR = "vector"

BATCH, ROW, COLUMN, DEPTH = "batch", "row", "column", "depth"
"""Names of the indices of a contraction."""
Alignment = Callable[[str], int]


def aligned_access(access: Load | Store, lanes: int, alignment: Alignment) -> bool:
    """Whether an access of several lanes is surely one of aligned vectors."""
    buffer, size = access.buffer, access.buffer.dtype.bytes
    if lanes == 1 or access.stride != 1 or access.predicate is not None or buffer.space != "parameter":
        return False
    width = min(CHUNK, lanes * size)
    return alignment(buffer.name) >= width and divide_exactly(access.offset, width // size) is not None


def with_alignment(stores: Sequence[Store], alignment: Alignment) -> list[Store]:
    """The stores with every access marked of which it is known that it is aligned."""

    def mark(node: Scalar) -> Scalar | None:
        if isinstance(node, Load) and aligned_access(node, node.lanes, alignment):
            return replace(node, aligned=True)
        return None

    return [
        replace(
            store,
            value=s.Rewriter(mark)(store.value),
            aligned=store.aligned or aligned_access(store, store.value.lanes, alignment),
        )
        for store in stores
    ]


@dataclass(frozen=True)
class Finish:
    """The outputs over batch, row and column, and how they are stored: `lanes` columns at once; lanes along rows first
    where the outputs lie so."""

    outputs: Epilogue
    rows: Dim
    columns: Dim
    alignment: Alignment
    lanes: int
    along_rows: bool

    @property
    def vector(self) -> Dim:
        """The index of a vector of columns."""
        return symbol(_VECTOR, 0, self.columns // self.lanes - 1)

    def stores(self, row: Dim, vector: Dim, total: Scalar) -> list[Statement]:
        """Stores for columns vector*lanes, ... of a row, of which `total` holds the sums; none outside the result. The
        batch is in scope."""
        inside = s.binary(
            "and", s.index(row) < s.index(self.rows), s.index(vector * self.lanes) < s.index(self.columns)
        )
        if self.lanes == 1:
            stores = _scalar_stores(self.outputs, {COLUMN: self.vector}, total)
        else:
            stores = self.outputs.stores({}, self.vector * self.lanes, self.lanes, total)
        body: tuple[Statement, ...] = (Let(ROW, row), Let(_VECTOR, vector), *with_alignment(stores, self.alignment))
        return list(body) if isinstance(inside, s.Const) and inside.value else [If(inside, body)]


def finish_of(outputs: Epilogue, rows: Dim, columns: Dim, alignment: Alignment) -> Finish:
    """The widest vectors that the outputs allow."""
    widest = max(2, min(_WIDEST, CHUNK // min(result.buffer.dtype.bytes for result in outputs.results)))
    lanes = widest
    while lanes > 1 and not _vectors_fit(outputs, columns, lanes, alignment):
        lanes //= 2
    first = outputs.results[0].offset
    column, row = linear(first, COLUMN), linear(first, ROW)
    along_rows = lanes == 1 and row is not None and row[0] == 1 and (column is None or column[0] != 1)
    return Finish(outputs, rows, columns, alignment, lanes, along_rows)


def _vectors_fit(outputs: Epilogue, columns: Dim, lanes: int, alignment: Alignment) -> bool:
    count = divide_exactly(columns, lanes)
    if count is None:
        return False
    total = s.widen(s.const(0, outputs.dtype), lanes)
    try:
        stores = outputs.stores({}, symbol(_VECTOR, 0, count - 1) * lanes, lanes, total)
    except NotVectorizable:
        return False
    return all(aligned_access(store, lanes, alignment) for store in stores)


def _scalar_stores(outputs: Epilogue, dims: Mapping[str, Dim], total: Scalar) -> list[Store]:
    def leaf(node: Scalar) -> Scalar | None:
        return total if isinstance(node, Load) and node.buffer.name == "accumulator" else None

    at = s.Rewriter(leaf, dims)
    return [Store(result.buffer, at.dim(result.offset), at(result.value)) for result in outputs.results]


def pitch(tile: Tile) -> int:
    """Elements from row to row of a slab: neighbouring rows begin a quarter of the banks apart."""
    return tile.warp_columns + 8


def slab_elements(tile: Tile, multiplier: Multiplier) -> int:
    """Elements of the sums' type that all warps' slabs take together."""
    return tile.threads // 32 * multiplier.slab_rows * pitch(tile)


def write_out(
    tile: Tile, multiplier: Multiplier, finish: Finish, origin: tuple[Dim, Dim], memory: Buffer
) -> list[Statement]:
    """Brings the sums of all warps to the outputs, slab by slab, through shared `memory` that is free for use.

    `origin` is the block's tile among those of all rows and of all columns.

    The warps of one place in the depth of the tile (a team) add up their slabs and share their rows.
    """
    dtype: DType = multiplier.dtype
    height, width = multiplier.slab_rows, pitch(tile)
    team_warps = tile.warps[2]
    warp_row, warp_column = counter("warp_row", tile.warps[0]), counter("warp_column", tile.warps[1])
    depth = counter("warp_depth", team_warps)
    team = (warp_row * tile.warps[1] + warp_column) * (team_warps * height * width)
    all_slabs = Buffer("team_sums", dtype, slab_elements(tile, multiplier), "shared")
    own = Buffer("warp_sums", dtype, height * width, "shared")
    wait: Statement = Intrinsic("warp_barrier") if team_warps == 1 else Barrier()
    number = counter("slab", multiplier.slabs)

    threads = 32 * team_warps
    across = tile.warp_columns // finish.lanes
    turns = -(-height * across // threads)
    flat = counter("turn", turns) * threads + depth * 32 + symbol("lane", 0, 31)
    local_row, local_vector = (flat % height, flat // height) if finish.along_rows else (flat // across, flat % across)
    there = s.index(flat) < s.index(height * across) if turns * threads > height * across else s.const(True, BOOL)
    places = [Let("slab_row", local_row), Let("slab_vector", local_vector)]
    slab_row, slab_vector = symbol("slab_row", 0, height - 1), symbol("slab_vector", 0, across - 1)
    row = origin[0] * tile.rows + warp_row * tile.warp_rows + number * height + slab_row
    vector = origin[1] * (tile.columns // finish.lanes) + warp_column * across + slab_vector
    at = slab_row * width + slab_vector * finish.lanes
    total: Scalar | None = None
    for member in range(team_warps):
        part = s.load(all_slabs, member * height * width + at, finish.lanes, aligned=finish.lanes > 1)
        total = part if total is None else s.binary("add", total, part)
    assert total is not None
    held = Buffer("total", dtype, 1, "register", finish.lanes)
    body: Sequence[Statement] = (
        *places,
        Define(held, total),
        *finish.stores(row, vector, s.load(held, 0, finish.lanes)),
    )
    body = body if isinstance(there, s.Const) else (If(there, tuple(body)),)
    turn: Sequence[Statement] = (
        unrolled("turn", turns, body) if turns <= _UNROLLED else [For("turn", turns, tuple(body))]
    )
    slab = [wait, *multiplier.store_slab(number, own, width), wait, *turn]
    return [
        Alias(all_slabs, memory, team * dtype.bytes // memory.dtype.bytes),
        Alias(own, all_slabs, depth * height * width),
        *unrolled("slab", multiplier.slabs, slab),
    ]
