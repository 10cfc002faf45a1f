"""Running sums and products in linear time."""

from __future__ import annotations

from ...ir import loops as k
from ...ir import scalars as s
from ...ir.dims import Dim, ceildiv, dim_min, product
from ...ir.loops import Alloc, Define, For, Statement, Store
from ...ir.ops.reduction import accumulator
from ...ir.scalars import Buffer, const, load
from ...ir.target import Target
from ...ir.tensors import Indices, flat_offset, normalize_axis, unflatten
from ...passes.regions import Lowered, Region
from .calls import arithmetic_type, attribute, call, over, present

# Lines that are walked together: their sums stay in the first-level cache.
TOGETHER = 512
_COMBINED = {"CumSum": ("add", 0), "CumProd": ("mul", 1)}


def schedule(region: Region, target: Target) -> Lowered | None:
    """Lines that lie beside one another are walked together, some hundred of them, so that memory is read in order.

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
    beside = product(inner)
    reverse, exclusive = bool(attribute(region, "reverse")), bool(attribute(region, "exclusive"))
    result, tensor = region.outputs[0]
    step = k.index_symbol("step", extent)
    position: Dim = extent - 1 - step if reverse else step
    single = beside == 1
    total = Buffer("total", dtype, 1 if single else TOGETHER, "register" if single else "stack")

    def lines(where: Indices) -> list[Statement]:
        *outer, block = where
        count = dim_min(TOGETHER, beside - block * TOGETHER)
        lane = k.index_symbol("lane", count)
        number = block * TOGETHER + lane if beside != 1 else 0
        at = 0 if single else lane
        source = x.at((*outer, position, *unflatten(number, inner)))
        add = Store(total, at, s.binary(op, load(total, at), s.cast(source, dtype)))
        offset = flat_offset((*outer, position, number), (*x.shape[: axis + 1], beside))
        put = Store(result, offset, s.cast(load(total, at), tensor.dtype))
        each = (put, add) if exclusive else (add, put)
        start = const(identity, dtype)
        if single:
            return [Define(total, start), For("step", extent, each)]
        clear = For("lane", count, (Store(total, at, start),), "vector")
        return [Alloc(total), clear, For("step", extent, (For("lane", count, each, "vector"),))]

    blocks = ceildiv(beside, TOGETHER)
    body = over((*x.shape[:axis], blocks), lines, "line", extent * dim_min(beside, TOGETHER))
    return Lowered((call(region, region.name, [body]),))
