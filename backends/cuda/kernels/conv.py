"""Convolutions on a GPU as implicit GEMMs: rows are output pixels, columns filters, the depth goes over taps and
channels. Images have their channels last, or are read one element at a time.

Groups are batches; narrow ones are put together, their weights in blocks on the diagonal. A transposed convolution is
one convolution for each phase of its strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim, linear, product
from ....ir.dtypes import BF16, F16, F32, F64, I8, I32, U8
from ....ir.scalars import Buffer, Load, Scalar
from ....ir.target import Target
from ....ir.tensors import all_of, buffer_tensor, unflatten
from ....passes.regions import Call, Lowered, Region
from ...kernels.convolution import Convolution, find_convolution, find_transposed
from ...kernels.epilogue import Epilogue, Result, accumulator_leaf, through_memory
from ...kernels.operands import affine, joined
from . import gemm
from .choose import Plan, Shape, choose, uses_tensor_cores, usual
from .contraction import Contraction, index, lowered
from .filters import ALIGNED, packed, rounded_to_tf32
from .finish import BATCH, COLUMN, DEPTH, ROW
from .image_copy import WIDE, Source, source_of
from .loaders import Matrix, loader_of
from .phases import together
from .tiles import CHUNK, Loader
from .window_loader import Image, window_loader

NARROW = 16
"""Channels up to which groups are put together: what one step of a tensor core takes."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a convolution; None for other operators."""
    found = find_convolution(region, "Conv", "ConvInteger")
    if found is None or not _is_supported(found):
        return None
    if found.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    if _is_product(region, found):
        return gemm.schedule(region, target)
    groups = _Groups(found)
    source = source_of(region, target, found, groups.batches, groups.channels)
    return joined(source.before, _Conv(region, target, found, groups, source, found.outputs).lowered())


