"""Products by weights of a few bits, with instructions that add four products of bytes.

The left operand is rounded to integers of one to three digits (`weight_only_rounding`): to 8 bits where the model asks
for no more (`accuracy_level` 4 of ONNX Runtime), to 16 where it or the type of the rows has no more than that, else to
24 bits, the precision of f32. Digits are multiplied one by one, sums of a run are exact, and they are scaled as sums of
reals are (`weight_only`).

Words of codes need a mask and a shift to be operands: byte b of a masked word is code b * (8 / bits) of its group. For
few rows that is done for every tile of them; for many, a part of a panel is taken apart once for all rows of a task,
and kept in the second-level cache, less its zero points (of codes of less than 8 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_min, product, symbol
from ....ir.dtypes import F32, I16, I32, U32
from ....ir.loops import Alias, Alloc, Define, For, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Region
from ...kernels.epilogue import Epilogue
from .epilogue import finish_tile
from .packing import Columns
from .product import flattened
from .register_tile import Tile, accumulators
from .weight_only_definition import Definition, last_lanes
from .weight_only_panels import PackedProduct, WeightPanels
from .weight_only_rounding import BASE, BYTES, RoundedRows
from .weight_only_tasks import each_tile, panel_tasks, row_tasks

PART_BYTES = 128 << 10
"""What a part of a panel that was taken apart may take of the stack, and (as a quarter) of the second-level cache."""
CHAINS = 12
"""Sums in flight of a tile of many rows. Measured on Zen 4: 12 are as fast as 24 for blocks of 128 codes, and 3 to 4 %
faster for blocks of 16."""
TASK_ROWS = 128
"""Rows of a task, at most: their sums are kept on the stack."""


BY_PAIRS = "dot2_u7_i8"
"""What adds two products of bytes, in i16: exact for codes of less than 8 bits, and so is the sum over a chunk."""


def instruction(bits: int, target: Target) -> str | None:
    """What multiplies codes by signed bytes and adds four products, or two; codes below 128 may be signed bytes too."""
    pairs = (
        (BY_PAIRS,) if target.has("avx2") or not target.has("avx") else ()
    )  # vectors of integers as wide as of reals
    names = ("dot4_u8_i8", *(("dot4_i8_i8", *pairs) if bits < 8 else ()))
    return next((name for name in names if name in target.dot_products), None)


def rows_at_once(vectors: int, digits: int, target: Target) -> int:
    """Rows of a tile whose sums have registers: those of a run for each digit, and those of runs before."""
    return max(1, _rows(vectors, digits, target))


def _rows(vectors: int, digits: int, target: Target) -> int:
    return (target.vector_registers - 2 * vectors - 2) // ((digits + 1) * vectors)


def many_rows_at_once(vectors: int, digits: int, target: Target) -> int:
    """Rows of a tile where weights have been taken apart: enough sums to hide their latency, and registers left for the
    scaling of one run beside the products of the next."""
    return min(rows_at_once(vectors, digits, target), -(-CHAINS // (digits * vectors)))


def digits_tile(rows: Dim, columns: int, digits: int, target: Target) -> Tile:
    """The tile for so many rows: wide for few of them."""
    lanes, vectors = target.lanes(32), 4
    while lanes >= 2 * max(columns, 2):
        lanes //= 2
    wanted = min(rows, 3) if isinstance(rows, int) else 3
    while vectors > 1 and (_rows(vectors, digits, target) < wanted or lanes * vectors >= 2 * columns):
        vectors //= 2
    most = rows_at_once(vectors, digits, target)
    return Tile(min(rows, most) if isinstance(rows, int) else most, vectors, lanes)


Weights: TypeAlias = Callable[[Dim, int], tuple[Sequence[Statement], Sequence[Scalar]]]
"""The vectors of bytes that go with word `number` of a chunk, and what must come before."""


Sums: TypeAlias = Callable[[int], tuple[Buffer, Dim]]


class DigitRows:
    """Makes the statements of a product whose left operand is rounded to digits of 8 bits."""

    def __init__(
        self,
        region: Region,
        found: PackedProduct,
        panels: WeightPanels,
        outputs: Epilogue,
        target: Target,
        digits: int,
        name: str,
    ) -> None:
        """`name` is that of the instruction."""
        self.region, self.found, self.panels, self.outputs, self.target = region, found, panels, outputs, target
        self.rows: Dim = product(axis.extent for axis in found.rows)
        self.masked, self.digits, self.name = target.has("avx512vl"), digits, name
        middle = 1 << (found.bits - 1)
        self.moved = found.zeros is not None and found.bits < 8 and found.zeros.dtype.kind != "f"
        self.left = RoundedRows(
            region, found, digits, middle if found.zeros is None else 2 * middle if self.moved else None
        )
        self.definition = Definition(found, panels, outputs, self.masked)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return self.left.buffers

    def _named(self, row: Dim) -> Iterator[Statement]:
        """Names what belongs to rows from one on."""
        left, view = self.left, Buffer("words", U32)
        yield Alias(view, left.bytes, 0)
        yield Alias(Buffer("rows_words", U32), view, left.word(row, 0, 0, 0))
        runs = row * left.row_runs
        yield Alias(Buffer("rows_scales", F32), left.scales, row * left.stretches)
        if left.starts in left.buffers:
            yield Alias(Buffer("rows_starts", I32), left.starts, runs * left.parts)
        if left.totals in left.buffers:
            yield Alias(Buffer("rows_totals", F32), left.totals, runs)

    def _stretch(
        self, tile: Tile, columns: Columns, stretch: Dim, weights: Weights, starts: bool, sums: Sums
    ) -> Iterator[Statement]:
        """Adds the products of a stretch to the sums of a tile, of which `sums(number)` tells where each is. With
        `starts` all codes have one zero point."""
        left, lanes, count = self.left, tile.lanes, tile.rows * tile.vectors
        near = Buffer("near", F32, count, "register", lanes)
        yield Alloc(near)
        yield from (Store(near, number, s.const(0, F32, lanes)) for number in range(count))
        runs: Dim = left.each
        if left.runs % left.each:
            yield Let("stretch_runs", dim_min(left.each, left.runs - stretch * left.each))
            runs = symbol("stretch_runs", 1, left.each)
        run = stretch * left.each + k.index_symbol("run", runs)
        yield For("run", runs, tuple(self._run(tile, columns, run, weights, starts, near)))
        for i in range(tile.rows):
            own = s.widen(s.load(Buffer("rows_scales", F32), i * left.stretches + stretch), lanes)
            for number in range(i * tile.vectors, (i + 1) * tile.vectors):
                buffer, at = sums(number)
                yield Store(buffer, at, s.fma(own, s.load(near, number, lanes), s.load(buffer, at, lanes)))

    def _run(
        self, tile: Tile, columns: Columns, run: Dim, weights: Weights, starts: bool, near: Buffer
    ) -> Iterator[Statement]:
        """Adds the products of a run to the sums of a stretch."""
        left, lanes, digits, rows = self.left, tile.lanes, self.digits, tile.rows
        part = Buffer("part", I32, rows * tile.vectors * digits, "register", lanes)
        words, first = Buffer("rows_words", U32), Buffer("rows_starts", I32)
        yield Alloc(part)
        for i in range(rows):
            for digit in range(digits):
                start: Scalar = s.const(0, I32, lanes)
                if starts and digit < left.parts:
                    start = s.widen(s.load(first, (i * left.row_runs + run) * left.parts + digit), lanes)
                for v in range(tile.vectors):
                    yield Store(part, (digit * rows + i) * tile.vectors + v, start)
        chunks = self.found.run // left.chunk
        chunk = run * chunks + k.index_symbol("chunk", chunks)
        steps: list[Statement] = []
        numbers = range(left.chunk // BYTES)
        codes: list[Sequence[Scalar]] = []

        def value(number: int, i: int, digit: int) -> Scalar:
            held = Buffer(f"a{number}_{i}_{digit}", U32, 1, "register", lanes)
            steps.append(Define(held, s.widen(s.load(words, left.word(i, chunk, digit, number)), lanes)))
            return s.load(held, 0, lanes)

        for number in numbers:
            before, here = weights(chunk, number)
            steps += before
            codes.append(here)
            if self.name == BY_PAIRS:
                continue
            for i in range(rows):
                for digit in range(digits):
                    factor = value(number, i, digit)
                    for v, code in enumerate(here):
                        at = (digit * rows + i) * tile.vectors + v
                        total = s.Call(I32, lanes, self.name, (s.load(part, at, lanes), code, factor))
                        steps.append(Store(part, at, total))
        for i in range(rows if self.name == BY_PAIRS else 0):
            for digit in range(digits):
                factors = [value(number, i, digit) for number in numbers]
                for v in range(tile.vectors):
                    at = (digit * rows + i) * tile.vectors + v
                    pairs: Scalar = s.const(0, I16, 2 * lanes)
                    for number in numbers:
                        pairs = s.Call(I16, 2 * lanes, self.name, (pairs, codes[number][v], factors[number]))
                    added = s.Bitcast(U32, lanes, pairs), s.const(0x00010001, U32, lanes)
                    steps.append(Store(part, at, s.Call(I32, lanes, "dot2_i16_i16", (s.load(part, at, lanes), *added))))
        yield For("chunk", chunks, tuple(steps))
        block = run * self.found.run // self.found.block
        for v in range(tile.vectors):
            scale, zero = (Buffer(f"{name}{v}", F32, 1, "register", lanes) for name in ("scale", "zero"))
            yield Define(scale, self.panels.scale(columns, block, v))
            if not starts:
                yield Define(zero, self.panels.full_zero(columns, block, v))
            for i in range(rows):
                joined = self._joined([s.load(part, (d * rows + i) * tile.vectors + v, lanes) for d in range(digits)])
                if not starts:
                    row_sum = s.widen(s.load(Buffer("rows_totals", F32), i * left.row_runs + run), lanes)
                    joined = s.fma(s.load(zero, 0, lanes), row_sum, joined)
                at = i * tile.vectors + v
                yield Store(near, at, s.fma(s.load(scale, 0, lanes), joined, s.load(near, at, lanes)))

    def _joined(self, digits: Sequence[Scalar]) -> Scalar:
        """Sums of digits, the lowest first, as one number: as an integer while that is sure to have 31 bits."""
        lanes, found, left = digits[0].lanes, self.found, self.left
        code = (1 << found.bits) - 1 if found.zeros is not None else 1 << (found.bits - 1)
        whole = code * found.run * left.greatest < 1 << 31
        high = digits[-1]
        for digit in reversed(digits[:-1] if whole or len(digits) < 3 else digits[1:-1]):
            high = high * s.const(BASE, I32, lanes) + digit
        result = s.cast(high, F32)
        if whole or len(digits) < 3:
            return result
        return s.fma(result, s.const(float(BASE), F32, lanes), s.cast(digits[0], F32))

    def _finish(self, tile: Tile, columns: Columns, row: Dim, column: Dim) -> list[Statement]:
        return finish_tile(
            self.outputs,
            tile,
            F32,
            lambda i: flattened(self.found.rows, row + i),
            column,
            last_lanes(columns, tile.lanes),
            self.masked,
        )

    def _apart(self, words: Sequence[Buffer], place: int) -> list[Scalar]:
        """The codes of a place as bytes."""
        bits, lanes = self.found.bits, self.panels.lanes
        mask = sum(((1 << bits) - 1) << (8 * byte) for byte in range(BYTES))
        found = []
        for word in words:
            shifted = s.load(word, 0, lanes)
            if place:
                shifted = s.binary("shr", shifted, s.const(place * bits, U32, lanes))
            found.append(shifted & s.const(mask, U32, lanes) if bits < 8 else shifted)
        return found

    # Few rows

    def few(self) -> Iterator[Statement]:
        """A task for each panel."""

        def most(columns: Columns) -> int:
            return rows_at_once(columns.vectors, self.digits, self.target)

        yield from panel_tasks(self.panels, self.rows, most, self._few_tile, self.definition, self.left.tops)

    def _few_tile(self, rows: int, columns: Columns, column: Dim, row: Dim) -> Iterator[Statement]:
        """`rows` rows of a panel: runs one after the other, scaled into the sums."""
        tile, lanes, found = Tile(rows, columns.vectors, self.panels.lanes), self.panels.lanes, self.found
        sums, stretch = accumulators(tile, F32), k.index_symbol("stretch", self.left.stretches)
        yield from self._named(row)
        yield Alloc(sums)
        yield from (Store(sums, number, s.const(0, F32, lanes)) for number in range(rows * tile.vectors))
        each, words = 8 // found.bits, [Buffer(f"word{v}", U32, 1, "register", lanes) for v in range(tile.vectors)]

        def weights(chunk: Dim, number: int) -> tuple[Sequence[Statement], Sequence[Scalar]]:
            here, place = divmod(number, each)
            group = chunk * (self.left.chunk // found.group) + here
            before: list[Statement] = []
            if not place:
                before += (Define(word, self.panels.word(columns, group, v)) for v, word in enumerate(words))
            codes = [Buffer(f"codes{number}_{v}", U32, 1, "register", lanes) for v in range(tile.vectors)]
            before += (Define(code, value) for code, value in zip(codes, self._apart(words, place), strict=True))
            return before, [s.load(code, 0, lanes) for code in codes]

        starts = found.zeros is None
        inner = self._stretch(tile, columns, stretch, weights, starts, lambda number: (sums, number))
        yield For("stretch", self.left.stretches, tuple(inner))
        yield from self._finish(tile, columns, row, column)

    # Many rows

    def many(self) -> Iterator[Statement]:
        """A task for each panel and block of rows."""
        left, tile = self.left, self.panels.panels.tile
        stretch = left.each * self.found.run
        room = min(PART_BYTES, self.target.l2_bytes // 4) // (stretch * tile.width)
        part = left.stretches if self.found.bits == 8 else max(1, min(left.stretches, room))
        apart = Buffer("apart", U32, part * stretch // BYTES * tile.width, "stack")
        size = many_rows_at_once(tile.vectors, self.digits, self.target)
        most = -(-TASK_ROWS // size) * size
        if isinstance(self.rows, int):
            size = min(size, self.rows)
            most = min(most, -(-self.rows // size) * size)
        kept = Buffer("kept_sums", F32, most * tile.width, "stack")

        def panel(columns: Columns, first: Dim, rows: Dim, column: Dim) -> Iterator[Statement]:
            usual = self._many_panel(columns, first, rows, column, size, part, apart, kept)
            yield from self.panels.aliases(column)
            yield from self.definition.unless_finite(left.tops, first, rows, columns, column, tuple(usual))

        allocated = [Alloc(kept), *([Alloc(apart)] if self.found.bits < 8 else [])]
        yield row_tasks(self.panels, self.rows, most, allocated, panel)

    def _many_panel(
        self,
        columns: Columns,
        first: Dim,
        rows: Dim,
        column: Dim,
        size: int,
        part: int,
        apart: Buffer,
        kept: Buffer,
    ) -> Iterator[Statement]:
        """Tiles of `size` rows of a panel, `part` stretches at a time."""
        left, lanes, vectors = self.left, self.panels.lanes, columns.vectors
        parts = -(-left.stretches // part)
        begin = symbol("part", 0, parts - 1) * part
        clear = Store(kept, k.index_symbol("kept", rows * vectors) * lanes, s.const(0, F32, lanes))
        yield For("kept", rows * vectors, (clear,))
        inner: list[Statement] = []
        count: Dim = part
        if left.stretches % part:
            inner.append(Let("part_stretches", dim_min(part, left.stretches - begin)))
            count = symbol("part_stretches", 1, part)
        if self.found.bits < 8:
            runs = (
                count * left.each
                if left.runs % left.each == 0
                else dim_min(count * left.each, left.runs - begin * left.each)
            )
            inner.append(Let("part_runs", runs))
            run = k.index_symbol("run", symbol("part_runs", 1, part * left.each))
            inner.append(
                For(
                    "run",
                    symbol("part_runs", 1, part * left.each),
                    tuple(self._take_apart(columns, begin * left.each, run, apart)),
                )
            )
        words = left.each * self.found.run // BYTES

        def weights(chunk: Dim, number: int) -> tuple[Sequence[Statement], Sequence[Scalar]]:
            at = chunk * (left.chunk // BYTES) + number
            codes = [Buffer(f"codes{number}_{v}", U32, 1, "register", lanes) for v in range(vectors)]
            if self.found.bits < 8:
                values = [s.load(apart, ((at - begin * words) * vectors + v) * lanes, lanes) for v in range(vectors)]
            else:
                values = [self.panels.word(columns, at, v) for v in range(vectors)]
            before = [Define(code, value) for code, value in zip(codes, values, strict=True)]
            return before, [s.load(code, 0, lanes) for code in codes]

        def tile(rows_here: int, at: Dim) -> Iterator[Statement]:
            sums = Buffer("tile_sums", F32)
            yield Alias(sums, kept, at * vectors * lanes)
            yield from self._named(first + at)
            whole, stretch = Tile(rows_here, vectors, lanes), begin + k.index_symbol("stretch", count)
            starts = left.zero is not None
            statements = self._stretch(whole, columns, stretch, weights, starts, lambda number: (sums, number * lanes))
            yield For("stretch", count, tuple(statements))

        def finished(rows_here: int, at: Dim) -> Iterator[Statement]:
            whole = Tile(rows_here, vectors, lanes)
            sums = accumulators(whole, F32)
            yield Alloc(sums)
            for number in range(rows_here * vectors):
                yield Store(sums, number, s.load(kept, (at * vectors + number) * lanes, lanes))
            yield from self._finish(whole, columns, first + at, column)

        inner += each_tile(self.rows, rows, size, tile)
        yield For("part", parts, tuple(inner))
        yield from each_tile(self.rows, rows, size, finished)

    def _take_apart(self, columns: Columns, first: Dim, run: Dim, into: Buffer) -> Iterator[Statement]:
        """Bytes of the codes of a run, [word][column]: less their zero points where there are several."""
        found, lanes, vectors, each = self.found, self.panels.lanes, columns.vectors, 8 // self.found.bits
        groups = found.run // found.group
        group = k.index_symbol("group", groups)
        block = (first + run) * found.run // found.block
        more = [Buffer(f"more{v}", U32, 1, "register", lanes) for v in range(vectors)]
        words = [Buffer(f"word{v}", U32, 1, "register", lanes) for v in range(vectors)]
        if self.moved:
            full, ones = s.const(1 << found.bits, U32, lanes), s.const(0x01010101, U32, lanes)
            for v in range(vectors):
                yield Define(more[v], (full - self.panels.zero_codes(columns, block, v)) * ones)
        step: list[Statement] = [
            Define(word, self.panels.word(columns, (first + run) * groups + group, v)) for v, word in enumerate(words)
        ]
        for place in range(each):
            for v, codes in enumerate(self._apart(words, place)):
                value = codes + s.load(more[v], 0, lanes) if self.moved else codes
                at = (run * groups + group) * each + place
                step.append(Store(into, (at * vectors + v) * lanes, value))
        yield For("group", groups, tuple(step))
