"""3x3 convolutions of stride 1 by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016), channels last.

Each 6x6 stretch of the image becomes 36 numbers per channel, one for each of 36 matrix products over the channels;
their results become 4x4 outputs: 36 multiplications where the definition makes 144. Blocks of stretches are done one
after another, so that their transformed numbers stay in a cache; weights are transformed and packed when the model is
compiled. Sums are of numbers that were added and subtracted before: the error is some ten times the definition's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, symbol
from ....ir.dtypes import BOOL, F32, I64
from ....ir.loops import Alias, Alloc, Define, For, If, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from .convolution import Convolution, find_convolution
from .epilogue import finish_tile
from .packing import Columns, Panels, column_runs, packed
from .register_tile import (
    L2_BYTES_PER_CYCLE,
    L3_BYTES_PER_CYCLE,
    Tile,
    accumulators,
    choose_tile,
    cycles,
    multiply_accumulate,
    remainders,
)

OUT, IN, FREQUENCIES = 4, 6, 36
"""Outputs and inputs of a stretch along an axis, and products."""
WEIGHTS = np.array(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
     [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)  # fmt: skip
"""What three weights along an axis become."""
TRANSFORM_CYCLES = 110.0
"""Of one vector of channels of a stretch, in and out together, beside what its memory takes."""
WORTH = 0.8
"""The share of the direct convolution's time from which on the other way is not worth its error."""
USUAL_TILES = 196
"""Stretches to plan for where their number is only known at run time."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernel of a region whose anchor is a 3x3 convolution that is faster this way; None for others."""
    if not target.winograd:
        return None
    found = find_convolution(region)
    if found is None or not _applies(found, target):
        return None
    plan = choose_plan(found, target)
    if plan is None:
        return None
    if found.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    return joined(found.copies, _Winograd(target, found, found.outputs, plan).lowered())


def _applies(found: Convolution, target: Target) -> bool:
    windows, lanes = found.windows, target.lanes(found.dtype.bits)
    return (
        tuple(windows.kernel) == (3, 3)
        and set(windows.strides) == set(windows.dilations) == {1}
        and found.group == 1
        and found.dtype == found.input.dtype == F32
        and found.channels % lanes == found.filters % lanes == 0
        and all(isinstance(pad, int) for pad in windows.before)
    )


@dataclass(frozen=True)
class Plan:
    """Stretches of a block, the register tile of the products, and how long all takes, in cycles."""

    block: int
    tile: Tile
    cycles: float


def choose_plan(found: Convolution, target: Target) -> Plan | None:
    """The fastest block size; None where the definition is about as fast."""
    height, width = found.windows.output
    known = isinstance(height, int) and isinstance(width, int)
    stretches = ceildiv(height, OUT) * ceildiv(width, OUT) if known else USUAL_TILES
    assert isinstance(stretches, int)
    images = found.images if isinstance(found.images, int) else 1
    if stretches == 0 or images == 0:
        return None
    sizes = sorted({min(stretches, n) for n in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 196)})
    plans = [_plan(found, target, size, stretches, images) for size in sizes]
    best = min(plans, key=lambda plan: plan.cycles)
    pixels = (height * width if known else USUAL_TILES * OUT * OUT) * images
    assert isinstance(pixels, int)
    return best if best.cycles < WORTH * _direct(found, target, pixels) else None


