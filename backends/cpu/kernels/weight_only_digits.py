"""Few rows by weights of a few bits, with instructions that add four products of bytes.

The left operand is rounded to integers, a run of neighbours along the depth by its greatest magnitude: to 8 bits where
the model asks for no more (`accuracy_level` 4 of ONNX Runtime), else to 24 bits, the precision of f32, as three digits
of 8 bits that are multiplied one by one. Sums of a run are exact; they are scaled as sums of reals are
(`weight_only`). Words need a mask and a shift to be operands: byte b of a masked word is code b * (8 / bits) of its
group, and the left operand's bytes are put in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_min, product, symbol
from ....ir.dtypes import F32, I8, I32, U32
from ....ir.loops import Alias, Alloc, Define, For, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Call, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue
from .epilogue import finish_tile
from .packing import Columns
from .product import flattened
from .register_tile import Tile, accumulators
from .weight_only_panels import PackedProduct, WeightPanels, panel_tasks

BASE = 256
"""Of digits, which are -128 to 127."""
LEAST = 1e-30
"""Magnitudes below count as 0: the quotient that makes integers of them would be infinite."""
BYTES = 4
"""Codes that one lane of an instruction multiplies."""


def instruction(bits: int, target: Target) -> str | None:
    """What multiplies codes by signed bytes and adds four products; codes below 128 may be signed bytes too."""
    names = ("dot4_u8_i8", *(("dot4_i8_i8",) if bits < 8 else ()))
    return next((name for name in names if name in target.dot_products), None)


def rows_at_once(vectors: int, digits: int, target: Target) -> int:
    """Rows of a tile whose sums, of a run for each digit and in all, have registers."""
    return (target.vector_registers - 2 * vectors - 2) // ((digits + 1) * vectors)


def digits_tile(rows: Dim, columns: int, digits: int, target: Target) -> Tile:
    """The tile for so many rows: wide for few of them."""
    lanes, vectors = target.lanes(32), 4
    while lanes >= 2 * max(columns, 2):
        lanes //= 2
    wanted = min(rows, 3) if isinstance(rows, int) else 3
    while vectors > 1 and (rows_at_once(vectors, digits, target) < wanted or lanes * vectors >= 2 * columns):
        vectors //= 2
    most = max(1, rows_at_once(vectors, digits, target))
    return Tile(min(rows, most) if isinstance(rows, int) else most, vectors, lanes)


class DigitRows:
    """Makes the statements of a product whose left operand is rounded to `digits` of 8 bits."""

    def __init__(
        self,
        region: Region,
        found: PackedProduct,
        panels: WeightPanels,
        outputs: Epilogue,
        target: Target,
        digits: int,
        name: str,
        most: int | None = None,
    ) -> None:
        """`name` is that of the instruction. Where only the run tells how many rows there are, and there are more than
        `most`, nothing is to be done."""
        self.region, self.found, self.panels, self.outputs, self.target = region, found, panels, outputs, target
        self.rows: Dim = product(axis.extent for axis in found.rows)
        self.masked, self.digits, self.name = target.has("avx512vl"), digits, name
        self.runs = found.padded // found.run
        self.most = most
        room = self.rows if most is None else dim_min(self.rows, most)
        self.left = Buffer("left_digits", I8, room * digits * found.padded)
        self.scales = Buffer("left_scales", F32, room * self.runs)
        self.sums = Buffer("left_sums", I32, room * self.runs * digits)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        return (self.left, self.scales, self.sums)

    def packed(self) -> dict[str, Callable[[], np.ndarray]]:
        """What makes constants that the kernels read beside the weights."""
        return {}

    @property
    def whole_zero(self) -> int | None:
        """The zero point that all codes have; None where they have several."""
        return (1 << (self.found.bits - 1)) if self.found.zeros is None else None

    # The left operand: [row][digit][depth], scales [row][run], sums [row][run][digit]

    def prepared(self) -> Call:
        """Rounds the left operand, a run at a time, and sums its digits."""
        found, row = self.found, k.index_symbol("row", self.rows)
        run = k.index_symbol("run", self.runs)
        whole = found.depth // found.run
        statements: list[Statement] = [For("run", whole, tuple(self._rounded(row, run, found.run)))]
        if whole < self.runs:
            last = found.depth - whole * found.run
            statements.append(For("last", 1, tuple(self._rounded(row, whole, last))))
        empty = whole + 1 + k.index_symbol("run", self.runs)
        statements.append(For("run", max(0, self.runs - whole - 1), tuple(self._rounded(row, empty, 0))))
        body: tuple[Statement, ...] = (For("row", self.rows, tuple(statements), "parallel"),)
        if self.most is not None:
            body = (k.If(s.index(self.rows) <= s.index(self.most), body),)
        return call(self.region, f"w{found.bits}_round{8 * self.digits}", body, self.buffers)

    def _rounded(self, row: Dim, run: Dim, count: int) -> Iterator[Statement]:
        """A run of a row, of which `count` elements exist."""
        found, at, size = self.found, symbol("at", 0), self.found.run
        where = flattened(found.rows, row)
        start = found.left.start + sum((where[axis.name] * axis.left for axis in found.rows), 0)
        value = s.cast(s.load(found.left.buffer, start + (run * size + at) * found.left.strides[-1]), F32)
        top, inverse, held = (Buffer(name, F32, 1, "register") for name in ("top", "inverse", "held"))
        number = Buffer("number", I32, 1, "register")
        integers = Buffer("integers", I32, size, "stack")
        greatest = float(sum(127 * BASE**digit for digit in range(self.digits)))
        zero = s.const(0, F32)
        yield Define(top, zero)
        yield Alloc(integers)
        larger = s.binary("max", s.load(top, 0), s.unary("abs", value))
        yield For("at", count, (Store(top, 0, larger),), "vector")
        # What is no number, or infinite, makes the scale such: the digits may be anything.
        usable = (s.const(LEAST, F32) < s.load(top, 0)) & (s.load(top, 0) < s.const(float("inf"), F32))
        yield Define(inverse, s.select(usable, s.const(greatest, F32) / s.load(top, 0), zero))
        yield Store(self.scales, row * self.runs + run, s.load(top, 0) / greatest)
        scaled = s.unary("round", value * s.load(inverse, 0))
        most, least = s.const(greatest, F32), s.const(-greatest, F32)
        limited = s.binary("max", s.binary("min", s.load(held, 0), most), least)
        chosen = s.cast(s.select(limited.equal(limited), limited, zero), I32)
        yield For("at", count, (Define(held, scaled), Store(integers, at, chosen)), "vector")
        clear = Store(integers, count + k.index_symbol("at", size - count), s.const(0, I32))
        yield For("at", size - count, (clear,), "vector")
        each, group, total = 8 // found.bits, found.group, Buffer("total", I32, 1, "register")
        for digit in range(self.digits):
            place = s.load(integers, at)
            low = s.cast(s.cast(s.load(number, 0), I8), I32)
            step: list[Statement] = [Define(number, place)]
            if digit < self.digits - 1:  # what is left for the next digits
                step.append(Store(integers, at, (s.load(number, 0) - low) / BASE))
            step.append(Store(total, 0, s.load(total, 0) + low))
            bytes_here = Buffer("digit_bytes", I8, size, "stack")
            step.append(Store(bytes_here, at, s.cast(s.load(number, 0), I8)))
            yield Define(total, s.const(0, I32))
            if digit == 0:
                yield Alloc(bytes_here)
            yield For("at", size, tuple(step), "vector")
            yield Store(self.sums, (row * self.runs + run) * self.digits + digit, s.load(total, 0))
            words = k.index_symbol("word", size // group)
            natural = s.load(bytes_here, words * group, group)
            order = tuple(b * each + j for j in range(each) for b in range(BYTES))
            moved = s.Shuffle(I8, group, natural, natural, order) if each > 1 else natural
            there = (row * self.digits + digit) * found.padded + run * size + words * group
            yield For("word", size // group, (Store(self.left, there, moved),))

    # Panels

    def body(self) -> Iterator[Statement]:
        """A task for each panel."""

        def most(columns: Columns) -> int:
            return max(1, rows_at_once(columns.vectors, self.digits, self.target))

        yield from panel_tasks(self.panels.panels, self.rows, most, self._tile)

    def _tile(self, rows: int, columns: Columns, column: Dim, row: Dim) -> Iterator[Statement]:
        """`rows` rows of a panel: runs one after the other, scaled into the sums."""
        found, tile, digits = self.found, Tile(rows, columns.vectors, self.panels.lanes), self.digits
        words, scales, sums_of = Buffer("left_words", U32), Buffer("rows_scales", F32), Buffer("rows_sums", I32)
        view = Buffer("words", U32)
        yield Alias(view, self.left, 0)
        yield Alias(words, view, row * (digits * found.padded // BYTES))
        yield Alias(scales, self.scales, row * self.runs)
        yield Alias(sums_of, self.sums, row * self.runs * digits)
        yield from self.panels.aliases(column)
        lanes, sums, count = tile.lanes, accumulators(tile, F32), rows * tile.vectors
        yield Alloc(sums)
        yield from (Store(sums, number, s.const(0, F32, lanes)) for number in range(count))
        run, part = k.index_symbol("run", self.runs), Buffer("part", I32, count * digits, "register", lanes)
        each = found.run // found.group
        inner: list[Statement] = [Alloc(part)]
        for i in range(rows):
            for digit in range(digits):
                start: Scalar = s.const(0, I32)
                if self.whole_zero is not None:
                    row_sum = s.load(sums_of, (i * self.runs + run) * digits + digit)
                    start = row_sum * s.const(-self.whole_zero, I32)
                for v in range(tile.vectors):
                    inner.append(Store(part, (digit * rows + i) * tile.vectors + v, s.widen(start, lanes)))
        inner.append(For("group", each, tuple(self._group(tile, columns, part, words, run * each))))
        inner += self._scaled(tile, columns, part, run, scales, sums_of)
        yield For("run", self.runs, tuple(inner))
        yield from finish_tile(
            self.outputs,
            tile,
            F32,
            lambda i: flattened(found.rows, row + i),
            column,
            lambda v: columns.valid if v == columns.vectors - 1 and columns.valid != lanes else None,
            self.masked,
        )

    def _group(self, tile: Tile, columns: Columns, part: Buffer, left: Buffer, first: Dim) -> Iterator[Statement]:
        """The dot products of a vector of words."""
        found, lanes, each = self.found, tile.lanes, 8 // self.found.bits
        group = first + k.index_symbol("group", found.run // found.group)
        words = [Buffer(f"word{v}", U32, 1, "register", lanes) for v in range(tile.vectors)]
        for v, word in enumerate(words):
            yield Define(word, self.panels.word(columns, group, v))
        mask = sum(((1 << found.bits) - 1) << (8 * byte) for byte in range(BYTES))
        for place in range(each):
            codes = [Buffer(f"codes{place}_{v}", U32, 1, "register", lanes) for v in range(tile.vectors)]
            for v, code in enumerate(codes):
                shifted = s.load(words[v], 0, lanes)
                if place:
                    shifted = s.binary("shr", shifted, s.const(place * found.bits, U32, lanes))
                yield Define(code, shifted & s.const(mask, U32, lanes) if each > 1 else shifted)
            for i in range(tile.rows):
                for digit in range(self.digits):
                    at = (i * self.digits + digit) * (found.padded // BYTES) + group * each + place
                    value = Buffer(f"a{place}_{i}_{digit}", U32, 1, "register", lanes)
                    yield Define(value, s.widen(s.load(left, at), lanes))
                    for v, code in enumerate(codes):
                        number = (digit * tile.rows + i) * tile.vectors + v
                        total, a, b = (s.load(x, n, lanes) for x, n in ((part, number), (code, 0), (value, 0)))
                        yield Store(part, number, s.Call(I32, lanes, self.name, (total, a, b)))

    def _scaled(
        self, tile: Tile, columns: Columns, part: Buffer, run: Dim, scales: Buffer, sums_of: Buffer
    ) -> Iterator[Statement]:
        """Adds the sums of a run, times the scales of both operands, to those of the rows."""
        lanes, rows, digits = tile.lanes, tile.rows, self.digits
        block = run * self.found.run // self.found.block
        sums = accumulators(tile, F32)

        def joined(numbers: list[Scalar]) -> Scalar:
            """Digits, the lowest first, as one number."""
            found = s.cast(numbers[-1], F32)
            for number in reversed(numbers[:-1]):
                found = s.fma(found, s.const(float(BASE), F32, number.lanes), s.cast(number, F32))
            return found

        for v in range(tile.vectors):
            scale, zero = (Buffer(f"{name}{v}", F32, 1, "register", lanes) for name in ("scale", "zero"))
            yield Define(scale, self.panels.scale(columns, block, v))
            if self.whole_zero is None:
                yield Define(zero, self.panels.whole_zero(columns, block, v))
            for i in range(rows):
                number = i * tile.vectors + v
                total = joined([s.load(part, (d * rows + i) * tile.vectors + v, lanes) for d in range(digits)])
                if self.whole_zero is None:
                    there = (i * self.runs + run) * digits
                    row_sum = joined([s.load(sums_of, there + digit) for digit in range(digits)])
                    total = s.fma(s.load(zero, 0, lanes), s.widen(-row_sum, lanes), total)
                factor = s.load(scale, 0, lanes) * s.widen(s.load(scales, i * self.runs + run), lanes)
                yield Store(sums, number, s.fma(factor, total, s.load(sums, number, lanes)))
