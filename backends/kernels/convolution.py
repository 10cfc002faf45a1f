"""Convolutions over any number of spatial axes, recognised: the windows, the operands, and the epilogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from ...ir import scalars as s
from ...ir.dims import Dim, ceildiv
from ...ir.dtypes import I32, DType
from ...ir.graph import Node
from ...ir.ops.contraction import transposed_sizes
from ...ir.ops.declare import CHANNELS_LAST
from ...ir.ops.reduction import accumulator
from ...ir.ops.windows import Windows, per_axis, sliding
from ...ir.scalars import Scalar
from ...ir.tensors import Tensor, view
from ...passes.regions import Region
from .epilogue import Epilogue, accumulator_leaf, anchor_indices, epilogue
from .operands import constant_array


@dataclass(frozen=True)
class Convolution:
    """A convolution with the channels of its image last, whatever the layout of the region's anchor.

    `image` is [images, *spatial, group * channels], `weights` [group * filters, channels, *kernel]; `array` holds the
    weights where the model fixes them. Sums are of type `dtype`. `pixel` gives the anchor's indices, all but the
    filter's (`column`), for the indices of an image and a pixel. `outputs` is None where an output needs other elements
    of the anchor than its own.
    """

    region: Region
    windows: Windows
    group: int
    channels: int
    filters: int
    image: Tensor
    weights: Tensor
    array: np.ndarray | None
    dtype: DType
    outputs: Epilogue | None
    pixel: Callable[[Sequence[Dim]], Mapping[str, Dim]]
    column: str

    @property
    def images(self) -> Dim:
        return self.image.shape[0]

    @property
    def has_zero_points(self) -> bool:
        """Whether something is to be subtracted from the integers of the image or the weights."""
        node = self.region.anchor
        return node is not None and node.op == "ConvInteger" and any(x is not None for x in self.region.operands[2:])


def find_convolution(region: Region, *ops: str) -> Convolution | None:
    """The region's anchor as a convolution with weights of known shape; None where it is none of `ops` (of Conv, where
    none are given).

    Of a ConvInteger images and weights are as they lie in memory, with their zero points.
    """
    operands = _operands(region, *(ops or ("Conv",)))
    if operands is None:
        return None
    node, image, weights = operands
    names = ("strides", "dilations", "pads", "auto_pad")
    options = {name: node.attributes[name] for name in names if node.attributes.get(name) is not None}
    windows = sliding(image.shape[1:-1], weights.shape[2:], **options)  # type: ignore[arg-type]
    array = constant_array(region, weights)
    return _convolution(region, node, windows, image, weights, array)


@dataclass(frozen=True)
class Phase:
    """The taps of the outputs of one phase along one axis, in the order of what they read; their spacing in the input
    (`dilation`), and how far before the output's own place the first one reads (`before`)."""

    taps: tuple[int, ...]
    dilation: int
    before: int


@dataclass(frozen=True)
class Transposed:
    """A transposed convolution as one of stride 1 for each phase: outputs that are equal modulo the strides take the
    same taps. `whole` has the outputs and weights of all; `axes` are the phases along each axis."""

    whole: Convolution
    strides: tuple[int, ...]
    axes: tuple[tuple[Phase, ...], ...]

    @property
    def places(self) -> list[tuple[int, ...]]:
        """All phases, by what their outputs are modulo the strides."""
        return list(product(*map(range, self.strides)))

    def at(self, place: Sequence[int]) -> Convolution:
        """The convolution of one phase."""
        return _at_phase(self.whole, self.strides, [axis[p] for axis, p in zip(self.axes, place, strict=True)], place)


def find_phases(region: Region) -> list[Convolution] | None:
    """A transposed convolution, phase by phase; None where the anchor is none, or its padding is only known at run
    time."""
    found = find_transposed(region)
    return None if found is None else [found.at(place) for place in found.places]


