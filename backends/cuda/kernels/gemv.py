"""Products of a few rows: the large operand is read from memory once, by vectors, and multiplied lane by lane.

Where its elements are neighbours along the depth, a team of warps takes a few columns, its lanes share the depth, and
shuffles add up; where they are neighbours along the columns, a thread takes a vector of columns and every so many-th
step of the depth. Either way a block adds up the rest in shared memory. "Columns" are the positions of the operand that
is streamed, "rows" those of the other, which the caches hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, symbol
from ....ir.dtypes import I32
from ....ir.intrinsics import WARP
from ....ir.loops import Alloc, Barrier, Define, For, If, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from .choose import uses_tensor_cores, usual
from .contraction import Contraction, index
from .finish import BATCH, COLUMN, DEPTH, Finish
from .loaders import Matrix, as_read, neighbours
from .tiles import CHUNK, counter, unrolled

ROWS, ROWS_BESIDE_TENSOR_CORES = 8, 4
"""Rows up to which lanes multiply as fast as memory brings the other operand; with tensor cores a tile of 16 rows takes
over earlier."""
WARPS = 4
_BLOCKS_PER_SM = 4  # as many blocks keep enough reads under way
READS = 4  # vectors of the streamed operand that a thread asks for before it uses them


def applies(sums: Contraction, held: Matrix, streamed: Matrix, target: Target) -> int:
    """How many rows the held operand has, if they are so few that this schedule suits; else 0."""
    rows = sums.rows if streamed.position == COLUMN else sums.columns
    operands = (held.dtype, streamed.dtype) if streamed.position == COLUMN else (streamed.dtype, held.dtype)
    limit = ROWS_BESIDE_TENSOR_CORES if uses_tensor_cores(operands, sums.dtype, target) else ROWS
    return rows if isinstance(rows, int) and 0 < rows <= limit else 0


def along_depth(region: Region, matrix: Matrix) -> bool | None:
    """Whether vectors of 16 bytes lie along the depth of the operand (True) or its positions (False); None: neither."""
    read, count = as_read(matrix.value), CHUNK // matrix.dtype.bytes
    if read is None or region.alignment(read.load.buffer.name) < CHUNK:
        return None
    return next((deep for deep in (True, False) if neighbours(matrix, read, count, deep) is not None), None)


def lowered(region: Region, sums: Contraction, held: Matrix, streamed: Matrix, target: Target) -> Lowered | None:
    """The kernel of a product of few rows; None where the streamed operand cannot be read by vectors."""
    deep = along_depth(region, streamed)
    rows = applies(sums, held, streamed, target)
    if deep is None or not rows:
        return None
    made = FewRows(region, sums, held, streamed, rows, target)
    body = made.by_depth() if deep else made.by_columns()
    return Lowered((call(region, f"{region.name}_{streamed.dtype}_few_rows", (body,)),))


Multiplied = Callable[[int, Callable[[Dim], Dim], Dim], tuple[Statement, ...]]


@dataclass(frozen=True)
class FewRows:
    """The kernel of a product of `rows` rows of a held operand by all columns of a streamed one."""

    region: Region
    sums: Contraction
    held: Matrix
    streamed: Matrix
    rows: int
    target: Target

    @property
    def chunk(self) -> int:
        return CHUNK // self.streamed.dtype.bytes

    @property
    def columns(self) -> Dim:
        return self.streamed.extents[0]

    def _wanted(self) -> int:
        return _BLOCKS_PER_SM * self.target.multiprocessors

    def _stream(self, column: Dim, depth: Dim) -> Scalar:
        """A vector of the streamed operand, in the type of the sums."""
        read = as_read(self.streamed.value)
        assert read is not None
        at = s.Rewriter(dims={self.streamed.position: column, DEPTH: depth})
        value = s.load(read.load.buffer, at.dim(read.load.offset), self.chunk, aligned=True)
        if read.condition is not None:
            zero = s.widen(s.const(0, value.dtype), self.chunk)
            value = s.select(s.widen(at(read.condition), self.chunk), value, zero)
        return s.cast(value, self.sums.dtype)

    def _element(self, row: Dim, depth: Dim) -> Scalar:
        """An element of the held operand, 0 behind the last of its depth."""
        value = s.Rewriter(dims={self.held.position: row, DEPTH: depth})(self.held.value)
        inside = s.index(depth) < s.index(self.held.extents[1])
        return s.cast(s.select(inside, value, s.const(0, value.dtype)), self.sums.dtype)

    def hold(self, target: Buffer, depth: Dim, count: int) -> list[Statement]:
        """A vector of `count` along the depth of each row of the held operand, to registers."""
        read = as_read(self.held.value)
        row, lane = counter("row_of", self.rows), counter("element", count)
        whole = read is not None and read.condition is None and self.region.alignment(read.load.buffer.name) >= CHUNK
        if whole and read is not None and neighbours(self.held, read, count, True) is not None:
            at = s.Rewriter(dims={self.held.position: row, DEPTH: depth})
            value = s.load(read.load.buffer, at.dim(read.load.offset), count, aligned=True)
            body: Sequence[Statement] = [Store(target, row * count, s.cast(value, self.sums.dtype))]
        else:
            value = self._element(row, depth + lane)
            body = unrolled("element", count, [Store(target, row * count + lane, value)])
        return unrolled("row_of", self.rows, body)

    def by_depth(self) -> Statement:
        """Teams of warps that take a few columns each, their lanes and warps one part of the depth each."""
        rows = self.rows
        pieces = ceildiv(self.streamed.extents[1], self.chunk)
        each, deep = self._team(usual(pieces))
        teams, parts = WARPS // deep, WARP * deep
        groups = ceildiv(self.columns, each * teams)
        group = index("group", groups)
        warp, lane, part = symbol("warp", 0, WARPS - 1), symbol("lane", 0, WARP - 1), symbol("part", 0, parts - 1)
        first = symbol("first_column", 0, groups * (teams * each) - each)
        totals = Buffer("sums", self.sums.dtype, each * rows, "register")
        registers, multiplied = self.multiplied(totals, each)

        def steps(count: int, step: Dim) -> tuple[Statement, ...]:
            return multiplied(count, lambda which: ((step + which) * parts + part) * self.chunk, first)

        flat = counter("sum_of", each * rows)
        shared = Buffer("parts", self.sums.dtype, WARPS * each * rows, "shared")
        own, width = self._own(teams * each), teams * each
        at = (own % width // each * deep * each + own % width % each) * rows + own // width
        body: list[Statement] = [
            Let("first_column", (group * teams + warp // deep) * each),
            Let("part", warp % deep * WARP + lane),
            *_zeroed(totals),
            *(Alloc(buffer) for buffer in registers),
            *_loops(pieces, part, parts, max(1, READS // each), steps),
            *_shuffled(totals, 1),
            If(
                s.index(lane).equal(s.index(0)),
                tuple(
                    unrolled("sum_of", each * rows, [Store(shared, warp * (each * rows) + flat, s.load(totals, flat))])
                ),
            ),
            Barrier(),
            *self._finish(width, group, shared, at, (deep, each * rows), WARPS),
        ]
        return self._kernel(groups, WARPS, shared, body)

    def multiplied(self, totals: Buffer, each: int) -> tuple[list[Buffer], Multiplied]:
        """Registers, and the statements that read so many vectors along the depth of `each` columns and multiply them:
        given how many, where each of them begins, and the first column."""
        rows, chunk = self.rows, self.chunk
        weights = Buffer("weights", self.sums.dtype, 2 * max(1, READS // each) * each * chunk, "register")
        held = Buffer("inputs", self.sums.dtype, rows * chunk, "register")
        column, row, element = counter("column_of", each), counter("row_of", rows), counter("element", chunk)

        def steps(count: int, depth_of: Callable[[Dim], Dim], first: Dim) -> tuple[Statement, ...]:
            which = counter("ahead", count)
            depth, at = depth_of(which), (which * each + column) * chunk
            here = dim_min(first + column, self.columns - 1)
            sum_, weight = s.load(totals, column * rows + row), s.load(weights, at + element)
            add = Store(totals, column * rows + row, s.fma(weight, s.load(held, row * chunk + element), sum_))
            inner = unrolled("row_of", rows, unrolled("element", chunk, [add]))
            return (
                *unrolled("ahead", count, unrolled("column_of", each, [Store(weights, at, self._stream(here, depth))])),
                *unrolled("ahead", count, [*self.hold(held, depth, chunk), *unrolled("column_of", each, inner)]),
            )

        return [weights, held], steps

    def _team(self, pieces: int) -> tuple[int, int]:
        """Columns of a team, and its warps: as many columns as leave work for the whole GPU, and as few warps."""
        work, wanted = usual(self.columns) * usual(self.sums.batches), self._wanted() * WARPS
        each = next((c for c in (4, 2) if c * self.rows <= 16 and work // c >= wanted), 1)
        deep = next((d for d in (1, 2) if work // each * d >= wanted), WARPS)
        while deep > 1 and pieces < WARP * deep:
            deep //= 2
        return each, deep

    def by_columns(self) -> Statement:
        """Threads that take a vector of columns each, all threads of the same vector one part of the depth each."""
        rows, chunk, warps, dtype = self.rows, self.chunk, 2 * WARPS, self.sums.dtype
        vectors = ceildiv(self.columns, chunk)
        across = WARP
        while across > 4 and usual(vectors) // across * usual(self.sums.batches) < self._wanted():
            across //= 2
        parts = WARP // across * warps
        groups = ceildiv(vectors, across)
        group = index("group", groups)
        part, vector = symbol("part", 0, parts - 1), symbol("vector_of", 0, across - 1)
        totals = Buffer("sums", dtype, rows * chunk, "register")
        weights = Buffer("weights", dtype, 2 * READS * chunk, "register")
        value = Buffer("input", dtype, 1, "register")
        row, element = counter("row_of", rows), counter("element", chunk)
        column = dim_min(group * across + vector, vectors - 1) * chunk

        def steps(count: int, step: Dim) -> tuple[Statement, ...]:
            """Reads `count` vectors, then multiplies them."""
            which = counter("ahead", count)
            depth, at = (step + which) * parts + part, row * chunk + element
            add = Store(
                totals, at, s.fma(s.load(weights, which * chunk + element), s.load(value, 0), s.load(totals, at))
            )
            inner = [Store(value, 0, self._element(row, depth)), *unrolled("element", chunk, [add])]
            return (
                *unrolled("ahead", count, [Store(weights, which * chunk, self._stream(column, depth))]),
                *unrolled("ahead", count, unrolled("row_of", rows, inner)),
            )

        warp, lane = symbol("warp", 0, warps - 1), symbol("lane", 0, WARP - 1)
        shared = Buffer("parts", dtype, warps * rows * across * chunk, "shared")
        at = ((warp * rows + row) * across + vector) * chunk
        own, width = self._own(across * chunk), across * chunk
        write = unrolled("row_of", rows, [Store(shared, at, s.load(totals, row * chunk, chunk), aligned=True)])
        body: list[Statement] = [
            Let("vector_of", lane % across),
            Let("part", warp * (WARP // across) + lane // across),
            *_zeroed(totals),
            Alloc(weights),
            Alloc(value),
            *_loops(self.streamed.extents[1], part, parts, READS, steps),
            *_shuffled(totals, across),
            If(s.index(lane) < s.index(across), tuple(write)),
            Barrier(),
            *self._finish(width, group, shared, own, (warps, rows * width), warps),
        ]
        return self._kernel(groups, warps, shared, body)

    def _own(self, width: int) -> Dim:
        """The number of a result of the block."""
        return symbol("own", 0, self.rows * width - 1)

    def _finish(
        self, width: int, group: Dim, shared: Buffer, at: Dim, parts: tuple[int, int], warps: int
    ) -> list[Statement]:
        """The epilogue of `width` columns of all rows. What result `own` adds up, always in the same order, are so many
        elements of `shared`, so far apart, from `at` on."""
        results, threads = self.rows * width, warps * WARP
        own, total = self._own(width), Buffer("total", self.sums.dtype, 1, "register")
        place = own // width, group * width + own % width
        finish = Finish(self.sums.outputs, self.sums.rows, self.sums.columns, self.region.alignment, 1, False)
        loads = [s.load(shared, at + number * parts[1]) for number in range(parts[0])]
        turns = -(-results // threads)
        flat = counter("turn", turns) * threads + symbol("thread", 0, threads - 1)
        here = (
            Let("own", flat),
            Define(total, reduce(lambda a, b: s.binary("add", a, b), loads)),
            *finish.stores(*(place if self.streamed.position == COLUMN else place[::-1]), s.load(total, 0)),
        )
        some = s.index(flat) < s.index(results)
        body = here if isinstance(some, s.Const) else (If(some, here),)
        return [For("turn", turns, body)] if turns > 1 else list(body)

    def _kernel(self, groups: Dim, warps: int, shared: Buffer, body: Sequence[Statement]) -> Statement:
        thread = symbol("thread", 0, warps * WARP - 1)
        task = symbol("task", 0, groups * self.sums.batches - 1)
        places: list[Statement] = []
        if groups != 1:
            places.append(Let("group", task % groups))
        if self.sums.batches != 1:
            places.append(Let(BATCH, task // groups))
        lanes = (Let("warp", thread // WARP), Let("lane", thread % WARP))
        block = (*places, Alloc(shared), For("thread", warps * WARP, (*lanes, *body), "block"))
        return For("task", groups * self.sums.batches, block, "grid")


def _zeroed(totals: Buffer) -> list[Statement]:
    assert isinstance(totals.size, int)
    number = counter("sum_of", totals.size)
    return [Alloc(totals), *unrolled("sum_of", totals.size, [Store(totals, number, s.const(0, totals.dtype))])]


def _shuffled(totals: Buffer, apart: int) -> list[Statement]:
    """Adds up what lanes hold whose numbers differ by multiples of `apart`, a power of two."""
    assert isinstance(totals.size, int)
    flat, distance = counter("sum_of", totals.size), WARP // 2
    result: list[Statement] = []
    while distance >= apart:
        other = s.Call(totals.dtype, 1, "shuffle_xor", (s.load(totals, flat), s.const(distance, I32)))
        result += unrolled("sum_of", totals.size, [Store(totals, flat, s.load(totals, flat) + other)])
        distance //= 2
    return result


def _loops(
    pieces: Dim, part: Dim, parts: int, ahead: int, steps: Callable[[int, Dim], tuple[Statement, ...]]
) -> list[Statement]:
    """Steps part, part + parts, ... < pieces, `ahead` of them at once; `steps(count, first)` makes some that follow one
    another."""
    turn, rest = symbol("turn", 0), symbol("rest", 0)
    if isinstance(pieces, int) and pieces % parts == 0:
        count = pieces // parts
        ahead = next((a for a in range(2 * ahead, ahead, -1) if count % a == 0), min(ahead, count))
        whole, left = divmod(count, ahead)
        loop = [For("turn", whole, steps(ahead, turn * ahead))] if whole > 1 else list(steps(ahead, 0))
        return [*loop, *(steps(left, whole * ahead) if left else ())]
    known = symbol("steps", 0)
    whole_turns = known // ahead
    return [
        Let("steps", (pieces - part + (parts - 1)) // parts),
        For("turn", whole_turns, steps(ahead, turn * ahead)),
        *([For("rest", known - whole_turns * ahead, steps(1, whole_turns * ahead + rest))] if ahead > 1 else []),
    ]
