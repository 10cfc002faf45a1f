"""Convolutions of bf16 images and weights, summed in f32: two neighbouring channels are one element of 32 bits.

Channels last, pairs of channels lie side by side, so that the convolution over pairs is that of `conv` at half the
channels. An odd number of channels is made even by a copy of the image with zeros between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, floordiv, product
from ....ir.dtypes import BF16, F32, U16, U32
from ....ir.loops import Alias, For, Statement, Store
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....ir.tensors import buffer_tensor
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from ..dot_products import PAIRS
from .conv import _Conv
from .convolution import Convolution, find_convolution, find_phases
from .grouped_gemm import divisible
from .packing import Columns, packed, pairs_of


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a channels-last convolution of bf16 with constant weights; None for any other.

    Of grouped ones those whose groups have an even number of channels.
    """
    found = find_convolution(region)
    if found is None or not _applies(found):
        return None
    if found.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    return joined(found.copies, _lowered(target, found, found.outputs))


def transposed(region: Region, target: Target) -> Lowered | None:
    """The kernels of a channels-last transposed convolution of bf16, one for each phase of its stride."""
    phases = find_phases(region)
    if phases is None or not all(map(_applies, phases)) or phases[0].channels % 2:
        return None
    result: Lowered | None = phases[0].copies
    for number, found in enumerate(phases):
        if 0 in found.windows.output:
            continue
        if found.outputs is None:
            return through_memory(region, lambda alone: transposed(alone, target))
        if result is not None:
            result = joined(result, _lowered(target, found, found.outputs, str(number)))
    return result


def _applies(found: Convolution) -> bool:
    """Whether operands are bf16, and pairs of channels neighbours in the image or in a copy of it."""
    if found.input.dtype != BF16 or found.dtype != F32:
        return False
    even = divisible(2, (found.channels, found.start, *found.strides))
    return even or found.group == 1


def _lowered(target: Target, found: Convolution, outputs: Epilogue, suffix: str = "") -> Lowered:
    if divisible(2, (found.channels, found.start, *found.strides)):
        return _PairConv(target, found, outputs, suffix).lowered()
    image, copy = _padded(found)
    strides = _strides(found)
    region = replace(found.region, inputs=(*found.region.inputs, buffer_tensor(image.name, BF16, (image.size,))))
    changed = replace(found, region=region, input=image, start=0, strides=strides, channels=strides[-1])
    convolved = _PairConv(target, changed, outputs, suffix).lowered()
    return replace(convolved, calls=(copy, *convolved.calls), workspaces=(image, *convolved.workspaces))


def _strides(found: Convolution) -> tuple[Dim, Dim, int]:
    """Those of a contiguous image with an even number of channels."""
    pixel = found.channels + found.channels % 2
    height, width = found.windows.input
    return height * width * pixel, width * pixel, pixel


def _padded(found: Convolution) -> tuple[Buffer, Call]:
    """A copy of the image with an even number of channels, and the kernel that makes it."""
    height, width = found.windows.input
    pairs = (found.channels + 1) // 2
    image = Buffer("image_pairs", BF16, product((found.images, height, width, 2 * pairs)))
    view, bits = Buffer("image_out", U32), Buffer("image_bits", U16)
    rows = found.images * height
    row, column = k.index_symbol("row", rows), k.index_symbol("column", width)
    start = found.start + row // height * found.strides[0] + row % height * found.strides[1]
    stores: list[Statement] = []
    for pair in range(pairs):
        value = s.cast(s.load(bits, column * found.strides[2] + 2 * pair), U32)
        if 2 * pair + 1 < found.channels:
            high = s.cast(s.load(bits, column * found.strides[2] + 2 * pair + 1), U32)
            value = value | s.binary("shl", high, s.const(16, U32))
        stores.append(Store(view, column * pairs + pair, value))
    body = (
        Alias(bits, found.input, start),
        Alias(view, image, row * width * (2 * pairs)),
        For("column", width, tuple(stores), "vector"),
    )
    loop = For("row", rows, body, "parallel")
    return image, call(found.region, "bf16_even_channels", (loop,), (image,))


class _PairConv(_Conv):
    """The convolution over pairs of channels."""

    def __init__(self, target: Target, whole: Convolution, outputs: Epilogue, suffix: str = "") -> None:
        self.image = whole.input
        image, row, pixel = (floordiv(stride, 2) for stride in whole.strides)
        found = replace(
            whole,
            input=Buffer("pairs", U32),
            start=floordiv(whole.start, 2),
            strides=(image, row, pixel),
            channels=whole.channels // 2,
            dtype=U32,
            dot=PAIRS,
        )
        super().__init__(target, found, outputs, suffix)

    def _pack(self) -> np.ndarray:
        found, taps = self.found, self.kernel[0] * self.kernel[1]
        weights = found.weights.reshape(found.group, found.filters, -1, taps)
        pairs = pairs_of(np.ascontiguousarray(weights.transpose(0, 3, 2, 1)))
        return packed(pairs.reshape(found.group, self.depth, found.filters), self.panels, U32)

    def _tile(self, columns: Columns, column: Dim, row: Dim, at: Dim, border: bool) -> Iterator[Statement]:
        yield Alias(self.found.input, self.image, 0)
        yield from super()._tile(columns, column, row, at, border)