def find_transposed(region: Region) -> Transposed | None:
    """The region's anchor as a transposed convolution; None where it is none, or its padding is only known at run
    time."""
    operands = _operands(region, "ConvTranspose")
    if operands is None:
        return None
    node, image, stored = operands
    given, rank = node.attributes, image.rank - 2
    steps = per_axis(given.get("strides"), rank, "strides")  # type: ignore[arg-type]
    spread = per_axis(given.get("dilations"), rank, "dilations")  # type: ignore[arg-type]
    before, output = transposed_sizes(
        image.shape[1:-1],
        stored.shape[2:],
        steps,
        spread,
        tuple(given.get("output_padding") or (0,) * rank),  # type: ignore[arg-type]
        given.get("pads"),  # type: ignore[arg-type]
        str(given.get("auto_pad") or "NOTSET"),
        tuple(given.get("output_shape") or ()),  # type: ignore[arg-type]
    )
    if not all(isinstance(entry, int) for entry in before):
        return None
    group = node.attributes.get("group", 1)
    assert isinstance(group, int)
    channels, filters, *kernel = (int(str(d)) for d in stored.shape)
    channels //= group
    shape = (group * filters, channels, *kernel)
    weights = view(stored, shape, lambda m, c, *t: (m // filters * channels + c, m % filters, *t))
    array = constant_array(region, stored)
    if array is not None:
        array = array.reshape(group, channels, filters, *kernel).swapaxes(1, 2).reshape(shape)
    windows = Windows(image.shape[1:-1], tuple(kernel), (1,) * rank, (1,) * rank, (0,) * rank, (0,) * rank, output)
    axes = [
        tuple(_phase(p, *entry) for p in range(entry[0])) for entry in zip(steps, spread, before, kernel, strict=True)
    ]
    return Transposed(_convolution(region, node, windows, image, weights, array), steps, tuple(axes))


def _phase(p: int, step: int, spread: int, before: Dim, kernel: int) -> Phase:
    """Phase p of an axis: tap t of output o reads the input (o + before - t*spread) / step where that is whole."""
    assert isinstance(before, int)
    reads = {t: (p + before - t * spread) // step for t in range(kernel) if (p + before - t * spread) % step == 0}
    taps = sorted(reads, key=lambda t: reads[t])
    if not taps:
        return Phase((), 1, 0)
    return Phase(tuple(taps), reads[taps[1]] - reads[taps[0]] if len(taps) > 1 else 1, -reads[taps[0]])


def _at_phase(base: Convolution, steps: Sequence[int], axes: Sequence[Phase], place: Sequence[int]) -> Convolution:
    array, weights = base.array, base.weights
    kernel = tuple(max(len(axis.taps), 1) for axis in axes)
    shape = (*weights.shape[:2], *kernel)
    if all(axis.taps for axis in axes):
        for number, axis in enumerate(axes):
            array = None if array is None else np.take(array, axis.taps, 2 + number)
        # The taps are evenly spaced.
        firsts = [axis.taps[0] for axis in axes]
        apart = [axis.taps[1] - axis.taps[0] if len(axis.taps) > 1 else 0 for axis in axes]

        def tap(m: Dim, c: Dim, *taps: Dim) -> Sequence[Dim]:
            return m, c, *(first + t * step for first, t, step in zip(firsts, taps, apart, strict=True))

        weights = view(base.weights, shape, tap)
    else:  # Outputs that no tap reaches: one tap of zeros.
        zero = s.const(0, weights.dtype)
        weights = Tensor(shape, weights.dtype, lambda _: zero)
        array = np.zeros([int(str(d)) for d in shape], weights.dtype.numpy)
    rank = len(axes)
    windows = Windows(
        base.windows.input,
        kernel,
        (1,) * rank,
        tuple(axis.dilation for axis in axes),
        tuple(axis.before for axis in axes),
        (1,) * rank,  # Something other than 0: taps may lie outside, and are tested for it.
        tuple(ceildiv(extent - p, step) for extent, p, step in zip(base.windows.output, place, steps, strict=True)),
    )

    def pixel(where: Sequence[Dim]) -> Mapping[str, Dim]:
        image, *at = where
        return base.pixel((image, *(a * step + p for a, step, p in zip(at, steps, place, strict=True))))

    return replace(base, windows=windows, weights=weights, array=array, pixel=pixel)


def _operands(region: Region, *ops: str) -> tuple[Node, Tensor, Tensor] | None:
    """The node, its image with the channels last and its weights, of known shape; None for another operator."""
    node, output = region.anchor, region.anchor_output
    if node is None or output is None or node.op not in ops:
        return None
    image, weights = region.operands[:2]
    if image is None or weights is None or image.kind == "opaque" or weights.kind == "opaque":
        return None
    if 0 in (*output.shape, *weights.shape) or not all(isinstance(d, int) for d in weights.shape):
        return None
    if node.attributes.get("layout") != CHANNELS_LAST:
        shape = (image.shape[0], *image.shape[2:], image.shape[1])
        image = view(image, shape, lambda n, *rest: (n, rest[-1], *rest[:-1]))
    return node, image, weights


def _convolution(
    region: Region, node: Node, windows: Windows, image: Tensor, weights: Tensor, array: np.ndarray | None
) -> Convolution:
    output = region.anchor_output
    assert output is not None
    integer = node.op == "ConvInteger"
    dtype = I32 if integer else accumulator(image.dtype)
    last = node.attributes.get("layout") == CHANNELS_LAST
    own = anchor_indices(output.shape)
    axis = len(own) - 1 if last else 1
    element: Scalar = accumulator_leaf(dtype, own[axis])
    bias = region.operands[2] if len(region.operands) > 2 and not integer else None
    if bias is not None:
        element = element + s.cast(bias.at((own[axis],)), dtype)
    column = f"o{axis}"
    outputs = epilogue(region, own, output.shape, s.cast(element, output.dtype), column, dtype)

    def pixel(where: Sequence[Dim]) -> Mapping[str, Dim]:
        image, *at = where
        places = (image, *at) if last else (image, 0, *at)
        return {f"o{number}": d for number, d in enumerate(places) if number != axis}

    group = node.attributes.get("group", 1)
    assert isinstance(group, int)
    filters, channels = int(str(weights.shape[0])), int(str(weights.shape[1]))
    return Convolution(
        region, windows, group, channels, filters // group, image, weights, array, dtype, outputs, pixel, column
    )
