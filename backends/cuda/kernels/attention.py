"""Attention on a GPU, the scores never stored (FlashAttention-2, Dao 2023); for few queries blocks share the keys."""

from __future__ import annotations

from collections.abc import Mapping

from ....ir.dims import Dim, ceildiv, evaluate, product, symbol, symbols
from ....ir.dtypes import F32, DType
from ....ir.loops import Block, Kernel, free_sizes, used_buffers
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....passes.regions import Call, Lowered, Region
from ...kernels.attention_problem import Problem, problem_of
from .attention_block import BlockKernel
from .attention_rows import Partial, combine_blocks
from .attention_warps import Tile, Warps, warps_of

GUESS = {"batch": 4, "rows": 256}
"""Sizes that are taken for those that only the run tells."""
FEW_QUERIES = 64
"""Queries up to which blocks may share the keys."""
SHARE = 256
"""Keys that are worth a block of their own where their number is known, ..."""
OPEN_SHARE = 1024
"""... and where it is not: up to so many there is one block, and nothing to combine."""

TILES: Mapping[str, tuple[tuple[int, tuple[Tile, ...]], ...]] = {
    # For heads of so many channels at most: tiles for many queries, fewer, and few.
    "halves": (
        (64, (Tile(128, 64, (4, 1)), Tile(64, 64, (4, 1)), Tile(16, 128, (1, 4)))),
        (128, (Tile(128, 32, (4, 1)), Tile(64, 32, (4, 1)), Tile(16, 64, (1, 4)))),
        (256, (Tile(64, 16, (4, 1)), Tile(16, 64, (1, 4)))),
    ),
    "words": (
        (64, (Tile(64, 32, (4, 1)), Tile(16, 64, (1, 4)))),
        (128, (Tile(64, 16, (4, 1)), Tile(16, 64, (1, 4)))),
        (256, (Tile(32, 16, (2, 1)), Tile(16, 16, (1, 1)))),
    ),
    "lanes": (
        (64, (Tile(64, 32, (4, 1)), Tile(16, 64, (1, 4)))),
        (128, (Tile(64, 16, (4, 1)), Tile(16, 32, (1, 4)))),
        (256, (Tile(32, 8, (2, 1)), Tile(16, 16, (1, 2)))),
    ),
}


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of an attention; None where its operands or result are not such as this schedule takes."""
    found = problem_of(region)
    if found is None:
        return None
    problem, dtype = found
    tile = choose(problem, dtype, target)
    if tile is None:
        return None
    warps = warps_of(tile, dtype, target.products, problem.queries.channels, problem.values.channels)
    splits = splits_of(problem, tile, target)
    kind = "tf32" if dtype == F32 and target.products == "tf32" else dtype
    name = f"attention_{kind}_{problem.queries.channels}_{tile}"
    if splits == 1:
        kernel = BlockKernel(problem, tile, warps, None)
        return Lowered((_call(region, kernel.body(), name, (problem.result.buffer,)),))
    partial = Partial(problem, splits)
    scratch = (partial.sums, partial.rows)
    written = scratch if isinstance(splits, int) else (problem.result.buffer, *scratch)
    first = _call(region, BlockKernel(problem, tile, warps, partial).body(), name, written, scratch)
    second = _call(region, combine_blocks(partial), "attention_combined", (problem.result.buffer,), scratch)
    return Lowered((first, second), scratch)


def _call(
    region: Region, body: Block, name: str, written: tuple[Buffer, ...], scratch: tuple[Buffer, ...] = ()
) -> Call:
    buffers = used_buffers(body, (*region.buffers, *scratch))
    outputs = tuple(buffer.name for buffer in buffers if buffer in written)
    kernel = Kernel(name, buffers, outputs, free_sizes(body, buffers), body, region.origin)
    return Call(kernel, tuple(b.name for b in buffers), tuple(symbol(size, None) for size in kernel.sizes))


def usual(dim: Dim, guess: int) -> int:
    """A size, or what it is taken for."""
    return evaluate(dim, {found.name: guess for found in symbols(dim)})


def choose(problem: Problem, dtype: DType, target: Target) -> Tile | None:
    """The largest tile that leaves no multiprocessor without work and fits into shared memory."""
    kind = "halves" if dtype != F32 else "words" if target.products == "tf32" else "lanes"
    width, depth = problem.queries.channels, problem.values.channels
    tiles = next(tiles for most, tiles in TILES[kind] if max(width, depth) <= most)
    batches, queries = batch_of(problem), usual(problem.queries.rows, GUESS["rows"])
    fitting = [tile for tile in tiles if _warps(tile, dtype, target, problem).shared_bytes <= target.shared_bytes]
    for tile in fitting:
        if batches * -(-queries // tile.rows) >= target.multiprocessors and queries > tile.rows // 2:
            return tile
    return fitting[-1] if fitting else None


def _warps(tile: Tile, dtype: DType, target: Target, problem: Problem) -> Warps:
    return warps_of(tile, dtype, target.products, problem.queries.channels, problem.values.channels)


def batch_of(problem: Problem) -> int:
    """Heads in all."""
    return usual(product(axis.extent for axis in problem.axes), GUESS["batch"])


def splits_of(problem: Problem, tile: Tile, target: Target) -> Dim:
    """Blocks that share the keys of a row: as many as occupy all multiprocessors, where there are keys enough."""
    queries, keys = problem.queries.rows, problem.keys.rows
    if not isinstance(queries, int) or queries > FEW_QUERIES:
        return 1
    wanted = target.multiprocessors // (batch_of(problem) * -(-queries // tile.rows))
    if wanted < 2:
        return 1
    if isinstance(keys, int):
        return max(1, min(wanted, keys // SHARE))
    return ceildiv(keys, OPEN_SHARE)
