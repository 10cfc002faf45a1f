"""Left operands of products by packed weights as integers: digits of 8 bits, with a scale for a stretch of neighbours.

A stretch is rounded by its greatest magnitude: to one digit, two or three (24 bits, the precision of f32). It is one
run, of elements that share a scale of the weights; of three digits as many runs as are not more than `STRETCH`
elements. Digits are -128 to 127, so that those of a number x are the bytes of x + 128 + 128 * 256 + ..., each
with its sign bit turned over.

They lie as [row][chunk][digit][byte]: a chunk is 16 neighbours along the depth, their bytes in the order in which words
of codes are taken apart (`weight_only_panels`): word w of a chunk goes with place w % (8 / bits) of group w * bits / 8.
"""

from __future__ import annotations

from collections.abc import Iterator

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, product, symbol
from ....ir.dtypes import F32, I8, I32
from ....ir.loops import Alloc, Define, For, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....passes.regions import Call, Region
from ...kernels.calls import call
from .product import flattened
from .weight_only_definition import finite, magnitude_bits
from .weight_only_panels import PackedProduct

BASE = 256
"""Of digits."""
BYTES = 4
"""Codes that one lane of an instruction multiplies."""
LEAST = 1e-30
"""Magnitudes below count as 0: the quotient that makes integers of them would be infinite."""
CHUNK = 16
"""Elements whose digits lie together, where runs are so long."""
STRETCH = 128
"""Elements that share a scale, at most, where runs are shorter: so the sums of these are scaled once."""
APART = 64
"""Bytes between rows: those whose distance is a power of two would fall into the same sets of a cache."""


