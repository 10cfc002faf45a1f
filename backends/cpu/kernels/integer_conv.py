"""Convolutions of 8-bit images and weights, summed in i32: four neighbouring channels are one element of 32 bits.

Channels last, the convolution over groups of channels is that of `conv` at a quarter of the channels. A number of
channels that is no multiple of four is made one by a copy of the image. Sums start with what the zero point of the
image takes from them, which depends on how many rows of the kernel lie inside the image; beside it stand zero points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, dim_min, floordiv, product, symbol
from ....ir.dtypes import I32, U8, U32
from ....ir.loops import Alias, For, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....ir.tensors import buffer_tensor
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from . import widened_conv
from .conv import _Conv
from .grouped_gemm import divisible
from .integer_bias import without_bias
from .integer_convolution import IntegerConvolution, find_integers
from .merged_rows import merged_rows
from .packing import Columns, groups_of, known, packed
from .register_tile import Starts

GROUP = 4
"""Channels of an element."""
_WRITTEN_OUT = 8
"""Elements of a pixel up to which a copy of the image has a statement for each, and no loop."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a channels-last convolution of integers with constant weights; None for any other."""
    found = find_integers(region, target)
    if found is None or not found.fits:
        return None
    if found.whole.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    return joined(found.whole.copies, _lowered(target, found, found.whole.outputs))


