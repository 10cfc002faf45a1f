"""The passes over the columns of rows (see `stages`), however these are dealt out to threads.

A thread keeps in registers what later stages need again, the columns it has seen or what was made of them; where rows
are too long for that, in shared memory, or it reads them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, symbol
from ....ir.dtypes import BF16, BOOL, F16, F32, I64, DType
from ....ir.loops import Alloc, Define, For, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import flat_offset, unflatten
from ....passes.nests import combined
from ....passes.regions import Region
from ....passes.threads import THREAD
from ..launch import SHARED_ALIGNMENT
from .groups import where
from .lanes import LANE, Lanes
from .stages import Stage, Work, common_parts

SHARED_BYTES = 96 << 10
"""Shared memory that keeps what registers do not: what every GPU gives a block that asks for it."""
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
