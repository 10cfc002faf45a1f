"""Products by weights of a few bits, which stay packed in memory and are unpacked in registers.

Few rows are a stream of weights: a vector of words is unpacked once for all rows of a tile, and what a block of codes
gives is scaled once. Codes are taken where they stand in a word, that is times a power of two, which a copy of the left
operand is less; and zero points are subtracted by sums of that operand's blocks: sum a * (code - zero) = sum a * code -
zero * sum a. So a vector of weights takes a mask, a conversion and a multiply-add. Many rows unpack a part of a panel
to memory that stays in the cache (`weight_only_gemm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_min, product, symbol
from ....ir.dtypes import BF16, F16, F32, I32
from ....ir.loops import Alias, Alloc, Define, For, If, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, accumulator_leaf, anchor_indices, epilogue, through_memory
from ...kernels.operands import affine, copied, joined
from .epilogue import finish_tile
from .packing import Columns
from .product import flattened
from .register_tile import Tile, accumulators, choose_tile
from .weight_only_definition import Definition, last_lanes, magnitude_bits
from .weight_only_digits import BY_PAIRS, DigitRows, digits_tile, instruction
from .weight_only_gemm import ManyRows
from .weight_only_panels import STEP, PackedProduct, WeightPanels, packed_product
from .weight_only_tasks import panel_tasks

FEW_ROWS = 8
"""Rows up to which weights are unpacked for each tile of rows."""
LEVEL_DIGITS = {2: 2, 3: 2, 4: 1}
"""Digits of 8 bits by the accuracy level of ONNX Runtime, which allows to round the left operand: to f16, bf16, i8."""
DIGITS, NARROW_DIGITS = 3, 2
"""Digits of the precision of f32, and for rows of f16 and bf16: two of a run's greatest magnitude err, over the run, by
less than those types do."""
DIGIT_ROWS = 8
"""Rows up to which bytes are masked out of words for each tile of rows."""
PART_DEPTH = 512
"""About how much of the depth is unpacked at a time for many rows."""
MOST_OPEN = 2
"""Vectors of a panel where only the run tells how many rows there are: one width for few of them and for many."""
MOST_VECTORS = 4
"""Vectors of a panel for few rows: as many streams of words."""
MASKS = 4
"""Registers for masks and what else a loop holds."""
CHAINS = 4
"""Sums in flight for each multiply-add of a cycle, whose latency is four."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a product by packed weights; None where its weights are no constants or of an odd layout."""
    first = region.operands[0]
    if first is not None and first.kind != "opaque" and affine(first) is None:
        changed, copies = copied(region, [0])
        return joined(copies, schedule(changed, target))
    found = packed_product(region)
    if found is None or region.anchor_output is None:
        return None
    shape = region.anchor_output.shape
    indices = anchor_indices(shape)
    element = s.cast(accumulator_leaf(F32, indices[-1]), region.anchor_output.dtype)
    outputs = epilogue(region, indices, shape, element, found.column, F32)
    if outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    rows = product(axis.extent for axis in found.rows)
    digits = digits_of(found, target)
    if digits is not None:
        tile = digits_tile(rows, found.columns, digits[0], target)
    elif isinstance(rows, int) and rows <= FEW_ROWS:
        tile = few_rows_tile(rows, found.columns, target)
    else:
        tile = choose_tile(rows, found.columns, min(found.depth, PART_DEPTH), F32, target)
        tile = replace(tile, vectors=min(tile.vectors, MOST_OPEN)) if not isinstance(rows, int) else tile
    panels = WeightPanels(found, tile, target)
    if digits is not None:
        return _by_digits(rows, DigitRows(region, found, panels, outputs, target, *digits))
    name = f"w{found.bits}_gemm_{tile}"
    few = FewRows(region, found, panels, outputs, target, None if isinstance(rows, int) else FEW_ROWS)
    many = ManyRows(region, found, panels, outputs, target)
    if isinstance(rows, int) and rows > FEW_ROWS:
        made = call(region, name, many.body(), panels.buffers, shared=True)
        return Lowered((made,), (), panels.packed())
    body = few.body() if isinstance(rows, int) else _either(rows, FEW_ROWS, few.body(), many.body())
    constants = few.packed()
    made = call(region, name, body, (*panels.buffers, *few.buffers), shared=True)
    workspaces = tuple(buffer for buffer in few.buffers if buffer.name not in constants)
    return Lowered((few.prepared(), made), workspaces, {**panels.packed(), **constants})


def _by_digits(rows: Dim, made: DigitRows) -> Lowered:
    """The kernels of a product whose rows are rounded."""
    buffers = (*made.panels.buffers, *made.buffers)
    if isinstance(rows, int):
        body = made.few() if rows <= DIGIT_ROWS else made.many()
    else:
        body = _either(rows, DIGIT_ROWS, made.few(), made.many())
    name = f"w{made.found.bits}a{8 * made.digits}_gemm_{made.panels.panels.tile}"
    multiply = call(made.region, name, body, buffers, shared=True)
    return Lowered((made.left.prepared(), multiply), made.buffers, made.panels.packed())


