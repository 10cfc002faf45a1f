"""Outputs whose elements are computed each on its own: a thread computes several neighbours along the last axis.

Where memory is contiguous and aligned the neighbours are moved by accesses of 16 bytes; else a thread's elements lie a
block's threads apart, so that a warp reads and writes whole lines either way. Indices are taken apart once per thread.
What is reduced for many elements at once is hoisted by the generic loop nest, mapped to threads (`passes.threads`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, bounds, ceildiv, dim_factor, dim_min, symbol
from ....ir.loops import Block, For, Let, Statement, Store
from ....ir.tensors import unflatten
from ....passes.nests import all_reductions
from ....passes.regions import Region
from ....passes.threads import THREAD
from .groups import Group, below, block_index, blocks_of, threads_for, where
from .lanes import Lanes, contiguous, lanes_of, multiples

TURNS = 4
"""Elements of a thread where memory moves them one by one: so many loads in flight hide its latency."""
FILLING = 1 << 16
"""Threads below which more of them are worth more than lanes: half of what a large GPU holds."""


def kernel(region: Region, group: Group, in_place: bool) -> Block:
    """The body of the kernel of a group: lanes where everything stored is aligned, perhaps on condition of the sizes.
    `in_place` tells that an input may be an output."""
    if not group.axes:
        stores = _scalar(group, 0)
        return blocks_of(1, 32, where(below(k.index_symbol(THREAD, 32), 1), stores))
    lanes = lanes_for(group)
    while lanes > 1:
        made = _vectors(region, group, lanes)
        if made is not None:
            body, condition = made
            fallback = _one_by_one(group, lanes, in_place) if not isinstance(condition, s.Const) else []
            threads = _threads(group, lanes)
            return blocks_of(ceildiv(group.total, threads * lanes), threads, where(condition, body, fallback))
        lanes //= 2
    turns = _turns(group)
    threads = _threads(group, turns)
    return blocks_of(ceildiv(group.total, threads * turns), threads, _one_by_one(group, turns, in_place))


def lanes_for(group: Group) -> int:
    """Elements of one thread that memory may move together, as far as types and the last axis tell."""
    last = group.axes[-1]
    stores = [output.buffer for output in group.outputs]
    lanes = lanes_of([*stores, *(load.buffer for value in group.values for load in contiguous(value, last.name))])
    reduces = any(all_reductions(value) for value in group.values)
    total = math.prod(axis.extent for axis in group.axes if isinstance(axis.extent, int))
    while lanes > 1 and reduces and total // lanes < FILLING:
        lanes //= 2
    if len(group.axes) > 1 and isinstance(last.extent, int):
        while last.extent % lanes:
            lanes //= 2
    return lanes


def _turns(group: Group) -> int:
    """Elements of a thread that are moved one by one."""
    few = bounds(group.total)[1]
    reduces = any(all_reductions(value) for value in group.values)
    return 1 if reduces or (few is not None and few <= FILLING) else TURNS


def _threads(group: Group, each: int) -> int:
    return threads_for(ceildiv(group.total, each))


class _Flat(s.Rewriter):
    """Spells what is the number of an element, or so far from it, by that number."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._number = group.outputs[0].offset
        self._names = {axis.name for axis in group.axes}

    def dim(self, dim: Dim) -> Dim:
        rest = dim - self._number
        return super().dim(dim) if s.free_symbols(rest) & self._names else symbol("element") + super().dim(rest)


def _named(group: Group, body: Sequence[Statement]) -> list[Statement]:
    """A body with the indices of the axes that it uses, by the number of its element."""
    if len(group.axes) == 1:
        return list(body)
    block = k.rebuild(tuple(body), _Flat(group))
    used = set(k.free_sizes(block))
    indices = unflatten(symbol("element", 0, group.total - 1), [axis.extent for axis in group.axes])
    lets = [Let(axis.name, at) for axis, at in zip(group.axes, indices, strict=True) if axis.name in used]
    return [*lets, *block]


def _scalar(group: Group, number: int) -> list[Statement]:
    """The stores of one element."""
    own = Lanes("", 1, group.indices, lambda buffer: 1, prefix=f"s{number}")
    statements, values = own.values(group.values)
    return statements + [Store(o.buffer, o.offset, v) for o, v in zip(group.outputs, values, strict=True)]


def _vectors(region: Region, group: Group, lanes: int) -> tuple[list[Statement], s.Scalar] | None:
    """A thread's statements for so many neighbours, and the condition on sizes; None where stores are not aligned."""
    last = group.axes[-1]
    own = Lanes(last.name, lanes, group.indices, region.alignment)
    if not all(own.is_aligned(output.buffer, output.offset) for output in group.outputs):
        return None
    if len(group.axes) > 1:
        own.conditions.append(last.extent)
    statements, values = own.values(group.values)
    statements += own.outputs([(output.buffer, output.offset) for output in group.outputs], values)
    condition = multiples(own.conditions, lanes)
    if isinstance(condition, s.Const) and not condition.value:
        return None
    threads = _threads(group, lanes)
    blocks = ceildiv(group.total, threads * lanes)
    first = (block_index(blocks) * threads + k.index_symbol(THREAD, threads)) * lanes
    start, at = Let("element", first), symbol("element")
    if dim_factor(group.total) % lanes == 0 or len(group.axes) > 1:
        inside = below(first, group.total, "element")
        return [start, *where(inside, _named(group, statements))], condition
    # The last few elements of the only axis.
    rest = k.rebuild(tuple(_scalar(group, 1)), s.Rewriter(dims={last.name: at + symbol("tail", 0, lanes - 1)}))
    tail = [For("tail", group.total - at, rest)]
    return [start, *where(below(first + (lanes - 1), group.total, "element", lanes - 1), statements, tail)], condition


def _one_by_one(group: Group, turns: int, in_place: bool) -> list[Statement]:
    """A thread's statements for elements that lie a block's threads apart.

    Where nothing is overwritten that another thread reads, those behind the end are computed as the last one is: loads
    that no condition guards are all in flight at once.
    """
    threads = _threads(group, turns)
    blocks = ceildiv(group.total, threads * turns)
    turn = k.index_symbol("turn", turns) if turns > 1 else 0
    number = block_index(blocks) * (threads * turns) + turn * threads + k.index_symbol(THREAD, threads)
    inside = below(number, group.total, "element")
    stores = _scalar(group, 0)
    if turns == 1:
        return [Let("element", number), *where(inside, _named(group, stores))]
    if in_place or isinstance(inside, s.Const):
        return [For("turn", turns, (Let("element", number), *where(inside, _named(group, stores))), "unrolled")]
    guarded = [
        replace(st, predicate=below(number, group.total, "wanted")) if isinstance(st, Store) else st for st in stores
    ]
    lets = [Let("wanted", number), Let("element", dim_min(symbol("wanted"), group.total - 1))]
    return [For("turn", turns, (*lets, *_named(group, guarded)), "unrolled")]