class RoundedRows:
    """The left operand of a product as integers of `digits` digits, and what sums of its runs start with.

    `zero` is the zero point of all codes as kernels multiply them, None where there are several: a run's sums start
    with -zero times the sum of its integers, as [low, rest] where there are three digits (those of the first two);
    `totals` [row][run] are what several zero points are multiplied by. `tops` are the bits of each row's greatest
    magnitude. There are `each` runs in a stretch; rows are filled up to whole stretches.
    """

    def __init__(self, region: Region, found: PackedProduct, digits: int, zero: int | None) -> None:
        self.region, self.found, self.digits, self.zero = region, found, digits, zero
        self.rows: Dim = product(axis.extent for axis in found.rows)
        self.runs = found.padded // found.run
        self.each = max(1, STRETCH // found.run) if digits > 2 else 1
        self.stretches = -(-self.runs // self.each)
        self.chunk = CHUNK if found.run % CHUNK == 0 else found.group
        self.row_runs = self.stretches * self.each
        self.row_bytes = -(-digits * self.row_runs * found.run // APART) * APART + APART
        self.parts = max(1, digits - 1)
        # Less than digits hold: a quotient and a product that are rounded up shall not reach beyond.
        self.greatest = sum(127 * BASE**digit for digit in range(digits)) - (2 if digits > 2 else 0)
        self.bytes = Buffer("left_digits", I8, self.rows * self.row_bytes)
        self.scales = Buffer("left_scales", F32, self.rows * self.stretches)
        self.starts = Buffer("left_starts", I32, self.rows * self.row_runs * self.parts)
        self.totals = Buffer("left_totals", F32, self.rows * self.row_runs)
        self.tops = Buffer("left_tops", I32, self.rows)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        wanted = ((self.zero is not None, self.starts), (self.found.zeros is not None, self.totals))
        return (self.bytes, self.scales, self.tops, *(buffer for needed, buffer in wanted if needed))

    def word(self, row: Dim, chunk: Dim, digit: int, number: int) -> Dim:
        """Where a word of 4 bytes is."""
        words = self.chunk // BYTES
        return row * (self.row_bytes // BYTES) + (chunk * self.digits + digit) * words + number

    def prepared(self) -> Call:
        """The kernel that rounds all rows."""
        found, row = self.found, k.index_symbol("row", self.rows)
        whole, rest = divmod(found.depth, found.run * self.each)
        highest = Buffer("highest", I32, 1, "register")
        statements: list[Statement] = [Define(highest, s.const(0, I32))]

        def loop(first: int, count: int, elements: int) -> None:
            stretch = first + k.index_symbol("stretch", count)
            rounded = self._rounded(row, stretch, elements, highest)
            statements.append(For("stretch", count, tuple(rounded)))

        loop(0, whole, found.run * self.each)
        if rest:
            loop(whole, 1, rest)
        done = whole + (rest > 0)
        loop(done, self.stretches - done, 0)
        statements.append(Store(self.tops, row, s.load(highest, 0)))
        body = (For("row", self.rows, tuple(statements), "parallel"),)
        return call(self.region, f"w{found.bits}_round{8 * self.digits}", body, self.buffers, shared=True)

    def _rounded(self, row: Dim, stretch: Dim, count: int, highest: Buffer) -> Iterator[Statement]:
        """A stretch of a row, of which `count` elements exist."""
        found, at, size, lanes = self.found, symbol("at", 0), self.found.run * self.each, self.chunk
        where = flattened(found.rows, row)
        start = found.left.start + sum((where[axis.name] * axis.left for axis in found.rows), 0)
        value = s.cast(s.load(found.left.buffer, start + (stretch * size + at) * found.left.strides[-1]), F32)
        held, tops = Buffer("held", F32, size, "stack"), Buffer("tops", I32, 1, "register", lanes)
        top, inverse = Buffer("top", I32, 1, "register"), Buffer("inverse", F32, 1, "register")
        yield Alloc(held)
        yield For("at", count, (Store(held, at, value),), "vector")
        clear = Store(held, count + k.index_symbol("at", size - count), s.const(0, F32))
        yield For("at", size - count, (clear,), "vector")
        chunk = k.index_symbol("chunk", size // lanes)
        yield Define(tops, s.const(0, I32, lanes))
        magnitudes = magnitude_bits(s.load(held, chunk * lanes, lanes))
        higher = Store(tops, 0, s.binary("max", s.load(tops, 0, lanes), magnitudes))
        yield For("chunk", size // lanes, (higher,))
        yield Define(top, s.Horizontal(I32, 1, "max", s.load(tops, 0, lanes)))
        yield Store(highest, 0, s.binary("max", s.load(highest, 0), s.load(top, 0)))
        magnitude, greatest = s.bitcast(s.load(top, 0), F32), s.const(float(self.greatest), F32)
        usable = (s.const(LEAST, F32) < magnitude) & finite(s.load(top, 0))
        yield Define(inverse, s.select(usable, greatest / magnitude, s.const(0, F32)))
        yield Store(self.scales, row * self.stretches + stretch, magnitude / greatest)
        run, chunks = k.index_symbol("run", self.each), found.run // lanes
        sums, chunk = Buffer("sums", I32, 1, "register", lanes), run * chunks + k.index_symbol("chunk", chunks)
        here = s.load(held, chunk * lanes, lanes)
        number = stretch * self.each
        inner: list[Statement] = [
            Define(sums, s.const(0, I32, lanes)),
            For("chunk", chunks, tuple(self._digits(row, number * chunks + chunk, here, inverse, sums))),
            *self._sums(row * self.row_runs + number + run, s.Horizontal(I32, 1, "add", s.load(sums, 0, lanes))),
        ]
        yield For("run", self.each, tuple(inner))

    def _digits(self, row: Dim, chunk: Dim, here: Scalar, inverse: Buffer, sums: Buffer) -> Iterator[Statement]:
        """The digits of a chunk."""
        lanes, each, group = self.chunk, 8 // self.found.bits, self.found.group
        numbers, digits = (Buffer(name, I32, 1, "register", lanes) for name in ("numbers", "digits"))
        factor = s.widen(s.load(inverse, 0), lanes)
        zero = s.const(0, F32, lanes)
        # What is no number, or infinite, would be no integer: such rows are done by the definition.
        scaled = s.select(zero < factor, s.unary("round", here * factor), zero)
        yield Define(numbers, s.cast(scaled, I32))
        yield Store(sums, 0, s.load(sums, 0, lanes) + s.load(numbers, 0, lanes))
        halves = sum(128 * BASE**digit for digit in range(self.digits))
        half = s.const(halves, I32, lanes)
        yield Define(digits, (s.load(numbers, 0, lanes) + half) ^ half)
        order = [g * group + b * each + j for g in range(lanes // group) for j in range(each) for b in range(BYTES)]
        bytes_ = s.Bitcast(I8, lanes * I32.bytes, s.load(digits, 0, lanes))
        for digit in range(self.digits):
            pick = tuple(place * I32.bytes + digit for place in order)
            there = BYTES * self.word(row, chunk, digit, 0)
            yield Store(self.bytes, there, s.Shuffle(I8, lanes, bytes_, bytes_, pick))

    def _sums(self, at: Dim, total: Scalar) -> Iterator[Statement]:
        """What the sums of a run start with, by the sum of its integers."""
        sum_, low = Buffer("run_sum", I32, 1, "register"), Buffer("run_low", I32, 1, "register")
        yield Define(sum_, total)
        if self.found.zeros is not None:
            yield Store(self.totals, at, -s.cast(s.load(sum_, 0), F32))
        if self.zero is None:
            return
        factor, value = s.const(-self.zero, I32), s.load(sum_, 0)
        if self.parts == 1:
            yield Store(self.starts, at, value * factor)
            return
        yield Define(low, s.cast(s.cast(value, I8), I32))
        yield Store(self.starts, 2 * at, s.load(low, 0) * factor)
        rest = s.binary("shr", value - s.load(low, 0), s.const(8, I32))
        yield Store(self.starts, 2 * at + 1, rest * factor)
