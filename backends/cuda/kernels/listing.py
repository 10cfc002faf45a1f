"""Operators that list elements which a condition chooses, in order: NonZero, Compress.

Blocks count what they will list, the counts' running sums tell each where its part begins, then all list at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, symbol
from ....ir.dtypes import I64
from ....ir.loops import Define, For, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Tensor, compute, normalize_axis, reduce_tensor, unflatten
from ....passes.regions import Call, Lowered, Region
from ....passes.threads import BLOCK
from ...kernels.calls import arithmetic_type, attribute, present
from ...kernels.selection import COUNT, bind_count, is_set, replaced
from . import general
from .groups import THREADS, below, blocks_of, call_of, thread_index, where
from .prefix import block_prefix
from .scan import Scan, walk

EACH = 8
"""Neighbours that a thread lists."""
PART = THREADS * EACH
"""Elements of a block."""


@dataclass(frozen=True)
class Listed:
    """The kernels that count and list, and the memory between them. The first ones leave the number in COUNT."""

    counting: tuple[Call, ...]
    listing: Call
    workspaces: tuple[Buffer, ...]


def listed(
    region: Region,
    total: Dim,
    chosen: Callable[[Dim], Scalar],
    put: Callable[[Dim, Dim], list[Statement]],
    outputs: list[Buffer],
    scratch: tuple[Buffer, ...] = (),
) -> Listed:
    """put(at, place) for every at < total that is chosen, place counting them; it stores to `outputs`."""
    parts = ceildiv(total, PART)
    counts, starts = Buffer("counts", I64, parts), Buffer("starts", I64, parts)
    own = (counts, starts, COUNT, *scratch)

    def counted(part: Dim, at: Dim) -> Scalar:
        number = part * PART + at
        flag = s.cast(chosen(number), I64)
        return flag if total == parts * PART else s.select(below(number, total), flag, const(0, I64))

    of_parts = reduce_tensor("add", (parts,), I64, (PART,), lambda i, r: counted(i[0], r[0]))
    of_all = reduce_tensor("add", (), I64, (parts,), lambda i, r: load(counts, r[0]))
    first = general.lowered(region, [(counts, of_parts)], own)
    second = general.lowered(region, [(COUNT, of_all)], own)
    assert not (first.workspaces and second.workspaces)
    running = Scan(
        "add", I64, 1, parts, 1, lambda outer, at, inner: load(counts, at), lambda outer, at, inner: (starts, at), True
    )
    third = walk(region, running, f"{region.name}_starts", own)
    body = _list(total, parts, chosen, put, starts)
    listing = call_of(region, body, outputs, own, f"{region.name}_list")
    workspaces = (counts, starts, COUNT, *first.workspaces, *second.workspaces)
    return Listed((*first.kernel_calls, *second.kernel_calls, third), listing, workspaces)


def _list(
    total: Dim, parts: Dim, chosen: Callable[[Dim], Scalar], put: Callable[[Dim, Dim], list[Statement]], starts: Buffer
) -> k.Block:
    block, each = k.index_symbol(BLOCK, parts), k.index_symbol("each", EACH)
    at = symbol("at", 0, total - 1)
    here = Let("at", block * PART + thread_index(THREADS) * EACH + each)
    mine, place = (Buffer(name, I64, 1, "register") for name in ("mine", "place"))
    inside = below(symbol("at"), total)
    count = where(inside, [Store(mine, 0, load(mine, 0) + s.cast(chosen(at), I64))])
    found, before, _ = block_prefix(load(mine, 0), "add", THREADS, "listed")
    spot = s.as_dim(load(place, 0), 0, total - 1)
    puts = where(chosen(at), [*put(at, spot), Store(place, 0, load(place, 0) + 1)])
    body: list[Statement] = [
        Define(mine, const(0, I64)),
        For("each", EACH, (here, *count), "unrolled"),
        *found,
        Define(place, load(starts, block) + load(before, 0)),
        For("each", EACH, (here, *where(inside, puts)), "unrolled"),
    ]
    return blocks_of(parts, THREADS, body)


def non_zero(region: Region, target: Target) -> Lowered:
    """The indices of all elements that are not zero, in order: [rank, how many]."""
    x = present(region, 0)
    arithmetic_type(region, x.dtype)
    result, tensor = region.outputs[0]

    def put(at: Dim, place: Dim) -> list[Statement]:
        indices = unflatten(at, x.shape)
        return [Store(result, axis * tensor.shape[1] + place, s.index(index)) for axis, index in enumerate(indices)]

    found = listed(region, x.size, lambda at: is_set(x.at(unflatten(at, x.shape))), put, [result])
    return Lowered((*found.counting, bind_count(tensor.shape[1]), found.listing), found.workspaces)


def compress(region: Region, target: Target) -> Lowered:
    """Lists the positions where the condition holds, then gathers."""
    x, condition = present(region, 0), present(region, 1)
    axis = attribute(region, "axis")
    along = None if axis is None else normalize_axis(axis, x.rank)
    (result, tensor) = region.outputs[0]
    extent = x.size if along is None else x.shape[along]
    limit = dim_min(condition.shape[0], extent)
    positions = Buffer("positions", I64, limit)
    found = listed(
        region,
        limit,
        lambda at: condition.at((at,)),
        lambda at, place: [Store(positions, place, s.index(at))],
        [positions],
        (positions,),
    )

    def element(*i: Dim) -> Scalar:
        position = s.as_dim(load(positions, i[along or 0]), 0, extent - 1)
        return x.at(unflatten(position, x.shape) if along is None else replaced(i, along, position))

    gathered: Tensor = compute(tensor.shape, tensor.dtype, element, x)
    gathering = general.lowered(region, [(result, gathered)], (positions,))
    return Lowered(
        (*found.counting, found.listing, bind_count(tensor.shape[along or 0]), *gathering.calls),
        (positions, *found.workspaces, *gathering.workspaces),
    )
