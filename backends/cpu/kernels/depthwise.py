"""Depthwise convolutions over channels-last images: one filter per channel, vectors of channels.

A register tile holds neighbouring pixels of one output row for one vector of channels. Every input pixel under a row of
the tile is loaded once and goes to all sums that it is part of. Where the width is known, each tile at a border leaves
out the taps outside the image when the code is made; otherwise pixels at a border are done one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, floordiv, symbol
from ....ir.loops import Alias, Alloc, Define, For, If, Let, Statement, Store
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....passes.bands import band_of
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from .convolution import Convolution, find_convolution, inside_pixels, tap_rows
from .division import row_blocks
from .epilogue import finish_tile
from .packing import first_lanes
from .register_tile import Tile, accumulators

# Pixels of a tile: as many sums as hide the latency of a multiply-add.
PIXELS = 8
# Output rows in one task of a parallel loop where their number is only known at run time.
TASK_ROWS = 4
# Width of an output row to plan for where it is only known at run time.
USUAL_WIDTH = 56


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernel of a channels-last convolution with one input and one output channel per group; None for others."""
    found = find_convolution(region)
    if found is None or found.channels != 1 or found.filters != 1:
        return None
    if found.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    return joined(found.copies, _Depthwise(found.region, target, found, found.outputs).lowered())


