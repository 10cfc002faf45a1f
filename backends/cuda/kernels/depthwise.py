"""Depthwise convolutions over channels-last images: one input channel for each filter.

A thread makes neighbouring pixels of one output row for a vector of filters. Going along a row under its pixels it
loads each input once for all sums that it is part of, while the weights of a row of taps stay in registers. Threads of
a warp take neighbouring channels, those of a block a rectangle of the image, so that most of the rows that the taps
share come from the first-level cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product as combinations

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, divide_exactly, product, symbol
from ....ir.dtypes import BOOL, I64
from ....ir.loops import Alloc, For, If, Let, Statement, Store
from ....ir.scalars import Buffer, Load, Scalar
from ....ir.target import Target
from ....ir.tensors import all_of, inside, unflatten
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.convolution import Convolution, find_convolution
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import Affine, affine, copied, joined
from .choose import usual
from .filters import alignment, packed
from .finish import finish_of, with_alignment
from .tiles import counter, unrolled

THREADS = 256
LINE = 128
"""Bytes of neighbouring channels that a block takes of a pixel: one line of the caches."""
_REGISTERS = 88
"""What sums, a row of weights and an input may take, of some 128 registers."""
_UNROLLED_ROWS = 3
"""Rows of taps up to which all their loads are under way together."""
_LATENCY = 900.0  # clocks, once from memory
_L2_RATE = 28.0  # bytes of a multiprocessor in a clock


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernel of a convolution with one input channel per group; None for others, and for channels-first images."""
    found = find_convolution(region, "Conv", "ConvInteger")
    if found is None or found.has_zero_points or found.channels != 1 or found.group == 1 or found.column == "o1":
        return None
    if found.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    image = affine(found.image)
    if image is None or image.strides[-1] != 1:
        region, copies = copied(region, (0,))
        return joined(copies, schedule(region, target))
    return _Depthwise(region, target, found, image, found.outputs).lowered()


