"""Outputs that read operands across memory: tiles go through shared memory, so that both sides move whole lines.

What is wanted is recognised by strides alone: a load that is contiguous along another axis than the last one, along
which the outputs are. A block reads its tile of each such operand with its warps along the operand's own axis, then
computes the outputs with its warps along theirs; whatever else the outputs read is read there. Both sides move 16 bytes
at a time where that is aligned. Rows of a tile are 4 bytes longer than its elements: at most two threads of
a warp find theirs in one bank of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, known_le, linear, product, symbol
from ....ir.dtypes import BOOL
from ....ir.loops import Alloc, Barrier, Block, For, Let, Statement, Store
from ....ir.scalars import Buffer, Load, Scalar
from ....ir.tensors import unflatten
from ....passes.guards import guard_loads
from ....passes.nests import Axis, all_reductions
from ....passes.regions import Region
from ....passes.threads import BLOCK
from .groups import THREADS, Group, blocks_of, thread_index, where
from .lanes import Lanes, lanes_of, multiples

BANK = 4
"""Bytes of a bank of shared memory, by which the rows of a tile are longer than their elements."""
TILE, SMALL = 64, 32
"""Elements along the sides of a tile."""
SHORT = 16
"""Extents below which caches do as well as a tile would."""
LINE = 32
"""Bytes of a stride up to which neighbouring reads share what memory delivers at least."""
SHARED_BYTES = 40 << 10
"""Shared memory of all tiles: every GPU gives a block 48 KiB."""


@dataclass(frozen=True)
class _Tile:
    """One operand's tile, `[size, size]` elements by the outputs' last axis and the operand's own."""

    load: Load
    shared: Buffer
    pitch: int


