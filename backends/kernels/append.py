"""Rows appended to an array in place: what lies before them, and the room behind, stays as it is."""

from __future__ import annotations

from ...ir import loops as k
from ...ir.dims import Dim
from ...ir.loops import For, Statement, Store
from ...ir.target import Target
from ...ir.tensors import Indices, flat_offset
from ...passes.regions import Lowered, Region
from .calls import attribute, call, over, present


def schedule(region: Region, target: Target) -> Lowered:
    """Writes the new elements alone: `passes.append` sees to it that the result's memory holds the others."""
    past, new = present(region, 0), present(region, 1)
    axis, start = attribute(region, "axis"), region.static["start"][0]
    result, _ = region.outputs[0]
    *outer, last = new.shape

    def rows(where: Indices) -> list[Statement]:
        channel = k.index_symbol("channel", last)
        source = (*where, channel)
        at: list[Dim] = list(source)
        at[axis] = at[axis] + start
        store = Store(result, flat_offset(at, past.shape), new.at(source))
        return [For("channel", last, (store,), "vector")]

    return Lowered((call(region, region.name, [over(outer, rows, "row", last, target)]),))