def _plan(found: Convolution, target: Target, block: int, stretches: int, images: int) -> Plan:
    """What blocks of this size cost: arithmetic, and each step's traffic to the cache in which it finds its data."""
    channels, filters, lanes = found.channels, found.filters, target.lanes(32)
    tile = choose_tile(block, filters, channels, F32, target)
    blocks = images * -(-stretches // block)
    weights = FREQUENCIES * channels * filters * F32.bytes
    inside = FREQUENCIES * block * (channels + filters) * F32.bytes
    rows = -(-block // tile.rows)
    product = FREQUENCIES * channels * rows * -(-filters // tile.width) * cycles(tile.rows, tile.vectors, target, 1e9)
    near = weights + inside <= target.l2_bytes * 3 // 4
    streamed = weights / (L2_BYTES_PER_CYCLE if near else L3_BYTES_PER_CYCLE)
    # Written and read once each.
    moved = 2 * inside / (L2_BYTES_PER_CYCLE if inside <= target.l2_bytes * 3 // 4 else L3_BYTES_PER_CYCLE)
    transforms = TRANSFORM_CYCLES * block * (channels + filters) / (2 * lanes)
    # With several threads, blocks that cannot be shared evenly leave some idle.
    turns = -(-blocks // target.threads) * target.threads / blocks
    return Plan(block, tile, blocks * turns * (max(product, streamed) + moved + transforms))


def _direct(found: Convolution, target: Target, pixels: int) -> float:
    """Cycles of the direct convolution, at the speed that it reaches on most images."""
    lanes = target.lanes(32)
    return 1.1 * pixels * 9 * found.channels * -(-found.filters // lanes) / 2


class _Winograd:
    def __init__(self, target: Target, found: Convolution, outputs: Epilogue, plan: Plan) -> None:
        self.region, self.target, self.found, self.outputs = found.region, target, found, outputs
        self.block, self.tile, self.lanes = plan.block, plan.tile, plan.tile.lanes
        self.channels, self.filters = found.channels, found.filters
        self.height, self.width = found.windows.output
        self.across = ceildiv(self.width, OUT)
        self.stretches = ceildiv(self.height, OUT) * self.across
        self.panels = Panels(self.tile, self.filters, self.channels)
        # One vector more between frequencies: distances of powers of 2 would fall into the same sets of the cache.
        self.input_step = self.block * self.channels + self.lanes
        self.output_step = self.block * self.filters + self.lanes
        self.tasks = target.threads
        self.packed = Buffer("packed", F32, FREQUENCIES * _known(self.panels.size))
        self.zeros = Buffer("zeros", F32, self.channels)
        self.transformed = Buffer("transformed", F32, self.tasks * FREQUENCIES * self.input_step)
        self.products = Buffer("products", F32, self.tasks * FREQUENCIES * self.output_step)
        self.masked = target.has("avx512vl")

    def lowered(self) -> Lowered:
        name = f"f32_winograd_{self.tile}_{self.block}"
        buffers = (self.packed, self.zeros, self.transformed, self.products)
        convolve = call(self.region, name, (self._tasks(),), buffers)
        made: dict[str, Callable[[], np.ndarray]] = {self.packed.name: self._pack}
        if self.zeros.name in convolve.arguments:
            made[self.zeros.name] = lambda: np.zeros(self.channels, np.float32)
        return Lowered((convolve,), (self.transformed, self.products), made)

    def _pack(self) -> np.ndarray:
        """The transformed weights, of each frequency as panels of the product's right operand."""
        weights = self.found.weights.astype(np.float64)
        transformed = np.einsum("ik,fckl,jl->ijcf", WEIGHTS, weights, WEIGHTS, optimize=True)
        matrices = transformed.reshape(FREQUENCIES, self.channels, self.filters).astype(np.float32)
        return packed(matrices, self.panels, F32)

    # Tasks: a share of the blocks each, with memory of its own for what is transformed

    def _tasks(self) -> Statement:
        per_image = ceildiv(self.stretches, self.block)
        blocks = per_image * self.found.images
        task = k.index_symbol("task", self.tasks)
        first = task * blocks // self.tasks
        block = symbol("first", 0) + symbol("step", 0)
        start = symbol("start", 0)
        body = (
            Let("block", block),
            Let("image", symbol("block", 0) // per_image),
            Let("start", symbol("block", 0) % per_image * self.block),
            Let("count", self._count(start)),
            self._input_stretches(),
            self._multiply(),
            self._output_stretches(),
        )
        share = (task + 1) * blocks // self.tasks - symbol("first", 0)
        here = (
            Let("first", first),
            Alias(Buffer("inside", F32), self.transformed, task * FREQUENCIES * self.input_step),
            Alias(Buffer("made", F32), self.products, task * FREQUENCIES * self.output_step),
            For("step", share, body),
        )
        return For("task", self.tasks, here, "parallel")

    def _count(self, start: Dim) -> Dim:
        """Stretches of a block: fewer in the last one."""
        even = isinstance(self.stretches, int) and self.stretches % self.block == 0
        return self.block if even else dim_min(self.block, self.stretches - start)

    @property
    def count(self) -> Dim:
        return symbol("count", 0, self.block)

    def _place(self) -> list[Statement]:
        """Names the stretch's row and column among those of its image."""
        stretch = symbol("start", 0) + k.index_symbol("stretch", self.count)
        return [Let("down", stretch // self.across), Let("right_of", stretch % self.across)]

    # From the image

    def _input_stretches(self) -> Statement:
        windows = self.found.windows
        (above, left), (height, width) = windows.before, windows.input
        top, start = symbol("down", 0) * OUT - above, symbol("right_of", 0) * OUT - left
        inside = s.const(True, BOOL)
        for first, extent in ((top, height), (start, width)):
            inside = inside & (s.const(0, I64) <= s.index(first)) & (s.index(first + IN) <= s.index(extent))
        image_step, row_step, column_step = self.found.strides
        base = self.found.start + symbol("image", 0) * image_step
        corner = Buffer("corner", F32)
        within: list[Statement] = [Alias(corner, self.found.input, base + top * row_step + start * column_step)]
        within.append(self._transform_input(lambda i, j: (corner, i * row_step + j * column_step)))
        border: list[Statement] = []
        pixels = [[Buffer(f"pixel{i}{j}", F32) for j in range(IN)] for i in range(IN)]
        for i in range(IN):
            for j in range(IN):
                y, x = top + i, start + j
                there = s.const(True, BOOL)
                for place, extent in ((y, height), (x, width)):
                    there = there & (s.const(0, I64) <= s.index(place)) & (s.index(place) < s.index(extent))
                offset = base + y * row_step + x * column_step
                border.append(Alias(pixels[i][j], self.found.input, offset, there, self.zeros))
        border.append(self._transform_input(lambda i, j: (pixels[i][j], 0)))
        return For("stretch", self.count, (*self._place(), If(inside, tuple(within), tuple(border))))

    def _transform_input(self, pixel: Callable[[int, int], tuple[Buffer, Dim]]) -> Statement:
        """All channels of one stretch, a vector at a time: along the rows, then along the columns."""
        lanes = self.lanes
        at = k.index_symbol("vector", self.channels // lanes) * lanes
        body: list[Statement] = []
        rows: list[list[Scalar]] = []
        for i in range(IN):
            loaded = []
            for j in range(IN):
                buffer, offset = pixel(i, j)
                loaded.append(_named(body, f"d{i}{j}", s.load(buffer, offset + at, lanes)))
            rows.append([_named(body, f"t{i}{j}", value) for j, value in enumerate(_to_frequencies(loaded))])
        place = k.index_symbol("stretch", self.count) * self.channels + at
        for j in range(IN):
            for i, value in enumerate(_to_frequencies([rows[i][j] for i in range(IN)])):
                body.append(Store(Buffer("inside", F32), (i * IN + j) * self.input_step + place, value))
        return For("vector", self.channels // lanes, tuple(body))

    # The products

    def _multiply(self) -> Statement:
        body: list[Statement] = []
        for number, columns in enumerate(column_runs(self.panels)):
            index = f"panel{number}"
            panel = columns.first + k.index_symbol(index, columns.count)
            body.append(For(index, columns.count, tuple(self._panel(columns, panel * self.tile.width))))
        return For("frequency", FREQUENCIES, tuple(body))

    def _panel(self, columns: Columns, column: Dim) -> Iterator[Statement]:
        rows, even = self.tile.rows, isinstance(self.stretches, int) and self.stretches % self.block == 0
        count: Dim = self.block if even else self.count
        full = count // rows
        at = k.index_symbol("tile", full) * rows
        yield For("tile", full, tuple(self._tile(Tile(rows, columns.vectors, self.lanes), columns, column, at)))
        done = full * rows
        if isinstance(count, int):
            if count % rows:
                small = Tile(count % rows, columns.vectors, self.lanes)
                yield For("last", 1, tuple(self._tile(small, columns, column, done)))
            return
        left = count - done
        for size in remainders(rows):
            number = left // size
            at = done + k.index_symbol("tile", number) * size
            small = Tile(size, columns.vectors, self.lanes)
            yield For("tile", number, tuple(self._tile(small, columns, column, at)))
            done, left = done + number * size, left - number * size

    def _tile(self, tile: Tile, columns: Columns, column: Dim, row: Dim) -> Iterator[Statement]:
        frequency, lanes = k.index_symbol("frequency", FREQUENCIES), self.lanes
        left, right = Buffer("left", F32), Buffer("right", F32)
        c = k.index_symbol("c", self.channels)
        yield Alias(left, Buffer("inside", F32), frequency * self.input_step + row * self.channels)
        yield Alias(right, self.packed, frequency * self.panels.size + column * self.channels)
        yield from multiply_accumulate(
            tile,
            F32,
            [("c", self.channels)],
            lambda i: s.load(left, i * self.channels + c),
            lambda v: s.load(right, c * (columns.vectors * lanes) + v * lanes, lanes),
        )
        sums = accumulators(tile, F32)
        for i in range(tile.rows):
            for v in range(tile.vectors):
                offset = frequency * self.output_step + (row + i) * self.filters + column + v * lanes
                yield Store(Buffer("made", F32), offset, s.load(sums, i * tile.vectors + v, lanes))

    # To the image

    def _output_stretches(self) -> Statement:
        row, at = symbol("down", 0) * OUT, symbol("right_of", 0) * OUT
        ends = [(row, self.height), (at, self.width)]
        partial = [end for end in ends if not (isinstance(end[1], int) and end[1] % OUT == 0)]
        whole = For("vector", self.filters // self.lanes, tuple(self._outputs(row, at, False)))
        if not partial:
            return For("stretch", self.count, (*self._place(), whole))
        inside = s.const(True, BOOL)
        for place, extent in partial:
            inside = inside & (s.index(place + OUT) <= s.index(extent))
        border = For("vector", self.filters // self.lanes, tuple(self._outputs(row, at, True)))
        return For("stretch", self.count, (*self._place(), If(inside, (whole,), (border,))))

    def _outputs(self, row: Dim, at: Dim, partial: bool) -> Iterator[Statement]:
        """The 4x4 outputs of a stretch for one vector of filters."""
        lanes = self.lanes
        first = k.index_symbol("vector", self.filters // lanes) * lanes
        place = k.index_symbol("stretch", self.count) * self.filters + first
        body: list[Statement] = []
        lines: list[list[Scalar]] = []
        for j in range(IN):
            column = [
                _named(body, f"m{i}{j}", s.load(Buffer("made", F32), (i * IN + j) * self.output_step + place, lanes))
                for i in range(IN)
            ]
            lines.append([_named(body, f"u{i}{j}", value) for i, value in enumerate(_from_frequencies(column))])
        yield from body
        tile = Tile(OUT, 1, lanes)
        for i in range(OUT):
            line: list[Statement] = [Alloc(accumulators(tile, F32))]
            for j, value in enumerate(_from_frequencies([lines[c][i] for c in range(IN)])):
                line.append(Store(accumulators(tile, F32), j, value))
            line += finish_tile(
                self.outputs,
                tile,
                F32,
                lambda j, i=i: self.found.pixel(symbol("image", 0), row + i, at + j),  # type: ignore[misc]
                first,
                lambda v: None,
                self.masked,
                (lambda j: s.index(at + j) < s.index(self.width)) if partial else None,
                dim_min(OUT, self.width - at) if partial else None,
            )
            exists = s.index(row + i) < s.index(self.height) if partial else s.const(True, BOOL)
            yield If(exists, tuple(line)) if partial else For(f"line{i}", 1, tuple(line))


def _named(body: list[Statement], name: str, value: Scalar) -> Scalar:
    """A register variable with the value."""
    register = Buffer(name, F32, 1, "register", value.lanes)
    body.append(Define(register, value))
    return s.load(register, 0, value.lanes)


def _times(factor: float, value: Scalar, more: Scalar) -> Scalar:
    """factor * value + more."""
    return s.fma(s.const(factor, F32, value.lanes), value, more)


def _to_frequencies(d: Sequence[Scalar]) -> list[Scalar]:
    """What six inputs along an axis become."""
    even, odd = _times(-4, d[2], d[4]), _times(-4, d[1], d[3])
    outer, inner = d[4] - d[2], d[3] - d[1]
    return [
        _times(4, d[0], _times(-5, d[2], d[4])),
        even + odd,
        even - odd,
        _times(2, inner, outer),
        _times(-2, inner, outer),
        _times(4, d[1], _times(-5, d[3], d[5])),
    ]


def _from_frequencies(m: Sequence[Scalar]) -> list[Scalar]:
    """The four outputs along an axis of six sums."""
    plus, minus = m[1] + m[2], m[1] - m[2]
    wide_plus, wide_minus = m[3] + m[4], m[3] - m[4]
    return [
        m[0] + plus + wide_plus,
        _times(2, wide_minus, minus),
        _times(4, wide_plus, plus),
        _times(8, wide_minus, minus) + m[5],
    ]


def _known(dim: Dim) -> int:
    assert isinstance(dim, int), f"{dim} is not a constant"
    return dim
