"""Transposed convolutions to one channel whose windows do not overlap: the last layer of many segmentation networks.

With kernels as large as the strides each input pixel makes a patch of outputs of its own. All of the patch is a vector
of sums, to which each input channel adds its value times the channel's patch of weights: one pass over the image where
one convolution for each phase of the strides would read it as often as the patch has elements, with one lane at work.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, floordiv, symbol
from ....ir.loops import Alias, Alloc, For, Let, Statement, Store
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from .convolution import Convolution, find_phases
from .division import TASKS_PER_THREAD
from .register_tile import CHAINS, Tile, accumulators, multiply_accumulate


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernel of such a convolution over a channels-last image of known width; None for others."""
    anchor = region.anchor
    phases = None if anchor is None or anchor.attributes.get("group", 1) != 1 else find_phases(region)
    if not phases or not 1 < len(phases) <= target.lanes(phases[0].dtype.bits):
        return None
    first = phases[0]
    width = first.windows.output[1]
    same = all(
        phase.windows.kernel == (1, 1)
        and phase.windows.before == (0, 0)
        and phase.windows.output == phase.windows.input
        for phase in phases
    )
    if not same or first.filters != 1 or first.sums != first.dtype or not isinstance(width, int) or width < 2:
        return None
    if first.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    return joined(first.copies, _Patches(target, phases, first.outputs).lowered())


class _Patches:
    def __init__(self, target: Target, phases: list[Convolution], outputs: Epilogue) -> None:
        self.target, self.phases, self.outputs, self.found = target, phases, outputs, phases[0]
        found = self.found
        assert found.region.anchor is not None
        strides = found.region.anchor.attributes.get("strides")
        assert isinstance(strides, list | tuple)
        across = int(str(strides[-1]))
        self.patch = (len(phases) // across, across)
        width = found.windows.output[1]
        assert isinstance(width, int)
        lanes = 1 << (len(phases) - 1).bit_length()
        self.tile, self.width = Tile(min(CHAINS, width), 1, lanes), width
        self.packed = Buffer("packed", found.dtype, found.channels * lanes)

    def lowered(self) -> Lowered:
        found = self.found
        name = f"{found.dtype}_upsample{self.patch[0]}x{self.patch[1]}_{self.tile}"
        kernel = call(found.region, name, tuple(self._body()), (self.packed,))
        return Lowered((kernel,), packed={self.packed.name: self._pack})

    def _pack(self) -> np.ndarray:
        """Weights as [channel, element of the patch], zeros behind the last."""
        found = self.found
        result = np.zeros((found.channels, self.tile.lanes), found.dtype.numpy)
        for number, phase in enumerate(self.phases):
            result[:, number] = phase.weights.reshape(found.channels)
        return result.reshape(-1)

    def _body(self) -> Iterator[Statement]:
        """Tasks are blocks of the rows of all images."""
        rows = self.found.images * self.found.windows.output[0]
        most = self.target.threads * TASKS_PER_THREAD
        block = ceildiv(rows, most)
        blocks = ceildiv(rows, block)
        first = k.index_symbol("task", blocks) * block
        yield For(
            "task",
            blocks,
            (
                Let("first", first),
                Let("count", dim_min(block, rows - first)),
                For("row", symbol("count", 0, block), tuple(self._row(symbol("first", 0, rows - 1)))),
            ),
            "parallel",
        )

    def _row(self, first: Dim) -> Iterator[Statement]:
        found, size = self.found, self.tile.rows
        height = found.windows.output[0]
        at = first + k.index_symbol("row", symbol("count", 0))
        yield Let("image", floordiv(at, height))
        yield Let("y", at % height)
        tiles = -(-self.width // size)
        # The last tile ends with the row: it does some pixels again.
        x = dim_min(k.index_symbol("tile", tiles) * size, self.width - size)
        yield For("tile", tiles, (Let("x", x), *self._tile(symbol("x", 0, self.width - size))))

    def _tile(self, x: Dim) -> Iterator[Statement]:
        found, tile = self.found, self.tile
        image, y = symbol("image", 0, found.images - 1), symbol("y", 0, found.windows.output[0] - 1)
        image_stride, row_stride, pixel_stride = found.strides
        pixels = Buffer("pixels", found.input.dtype)
        yield Alias(pixels, found.input, found.start + image * image_stride + y * row_stride + x * pixel_stride)
        c = k.index_symbol("c", found.channels)
        yield from multiply_accumulate(
            tile,
            found.dtype,
            [("c", found.channels)],
            lambda i: s.cast(s.load(pixels, c + i * pixel_stride), found.dtype),
            lambda v: s.load(self.packed, c * tile.lanes, tile.lanes),
        )
        yield from self._finish(x)

    def _finish(self, x: Dim) -> Iterator[Statement]:
        """Through memory the rows of neighbouring patches come to lie side by side."""
        found, tile = self.found, self.tile
        down, across = self.patch
        line = tile.rows * across
        sums = accumulators(tile, found.dtype)
        scratch = Buffer("scratch", found.dtype, down * line + tile.lanes, "stack")
        yield Alloc(scratch)
        # In order: lanes behind a row of the patch are overwritten by the next pixel's, or by the next row's first.
        for a in range(down):
            for i in range(tile.rows):
                total = s.load(sums, i, tile.lanes)
                part = tuple(min(a * across + b, tile.lanes - 1) for b in range(_power(across)))
                value = (
                    total if part == tuple(range(tile.lanes)) else s.Shuffle(found.dtype, len(part), total, total, part)
                )
                yield Store(scratch, a * line + i * across, value)
        image, y = symbol("image", 0, found.images - 1), symbol("y", 0, found.windows.output[0] - 1)
        j = k.index_symbol("j", line)
        for a, phase in enumerate(self.phases[::across]):
            here = dict(phase.pixel(image, y, 0))
            names = [name for name, old in here.items() if old != phase.pixel(image, y, 1)[name]]
            assert len(names) == 1, "the width is one of the anchor's axes"
            here[names[0]] = x * across + j
            yield self.outputs.loop(here, 0, line, scratch, a * line, "j")


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()
