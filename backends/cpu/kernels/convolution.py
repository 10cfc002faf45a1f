"""Channels-last convolutions, recognised: the operands in memory, the windows, and the epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, floordiv
from ....ir.dtypes import F32, F64, DType
from ....ir.ops.declare import CHANNELS_LAST
from ....ir.ops.reduction import accumulator
from ....ir.ops.windows import Windows, sliding
from ....ir.scalars import Buffer, Scalar
from ....passes.regions import Lowered, Region
from .epilogue import Epilogue, accumulator_leaf, anchor_indices, epilogue
from .operands import affine, constant_array, copied


@dataclass(frozen=True)
class Convolution:
    """A channels-last convolution over an image (of height 1 where there is one spatial axis).

    `strides` are those of the input in memory: batch, height, width (channels: 1). `pixel` gives the anchor's indices
    for an image, row and column; `outputs` is None where an output needs other elements of the anchor than its own.
    `copies` are kernels that come first: `region` reads what they make.
    """

    windows: Windows
    images: Dim
    group: int
    channels: int
    filters: int
    input: Buffer
    start: Dim
    strides: tuple[Dim, Dim, Dim]
    dtype: DType
    weights: np.ndarray
    outputs: Epilogue | None
    pixel: Callable[[Dim, Dim, Dim], Mapping[str, Dim]]
    column: str
    region: Region
    copies: Lowered


def find_convolution(region: Region) -> Convolution | None:
    """The region's anchor as a convolution over one or two spatial axes with constant weights; None where it is not."""
    node, output = region.anchor, region.anchor_output
    if node is None or output is None or node.op != "Conv" or node.attributes.get("layout") != CHANNELS_LAST:
        return None
    x, w, *rest = region.operands
    bias = rest[0] if rest else None
    array = constant_array(region, w)
    if (
        x is None
        or array is None
        or x.rank not in (3, 4)
        or 0 in output.shape
        or output.shape[-1] == 1
        or x.kind == "opaque"
        or not x.dtype.is_float
    ):
        return None
    names = ("strides", "dilations", "pads", "auto_pad")
    options = {name: node.attributes[name] for name in names if node.attributes.get(name) is not None}
    windows = sliding(x.shape[1:-1], array.shape[2:], **options)  # type: ignore[arg-type]
    group = int(node.attributes.get("group", 1))  # type: ignore[call-overload]
    copies = Lowered(())
    image = affine(x)
    if image is None or (x.shape[-1] != 1 and image.strides[-1] != 1):
        region, copies = copied(region, (0,))
        assert region.operands[0] is not None
        image = affine(region.operands[0])
    assert image is not None
    strides = list(image.strides)
    own = anchor_indices(output.shape)
    column = f"o{len(own) - 1}"
    dtype = accumulator(x.dtype)
    element: Scalar = accumulator_leaf(dtype, own[-1])
    if bias is not None:
        element = element + s.cast(bias.at((own[-1],)), dtype)
    outputs = epilogue(region, own, output.shape, s.cast(element, output.dtype), column, dtype)
    if dtype not in (F32, F64):
        return None
    if x.rank == 3:  # One spatial axis: an image of height 1.
        windows = Windows(
            *((first, *given) for first, given in zip((1, 1, 1, 1, 0, 0, 1), _fields(windows), strict=True))  # type: ignore[arg-type]
        )
        array = array[:, :, None, :]
        strides.insert(1, 0)

    def pixel(image: Dim, row: Dim, at: Dim) -> Mapping[str, Dim]:
        where = (image, at) if x.rank == 3 else (image, row, at)
        return {f"o{a}": d for a, d in enumerate(where)}

    return Convolution(
        windows,
        x.shape[0],
        group,
        int(array.shape[1]),
        int(array.shape[0]) // group,
        image.buffer,
        image.start,
        (strides[0], strides[1], strides[2]),
        dtype,
        array,
        outputs,
        pixel,
        column,
        region,
        copies,
    )


def _fields(windows: Windows) -> tuple[tuple[Dim, ...], ...]:
    w = windows
    return w.input, w.kernel, w.strides, w.dilations, w.before, w.after, w.output


def tap_rows(windows: Windows, row: Dim) -> tuple[Dim, Dim]:
    """Which rows of the kernel lie inside the image for an output row: from the first up to the second."""
    if not windows.padded[0]:
        return 0, windows.kernel[0]
    stride, spread, before, extent = (entry[0] for entry in axes(windows))
    reach = row * stride - before
    return dim_max(0, ceildiv(-reach, spread)), dim_min(windows.kernel[0], ceildiv(extent - reach, spread))


def inside_pixels(windows: Windows) -> tuple[Dim, Dim]:
    """The first and the last pixel of an output row all of whose taps lie within the image's width."""
    stride, spread, before, extent = (entry[1] for entry in axes(windows))
    return ceildiv(before, stride), floordiv(extent - 1 - (windows.kernel[1] - 1) * spread + before, stride)


def axes(windows: Windows) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Dim, ...], tuple[Dim, ...]]:
    """Strides, dilations, padding before and extents of the input, each by axis."""
    return windows.strides, windows.dilations, windows.before, windows.input