class _Depthwise:
    def __init__(self, region: Region, target: Target, found: Convolution, outputs: Epilogue) -> None:
        self.region, self.target, self.found, self.outputs = region, target, found, outputs
        windows = found.windows
        self.kernel = tuple(int(str(d)) for d in windows.kernel)
        self.channels = found.group
        lanes = target.lanes(found.dtype.bits)
        while lanes >= 2 * self.channels and lanes > 2:
            lanes //= 2
        self.lanes, self.padded = lanes, -(-self.channels // lanes) * lanes
        # A product and what LLVM loads ahead take registers too.
        room = target.vector_registers - self.kernel[1] - 1 - (0 if target.fma else 4)
        self.pixels = max(2, min(PIXELS, room))
        width = windows.output[1]
        if isinstance(width, int):  # Tiles of even size.
            self.pixels = -(-width // -(-width // self.pixels))
        self.masked = target.has("avx512vl")
        self.vectors, self.rest = divmod(self.channels, lanes)
        self.band = band_of(region.anchor)
        self.ring = self.band.ring if self.band else 0
        self.parts = self._parts()
        self.part = -(-self.vectors // self.parts)
        self.packed = Buffer("packed", found.dtype, self.kernel[0] * self.kernel[1] * self.padded)

    @property
    def known_width(self) -> bool:
        windows = self.found.windows
        return isinstance(windows.output[1], int) and isinstance(windows.input[1], int)

    def _parts(self) -> int:
        """How many tasks share the channels: in one, the input rows of a window stay in the first-level cache.

        Those of a tile where the width is known, and tiles are done one below the other; else all of a row, in images
        within the second-level cache: larger ones arrive faster in the order in which they lie.
        """
        height, width = (d if isinstance(d, int) else USUAL_WIDTH for d in self.found.windows.input)
        if self.known_width:
            (_, stride), (_, spread) = self.found.windows.strides, self.found.windows.dilations
            width = min(width, (self.pixels - 1) * stride + (self.kernel[1] - 1) * spread + 1)
        line = width * self.lanes * self.found.dtype.bytes
        if not self.known_width and line * height * self.vectors > self.target.l2_bytes * 3 // 4:
            return 1
        fitting = max(1, self.target.l1_bytes * 5 // 8 // (line * (self.kernel[0] + 1)))
        return max(1, -(-self.vectors // fitting))

    def _near(self) -> int:
        """How many rows of the output may take turns tile by tile: what they read lies in the second-level cache."""
        windows = self.found.windows
        width = windows.input[1]
        assert isinstance(width, int)
        line = width * self.channels * self.found.input.dtype.bytes * windows.strides[0]
        return max(4, self.target.l2_bytes * 3 // 8 // line)

    def lowered(self) -> Lowered:
        stride = f"s{self.found.windows.strides[1]}" if self.found.windows.strides[1] != 1 else ""
        name = f"{self.found.dtype}_depthwise{self.kernel[0]}x{self.kernel[1]}{stride}_{self.pixels}x{self.lanes}"
        convolve = call(self.region, name, self._body(), (self.packed,), shared=True)
        return Lowered((convolve,), packed={self.packed.name: self._pack})

    def _pack(self) -> np.ndarray:
        """Weights as [kernel row, kernel column, channel], zeros behind the last channel."""
        taps = self.found.weights.reshape(self.channels, -1).T
        result = np.zeros((len(taps), self.padded), self.found.dtype.numpy)
        result[:, : self.channels] = taps
        return result.reshape(-1)

    def _body(self) -> Iterator[Statement]:
        found = self.found
        height = found.windows.output[0]
        start: Dim = 0
        block: Dim = TASK_ROWS
        if self.band is not None:  # some rows of the output, which the caller names
            start, height = symbol(self.band.first, 0, height), symbol(self.band.rows, 0, height)
            block = dim_max(1, ceildiv(height, self.target.threads))
        elif isinstance(height, int):
            images = found.images if isinstance(found.images, int) else 1
            block = max(1, -(-height // row_blocks(height, images * self.parts, self.target.threads)))
            if self.known_width:
                block = min(block, -(-height // -(-height // self._near())))
        count = ceildiv(height, block)
        tasks = found.images * self.parts * count
        task = k.index_symbol("task", tasks)
        rows = symbol("rows", 0, block)
        row = start + symbol("block", 0, count - 1) * block + k.index_symbol("row", rows)
        yield For(
            "task",
            tasks,
            (
                Let("block", task // self.parts % count),  # threads share the rows
                Let("part", task % self.parts),
                Let("image", task // (count * self.parts)),
                Let("vectors", dim_min(self.part, self.vectors - symbol("part", 0, self.parts - 1) * self.part)),
                Let("rows", dim_min(block, height - symbol("block", 0, count - 1) * block)),
                *(self._known_width(row, rows) if self.known_width else [For("row", rows, tuple(self._row(row)))]),
            ),
            "parallel",
        )

    def _clip(self, row: Dim) -> Iterator[Statement]:
        """Which rows of taps are inside the image."""
        low, high = tap_rows(self.found.windows, row)
        yield Let("low", low)
        yield Let("taps", dim_max(0, high - low))

    def _row(self, row: Dim) -> Iterator[Statement]:
        yield from self._clip(row)
        width = self.found.windows.output[1]
        first, last = inside_pixels(self.found.windows)
        yield Let("first", dim_max(0, dim_min(first, width)))
        start = symbol("first", 0, width)
        yield Let("tiles", dim_max(0, floordiv(dim_min(last + 1, width) - start, self.pixels)))
        tiles = symbol("tiles", 0)
        every = [tuple(range(self.kernel[1]))] * self.pixels
        at = start + k.index_symbol("tile", tiles) * self.pixels
        yield For("tile", tiles, tuple(self._channels(partial(self._tile, row, at, every))))
        outside = width - tiles * self.pixels
        number = k.index_symbol("single", outside)
        after = s.select(s.index(number) < s.index(start), s.index(number), s.index(number + tiles * self.pixels))
        yield For("single", outside, (Let("x", after), *self._single(row, symbol("x", 0, width - 1))))

    def _known_width(self, row: Dim, rows: Dim) -> Iterator[Statement]:
        """Tiles in order, of each the rows; those with the same taps inside the image share one loop."""
        start, width = 0, self.found.windows.output[1]
        assert isinstance(width, int)
        while start < width:
            size = min(self.pixels, width - start)
            taps = self._taps(start, size)
            count = 1
            while start + (count + 1) * size <= width and self._taps(start + count * size, size) == taps:
                count += 1
            body = partial(self._tile, row, start + k.index_symbol("tile", count) * size, taps)
            yield For("tile", count, (For("row", rows, (*self._clip(row), *self._channels(body))),))
            start += count * size

    def _taps(self, start: int, size: int) -> list[tuple[int, ...]]:
        """For each pixel of a tile the kernel columns that are inside the image."""
        windows = self.found.windows
        stride, spread, before, extent = (windows.strides[1], windows.dilations[1], windows.before[1], windows.input[1])
        assert isinstance(before, int) and isinstance(extent, int)
        return [
            tuple(t for t in range(self.kernel[1]) if 0 <= (start + i) * stride - before + t * spread < extent)
            for i in range(size)
        ]

    def _channels(self, body: Callable[[Dim, int], Iterator[Statement]]) -> Iterator[Statement]:
        """The body for every vector of channels of the task; `valid` lanes of it are channels."""
        part = symbol("part", 0, self.parts - 1)
        if self.vectors:
            vectors = symbol("vectors", 0, self.part)
            channel = (part * self.part + k.index_symbol("vector", vectors)) * self.lanes
            yield For("vector", vectors, tuple(body(channel, self.lanes)))
        if self.rest:
            last = s.index(part).equal(s.index(self.parts - 1))
            yield If(last, tuple(body(self.vectors * self.lanes, self.rest)))

    def _tile(
        self, row: Dim, at: Dim, taps: Sequence[tuple[int, ...]], channel: Dim, valid: int
    ) -> Iterator[Statement]:
        found, windows = self.found, self.found.windows
        tile = Tile(len(taps), 1, self.lanes)
        sums = accumulators(tile, found.dtype)
        yield from self._cleared(sums)
        source = Buffer("pixels", found.input.dtype)
        stride, spread = windows.strides[1], windows.dilations[1]
        yield Alias(
            source, found.input, self._line(row) + (at * stride - windows.before[1]) * found.strides[2] + channel
        )
        line, weight = self._tap_row(row)
        inner: list[Statement] = []
        used = sorted({t for entry in taps for t in entry})
        weights = {t: Buffer(f"w{t}", found.dtype, 1, "register", self.lanes) for t in used}
        for t, register in weights.items():
            inner.append(Define(register, s.load(self.packed, weight + t * self.padded + channel, self.lanes)))
        readers: dict[int, list[tuple[int, int]]] = {}
        for i, entry in enumerate(taps):
            for t in entry:
                readers.setdefault(i * stride + t * spread, []).append((i, t))
        for position, users in sorted(readers.items()):
            register = Buffer(f"x{position}", found.dtype, 1, "register", self.lanes)
            read = self._read(source, line + position * found.strides[2], valid)
            inner.append(Define(register, read))
            for i, t in users:
                x, w, total = (
                    s.load(register, 0, self.lanes),
                    s.load(weights[t], 0, self.lanes),
                    s.load(sums, i, self.lanes),
                )
                inner.append(Store(sums, i, s.fma(x, w, total)))
        yield For("tap_row", symbol("taps", 0, self.kernel[0]), tuple(inner))
        yield from self._finish(tile, row, at, channel, valid)

    def _single(self, row: Dim, at: Dim) -> Iterator[Statement]:
        """One pixel, whose taps inside the image only the run knows."""
        windows = self.found.windows
        stride, spread, extent = windows.strides[1], windows.dilations[1], windows.input[1]
        reach = at * stride - windows.before[1]
        yield Let("left", dim_max(0, ceildiv(-reach, spread)))
        yield Let("columns", dim_max(0, dim_min(self.kernel[1], ceildiv(extent - reach, spread)) - symbol("left", 0)))
        yield from self._channels(lambda c, valid: self._single_vector(row, at, c, valid))

    def _single_vector(self, row: Dim, at: Dim, channel: Dim, valid: int) -> Iterator[Statement]:
        found, windows = self.found, self.found.windows
        tile = Tile(1, 1, self.lanes)
        sums = accumulators(tile, found.dtype)
        yield from self._cleared(sums)
        columns = symbol("columns", 0, self.kernel[1])
        tap = symbol("left", 0) + k.index_symbol("tap_column", columns)
        line, weight = self._tap_row(row)
        there = at * windows.strides[1] - windows.before[1] + tap * windows.dilations[1]
        x = self._read(found.input, self._line(row) + line + there * found.strides[2] + channel, valid)
        w = s.load(self.packed, weight + tap * self.padded + channel, self.lanes)
        step = Store(sums, 0, s.fma(x, w, s.load(sums, 0, self.lanes)))
        yield For("tap_row", symbol("taps", 0, self.kernel[0]), (For("tap_column", columns, (step,)),))
        yield from self._finish(tile, row, at, channel, valid)

    def _cleared(self, sums: Buffer) -> Iterator[Statement]:
        yield Alloc(sums)
        for i in range(int(str(sums.size))):
            yield Store(sums, i, s.const(0, sums.dtype, sums.lanes))

    def _line(self, row: Dim) -> Dim:
        """Where the first input row of an output row's window begins, were it not clipped."""
        found = self.found
        first = 0 if self.ring else self._first(row)
        return found.start + symbol("image", 0) * found.strides[0] + first * found.strides[1]

    def _first(self, row: Dim) -> Dim:
        return row * self.found.windows.strides[0] - self.found.windows.before[0]

    def _tap_row(self, row: Dim) -> tuple[Dim, Dim]:
        """Offsets of a row of taps in the input and in the weights."""
        tap = symbol("low", 0) + k.index_symbol("tap_row", symbol("taps", 0, self.kernel[0]))
        line = tap * self.found.windows.dilations[0]
        if self.ring:
            line = (self._first(row) + line) % self.ring
        return line * self.found.strides[1], tap * self.kernel[1] * self.padded

    def _read(self, source: Buffer, offset: Dim, valid: int) -> s.Scalar:
        predicate = None if valid == self.lanes else first_lanes(valid, self.lanes)
        return s.cast(s.load(source, offset, self.lanes, predicate), self.found.dtype)

    def _finish(self, tile: Tile, row: Dim, at: Dim, channel: Dim, valid: int) -> list[Statement]:
        def dims(i: Dim) -> Mapping[str, Dim]:
            return self.found.pixel(symbol("image", 0), row, at + i)

        def lanes(v: int) -> int | None:
            return None if valid == self.lanes else valid

        return finish_tile(self.outputs, tile, self.found.dtype, dims, channel, lanes, self.masked)
