"""What the threads of a block before this one have, combined: the exclusive prefix of a value of each thread."""

from __future__ import annotations

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dtypes import I32
from ....ir.intrinsics import WARP
from ....ir.loops import Alloc, Barrier, Define, For, Statement, Store
from ....ir.scalars import Buffer, Scalar, load
from ....passes.threads import SHUFFLED
from .groups import thread_index, where


def shuffled(value: Scalar, by: Scalar, how: str) -> Scalar:
    """The value of another thread of the warp."""
    assert value.dtype in SHUFFLED, f"{value.dtype} is not exchanged"
    return s.Call(value.dtype, 1, how, (value, by))


def block_prefix(own: Scalar, op: str, threads: int, tag: str) -> tuple[list[Statement], Buffer, Buffer]:
    """Statements, then the registers of what precedes this thread's value and of the whole block's.

    All threads of the block come by. Shared memory called after `tag` is free again only after another barrier, which
    where a block has one warp is none's.
    """

    def register(name: str) -> Buffer:
        return Buffer(f"{tag}_{name}", own.dtype, 1, "register")

    sums, other, before, whole = (register(name) for name in ("upto", "other", "before", "all"))
    identity = s.const(s.IDENTITY[op](own.dtype), own.dtype)
    thread = thread_index(threads)
    lane = thread % WARP
    level = k.index_symbol("level", WARP.bit_length() - 1)
    distance = s.binary("shl", s.const(1, I32), s.cast(s.index(level), I32))
    reached = s.binary("le", distance, s.cast(s.index(lane), I32))
    joined = s.select(reached, s.binary(op, load(sums, 0), load(other, 0)), load(sums, 0))
    steps = (Define(other, shuffled(load(sums, 0), distance, "shuffle_up")), Store(sums, 0, joined))
    previous = register("previous")
    statements: list[Statement] = [
        Define(sums, own),
        For("level", WARP.bit_length() - 1, steps, "unrolled"),
        Define(previous, shuffled(load(sums, 0), s.const(1, I32), "shuffle_up")),
        Define(before, s.select(s.index(lane).equal(0), identity, load(previous, 0))),
    ]
    warps = threads // WARP
    if warps == 1:
        last = shuffled(load(sums, 0), s.const(WARP - 1, I32), "shuffle")
        return [*statements, Define(whole, last)], before, whole
    shared, front = Buffer(f"{tag}_warps", own.dtype, warps, "shared"), register("front")
    warp = k.index_symbol("warp", warps)
    mine = s.index(warp) < s.index(thread // WARP)
    add = s.binary(op, load(front, 0), load(shared, warp))
    walk = (
        Store(front, 0, s.select(mine, add, load(front, 0))),
        Store(whole, 0, s.binary(op, load(whole, 0), load(shared, warp))),
    )
    statements += [
        Alloc(shared),
        *where(s.index(lane).equal(WARP - 1), [Store(shared, thread // WARP, load(sums, 0))]),
        Barrier(),
        Define(front, identity),
        Define(whole, identity),
        For("warp", warps, walk, "unrolled"),
        Store(before, 0, s.binary(op, load(front, 0), load(before, 0))),
    ]
    return statements, before, whole
