"""Channels-last convolutions, recognised: the operands in memory, the windows, and the epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, floordiv
from ....ir.dtypes import F32, F64, DType
from ....ir.graph import Node
from ....ir.ops.contraction import transposed_sizes
from ....ir.ops.declare import CHANNELS_LAST
from ....ir.ops.reduction import accumulator
from ....ir.ops.windows import Windows, per_axis, sliding
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import Tensor
from ....passes.regions import Lowered, Region
from ...kernels.epilogue import Epilogue, accumulator_leaf, anchor_indices, epilogue
from ...kernels.operands import affine, constant_array, copied


@dataclass(frozen=True)
class Convolution:
    """A channels-last convolution over an image (of height 1 where there is one spatial axis).

    `strides` are those of the input in memory: batch, height, width (channels: 1). `pixel` gives the anchor's indices
    for an image, row and column; `outputs` is None where an output needs other elements of the anchor than its own.
    `copies` are kernels that come first: `region` reads what they make. Weights are [filters, channels, *kernel].
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
    operands = _operands(region, "Conv")
    if operands is None:
        return None
    node, x, array = operands
    names = ("strides", "dilations", "pads", "auto_pad")
    options = {name: node.attributes[name] for name in names if node.attributes.get(name) is not None}
    windows = sliding(x.shape[1:-1], array.shape[2:], **options)  # type: ignore[arg-type]
    return _convolution(region, node, x, windows, array)


def find_phases(region: Region) -> list[Convolution] | None:
    """A transposed convolution as one convolution of stride 1 for each phase: the outputs that are equal modulo the
    strides take the same taps. None where the anchor is none, or its padding is only known at run time."""
    operands = _operands(region, "ConvTranspose")
    if operands is None:
        return None
    node, x, array = operands
    given, rank = node.attributes, x.rank - 2
    steps = per_axis(given.get("strides"), rank, "strides")  # type: ignore[arg-type]
    spread = per_axis(given.get("dilations"), rank, "dilations")  # type: ignore[arg-type]
    before, output = transposed_sizes(
        x.shape[1:-1],
        array.shape[2:],
        steps,
        spread,
        tuple(given.get("output_padding") or (0,) * rank),  # type: ignore[arg-type]
        given.get("pads"),  # type: ignore[arg-type]
        str(given.get("auto_pad") or "NOTSET"),
        tuple(given.get("output_shape") or ()),  # type: ignore[arg-type]
    )
    group = given.get("group", 1)
    assert isinstance(group, int)
    channels, filters = array.shape[0] // group, array.shape[1]
    array = array.reshape(group, channels, filters, *array.shape[2:]).swapaxes(1, 2)
    array = array.reshape(group * filters, channels, *array.shape[3:])
    whole = Windows(x.shape[1:-1], array.shape[2:], (1,) * rank, (1,) * rank, (0,) * rank, (0,) * rank, output)
    base = _convolution(region, node, x, whole, array)
    if base is None or not all(isinstance(entry, int) for entry in before):
        return None
    steps, spread, before = ((1,) * (2 - rank) + steps, (1,) * (2 - rank) + spread, (0,) * (2 - rank) + before)
    phases = [
        [_phase(p, *entry) for p in range(entry[0])]
        for entry in zip(steps, spread, before, base.windows.kernel, strict=True)
    ]
    return [
        _at_phase(base, steps, (vertical, horizontal), (row, column))
        for row, vertical in enumerate(phases[0])
        for column, horizontal in enumerate(phases[1])
    ]


def _phase(p: int, step: int, spread: int, before: Dim, kernel: Dim) -> tuple[list[int], int, int]:
    """(taps, dilation, padding) of the outputs o = p modulo `step` along one axis.

    Tap t of output o reads the input (o + before - t*spread) / step where that is whole; the taps come in the order of
    what they read.
    """
    assert isinstance(before, int) and isinstance(kernel, int)
    reads = {t: (p + before - t * spread) // step for t in range(kernel) if (p + before - t * spread) % step == 0}
    taps = sorted(reads, key=lambda t: reads[t])
    if not taps:
        return [], 1, 0
    return taps, reads[taps[1]] - reads[taps[0]] if len(taps) > 1 else 1, -reads[taps[0]]


def _at_phase(
    base: Convolution, steps: Sequence[int], axes: Sequence[tuple[list[int], int, int]], phase: tuple[int, int]
) -> Convolution:
    weights = base.weights[:, :, [*axes[0][0]], :][:, :, :, [*axes[1][0]]]
    if not weights.size:  # Outputs that no tap reaches: one tap of zeros.
        weights = np.zeros((*weights.shape[:2], *(max(extent, 1) for extent in weights.shape[2:])), weights.dtype)
    windows = Windows(
        base.windows.input,
        weights.shape[2:],
        (1, 1),
        (axes[0][1], axes[1][1]),
        (axes[0][2], axes[1][2]),
        (1, 1),  # Something other than 0: taps may lie outside, and are tested for it.
        tuple(ceildiv(extent - p, step) for extent, p, step in zip(base.windows.output, phase, steps, strict=True)),
    )

    def pixel(image: Dim, row: Dim, at: Dim) -> Mapping[str, Dim]:
        return base.pixel(image, row * steps[0] + phase[0], at * steps[1] + phase[1])

    return replace(base, windows=windows, weights=weights, pixel=pixel)


def _operands(region: Region, op: str) -> tuple[Node, Tensor, np.ndarray] | None:
    """The node, the image and the weights' array of an anchor with channels-last images; None for any other."""
    node, output = region.anchor, region.anchor_output
    if node is None or output is None or node.op != op or node.attributes.get("layout") != CHANNELS_LAST:
        return None
    x, w = region.operands[:2]
    array = constant_array(region, w)
    if x is None or array is None or x.rank not in (3, 4) or x.kind == "opaque" or 0 in (*output.shape, *array.shape):
        return None
    return node, x, array


def _convolution(region: Region, node: Node, x: Tensor, windows: Windows, array: np.ndarray) -> Convolution | None:
    output = region.anchor_output
    assert output is not None
    dtype = accumulator(x.dtype)
    if dtype not in (F32, F64):
        return None
    bias = region.operands[2] if len(region.operands) > 2 else None
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
    element: Scalar = accumulator_leaf(dtype, own[-1])
    if bias is not None:
        element = element + s.cast(bias.at((own[-1],)), dtype)
    outputs = epilogue(region, own, output.shape, s.cast(element, output.dtype), column, dtype)
    if x.rank == 3:  # One spatial axis: an image of height 1.
        windows = Windows(
            *((first, *given) for first, given in zip((1, 1, 1, 1, 0, 0, 1), _fields(windows), strict=True))  # type: ignore[arg-type]
        )
        array = array[:, :, None, :]
        strides.insert(1, 0)

    def pixel(image: Dim, row: Dim, at: Dim) -> Mapping[str, Dim]:
        where = (image, at) if x.rank == 3 else (image, row, at)
        return {f"o{a}": d for a, d in enumerate(where)}

    group = node.attributes.get("group", 1)
    assert isinstance(group, int)
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
