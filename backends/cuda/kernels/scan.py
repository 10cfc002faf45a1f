"""Running sums and products.

A block walks a line whose elements lie side by side: a thread combines a few neighbours, a warp its threads by
shuffles, the block its warps through shared memory. Lines that lie beside one another have a thread each. Where lines
are few and long they are cut: the totals of the parts come first, then what precedes each part, then the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, product, symbol
from ....ir.dtypes import BOOL, DType
from ....ir.intrinsics import WARP
from ....ir.loops import Alloc, Barrier, Block, Define, For, Let, Statement, Store
from ....ir.ops.reduction import accumulator
from ....ir.scalars import Buffer, Scalar, load
from ....ir.target import Target
from ....ir.tensors import normalize_axis, unflatten
from ....passes.nests import Axis, Output
from ....passes.regions import Call, Lowered, Region
from ....passes.threads import BLOCK
from ...kernels.calls import arithmetic_type, attribute, present
from . import rows
from .groups import THREADS, below, block_index, blocks_of, call_of, thread_index, where
from .lanes import Lanes, multiples
from .prefix import block_prefix
from .stages import Stage, Work

EACH = 4
"""Neighbours that a thread combines."""
LONG = {True: 16384, False: 512}
"""Elements from which on a line is cut, if lines are few: of lines in a row, and of lines beside one another."""
FEW = {True: 64, False: 16384}
"""Lines below which they are few."""
PART = {True: 4096, False: 32}
"""Elements of a part at least."""
PARTS = 256
"""Parts of all lines at most (of 128 lines each where these lie beside one another)."""
COMBINED = {"CumSum": "add", "CumProd": "mul"}


@dataclass(frozen=True)
class Scan:
    """Lines [outer, extent, inner] of which every element is combined with those before it.

    `source(outer, at, inner)` is an element in the order of the walk, `target` where its result goes; `before` is what
    precedes a whole line [outer, inner], if anything does. The walk is cut into `parts` of `size` elements.
    """

    op: str
    dtype: DType
    outer: Dim
    extent: Dim
    inner: Dim
    source: Callable[[Dim, Dim, Dim], Scalar]
    target: Callable[[Dim, Dim, Dim], tuple[Buffer, Dim]]
    exclusive: bool
    parts: int = 1
    before: Buffer | None = None

    @property
    def in_a_row(self) -> bool:
        return self.inner == 1

    @property
    def identity(self) -> Scalar:
        return s.const(s.IDENTITY[self.op](self.dtype), self.dtype)

    @property
    def size(self) -> Dim:
        unit = PART[self.in_a_row] if self.parts > 1 else 1
        return self.extent if self.parts == 1 else ceildiv(ceildiv(self.extent, self.parts), unit) * unit

    def combined(self, a: Scalar, b: Scalar) -> Scalar:
        return s.binary(self.op, a, b)

    def preceding(self, outer: Dim, part: Dim, inner: Dim) -> Scalar:
        if self.before is None:
            return self.identity
        return load(self.before, (outer * self.parts + part) * self.inner + inner)


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a running sum or product; None where the axis is not known."""
    assert region.anchor is not None
    x, given = present(region, 0), region.static["axis"]
    if not isinstance(given[0], int):
        return None
    axis = normalize_axis(given[0], x.rank)
    extent, shape = x.shape[axis], x.shape
    result, _ = region.outputs[0]
    if 0 in shape:
        return Lowered(())
    reverse = bool(attribute(region, "reverse"))
    dtype = accumulator(arithmetic_type(region, x.dtype))
    inner = product(shape[axis + 1 :])

    def place(at: Dim) -> Dim:
        return extent - 1 - at if reverse else at

    def source(outer: Dim, at: Dim, beside: Dim) -> Scalar:
        where = (*unflatten(outer, shape[:axis]), place(at), *unflatten(beside, shape[axis + 1 :]))
        return s.cast(x.at(where), dtype)

    def put(outer: Dim, at: Dim, beside: Dim) -> tuple[Buffer, Dim]:
        return result, (outer * extent + place(at)) * inner + beside

    op = COMBINED[region.anchor.op]
    scan = Scan(op, dtype, product(shape[:axis]), extent, inner, source, put, bool(attribute(region, "exclusive")))
    parts = _parts(scan)
    if parts == 1:
        return Lowered((walk(region, scan, region.name, ()),))
    return _cut(region, replace(scan, parts=parts))


