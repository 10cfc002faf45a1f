"""Operators that put elements elsewhere: every output element is one input element, or a constant."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..dims import Dim, ceildiv, dim_max, dim_min, divide_exactly, floordiv, known_le, modulo, product
from ..errors import ShapeError, UnsupportedError, ValueNeeded
from ..functions import where
from ..scalars import Scalar, binary, const, index
from ..tensors import (
    Indices,
    Tensor,
    all_of,
    assume_equal,
    broadcast_index,
    broadcast_shapes,
    compute,
    dims_tensor,
    inside,
    normalize_axes,
    normalize_axis,
    reshaped,
    view,
)
from .declare import Context, Registry, Static

declare = Registry()

UNBOUNDED = 10**9
"""A slice's bound from here on means the end of the axis (exporters write 10^9, INT32_MAX or INT64_MAX)."""


def replaced(sequence: Sequence[Dim], changes: dict[int, Dim]) -> Indices:
    """The sequence with some positions changed."""
    return tuple(changes.get(position, item) for position, item in enumerate(sequence))


@declare.op("Reshape", static=("shape",), movement=True)
def reshape(x: Tensor, shape: Static, *, allowzero: int = 0) -> Tensor:
    """The elements in row-major order under another shape; -1 is what the others leave, 0 the extent there is."""
    if sum(1 for extent in shape if extent == -1) > 1:
        raise ShapeError(f"the new shape {list(map(str, shape))} has more than one -1")
    wanted = [x.shape[axis] if extent == 0 and not allowzero else extent for axis, extent in enumerate(shape)]
    if -1 in wanted:
        free = wanted.index(-1)
        others = product(extent for extent in wanted if extent != -1)
        exact = divide_exactly(x.size, others) if others != 0 else 0
        wanted[free] = floordiv(x.size, others) if exact is None else exact
    if product(wanted) != x.size:
        assume_equal(x.size, product(wanted), f"{x.shape} reshaped to {tuple(shape)}: numbers of elements")
    return reshaped(x, wanted)


@declare.op("Flatten", movement=True)
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.rank if axis < 0 else axis
    return reshaped(x, (product(x.shape[:axis]), product(x.shape[axis:])))


@declare.op("Squeeze", static=("axes",), movement=True)
def squeeze(x: Tensor, axes: Static | None = None) -> Tensor:
    """Without the given axes of extent 1; without all that are 1 where none are given."""
    if axes is None:
        for extent in x.shape:
            if not isinstance(extent, int) and not known_le(2, extent):
                raise ValueNeeded(f"whether {extent} is 1, and the axis to be dropped, is known only at run time")
        return reshaped(x, [extent for extent in x.shape if extent != 1])
    dropped = normalize_axes(axes, x.rank)
    for axis in dropped:
        assume_equal(x.shape[axis], 1, f"squeezed axis {axis} of {x.shape}")
    return reshaped(x, [extent for axis, extent in enumerate(x.shape) if axis not in dropped])


@declare.op("Unsqueeze", static=("axes",), movement=True)
def unsqueeze(x: Tensor, axes: Static) -> Tensor:
    rank = x.rank + len(axes)
    added = normalize_axes(axes, rank)
    if len(added) < len(axes):
        raise ShapeError(f"axes {list(axes)} name an axis twice")
    extents = iter(x.shape)
    return reshaped(x, [1 if axis in added else next(extents) for axis in range(rank)])


