"""The kernels of a contraction, given the loaders of its operands and a plan: what products and convolutions share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, symbol
from ....ir.dtypes import DType
from ....ir.loops import Alloc, Define, For, If, Let, Statement
from ....ir.scalars import Buffer
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, Result, accumulator_leaf
from .choose import Plan, Shape, types_of, usual
from .finish import BATCH, COLUMN, ROW, Finish, finish_of, slab_elements, write_out
from .multiply import Lanes, TensorCores
from .tiles import Loader, Multiplier, Operand, Pieces, Pipeline, SharedTile, Tile

RASTER = 8
"""Rows of tiles whose blocks run together, column after column, so that L2 holds what they read."""
WORKSPACE_ALIGNMENT = 64
"""Bytes to which memory between kernels is aligned."""
_SUM_THREADS = 128


@dataclass(frozen=True)
class Contraction:
    """Sums [batch, row, column] over a depth, of type `dtype`; `outputs` are the region's over the symbols "batch",
    "row" and "column", along columns. An index of extent 1 does not occur."""

    batches: Dim
    rows: Dim
    columns: Dim
    depth: Dim
    dtype: DType
    outputs: Epilogue


def shape_of(sums: Contraction) -> Shape:
    """The sizes to choose a plan by."""
    stored = sum(result.buffer.dtype.bytes for result in sums.outputs.results)
    return Shape(usual(sums.batches), usual(sums.rows), usual(sums.columns), usual(sums.depth), stored)


Loaders = tuple[Loader, Loader]


def index(name: str, extent: Dim) -> Dim:
    """The index called `name`, 0 where the extent is 1."""
    return 0 if extent == 1 else symbol(name, 0, extent - 1)


def lowered(region: Region, sums: Contraction, loaders: Loaders, plan: Plan) -> Lowered:
    """The kernels of a contraction by a plan: one, or two where several blocks share the depth of a tile."""
    if plan.splits == 1:
        finish = finish_of(sums.outputs, sums.rows, sums.columns, region.alignment)
        return Lowered((_tile_call(region, sums, plan, loaders, finish),))
    partial = Buffer("partial", sums.dtype, plan.splits * sums.batches * sums.rows * sums.columns)
    column = index(COLUMN, sums.columns)
    at = symbol("split", 0, plan.splits - 1) * sums.batches + index(BATCH, sums.batches)
    at = (at * sums.rows + index(ROW, sums.rows)) * sums.columns + column
    parts = Epilogue((Result(partial, at, accumulator_leaf(sums.dtype, column)),), COLUMN, sums.dtype)

    def alignment(name: str) -> int:
        return WORKSPACE_ALIGNMENT if name == partial.name else region.alignment(name)

    finish = finish_of(parts, sums.rows, sums.columns, alignment)
    multiply = _tile_call(region, sums, plan, loaders, finish, (partial,))
    return Lowered((multiply, _sum_call(region, sums, plan, partial)), (partial,))


def _shared_tile(loader: Loader, positions: int, depth: int, tensor: bool) -> SharedTile:
    """How a stage of an operand lies in shared memory."""
    outer, inner = (positions, depth) if loader.along_depth else (depth, positions)
    by_words = tensor and not loader.along_depth and loader.dtype.bytes == 4
    return SharedTile(outer, inner, loader.dtype, 2 if by_words else 1)


def _operand(side: str, loader: Loader, tile: Tile, tensor: bool, positions: int, start: Dim, extent: Dim) -> Operand:
    shared = _shared_tile(loader, positions, tile.depth, tensor)
    return Operand(loader, Pieces(side, shared, loader.elements, loader.along_depth, tile.threads, start, extent))


def _tile_call(
    region: Region,
    sums: Contraction,
    plan: Plan,
    loaders: Loaders,
    finish: Finish,
    workspaces: Sequence[Buffer] = (),
) -> Call:
    """The kernel that multiplies, over a grid of (batch, part of the depth, tile of the result)."""
    tile, dtype = plan.tile, loaders[0].dtype
    types = "".join(map(str, dict.fromkeys(types_of(loaders))))
    rows, columns = ceildiv(sums.rows, tile.rows), ceildiv(sums.columns, tile.columns)
    tile_row, tile_column = index("tile_row", rows), index("tile_column", columns)
    left = _operand("left", loaders[0], tile, plan.tensor, tile.rows, tile_row * tile.rows, sums.rows)
    right = _operand("right", loaders[1], tile, plan.tensor, tile.columns, tile_column * tile.columns, sums.columns)
    multiplier = multiplier_of(plan, left.pieces.shared, right.pieces.shared, loaders, sums.dtype)
    stages = ceildiv(sums.depth, tile.depth)
    first: Dim = 0
    part: list[Statement] = []
    if plan.splits > 1:
        size = ceildiv(stages, plan.splits)
        first = symbol("split", 0, plan.splits - 1) * size
        part.append(Let("stages", dim_max(0, dim_min(size, stages - first))))
        stages = symbol("stages", 0, size)
    pipeline = Pipeline(tile, multiplier, left, right, sums.depth, first, stages, partial=plan.splits > 1)
    slabs = -(-slab_elements(tile, multiplier) * multiplier.dtype.bytes // dtype.bytes)
    memory = Buffer("memory", dtype, max(pipeline.elements, slabs), "shared")
    thread = (
        *part,
        *pipeline.statements(memory),
        *write_out(tile, multiplier, finish, (tile_row, tile_column), memory),
    )
    block = (*_places(sums, plan, rows, columns), Alloc(memory), For("thread", tile.threads, thread, "block"))
    grid = For("task", rows * columns * plan.splits * sums.batches, block, "grid")
    kind = "mma" if plan.tensor else "lanes"
    return call(region, f"{region.name}_{types}_{kind}_{tile}", (grid,), workspaces)


def multiplier_of(plan: Plan, left: SharedTile, right: SharedTile, loaders: Loaders, sums: DType) -> Multiplier:
    """What multiplies the stages of a plan."""
    along_depth = loaders[0].along_depth, loaders[1].along_depth
    if plan.tensor:
        return TensorCores(plan.tile, left, right, along_depth, (loaders[0].rounded, loaders[1].rounded))
    return Lanes(plan.tile, left, right, along_depth, sums)


def _places(sums: Contraction, plan: Plan, rows: Dim, columns: Dim) -> list[Statement]:
    """Which tile, part of the depth and batch a block has. Blocks that follow one another go down a few rows of tiles
    before they take the next column."""
    tiles = rows * columns
    task = symbol("task", 0, tiles * plan.splits * sums.batches - 1)
    result: list[Statement] = []
    if plan.splits > 1:
        result.append(Let("split", task // tiles % plan.splits))
    if sums.batches != 1:
        result.append(Let(BATCH, task // (tiles * plan.splits)))
    number = task % tiles
    if (isinstance(rows, int) and rows <= RASTER) or columns == 1:
        places = {"tile_row": number % rows, "tile_column": number // rows}
    else:
        tile, band = symbol("tile", 0, tiles - 1), symbol("band", 0, ceildiv(rows, RASTER) - 1)
        result += [
            Let("tile", number),
            Let("band", tile // (columns * RASTER)),
            Let("height", dim_min(RASTER, rows - band * RASTER)),
        ]
        height, within = symbol("height", 1, RASTER), tile - band * (columns * RASTER)
        places = {"tile_row": band * RASTER + within % height, "tile_column": within // height}
    return result + [Let(name, value) for name, value in places.items() if value != 0]


def _sum_call(region: Region, sums: Contraction, plan: Plan, partial: Buffer) -> Call:
    """The kernel that adds up the parts of the depth, always in the same order, and finishes."""
    finish = finish_of(sums.outputs, sums.rows, sums.columns, region.alignment)
    vectors = sums.columns // finish.lanes
    count = sums.batches * sums.rows * vectors
    blocks = ceildiv(count, _SUM_THREADS)
    flat = symbol("block_of_sums", 0, blocks - 1) * _SUM_THREADS + symbol("thread", 0, _SUM_THREADS - 1)
    which = symbol("which", 0, count - 1)
    loads = [
        s.load(partial, (part * count + which) * finish.lanes, finish.lanes, aligned=finish.lanes > 1)
        for part in range(plan.splits)
    ]
    held = Buffer("total", sums.dtype, 1, "register", finish.lanes)
    body = (
        Let("which", flat),
        *([Let(BATCH, which // (vectors * sums.rows))] if sums.batches != 1 else []),
        Define(held, reduce(lambda a, b: s.binary("add", a, b), loads)),
        *finish.stores(which // vectors % sums.rows, which % vectors, s.load(held, 0, finish.lanes)),
    )
    thread = For("thread", _SUM_THREADS, (If(s.index(flat) < s.index(count), body),), "block")
    grid = For("block_of_sums", blocks, (thread,), "grid")
    return call(region, f"{region.name}_{sums.dtype}_sum_of_{plan.splits}", (grid,), (partial,))
