"""Operators that read images at places that other tensors tell: grids, regions of interest, deformed kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..dims import Dim, ceildiv, dim_max, dim_min, floordiv, modulo, product
from ..dtypes import I64
from ..errors import ShapeError, UnsupportedError
from ..functions import absolute, cast, ceil, floor, maximum, round_even, where
from ..guards import guard
from ..scalars import Scalar, as_dim, as_scalar, const, index
from ..tensors import (
    Indices,
    Tensor,
    all_of,
    assume_equal,
    assume_shape,
    compute,
    flat_offset,
    inside,
    position_of,
    reduce_tensor,
    reduction,
)
from .contraction import per_channel
from .declare import Registry, Static
from .reduction import accumulator, blending_type
from .resize import cubic_weight, distance_to, linear_weight
from .windows import per_axis, sliding

declare = Registry()


def size_scalar(extent: Dim, like: Scalar) -> Scalar:
    """A size as a number of the type of `like`."""
    return const(extent, like.dtype) if isinstance(extent, int) else cast(index(extent), like.dtype)


def clipped(position: Scalar, extent: Dim) -> Dim:
    """A whole float as an index of an axis; what lies outside, or is no number, is taken to the border."""
    last = size_scalar(extent - 1, position)
    return as_dim(cast(where(position > 0, where(position < last, position, last), 0), I64), 0, extent - 1)


def within(position: Scalar, extent: Dim) -> Scalar:
    """Whether a whole float is an index of an axis."""
    return (as_scalar(0, position.dtype) <= position) & (position < size_scalar(extent, position))


def bilinear(read: Callable[[Indices], Scalar], places: Sequence[Scalar], extents: Sequence[Dim]) -> Scalar:
    """The multilinear interpolation at float coordinates of an image that is zero outside."""

    def along(axis: int, chosen: Indices, conditions: list[Scalar]) -> Scalar:
        if axis == len(places):
            value = read(chosen)
            return where(all_of(conditions), value, const(0, value.dtype))
        low = floor(places[axis])
        part = places[axis] - low
        near, far = (
            along(axis + 1, (*chosen, clipped(p, extents[axis])), [*conditions, within(p, extents[axis])])
            for p in (low, low + 1)
        )
        return near * (1 - part) + far * part

    return along(0, (), [])


def reflected(place: Scalar, extent: Dim, align_corners: bool) -> Scalar:
    """A coordinate mirrored at the borders of the axis until it lies within."""
    if extent == 1 and align_corners:
        return place * 0
    low = 0.0 if align_corners else -0.5
    span = size_scalar(extent - 1 if align_corners else extent, place)
    distance = absolute(place - low)
    turns = floor(distance / span)
    rest = distance - turns * span
    even = (turns * 0.5).equal(floor(turns * 0.5))
    return where(even, rest, span - rest) + low


@declare.op("GridSample", precise=("grid",))
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """x [N, C, *spatial] read at the coordinates in [-1, 1] of grid [N, *output, rank], that of the last axis first.

    Outside of the image lie zeros, its border, or its reflection.
    """
    rank, aligned = x.rank - 2, bool(align_corners)
    extents = x.shape[2:]
    assume_shape(grid, (x.shape[0], *grid.shape[1 : rank + 1], rank), "the grid")
    offsets = {"nearest": (0,), "linear": (0, 1), "cubic": (-1, 0, 1, 2)}.get(mode)
    if offsets is None or padding_mode not in ("zeros", "border", "reflection"):
        raise UnsupportedError(f"mode {mode!r} with padding_mode {padding_mode!r}")
    cubic = cubic_weight(-0.75)

    def weight(offset: int, part: Scalar) -> Scalar:
        if mode == "linear":
            return linear_weight(offset, part)
        return cubic(distance_to(offset, part), offset in (0, 1))

    def place(value: Scalar, extent: Dim) -> Scalar:
        size = size_scalar(extent, value)
        result = (value + 1) * 0.5 * (size - 1) if aligned else ((value + 1) * size - 1) * 0.5
        result = round_even(result) if mode == "nearest" else result
        return result if mode == "cubic" else padded(result, extent)

    def padded(position: Scalar, extent: Dim) -> Scalar:
        if padding_mode == "border":
            last = size_scalar(extent - 1, position)
            return where(position > 0, where(position < last, position, last), 0)
        return reflected(position, extent, aligned) if padding_mode == "reflection" else position

    def element(n: Dim, c: Dim, *o: Dim) -> Scalar:
        real = accumulator(grid.dtype)
        places = [place(cast(grid.at((n, *o, rank - 1 - a)), real), extents[a]) for a in range(rank)]

        def along(axis: int, chosen: Indices, conditions: list[Scalar]) -> Scalar:
            if axis == rank:
                value = cast(x.at((n, c, *chosen)), x.dtype if mode == "nearest" else blending_type(x.dtype))
                return where(all_of(conditions), value, 0)
            low = places[axis] if mode == "nearest" else floor(places[axis])
            total: Scalar | None = None
            for offset in offsets:
                position = low + offset
                if mode == "cubic":
                    position = padded(position, extents[axis])
                tests = [within(position, extents[axis])] if padding_mode == "zeros" else []
                term = along(axis + 1, (*chosen, clipped(round_even(position), extents[axis])), [*conditions, *tests])
                if mode != "nearest":
                    part = places[axis] - low
                    term = term * cast(weight(offset, part), term.dtype)
                total = term if total is None else total + term
            assert total is not None
            return total

        return cast(along(0, (), []), x.dtype)

    return compute((*x.shape[:2], *grid.shape[1:-1]), x.dtype, element, x, grid)


@declare.op("AffineGrid", static=("size",), precise=("theta", "result"))
def affine_grid(theta: Tensor, size: Static, *, align_corners: int = 0) -> Tensor:
    """The grid [N, *output, rank] that theta [N, rank, rank + 1] maps an output of `size` [N, C, *output] to."""
    output = tuple(size[2:])
    rank = len(output)
    assume_shape(theta, (size[0], rank, rank + 1), "theta")

    def element(*i: Dim) -> Scalar:
        total = theta.at((i[0], i[-1], rank))
        for axis, extent in enumerate(reversed(output)):
            step = cast(index(i[rank - axis]), theta.dtype)
            if align_corners:
                place = step * 2 / size_scalar(dim_max(extent - 1, 1), total) - 1  # of one point: the first corner
            else:
                place = (step * 2 + 1) / size_scalar(extent, total) - 1
            total = total + theta.at((i[0], i[-1], axis)) * place
        return total

    return compute((theta.shape[0], *output, rank), theta.dtype, element, theta)


@declare.op("RoiAlign", precise=("rois",))
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """[R, C, height, width]: means (or maxima) of samples in the bins of each of rois [R, 4] = x1, y1, x2, y2."""
    half = 0.5 if coordinate_transformation_mode == "half_pixel" else 0.0
    bins = (output_height, output_width)
    extents = x.shape[2:]
    if x.rank != 4:
        raise ShapeError(f"the input must be [N, C, height, width], not of rank {x.rank}")
    assume_shape(rois, (rois.shape[0], 4), "the regions")
    assume_shape(batch_indices, (rois.shape[0],), "the batch indices")
    guard(batch_indices, x.shape[0], 0, "a batch")

    real = accumulator(x.dtype)

    def element(r: Dim, c: Dim, *o: Dim) -> Scalar:
        image = position_of(batch_indices, (r,), x.shape[0])
        starts, sizes, counts = [], [], []
        for axis in range(2):
            start, end = (cast(rois.at((r, 1 - axis + 2 * side)), real) * spatial_scale - half for side in (0, 1))
            extent = end - start if half else maximum(end - start, 1)
            starts.append(start)
            sizes.append(extent / bins[axis])
            counts.append(sampling_ratio or as_dim(cast(ceil(extent / bins[axis]), I64), 0))

        def sample(*k: Dim) -> Scalar:
            taps: list[tuple[Scalar, Dim, Dim]] = []
            valid: list[Scalar] = []
            for axis in range(2):
                step = (cast(index(k[axis]), real) + 0.5) / size_scalar(counts[axis], starts[0])
                place = starts[axis] + (cast(index(o[axis]), real) + step) * sizes[axis]
                valid += [as_scalar(-1, real) <= place, place <= size_scalar(extents[axis], place)]
                place = maximum(place, 0)
                low = clipped(floor(place), extents[axis])
                part = where(index(low).equal(index(extents[axis] - 1)), 0, place - cast(index(low), real))
                taps.append((part, low, dim_min(low + 1, extents[axis] - 1)))
            (y, y0, y1), (z, z0, z1) = taps
            corners = [(y0, z0, (1 - y) * (1 - z)), (y0, z1, (1 - y) * z), (y1, z0, y * (1 - z)), (y1, z1, y * z)]
            terms = [cast(x.at((image, c, a, b)), real) * weight for a, b, weight in corners]
            total = terms[0]
            for term in terms[1:]:
                total = total + term if mode == "avg" else maximum(total, term)
            return where(all_of(valid), total, 0)

        if mode != "avg":
            return cast(_or_zero(reduction("max", (r, c, *o), counts, sample), counts), x.dtype)
        samples = size_scalar(dim_max(1, product(counts)), starts[0])
        return cast(reduction("add", (r, c, *o), counts, sample) / samples, x.dtype)

    return compute((rois.shape[0], x.shape[1], *bins), x.dtype, element, x, rois, batch_indices)


def _or_zero(value: Scalar, counts: Sequence[Dim]) -> Scalar:
    """Zero instead of the identity of an empty range."""
    return where(all_of([as_scalar(0, I64) < index(count) for count in counts]), value, 0)


@declare.op("MaxRoiPool", precise=("rois",))
def max_roi_pool(x: Tensor, rois: Tensor, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """[R, C, *pooled_shape]: maxima of the bins that each of rois [R, 5] = batch, x1, y1, x2, y2 is cut into."""
    guard(compute(rois.shape[:1], I64, lambda r: cast(rois.at((r, 0)), I64), rois), x.shape[0], 0, "a batch")
    real = accumulator(rois.dtype)

    def element(r: Dim, c: Dim, *o: Dim) -> Scalar:
        image = clipped(rois.at((r, 0)), x.shape[0])
        firsts, counts = [], []
        for axis in range(2):
            start, end = (
                as_dim(cast(floor(cast(rois.at((r, 2 - axis + 2 * side)), real) * spatial_scale + 0.5), I64))
                for side in (0, 1)
            )
            length, extent = dim_max(1, end - start + 1), x.shape[2 + axis]
            first = dim_min(extent, dim_max(0, start + floordiv(o[axis] * length, pooled_shape[axis])))
            stop = dim_min(extent, dim_max(0, start + ceildiv((o[axis] + 1) * length, pooled_shape[axis])))
            firsts.append(first)
            counts.append(dim_max(0, stop - first))

        def sample(*k: Dim) -> Scalar:
            return x.at((image, c, *(first + step for first, step in zip(firsts, k, strict=True))))

        return _or_zero(reduction("max", (r, c, *o), counts, sample), counts)

    return compute((rois.shape[0], x.shape[1], *pooled_shape), x.dtype, element, x, rois)


@declare.op("DeformConv", precise=("offset",))
def deform_conv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution whose taps are moved by `offset` [N, groups*kernel*rank, *output] and weighed by `mask`."""
    rank, kernel, channels = x.rank - 2, w.shape[2:], w.shape[1]
    windows = sliding(x.shape[2:], kernel, strides, dilations, pads)
    assume_equal(x.shape[1], channels * group, f"channels of the input and of {group} groups of the kernel")
    filters, shared = floordiv(w.shape[0], group), floordiv(x.shape[1], offset_group)
    taps, real = product(kernel), accumulator(x.dtype)
    assume_shape(w, (w.shape[0], channels, *kernel[:rank]), "the weights")
    assume_shape(offset, (x.shape[0], offset_group * taps * rank, *windows.output), "the offsets")
    assume_shape(mask, (x.shape[0], offset_group * taps, *windows.output), "the mask")

    def body(i: Indices, r: Indices) -> Scalar:
        n, m, *o = i
        c, *k = r
        channel = floordiv(m, filters) * channels + c
        tap = floordiv(channel, shared) * taps + flat_offset(k, kernel)
        positions = windows.positions(o, k)
        places = [cast(index(positions[a]), real) + cast(offset.at((n, tap * rank + a, *o)), real) for a in range(rank)]
        value = bilinear(lambda s: cast(x.at((n, channel, *s)), real), places, x.shape[2:])
        value = value * cast(w.at((m, c, *k)), real)
        return value if mask is None else value * cast(mask.at((n, tap, *o)), real)

    shape = (x.shape[0], w.shape[0], *windows.output)
    sources = [t for t in (x, w, offset, mask) if t is not None]
    total = reduce_tensor("add", shape, real, (channels, *kernel), body, *sources)
    if b is not None:
        total = total + per_channel(cast(b, real), x.rank)
    return cast(total, x.dtype)


