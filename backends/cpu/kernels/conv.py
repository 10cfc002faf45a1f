"""Convolutions over channels-last images [batch, height, width, channels], as matrix products without an im2col.

A register tile holds neighbouring pixels of one output row by some vectors of output channels. Inside the image all
taps of a kernel row read one contiguous stretch per pixel; at the left and right border each tap takes a row pointer
per pixel, to zeros where it is outside. Taps above and below the image are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, floordiv, symbol
from ....ir.dtypes import I64
from ....ir.loops import Alias, For, Let, Statement
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from .convolution import Convolution, axes, find_convolution, find_phases, inside_pixels, tap_rows
from .division import TASKS_PER_THREAD, divides_rows, row_blocks
from .epilogue import finish_tile
from .packing import Columns, Panels, by_columns, known, packed
from .register_tile import Starts, Tile, choose_tile, multiply_accumulate

# Output rows in one task of a parallel loop where their number is only known at run time.
TASK_ROWS = 4


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region whose anchor is a channels-last convolution with constant weights; None for others.

    Plain matrix products (`gemm`) and depthwise convolutions have faster schedules of their own.
    """
    found = find_convolution(region)
    if found is None:
        return None
    if found.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    return joined(found.copies, _Conv(target, found, found.outputs).lowered())


def transposed(region: Region, target: Target) -> Lowered | None:
    """The kernels of a channels-last transposed convolution with constant weights, one for each phase of its stride."""
    phases = find_phases(region)
    if phases is None:
        return None
    result: Lowered | None = phases[0].copies
    for number, found in enumerate(phases):
        if 0 in found.windows.output:
            continue  # strides larger than the output: no pixel is of this phase
        if found.outputs is None:
            return through_memory(region, lambda alone: transposed(alone, target))
        if result is not None:
            result = joined(result, _Conv(target, found, found.outputs, str(number)).lowered())
    return result


