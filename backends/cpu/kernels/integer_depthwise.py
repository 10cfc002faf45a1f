"""Depthwise convolutions of 8-bit images: four taps of a channel, one below the other, are multiplied by one
instruction.

The tiles are those of `depthwise`. Of each column under a tile the pixels of up to four rows are interleaved, channel
by channel, once for all sums that they are part of. Bytes are interleaved within blocks of 16, as the instructions do
it: then four vectors of sums hold the channels of a chunk in another order, in which weights are packed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, symbol
from ....ir.dtypes import I32, I64, U8, U16, U32, DType
from ....ir.loops import Alias, Alloc, Define, For, If, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.bands import band_of
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from .depthwise import USUAL_WIDTH, _Depthwise
from .epilogue import finish_tile
from .integer_bias import without_bias
from .integer_convolution import IntegerConvolution, find_integers
from .packed_outputs import packed_outputs
from .packing import first_lanes
from .register_tile import Tile, accumulators
from .repeated_channels import repeated

GROUP = 4
"""Taps that are multiplied by one instruction."""
BLOCK = 16
"""Bytes within which instructions interleave."""
PIXELS = 4
"""Of a tile: with four vectors of sums for each, and as many of weights for every kernel column."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a depthwise convolution of integers; None for others."""
    found = find_integers(region, target)
    if found is None or found.whole.channels != 1 or not found.fits:
        return None
    several = repeated(found) if found.whole.filters != 1 else None
    if found.whole.filters != 1 and several is None:
        return None
    if found.whole.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    if several is None:
        return joined(found.whole.copies, _IntegerDepthwise(target, found, found.whole.outputs).lowered())
    single, image, copy = several
    made = _IntegerDepthwise(target, single, found.whole.outputs).lowered()
    made = replace(made, calls=(copy, *made.calls), workspaces=(image, *made.workspaces))
    return joined(found.whole.copies, made)


