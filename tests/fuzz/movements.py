"""Strategies for operators that move or choose elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from fuzz.graphs import DTYPES, FLOATS, INDICES, Attributes, Builder, Rejected, Value, admitted
from onnx import helper, numpy_helper

Sample = tuple[list[Value | None], Attributes, int]
FLOAT = (DTYPES["float"],)


def least(x: Value, axis: int) -> int:
    """The size of an axis at every binding, or the smallest of them."""
    return min(x.shape[axis])


def reshape(b: Builder, op: str) -> Sample:
    """To a grouping of the axes, with 0 for kept ones and one -1."""
    x = b.operand(admitted(op, "T"))
    sizes: list[int] = []
    axis = 0
    while axis < x.rank:
        if b.chance(30):
            sizes.append(0)
        elif len(set(x.shape[axis])) > 1 or b.chance(20):
            sizes.append(-1)
            axis += b.integer(0, 2)
        elif x.shape[axis][0] % 2 == 0 and b.chance(40):
            sizes += [2, x.shape[axis][0] // 2]
        else:
            sizes.append(x.shape[axis][0])
        axis += 1
        if b.chance(10):
            sizes.append(1)
    return [x, b.numbers(sizes, constant=90)], {"allowzero": 0} if b.chance(20) else {}, 1


def squeeze(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1, fits=lambda v: any(set(s) == {1} for s in v.shape))
    ones = [a for a in range(x.rank) if set(x.shape[a]) == {1}]
    axes = [a - x.rank if b.chance(30) else a for a in ones if b.chance(70)]
    return [x, b.numbers(axes) if axes else None], {}, 1


def unsqueeze(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 0, 5)
    rank = x.rank + b.integer(1, 6 - x.rank)
    axes = {b.integer(0, rank - 1) for _ in range(rank - x.rank)}
    rank = x.rank + len(axes)
    axes = {a for a in axes if a < rank}
    return [x, b.numbers([a - (x.rank + len(axes)) if b.chance(30) else a for a in axes])], {}, 1


def transpose(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"))
    return [x], {"perm": [int(a) for a in b.random().permutation(x.rank)]} if x.rank and b.chance(85) else {}, 1


def expand(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 0, 5)
    sizes = [b.integer(1, 4) if set(s) == {1} else 1 if len(set(s)) > 1 or b.chance(50) else s[0] for s in x.shape]
    first = b.integer(0, len(sizes)) if b.chance(20) else 0
    return [x, b.numbers([b.integer(1, 3)] * b.integer(0, 1) + sizes[first:])], {}, 1


def tile(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1)
    return [x, b.numbers([b.choice((1, 1, 2, 3, 0)) for _ in range(x.rank)])], {}, 1


def concat(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1)
    axis = b.integer(-x.rank, x.rank - 1)
    parts: list[Value | None] = [x]
    for _ in range(b.integer(0, 3)):
        shape = [b.size() if a == axis % x.rank and b.chance(60) else s for a, s in enumerate(x.shape)]
        parts.append(x if b.chance(20) else b.fresh(x.dtype, shape))
    return parts, {"axis": axis}, 1


def split(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1)
    axis = b.integer(-x.rank, x.rank - 1)
    if len(set(x.shape[axis])) > 1 or b.chance(40):
        count = b.integer(1, max(1, min(4, least(x, axis))))
        return [x], {"axis": axis, "num_outputs": count}, count
    sizes, left = [], x.shape[axis][0]
    while left > 0 and len(sizes) < 4:
        sizes.append(b.integer(0, left))
        left -= sizes[-1]
    sizes.append(left)
    return [x, b.numbers(sizes)], {"axis": axis}, len(sizes)


def slices(b: Builder, op: str) -> Sample:
    """Any start, end and step but 0, beyond the ends too."""
    x = b.operand(admitted(op, "T"), 1)
    axes = [a - x.rank if b.chance(30) else a for a in range(x.rank) if b.chance(60)] or [0]
    far = (1 << 62, -(1 << 62), 1 << 31)
    starts, ends, steps = [], [], []
    for a in axes:
        size = max(x.shape[a])
        starts.append(b.integer(-size - 2, size + 2))
        ends.append(b.choice(far) if b.chance(20) else b.integer(-size - 2, size + 2))
        steps.append(b.choice((1, 1, 2, 3, -1, -1, -2, 7)))
    kind = np.int64 if any(abs(e) >= 1 << 31 for e in ends) else b.choice((np.int64, np.int32))
    all_axes = [a % x.rank for a in axes] == list(range(len(axes))) and b.chance(50)
    some = [None if all_axes and all(s == 1 for s in steps) else b.numbers(axes, kind)]
    some.append(None if all(s == 1 for s in steps) and b.chance(50) else b.numbers(steps, kind))
    return [x, b.numbers(starts, kind), b.numbers(ends, kind), *some], {}, 1


def pad(b: Builder, op: str) -> Sample:
    mode = b.choice(("constant", "constant", "reflect", "edge", "wrap"))
    x = b.operand(admitted(op, "T"), 1, smallest=0 if mode == "constant" else 1)
    axes = [a for a in range(x.rank) if b.chance(60)] if b.chance(40) else list(range(x.rank))

    def amount(a: int) -> int:
        most = 3 if mode in ("constant", "edge") else least(x, a) - (mode == "reflect")
        return b.integer(0, min(3, most))

    pads = [amount(a) for a in axes] + [amount(a) for a in axes]
    if mode == "constant" and all(least(x, a) >= 2 for a in axes) and b.chance(25) and pads:
        pads[b.integer(0, len(pads) - 1)] = -1
    value = b.fresh(x.dtype, ()) if mode == "constant" and b.chance(50) else None
    unnamed = axes == list(range(x.rank)) and b.chance(70)
    named = None if unnamed else b.numbers([a - x.rank if b.chance(30) else a for a in axes])
    return [x, b.numbers(pads), value, named], {"mode": mode}, 1


def blocks(b: Builder, op: str) -> Sample:
    """DepthToSpace, SpaceToDepth: blocks fit, also where there is no element."""
    size = b.integer(1, 3)
    x = b.operand(admitted(op, "T"), 4, 4)
    parts = [x.shape[1]] if op == "DepthToSpace" else x.shape[2:]
    if any(n % (size * size if op == "DepthToSpace" else size) for part in parts for n in part):
        raise Rejected("blocks do not fit")
    return [x], {"blocksize": size} | ({"mode": b.choice(("DCR", "CRD"))} if op == "DepthToSpace" else {}), 1


def center_crop_pad(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1)
    axes = sorted({b.integer(0, x.rank - 1) for _ in range(b.integer(1, x.rank))})
    whole = axes == list(range(x.rank)) and b.chance(50)
    return [x, b.numbers([b.integer(1, 9) for _ in axes])], {} if whole else {"axes": axes}, 1


def indices(b: Builder, shape: Any, limit: int, dtypes: Any = INDICES) -> Value:
    """Indices in range, negative too, at every binding."""
    if limit < 1:
        raise Rejected("no index")
    dtype = b.choice(dtypes)
    shapes = [tuple(s if isinstance(s, int) else s[k] for s in shape) for k in range(b.bindings)]
    low = -limit if b.chance(40) else 0
    arrays = [b.random().integers(low, limit, s).astype(dtype) for s in shapes[:1]]
    arrays += [arrays[0] if s == shapes[0] else b.random().integers(low, limit, s).astype(dtype) for s in shapes[1:]]
    return b.add(arrays, b.chance(50))


def gather(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1)
    axis = b.integer(-x.rank, x.rank - 1)
    return [x, indices(b, b.shape(0, 3), least(x, axis))], {"axis": axis}, 1


def gather_elements(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1, smallest=1)
    axis = b.integer(-x.rank, x.rank - 1)
    shape = [b.size() if a == axis % x.rank else s for a, s in enumerate(x.shape)]
    return [x, indices(b, shape, least(x, axis))], {"axis": axis}, 1


def gather_nd(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1, smallest=1)
    batch = b.integer(0, min(1, x.rank - 1))
    depth = b.integer(1, x.rank - batch)
    limit = min(least(x, batch + a) for a in range(depth))
    shape = [*x.shape[:batch], *(b.size() for _ in range(b.integer(0, 2))), depth]
    return [x, indices(b, shape, limit, INDICES[:1])], {"batch_dims": batch}, 1


def one_hot(b: Builder, op: str) -> Sample:
    index = b.choice((np.dtype(np.int64), np.dtype(np.int32), np.dtype(np.float32)))
    x = b.fresh(index, b.shape(0, 3), "small")
    values = b.fresh(b.dtype([d for d in admitted(op, "T3") if d.itemsize > 1 or d.kind in "iub"]), (2,), "small")
    depth = b.numbers(b.integer(1, 6), b.choice((np.int64, np.int32)))
    return [x, depth, values], {"axis": b.integer(-x.rank - 1, x.rank)}, 1


def reverse_sequence(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 2, smallest=1)
    time = b.integer(0, 1)
    lengths = [b.random().integers(1, x.shape[time][k] + 1, x.shape[1 - time][k]) for k in range(b.bindings)]
    return [x, b.add(lengths, b.chance(40))], {"time_axis": time, "batch_axis": 1 - time}, 1


def tensor_scatter(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 3, 4, smallest=2)
    update = b.fresh(x.dtype, (*x.shape[:-2], 1, x.shape[-1]))
    where = [b.random().integers(0, x.shape[-2][k], x.shape[0][k]) for k in range(b.bindings)]
    return [x, update, b.add(where) if b.chance(80) else None], {"mode": b.choice(("linear", "circular"))}, 1


def constant_of_shape(b: Builder, op: str) -> Sample:
    sizes = [b.size() for _ in range(b.integer(0, 4))]
    arrays = [np.array([s[k] for s in sizes], np.int64) for k in range(b.bindings)]
    value = numpy_helper.from_array(b.elements(b.dtype(admitted(op, "T2")), (1,)))
    return [b.add(arrays, b.chance(70))], {"value": value} if b.chance(80) else {}, 1


def range_(b: Builder, op: str) -> Sample:
    dtype = b.choice([d for d in admitted(op, "T") if d.kind != "V"])
    step = b.choice((1, 2, 3, -1, -2))
    start, count = b.integer(-5, 5), b.integer(0, 9)
    if dtype.kind == "f":
        step = b.choice((0.5, 1.0, -0.25))
    return [b.numbers(n, dtype, 60) for n in (start, start + count * step, step)], {}, 1


def cast_like(b: Builder, op: str) -> Sample:
    return [b.operand(admitted(op, "T1")), b.fresh(b.dtype(admitted(op, "T2")), b.shape(0, 2))], {}, 1


def bit_cast(b: Builder, op: str) -> Sample:
    x = b.operand([d for d in admitted(op, "T1") if d.itemsize > 1 or d.kind in "iu"])
    same = [d for d in admitted(op, "T2") if d.itemsize == x.dtype.itemsize and d.kind in "iuf"]
    return [x], {"to": helper.np_dtype_to_tensor_dtype(b.dtype(same))}, 1


def dropout(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"))
    return [x, b.numbers(0.5, np.float32) if b.chance(50) else None], {}, b.integer(1, 2)


def top_k(b: Builder, op: str) -> Sample:
    """Of different elements: which of equal ones come first is not defined for unsorted ones."""
    axis_of = b.operand(admitted(op, "T"), 1, smallest=1)
    axis = b.integer(-axis_of.rank, axis_of.rank - 1)
    count = b.numbers([b.integer(0, min(8, least(axis_of, axis)))])
    return [axis_of, count], {"axis": axis, "largest": b.integer(0, 1)}, 2


def compress(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1, smallest=1)
    axis = b.integer(-x.rank, x.rank - 1) if b.chance(70) else None
    most = least(x, axis) if axis is not None else min(array.size for array in x.arrays)
    condition = b.fresh(DTYPES["bool"], (b.integer(1, min(most, 20)),))
    return [x, condition], {} if axis is None else {"axis": axis}, 1


def unique(b: Builder, op: str) -> Sample:
    x = b.operand([d for d in admitted(op, "T") if d.kind in "iuf"], 1, 3, smallest=1)
    return [x], {"sorted": 1} | ({"axis": b.integer(-x.rank, x.rank - 1)} if b.chance(40) else {}), b.integer(1, 4)


def scatter_elements(b: Builder, op: str) -> Sample:
    """Where elements are written and not combined, each place is written once."""
    x = b.operand(admitted(op, "T"), 1, smallest=1)
    axis = b.integer(-x.rank, x.rank - 1)
    kind = b.choice(("none", "none", "add", "mul", "max", "min"))
    count = b.integer(0, least(x, axis))
    shape = [(count,) * b.bindings if a == axis % x.rank else s for a, s in enumerate(x.shape)]
    if kind == "none":
        arrays = []
        for k in range(b.bindings):
            order = b.random().permutation(least(x, axis))[:count]
            sizes = [s[k] for s in shape]
            column = order.reshape([-1 if a == axis % x.rank else 1 for a in range(x.rank)])
            arrays.append(np.broadcast_to(column, sizes).astype(np.int64))
        where = b.add(arrays, b.chance(40))
    else:
        where = indices(b, shape, least(x, axis))
    return [x, where, b.fresh(x.dtype, shape)], {"axis": axis, "reduction": kind}, 1


def scatter_nd(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"), 1, smallest=1)
    kind = b.choice(("none", "none", "add", "mul", "max", "min"))
    depth = b.integer(1, x.rank)
    limit = min(least(x, a) for a in range(depth))
    if kind == "none":
        count = b.integer(0, limit)
        first = b.random().permutation(limit)[:count]
        rest = b.random().integers(0, limit, (count, depth - 1))
        where = b.add([np.concatenate([first[:, None], rest], 1).astype(np.int64)] * b.bindings, b.chance(50))
        lead: list[Any] = [count]
    else:
        lead = [b.integer(0, 4) for _ in range(b.integer(0, 2))]
        where = indices(b, (*lead, depth), limit, INDICES[:1])
    return [x, where, b.fresh(x.dtype, (*lead, *x.shape[depth:]))], {"reduction": kind}, 1


def where(b: Builder, op: str) -> Sample:
    x = b.operand(admitted(op, "T"))
    y = b.like(x.shape, x.dtype)
    return [b.like(x.shape, DTYPES["bool"]), x, y], {}, 1


def resize(b: Builder, op: str) -> Sample:
    """Not of complex numbers: the reference drops their imaginary parts."""
    mode = b.choice(("nearest", "linear", "cubic"))
    x = b.operand(
        FLOATS[:1] if mode != "nearest" else [d for d in admitted(op, "T1") if d.kind != "c"],
        1 if mode == "nearest" else 3,
        4,
        smallest=2,
    )
    plain = [1.0] * x.rank
    for a in range(x.rank if mode == "nearest" else 2, x.rank):
        plain[a] = 1.0
    for a in range(0 if mode == "nearest" else x.rank - 2, x.rank):
        plain[a] = b.choice((1.0, 2.0, 0.5, 1.5, 3.0))
    modes = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")
    found: Attributes = {"mode": mode, "coordinate_transformation_mode": b.choice(modes)}
    if mode == "nearest":
        found["nearest_mode"] = b.choice(("round_prefer_floor", "floor", "ceil", "round_prefer_ceil"))
    if mode == "cubic":
        found |= {"cubic_coeff_a": b.choice((-0.75, -0.5)), "exclude_outside": b.integer(0, 1)}
    if mode != "nearest" and b.chance(20):
        found["antialias"] = 1
    if b.chance(50):
        return [x, None, b.numbers(plain, np.float32)], found, 1
    sizes = [np.array([max(1, int(s[k] * f)) for s, f in zip(x.shape, plain, strict=True)]) for k in range(b.bindings)]
    return [x, None, None, b.add(sizes, b.chance(70))], found, 1


def grid_sample(b: Builder, op: str) -> Sample:
    spatial = b.choice((2, 2, 3))
    x = b.operand(FLOATS[:1], spatial + 2, spatial + 2, smallest=1)
    grid = b.fresh(DTYPES["float"], (x.shape[0], *(b.integer(1, 4) for _ in range(spatial)), spatial), "unit")
    found = {"mode": b.choice(("linear", "nearest", "cubic") if spatial == 2 else ("linear", "nearest"))}
    found |= {"padding_mode": b.choice(("zeros", "border", "reflection")), "align_corners": b.integer(0, 1)}
    return [x, grid], found, 1


def affine_grid(b: Builder, op: str) -> Sample:
    spatial = b.choice((2, 3))
    theta = b.fresh(DTYPES["float"], (2, spatial, spatial + 1))
    return [theta, b.numbers([2, 1, *(b.integer(1, 5) for _ in range(spatial))])], {"align_corners": b.integer(0, 1)}, 1


def rois(b: Builder, count: int, batches: bool) -> np.ndarray:
    corners = b.random().integers(0, 4, (count, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + b.random().integers(1, 4, (count, 2)).astype(np.float32)], 1)
    return np.concatenate([np.zeros((count, 1), np.float32), boxes], 1) if batches else boxes


def roi_align(b: Builder, op: str) -> Sample:
    x = b.fresh(DTYPES["float"], (2, b.size(1, 4), b.size(4, 9), b.size(4, 9)))
    count = b.integer(1, 3)
    found: Attributes = {
        "output_height": b.integer(1, 3),
        "output_width": b.integer(1, 3),
        "mode": b.choice(("avg", "max")),
    }
    found |= {"sampling_ratio": b.integer(0, 2), "spatial_scale": b.choice((1.0, 0.5))}
    found["coordinate_transformation_mode"] = b.choice(("half_pixel", "output_half_pixel"))
    where = b.numbers(b.random().integers(0, 2, count))
    return [x, b.numbers(rois(b, count, False), np.float32), where], found, 1


SAMPLERS: dict[str, Callable[[Builder, str], Sample]] = {
    "Reshape": reshape, "Squeeze": squeeze, "Unsqueeze": unsqueeze, "Transpose": transpose, "Expand": expand,
    "Tile": tile,     "Concat": concat, "Split": split, "Slice": slices, "Pad": pad,
    "DepthToSpace": blocks, "SpaceToDepth": blocks,
    "CenterCropPad": center_crop_pad, "Gather": gather,
    "GatherElements": gather_elements, "GatherND": gather_nd, "OneHot": one_hot, "ReverseSequence": reverse_sequence,
    "TensorScatter": tensor_scatter, "ConstantOfShape": constant_of_shape, "Range": range_, "CastLike": cast_like,
    "BitCast": bit_cast, "Dropout": dropout, "TopK": top_k, "Compress": compress, "Unique": unique, "Where": where,
    "ScatterElements": scatter_elements, "ScatterND": scatter_nd, "Resize": resize, "GridSample": grid_sample,
    "AffineGrid": affine_grid, "RoiAlign": roi_align,
}  # fmt: skip