def transposed(region: Region, target: Target) -> Lowered | None:
    """The kernels of a transposed convolution; None for other operators, and for padding only known at run time."""
    found = find_transposed(region)
    if found is None or not _is_supported(found.whole):
        return None
    if found.whole.outputs is None:
        return through_memory(region, lambda alone: transposed(alone, target))
    groups = _Groups(found.whole)
    batches = len(found.places) * groups.batches
    all_phases = together(found, index(BATCH, batches) // groups.batches)
    phases = [found.at(place) for place in found.places] if all_phases is None else [all_phases.found]
    phases = [phase for phase in phases if 0 not in phase.windows.output]  # none where outputs are fewer than strides
    first = max(phases, key=lambda phase: product_of(phase.windows.kernel))
    source = source_of(region, target, first, groups.batches, groups.channels)
    if source.windows != first.windows:
        return None
    outputs = found.whole.outputs
    if all_phases is not None:
        whole = _Conv(region, target, all_phases.found, groups, source, outputs, all_phases.taps)
        return joined(source.before, whole.lowered())
    result: Lowered | None = source.before
    for number, phase in enumerate(phases):
        own = replace(source, windows=phase.windows)
        kernels = _Conv(region, target, phase, groups, own, outputs).lowered()
        result = None if result is None else joined(result, _numbered(kernels, number))
    return result


def _is_supported(found: Convolution) -> bool:
    types = found.image.dtype, found.weights.dtype
    if found.dtype == I32:
        return set(types) <= {I8, U8} and not found.has_zero_points
    return types[0] in (F32, F64, F16, BF16) and types[0] == types[1]


def _is_product(region: Region, found: Convolution) -> bool:
    """Whether each output pixel is a product of the weights and a pixel, neighbours in memory as in the image."""
    windows, image = found.windows, affine(found.image)
    if found.group > 1 or any(windows.padded) or product_of(windows.kernel) > 1 or image is None:
        return False
    wide = found.channels * found.image.dtype.bytes % WIDE == 0 and region.alignment(image.buffer.name) >= WIDE
    pixels = product((found.images, *windows.output))
    lies = Image(image, windows, 0, found.channels, found.channels)
    row = linear(lies.origin(index(ROW, pixels)), ROW)
    return wide and image.strides[-1] == 1 and row is not None and ROW not in s.free_symbols(row[0])


def _numbered(kernels: Lowered, number: int) -> Lowered:
    """Kernels whose workspaces and constants have names of their own."""
    own = {buffer.name: f"{buffer.name}{number}" for buffer in kernels.workspaces}
    own |= {name: f"{name}{number}" for name in kernels.packed}
    calls = [
        replace(item, arguments=tuple(own.get(name, name) for name in item.arguments))
        if isinstance(item, Call)
        else item
        for item in kernels.calls
    ]
    workspaces = tuple(replace(buffer, name=own[buffer.name]) for buffer in kernels.workspaces)
    return Lowered(tuple(calls), workspaces, {own[name]: make for name, make in kernels.packed.items()})


class _Groups:
    """The groups of a convolution as batches, narrow ones put together."""

    def __init__(self, found: Convolution) -> None:
        counts = [count for count in range(1, found.group + 1) if found.group % count == 0]
        narrow = min(found.channels, found.filters)
        self.merged = next((count for count in counts if count * narrow >= NARROW), found.group)
        self.batches = found.group // self.merged
        self.channels, self.filters = found.channels * self.merged, found.filters * self.merged


class _Conv:
    """One convolution as a contraction."""

    def __init__(
        self,
        region: Region,
        target: Target,
        found: Convolution,
        groups: _Groups,
        source: Source,
        outputs: Epilogue,
        own_taps: tuple[Dim, ...] | None = None,
    ) -> None:
        self.region, self.target, self.found, self.outputs = region, target, found, outputs
        self.merged, self.groups, self.filters = groups.merged, groups.batches, groups.filters
        self.batches = found.group // self.merged  # of all phases
        self.used, self.channels = groups.channels, source.channels
        self.kernel = tuple(int(str(extent)) for extent in source.windows.kernel)
        self.taps = product_of(self.kernel)
        whole = CHUNK // found.image.dtype.bytes
        self.depth = -(-self.taps * self.channels // whole) * whole
        self.group = index(BATCH, self.batches) % self.groups
        self.image = Image(source.memory, source.windows, self.group, self.channels, self.depth, own_taps)
        self.tensor = uses_tensor_cores((found.image.dtype, found.weights.dtype), found.dtype, target)
        self.rows = product((found.images, *source.windows.output))

    def lowered(self) -> Lowered:
        """The kernels, weights and workspaces."""
        found = self.found
        weights, before = self._weights()
        # The image may be a workspace, too.
        own = [weights] if self.image.memory.buffer in self.region.buffers else [weights, self.image.memory.buffer]
        region = replace(
            self.region,
            inputs=(*self.region.inputs, *(buffer_tensor(b.name, b.dtype, (b.size,)) for b in own)),
            alignments={**self.region.alignments, **{b.name: ALIGNED for b in own}},
        )
        left = window_loader(self.image, region.alignment(self.image.memory.buffer.name))
        right = loader_of(self._right(weights), region.alignment)
        right.rounded = found.image.dtype == F32 and found.array is not None and self.tensor
        sums = Contraction(self.batches, self.rows, self.filters, self.depth, found.dtype, self._over_tile())
        result = joined(before, lowered(region, sums, (left, right), self._plan(sums, (left, right))))
        assert result is not None
        return result

    def _plan(self, sums: Contraction, loaders: tuple[Loader, Loader]) -> Plan:
        shape = Shape(
            usual(sums.batches),
            usual(sums.rows),
            usual(sums.columns),
            usual(sums.depth),
            output_bytes=sum(result.buffer.dtype.bytes for result in self.outputs.results),
            repeated=self.taps,
        )
        return choose(shape, loaders, sums.dtype, self.target)

    # Weights: [batch, filter, tap, channel], zeros behind the last one

    def _weights(self) -> tuple[Buffer, Lowered]:
        array = self.found.array
        shape = (self.batches, self.filters, self.depth)
        pack = None if array is None else lambda: self._pack(array)
        return packed(self.region, "packed", shape, self.found.weights, self._weight, pack)

    def _pack(self, array: np.ndarray) -> np.ndarray:
        found, parts = self.found, self.merged
        grouped = array.reshape(self.batches, parts, found.filters, found.channels, self.taps)
        result = np.zeros((self.batches, parts, found.filters, self.taps, self.channels), array.dtype)
        for part in range(parts):
            own = slice(part * found.channels, (part + 1) * found.channels)
            result[:, part, :, :, own] = grouped[:, part].swapaxes(2, 3)
        flat = result.reshape(self.batches, self.filters, -1)
        flat = np.pad(flat, ((0, 0), (0, 0), (0, self.depth - flat.shape[-1])))
        return rounded_to_tf32(flat) if array.dtype == np.float32 and self.tensor else flat

    def _weight(self, indices: Sequence[Dim]) -> Scalar:
        """An element of the packed weights, of weights that the run brings."""
        found = self.found
        batch, column, depth = indices
        tap, channel = depth // self.channels, depth % self.channels
        part = column // found.filters
        conditions = [s.index(tap) < s.index(self.taps), s.index(channel) < s.index(self.used)]
        conditions.append(s.index(part).equal(s.index(channel // found.channels)))
        filter_ = (batch * self.merged + part) * found.filters + column % found.filters
        value = found.weights.at((filter_, channel % found.channels, *unflatten(tap, self.kernel)))
        return s.select(all_of(conditions), value, s.const(0, value.dtype))

    def _right(self, weights: Buffer) -> Matrix:
        column = index(BATCH, self.batches) * self.filters + index(COLUMN, self.filters)
        value = s.load(weights, column * self.depth + index(DEPTH, self.depth))
        return Matrix("right", value, COLUMN, (self.filters, self.depth))

    def _over_tile(self) -> Epilogue:
        """The outputs over batch, row and column."""
        found, dtype = self.found, self.found.dtype
        where = found.pixel(self.image.pixel(index(ROW, self.rows)))
        column = self.group * self.filters + index(COLUMN, self.filters)
        at = s.Rewriter(dims={**where, found.column: column})
        leaf = accumulator_leaf(dtype, index(COLUMN, self.filters))

        def own(node: Scalar) -> Scalar | None:
            return leaf if isinstance(node, Load) and node.buffer.name == leaf.buffer.name else None

        results = [
            Result(result.buffer, at.dim(result.offset), s.Rewriter(own)(at(result.value)))
            for result in self.outputs.results
        ]
        return Epilogue(tuple(results), COLUMN, dtype)


def product_of(extents: Sequence[Dim]) -> int:
    """The product of extents that are known."""
    return int(str(product(extents)))