@dataclass(frozen=True)
class Plan:
    """A thread makes `pixels` of `lanes` filters; a block `slots` such vectors in `across` places of `down` rows."""

    lanes: int
    pixels: int
    slots: int
    across: int
    down: int

    @property
    def threads(self) -> int:
        return -(-self.slots * self.across * self.down // 32) * 32

    def __str__(self) -> str:
        return f"{self.pixels}x{self.lanes}_b{self.down}x{self.across}x{self.slots}"


class _Depthwise:
    def __init__(self, region: Region, target: Target, found: Convolution, image: Affine, outputs: Epilogue) -> None:
        self.region, self.target, self.found, self.image, self.outputs = region, target, found, image, outputs
        windows = found.windows
        self.filters = found.group * found.filters
        self.kernel = tuple(int(str(extent)) for extent in windows.kernel)
        self.taps = self.kernel[-1]
        self.width, self.rows = windows.output[-1], product(windows.output[:-1])
        self.plan = min(self._plans(), key=self._clocks)
        self.vectors = self.filters // self.plan.lanes

    # The choice

    def _plans(self) -> Iterator[Plan]:
        size = self.image.buffer.dtype.bytes
        widest = self._widest()
        for lanes, pixels, down in combinations((8, 4, 2, 1), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
            if lanes > widest or (lanes * size < 4 and lanes < widest):
                continue
            if pixels > 1 and (pixels + self.taps + 1) * lanes > _REGISTERS:
                continue
            vectors = self.filters // lanes
            slots = ceildiv(vectors, ceildiv(vectors, max(1, min(LINE // (lanes * size), 32))))
            places = usual(ceildiv(self.width, pixels))
            across = max(1, min(places, THREADS // (int(str(slots)) * down)))
            if down == 1 or down <= usual(self.rows):
                yield Plan(lanes, pixels, int(str(slots)), across, down)

    def _widest(self) -> int:
        """The most filters that one access moves, of the image and of the outputs."""
        per_input = self.found.filters
        lanes = finish_of(self.outputs, self.rows, self.filters, self.region.alignment).lanes
        size = self.image.buffer.dtype.bytes
        while lanes > 1:
            inputs = lanes // per_input if lanes % per_input == 0 else 1
            steps = (self.image.start, *self.image.strides[:-1])
            aligned = self.region.alignment(self.image.buffer.name) >= min(16, inputs * size)
            fits = all(divide_exactly(step, inputs) is not None for step in steps) and aligned
            if fits and self.filters % lanes == 0 and (lanes % per_input == 0 or per_input % lanes == 0):
                return lanes
            lanes //= 2
        return 1

    def _positions(self, pixels: int) -> int:
        """Inputs under the pixels of a thread in a row of taps."""
        stride, spread = self.found.windows.strides[-1], self.found.windows.dilations[-1]
        return (pixels - 1) * stride + self.taps if spread == 1 else pixels * self.taps

    def _clocks(self, plan: Plan) -> float:
        """The instructions of all warps of a multiprocessor, or what a block fetches, whichever is more."""
        windows, size = self.found.windows, self.image.buffer.dtype.bytes
        lanes, pixels = plan.lanes, plan.pixels
        converted = lanes if size == 2 else 0
        row = self._positions(pixels) * (4 + converted) + self.taps * (1 + converted + pixels * lanes)
        tap_rows = int(str(product(self.kernel[:-1])))
        work = 80 + tap_rows * row + pixels * (6 + lanes * self.outputs.cost)
        blocks = usual(self.found.images) * -(-usual(self.rows) // plan.down)
        blocks *= -(-usual(self.width) // (pixels * plan.across)) * -(-self.filters // (lanes * plan.slots))
        here = -(-blocks // self.target.multiprocessors)
        stride = windows.strides[-2] if windows.rank > 1 else 1
        lines = (plan.down - 1) * stride + (self.kernel[-2] if windows.rank > 1 else 1)
        length = self._positions(plan.across * pixels)
        fetched = lines * length * plan.slots * lanes * size
        issued = -(-here * (plan.threads // 32) // 4) * work
        return _LATENCY + max(issued, here * fetched / _L2_RATE)

    # The kernel

    def lowered(self) -> Lowered:
        found = self.found
        taps = int(str(product(self.kernel)))
        array = found.array
        self.weights, before = packed(
            self.region,
            "packed",
            (taps, self.filters),
            found.weights,
            lambda i: found.weights.at((i[1], 0, *unflatten(i[0], self.kernel))),
            None if array is None else lambda: array.reshape(self.filters, taps).T,
        )
        self.aligned = alignment(self.region, self.weights)
        stride = f"s{found.windows.strides[-1]}" if found.windows.strides[-1] != 1 else ""
        kernel = "x".join(map(str, self.kernel))
        name = f"{self.image.buffer.dtype}_depthwise{kernel}{stride}_{self.plan}"
        result = joined(before, Lowered((call(self.region, name, (self._grid(),), (self.weights,)),)))
        assert result is not None
        return result

    def _grid(self) -> Statement:
        plan = self.plan
        thread = symbol("thread", 0, plan.threads - 1)
        places = {
            "slot": (thread % plan.slots, plan.slots),
            "place": (thread // plan.slots % plan.across, plan.across),
            "line": (thread // (plan.slots * plan.across), -(-plan.threads // (plan.slots * plan.across))),
        }
        grid = {
            "image": self.found.images,
            "row_block": ceildiv(self.rows, plan.down),
            "column_block": ceildiv(self.width, plan.across * plan.pixels),
            "channel_block": ceildiv(self.vectors, plan.slots),
        }
        own = {name: counter(name, extent) for name, (_, extent) in places.items()}
        at = {name: 0 if extent == 1 else symbol(name, 0, extent - 1) for name, extent in grid.items()}
        lets = [Let(name, value) for name, (value, extent) in places.items() if extent > 1]
        vector = at["channel_block"] * plan.slots + own["slot"]
        row = at["row_block"] * plan.down + own["line"]
        column = (at["column_block"] * plan.across + own["place"]) * plan.pixels
        conditions = [
            s.index(vector) < s.index(self.vectors),
            s.index(row) < s.index(self.rows),
            s.index(column) < s.index(self.width),
        ]
        if plan.slots * plan.across * plan.down != plan.threads:
            conditions.append(s.index(own["line"]) < s.index(plan.down))
        names = [Let("vector", vector), Let("row", row), Let("first", column)]
        there = all_of(conditions)
        body = (*lets, *names, *_where(there, tuple(self._thread(at["image"]))))
        result: Statement = For("thread", plan.threads, body, "block")
        for name, extent in reversed(grid.items()):
            if extent != 1 or name == "image":
                result = For(name, extent, (result,), "grid")
        return result

    @property
    def _vector(self) -> Dim:
        return symbol("vector", 0, self.vectors - 1)

    def _thread(self, image: Dim) -> Iterator[Statement]:
        found, windows, plan = self.found, self.found.windows, self.plan
        sums = Buffer("sums", found.dtype, plan.pixels * plan.lanes, "register")
        number = counter("sum", plan.pixels * plan.lanes)
        yield Alloc(sums)
        zero = Store(sums, number, s.const(0, found.dtype))
        yield from unrolled("sum", plan.pixels * plan.lanes, [zero])
        outer = unflatten(symbol("row", 0, self.rows - 1), windows.output[:-1])
        lines = [Let(f"line{axis}", o * windows.strides[axis] - windows.before[axis]) for axis, o in enumerate(outer)]
        yield from lines
        first = symbol("first", 0, self.width - 1)
        yield Let("left", first * windows.strides[-1] - windows.before[-1])
        per_input = found.filters
        channel = self._vector * (plan.lanes // per_input) if plan.lanes % per_input == 0 else None
        if channel is None:
            channel = self._vector * plan.lanes // per_input
        strides = self.image.strides
        origin = self.image.start + image * strides[0] + channel + symbol("left", None) * strides[-2]
        for axis in range(len(lines)):
            origin = origin + symbol(f"line{axis}", None) * strides[1 + axis]
        yield Let("origin", origin)
        yield from self._tap_rows(sums)
        yield from self._finish(sums, image, outer, first)

    def _tap_rows(self, sums: Buffer) -> list[Statement]:
        """All rows of taps that lie inside the image."""
        windows, outer = self.found.windows, self.kernel[:-1]
        taps = [counter(f"tap{axis}", extent) for axis, extent in enumerate(outer)]
        reach = [tap * windows.dilations[axis] for axis, tap in enumerate(taps)]
        shift: Dim = 0
        conditions: list[Scalar] = []
        number: Dim = 0
        for axis, extent in enumerate(outer):
            shift = shift + reach[axis] * self.image.strides[1 + axis]
            number = number * extent + taps[axis]
            if windows.padded[axis]:
                conditions.append(inside(symbol(f"line{axis}", None) + reach[axis], windows.input[axis]))
        body = _where(all_of(conditions), tuple(self._tap_row(sums, shift, number)))
        kind = "unrolled" if int(str(product(outer))) <= _UNROLLED_ROWS else "serial"
        for axis, extent in reversed(list(enumerate(outer))):
            if extent > 1:
                body = (For(f"tap{axis}", extent, body, kind),)
        return list(body)

    def _tap_row(self, sums: Buffer, shift: Dim, number: Dim) -> Iterator[Statement]:
        """The products of one row of taps: inputs from left to right, each to the sums that it is part of."""
        plan, windows = self.plan, self.found.windows
        dtype, lanes = self.found.dtype, plan.lanes
        stride, spread = windows.strides[-1], windows.dilations[-1]
        slides = spread == 1 and plan.pixels > 1
        weights = Buffer("weights", dtype, (self.taps if slides else 1) * lanes, "register")
        inputs = Buffer("inputs", dtype, lanes, "register")
        tap, lane = counter("tap", self.taps), counter("lane", lanes)
        where = (number * self.taps + tap) * self.filters + self._vector * lanes
        weight = s.cast(s.load(self.weights, where, lanes, aligned=lanes > 1), dtype)

        def fetched(position: Dim) -> list[Statement]:
            """An input to registers, zeros where it is outside."""
            there: Scalar = s.const(True, BOOL)
            if windows.padded[-1]:
                there = inside(symbol("left", None) + position, windows.input[-1])
            elif plan.pixels > 1 and not self._whole:
                there = s.index(symbol("left", None) + position) < s.index(windows.input[-1])
            load = Store(inputs, 0, self._input(shift + position * self.image.strides[-2]))
            if isinstance(there, s.Const):
                return [Alloc(inputs), load]
            clear = Store(inputs, lane, s.const(0, dtype))
            return [Alloc(inputs), *unrolled("lane", lanes, [clear]), If(there, (load,))]

        def added(pixel: Dim, weight: Dim) -> list[Statement]:
            at = pixel * lanes + lane
            value = s.fma(s.load(inputs, lane), s.load(weights, weight * lanes + lane), s.load(sums, at))
            return unrolled("lane", lanes, [Store(sums, at, value)])

        pixel = counter("pixel", plan.pixels)
        if not slides:
            each = [*fetched(pixel * stride + tap * spread), *added(pixel, 0)]
            body = [Alloc(weights), Store(weights, 0, weight), *unrolled("pixel", plan.pixels, each)]
            yield from unrolled("tap", self.taps, body)
            return
        yield Alloc(weights)
        yield from unrolled("tap", self.taps, [Store(weights, tap * lanes, weight)])
        count = self._positions(plan.pixels)
        position = counter("position", count)
        tap = position - pixel * stride
        within = all_of([s.const(0, I64) <= s.index(tap), s.index(tap) < s.index(self.taps)])
        uses = unrolled("pixel", plan.pixels, _where(within, added(pixel, tap)))
        yield from unrolled("position", count, [*fetched(position), *uses])

    @property
    def _whole(self) -> bool:
        """Whether the pixels of every thread are all inside the output."""
        return divide_exactly(self.width, self.plan.pixels) is not None

    def _input(self, shift: Dim) -> Scalar:
        """The inputs of the thread's filters."""
        lanes, per_input = self.plan.lanes, self.found.filters
        at = symbol("origin", None) + shift
        count = max(1, lanes // per_input)
        value = s.cast(s.load(self.image.buffer, at, count, aligned=count > 1), self.found.dtype)
        if count == lanes:
            return value
        if count == 1:
            return s.widen(value, lanes)
        return s.Shuffle(value.dtype, lanes, value, value, tuple(lane // per_input for lane in range(lanes)))

    def _finish(self, sums: Buffer, image: Dim, outer: Sequence[Dim], first: Dim) -> list[Statement]:
        pixel, lanes = counter("pixel", self.plan.pixels), self.plan.lanes
        at = first + pixel
        dims = self.found.pixel((image, *outer, at))
        total = s.load(sums, pixel * lanes, lanes)
        if lanes > 1:
            stores = self.outputs.stores(dims, self._vector * lanes, lanes, total)
        else:
            stores = _single({**dims, self.found.column: self._vector}, self.outputs, total)
        body = tuple(with_alignment(stores, self.aligned))
        there = s.const(True, BOOL) if self._whole else s.index(at) < s.index(self.width)
        return unrolled("pixel", self.plan.pixels, _where(there, body))


def _single(dims: Mapping[str, Dim], outputs: Epilogue, total: Scalar) -> list[Store]:
    def leaf(node: Scalar) -> Scalar | None:
        return total if isinstance(node, Load) and node.buffer.name == "accumulator" else None

    at = s.Rewriter(leaf, dims)
    return [Store(result.buffer, at.dim(result.offset), at(result.value)) for result in outputs.results]


def _where(condition: Scalar, body: Sequence[Statement]) -> tuple[Statement, ...]:
    """The body under a condition that may be known."""
    return tuple(body) if isinstance(condition, s.Const) else (If(condition, tuple(body)),)
