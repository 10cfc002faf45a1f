"""Convolutions of images of few channels: what a row of the kernel reads is one stretch of bytes, and is multiplied so.

Of one channel, four neighbouring pixels are a group, not a pixel and three zeros beside it. The image is copied with
its zero point before and behind each row, so that every window lies inside, and groups begin at any byte.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, product
from ....ir.dtypes import U8
from ....ir.loops import Alias, For, Store
from ....ir.ops.windows import Windows
from ....ir.scalars import Buffer
from ....ir.tensors import buffer_tensor
from ....passes.regions import Call
from ...kernels.calls import call
from .integer_convolution import SIGN, IntegerConvolution

GROUP = 4


def merged_rows(found: IntegerConvolution) -> tuple[IntegerConvolution, Buffer, Call] | None:
    """The convolution over rows of bytes, their buffer, and the kernel that makes it; None where that saves nothing, or
    the image does not lie in rows."""
    whole, windows, zero = found.whole, found.whole.windows, found.known_zero
    channels, taps = whole.channels, int(str(windows.kernel[1]))
    words = -(-channels * taps // GROUP)
    before, after, (height, width) = windows.before[1], windows.after[1], windows.input
    dense = whole.strides[2] == channels and (found.step == 1 or channels == 1)
    saves = words < taps * -(-channels // GROUP)
    if zero is None or not dense or not saves or whole.group != 1 or windows.dilations[1] != 1:
        return None
    reach = (width + before + after) * channels
    row_bytes: Dim = reach + GROUP
    rows = whole.images * height
    image = Buffer("image_rows", U8, product((rows, row_bytes)))
    row = k.index_symbol("row", rows)
    view, source = Buffer("row_out", U8), Buffer("row_bytes", U8)
    start = whole.start + row // height * whole.strides[0] + row % height * whole.strides[1]

    def filled(index: str, first: Dim, count: Dim) -> For:
        at = k.index_symbol(index, count)
        return For(index, count, (Store(view, first + at, s.const(zero % 256, U8)),), "vector")

    at = k.index_symbol("byte", width * channels)
    byte = s.load(source, at)
    copied = Store(view, before * channels + at, byte ^ s.const(SIGN, U8) if found.shift else byte)
    body = (
        Alias(source, whole.input, start),
        Alias(view, image, row * row_bytes),
        filled("left", 0, before * channels),
        For("byte", width * channels, (copied,), "vector"),
        filled("right", (before + width) * channels, after * channels + GROUP),
    )
    copy = call(whole.region, "rows_of_bytes", (For("row", rows, body, "parallel"),), (image,))
    weights = np.zeros((len(whole.weights), words * GROUP, whole.weights.shape[2], 1), whole.weights.dtype)
    flat = whole.weights.transpose(0, 3, 1, 2).reshape(len(weights), taps * channels, -1, 1)
    weights[:, : taps * channels] = flat
    across = Windows(
        (windows.input[0], width + before + after - taps + 1),
        (windows.kernel[0], 1),
        windows.strides,
        windows.dilations,
        (windows.before[0], 0),
        (windows.after[0], 0),
        windows.output,
    )
    changed = replace(
        whole,
        windows=across,
        region=replace(whole.region, inputs=(*whole.region.inputs, buffer_tensor(image.name, U8, (image.size,)))),
        input=image,
        start=0,
        strides=(height * row_bytes, row_bytes, channels),
        channels=words * GROUP,
        weights=weights,
    )
    return replace(found, whole=changed, shift=0, step=1), image, copy
