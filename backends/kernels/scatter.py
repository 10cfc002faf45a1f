"""Operators that write where indices say: ScatterElements, ScatterND, MaxUnpool.

The result starts as a copy; then the updates are made one after another, so that the last of several for one element
counts. Only updates that cannot meet are shared among threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...ir import functions as f
from ...ir import scalars as s
from ...ir.dims import Dim, product, symbol
from ...ir.errors import ModelError
from ...ir.loops import For, Let, Statement, Store
from ...ir.scalars import Buffer, Scalar, const, load
from ...ir.target import Target
from ...ir.tensors import Indices, Tensor, compute, flat_offset, normalize_axis, position_of, unflatten
from ...passes.nests import build_nests
from ...passes.regions import Lowered, Region
from .calls import arithmetic_type, attribute, call, over, present

_COMBINED = {"add": "add", "mul": "mul", "max": "max", "min": "min"}


def _update(region: Region, result: Buffer, offset: Dim, value: Scalar) -> Statement:
    """Puts a value, or combines it with what is there."""
    reduction = attribute(region, "reduction")
    if reduction == "none":
        return Store(result, offset, value)
    if reduction not in _COMBINED:
        raise ModelError(f"{region.name}: {reduction!r} is no reduction; there are none, {', '.join(_COMBINED)}")
    return Store(result, offset, s.binary(_COMBINED[reduction], load(result, offset), value))


def _lowered(region: Region, start: Tensor, updating: Sequence[Statement]) -> Lowered:
    """The result made to begin with, then the updates."""
    result, _ = region.outputs[0]
    copying = call(region, f"{region.name}_start", build_nests([(result, start)]))
    return Lowered((copying, call(region, region.name, updating)))


def scatter_elements(region: Region, target: Target) -> Lowered:
    """Lines along the axis never meet: they go to threads."""
    x, indices, updates = (present(region, position) for position in range(3))
    arithmetic_type(region, x.dtype)
    axis = normalize_axis(attribute(region, "axis"), x.rank)
    result, tensor = region.outputs[0]
    extent = indices.shape[axis]

    def place(i: Indices) -> Dim:
        return flat_offset((*i[:axis], position_of(indices, i, x.shape[axis]), *i[axis + 1 :]), tensor.shape)

    along = symbol("along", 0, extent - 1)
    inner = indices.shape[axis + 1 :]

    def outer(i: Indices) -> list[Statement]:
        # The axis before what lies behind it: updates are read in the order in which they lie.
        def update(j: Indices) -> list[Statement]:
            where = (*i, along, *j)
            return [_update(region, result, place(where), updates.at(where))]

        return [For("along", extent, (over(inner, update, "inner"),))]

    work = product(indices.shape[axis:])
    return _lowered(region, x, [over(indices.shape[:axis], outer, "outer", work)])


def scatter_nd(region: Region, target: Target) -> Lowered:
    """Slices one after another, each stored in vectors; large ones are cut among threads."""
    x, indices, updates = (present(region, position) for position in range(3))
    arithmetic_type(region, x.dtype)
    result, _ = region.outputs[0]
    depth = indices.shape[-1]
    assert isinstance(depth, int)
    outer = indices.shape[:-1]
    length = product(x.shape[depth:])

    def slices(i: Indices) -> list[Statement]:
        lets: list[Statement] = []
        positions: list[Dim] = []
        for axis in range(depth):
            lets.append(Let(f"position{axis}", s.index(position_of(indices, (*i, axis), x.shape[axis]))))
            positions.append(symbol(f"position{axis}", 0, x.shape[axis] - 1))
        within = symbol("within", 0, length - 1)
        # As one axis, so that the loop is linear in memory.
        rest = unflatten(within, x.shape[depth:])
        source = updates.buffer
        value = updates.at((*i, *rest)) if source is None else load(source, flat_offset((*i, within), (*outer, length)))
        offset = flat_offset((*positions, within), (*x.shape[:depth], length))
        return [*lets, For("within", length, (_update(region, result, offset, value),), "vector")]

    return _lowered(region, x, [over(outer, slices, "slice")])


def unpooled(region: Region) -> tuple[Dim, Callable[[Dim], Dim]]:
    """Of MaxUnpool: the elements of what MaxPool saw, and where each of them lies in the result, of which that is the
    front."""
    x, (_, tensor) = present(region, 0), region.outputs[0]
    kernel = attribute(region, "kernel_shape")
    rank = len(kernel)
    steps, pads = attribute(region, "strides") or (1,) * rank, attribute(region, "pads") or (0,) * (2 * rank)
    pooled = [(x.shape[2 + a] - 1) * steps[a] - pads[a] - pads[rank + a] + kernel[a] for a in range(rank)]
    shape = (*x.shape[:2], *pooled)

    def place(position: Dim) -> Dim:
        where = [
            s.as_dim(f.minimum(s.index(d), s.index(extent - 1)), 0, extent - 1) if extent != own else d
            for d, extent, own in zip(unflatten(position, shape), tensor.shape, shape, strict=True)
        ]
        return flat_offset(where, tensor.shape)

    return product(shape), place


def max_unpool(region: Region, target: Target) -> Lowered:
    """Zeros, then each element at its place; indices count in what MaxPool saw, the front of the result."""
    x, indices = present(region, 0), present(region, 1)
    arithmetic_type(region, x.dtype)
    result, tensor = region.outputs[0]
    size, place = unpooled(region)

    def put(i: Indices) -> list[Statement]:
        offset = place(symbol("position", 0, size - 1))
        return [Let("position", s.index(position_of(indices, i, size))), Store(result, offset, x.at(i))]

    zero = compute(tensor.shape, tensor.dtype, lambda *i: const(0, tensor.dtype))
    return _lowered(region, zero, [over(x.shape, put, "element")])