def _lowered(target: Target, found: IntegerConvolution, outputs: Epilogue) -> Lowered:
    whole = found.whole
    widened = widened_conv.lowered(target, found, outputs)
    if widened is not None:
        return widened
    if found.step == 1 and divisible(GROUP, (whole.channels, whole.start, *whole.strides)):
        return _IntegerConv(target, found, outputs).lowered()
    merged = merged_rows(found)
    if merged is not None:
        rows, image, copy = merged
        convolved = _IntegerConv(target, rows, outputs, anywhere=True).lowered()
        return replace(convolved, calls=(copy, *convolved.calls), workspaces=(image, *convolved.workspaces))
    image, copy = _padded(found)
    channels = -(-whole.channels // GROUP) * GROUP
    height, width = whole.windows.input
    pixel = whole.group * channels
    inputs = (*whole.region.inputs, buffer_tensor(image.name, U8, (image.size,)))
    more = [(0, 0)] * whole.weights.ndim
    more[1] = (0, channels - whole.channels)
    changed = replace(
        whole,
        region=replace(whole.region, inputs=inputs),
        input=image,
        start=0,
        strides=(height * width * pixel, width * pixel, pixel),
        channels=channels,
        weights=np.pad(whole.weights, more),
    )
    convolved = _IntegerConv(target, replace(found, whole=changed, shift=0, step=1), outputs).lowered()
    return replace(convolved, calls=(copy, *convolved.calls), workspaces=(image, *convolved.workspaces))


def _padded(found: IntegerConvolution) -> tuple[Buffer, Call]:
    """A copy of the image as it is multiplied with a multiple of four channels in each group, and the kernel that makes
    it."""
    whole = found.whole
    height, width = whole.windows.input
    words = -(-whole.channels // GROUP)
    pixel = whole.group * words
    image = Buffer("image_words", U8, product((whole.images, height, width, pixel * GROUP)))
    view, source = Buffer("image_out", U32), Buffer("image_bytes", U8)
    rows = whole.images * height
    row, column = k.index_symbol("row", rows), k.index_symbol("column", width)
    start = whole.start + row // height * whole.strides[0] + row % height * whole.strides[1]
    body: list[Statement] = [Alias(source, whole.input, start), Alias(view, image, row * width * (pixel * GROUP))]

    def store(group: Dim, first: Dim, parts: int) -> Store:
        """Four channels of a group, the `first` and on, of which so many parts are there."""
        value: Scalar = s.const(0, U32)
        for part in range(parts):
            channel = group * whole.channels + first + part
            byte = s.cast(s.load(source, column * whole.strides[2] + channel * found.step), U32)
            value = value | s.binary("shl", byte, s.const(8 * part, U32)) if part else byte
        return Store(view, column * pixel + group * words + floordiv(first, GROUP), found.flipped(value))

    full, rest = divmod(whole.channels, GROUP)
    if pixel <= _WRITTEN_OUT:
        each = [(group, word) for group in range(whole.group) for word in range(words)]
        stores = [store(group, word * GROUP, GROUP if word < full else rest) for group, word in each]
        body.append(For("column", width, tuple(stores), "vector"))
    else:
        group, word = k.index_symbol("group", whole.group), k.index_symbol("word", full)
        # Along channels where they are neighbours, else along pixels.
        near, far = (("word", full), ("column", width)) if found.step == 1 else (("column", width), ("word", full))
        copies = [For(*far, (For(*near, (store(group, word * GROUP, GROUP),), "vector"),))] if full else []
        if rest:
            copies.append(For("column", width, (store(group, full * GROUP, rest),), "vector"))
        body.append(For("group", whole.group, tuple(copies)))
    loop = For("row", rows, tuple(body), "parallel")
    return image, call(whole.region, "four_channels", (loop,), (image,))


class _IntegerConv(_Conv):
    """The convolution over groups of four channels."""

    def __init__(self, target: Target, integers: IntegerConvolution, outputs: Epilogue, anywhere: bool = False) -> None:
        """`anywhere`: groups begin at any byte."""
        whole, self.anywhere = integers.whole, anywhere
        self.image, self.integers, self.bias = whole.input, integers, None
        if integers.known_zero is not None:
            outputs, self.bias = without_bias(whole.region, outputs)
        unit = 1 if anywhere else GROUP
        image, row, pixel = (floordiv(stride, unit) for stride in whole.strides)
        found = replace(
            whole,
            input=Buffer("words", U8 if anywhere else U32),
            start=floordiv(whole.start, unit),
            strides=(image, row, pixel),
            channels=whole.channels // GROUP,
            dtype=U32,
            dot=integers.dot,
        )
        super().__init__(target, found, outputs)
        self.zeros, self.fill, self.rims = integers.rim(self.zeros.name, found.channels)
        if anywhere:
            self.zeros = replace(self.zeros, dtype=U8, size=found.channels * GROUP)
        self.rows_inside = self.kernel[0] + 1 if found.windows.padded[0] and integers.known_zero != 0 else 1
        self.each = found.group * known(self.panels.padded)
        self.starts = Buffer("starts", I32, self.rows_inside**2 * self.each)

    def lowered(self) -> Lowered:
        convolved = super().lowered()
        (convolve,) = convolved.kernel_calls
        packed = dict(convolved.packed)
        if self.starts.name in convolve.arguments:
            packed[self.starts.name] = self._start
        if self.fill is None or self.zeros.name not in convolve.arguments:
            return replace(convolved, packed=packed)
        del packed[self.zeros.name]
        return Lowered((self.fill, convolve), (self.zeros,), packed)

    @property
    def kind(self) -> str:
        return f"{self.integers.dot.left}_zero{self.integers.known_zero}"

    def _constants(self) -> tuple[Buffer, ...]:
        return (self.starts,)

    def _rim(self) -> np.ndarray:
        return self.rims[self.zeros.name]().view(self.zeros.dtype.numpy)

    def _pack(self) -> np.ndarray:
        found, taps = self.found, self.kernel[0] * self.kernel[1]
        weights = found.weights.astype(np.int8).reshape(found.group, found.filters, -1, taps)
        groups = groups_of(np.ascontiguousarray(weights.transpose(0, 3, 2, 1)), GROUP)
        return packed(groups.reshape(found.group, self.depth, found.filters), self.panels, U32)

    def _start(self) -> np.ndarray:
        """What sums begin with for the kernel's rows from `low` up to `high` inside the image, [low, high, filter]."""
        found = self.found
        sums = found.weights.reshape(found.group, found.filters, -1, *self.kernel).sum((2, 4), dtype=np.int32)
        result = np.zeros((self.rows_inside, self.rows_inside, found.group, self.each // found.group), np.int32)
        if self.rows_inside == 1:
            result[0, 0, :, : found.filters] = self.integers.start(sums.sum(2, dtype=np.int32))
        for low, high in np.ndindex(self.rows_inside, self.rows_inside):
            if self.rows_inside > 1 and low < high:
                result[low, high, :, : found.filters] = self.integers.start(sums[..., low:high].sum(2, dtype=np.int32))
        if self.bias is not None:
            result[..., : found.filters] += self.bias.reshape(found.group, found.filters)
        return result.reshape(-1)

    def _starts(self, columns: Columns, column: Dim) -> Starts | None:
        if self.integers.known_zero == 0 and self.bias is None:
            return None
        rows: Dim = 0
        if self.rows_inside > 1:
            low = dim_min(symbol("low", 0), self.kernel[0])  # more where no row is inside
            rows = low * self.rows_inside + low + symbol("taps", 0, self.kernel[0])
        at = rows * self.each + symbol("group", 0, self.found.group - 1) * known(self.panels.padded) + column
        lanes = self.tile.lanes

        def start(row: int, vector: int) -> Scalar:
            return self.integers.started(s.load(self.starts, at + vector * lanes, lanes))

        return start

    def _element(self, pixels: Buffer, start: Dim, position: Dim) -> Scalar:
        if not self.anywhere:
            return super()._element(pixels, start, position)
        return self._read(s.Bitcast(U32, 1, s.load(pixels, start + position * GROUP, GROUP)))

    def _read(self, element: Scalar) -> Scalar:
        return self.integers.flipped(element)

    def _tile(self, columns: Columns, column: Dim, row: Dim, at: Dim, border: bool) -> Iterator[Statement]:
        yield Alias(self.found.input, self.image, 0)
        yield from super()._tile(columns, column, row, at, border)
