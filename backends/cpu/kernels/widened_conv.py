"""Convolutions of bytes where no instruction multiplies four of them: of pairs of channels as i16.

The image is copied once, less its zero point, as i16 (a byte less a zero point takes nine bits), with an even number of
channels in each group; then the convolution over pairs is that of `conv` at half the channels, PMADDWD its dot product,
which is exact. What lies outside the image is 0, and nothing is left to be added to the sums but a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, product, symbol
from ....ir.dtypes import I16, I32, U32
from ....ir.loops import Alias, For, Statement, Store
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....ir.tensors import buffer_tensor
from ....passes.regions import Call, Lowered
from ...kernels.calls import call
from ...kernels.epilogue import Epilogue
from ..dot_products import DOTS
from .conv import _Conv
from .convolution import Convolution
from .integer_bias import without_bias
from .integer_convolution import IntegerConvolution
from .packing import Columns, groups_of, known, packed
from .register_tile import Starts
from .widened_pairs import pairs_only

PAIRS = DOTS["dot2_i16_i16"]


def lowered(target: Target, found: IntegerConvolution, outputs: Epilogue) -> Lowered | None:
    """The kernels; None for targets that multiply bytes, or nothing narrower than i32."""
    if not pairs_only(target):
        return None
    image, copy = _widened(found)
    whole = found.whole
    height, width = whole.windows.input
    channels = whole.channels + whole.channels % 2
    pairs = whole.group * channels // 2
    inputs = (*whole.region.inputs, buffer_tensor(image.name, I16, (image.size,)))
    weights = np.pad(whole.weights, [(0, 0), (0, channels - whole.channels), *[(0, 0)] * (whole.weights.ndim - 2)])
    over = replace(
        whole,
        region=replace(whole.region, inputs=inputs),
        input=Buffer("pairs", U32),
        start=0,
        strides=(height * width * pairs, width * pairs, pairs),
        channels=channels // 2,
        weights=weights,
        dtype=U32,
        dot=PAIRS,
    )
    convolved = _WidenedConv(target, over, image, outputs).lowered()
    return replace(convolved, calls=(copy, *convolved.calls), workspaces=(image, *convolved.workspaces))


def _widened(found: IntegerConvolution) -> tuple[Buffer, Call]:
    """The copy of the image, [image, row, column, group, channel], and the kernel that makes it, a row in each turn."""
    whole = found.whole
    height, width = whole.windows.input
    channels = whole.channels + whole.channels % 2
    pixel = whole.group * channels
    image = Buffer("image_wide", I16, product((whole.images, height, width, pixel)))
    view, source = Buffer("image_out", I16), Buffer("image_bytes", whole.input.dtype)
    rows = whole.images * height
    row = k.index_symbol("row", rows)
    start = whole.start + row // height * whole.strides[0] + row % height * whole.strides[1]
    zero = s.cast(found.own_zero, I16)

    def copied(at: Dim, read: Dim) -> Store:
        return Store(view, at, s.cast(s.load(source, read), I16) - zero)

    inner: tuple[Statement, ...]
    if channels == whole.channels and found.step == 1 and whole.strides[2] == pixel:
        element = k.index_symbol("element", width * pixel)
        inner = (For("element", width * pixel, (copied(element, element),), "vector"),)
    else:
        column, group = k.index_symbol("column", width), k.index_symbol("group", whole.group)
        channel = k.index_symbol("channel", whole.channels)
        into, read = column * pixel + group * channels, column * whole.strides[2]
        element_copy = copied(into + channel, read + (group * whole.channels + channel) * found.step)
        loops = [("channel", whole.channels), ("column", width)]
        if found.step != 1 or whole.channels < 8:  # Few channels are no vector, and others may be no neighbours.
            loops.reverse()
        body: tuple[Statement, ...] = (For(*loops[0], (element_copy,), "vector"),)
        body = (For(*loops[1], body),)
        if channels != whole.channels:
            last = Store(view, into + whole.channels, s.const(0, I16))
            body = (*body, For("column", width, (last,), "vector"))
        inner = (For("group", whole.group, body),)
    aliases = (Alias(source, whole.input, start), Alias(view, image, row * width * pixel))
    loop = For("row", rows, (*aliases, *inner), "parallel")
    return image, call(whole.region, "widen_image", (loop,), (image,))


class _WidenedConv(_Conv):
    """The convolution over pairs of channels."""

    def __init__(self, target: Target, found: Convolution, image: Buffer, outputs: Epilogue) -> None:
        self.image = image
        outputs, self.bias = without_bias(found.region, outputs)
        super().__init__(target, found, outputs)
        self.starts = Buffer("starts", I32, found.group * known(self.panels.padded))

    @property
    def kind(self) -> str:
        return "i16_pairs"

    def lowered(self) -> Lowered:
        convolved = super().lowered()
        if self.bias is None:
            return convolved
        return replace(convolved, packed={**convolved.packed, self.starts.name: self._start})

    def _constants(self) -> tuple[Buffer, ...]:
        return (self.starts,)

    def _pack(self) -> np.ndarray:
        found, taps = self.found, self.kernel[0] * self.kernel[1]
        weights = found.weights.astype(np.int16).reshape(found.group, found.filters, -1, taps)
        pairs = groups_of(np.ascontiguousarray(weights.transpose(0, 3, 2, 1)), PAIRS.group)
        return packed(pairs.reshape(found.group, self.depth, found.filters), self.panels, U32)

    def _start(self) -> np.ndarray:
        """The bias, [group, filter], with zeros for what fills the last vector."""
        found = self.found
        assert self.bias is not None
        result = np.zeros((found.group, known(self.panels.padded)), np.int32)
        result[:, : found.filters] = self.bias.reshape(found.group, found.filters)
        return result.reshape(-1)

    def _starts(self, columns: Columns, column: Dim) -> Starts | None:
        if self.bias is None:
            return None
        at = symbol("group", 0, self.found.group - 1) * known(self.panels.padded) + column
        lanes = self.tile.lanes
        return lambda row, vector: s.load(self.starts, at + vector * lanes, lanes)

    def _tile(self, columns: Columns, column: Dim, row: Dim, at: Dim, border: bool) -> Iterator[Statement]:
        yield Alias(self.found.input, self.image, 0)
        yield from super()._tile(columns, column, row, at, border)
