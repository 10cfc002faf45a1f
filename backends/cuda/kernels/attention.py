"""Attention on a GPU, the scores never stored (FlashAttention-2, Dao 2023); for few queries blocks share the keys."""

from __future__ import annotations

from collections.abc import Mapping

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_factor, evaluate, linear, symbol, symbols
from ....ir.dtypes import BF16, F16, F32, DType
from ....ir.loops import Block, Kernel, free_sizes, used_buffers
from ....ir.ops.attention import NAN, ZERO
from ....ir.ops.contraction import batch_index
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....ir.tensors import Indices, Tensor, flat_offset
from ....passes.nests import Axis
from ....passes.regions import ANCHOR, Call, Lowered, Region
from .attention_block import CHANNEL, BlockKernel, Matrix, Partial, Problem, Result, combine_blocks, flat_size
from .attention_scores import KEY, PRODUCT, QUERY, score_of
from .attention_warps import Tile, Warps, warps_of

WIDEST = 256
"""Channels of a head up to which a row of sums fits into registers."""
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


# The problem


def problem_of(region: Region) -> tuple[Problem, DType] | None:
    """What the region computes, and the type in which it multiplies; None where a schedule cannot make it so."""
    anchor, like = region.anchor, region.anchor_output
    if anchor is None or like is None or len(region.outputs) != 1 or any(t is None for t in region.operands):
        return None
    ((buffer, output),) = region.outputs
    query, key, value = (tensor for tensor in region.operands[:3] if tensor is not None)
    width, depth = query.shape[-1], value.shape[-1]
    if not isinstance(width, int) or not isinstance(depth, int) or not 0 < max(width, depth) <= WIDEST:
        return None
    placed = _placed(output)
    if placed is None:
        return None
    axes, at, element = placed
    batch = element.indices[:-2]
    dtypes = {tensor.dtype for tensor in (query, key, value)}
    dtype = dtypes.pop() if len(dtypes) == 1 else F32
    if dtype not in (F16, BF16, F32) or like.dtype not in (F16, BF16, F32):
        return None
    queries, keys = like.shape[-2], key.shape[-1]
    matrices = (
        _matrix(region, query, batch, ("row", CHANNEL), queries, width, dtype),
        _matrix(region, key, batch, (CHANNEL, "row"), keys, width, dtype),
        _matrix(region, value, batch, ("row", CHANNEL), keys, depth, dtype),
    )
    where = (*batch, _index(QUERY, queries), _index(KEY, keys))
    shape = (*like.shape[:-2], queries, keys)
    products = anchor.attributes.get("result", query.dtype)
    assert isinstance(products, DType)
    (scores,) = region.compose(
        "scores", Tensor(shape, products, lambda i: s.Element(products, 1, PRODUCT, i), "buffer")
    )
    score = score_of(scores.at(where))
    offset = flat_offset(at, output.shape)
    result = Result(buffer, offset, output.at(at), like.dtype, _neighbours(region, buffer, offset, depth))
    zero_rows = anchor.attributes.get("empty_rows", NAN) == ZERO
    return Problem(axes, *matrices, score, result, zero_rows), dtype


def _index(name: str, extent: Dim) -> Dim:
    return 0 if extent == 1 else symbol(name, 0, extent - 1)


def _placed(output: Tensor) -> tuple[tuple[Axis, ...], Indices, s.Element] | None:
    """The batch's axes, an index of the output over them, QUERY and CHANNEL, and the one element of the anchor that it
    is made of. None where queries or channels are no axes of the output, or another element is needed."""
    plain = [_index(f"axis{a}", extent) for a, extent in enumerate(output.shape)]
    found = _element(output, plain)
    if found is None:
        return None
    names: dict[Dim, str] = {}
    for index, name in zip(found.indices[-2:], (QUERY, CHANNEL), strict=True):
        if index == 0:
            continue
        if index not in plain or index in names:
            return None
        names[index] = name
    others = [index for index in plain if index != 0 and index not in names]
    titles = {1: ["batch"], 2: ["batch", "head"]}.get(len(others), [f"batch{i}" for i in range(len(others))])
    names.update(zip(others, titles, strict=True))
    at = tuple(
        0 if index == 0 else symbol(names[index], 0, extent - 1)
        for index, extent in zip(plain, output.shape, strict=True)
    )
    element = _element(output, at)
    if element is None or any({QUERY, CHANNEL} & s.free_symbols(index) for index in element.indices[:-2]):
        return None
    extents = {names[index]: extent for index, extent in zip(plain, output.shape, strict=True) if index != 0}
    return tuple(Axis(title, extents[title]) for title in titles), at, element


def _element(output: Tensor, at: Indices | list[Dim]) -> s.Element | None:
    parts = [p for p in s.walk(output.at(tuple(at))) if isinstance(p, s.Element) and p.tensor == ANCHOR]
    return parts[0] if len(parts) == 1 else None


def _matrix(
    region: Region, tensor: Tensor, batch: Indices, names: tuple[str, str], rows: Dim, channels: int, dtype: DType
) -> Matrix:
    """An operand with its last two axes called `names`, for an index of the batch."""
    extents = {"row": rows, CHANNEL: channels}
    last = tuple(_index(name, extents[name]) for name in names)
    value = tensor.at((*batch_index(batch, tensor), *last))
    if not isinstance(value, s.Load) or value.predicate is not None:
        return Matrix(value, rows, channels)
    along_row, along_channel = (_stride(value.offset, name, extents[name]) for name in ("row", CHANNEL))
    if along_channel != 1 or along_row is None or value.dtype != dtype:
        return Matrix(value, rows, channels, by_rows=along_row == 1)
    start = s.Rewriter(dims={CHANNEL: 0}).dim(value.offset)
    for copied in (16, 8, 4):
        elements = copied // dtype.bytes
        fits = channels % elements == 0 and dim_factor(start) % elements == 0
        if elements and fits and region.alignment(value.buffer.name) % copied == 0:
            return Matrix(value, rows, channels, value.buffer, value.offset, copied)
    return Matrix(value, rows, channels)


def _stride(offset: Dim, name: str, extent: Dim) -> Dim | None:
    """How far apart neighbours along an axis are; None where that differs."""
    if extent == 1:
        return 1 if name == CHANNEL else 0
    found = linear(offset, name)
    return found[0] if found is not None else None


def _neighbours(region: Region, buffer: Buffer, offset: Dim, channels: int) -> int:
    """How many channels of the result can be stored at a time."""
    found = linear(offset, CHANNEL)
    if found is None or found[0] != 1:
        return 1
    for count in (4, 2):
        aligned = region.alignment(buffer.name) % (count * buffer.dtype.bytes) == 0
        if channels % count == 0 and dim_factor(found[1]) % count == 0 and aligned:
            return count
    return 1


# The plan


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
    return usual(flat_size([axis.extent for axis in problem.axes]), GUESS["batch"])


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