def kernel(region: Region, group: Group) -> Block | None:
    """The body of a group's kernel; None where no operand is read across memory."""
    if len(group.axes) < 2 or any(all_reductions(value) for value in group.values):
        return None
    last = group.axes[-1]
    values = [guard_loads(value) for value in group.values]
    crossed = _crossed(values, group)
    if crossed is None:
        return None
    own, loads = crossed
    outputs = tuple(replace(output, value=value) for output, value in zip(group.outputs, values, strict=True))
    group = replace(group, outputs=outputs)
    whole = lanes_of([*(load.buffer for load in loads), *(output.buffer for output in outputs)])
    extents = [axis.extent for axis in (own, last) if isinstance(axis.extent, int)]
    for size, lanes in ((max(TILE, 8 * whole), whole), (SMALL, min(4, whole)), (SMALL, 1)):
        # A tile that is mostly empty is no gain.
        if size == SMALL or all(2 * extent >= 3 * (size // 2) for extent in extents):
            found = _tiled(region, group, own, loads, size, lanes)
            if found is not None:
                return found
    return None


def _crossed(values: list[Scalar], group: Group) -> tuple[Axis, list[Load]] | None:
    """The axis along which operands lie that are read across, and their loads."""
    *others, last = group.axes
    if known_le(last.extent, SHORT - 1):
        return None
    found: dict[Axis, dict[bytes, Load]] = {}
    for node in (node for value in values for node in s.walk(value)):
        if not isinstance(node, Load) or node.buffer.space != "parameter" or node.predicate is not None:
            continue
        across = linear(node.offset, last.name)
        if across is None or across[0] in (0, 1):
            continue
        if isinstance(across[0], int) and abs(across[0]) * node.dtype.bytes < LINE:
            continue
        for axis in others:
            along = linear(node.offset, axis.name)
            if along is not None and along[0] == 1 and not known_le(axis.extent, SHORT - 1):
                found.setdefault(axis, {})[node.digest] = node
    if not found:
        return None
    own = max(found, key=lambda axis: len(found[axis]))
    return own, list(found[own].values())


def _tiled(region: Region, group: Group, own: Axis, loads: list[Load], size: int, lanes: int) -> Block | None:
    """The body with tiles of a size and so many lanes to an access; None where these are not aligned, or the tiles too
    large."""
    last = group.axes[-1]
    tiles = []
    for number, load in enumerate(loads):
        pitch = size + max(1, BANK // load.dtype.bytes)
        tiles.append(_Tile(load, Buffer(f"tile{number}", load.dtype, size * pitch, "shared"), pitch))
    if sum(tile.pitch * size * tile.load.dtype.bytes for tile in tiles) > SHARED_BYTES:
        return None
    reading = Lanes(own.name, lanes, group.indices, region.alignment, prefix="r")
    writing = Lanes(last.name, lanes, group.indices, region.alignment)
    aligned = [writing.is_aligned(output.buffer, output.offset) for output in group.outputs]
    aligned += [reading.is_aligned(tile.load.buffer, tile.load.offset) for tile in tiles]
    if lanes > 1 and not all(aligned):
        return None
    starts = {axis.name: Axis(f"first_{axis.name}", axis.extent) for axis in (own, last)}
    first = {name: symbol(axis.name) for name, axis in starts.items()}
    copies: list[Statement] = []
    for tile in tiles:
        place = (symbol(last.name) - first[last.name]) * tile.pitch + symbol(own.name) - first[own.name]
        if lanes == 1:
            copies.append(Store(tile.shared, place, s.load(tile.load.buffer, tile.load.offset)))
            continue
        # Rows of a tile are aligned to banks alone.
        array, unit = reading.array(tile.load.buffer.name, tile.load), max(1, BANK // tile.load.dtype.bytes)
        whole = s.load(tile.load.buffer, tile.load.offset, lanes, aligned=True)
        copies += [Alloc(array), Store(array, 0, whole)]
        for piece in range(0, lanes, unit):
            copies.append(Store(tile.shared, place + piece, s.load(array, piece, unit), aligned=unit > 1))
    swapped = {
        tile.load.digest: s.load(
            tile.shared, (last.index - first[last.name]) * tile.pitch + own.index - first[own.name]
        )
        for tile in tiles
    }
    values = [s.Rewriter(lambda node: swapped.get(node.digest))(value) for value in group.values]
    before, values = writing.values(values)
    stores = writing.outputs([(output.buffer, output.offset) for output in group.outputs], values)
    if lanes > 1:
        even = multiples([*reading.conditions, *writing.conditions, own.extent, last.extent], lanes)
        if even != s.const(True, BOOL):
            return None
    counts = [ceildiv(a.extent, size) if a in (own, last) else a.extent for a in group.axes]
    blocks = product(counts)
    indices = unflatten(k.index_symbol(BLOCK, blocks), counts)
    names: list[Statement] = []
    for axis, at in zip(group.axes, indices, strict=True):
        tiled = axis in (own, last)
        names.append(Let(starts[axis.name].name if tiled else axis.name, at * size if tiled else at))
    body = [
        *map(Alloc, (tile.shared for tile in tiles)),
        _steps(last, own, size, lanes, copies),
        Barrier(),
        _steps(own, last, size, lanes, [*before, *stores]),
    ]
    return blocks_of(blocks, THREADS, body, names)


def _steps(rows: Axis, along: Axis, size: int, lanes: int, body: list[Statement]) -> Statement:
    """The body for every element of a tile, neighbouring threads along one of its axes."""
    beside, thread = size // lanes, thread_index(THREADS)
    together = THREADS // beside
    step = k.index_symbol("step", size // together)
    places: list[tuple[Axis, Dim]] = [(rows, thread // beside + step * together), (along, thread % beside * lanes)]
    lets = [Let(axis.name, symbol(f"first_{axis.name}") + place) for axis, place in places]
    inside: Scalar = s.const(True, BOOL)
    for axis, _ in places:
        if not (isinstance(axis.extent, int) and axis.extent % size == 0):
            inside = s.binary("and", inside, s.binary("lt", s.index(symbol(axis.name)), s.index(axis.extent)))
    return For("step", size // together, (*lets, *where(inside, body)), "unrolled")
