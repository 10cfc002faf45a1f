"""Depthwise convolutions with several filters for each channel: of an image in which each channel stands that often."""

from __future__ import annotations

from dataclasses import replace

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import product
from ....ir.loops import Alias, For, Statement, Store
from ....ir.scalars import Buffer
from ....ir.tensors import buffer_tensor
from ....passes.regions import Call
from ...kernels.calls import call
from .integer_convolution import IntegerConvolution

WIDEST = 64
"""Bytes that are stored at a time."""


def repeated(found: IntegerConvolution) -> tuple[IntegerConvolution, Buffer, Call] | None:
    """The convolution with one filter for each channel of a copy of the image, that copy, and the kernel that makes it;
    None where this is none with a power of two of filters for each channel."""
    whole, times = found.whole, found.whole.filters
    alone = whole.channels == 1 and whole.group != 1 and found.step == 1
    if not alone or times < 2 or times & (times - 1) or times > WIDEST:
        return None
    height, width = whole.windows.input
    channels, dtype = whole.group, whole.input.dtype
    pixel, rows = channels * times, whole.images * height
    image = Buffer("repeated_channels", dtype, product((rows, width, pixel)))
    view, source = Buffer("repeated_out", dtype), Buffer("single", dtype)
    row, column = k.index_symbol("row", rows), k.index_symbol("column", width)
    start = whole.start + row // height * whole.strides[0] + row % height * whole.strides[1]
    stores: list[Statement] = []
    first = 0
    while first < channels:
        size = max(1, WIDEST // times)
        while size > channels - first:
            size //= 2
        loaded = s.load(source, column * whole.strides[2] + first, size)
        pick = tuple(lane // times for lane in range(size * times))
        value = s.widen(loaded, times) if size == 1 else s.Shuffle(dtype, len(pick), loaded, loaded, pick)
        stores.append(Store(view, column * pixel + first * times, value))
        first += size
    body = (
        Alias(source, whole.input, start),
        Alias(view, image, row * width * pixel),
        For("column", width, tuple(stores)),
    )
    copy = call(whole.region, "repeat_channels", (For("row", rows, body, "parallel"),), (image,))
    changed = replace(
        whole,
        region=replace(whole.region, inputs=(*whole.region.inputs, buffer_tensor(image.name, dtype, (image.size,)))),
        input=image,
        start=0,
        strides=(height * width * pixel, width * pixel, pixel),
        group=pixel,
        filters=1,
    )
    return replace(found, whole=changed), image, copy