class _Conv:
    """The kernel of one convolution; `suffix` tells its constants from those of others of the same region."""

    def __init__(self, target: Target, found: Convolution, outputs: Epilogue, suffix: str = "") -> None:
        region = found.region
        self.region, self.target, self.found, self.outputs = region, target, found, outputs
        windows = found.windows
        self.kernel = tuple(known(d) for d in windows.kernel)
        self.depth = self.kernel[0] * self.kernel[1] * found.channels
        height = windows.output[0] if isinstance(windows.output[0], int) else 32
        rows = windows.output[1]
        self.tile = choose_tile(rows, found.filters, self.depth, found.dtype, target, height, True, found.dot)
        self.panels = Panels(self.tile, found.filters, self.depth)
        self.packed = Buffer(f"packed{suffix}", found.dtype, found.group * known(self.panels.size))
        self.zeros = Buffer(f"zeros{suffix}", found.input.dtype, found.channels)
        self.masked = target.has("avx512vl")

    @property
    def kind(self) -> str:
        """What stands in the kernel's name for the type of the image."""
        return (self.found.dtype if self.found.dot is None else self.found.dot.left).name

    @property
    def by_rows(self) -> bool:
        """Whether threads share the rows of the image, not its channels."""
        found, (height, width) = self.found, self.found.windows.output
        if not (isinstance(height, int) and isinstance(width, int) and isinstance(found.images, int)):
            return False
        size, stride = found.dtype.bytes, found.windows.strides
        image = found.images * height * width * size * found.group
        weights = found.group * self.depth * found.filters * size
        threads = self.target.threads
        enough = height * found.images >= 2 * threads
        return enough and divides_rows(
            image * found.channels * stride[0] * stride[1], weights, image * found.filters, threads
        )

    def lowered(self) -> Lowered:
        found = self.found
        stride = f"s{found.windows.strides[1]}" if found.windows.strides[1] != 1 else ""
        name = f"{self.kind}_conv{self.kernel[0]}x{self.kernel[1]}{stride}_{self.tile}"
        convolve = call(self.region, name, self._body(), (self.packed, self.zeros, *self._constants()), shared=True)
        made: dict[str, Callable[[], np.ndarray]] = {self.packed.name: self._pack}
        if self.zeros.name in convolve.arguments:
            made[self.zeros.name] = self._rim
        return Lowered((convolve,), packed=made)

    def _pack(self) -> np.ndarray:
        found = self.found
        grouped = found.weights.reshape(found.group, found.filters, found.channels, *self.kernel)
        matrices = grouped.transpose(0, 3, 4, 2, 1).reshape(found.group, self.depth, found.filters)
        return packed(matrices, self.panels, found.dtype)

    # Tasks: (group, panel, image, block of output rows); or (image, block, group, panel) where threads share the rows

    def _body(self) -> Iterator[Statement]:
        found, windows = self.found, self.found.windows
        height = windows.output[0]
        panels = known(self.panels.count)
        block = self._block_rows()
        blocks = ceildiv(height, block)
        tasks = found.group * panels * found.images * blocks
        task = k.index_symbol("task", tasks)
        if self.by_rows:
            column, block_of, image_of = (
                task % (found.group * panels),
                task // (found.group * panels) % blocks,
                task // (found.group * panels * blocks),
            )
        else:
            column, block_of, image_of = (
                task // (blocks * found.images),
                task % blocks,
                task // blocks % found.images,
            )
        yield For(
            "task",
            tasks,
            (
                Let("block", block_of),
                Let("image", image_of),
                Let("panel", column % panels),
                Let("group", column // panels),
                Let("rows", dim_min(block, height - symbol("block", 0, blocks - 1) * block)),
                *self._panels(block),
            ),
            "parallel",
        )

    def _block_rows(self) -> int:
        height, images = self.found.windows.output[0], self.found.images
        if not isinstance(height, int):
            return TASK_ROWS
        others = self.found.group * known(self.panels.count) * (images if isinstance(images, int) else 1)
        if self.by_rows:
            return -(-height // row_blocks(height, others, self.target.threads))
        blocks = max(1, -(-self.target.threads * TASKS_PER_THREAD // max(others, 1)))
        return max(1, -(-height // blocks))

    def _constants(self) -> tuple[Buffer, ...]:
        """What the kernel reads besides."""
        return ()

    def _starts(self, columns: Columns, column: Dim) -> Starts | None:
        """What the sums of a tile begin with where that is not 0."""
        return None

    def _element(self, pixels: Buffer, start: Dim, position: Dim) -> Scalar:
        """The element so many positions behind the start of a pixel."""
        return self._read(s.load(pixels, start + position))

    def _read(self, element: Scalar) -> Scalar:
        """An element of the image as it is multiplied."""
        return s.cast(element, self.found.dtype)

    def _rim(self) -> np.ndarray:
        """What stands for a pixel outside the image."""
        return np.zeros(self.found.channels, self.found.input.dtype.numpy)

    def _panels(self, block: int) -> tuple[Statement, ...]:
        """What a task does, for each width of panels."""

        def made(columns: Columns) -> Iterator[Statement]:
            panel: Dim = symbol("panel", 0, columns.first + columns.count - 1) if columns.count != 1 else columns.first
            row = symbol("block", 0) * block + k.index_symbol("row", symbol("rows", 0, block))
            yield For("row", symbol("rows", 0, block), tuple(self._row(columns, panel * self.tile.width, row)))

        return by_columns(self.panels, symbol("panel", 0), made)

    def _row(self, columns: Columns, column: Dim, row: Dim) -> Iterator[Statement]:
        """One output row of one panel: which taps and which tiles are inside, then the tiles."""
        windows = self.found.windows
        width, size = windows.output[1], self.tile.rows
        low, high = tap_rows(windows, row)
        yield Let("low", low)
        yield Let("taps", dim_max(0, high - low))
        # The tiles all of whose taps are inside the image lie between two borders.
        tiles = ceildiv(width, size)
        full = floordiv(width, size)
        if windows.padded[1]:
            first, last = inside_pixels(windows)
            first_inside = dim_min(full, dim_max(0, ceildiv(first, size)))
            last_inside = dim_max(first_inside, dim_min(full, floordiv(last + 1, size)))
        else:
            first_inside, last_inside = 0, full
        inside = last_inside - first_inside
        if inside != 0:
            yield Let("start", first_inside)
            at = (symbol("start", 0) + k.index_symbol("tile", inside)) * size
            yield For("tile", inside, tuple(self._tile(columns, column, row, at, border=False)))
        outside = tiles - inside
        if outside != 0:
            number = k.index_symbol("tile", outside)
            after = s.select(
                s.index(number) < s.index(first_inside), s.index(number), s.index(number + last_inside - first_inside)
            )
            body = (Let("at", after), *self._tile(columns, column, row, symbol("at", 0, tiles - 1) * size, border=True))
            yield For("tile", outside, body)

    def _tile(self, columns: Columns, column: Dim, row: Dim, at: Dim, border: bool) -> Iterator[Statement]:
        found, windows = self.found, self.found.windows
        tile = Tile(self.tile.rows, columns.vectors, self.tile.lanes)
        channels, lanes = found.channels, tile.lanes
        image_stride, row_stride, pixel_stride = found.strides
        group, image = symbol("group", 0, found.group - 1), symbol("image", 0)
        start = found.start + group * channels + image * image_stride
        panel = Buffer("right", found.dtype)
        yield Alias(panel, self.packed, group * self.panels.size + column * self.depth)
        (strides, spreads, befores, extents) = axes(windows)
        tap = symbol("low", 0) + k.index_symbol("tap_row", symbol("taps", 0, self.kernel[0]))
        line = (row * strides[0] - befores[0] + tap * spreads[0]) * row_stride
        x = at * strides[1] - befores[1]
        taps: list[tuple[str, Dim]] = [("tap_row", symbol("taps", 0, self.kernel[0]))]
        setup: list[Statement] = []
        if not border:
            pixels = Buffer("left", found.input.dtype)
            yield Alias(pixels, found.input, start + x * pixel_stride)
            merged = (spreads[1] == 1 and pixel_stride == channels) or self.kernel[1] == 1
            if merged:
                inner = k.index_symbol("c", self.kernel[1] * channels)
                taps.append(("c", self.kernel[1] * channels))
                position, weight = inner, inner
            else:
                tap_column, c = k.index_symbol("tap_column", self.kernel[1]), k.index_symbol("c", channels)
                taps += [("tap_column", self.kernel[1]), ("c", channels)]
                position, weight = tap_column * spreads[1] * pixel_stride + c, tap_column * channels + c

            def left(i: int) -> Scalar:
                return self._element(pixels, line + i * strides[1] * pixel_stride, position)
        else:
            tap_column, c = k.index_symbol("tap_column", self.kernel[1]), k.index_symbol("c", channels)
            taps += [("tap_column", self.kernel[1]), ("c", channels)]
            weight = tap_column * channels + c
            pointers = [Buffer(f"left{i}", found.input.dtype) for i in range(tile.rows)]
            for i, pointer in enumerate(pointers):
                there = x + i * strides[1] + tap_column * spreads[1]
                condition = (s.const(0, I64) <= s.index(there)) & (s.index(there) < s.index(extents[1]))
                if i and not self._whole:
                    condition = condition & (s.index(at + i) < s.index(windows.output[1]))
                offset = start + line + there * pixel_stride
                if isinstance(condition, s.Const) and condition.value:
                    setup.append(Alias(pointer, found.input, offset))
                else:
                    setup.append(Alias(pointer, found.input, offset, condition, self.zeros))

            def left(i: int) -> Scalar:
                return self._element(pointers[i], 0, c)

        def right(v: int) -> Scalar:
            inside = (tap * (self.kernel[1] * channels) + weight) * (columns.vectors * lanes)
            return s.load(panel, inside + v * lanes, lanes)

        starts = self._starts(columns, column)
        yield from multiply_accumulate(tile, found.sums, taps, left, right, setup, dot=found.dot, start=starts)
        yield from self._finish(tile, columns, column, row, at, border and not self._whole)

    @property
    def _whole(self) -> bool:
        """Whether tiles cover an output row exactly."""
        width = self.found.windows.output[1]
        return isinstance(width, int) and width % self.tile.rows == 0

    def _finish(self, tile: Tile, columns: Columns, column: Dim, row: Dim, at: Dim, partial: bool) -> list[Statement]:
        """The epilogue of a tile; of a partial one, for the pixels that exist."""
        found, width = self.found, self.found.windows.output[1]
        narrow = columns.valid != tile.lanes
        return finish_tile(
            self.outputs,
            tile,
            found.sums,
            lambda i: found.pixel(symbol("image", 0), row, at + i),
            symbol("group", 0, found.group - 1) * found.filters + column,
            lambda v: columns.valid if narrow and v == tile.vectors - 1 else None,
            self.masked,
            (lambda i: s.index(at + i) < s.index(width)) if partial else None,
            dim_min(tile.rows, width - at) if partial else None,
        )