@declare.op("Transpose", movement=True)
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axis k of the result is axis perm[k] of `x`."""
    order = tuple(reversed(range(x.rank))) if perm is None else tuple(normalize_axis(axis, x.rank) for axis in perm)
    if sorted(order) != list(range(x.rank)):
        raise ShapeError(f"perm {list(order)} is no permutation of the {x.rank} axes")
    return view(x, [x.shape[axis] for axis in order], lambda *i: [i[order.index(axis)] for axis in range(x.rank)])


@declare.op("Expand", static=("shape",), movement=True)
def expand(x: Tensor, shape: Static) -> Tensor:
    wanted = list(shape)
    for axis, own in enumerate(reversed(x.shape[max(0, x.rank - len(wanted)) :]), 1):
        size = wanted[-axis]
        if isinstance(own, int) and own != 1 and not isinstance(size, int):
            # What only the run tells may be 1 as well.
            assume_equal((size - 1) * (size - own), 0, f"axis {-axis} of the shape, 1 or {own},")
            wanted[-axis] = own
    result = broadcast_shapes(x.shape, wanted)
    return view(x, result, lambda *i: broadcast_index(i, result, x))


@declare.op("Tile", static=("repeats",), movement=True)
def tile(x: Tensor, repeats: Static) -> Tensor:
    if len(repeats) != x.rank:
        raise ShapeError(f"{len(repeats)} repeats for {x.rank} axes")

    def source(*i: Dim) -> Indices:
        return tuple(j if n == 1 or d == 0 else modulo(j, d) for j, n, d in zip(i, repeats, x.shape, strict=True))

    return view(x, [d * n for d, n in zip(x.shape, repeats, strict=True)], source)


@declare.op("Concat", movement=True)
def concat(*parts: Tensor, axis: int) -> Tensor:
    """The parts one after another along an axis; they agree in all other extents."""
    first = parts[0]
    axis = normalize_axis(axis, first.rank)
    shape = list(first.shape)
    for number, part in enumerate(parts[1:], 1):
        if part.rank != first.rank:
            raise ShapeError(f"part {number} has rank {part.rank}, part 0 has {first.rank}")
        for other in range(first.rank):
            if other != axis:
                what = f"axis {other} of parts 0 and {number}, joined along axis {axis}"
                shape[other] = assume_equal(shape[other], part.shape[other], what)
    kept = [part for part in parts if part.shape[axis] != 0] or [first]
    ends = list(itertools.accumulate(part.shape[axis] for part in kept))
    shape[axis] = ends[-1]
    starts = [0, *ends[:-1]]

    def element(*i: Dim) -> Scalar:
        result = kept[-1].at(replaced(i, {axis: i[axis] - starts[-1]}))
        for part, start, end in reversed(list(zip(kept[:-1], starts, ends, strict=False))):
            here = binary("lt", index(i[axis]), index(end))
            result = where(here, part.at(replaced(i, {axis: i[axis] - start})), result)
        return result

    lows = [part.lower for part in kept]
    result = compute(shape, first.dtype, element, *kept)
    result.lower = None if None in lows else min(low for low in lows if low is not None)
    result.upper = None if any(part.upper is None for part in kept) else dim_max(*(p.upper or 0 for p in kept))
    return result


def slice_axis(x: Tensor, axis: int, start: Dim, extent: Dim, step: Dim = 1) -> Tensor:
    """Elements start, start + step, ... of one axis, `extent` of them."""
    return view(x, replaced(x.shape, {axis: extent}), lambda *i: replaced(i, {axis: start + i[axis] * step}))


@declare.op("Split", static=("split",), movement=True)
def split(
    x: Tensor, split: Static | None = None, *, axis: int = 0, num_outputs: int | None = None, context: Context
) -> tuple[Tensor, ...]:
    """Pieces of the given extents; without them equal ones, the last one smaller."""
    axis = normalize_axis(axis, x.rank)
    whole = x.shape[axis]
    if split is None:
        count = num_outputs or len(context.outputs)
        piece = ceildiv(whole, count)
        sizes = [dim_max(0, dim_min(piece, whole - k * piece)) if k else piece for k in range(count)]
        if not isinstance(whole, int):
            sizes = [piece] * (count - 1) + [whole - piece * (count - 1)]
    else:
        sizes = list(split)
        assume_equal(sum(sizes, 0), whole, f"the pieces {list(map(str, sizes))} and axis {axis} of {x.shape}")
    starts = [0, *itertools.accumulate(sizes)]
    return tuple(slice_axis(x, axis, start, size) for start, size in zip(starts, sizes, strict=False))


def _from_front(position: Dim, extent: Dim, least: int) -> Dim:
    """A slice bound counted from the front, `least` where it lies before that."""
    if known_le(0, position):
        return position
    if known_le(position + 1, 0):
        # extent - min(extent, n) says the same as max(0, extent - n), but simplifies against the end of the axis.
        return extent - dim_min(extent, -position) if least == 0 else dim_max(least, position + extent)
    is_negative = dim_min(1, dim_max(0, -position))
    return dim_max(least, position + extent * is_negative)


def slice_bounds(start: Dim, end: Dim, step: int, extent: Dim) -> tuple[Dim, Dim]:
    """(first element, number of elements) of a slice of an axis, as ONNX clamps it."""
    # Backwards, positions go down from at most the last element; -1 stands before the first.
    least, greatest = (0, extent) if step > 0 else (-1, extent - 1)

    def clamped(position: Dim, lowest: int) -> Dim:
        if isinstance(position, int) and abs(position) >= UNBOUNDED:
            return greatest if position > 0 else dim_min(lowest, greatest)
        if position == greatest or (position == -1 and step < 0):
            return greatest
        return dim_min(_from_front(position, extent, lowest), greatest)

    first, stop = clamped(start, 0), clamped(end, least)
    length = (stop - first) if step > 0 else (first - stop)
    certain = (first == 0 or stop == extent) if step > 0 else stop == -1
    return first, ceildiv(length if certain else dim_max(0, length), abs(step))


@declare.op("Slice", static=("starts", "ends", "axes", "steps"), movement=True)
def slice_(x: Tensor, starts: Static, ends: Static, axes: Static | None = None, steps: Static | None = None) -> Tensor:
    """Every step-th element from start to end (exclusive) of some axes; steps may be negative, but must be numbers."""
    which = range(len(starts)) if axes is None else [normalize_axis(axis, x.rank) for axis in axes]
    strides = (1,) * len(starts) if steps is None else steps
    chosen: dict[int, tuple[Dim, Dim, int]] = {}
    for axis, start, end, step in zip(which, starts, ends, strides, strict=True):
        if not isinstance(step, int):
            raise UnsupportedError(f"the step {step} of axis {axis} is known only at run time")
        if step == 0:
            raise ShapeError(f"the step of axis {axis} is 0")
        chosen[axis] = (*slice_bounds(start, end, step, x.shape[axis]), step)
    shape = replaced(x.shape, {axis: length for axis, (_, length, _) in chosen.items()})

    def source(*i: Dim) -> Indices:
        return replaced(i, {axis: first + i[axis] * step for axis, (first, _, step) in chosen.items()})

    return view(x, shape, source)


@declare.op("Pad", static=("pads", "axes"), movement=True)
def pad(
    x: Tensor, pads: Static, value: Tensor | None = None, axes: Static | None = None, *, mode: str = "constant"
) -> Tensor:
    """`pads` more elements before and after (negative: fewer): a constant, or by mode edge, reflect or wrap."""
    which = list(range(x.rank)) if axes is None else [normalize_axis(axis, x.rank) for axis in axes]
    if len(pads) != 2 * len(which):
        raise ShapeError(f"{len(pads)} pads for {len(which)} axes")
    widths = {axis: (pads[k], pads[k + len(which)]) for k, axis in enumerate(which)}
    widths = {axis: pair for axis, pair in widths.items() if pair != (0, 0)}
    shape = replaced(x.shape, {axis: x.shape[axis] + sum(pair, 0) for axis, pair in widths.items()})
    if mode != "constant":
        return view(
            x,
            shape,
            lambda *i: replaced(
                i, {a: border_index(i[a] - before, x.shape[a], mode) for a, (before, _) in widths.items()}
            ),
        )
    fill = const(0, x.dtype) if value is None else value.at((0,) * value.rank)

    def element(*i: Dim) -> Scalar:
        moved = {axis: i[axis] - before for axis, (before, _) in widths.items()}
        within = all_of([inside(j, x.shape[axis]) for axis, j in moved.items()])
        return where(within, x.at(replaced(i, moved)), fill)

    return compute(shape, x.dtype, element, x, *([] if value is None else [value]))


def border_index(position: Dim, extent: Dim, mode: str) -> Dim:
    """The element of an axis that stands for a position outside it, by a mode of Pad."""
    if mode == "edge":
        return dim_max(0, dim_min(position, extent - 1))
    if mode == "wrap":
        return modulo(position, extent)
    if mode != "reflect":
        raise UnsupportedError(f"pad mode {mode!r}")
    if extent == 1:
        return 0
    turn = 2 * (extent - 1)
    if known_le(1 - extent, position) and known_le(position, turn):  # one reflection on each side at most
        position = dim_max(position, -position)
    else:
        position = modulo(position, turn)
    return dim_min(position, turn - position)


@declare.op("DepthToSpace", movement=True, spatial=True)
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """[N, C*b*b, H, W] -> [N, C, H*b, W*b]; the block position stands before (DCR) or after (CRD) the channel."""
    n, c, h, w = x.shape
    b = blocksize
    channels = floordiv(c, b * b)
    assume_equal(c, channels * (b * b), f"{c} channels in blocks of {b * b}")

    def source(i: Dim, m: Dim, y: Dim, z: Dim) -> Indices:
        block = modulo(y, b) * b + modulo(z, b)
        return i, block * channels + m if mode == "DCR" else m * (b * b) + block, floordiv(y, b), floordiv(z, b)

    return view(x, (n, channels, h * b, w * b), source)


@declare.op("SpaceToDepth", movement=True, spatial=True)
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """[N, C, H*b, W*b] -> [N, C*b*b, H, W], the inverse of DepthToSpace of the same mode."""
    n, c, h, w = x.shape
    b = blocksize

    def source(i: Dim, m: Dim, y: Dim, z: Dim) -> Indices:
        block, channel = (floordiv(m, c), modulo(m, c)) if mode == "DCR" else (modulo(m, b * b), floordiv(m, b * b))
        return i, channel, y * b + floordiv(block, b), z * b + modulo(block, b)

    return view(x, (n, c * (b * b), floordiv(h, b), floordiv(w, b)), source)


@declare.op("Trilu", static=("k",), movement=True)
def trilu(x: Tensor, k: Static | None = None, *, upper: int = 1) -> Tensor:
    """The triangle on and above (or on and below) the k-th diagonal; zero elsewhere."""
    diagonal = k[0] if k else 0

    def element(*i: Dim) -> Scalar:
        low, high = (i[-2] + diagonal, i[-1]) if upper else (i[-1], i[-2] + diagonal)
        return where(binary("le", index(low), index(high)), x.at(i), const(0, x.dtype))

    return compute(x.shape, x.dtype, element, x)


@declare.op("CenterCropPad", static=("shape",), movement=True)
def center_crop_pad(x: Tensor, shape: Static, *, axes: Sequence[int] | None = None) -> Tensor:
    """The middle of some axes, cropped or padded with zeros to the given extents."""
    which = list(range(x.rank)) if axes is None else [normalize_axis(axis, x.rank) for axis in axes]
    shifts: dict[int, Dim] = {}
    for axis, wanted in zip(which, shape, strict=True):
        have = x.shape[axis]
        # Cropping drops floor((have - wanted) / 2) in front, padding adds floor((wanted - have) / 2).
        shifts[axis] = floordiv(dim_max(0, have - wanted), 2) - floordiv(dim_max(0, wanted - have), 2)

    def element(*i: Dim) -> Scalar:
        moved = {axis: i[axis] + shift for axis, shift in shifts.items()}
        within = all_of([inside(j, x.shape[axis]) for axis, j in moved.items()])
        return where(within, x.at(replaced(i, moved)), const(0, x.dtype))

    return compute(replaced(x.shape, dict(zip(which, shape, strict=True))), x.dtype, element, x)


@declare.op("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return dims_tensor(x.shape[slice(start, end)])


@declare.op("Size")
def size(x: Tensor) -> Tensor:
    return dims_tensor([x.size], ())


@declare.op("Dims")
def dims(*, values: Sequence[Dim], shape: Sequence[int]) -> Tensor:
    """The compiler's own: an i64 tensor of symbolic sizes, what is left of folded shape arithmetic."""
    result = dims_tensor(values, shape)
    if all(known_le(0, value) for value in values):
        result.lower = 0
    return result