@declare.op("Col2Im", static=("image_shape", "block_shape"))
def col2im(
    x: Tensor,
    image_shape: Static,
    block_shape: Static,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Images [N, C, *image] as sums of the overlapping blocks in x [N, C*block, positions]."""
    rank = len(image_shape)
    windows = sliding(image_shape, block_shape, strides, dilations, pads)
    taps = product(block_shape)
    steps = per_axis(strides, rank, "strides")
    assume_equal(x.shape[2], product(windows.output), "columns and positions of the block")

    def body(i: Indices, r: Indices) -> Scalar:
        reached = [
            o + before - k * dilation
            for o, k, before, dilation in zip(i[2:], r, windows.before, windows.dilations, strict=True)
        ]
        columns = [floordiv(place, step) for place, step in zip(reached, steps, strict=True)]
        tests = [index(modulo(place, step)).equal(0) for place, step in zip(reached, steps, strict=True)]
        tests += [inside(column, extent) for column, extent in zip(columns, windows.output, strict=True)]
        source = (i[0], i[1] * taps + flat_offset(r, block_shape), flat_offset(columns, windows.output))
        return where(all_of(tests), x.at(source), const(0, x.dtype))

    shape = (x.shape[0], floordiv(x.shape[1], taps), *image_shape)
    return reduce_tensor("add", shape, x.dtype, tuple(block_shape), body, x)
