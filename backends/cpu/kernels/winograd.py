"""Convolutions by Winograd's minimal filtering (Lavin & Gray 2016), channels last, of one or two axes.

Each stretch of the image becomes some numbers per channel, one for each of as many matrix products over the channels;
their results become the outputs of the stretch: F(4x4, 3x3) takes 36 multiplications where the definition makes 144.
Along each axis any algorithm of `filtering` serves, with its stride. Blocks of stretches are done one after another, so
that their transformed numbers stay in a cache; weights are transformed and packed when the model is compiled.

Sums are of numbers that were added and subtracted before, so that rounding errors are larger than the definition's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, symbol
from ....ir.dtypes import BF16, BOOL, F32, I64, U32
from ....ir.loops import Alias, Alloc, Define, For, If, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from ..dot_products import PAIRS, Dot
from .convolution import Convolution, find_convolution
from .epilogue import finish_tile
from .filtering import as_array, times
from .packing import Columns, Panels, column_runs, first_lanes, known, packed, pairs_of
from .register_tile import Tile, accumulators, multiply_accumulate, remainders
from .winograd_plan import Plan, applies, choose_plan

PACKED_AT_ONCE = 1 << 20
"""Transformed weights that are computed at once when a model is compiled, in f64."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernel of a region whose anchor is a convolution that is faster this way; None for others."""
    if not target.winograd:
        return None
    found = find_convolution(region)
    plan = choose_plan(found, target) if found is not None and applies(found) else None
    if found is None or plan is None:
        return None
    if found.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    return joined(found.copies, _Winograd(target, found, found.outputs, plan).lowered())


