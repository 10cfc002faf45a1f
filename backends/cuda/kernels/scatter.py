"""Operators that write where indices say: ScatterElements, ScatterND, MaxUnpool.

The result starts as a copy. Where the order of updates does not matter they are made at once, by atomic operations. Of
updates that replace elements the last one for each counts: those who may write find out first, by an atomic maximum of
their numbers, unless indices are known to differ. Sums and products of floats are formed in order: destinations are
dealt to threads, each of which goes through all updates and makes those of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, product, symbol
from ....ir.dtypes import BOOL, I32
from ....ir.errors import ModelError
from ....ir.loops import Address, For, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Indices, Tensor, compute, flat_offset, normalize_axis, position_of, unflatten
from ....passes.regions import Call, Lowered, Region
from ...kernels.calls import arithmetic_type, attribute, present
from ...kernels.scatter import unpooled
from . import general
from .groups import THREADS, below, block_index, blocks_of, call_of, thread_index, where

OWNERS = 64
"""Threads among which the destinations along a line are dealt where lines alone are too few to be worth it."""
ENOUGH = 1 << 14
"""Lines from which on one thread does all updates of its own."""
_REDUCTIONS = ("add", "mul", "max", "min")


@dataclass(frozen=True)
class Updates:
    """`count` updates in each of `lines` lines: updates of different lines never meet.

    For line and number: the `target` in the line, one of `room`, where in the result that is, and the value. With
    `unique` no two updates of a line have one target, with `shared` all lines have the same ones. Lines lie `beside`
    one another in memory, or the updates of one line do.
    """

    lines: Dim
    count: Dim
    room: Dim
    target: Callable[[Dim, Dim], Dim]
    place: Callable[[Dim, Dim], Dim]
    value: Callable[[Dim, Dim], Scalar]
    unique: bool = False
    shared: bool = False
    beside: bool = False

    def owner_place(self, line: Dim, target: Dim) -> Dim:
        """Where it is noted which update of a destination counts."""
        return target if self.shared else line * self.room + target


def _is_unique(rows: np.ndarray | None) -> bool:
    """Whether rows of constant indices are surely different ones."""
    return rows is not None and rows.min(initial=0) >= 0 and len(np.unique(rows, axis=0)) == len(rows)


def scatter_elements(region: Region, target: Target) -> Lowered:
    """Each update's index replaces its own position along the axis; lines along the axis never meet."""
    x, indices, updates = (present(region, position) for position in range(3))
    arithmetic_type(region, x.dtype)
    axis = normalize_axis(attribute(region, "axis"), x.rank)
    _, tensor = region.outputs[0]
    shape = indices.shape
    others = (*shape[:axis], *shape[axis + 1 :])

    def at(line: Dim, number: Dim) -> Indices:
        rest = list(unflatten(line, others))
        return (*rest[:axis], number, *rest[axis:])

    def position(line: Dim, number: Dim) -> Dim:
        return position_of(indices, at(line, number), x.shape[axis])

    def place(line: Dim, row: Dim) -> Dim:
        where_line = at(line, 0)
        return flat_offset((*where_line[:axis], row, *where_line[axis + 1 :]), tensor.shape)

    array = region.constant(indices)
    unique = False
    if array is not None and array.min(initial=0) >= 0:
        ordered = np.sort(array, axis)
        unique = not (np.diff(ordered, axis=axis) == 0).any()
    own = Updates(
        product(others),
        shape[axis],
        x.shape[axis],
        position,
        place,
        lambda line, number: updates.at(at(line, number)),
        unique,
        beside=axis != x.rank - 1,
    )
    return _lowered(region, x, own)


def scatter_nd(region: Region, target: Target) -> Lowered:
    """Each index tuple names a slice; the elements of slices are lines side by side."""
    x, indices, updates = (present(region, position) for position in range(3))
    arithmetic_type(region, x.dtype)
    depth = indices.shape[-1]
    assert isinstance(depth, int)
    outer, inner = indices.shape[:-1], x.shape[depth:]
    length = product(inner)

    def row(line: Dim, number: Dim) -> Dim:
        i = unflatten(number, outer)
        return flat_offset([position_of(indices, (*i, a), x.shape[a]) for a in range(depth)], x.shape[:depth])

    def value(line: Dim, number: Dim) -> Scalar:
        source = updates.buffer
        if source is not None:
            return load(source, number * length + line)
        return updates.at((*unflatten(number, outer), *unflatten(line, inner)))

    array = region.constant(indices)
    unique = _is_unique(None if array is None else array.reshape(-1, depth) if depth else array.reshape(1, -1))
    rows = product(x.shape[:depth])
    own = Updates(length, product(outer), rows, row, lambda line, at: at * length + line, value, unique, True, True)
    return _lowered(region, x, own)


def max_unpool(region: Region, target: Target) -> Lowered:
    """Zeros, then each element at its place; indices count in what MaxPool saw, the front of the result."""
    x, indices = present(region, 0), present(region, 1)
    arithmetic_type(region, x.dtype)
    _, tensor = region.outputs[0]
    size, place = unpooled(region)
    zero = compute(tensor.shape, tensor.dtype, lambda *i: const(0, tensor.dtype))
    own = Updates(
        1,
        x.size,
        size,
        lambda line, number: position_of(indices, unflatten(number, indices.shape), size),
        lambda line, position: place(position),
        lambda line, number: x.at(unflatten(number, x.shape)),
    )
    return _lowered(region, zero, own, "none")