def digits_of(found: PackedProduct, target: Target) -> tuple[int, str] | None:
    """The digits that rows are rounded to, and the instruction that multiplies them; None where reals are better."""
    name = instruction(found.bits, target)
    if name is None or (found.zeros is not None and found.zeros.dtype.kind == "f"):
        return None
    narrow = found.left.buffer.dtype in (F16, BF16)
    digits = LEVEL_DIGITS.get(found.accuracy_level, NARROW_DIGITS if narrow else DIGITS)
    return (digits, name) if digits == 1 or (target.strassen and name != BY_PAIRS) else None


def _either(rows: Dim, most: int, few: Iterable[Statement], many: Iterable[Statement]) -> Iterator[Statement]:
    """Few rows or many, as the run tells."""
    yield If(s.index(rows) <= s.index(most), tuple(few), tuple(many))


def few_rows_tile(rows: int, columns: int, target: Target) -> Tile:
    """The tile for so many rows: one row by many vectors, or several rows by two."""
    lanes = target.lanes(32)
    while lanes >= 2 * max(columns, 2):
        lanes //= 2
    vectors = MOST_VECTORS if rows == 1 and target.fma else 2
    while vectors > 1 and lanes * vectors >= 2 * columns:
        vectors //= 2
    return Tile(max(1, min(rows, rows_at_once(vectors, target))), vectors, lanes)