class _Winograd:
    def __init__(self, target: Target, found: Convolution, outputs: Epilogue, plan: Plan) -> None:
        self.region, self.target, self.found, self.outputs, self.plan = found.region, target, found, outputs, plan
        self.block, self.tile, self.lanes = plan.block, plan.tile, plan.tile.lanes
        self.axes = plan.axes
        self.frequencies = plan.axes[0].products * plan.axes[1].products
        self.channels, self.filters = found.channels, found.filters
        self.height, self.width = found.windows.output
        self.across = ceildiv(self.width, plan.axes[1].outputs)
        self.stretches = ceildiv(self.height, plan.axes[0].outputs) * self.across
        self.total = self.stretches * found.images
        self.depth = -(-self.channels // 2) if plan.narrow else self.channels
        self.panels = Panels(self.tile, self.filters, self.depth)
        self.broad = known(self.panels.padded)
        # One vector more between frequencies: distances of powers of 2 would fall into the same sets of the cache.
        self.output_step = self.block * self.broad + self.lanes
        self.tasks = target.threads
        # What lies between transform and product, and what is multiplied: perhaps bf16, as pairs of channels.
        self.kept, self.factors = (BF16, U32) if plan.narrow else (F32, F32)
        self.dot: Dot | None = PAIRS if plan.narrow else None
        self.arithmetic, self.sums = F32, F32
        self.input_lanes = self.lanes
        self._begin()
        self.deep = -(-self.channels // self.input_lanes) * self.input_lanes
        self.input_step = self.block * self.deep + self.input_lanes
        self.packed = Buffer("packed", self.factors, found.group * self.frequencies * known(self.panels.size))
        self.zeros = Buffer("zeros", found.input.dtype, self.deep)
        self.transformed = Buffer("transformed", self.kept, self.tasks * self.frequencies * self.input_step)
        self.products = Buffer("products", self.sums, self.tasks * self.frequencies * self.output_step)
        self.masked = target.has("avx512vl")

    @property
    def kind(self) -> str:
        """What stands in the kernel's name for the types."""
        return self.kept.name

    def _begin(self) -> None:
        """What a kernel of other types has otherwise."""

    def lowered(self) -> Lowered:
        taps, strides = self.found.windows.kernel, self.found.windows.strides
        name = f"{self.kind}_winograd{taps[0]}x{taps[1]}{'s2' if 2 in strides else ''}_{self.plan}"
        buffers = (self.packed, self.zeros, self.transformed, self.products)
        convolve = call(self.region, name, self._body(), buffers, shared=True)
        made: dict[str, Callable[[], np.ndarray]] = {self.packed.name: self._pack}
        if self.zeros.name in convolve.arguments:
            made[self.zeros.name] = self._outside
        return Lowered((convolve,), (self.transformed, self.products), made)

    def _outside(self) -> np.ndarray:
        """Pixels outside the image."""
        return np.zeros(self.deep, self.zeros.dtype.numpy)

    def _pixels(self, loaded: Scalar) -> Scalar:
        """A vector of the image in the type in which it is transformed."""
        return s.cast(loaded, self.arithmetic)

    def _result(self, value: Scalar) -> Scalar:
        """A vector of outputs by the last transform's result."""
        return value

    def _pack(self) -> np.ndarray:
        """The transformed weights, of each group and frequency as panels of the product's right operand."""
        group, filters = self.found.group, self.filters
        weights = self.found.weights.reshape(group, filters, self.channels, -1)
        both = np.kron(*(as_array(axis.weights) for axis in self.axes))  # [frequencies, taps]
        matrices = np.empty((group * self.frequencies, self.channels, filters), self.kept.numpy)
        # Some filters at a time: what lies between is of f64.
        some = max(1, PACKED_AT_ONCE // (self.channels * self.frequencies))
        for of, first in itertools.product(range(group), range(0, filters, some)):
            taps = weights[of, first : first + some].transpose(2, 1, 0).astype(np.float64)
            transformed = (both @ taps.reshape(len(taps), -1)).reshape(self.frequencies, self.channels, -1)
            matrices[of * self.frequencies :][: self.frequencies, :, first : first + some] = transformed
        return packed(pairs_of(matrices) if self.dot is not None else matrices, self.panels, self.factors)

    # Tasks: a share of the blocks each, with memory of its own for what is transformed

    def _body(self) -> Iterator[Statement]:
        yield self._tasks()

    def _tasks(self) -> Statement:
        per_group = ceildiv(self.total, self.block)
        blocks = per_group * self.found.group
        task = k.index_symbol("task", self.tasks)
        first = task * blocks // self.tasks
        block = symbol("first", 0) + symbol("step", 0)
        body = (
            Let("block", block),
            Let("group", symbol("block", 0) // per_group),
            Let("start", symbol("block", 0) % per_group * self.block),
            Let("count", self._count(symbol("start", 0))),
            self._input_stretches(),
            self._multiply(),
            self._output_stretches(),
        )
        share = (task + 1) * blocks // self.tasks - symbol("first", 0)
        here = (
            Let("first", first),
            Alias(Buffer("inside", self.kept), self.transformed, task * self.frequencies * self.input_step),
            Alias(Buffer("made", self.sums), self.products, task * self.frequencies * self.output_step),
            For("step", share, body),
        )
        return For("task", self.tasks, here, "parallel")

    @property
    def _even(self) -> bool:
        return isinstance(self.total, int) and self.total % self.block == 0

    def _count(self, start: Dim) -> Dim:
        """Stretches of a block: fewer in the last one."""
        return self.block if self._even else dim_min(self.block, self.total - start)

    @property
    def count(self) -> Dim:
        return symbol("count", 0, self.block)

    @property
    def group(self) -> Dim:
        return symbol("group", 0, self.found.group - 1) if self.found.group != 1 else 0

    def _place(self) -> list[Statement]:
        """Names the stretch's image, and its row and column among those of the image."""
        stretch = symbol("start", 0) + k.index_symbol("stretch", self.count)
        within = symbol("within", 0, self.stretches - 1)
        return [
            Let("image", stretch // self.stretches),
            Let("within", stretch % self.stretches),
            Let("down", within // self.across),
            Let("right_of", within % self.across),
        ]

    # From the image

    def _input_stretches(self) -> Statement:
        windows, (down, along) = self.found.windows, self.axes
        (above, left), (height, width) = windows.before, windows.input
        top = symbol("down", 0) * (down.outputs * down.stride) - above
        start = symbol("right_of", 0) * (along.outputs * along.stride) - left
        inside = s.const(True, BOOL)
        for first, reach, extent in ((top, down.inputs, height), (start, along.inputs, width)):
            inside = inside & (s.const(0, I64) <= s.index(first)) & (s.index(first + reach) <= s.index(extent))
        image_step, row_step, column_step = self.found.strides
        base = self.found.start + symbol("image", 0) * image_step + self.group * self.channels
        corner = Buffer("corner", self.found.input.dtype)
        within: list[Statement] = [Alias(corner, self.found.input, base + top * row_step + start * column_step)]
        within += self._transform_input(lambda i, j: (corner, i * row_step + j * column_step))
        border: list[Statement] = []
        image = self.found.input.dtype
        pixels = [[Buffer(f"pixel{i}_{j}", image) for j in range(along.inputs)] for i in range(down.inputs)]
        for i in range(down.inputs):
            for j in range(along.inputs):
                y, x = top + i, start + j
                there = s.const(True, BOOL)
                for place, extent in ((y, height), (x, width)):
                    there = there & (s.const(0, I64) <= s.index(place)) & (s.index(place) < s.index(extent))
                offset = base + y * row_step + x * column_step
                border.append(Alias(pixels[i][j], self.found.input, offset, there, self.zeros))
        border += self._transform_input(lambda i, j: (pixels[i][j], 0))
        return For("stretch", self.count, (*self._place(), If(inside, tuple(within), tuple(border))))

    def _transform_input(self, pixel: Callable[[int, int], tuple[Buffer, Dim]]) -> Iterator[Statement]:
        """All channels of one stretch, a vector at a time, the last one perhaps with fewer."""
        full, rest = divmod(self.channels, self.input_lanes)
        if full:
            at = k.index_symbol("vector", full) * self.input_lanes
            yield For("vector", full, tuple(self._transform_vector(pixel, at, None)))
        if rest:
            yield For("vector_rest", 1, tuple(self._transform_vector(pixel, full * self.input_lanes, rest)))

    def _transform_vector(
        self, pixel: Callable[[int, int], tuple[Buffer, Dim]], at: Dim, valid: int | None
    ) -> list[Statement]:
        """Along the rows, then along the columns."""
        lanes, (down, along) = self.input_lanes, self.axes
        predicate = None if valid is None else first_lanes(valid, lanes)
        body: list[Statement] = []
        names = _Names("d", body)
        rows: list[list[Scalar]] = []
        for i in range(down.inputs):
            loaded = []
            for j in range(along.inputs):
                buffer, offset = pixel(i, j)
                loaded.append(names(self._pixels(s.load(buffer, offset + at, lanes, predicate))))
            rows.append([names(value) for value in times(along.data, loaded, names)])
        place = k.index_symbol("stretch", self.count) * self.deep + at
        for j in range(along.products):
            for i, value in enumerate(times(down.data, [row[j] for row in rows], names)):
                there = (i * along.products + j) * self.input_step + place
                body.append(Store(Buffer("inside", self.kept), there, s.cast(value, self.kept)))
        return body

    # The products

    def _multiply(self) -> Statement:
        body: list[Statement] = []
        for number, columns in enumerate(column_runs(self.panels)):
            index = f"panel{number}"
            panel = columns.first + k.index_symbol(index, columns.count)
            body.append(For(index, columns.count, tuple(self._panel(columns, panel * self.tile.width))))
        return For("frequency", self.frequencies, tuple(body))

    def _panel(self, columns: Columns, column: Dim) -> Iterator[Statement]:
        rows = self.tile.rows
        count: Dim = self.block if self._even else self.count
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
        frequency, lanes = k.index_symbol("frequency", self.frequencies), self.lanes
        left, right = Buffer("left", self.factors), Buffer("right", self.factors)
        c, row_step = k.index_symbol("c", self.depth), self.deep // (1 + self.plan.narrow)
        panel = (self.group * self.frequencies + frequency) * self.panels.size + column * self.depth
        yield Alias(left, Buffer("inside", self.kept), frequency * self.input_step + row * self.deep)
        yield Alias(right, self.packed, panel)
        yield from multiply_accumulate(
            tile,
            self.sums,
            [("c", self.depth)],
            lambda i: s.load(left, i * row_step + c),
            lambda v: s.load(right, c * (columns.vectors * lanes) + v * lanes, lanes),
            dot=self.dot,
        )
        sums = accumulators(tile, self.sums)
        for i in range(tile.rows):
            for v in range(tile.vectors):
                offset = frequency * self.output_step + (row + i) * self.broad + column + v * lanes
                yield Store(Buffer("made", self.sums), offset, s.load(sums, i * tile.vectors + v, lanes))

    # To the image

    def _output_stretches(self) -> Statement:
        down, along = (axis.outputs for axis in self.axes)
        row, at = symbol("down", 0) * down, symbol("right_of", 0) * along
        ends = [(down, self.height), (along, self.width)]
        partial = any(not isinstance(extent, int) or extent % size for size, extent in ends)
        return For("stretch", self.count, (*self._place(), *self._outputs(row, at, partial)))

    def _outputs(self, row: Dim, at: Dim, partial: bool) -> Iterator[Statement]:
        """The outputs of a stretch for all filters, a vector at a time, the last one perhaps with fewer."""
        full, rest = divmod(self.filters, self.lanes)
        if full:
            first = k.index_symbol("vector", full) * self.lanes
            yield For("vector", full, tuple(self._output_vector(row, at, partial, first, None)))
        if rest:
            yield For("vector_rest", 1, tuple(self._output_vector(row, at, partial, full * self.lanes, rest)))

    def _output_vector(self, row: Dim, at: Dim, partial: bool, first: Dim, valid: int | None) -> Iterator[Statement]:
        lanes, (down, along) = self.lanes, self.axes
        place = k.index_symbol("stretch", self.count) * self.broad + first
        body: list[Statement] = []
        names = _Names("m", body)
        lines: list[list[Scalar]] = []
        for j in range(along.products):
            offsets = [(i * along.products + j) * self.output_step + place for i in range(down.products)]
            column = [names(s.load(Buffer("made", self.sums), offset, lanes)) for offset in offsets]
            lines.append([names(value) for value in times(down.results, column, names)])
        yield from body
        tile = Tile(along.outputs, 1, lanes)
        for i in range(down.outputs):
            line: list[Statement] = [Alloc(accumulators(tile, self.sums))]
            for j, value in enumerate(times(along.results, [values[i] for values in lines], _Names(f"r{i}_", line))):
                line.append(Store(accumulators(tile, self.sums), j, self._result(value)))
            line += finish_tile(
                self.outputs,
                tile,
                self.sums,
                lambda j, i=i: self.found.pixel(symbol("image", 0), row + i, at + j),  # type: ignore[misc]
                self.group * self.filters + first,
                lambda v: valid,
                self.masked,
                (lambda j: s.index(at + j) < s.index(self.width)) if partial else None,
                dim_min(along.outputs, self.width - at) if partial else None,
            )
            there = s.index(row + i) < s.index(self.height) if partial else s.const(True, BOOL)
            yield If(there, tuple(line)) if partial else For(f"line{i}", 1, tuple(line))


class _Names:
    """Makes values register variables of a block."""

    def __init__(self, stem: str, body: list[Statement]) -> None:
        self.stem, self.body, self.count = stem, body, 0

    def __call__(self, value: Scalar) -> Scalar:
        register = Buffer(f"{self.stem}{self.count}", value.dtype, 1, "register", value.lanes)
        self.count += 1
        self.body.append(Define(register, value))
        return s.load(register, 0, value.lanes)
