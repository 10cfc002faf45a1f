"""Running sums and products in linear time."""

from __future__ import annotations

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, product
from ....ir.loops import Define, For, Statement, Store
from ....ir.ops.reduction import accumulator
from ....ir.scalars import Buffer, const, load
from ....ir.target import Target
from ....ir.tensors import Indices, flat_offset, normalize_axis, unflatten
from ....passes.regions import Lowered, Region
from .calls import arithmetic_type, attribute, call, over, present

_COMBINED = {"CumSum": ("add", 0), "CumProd": ("mul", 1)}


def schedule(region: Region, target: Target) -> Lowered | None:
    """One walk along the axis for each vector of the lines beside one another; the sum stays in a register.

    None where the axis is not known.
    """
    assert region.anchor is not None
    x, given = present(region, 0), region.static["axis"]
    if not isinstance(given[0], int):
        return None
    op, identity = _COMBINED[region.anchor.op]
    dtype = accumulator(arithmetic_type(region, x.dtype))
    axis = normalize_axis(given[0], x.rank)
    extent, inner = x.shape[axis], x.shape[axis + 1 :]
    reverse, exclusive = bool(attribute(region, "reverse")), bool(attribute(region, "exclusive"))
    result, tensor = region.outputs[0]
    step, lane = k.index_symbol("step", extent), k.index_symbol("lane", product(inner))
    position: Dim = extent - 1 - step if reverse else step
    total = Buffer("total", dtype, 1, "register")

    def lines(outer: Indices) -> list[Statement]:
        where = (*outer, position, *unflatten(lane, inner))
        target_offset = flat_offset((*outer, position, lane), (*x.shape[: axis + 1], product(inner)))
        add = Store(total, 0, s.binary(op, load(total, 0), s.cast(x.at(where), dtype)))
        put = Store(result, target_offset, s.cast(load(total, 0), tensor.dtype))
        walk = For("step", extent, (put, add) if exclusive else (add, put))
        return [For("lane", product(inner), (Define(total, const(identity, dtype)), walk), "vector")]

    body = over(x.shape[:axis], lines, "line", extent * product(inner))
    return Lowered((call(region, region.name, [body]),))