def rows_at_once(vectors: int, target: Target) -> int:
    """Rows whose sums of a block have registers beside words, weights and a mask; sums in all may be in memory."""
    beside = 2 if target.fma else 5  # products that are added by another instruction are there in copies
    return max(1, min(FEW_ROWS, (target.vector_registers - 2 * vectors - beside) // vectors))


class FewRows:
    """Makes the statements for few rows: every panel of weights is read once for a tile of rows."""

    def __init__(
        self,
        region: Region,
        found: PackedProduct,
        panels: WeightPanels,
        outputs: Epilogue,
        target: Target,
        most: int | None = None,
    ) -> None:
        """Where only the run tells how many rows there are, and there are more than `most`, nothing is to be done."""
        self.region, self.found, self.panels, self.outputs, self.target = region, found, panels, outputs, target
        self.rows: Dim = product(axis.extent for axis in found.rows)
        self.masked, self.most = target.has("avx512vl"), most
        self.depth = -(-found.padded // STEP) * STEP
        few = self.rows if most is None else dim_min(self.rows, most)
        self.left = Buffer("left_scaled", F32, few * self.depth)
        self.runs = found.padded // found.run
        self.totals = Buffer("left_sums", F32, few * self.runs)
        self.factors = Buffer("left_factors", F32, STEP)
        self.tops = Buffer("left_tops", I32, few)
        self.definition = Definition(found, panels, outputs, self.masked)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return (self.left, self.totals, self.factors, self.tops)

    def packed(self) -> dict[str, Callable[[], np.ndarray]]:
        """What makes constants that the kernels read beside the weights: by what neighbours along the depth are
        multiplied."""
        weights = [self.panels.weight_of(place % self.found.group) for place in range(STEP)]
        return {self.factors.name: lambda: np.array([1 / weight for weight in weights], np.float32)}

    def prepared(self) -> Call:
        """Copies the left operand, each element less by its code's place, and sums its blocks."""
        found = self.found
        row, step = k.index_symbol("row", self.rows), k.index_symbol("step", self.depth // STEP)
        lane, run, at = k.index_symbol("lane", STEP), k.index_symbol("run", self.runs), symbol("at", 0)
        where = flattened(found.rows, row)
        start = found.left.start + sum((where[axis.name] * axis.left for axis in found.rows), 0)

        def element(place: Dim, exists: bool) -> Scalar:
            value = s.cast(s.load(found.left.buffer, start + place * found.left.strides[-1]), F32)
            inside = s.index(place) < s.index(found.depth)
            return value if exists else s.select(inside, value, s.const(0, F32))

        full = found.depth // STEP
        place = step * STEP + lane

        def scaled(position: Dim, exists: bool) -> Statement:
            value = element(position, exists) * s.load(self.factors, lane)
            return For("lane", STEP, (Store(self.left, row * self.depth + position, value),), "vector")

        statements: list[Statement] = [For("step", full, (scaled(place, True),))]
        rest = k.index_symbol("rest", self.depth // STEP - full)
        statements.append(For("rest", self.depth // STEP - full, (scaled((full + rest) * STEP + lane, False),)))
        total = Buffer("total", F32, 1, "register")

        def summed(first: Dim, count: int, into: Dim) -> tuple[Statement, ...]:
            added = s.load(total, 0) + element(first + at, True)
            inner = For("at", count, (Store(total, 0, added),), "vector")
            return Define(total, s.const(0, F32)), inner, Store(self.totals, into, s.load(total, 0))

        whole, last = divmod(found.depth, found.run)
        place = row * self.runs
        statements.append(For("run", whole, summed(run * found.run, found.run, place + run)))
        if last:
            statements.append(For("last", 1, summed(whole * found.run, last, place + whole)))
        empty = whole + bool(last) + k.index_symbol("empty", self.runs)
        clear = Store(self.totals, place + empty, s.const(0, F32))
        statements.append(For("empty", self.runs - whole - bool(last), (clear,)))
        top = Buffer("top", I32, 1, "register")
        higher = s.binary("max", s.load(top, 0), magnitude_bits(element(at, True)))
        statements.append(Define(top, s.const(0, I32)))
        statements.append(For("at", found.depth, (Store(top, 0, higher),), "vector"))
        statements.append(Store(self.tops, row, s.load(top, 0)))
        body: tuple[Statement, ...] = (For("row", self.rows, tuple(statements), "parallel"),)
        if self.most is not None:
            body = (If(s.index(self.rows) <= s.index(self.most), body),)
        return call(self.region, f"w{found.bits}_left", body, self.buffers)

    def body(self) -> Iterator[Statement]:
        """A task for each panel."""

        def most(columns: Columns) -> int:
            return max(1, min(rows_at_once(columns.vectors, self.target), FEW_ROWS))

        yield from panel_tasks(self.panels, self.rows, most, self._tile, self.definition, self.tops)

    def _tile(self, rows: int, columns: Columns, column: Dim, row: Dim) -> Iterator[Statement]:
        """`rows` rows of a panel: blocks one after the other, scaled into the sums."""
        found, tile = self.found, Tile(rows, columns.vectors, self.panels.lanes)
        left, totals = Buffer("rows_left", F32), Buffer("rows_sums", F32)
        yield Alias(left, self.left, row * self.depth)
        yield Alias(totals, self.totals, row * self.runs)
        sums = accumulators(tile, F32)
        count = rows * tile.vectors
        sets = max(1, min(found.group, -(-CHAINS * self.target.multiply_adds // count)))
        while sets > 1 and (sets + 1) * count + 2 * tile.vectors + MASKS > self.target.vector_registers:
            sets //= 2
        sets = 1 << (sets.bit_length() - 1)
        part = Buffer("part", F32, count * sets, "register", tile.lanes)
        clear = s.const(0, F32, tile.lanes)
        yield Alloc(sums)
        yield from (Store(sums, number, clear) for number in range(count))
        run = k.index_symbol("run", self.runs)
        block = run * found.run // found.block
        each = found.run // found.group
        group = k.index_symbol("group", each)
        inner: list[Statement] = [Alloc(part), *(Store(part, number, clear) for number in range(count * sets))]
        inner.append(For("group", each, tuple(self._group(tile, columns, part, sets, left, run * each + group))))
        for v in range(tile.vectors):
            zero, scale = (Buffer(f"{name}{v}", F32, 1, "register", tile.lanes) for name in ("zero", "scale"))
            zeros = self.panels.zero(columns, block, v)
            inner.append(Define(scale, self.panels.scale(columns, block, v)))
            if zeros is not None:
                inner.append(Define(zero, zeros))
            for i in range(rows):
                number = i * tile.vectors + v
                total = s.load(part, number, tile.lanes)
                for copy in range(1, sets):
                    total = total + s.load(part, copy * count + number, tile.lanes)
                if zeros is not None:
                    row_sum = -s.load(totals, i * self.runs + run)
                    total = s.fma(s.load(zero, 0, tile.lanes), s.widen(row_sum, tile.lanes), total)
                inner.append(
                    Store(sums, number, s.fma(s.load(scale, 0, tile.lanes), total, s.load(sums, number, tile.lanes)))
                )
        yield For("run", self.runs, tuple(inner))
        yield from finish_tile(
            self.outputs,
            tile,
            F32,
            lambda i: flattened(found.rows, row + i),
            column,
            last_lanes(columns, tile.lanes),
            self.masked,
        )

    def _group(
        self, tile: Tile, columns: Columns, part: Buffer, sets: int, left: Buffer, group: Dim
    ) -> Iterator[Statement]:
        """The codes of a vector of words: each place by all rows."""
        found, lanes, count = self.found, tile.lanes, tile.rows * tile.vectors
        words = [Buffer(f"word{v}", self.panels.words.dtype, 1, "register", lanes) for v in range(tile.vectors)]
        for v, word in enumerate(words):
            yield Define(word, self.panels.word(columns, group, v))
        for place in range(found.group):
            weights: Sequence[Buffer] = [
                Buffer(f"weight{place}_{v}", F32, 1, "register", lanes) for v in range(tile.vectors)
            ]
            for v, weight in enumerate(weights):
                yield Define(weight, self.panels.code(s.load(words[v], 0, lanes), place))
            for i in range(tile.rows):
                value = Buffer(f"a{place}_{i}", F32, 1, "register", lanes)
                at = i * self.depth + group * found.group + place
                yield Define(value, s.widen(s.load(left, at), lanes))
                for v, weight in enumerate(weights):
                    number = place % sets * count + i * tile.vectors + v
                    a, b = s.load(value, 0, lanes), s.load(weight, 0, lanes)
                    yield Store(part, number, s.fma(a, b, s.load(part, number, lanes)))
