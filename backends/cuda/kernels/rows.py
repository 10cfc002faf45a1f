"""Reductions over rows (see `stages`) in one pass over memory.

Where columns are contiguous, a few lanes of a warp share a short row, a block a long one; where neighbouring rows are,
threads lie along the rows and the columns are dealt out to parts of the block. Either way a thread moves 16 bytes at a
time and keeps in registers what later stages need again, the columns it has seen or what was made of them; totals are
combined by shuffles and, between warps, through shared memory, always in the same order. Rows that are too long for
registers lie in shared memory, or are read again by each stage, mostly from the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, linear, product, symbol
from ....ir.intrinsics import WARP
from ....ir.loops import Alloc, Barrier, Block, For, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import unflatten
from ....passes.nests import Axis
from ....passes.regions import Region
from ....passes.threads import BLOCK, block_reduction, warp_reduction
from .groups import blocks_of, where
from .lanes import Lanes, lanes_of, multiples
from .row_passes import TRUE, Mapping
from .stages import Work, along_rows

SHARE = 16
"""Columns that a thread keeps if it can be: enough loads in flight, few registers."""
MOST = 32
"""Columns that a thread keeps at most; half of it in the largest blocks, whose threads have 64 registers."""
LARGEST = 1024
"""Threads of a block at most."""
FULL = 1 << 17
"""Threads that fill half of a large GPU; where rows are few, more threads share each."""
USUAL = 128
"""Threads for a row whose length only the run tells, and of a block of several rows."""
FEW = 64
"""Rows whose blocks leave a GPU idle, however many threads they have."""
BESIDE = 256
"""Threads of a block that lie along the rows."""


class AlongColumns(Mapping):
    """Lanes along the columns; several rows to a block where their parts are fewer threads than a warp."""

    along_columns = True

    @property
    def _rows(self) -> int:
        """Rows of a block."""
        return self.threads // self.parts

    @property
    def blocks(self) -> Dim:
        return ceildiv(self.work.count, self._rows)

    @property
    def part(self) -> Dim:
        return self.thread % self.parts

    @property
    def wanted(self) -> Scalar | None:
        whole = self.blocks * self._rows == self.work.count
        return None if whole else s.binary("lt", s.index(symbol("wanted_row")), s.index(self.work.count))

    def start(self) -> list[Statement]:
        number = k.index_symbol(BLOCK, self.blocks) * self._rows + self.thread // self.parts
        if self.wanted is None:
            return _named(self.work.rows, number)
        clamped = dim_min(symbol("wanted_row"), self.work.count - 1)
        return [Let("wanted_row", number), *_named(self.work.rows, clamped)]

    def combine(self, registers: Sequence[tuple[Buffer, str]], tag: str) -> list[Statement]:
        if self.parts <= WARP:
            return warp_reduction(registers, self.parts)
        return block_reduction(registers, self.threads, tag, again=False)


class AlongRows(Mapping):
    """Lanes along the last axis of the rows, along which the threads of one part lie side by side."""

    along_columns = False

    @property
    def _beside(self) -> int:
        return self.threads // self.parts

    @property
    def _across(self) -> Dim:
        """Blocks along the last axis of the rows."""
        return ceildiv(self.work.rows[-1].extent, self._beside * self.lanes)

    @property
    def blocks(self) -> Dim:
        return product(axis.extent for axis in self.work.rows[:-1]) * self._across

    @property
    def part(self) -> Dim:
        return self.thread // self._beside

    @property
    def wanted(self) -> Scalar | None:
        extent = self.work.rows[-1].extent
        whole = self._across * self._beside * self.lanes == extent
        return None if whole else s.binary("lt", s.index(symbol("wanted_row")), s.index(extent))

    def start(self) -> list[Statement]:
        *outer, last = self.work.rows
        block = k.index_symbol(BLOCK, self.blocks)
        place = (block % self._across * self._beside + self.thread % self._beside) * self.lanes
        names = _named(outer, block // self._across)
        if self.wanted is None:
            return [*names, Let(last.name, place)]
        clamped = dim_min(symbol("wanted_row"), last.extent - self.lanes)
        return [*names, Let("wanted_row", place), Let(last.name, clamped)]

    def combine(self, registers: Sequence[tuple[Buffer, str]], tag: str) -> list[Statement]:
        if self.parts == 1:
            return []
        beside = self._beside
        statements = warp_reduction(registers, max(1, WARP // beside), beside)
        if self.threads == WARP:
            return statements
        # Now each warp, or each of several side by side, holds parts of the same totals.
        span = max(beside, WARP)
        groups = self.threads // span
        group = k.index_symbol("group", groups)
        for number, (register, op) in enumerate(registers):
            shared = Buffer(f"{tag}_{number}", register.dtype, groups * beside * self.width, "shared")
            place = self.thread % beside

            def at(own: Dim, place: Dim = place) -> Dim:
                return (own * beside + place) * self.width + self._lane

            put = self._per_lane([Store(shared, at(self.thread // span), s.load(register, self._lane))])
            first = TRUE if beside >= WARP else s.binary("lt", s.index(self.thread % WARP), s.index(beside))
            statements += [Alloc(shared), *where(first, put), Barrier()]
            identity = s.const(s.IDENTITY[op](register.dtype), register.dtype)
            statements += self._per_lane([Store(register, self._lane, identity)])
            both = s.binary(op, s.load(register, self._lane), s.load(shared, at(group)))
            statements.append(
                For("group", groups, tuple(self._per_lane([Store(register, self._lane, both)])), "unrolled")
            )
        return statements


def _named(axes: Sequence[Axis], number: Dim) -> list[Statement]:
    """The indices of axes by the number of a row."""
    if len(axes) < 2:
        return [Let(axis.name, number) for axis in axes]
    flat = symbol("row_number", 0, product(axis.extent for axis in axes) - 1)
    indices = unflatten(flat, [axis.extent for axis in axes])
    return [Let("row_number", number), *(Let(axis.name, at) for axis, at in zip(axes, indices, strict=True))]


# By which way, and by how many threads.


def kernel(region: Region, work: Work) -> Block:
    """The body of a kernel that does some work."""
    way = AlongRows if along_rows(work) else AlongColumns
    last = (work.rows if way is AlongRows else work.columns)[-1]
    read = [load.buffer for load in work.loads() if (linear(load.offset, last.name) or (0, 0))[0] == 1]
    stored = work.outputs if way is AlongRows else work.elements
    lanes = lanes_of([*read, *(output.buffer for output in stored)])
    while (found := _with_lanes(way, region, work, lanes)) is None:
        lanes //= 2
    return found


def _with_lanes(way: type[Mapping], region: Region, work: Work, lanes: int) -> Block | None:
    """The body with so many lanes, None where they are not aligned; a single one always is.

    What depends on sizes that only the run tells is decided there: whether vectors are aligned, and columns few enough.
    """
    mapping = way(region, work, lanes, *_threads(way, work, lanes))
    own, plain = mapping.aligned(), Lanes("", 1, work.indices, region.alignment)
    if lanes == 1:
        own = plain
    if own is None:
        return None
    turns = mapping.turns
    few: Scalar = TRUE
    kept: int | None = None
    if isinstance(turns, int):
        kept = turns if turns * lanes <= _most(mapping.threads) else None
    elif work.elements or len(work.levels) > 1:
        kept = max(1, _most(mapping.threads) // lanes)
        few = s.index(work.length) <= s.index(kept * mapping.parts * mapping.together)
    statements = mapping.passes(own, kept)
    even = multiples(own.conditions, lanes)
    if even != TRUE and (isinstance(even, s.Const) or not mapping.along_columns):
        return None  # Along rows there would have to be other blocks where it does not hold.
    condition = s.binary("and", even, few)
    reading = replace(mapping, lanes=1) if mapping.along_columns else mapping
    other = plain if mapping.along_columns or lanes == 1 else mapping.aligned()
    assert other is not None
    again = [] if condition == TRUE else reading.passes(other, None, "_again")
    return blocks_of(mapping.blocks, mapping.threads, [*mapping.start(), *where(condition, statements, again)])


def _most(threads: int) -> int:
    """Columns that a thread of a block can keep."""
    return MOST if threads < LARGEST else MOST // 2


def _power(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()


def _threads(way: type[Mapping], work: Work, lanes: int) -> tuple[int, int]:
    """Threads of a block, and of them those that share a row."""
    return _across(work, lanes) if way is AlongRows else _within(work, lanes)


def _within(work: Work, lanes: int) -> tuple[int, int]:
    length, count = work.length, work.count
    if not isinstance(length, int):
        few = isinstance(count, int) and count <= FEW
        return (LARGEST, LARGEST) if few else (USUAL, USUAL)
    vectors = -(-length // lanes)
    parts = min(_power(-(-length // SHARE)), _power(vectors), LARGEST)
    if parts > 1 and vectors % parts and vectors % (parts // 2) == 0 and vectors // (parts // 2) * lanes <= MOST:
        parts //= 2  # Every thread has the same number of columns.
    while parts > 1 and -(-vectors // parts) * lanes > _most(parts) and parts < LARGEST:
        parts *= 2
    while isinstance(count, int) and count * parts < FULL and parts < min(_power(vectors), 2 * USUAL):
        parts *= 2
    return (parts if parts > WARP else USUAL), parts


def _across(work: Work, lanes: int) -> tuple[int, int]:
    extent, length, count = work.rows[-1].extent, work.length, work.count
    beside = WARP if not isinstance(extent, int) else min(WARP, _power(-(-extent // lanes)))
    if not isinstance(length, int):
        return BESIDE, BESIDE // beside
    if work.elements:
        # So many parts that all columns can be kept, if need be at the cost of shorter runs of memory.
        for threads in (BESIDE, 2 * BESIDE, LARGEST):
            for run in (beside, beside // 2, beside // 4):
                parts = min(threads // max(run, 1), _power(-(-length // 2)))
                if run * lanes >= WARP // 2 and run * parts >= WARP and -(-length // parts) * lanes <= _most(threads):
                    return run * parts, parts
    parts = min(BESIDE // beside, _power(-(-length // 2)))
    rows = count // lanes if isinstance(count, int) else 1
    while parts > 1 and rows * parts > 4 * FULL:
        parts //= 2
    if parts == 1 and beside == WARP:
        return BESIDE, 1
    return max(WARP, beside * parts), max(WARP // beside, parts)
