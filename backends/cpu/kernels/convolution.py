"""Channels-last convolutions as the CPU's schedules take them: one or two spatial axes, weights that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....ir.dims import Dim, ceildiv, dim_max, dim_min, floordiv
from ....ir.dtypes import F32, F64, DType
from ....ir.ops.declare import CHANNELS_LAST
from ....ir.ops.windows import Windows
from ....ir.scalars import Buffer
from ....passes.regions import Lowered, Region
from ...kernels import convolution
from ...kernels.epilogue import Epilogue
from ...kernels.operands import Affine, affine
from ..dot_products import Dot
from .interleave import copied_image


@dataclass(frozen=True)
class Convolution:
    """A channels-last convolution over an image (of height 1 where there is one spatial axis).

    `strides` are those of the input in memory: batch, height, width (channels: 1). `pixel` gives the anchor's indices
    for an image, row and column; `outputs` is None where an output needs other elements of the anchor than its own.
    `copies` are kernels that come first: `region` reads what they make. Weights are [filters, channels, *kernel].
    Elements of `dtype` u32 are groups of channels that `dot` multiplies.
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
    dot: Dot | None = None

    @property
    def sums(self) -> DType:
        """The type of the sums."""
        return self.dtype if self.dot is None else self.dot.sums


def find_convolution(region: Region, turns: bool = True) -> Convolution | None:
    """The region's anchor as a convolution over one or two spatial axes with constant weights; None where it is not. An
    image of one column becomes one of one row, if it `turns`."""

    def find(region: Region) -> list[convolution.Convolution] | None:
        found = convolution.find_convolution(region)
        return None if found is None else [found]

    found = channels_last(region, find, turns=turns)
    return None if found is None else found[0]


def find_phases(region: Region) -> list[Convolution] | None:
    """A transposed convolution as one convolution of stride 1 for each phase of its strides."""
    return channels_last(region, convolution.find_phases)


def channels_last(
    region: Region,
    find: Callable[[Region], Sequence[convolution.Convolution] | None],
    dtypes: Sequence[DType] = (F32, F64),
    turns: bool = True,
) -> list[Convolution] | None:
    """What `find` makes of a channels-last region; None where sums are of another type, or weights are not known."""
    parts = find(region)
    if not parts or region.anchor is None or region.anchor.attributes.get("layout") != CHANNELS_LAST:
        return None
    first, copies = parts[0], Lowered(())
    if first.array is None or first.windows.rank > 2 or first.dtype not in dtypes:
        return None
    image = affine(first.image)
    if image is None or (first.image.shape[-1] != 1 and image.strides[-1] != 1):
        region, copies = copied_image(region)
        parts = find(region)
        assert parts is not None
        image = affine(parts[0].image)
    assert image is not None
    return [lifted(part, image, copies, turns) for part in parts]


def lifted(found: convolution.Convolution, image: Affine, copies: Lowered, turns: bool = True) -> Convolution:
    """A convolution over two axes, of which the first has one element where there is none: pixels that share registers
    follow one another along the second, which is why an image of one column becomes one of one row."""
    windows, weights, strides = found.windows, found.array, list(image.strides)
    assert weights is not None
    one_axis = windows.rank == 1
    if one_axis:
        windows = Windows(
            *((first, *given) for first, given in zip((1, 1, 1, 1, 0, 0, 1), _fields(windows), strict=True))  # type: ignore[arg-type]
        )
        weights = weights[:, :, None, :]
        strides.insert(1, 0)
    fields = _fields(windows)
    turned = (
        turns
        and not one_axis
        and tuple(field[1] for field in fields)
        == (
            1,
            1,
            *(entry[1] for entry in fields[2:4]),
            0,
            0,
            1,
        )
    )
    if turned:
        windows = Windows(*((second, first) for first, second in fields))  # type: ignore[arg-type]
        weights, strides = weights.swapaxes(2, 3), [strides[0], strides[2], strides[1]]

    def pixel(image: Dim, row: Dim, at: Dim) -> Mapping[str, Dim]:
        return found.pixel((image, at) if one_axis else (image, at, row) if turned else (image, row, at))

    return Convolution(
        windows,
        found.images,
        found.group,
        found.channels,
        found.filters,
        image.buffer,
        image.start,
        (strides[0], strides[1], strides[2]),
        found.dtype,
        weights,
        found.outputs,
        pixel,
        found.column,
        found.region,
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