def channel_order(lanes: int) -> np.ndarray:
    """The channels of a chunk, [4, lanes], in the order in which interleaving leaves them."""
    vector, block, lane = np.meshgrid(range(4), range(lanes // 4), range(4), indexing="ij")
    return np.asarray(BLOCK * block + 4 * vector + lane).reshape(4, lanes)


def chunks(channels: int, largest: int) -> list[tuple[int, int, int]]:
    """(first channel, channels, of which so many exist) of the chunks that do all channels: some may do the last
    channels of the one before them again."""
    found = [(at, largest, largest) for at in range(0, channels - largest + 1, largest)]
    at = len(found) * largest
    while at < channels:
        size = largest
        while size // 2 >= max(channels - at, BLOCK) or (size > channels and size > BLOCK):
            size //= 2
        first = max(0, min(at, channels - size))
        found.append((first, size, min(size, channels)))
        at = first + size
    return found


class _IntegerDepthwise(_Depthwise):
    def __init__(self, target: Target, integers: IntegerConvolution, outputs: Epilogue) -> None:
        found = integers.whole
        bias: np.ndarray | None = None
        if integers.known_zero is not None:
            outputs, bias = without_bias(found.region, outputs)
        self.integers, self.found, self.outputs, self.bias = integers, found, outputs, bias
        self.region, self.target = found.region, target
        self.kernel = tuple(int(str(d)) for d in found.windows.kernel)
        self.channels = found.group
        self.groups = -(-self.kernel[0] // GROUP)
        self.lanes = GROUP * target.lanes(I32.bits)
        self.chunks = chunks(self.channels, self.lanes)
        self.vectors = self.channels // self.lanes
        self.pixels = PIXELS if target.vector_registers >= 32 else 1
        width = found.windows.output[1]
        if isinstance(width, int):
            self.pixels = -(-width // -(-width // self.pixels))
        self.masked = target.has("avx512vl")
        self.band = band_of(found.region.anchor)
        self.ring = self.band.ring if self.band else 0
        self.parts = self._parts()
        self.part = -(-self.vectors // self.parts)
        self.padded = sum(size for _, size, _ in self.chunks)
        self.packed = Buffer("packed", U32, self.groups * self.kernel[1] * self.padded)
        self.starts = Buffer("starts", I32, self.padded)
        self.bytes = packed_outputs(found.region, outputs, self._most(), target.fma, self.padded)
        windows, pixel = found.windows, found.strides[2]
        reach = (self.pixels - 1) * windows.strides[1] + (self.kernel[1] - 1) * windows.dilations[1]
        assert isinstance(pixel, int)
        self.rim, self.fill, self.made = integers.rim("rim", (reach * pixel + self.lanes) // 4 + 1)

    def _parts(self) -> int:
        given = self.found.windows.input[1]
        width = given if isinstance(given, int) else USUAL_WIDTH
        if self.known_width:
            (_, stride), (_, spread) = self.found.windows.strides, self.found.windows.dilations
            width = min(width, (self.pixels - 1) * stride + (self.kernel[1] - 1) * spread + 1)
        fitting = max(1, self.target.l1_bytes * 5 // 8 // (width * self.lanes * (self.kernel[0] + 1)))
        return max(1, -(-self.vectors // fitting))

    def lowered(self) -> Lowered:
        stride = f"s{self.found.windows.strides[1]}" if self.found.windows.strides[1] != 1 else ""
        size = f"{self.kernel[0]}x{self.kernel[1]}{stride}"
        name = f"{self.found.input.dtype}_depthwise{size}_{self.pixels}x{self.lanes}_zero{self.integers.known_zero}"
        scratch: tuple[Buffer, ...] = (self.packed, self.starts, self.rim)
        made = {self.packed.name: self._pack, self.starts.name: self._start, **self.made}
        if self.bytes is not None:
            name += "_limited" if self.bytes.limited else "_packed"
            scratch += tuple(self.bytes.constants)
            made |= {b.name: partial(self._ordered, array) for b, array in self.bytes.constants.items()}
        convolve = call(self.region, name, self._body(), scratch, shared=True)
        calls = (convolve,) if self.fill is None else (self.fill, convolve)
        return Lowered(
            calls,
            () if self.fill is None else (self.rim,),
            {name: make for name, make in made.items() if name in convolve.arguments},
        )

    def _by_chunk(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """[..., channels] of each chunk in the order of its sums, zeros for what is no channel."""
        for first, size, valid in self.chunks:
            part = np.zeros((*array.shape[:-1], size), array.dtype)
            part[..., :valid] = array[..., first : first + valid]
            yield part[..., channel_order(size // GROUP)]

    def _pack(self) -> np.ndarray:
        """Weights as [chunk, group of kernel rows, kernel column, vector, lane, row of the group]."""
        rows, columns = self.kernel
        weights = np.zeros((self.groups * GROUP, columns, self.channels), np.int8)
        weights[:rows] = self.found.weights.reshape(self.channels, rows, columns).transpose(1, 2, 0)
        grouped = weights.reshape(self.groups, GROUP, columns, self.channels)
        parts = [np.moveaxis(part, 1, -1).reshape(-1) for part in self._by_chunk(grouped)]
        return np.concatenate(parts).view(np.uint32)

    def _start(self) -> np.ndarray:
        sums = self.integers.start(self.found.weights.reshape(self.channels, -1).sum(1))
        return self._ordered(sums if self.bias is None else sums + self.bias)

    def _ordered(self, array: np.ndarray) -> np.ndarray:
        """One number for each channel, in the order of the sums."""
        return np.concatenate([part.reshape(-1) for part in self._by_chunk(array)])

    def _most(self) -> float:
        """The greatest magnitude of a sum, its bias included."""
        sums = np.abs(self.found.weights.reshape(self.channels, -1).astype(np.float64)).sum(1) * 510
        return float((sums if self.bias is None else sums + np.abs(self.bias.astype(np.float64))).max())

    # Loops

    def _clip(self, row: Dim) -> Iterator[Statement]:
        yield from ()

    def _channels(self, body: Callable[[Dim, int], Iterator[Statement]]) -> Iterator[Statement]:
        part = symbol("part", 0, self.parts - 1)
        if self.vectors:
            vectors = symbol("vectors", 0, self.part)
            channel = (part * self.part + k.index_symbol("vector", vectors)) * self.lanes
            yield For("vector", vectors, tuple(body(channel, self.lanes)))
        for first, _, valid in self.chunks[self.vectors :]:
            yield If(s.index(part).equal(s.index(self.parts - 1)), tuple(body(first, valid)))

    def _single(self, row: Dim, at: Dim) -> Iterator[Statement]:
        taps = [tuple(range(self.kernel[1]))]
        yield from self._channels(partial(self._tile, row, at, taps, checked=True))

    def _place(self, channel: Dim, valid: int) -> tuple[Dim, int]:
        """Where a chunk's weights begin, for a single tap, and how many channels it has."""
        if not isinstance(channel, int):
            return channel, self.lanes
        number = next(i for i, (first, _, own) in enumerate(self.chunks) if (first, own) == (channel, valid))
        return sum(size for _, size, _ in self.chunks[:number]), self.chunks[number][1]

    # A tile

    def _tile(
        self,
        row: Dim,
        at: Dim,
        taps: Sequence[tuple[int, ...]],
        channel: Dim,
        valid: int,
        checked: bool = False,
    ) -> Iterator[Statement]:
        """`checked`: whether only the run knows which columns are inside the image."""
        windows = self.found.windows
        place, size = self._place(channel, valid)
        lanes = size // GROUP
        tile = Tile(len(taps), GROUP, lanes)
        sums = accumulators(tile, I32)
        yield Alloc(sums)
        for number in range(tile.rows * tile.vectors):
            start = s.load(self.starts, place + number % tile.vectors * lanes, lanes)
            yield Store(sums, number, self.integers.started(start))
        readers: dict[int, list[tuple[int, int]]] = {}
        outside: list[tuple[int, int]] = []
        for i, entry in enumerate(taps):
            for t in range(self.kernel[1]):
                users = readers.setdefault(i * windows.strides[1] + t * windows.dilations[1], [])
                (users if t in entry else outside).append((i, t))
        readers = {position: users for position, users in sorted(readers.items()) if users}
        rows = self._rows(row, at, channel, checked, tuple(readers))
        yield from rows.aliases
        predicate = None if valid == size else first_lanes(valid, size)

        def multiply(group: int, vectors: Sequence[Scalar], users: Sequence[tuple[int, int]]) -> Iterator[Statement]:
            for i, t in users:
                weights = (place * self.groups * self.kernel[1]) + (group * self.kernel[1] + t) * size
                for v, pixels in enumerate(vectors):
                    total, w = s.load(sums, i * GROUP + v, lanes), s.load(self.packed, weights + v * lanes, lanes)
                    yield Store(sums, i * GROUP + v, self.integers.dot(total, pixels, w))

        for group in range(self.groups):
            below = range(group * GROUP, min(self.kernel[0], (group + 1) * GROUP))
            for position, users in readers.items():
                loads = [s.load(*rows.at(tap, position), size, predicate) for tap in below]
                registers = []
                for v, value in enumerate(interleaved([self.integers.bytes_of(load) for load in loads])):
                    register = Buffer(f"x{group}_{position}_{v}", U32, 1, "register", lanes)
                    yield Define(register, value)
                    registers.append(s.load(register, 0, lanes))
                yield from multiply(group, registers, users)
            if outside and self.integers.known_zero != 0:
                yield from multiply(group, [s.widen(self.integers.zeros(), lanes)] * GROUP, outside)
        if self.bytes is not None and (valid == size or self.masked):
            left_over = None if valid == size else valid
            for i in range(tile.rows):
                totals = [s.load(sums, i * GROUP + v, lanes) for v in range(GROUP)]
                pixel = self.found.pixel(symbol("image", 0), row, at + i)
                yield self.bytes.store(pixel, channel, place, totals, left_over)
            return
        tile = Tile(len(taps), -(-valid // lanes), lanes)
        for i in range(tile.rows):
            values = in_order([s.load(sums, i * GROUP + v, lanes) for v in range(GROUP)])
            natural = [Buffer(f"n{i}_{v}", I32, 1, "register", lanes) for v in range(tile.vectors)]
            yield from (Define(register, value) for register, value in zip(natural, values, strict=False))
            yield from (Store(sums, i * tile.vectors + v, s.load(n, 0, lanes)) for v, n in enumerate(natural))

        def left(v: int) -> int | None:
            return None if valid == size or v + 1 < tile.vectors else valid - v * lanes

        yield from finish_tile(
            self.outputs,
            tile,
            I32,
            lambda i: self.found.pixel(symbol("image", 0), row, at + i),
            channel,
            left,
            self.masked,
        )

    def _rows(self, row: Dim, at: Dim, channel: Dim, checked: bool, positions: Sequence[int]) -> _Rows:
        """The input rows under a tile, from its first column on; of a checked one each position by itself."""
        found, windows = self.found, self.found.windows
        start = found.start + symbol("image", 0) * found.strides[0] + channel
        column = at * windows.strides[1] - windows.before[1]
        aliases: list[Statement] = []
        places: dict[tuple[int, int], tuple[Buffer, Dim]] = {}
        for tap in range(self.kernel[0]):
            there = self._first(row) + tap * windows.dilations[0]
            inside = _within(there, windows.input[0])
            line = there % self.ring if self.ring else there
            if not checked:
                buffer = Buffer(f"row{tap}", found.input.dtype)
                aliases.append(self._alias(buffer, start + line * found.strides[1] + column * found.strides[2], inside))
                places.update({(tap, x): (buffer, x * found.strides[2]) for x in positions})
                continue
            for x in positions:
                buffer = Buffer(f"pixel{tap}_{x}", found.input.dtype)
                here = start + line * found.strides[1] + (column + x) * found.strides[2]
                aliases.append(self._alias(buffer, here, inside & _within(column + x, windows.input[1])))
                places[tap, x] = buffer, 0
        return _Rows(aliases, places, self.rim)

    def _alias(self, buffer: Buffer, offset: Dim, inside: Scalar) -> Statement:
        if isinstance(inside, s.Const) and inside.value:
            return Alias(buffer, self.found.input, offset)
        return Alias(buffer, self.found.input, offset, inside, self.rim)


class _Rows:
    """Where the pixels of a tile are: for each kernel row and column under it a buffer and an offset."""

    def __init__(
        self, aliases: list[Statement], places: dict[tuple[int, int], tuple[Buffer, Dim]], rim: Buffer
    ) -> None:
        self.aliases, self.places, self.rim = aliases, places, rim

    def at(self, tap: int, position: int) -> tuple[Buffer, Dim]:
        return self.places[tap, position]


def _within(index: Dim, extent: Dim) -> Scalar:
    return (s.const(0, I64) <= s.index(index)) & (s.index(index) < s.index(extent))


def interleaved(rows: Sequence[Scalar]) -> list[Scalar]:
    """Up to four vectors of bytes as four vectors of u32, each the bytes of one lane, in `channel_order`."""
    zero = s.const(0, U8, rows[0].lanes)
    first, second, third, fourth = (*rows, *[zero] * (GROUP - len(rows)))
    result: list[Scalar] = []
    for high in (0, 1):
        low, above = (_paired(_unpacked(x, y, U8, high), U16) for x, y in ((first, second), (third, fourth)))
        result += [_paired(_unpacked(low, above, U16, half), U32) for half in (0, 1)]
    return result


def _paired(vector: Scalar, dtype: DType) -> Scalar:
    """Neighbouring lanes as one."""
    return s.Bitcast(dtype, vector.lanes // 2, vector)


def _unpacked(x: Scalar, y: Scalar, dtype: DType, high: int) -> Scalar:
    """The low or high halves of the blocks of two vectors, lane by lane in turn, as wide as they are."""
    return s.Shuffle(dtype, x.lanes, x, y, _in_turn(x.lanes, BLOCK * 8 // dtype.bits, high))


@cache
def _in_turn(lanes: int, block: int, high: int) -> tuple[int, ...]:
    """What `_unpacked` picks of two vectors of so many lanes."""
    starts = range(high * block // 2, lanes, block)
    return tuple(lane for start in starts for at in range(start, start + block // 2) for lane in (at, lanes + at))


def in_order(vectors: Sequence[Scalar]) -> list[Scalar]:
    """Four vectors in `channel_order`, as vectors of neighbouring channels."""
    lanes = vectors[0].lanes
    order = channel_order(lanes)
    where = {int(order[v, lane]): (v, lane) for v in range(len(vectors)) for lane in range(lanes)}
    result: list[Scalar] = []
    for at in range(0, 4 * lanes, lanes):
        pieces = [[where[c] for c in range(first, first + 4)] for first in range(at, at + lanes, 4)]
        parts = [
            s.Shuffle(vectors[0].dtype, 4, vectors[piece[0][0]], vectors[piece[0][0]], tuple(lane for _, lane in piece))
            for piece in pieces
        ]
        while len(parts) > 1:
            parts = [
                s.Shuffle(low.dtype, 2 * low.lanes, low, high, tuple(range(2 * low.lanes)))
                for low, high in zip(parts[::2], parts[1::2], strict=True)
            ]
        result.append(parts[0])
    return result