def _parts(scan: Scan) -> int:
    """Into how many parts each line is cut."""
    lines = scan.outer * scan.inner
    if not isinstance(lines, int) or not isinstance(scan.extent, int):
        return 1
    row = scan.in_a_row
    if lines >= FEW[row] or scan.extent < LONG[row]:
        return 1
    parts = min(PARTS // max(1, lines // (1 if row else 128)), scan.extent // PART[row])
    size = -(-scan.extent // parts // PART[row]) * PART[row]
    return -(-scan.extent // size)


def _cut(region: Region, scan: Scan) -> Lowered:
    """Totals of the parts; what precedes each; the parts."""
    count = scan.outer * scan.parts * scan.inner
    totals, before = Buffer("totals", scan.dtype, count), Buffer("before", scan.dtype, count)
    axes = [Axis("line", scan.outer), Axis("part", scan.parts), Axis("beside", scan.inner)]
    along = Axis("column", scan.size)
    outer, part, inner = (axis.index if axis.extent != 1 else 0 for axis in axes)
    at = part * scan.size + along.index
    result = Buffer("total", scan.dtype, 1, "register")
    inside = s.binary("lt", s.index(at), s.index(scan.extent))
    whole = scan.size * scan.parts == scan.extent
    offset = (outer * scan.parts + part) * scan.inner + inner
    work = Work(
        tuple(axis for axis in axes if axis.extent != 1),
        (along,),
        (Stage(scan.op, scan.source(outer, at, inner), result, 0),),
        (),
        (Output(totals, offset, load(result, 0)),),
        None if whole else inside,
        scan.extent if isinstance(scan.extent, int) else 1,
    )
    first = call_of(region, rows.kernel(region, work), [totals], [totals], f"{region.name}_totals")

    def total(outer: Dim, at: Dim, inner: Dim) -> Scalar:
        return load(totals, (outer * scan.parts + at) * scan.inner + inner)

    def put(outer: Dim, at: Dim, inner: Dim) -> tuple[Buffer, Dim]:
        return before, (outer * scan.parts + at) * scan.inner + inner

    steps = Scan(scan.op, scan.dtype, scan.outer, scan.parts, scan.inner, total, put, True)
    second = walk(region, steps, f"{region.name}_before", (totals, before))
    third = walk(region, replace(scan, before=before), region.name, (before,))
    return Lowered((first, second, third), (totals, before))


def walk(region: Region, scan: Scan, name: str, scratch: Sequence[Buffer]) -> Call:
    """The kernel of all parts."""
    body = _in_a_row(region, scan) if scan.in_a_row else _beside(scan)
    return call_of(region, body, [scan.target(0, 0, 0)[0]], scratch, name)


def _beside(scan: Scan) -> Block:
    """A thread for each line's part: neighbours read neighbouring memory."""
    count = scan.outer * scan.parts * scan.inner
    blocks = ceildiv(count, THREADS)
    number = block_index(blocks) * THREADS + thread_index(THREADS)
    outer, part, inner = unflatten(symbol("number", 0, count - 1), (scan.outer, scan.parts, scan.inner))
    total = Buffer("total", scan.dtype, 1, "register")
    start = part * scan.size
    at = start + symbol("step", 0, scan.size - 1)
    value = scan.combined(load(total, 0), scan.source(outer, at, inner))
    buffer, offset = scan.target(outer, at, inner)
    put = Store(buffer, offset, s.cast(load(total, 0), buffer.dtype))
    add = Store(total, 0, value)
    each: tuple[Statement, ...] = (put, add) if scan.exclusive else (add, put)
    inside = below(at, scan.extent) if scan.parts > 1 else s.const(True, BOOL)
    steps = For("step", scan.size, tuple(where(inside, each)))
    body: list[Statement] = [Define(total, scan.preceding(outer, part, inner)), steps]
    return blocks_of(blocks, THREADS, [Let("number", number), *where(below(number, count, "number"), body)])


def _neighbours(region: Region, scan: Scan) -> Lanes:
    """How a thread's neighbours are moved: together where that is aligned, else one by one."""
    lanes = Lanes("place", EACH, frozenset({"place", "block", "tile"}), region.alignment)
    buffer, offset = scan.target(symbol("block") // scan.parts, symbol("place"), 0)
    even = all(isinstance(size, int) and size % EACH == 0 for size in (scan.size, scan.extent))
    if even and lanes.is_aligned(buffer, offset) and multiples(lanes.conditions, EACH) == s.const(True, BOOL):
        return lanes
    return Lanes("place", 1, frozenset(), region.alignment)


def _in_a_row(region: Region, scan: Scan) -> Block:
    """A block for each line's part."""
    size = scan.size
    wanted = -(-size // EACH) if isinstance(size, int) else THREADS
    threads = min(THREADS, max(WARP, 1 << max(0, wanted - 1).bit_length()))
    blocks = scan.outer * scan.parts
    block = k.index_symbol(BLOCK, blocks)
    outer, part = block // scan.parts, block % scan.parts
    thread, tiles = thread_index(threads), ceildiv(size, threads * EACH)
    values = Buffer("values", scan.dtype, EACH, "register")
    carry, base = (Buffer(name, scan.dtype, 1, "register") for name in ("carry", "base"))
    each = symbol("each", 0, EACH - 1)
    first = (k.index_symbol("tile", tiles) if tiles != 1 else 0) * (threads * EACH) + thread * EACH
    lanes = _neighbours(region, scan)
    # Behind the end, identities; of aligned neighbours all are inside or none.
    single = lanes.count == 1
    within = first + each if single else first
    at = part * size + within
    inside = below(within, size)
    if scan.parts > 1:
        inside = s.binary("and", inside, below(at, scan.extent))
    place = symbol("place", 0, scan.extent - 1)
    before, (value,) = lanes.values([scan.source(outer, at if single else place, 0)])
    if single:
        reads: list[Statement] = [
            For("each", EACH, (Store(values, each, s.select(inside, value, scan.identity)),), "unrolled")
        ]
    else:
        reads = [For("each", EACH, (Store(values, each, scan.identity),), "unrolled"), Let("place", at)]
        reads += where(inside, [*before, lanes.each([Store(values, lanes.lane, value)])])
    add = scan.combined(load(values, each), load(values, each + 1))
    body: list[Statement] = [
        Alloc(values),
        *reads,
        For("each", EACH - 1, (Store(values, each + 1, add),), "unrolled"),
    ]
    found, before_block, whole = block_prefix(load(values, EACH - 1), scan.op, threads, "threads")
    body += [*found, Define(base, scan.combined(load(carry, 0), load(before_block, 0)))]
    body.append(Store(carry, 0, scan.combined(load(carry, 0), load(whole, 0))))
    own = each if single else lanes.lane
    buffer, offset = scan.target(outer, at if single else place, 0)
    upto = load(values, own)
    if scan.exclusive:
        upto = s.select(s.index(own).equal(0), scan.identity, load(values, s.as_dim(_previous(own))))
    result = s.cast(scan.combined(load(base, 0), upto), buffer.dtype)
    stores = where(inside, lanes.outputs([(buffer, offset)], [result]))
    body += [For("each", EACH, tuple(stores), "unrolled")] if single else stores
    start = Define(carry, scan.preceding(outer, part, 0))
    if tiles == 1:
        return blocks_of(blocks, threads, [start, *body])
    if threads > WARP:
        body.append(Barrier())
    return blocks_of(blocks, threads, [start, For("tile", tiles, tuple(body))])


def _previous(each: Dim) -> Scalar:
    """The number before, 0 for the first."""
    return s.binary("max", s.index(each - 1), s.index(0))