def _lowered(region: Region, start: Tensor, updates: Updates, reduction: str | None = None) -> Lowered:
    """The result made to begin with, then the updates."""
    result, tensor = region.outputs[0]
    how = attribute(region, "reduction") if reduction is None else reduction
    if how != "none" and how not in _REDUCTIONS:
        raise ModelError(f"{region.name}: {how!r} is no reduction; there are none, {', '.join(_REDUCTIONS)}")
    copying = general.lowered(region, [(result, start)])
    if 0 in tensor.shape or updates.count == 0:
        return copying
    dtype = tensor.dtype
    free = dtype.is_integer or (dtype.is_float and how in ("max", "min"))
    owner = Buffer("owner", I32, updates.room * (1 if updates.shared else updates.lines))
    scratch: tuple[Buffer, ...] = ()
    if how == "none":
        calls = _replacing(region, result, updates, owner)
        scratch = () if updates.unique else (owner,)
    elif free and not dtype.is_narrow:
        calls = [_atomic(region, result, updates, f"atomic_{how}")]
    else:
        calls = [_in_order(region, result, updates, how)]
    return Lowered((*copying.calls, *calls), (*copying.workspaces, *scratch))


def _each(updates: Updates, body: Callable[[Dim, Dim], Sequence[Statement]], lines: Dim | None = None) -> k.Block:
    """The body for every line and number, a thread for each."""
    lines = updates.lines if lines is None else lines
    total = lines * updates.count
    blocks = ceildiv(total, THREADS)
    at = block_index(blocks) * THREADS + thread_index(THREADS)
    flat = symbol("update", 0, total - 1)
    number, line = (flat // lines, flat % lines) if updates.beside else (flat % updates.count, flat // updates.count)
    names = [Let("line", line), Let("number", number)]
    inner = body(symbol("line", 0, lines - 1), symbol("number", 0, updates.count - 1))
    return blocks_of(blocks, THREADS, [Let("update", at), *where(below(at, total, "update"), [*names, *inner])])


def _atomic(region: Region, result: Buffer, updates: Updates, name: str) -> Call:
    """All updates at once, in any order."""

    def update(line: Dim, number: Dim) -> list[Statement]:
        place = updates.place(line, updates.target(line, number))
        return [Intrinsic(name, (Address(result, place),), (updates.value(line, number),))]

    return call_of(region, _each(updates, update), [result])


def _replacing(region: Region, result: Buffer, updates: Updates, owner: Buffer) -> list[Call]:
    """The last update of each destination; whose that is, is found out first where they may meet."""

    def claims(name: str, value: Callable[[Dim], Scalar]) -> Call:
        def claim(line: Dim, number: Dim) -> list[Statement]:
            place = updates.owner_place(line, updates.target(line, number))
            return [Intrinsic(name, (Address(owner, place),), (value(number),))]

        body = _each(updates, claim, 1 if updates.shared else None)
        return call_of(region, body, [owner], [owner], f"{region.name}_{name}")

    def store(line: Dim, number: Dim) -> list[Statement]:
        target = updates.target(line, number)
        mine = load(owner, updates.owner_place(line, target)).equal(s.cast(s.index(number), I32))
        put = Store(result, updates.place(line, target), updates.value(line, number))
        return [put] if updates.unique else where(mine, [put])

    storing = call_of(region, _each(updates, store), [result], [owner])
    if updates.unique:
        return [storing]
    # What the memory held before is no number of an update, then the greatest number of one.
    least = claims("atomic_min", lambda number: const(-1, I32))
    greatest = claims("atomic_max", lambda number: s.cast(s.index(number), I32))
    return [least, greatest, storing]


def _in_order(region: Region, result: Buffer, updates: Updates, op: str) -> Call:
    """Each thread goes through a line's updates and makes those whose target is one of its own."""
    lines = updates.lines
    owners = 1 if isinstance(lines, int) and lines >= ENOUGH else OWNERS
    total = lines * owners
    blocks = ceildiv(total, THREADS)
    at = block_index(blocks) * THREADS + thread_index(THREADS)
    flat = symbol("thread_number", 0, total - 1)
    line, number = symbol("line", 0, lines - 1), symbol("number", 0, updates.count - 1)
    target = symbol("target", 0, updates.room - 1)
    place = updates.place(line, target)
    update = Store(result, place, s.binary(op, load(result, place), updates.value(line, number)))
    mine = s.index(target % owners).equal(s.index(symbol("owner_number", 0, owners - 1)))
    mine = s.const(True, BOOL) if owners == 1 else mine
    walk = For("number", updates.count, (Let("target", updates.target(line, number)), *where(mine, [update])))
    names = [Let("line", flat % lines), Let("owner_number", flat // lines)]
    body = [Let("thread_number", at), *where(below(at, total, "thread_number"), [*names, walk])]
    return call_of(region, blocks_of(blocks, THREADS, body), [result])
