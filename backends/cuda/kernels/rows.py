"""Reductions over rows (see `stages`) in one pass over memory.

Where columns are contiguous, a few lanes of a warp share a short row, a block a long one; where neighbouring rows are,
threads lie along the rows and the columns are dealt out to parts of the block. Either way a thread moves 16 bytes at a
time and keeps in registers what later stages need again, the columns it has seen or what was made of them; totals are
combined by shuffles and, between warps, through shared memory, always in the same order. Rows that are too long for
registers lie in shared memory, or are read again by each stage, mostly from the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, linear, product, symbol
from ....ir.dtypes import BF16, BOOL, F16, F32, I64, DType
from ....ir.intrinsics import WARP
from ....ir.loops import Alloc, Barrier, Block, Define, For, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import flat_offset, unflatten
from ....passes.nests import Axis, combined
from ....passes.regions import Region
from ....passes.threads import BLOCK, THREAD, block_reduction, warp_reduction
from ..launch import SHARED_ALIGNMENT
from .groups import blocks_of, where
from .lanes import LANE, Lanes, lanes_of, multiples
from .stages import Stage, Work, along_rows, common_parts

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
SHARED_BYTES = 96 << 10
"""Shared memory that keeps what registers do not: what every GPU gives a block that asks for it."""
FEW = 64
"""Rows whose blocks leave a GPU idle, however many threads they have."""
BESIDE = 256
"""Threads of a block that lie along the rows."""
UNROLLED = 8
"""Turns that are written out where nothing is kept: loads in flight."""
SLOT = "slot"
TRUE = s.const(True, BOOL)


@dataclass
class Mapping:
    """How the columns of rows are dealt out to the threads of a block: each row to `parts` of them.

    `lanes` elements along `index` are moved at a time. A thread's columns are `part`, `part + parts`, ...; where the
    lanes lie along the columns, they are counted in lanes.
    """

    region: Region
    work: Work
    lanes: int
    threads: int
    parts: int

    along_columns = True

    @property
    def index(self) -> str:
        return (self.work.columns if self.along_columns else self.work.rows)[-1].name

    @property
    def together(self) -> int:
        """Columns that a thread handles in one turn."""
        return self.lanes if self.along_columns else 1

    @property
    def width(self) -> int:
        """Registers of a total."""
        return 1 if self.along_columns else self.lanes

    @property
    def turns(self) -> Dim:
        return ceildiv(self.work.length, self.parts * self.together)

    @property
    def thread(self) -> Dim:
        return k.index_symbol(THREAD, self.threads)

    # What ways of dealing out differ in.

    @property
    def blocks(self) -> Dim:
        raise NotImplementedError

    @property
    def part(self) -> Dim:
        raise NotImplementedError

    @property
    def wanted(self) -> Scalar | None:
        """Whether a thread's row is one at all. Threads behind the last compute that again and store nothing, as whole
        warps exchange values."""
        raise NotImplementedError

    def start(self) -> list[Statement]:
        """Names the rows' indices."""
        raise NotImplementedError

    def combine(self, registers: Sequence[tuple[Buffer, str]], tag: str) -> list[Statement]:
        """Combines registers over the parts, by shared memory called after `tag`; all parts get the result."""
        raise NotImplementedError

    # What they share.

    def aligned(self) -> Lanes | None:
        """Lanes of which all stores are aligned, perhaps on conditions; None where they are not."""
        lanes = Lanes(self.index, self.lanes, self.work.indices, self.region.alignment)
        lanes.conditions.append((self.work.columns if self.along_columns else self.work.rows)[-1].extent)
        lanes.conditions.append(self.work.divides if self.along_columns else 0)
        stored = self.work.elements if self.along_columns else self.work.outputs
        found = [lanes.is_aligned(output.buffer, output.offset) for output in stored]
        return lanes if all(found) else None

    def passes(self, lanes: Lanes, turns: int | None, tag: str = "") -> list[Statement]:
        """All stages one after the other, then the outputs. What is needed again is kept in registers where the number
        of turns is given, else in shared memory; what has no place there is read again."""
        work, columns = self.work, [SLOT, *(axis.name for axis in self.work.columns)]
        results = {stage.result.name: replace(stage.result, size=self.width) for stage in work.stages}
        levels = work.levels
        bodies = [[stage.body for stage in level] for level in levels]
        last = [_by_reciprocals(output.value, output.buffer.dtype, columns) for output in work.elements]
        arrays: list[Statement] = []
        statements: list[Statement] = []
        for number, level in enumerate(levels):
            inner: list[Store] = []
            later = [value for values in bodies[number + 1 :] for value in values] + last
            for part in common_parts(bodies[number], later, columns) if turns is not None else ():
                array = Buffer(f"kept{len(arrays)}", part.dtype, (turns or 0) * lanes.count, "register")
                arrays.append(Alloc(array))
                inner.append(Store(array, symbol(SLOT), part))
                swap = s.Rewriter(partial(_swapped, part, s.load(array, symbol(SLOT))))
                bodies = [[swap(value) for value in values] for values in bodies]
                last = [swap(value) for value in last]
            for stage, body in zip(level, bodies[number], strict=True):
                total = results[stage.result.name]
                statements += self._begun(stage, total)
                inner.append(Store(total, self._lane, combined(stage.op, s.load(total, self._lane), body)))
            if number == 0 and turns is None:
                copies, bodies[1:], last = self._copied(lanes, bodies, last)
                arrays += [Alloc(copy.buffer) for copy in copies]
                inner = [*copies, *inner]
            statements += self._over_columns(inner, turns, lanes, results)
            registers = [(results[stage.result.name], stage.op) for stage in level]
            statements += self.combine(registers, f"partial{tag}{number}")
        stores = [Store(output.buffer, output.offset, value) for output, value in zip(work.elements, last, strict=True)]
        if stores:
            statements += self._over_columns(stores, turns, lanes, results)
        return [*arrays, *statements, *self._totals(lanes, results)]

    def _copied(
        self, lanes: Lanes, bodies: list[list[Scalar]], last: list[Scalar]
    ) -> tuple[list[Store], list[list[Scalar]], list[Scalar]]:
        """Stores that copy to shared memory what the first stages read and others read again, and those others: each
        thread reads what it wrote."""
        work, later = self.work, [*(value for values in bodies[1:] for value in values), *last]
        names = {axis.name for axis in work.columns}
        place = flat_offset([axis.index for axis in work.columns], [axis.extent for axis in work.columns])
        again = {node.digest for value in later for node in s.walk(value)}
        found = {node.digest: node for value in bodies[0] for node in s.walk(value) if isinstance(node, s.Load)}
        copies: list[Store] = []
        left = SHARED_BYTES
        for load in found.values():
            size = work.length * load.dtype.bytes
            wanted = load.digest in again and load.buffer.space == "parameter" and load.free & names
            if not wanted or not isinstance(size, int) or size > left or self.parts != self.threads:
                continue
            left -= size
            shared = Buffer(f"row{len(copies)}", load.dtype, work.length, "shared")
            copies.append(Store(shared, place, load))
            swap = s.Rewriter(partial(_swapped, load, s.load(shared, place)))
            bodies = [bodies[0], *([swap(value) for value in values] for values in bodies[1:])]
            last = [swap(value) for value in last]
        lanes.alignment = partial(_alignment, frozenset(copy.buffer.name for copy in copies), lanes.alignment)
        return copies, bodies[1:], last

    @property
    def _lane(self) -> Dim:
        """Which of its registers holds a total."""
        return 0 if self.width == 1 else symbol(LANE, 0, self.lanes - 1)

    def _begun(self, stage: Stage, total: Buffer) -> list[Statement]:
        identity = s.const(s.IDENTITY[stage.op](total.dtype), total.dtype)
        if self.width == 1:
            return [Define(total, identity)]
        return [Alloc(total), *self._per_lane([Store(total, self._lane, identity)])]

    def _per_lane(self, body: Sequence[Statement]) -> list[Statement]:
        """For each register of the totals."""
        return [For(LANE, self.width, tuple(body), "unrolled")] if self.width > 1 else list(body)

    def _with_totals(self, value: Scalar, results: dict[str, Buffer]) -> Scalar:
        """A value with the totals read where they lie."""

        def leaf(node: Scalar) -> Scalar | None:
            if isinstance(node, s.Load) and node.buffer.name in results:
                return s.load(results[node.buffer.name], self._lane)
            return None

        return s.Rewriter(leaf)(value)

    def _over_columns(
        self, stores: Sequence[Store], limit: int | None, lanes: Lanes, results: dict[str, Buffer]
    ) -> list[Statement]:
        """The stores for every column of a thread; those to memory are of all lanes at once."""
        work, turns = self.work, self.turns if limit is None else limit
        turn = k.index_symbol("turn", turns) if turns != 1 else 0
        share = self.parts * self.together
        body = self._stored(stores, lanes, results, turn)
        single = len(work.columns) == 1
        name = work.columns[0].name if single else "at"
        if not single:
            extents = [axis.extent for axis in work.columns]
            indices = unflatten(symbol("at", 0, work.length - 1), extents)
            body = [*(Let(axis.name, at) for axis, at in zip(work.columns, indices, strict=True)), *body]
        inside = TRUE if turns * share == work.length else s.binary("lt", s.index(symbol(name)), s.index(work.length))
        inside = inside if work.inside is None else s.binary("and", inside, work.inside)

        def at_turn(number: Dim, condition: Scalar) -> list[Statement]:
            return [Let(name, number * share + self.part * self.together), *where(condition, body)]

        if turns == 1:
            return at_turn(0, inside)
        many = not isinstance(turns, int) or turns > 2 * UNROLLED
        if limit is None and many and work.inside is None and inside != TRUE:
            # Whole turns ask nothing, so that loads of several can be in flight.
            whole = work.length // share
            return [For("turn", whole, tuple(at_turn(turn, TRUE))), *at_turn(whole, inside)]
        keeps = any(SLOT in st.value.free for st in stores)
        unrolled = limit is not None and (keeps or limit <= UNROLLED)
        return [For("turn", turns, tuple(at_turn(turn, inside)), "unrolled" if unrolled else "serial")]

    def _stored(self, stores: Sequence[Store], lanes: Lanes, results: dict[str, Buffer], turn: Dim) -> list[Statement]:
        """Stores to registers lane by lane, those to memory after that."""
        before, values = lanes.values([self._with_totals(store.value, results) for store in stores])
        kept = [replace(st, value=v) for st, v in zip(stores, values, strict=True) if st.buffer.space == "register"]
        made = [(st, v) for st, v in zip(stores, values, strict=True) if st.buffer.space != "register"]
        each = [lanes.each(kept)] if lanes.count > 1 and kept else kept
        after = lanes.outputs([(st.buffer, st.offset) for st, _ in made], [v for _, v in made], self.wanted)
        slot = s.Rewriter(dims={SLOT: turn * lanes.count + (lanes.lane if lanes.count > 1 else 0)})
        return [*before, *k.rebuild((*each, *after), slot)]

    def _totals(self, lanes: Lanes, results: dict[str, Buffer]) -> list[Statement]:
        """The outputs with an element per row, stored by the first part."""
        outputs = self.work.totals
        if not outputs:
            return []
        along = lanes if self.width > 1 else Lanes("", 1, self.work.indices, self.region.alignment, prefix="t")
        before, values = along.values([self._with_totals(output.value, results) for output in outputs])
        stores = along.outputs([(output.buffer, output.offset) for output in outputs], values)
        mine = TRUE if self.parts == 1 else s.binary("eq", s.index(self.part), s.const(0, I64))
        return where(mine if self.wanted is None else s.binary("and", mine, self.wanted), [*before, *stores])


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


def _by_reciprocals(value: Scalar, dtype: DType, columns: Sequence[str]) -> Scalar:
    """A half with what is divided by a number of the row multiplied by its reciprocal, which is formed once: f32 has
    digits to spare, and a division takes as long as all else of a softmax."""
    if dtype not in (F16, BF16):
        return value
    names = frozenset(columns)

    def leaf(node: Scalar) -> Scalar | None:
        if not (isinstance(node, s.Binary) and node.op == "div" and node.dtype == F32 and node.left.free & names):
            return None
        if node.right.free & names or isinstance(node.right, s.Const):
            return None
        return s.binary("mul", s.Rewriter(leaf)(node.left), s.binary("div", s.const(1.0, F32), node.right))

    return s.Rewriter(leaf)(value)


def _alignment(shared: frozenset[str], others: Callable[[str], int], name: str) -> int:
    return SHARED_ALIGNMENT if name in shared else others(name)


def _swapped(part: Scalar, by: Scalar, node: Scalar) -> Scalar | None:
    return by if node.digest == part.digest else None


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
