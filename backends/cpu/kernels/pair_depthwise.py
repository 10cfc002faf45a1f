"""Depthwise convolutions of bf16: a pixel and the one below it are multiplied by one instruction.

The tiles are those of `depthwise`. Of each column under a tile the pixels of two rows are interleaved, channel by
channel, once for all sums that they are part of; an odd last row is interleaved with zeros. Rows above and below the
image are rows of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim, symbol
from ....ir.dtypes import BF16, F32, I64, U16, U32
from ....ir.loops import Alias, Define, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from ..dot_products import PAIRS
from .convolution import Convolution, find_convolution
from .depthwise import _Depthwise
from .packing import first_lanes, pairs_of
from .register_tile import Tile, accumulators

LANES = (4, 8, 16)
"""Of sums, for which there is the instruction."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernel of a depthwise convolution of bf16 over an image of known width, where pairs are multiplied by one
    instruction; None for others."""
    found = find_convolution(region, turns=False)  # pairs are of neighbours in a column
    if found is None or found.channels != 1 or found.filters != 1 or PAIRS.name not in target.dot_products:
        return None
    if found.input.dtype != BF16 or found.dtype != F32 or found.windows.kernel[0] == 1:
        return None
    if found.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    made = _PairDepthwise(found.region, target, found, found.outputs)
    return joined(found.copies, made.lowered()) if made.known_width and made.lanes in LANES else None


class _PairDepthwise(_Depthwise):
    def __init__(self, region: Region, target: Target, found: Convolution, outputs: Epilogue) -> None:
        super().__init__(region, target, found, outputs)
        self.pairs = -(-self.kernel[0] // 2)
        windows = found.windows
        reach = (self.pixels - 1) * windows.strides[1] + (self.kernel[1] - 1) * windows.dilations[1] + 1
        pixel = found.strides[2]
        assert isinstance(pixel, int)
        self.packed = Buffer("packed", U32, self.pairs * self.kernel[1] * self.padded)
        self.zeros = Buffer("zeros", U16, reach * pixel + self.padded)

    def lowered(self) -> Lowered:
        stride = f"s{self.found.windows.strides[1]}" if self.found.windows.strides[1] != 1 else ""
        name = f"bf16_depthwise{self.kernel[0]}x{self.kernel[1]}{stride}_{self.pixels}x{self.lanes}"
        convolve = call(self.region, name, self._body(), (self.packed, self.zeros), shared=True)
        made = {self.packed.name: self._pack}
        if self.zeros.name in convolve.arguments:
            size = self.zeros.size
            assert isinstance(size, int)
            made[self.zeros.name] = lambda: np.zeros(size, np.uint16)
        return Lowered((convolve,), packed=made)

    def _pack(self) -> np.ndarray:
        """Weights as [pair of kernel rows, kernel column, channel], zeros behind the last channel."""
        weights = self.found.weights.reshape(self.channels, *self.kernel).transpose(2, 1, 0)
        result = np.zeros((self.pairs, self.kernel[1], self.padded), np.uint32)
        result[..., : self.channels] = pairs_of(np.ascontiguousarray(weights)).swapaxes(0, 1)
        return result.reshape(-1)

    def _clip(self, row: Dim) -> Iterator[Statement]:
        yield from ()

    def _rows(self, row: Dim, at: Dim, channel: Dim) -> tuple[list[Buffer], list[Statement]]:
        """The input rows under a tile, from its first column on."""
        found, windows = self.found, self.found.windows
        start = found.start + symbol("image", 0) * found.strides[0] + channel
        start = start + (at * windows.strides[1] - windows.before[1]) * found.strides[2]
        rows = [Buffer(f"row{tap}", U16) for tap in range(self.kernel[0])]
        statements: list[Statement] = []
        for tap, buffer in enumerate(rows):
            there = self._first(row) + tap * windows.dilations[0]
            inside = (s.const(0, I64) <= s.index(there)) & (s.index(there) < s.index(windows.input[0]))
            line = there % self.ring if self.ring else there
            offset = start + line * found.strides[1]
            if isinstance(inside, s.Const) and inside.value:
                statements.append(Alias(buffer, found.input, offset))
            else:
                statements.append(Alias(buffer, found.input, offset, inside, self.zeros))
        return rows, statements

    def _tile(
        self, row: Dim, at: Dim, taps: Sequence[tuple[int, ...]], channel: Dim, valid: int
    ) -> Iterator[Statement]:
        lanes, windows = self.lanes, self.found.windows
        tile = Tile(len(taps), 1, lanes)
        sums = accumulators(tile, F32)
        yield from self._cleared(sums)
        rows, aliases = self._rows(row, at, channel)
        yield from aliases
        predicate = None if valid == lanes else first_lanes(valid, lanes)
        readers: dict[int, list[tuple[int, int]]] = {}
        for i, entry in enumerate(taps):
            for t in entry:
                readers.setdefault(i * windows.strides[1] + t * windows.dilations[1], []).append((i, t))

        def pixels(tap: int, position: int) -> Scalar:
            if tap >= self.kernel[0]:
                return s.const(0, U16, lanes)
            return s.load(rows[tap], position * self.found.strides[2], lanes, predicate)

        for pair in range(self.pairs):
            weights = {}
            for t in sorted({t for entry in taps for t in entry}):
                weights[t] = Buffer(f"w{pair}_{t}", U32, 1, "register", lanes)
                place = (pair * self.kernel[1] + t) * self.padded + channel
                yield Define(weights[t], s.load(self.packed, place, lanes))
            for position, users in sorted(readers.items()):
                register = Buffer(f"x{pair}_{position}", U16, 1, "register", 2 * lanes)
                both = pixels(2 * pair, position), pixels(2 * pair + 1, position)
                order = tuple(lane // 2 + lane % 2 * lanes for lane in range(2 * lanes))
                yield Define(register, s.Shuffle(U16, 2 * lanes, *both, order))
                for i, t in users:
                    x, w = s.load(register, 0, 2 * lanes), s.load(weights[t], 0, lanes)
                    yield Store(sums, i, PAIRS(s.load(sums, i, lanes), x, w))
        yield from self._finish(tile, row, at, channel, valid)
