"""Transposes in registers: what a loop would read element by element is read in rows of tiles, and turned.

    for a < A: vector for b < B: y[..., b] = f(x[a + c * b])

reads a vector's elements from as many places. Tiles of 16 x 64 or so elements are copied to a small buffer instead:
vectors along `a`, turned by log2 of their lanes steps of interleaving (the perfect shuffle of H. S. Stone, "Parallel
processing with the perfect shuffle", 1971), and the loop over `b` reads that. What is left over at the ends, the loops
do as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..ir import loops as k
from ..ir import scalars as s
from ..ir.dims import Dim, floordiv, linear, symbol
from ..ir.dtypes import BF16, F16, F32, F64, I8, I16, I32, I64, U8, U16, U32, U64
from ..ir.loops import Alias, Alloc, Define, For, Kernel, Statement, Store
from ..ir.scalars import Buffer, Load, Rewriter, Scalar

LANES = 16
"""Elements of a vector that is turned, at most."""
TYPES = (I8, U8, I16, U16, I32, U32, I64, U64, F32, F64)
"""What registers hold as memory does; floats of 16 bits are turned as integers."""
HALF = (F16, BF16)
LONGEST = 64
"""Elements of a tile along the inner loop, at most."""
USUAL = 32
"""So many where only the run knows how long the loop is."""


def turn_tiles(kernel: Kernel, vector_bits: int) -> Kernel:
    """`kernel` with its transposing loops by tiles."""
    return replace(kernel, body=tuple(new for st in kernel.body for new in _statement(st, vector_bits)))


def _statement(outer: Statement, vector_bits: int) -> Iterator[Statement]:
    inner = outer.body[0] if isinstance(outer, For) and len(outer.body) == 1 else None
    store = inner.body[0] if isinstance(inner, For) and len(inner.body) == 1 else None
    plain = isinstance(outer, For) and outer.kind in ("parallel", "serial") and outer.step == 1
    if plain and isinstance(inner, For) and inner.kind == "serial" and isinstance(outer, For):
        yield replace(outer, body=tuple(_statement(inner, vector_bits)))
        return
    if not (plain and isinstance(inner, For) and inner.kind == "vector" and inner.step == 1):
        yield outer
        return
    assert isinstance(outer, For)
    turned = _turned(outer, inner, store) if isinstance(store, Store) else None
    bits = max((load.buffer.dtype.bits for load in turned.values()), default=0) if turned else 0
    rows = min(LANES, vector_bits // bits) if bits else 0
    extents = outer.extent, inner.extent
    if not turned or rows < 4 or any(isinstance(extent, int) and extent < rows for extent in extents):
        yield outer
        return
    assert isinstance(store, Store)
    columns = min(LONGEST, inner.extent // rows * rows) if isinstance(inner.extent, int) else max(rows, USUAL)
    whole = floordiv(outer.extent, rows) * rows, floordiv(inner.extent, columns) * columns
    tiles = _tiles(outer, inner, store, turned, (rows, columns))
    steps = For(f"{inner.index}_tile", floordiv(inner.extent, columns), tuple(tiles))
    yield For(f"{outer.index}_tile", floordiv(outer.extent, rows), (steps,), outer.kind)
    if inner.extent - whole[1] != 0:
        yield replace(outer, extent=whole[0], body=(_from(inner, whole[1]),))
    if outer.extent - whole[0] != 0:
        yield _from(outer, whole[0])


def _from(loop: For, start: Dim) -> For:
    """The last iterations of a loop."""
    moved = Rewriter(dims={loop.index: symbol(loop.index, 0, loop.extent - start - 1) + start})
    return replace(loop, extent=loop.extent - start, body=k.rebuild(loop.body, moved))


def _turned(outer: For, inner: For, store: Store) -> Mapping[bytes, Load] | None:
    """The loads that are contiguous along the outer loop and not along the inner one; None where tiles would not do:
    some other load is scattered, a condition guards one, or the result is not stored in rows."""
    found: dict[bytes, Load] = {}
    if store.predicate is not None or store.value.lanes != 1 or _stride(store.offset, inner.index) != 1:
        return None
    for node in s.walk(store.value):
        if isinstance(node, s.Select) or node.lanes != 1:
            return None
        if not isinstance(node, Load) or node.buffer.space == "register":
            continue
        along, across = _stride(node.offset, inner.index), _stride(node.offset, outer.index)
        if along is None or across is None or node.predicate is not None or node.buffer.name == store.buffer.name:
            return None
        if along not in (0, 1):
            if across != 1 or node.buffer.dtype not in (*TYPES, *HALF):
                return None
            found[node.digest] = node
    return found


def _stride(offset: Dim, index: str) -> Dim | None:
    """By how much an offset grows with an index; None where that differs."""
    parts = linear(offset, index)
    return None if parts is None or index in s.free_symbols(parts[0]) else parts[0]


def _tiles(
    outer: For, inner: For, store: Store, turned: Mapping[bytes, Load], shape: tuple[int, int]
) -> Iterator[Statement]:
    """What is done for one tile."""
    rows, columns = shape
    a = symbol(f"{outer.index}_tile", 0, floordiv(outer.extent, rows) - 1) * rows
    b = symbol(f"{inner.index}_tile", 0, floordiv(inner.extent, columns) - 1) * columns
    part = symbol(f"{inner.index}_part", 0, columns // rows - 1) * rows
    copies: dict[bytes, Buffer] = {}
    for number, (digest, load) in enumerate(turned.items()):
        name, dtype, source = f"{inner.index}_turned{number}", load.buffer.dtype, load.buffer
        copy = copies[digest] = Buffer(name, U16 if dtype in HALF else dtype, rows * columns, "stack")
        yield Alloc(copy)
        if dtype in HALF:
            source, copies[digest] = Buffer(f"{name}_bits", U16), Buffer(f"{name}_floats", dtype)
            yield from (Alias(source, load.buffer, 0), Alias(copies[digest], copy, 0))

        def line(j: int, load: Load = load, source: Buffer = source) -> Scalar:
            offset = Rewriter(dims={outer.index: a, inner.index: b + part + j}).dim(load.offset)
            return s.load(source, offset, rows)

        body = list(_network(f"{copy.name}_", copy, [line(j) for j in range(rows)], part, columns))
        yield For(f"{inner.index}_part", columns // rows, tuple(body))

    row, column = symbol(f"{outer.index}_row", 0, rows - 1), symbol(f"{inner.index}_column", 0, columns - 1)

    def copied(node: Scalar) -> Scalar | None:
        copy = copies.get(node.digest) if isinstance(node, Load) else None
        return None if copy is None else s.load(copy, row * columns + column)

    value = Rewriter(copied)(store.value)
    moved = Rewriter(dims={outer.index: a + row, inner.index: b + column})
    new = Store(store.buffer, moved.dim(store.offset), moved(value), None, store.stride, store.aligned)
    lanes = For(f"{inner.index}_column", columns, (new,), "vector")
    yield For(f"{outer.index}_row", rows, (lanes,))


def _network(stem: str, copy: Buffer, lines: list[Scalar], start: Dim, pitch: int) -> Iterator[Statement]:
    """Stores the transpose of `lines`, as many as they have lanes, as rows of the copy."""
    count = len(lines)
    halves = [[part + at for at in range(count // 2) for part in (side, count + side)] for side in (0, count // 2)]
    stage, steps = 0, count.bit_length() - 1
    held: list[Scalar] = []
    for number, line in enumerate(lines):
        register = Buffer(f"{stem}{stage}_{number}", copy.dtype, 1, "register", count)
        yield Define(register, line)
        held.append(s.load(register, 0, count))
    for stage in range(1, steps + 1):
        made: list[Scalar] = []
        for number in range(count):
            pair = held[number // 2], held[number // 2 + count // 2]
            register = Buffer(f"{stem}{stage}_{number}", copy.dtype, 1, "register", count)
            yield Define(register, s.Shuffle(copy.dtype, count, *pair, tuple(halves[number % 2])))
            made.append(s.load(register, 0, count))
        held = made
    for number, line in enumerate(held):
        yield Store(copy, start + number * pitch, line)
