"""Kernels that name no threads, mapped to a GPU's blocks and threads.

What a schedule wrote once for any machine has loops whose iterations are independent (parallel, or vectors without
accumulation) among serial ones. Each loop nest at the top becomes a launch of its own: one thread per iteration, or,
where an iteration has long independent loops inside, one block per iteration, whose threads share those. Serial code
around them is then run by all threads alike, but for what it writes to memory, which the first thread does between
barriers. Whatever the kernel, the result is the same as that of one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir import loops as k
from ..ir import scalars as s
from ..ir.dims import Dim, ceildiv, known_le, product, symbol
from ..ir.dtypes import F32, F64, I32, I64, U32, U64
from ..ir.intrinsics import WARP
from ..ir.loops import Alloc, Barrier, Block, Define, For, If, Kernel, Let, Statement, Store, While, free_sizes
from ..ir.scalars import Buffer
from ..ir.tensors import unflatten
from .vector_step import NotVectorizable
from .vectorize import carried

THREADS = 256
"""Threads of a block: few blocks hide the latency of memory, and a thread can have 128 registers."""
LONG = 32
"""Iterations from which on the threads of a block share a loop."""
SHARED_BYTES = 40 << 10
"""Private memory up to which one copy for a block is kept in shared memory; every GPU gives a block 48 KiB."""
THREAD, BLOCK = "thread", "block"
SHUFFLED = (F32, F64, I32, I64, U32, U64)
"""Element types that threads of a warp can exchange."""
SHARED = ("parallel", "vector")
"""Loops that the threads of a block can share; what the latter accumulate is combined among them."""


def distribute(kernel: Kernel) -> list[Kernel]:
    """Kernels that, launched in order, do what `kernel` does."""
    body = tuple(map(_independent, kernel.body))
    phases = _phases(body)
    bodies = [_mapped(phase, tuple(lets)) for lets, phase in phases] if phases is not None else [_one_block(body)]
    if len(bodies) == 1:
        return [_kernel(kernel, bodies[0], kernel.name)]
    return [_kernel(kernel, block, f"{kernel.name}_{number}") for number, block in enumerate(bodies)]


def _kernel(kernel: Kernel, body: Block, name: str) -> Kernel:
    """A part of a kernel with the parameters that it uses."""
    parameters = k.used_buffers(body, kernel.parameters)
    stored = {st.buffer.name for st in k.walk(body) if isinstance(st, Store)}
    stored |= {place.buffer.name for st in k.walk(body) if isinstance(st, k.Intrinsic) for place in st.places[:1]}
    aliases = {st.buffer.name: st.source.name for st in k.walk(body) if isinstance(st, k.Alias)}
    for name_of_alias in list(aliases):
        root = name_of_alias
        while root in aliases:
            root = aliases[root]
        if name_of_alias in stored:
            stored.add(root)
    outputs = tuple(p.name for p in parameters if p.name in stored)
    names = {p.name for p in parameters}
    together = tuple(pair for pair in kernel.aliases if names >= set(pair))
    sizes = free_sizes(body, parameters)
    return replace(kernel, name=name, parameters=parameters, outputs=outputs, sizes=sizes, body=body, aliases=together)


def _independent(statement: Statement) -> Statement:
    """Vector loops as parallel ones where they carry nothing from iteration to iteration; they stay what they are where
    they only combine values into registers, else they are serial."""
    if isinstance(statement, If):
        then, otherwise = tuple(map(_independent, statement.then)), tuple(map(_independent, statement.otherwise))
        return replace(statement, then=then, otherwise=otherwise)
    if isinstance(statement, While):
        return replace(statement, body=tuple(map(_independent, statement.body)))
    if not isinstance(statement, For):
        return statement
    kind = statement.kind
    if kind == "vector":
        try:
            kept = carried(statement.body, statement.index)
            in_registers = all(buffer.space == "register" for buffer, _ in kept.values())
            kind = "parallel" if not kept else "vector" if in_registers else "serial"
        except NotVectorizable:
            kind = "serial"
    return replace(statement, kind=kind, body=tuple(map(_independent, statement.body)))


def _phases(body: Block) -> list[tuple[list[Statement], Statement]] | None:
    """The statements that can be launched one after another, each with the names that it may use; None where they
    share more than names of sizes."""
    lets: list[Statement] = []
    found: list[tuple[list[Statement], Statement]] = []
    for statement in body:
        if isinstance(statement, Let) and _is_size(statement.value):
            lets.append(statement)
        elif isinstance(statement, For | Store | If):
            found.append((list(lets), statement))
        else:
            return None
    return found


def _is_size(value: Dim | s.Scalar) -> bool:
    """Whether a value depends on sizes alone, not on memory."""
    if isinstance(value, s.Scalar):
        return not any(isinstance(node, s.Load) for node in s.walk(value))
    return isinstance(value, int) or not value.has_opaque


def _mapped(phase: Statement, lets: Block) -> Block:
    """One launch."""
    loops, names, body = _peeled(phase)
    if not loops:
        return _one_block((*lets, phase)) if _has_parallel(phase) else (*lets, phase)
    total = product(ceildiv(loop.extent, loop.step) for loop in loops)
    if _is_worth_a_block(body):
        inner = _Cooperative().run(body)
        flat = k.index_symbol(BLOCK, total)
        threads = For(THREAD, THREADS, (*_indices(loops, flat), *names, *inner), "block")
        return (*lets, For(BLOCK, total, (threads,), "grid"))
    threads_of_block = THREADS
    if isinstance(total, int) and total < THREADS:
        threads_of_block = max(WARP, -(-total // WARP) * WARP)
    blocks = ceildiv(total, threads_of_block)
    number = k.index_symbol(BLOCK, blocks) * threads_of_block + k.index_symbol(THREAD, threads_of_block)
    flat = symbol("element", 0, total - 1)
    work = (*_indices(loops, flat), *names, *map(_serial, body))
    inside = s.binary("lt", s.index(symbol("element", 0)), s.index(total))
    body = (Let("element", number), *((If(inside, work),) if not known_le(blocks * threads_of_block, total) else work))
    return (*lets, For(BLOCK, blocks, (For(THREAD, threads_of_block, body, "block"),), "grid"))


def _peeled(statement: Statement) -> tuple[list[For], Block, Block]:
    """The parallel loops around all of a statement, the names given between them, and what they enclose."""
    loops: list[For] = []
    names: list[Statement] = []
    block: Block = (statement,)
    while True:
        before = [st for st in block if isinstance(st, Let)]
        rest = block[len(before) :]
        only = rest[0] if len(rest) == 1 else None
        known = {loop.index for loop in loops} | {let.name for let in names if isinstance(let, Let)}
        inner = {let.name for let in before}
        if not (
            isinstance(only, For)
            and only.kind == "parallel"
            and all(a is b for a, b in zip(block, before, strict=False))
        ):
            return loops, tuple(names), block
        if s.free_symbols(only.extent) & (known | inner):
            return loops, tuple(names), block
        names += before
        loops.append(only)
        block = only.body


def _indices(loops: Sequence[For], flat: Dim) -> list[Statement]:
    """The indices of loops by the number of an iteration, the last loop fastest."""
    counts = [ceildiv(loop.extent, loop.step) for loop in loops]
    return [Let(loop.index, at * loop.step) for loop, at in zip(loops, unflatten(flat, counts), strict=True)]


def _has_parallel(statement: Statement) -> bool:
    return any(isinstance(st, For) and st.kind in SHARED for st in k.walk((statement,)))


def _is_worth_a_block(body: Block) -> bool:
    """Whether an iteration has independent loops that are long, and nothing that keeps threads from sharing them."""
    inner = [st for st in k.walk(body) if isinstance(st, For) and st.kind in SHARED]
    if not any(not isinstance(loop.extent, int) or loop.extent >= LONG for loop in inner):
        return False
    private = [st.buffer for st in body if isinstance(st, Alloc) and st.buffer.space == "stack"]
    return (
        all(isinstance(b.size, int) for b in private)
        and sum(b.size * b.dtype.bytes for b in private if isinstance(b.size, int)) <= SHARED_BYTES
    )


def _one_block(body: Block) -> Block:
    """All of a kernel by one block, or by one thread where nothing is shared among threads."""
    if any(_has_parallel(statement) for statement in body) and _is_worth_a_block(body):
        return (For(THREAD, THREADS, _Cooperative().run(body), "block"),)
    return tuple(map(_serial, body))


def _serial(statement: Statement) -> Statement:
    """A statement that one thread does alone."""
    if isinstance(statement, For):
        kind = "serial" if statement.kind in SHARED else statement.kind
        return replace(statement, kind=kind, body=tuple(map(_serial, statement.body)))
    if isinstance(statement, While):
        return replace(statement, body=tuple(map(_serial, statement.body)))
    if isinstance(statement, If):
        return replace(
            statement, then=tuple(map(_serial, statement.then)), otherwise=tuple(map(_serial, statement.otherwise))
        )
    return statement


class _Cooperative:
    """Statements that all threads of a block run together."""

    def __init__(self) -> None:
        self._count = 0
        self._shared: dict[str, Buffer] = {}
        self._thread = k.index_symbol(THREAD, THREADS)

    def run(self, body: Block) -> Block:
        allocated = [st.buffer for st in k.walk(body) if isinstance(st, Alloc) and st.buffer.space == "stack"]
        top = {st.buffer.name for st in self._uniform_level(body) if isinstance(st, Alloc)}
        self._shared = {b.name: replace(b, space="shared") for b in allocated if b.name in top}
        return _without_double_barriers(k.rebuild(self._block(body), _Renamed(self._shared), self._shared))

    def _uniform_level(self, body: Block) -> list[Statement]:
        """The statements that every thread comes by."""
        found: list[Statement] = []
        for statement in body:
            found.append(statement)
            if not (isinstance(statement, For) and statement.kind in SHARED):
                for inner in k.children(statement):
                    found += self._uniform_level(inner)
        return found

    def _block(self, body: Block) -> Block:
        return tuple(result for statement in body for result in self._one(statement))

    def _one(self, statement: Statement) -> list[Statement]:
        if isinstance(statement, Let | Define | Alloc | k.Alias):
            return [statement]
        if isinstance(statement, Store) and statement.buffer.space == "register":
            return [statement]
        if isinstance(statement, For) and statement.kind == "parallel":
            return self._distributed(statement)
        if isinstance(statement, For) and statement.kind == "vector":
            return self._reduced(statement)
        writes = any(_writes_memory(st) for st in k.walk((statement,)))
        if not writes and not _has_parallel(statement):
            return [_serial(statement)]
        if not _has_parallel(statement) and not _changes_outside(statement):
            first = s.binary("eq", s.index(self._thread), s.index(0))
            return [Barrier(), If(first, (_serial(statement),)), Barrier()]
        if isinstance(statement, For | While):
            return [Barrier(), replace(statement, body=self._block(statement.body))]
        assert isinstance(statement, If), f"{type(statement).__name__} in a block of threads"
        return [
            Barrier(),
            replace(statement, then=self._block(statement.then), otherwise=self._block(statement.otherwise)),
        ]

    def _distributed(self, loop: For) -> list[Statement]:
        return [Barrier(), self._dealt(loop, tuple(map(_serial, loop.body))), Barrier()]

    def _dealt(self, loop: For, body: Block) -> Statement:
        """Iterations dealt out to the threads in turn, so that neighbours read neighbouring memory."""
        self._count += 1
        turn = f"turn{self._count}"
        count = ceildiv(loop.extent, loop.step)
        turns = ceildiv(count, THREADS)
        position = (k.index_symbol(turn, turns) * THREADS + self._thread) * loop.step
        inside = s.binary("lt", s.index(symbol(loop.index, 0)), s.index(loop.extent))
        return For(turn, turns, (Let(loop.index, position), If(inside, body)))

    def _reduced(self, loop: For) -> list[Statement]:
        """Each thread accumulates its share in registers of its own; then they are combined in all threads alike."""
        kept = [(buffer, offset, op) for (_, offset), (buffer, op) in carried(loop.body, loop.index).items()]
        own: list[tuple[Buffer, str]] = []
        names: dict[tuple[str, Dim], Buffer] = {}
        for buffer, offset, op in kept:
            self._count += 1
            mine = Buffer(f"{buffer.name}_part{self._count}", buffer.dtype, 1, "register")
            names[buffer.name, offset] = mine
            own.append((mine, op))
        statements: list[Statement] = [
            Define(mine, s.const(s.IDENTITY[op](mine.dtype), mine.dtype)) for mine, op in own
        ]
        body = _onto(tuple(map(_serial, loop.body)), names)
        # What the body reads may have been written by other threads, and what it stores is read by them.
        statements += [Barrier(), self._dealt(loop, body)]
        statements += block_reduction(own, THREADS, f"partial{self._count}")
        for (buffer, offset, op), (mine, _) in zip(kept, own, strict=True):
            value = s.binary(op, s.load(buffer, offset), s.load(mine, 0))
            statements.append(Store(buffer, offset, value))
        return statements


def _onto(body: Block, names: dict[tuple[str, Dim], Buffer]) -> Block:
    """A loop's body that accumulates into other registers."""

    class Other(s.Rewriter):
        def rebuild(self, scalar: s.Scalar) -> s.Scalar:
            result = super().rebuild(scalar)
            if isinstance(result, s.Load) and (result.buffer.name, result.offset) in names:
                return s.load(names[result.buffer.name, result.offset], 0)
            return result

    def one(statement: Statement) -> Statement:
        if isinstance(statement, Store) and (statement.buffer.name, statement.offset) in names:
            return replace(statement, buffer=names[statement.buffer.name, statement.offset], offset=0)
        if isinstance(statement, For | While):
            return replace(statement, body=tuple(map(one, statement.body)))
        if isinstance(statement, If):
            then, otherwise = tuple(map(one, statement.then)), tuple(map(one, statement.otherwise))
            return replace(statement, then=then, otherwise=otherwise)
        return statement

    return tuple(map(one, k.rebuild(body, Other())))


def block_reduction(
    registers: Sequence[tuple[Buffer, str]], threads: int, name: str, again: bool = True
) -> list[Statement]:
    """Combines registers (each with its operation) over all threads of a block, a multiple of a warp of at most 1024:
    within warps by shuffles, then the warps' values, which lie in shared memory called `name`, in every warp alike.
    `again` tells that the block may come by here once more."""
    statements = warp_reduction(registers)
    warps = threads // WARP
    if warps == 1:
        return statements
    thread = k.index_symbol(THREAD, threads)
    lane, warp = thread % WARP, thread // WARP
    first = s.binary("eq", s.index(lane), s.index(0))
    parts = [Buffer(f"{name}_{i}", register.dtype, warps, "shared") for i, (register, _) in enumerate(registers)]
    statements += [Alloc(part) for part in parts]
    stores = tuple(Store(part, warp, s.load(r, 0)) for part, (r, _) in zip(parts, registers, strict=True))
    statements += [If(first, stores), Barrier()]
    width = 1 << (warps - 1).bit_length()
    for part, (register, op) in zip(parts, registers, strict=True):
        value = s.load(part, lane % width)
        if width != warps:
            identity = s.const(s.IDENTITY[op](register.dtype), register.dtype)
            value = s.select(s.binary("lt", s.index(lane % width), s.index(warps)), value, identity)
        statements.append(Store(register, 0, value))
    return [*statements, *warp_reduction(registers, width), *([Barrier()] if again else [])]


def warp_reduction(registers: Sequence[tuple[Buffer, str]], width: int = WARP, stride: int = 1) -> list[Statement]:
    """Combines registers, each with its operation, over every `width` (a power of two) threads of a warp that are
    `stride` apart; all get the result, by the same order of operations. Buffers of several registers are combined one
    by one."""
    if width == 1:
        return []
    level = k.index_symbol("level", width.bit_length() - 1)
    mask = s.binary("shr", s.const(width // 2 * stride, I32), s.cast(s.index(level), I32))
    updates: list[Statement] = []
    for register, op in registers:
        size = register.size
        assert isinstance(size, int)
        at = k.index_symbol("part", size) if size > 1 else 0
        value = s.load(register, at)
        # Types that no shuffle moves travel as wider ones.
        carrier = value if register.dtype in SHUFFLED else s.cast(value, F32 if register.dtype.is_float else I32)
        other: s.Scalar = s.Call(carrier.dtype, 1, "shuffle_xor", (carrier, mask))
        update: Statement = Store(register, at, s.binary(op, value, s.cast(other, register.dtype)))
        updates.append(For("part", size, (update,), "unrolled") if size > 1 else update)
    return [For("level", width.bit_length() - 1, tuple(updates), "unrolled")]


class _Renamed(s.Rewriter):
    """Puts shared buffers in the place of private ones of their names."""

    def __init__(self, buffers: dict[str, Buffer]) -> None:
        super().__init__()
        self._buffers = buffers

    def rebuild(self, scalar: s.Scalar) -> s.Scalar:
        result = super().rebuild(scalar)
        if isinstance(result, s.Load) and result.buffer.name in self._buffers:
            return replace(result, buffer=self._buffers[result.buffer.name])
        return result


def _writes_memory(statement: Statement) -> bool:
    if isinstance(statement, k.Intrinsic):
        return True
    return isinstance(statement, Store) and statement.buffer.space != "register"


def _changes_outside(statement: Statement) -> bool:
    """Whether registers that a statement did not define itself change in it."""
    own = {st.buffer.name for st in k.walk((statement,)) if isinstance(st, Define | Alloc)}
    return any(
        isinstance(st, Store) and st.buffer.space == "register" and st.buffer.name not in own
        for st in k.walk((statement,))
    )


def _without_double_barriers(block: Block) -> Block:
    result: list[Statement] = []
    for statement in block:
        if isinstance(statement, Barrier) and result and isinstance(result[-1], Barrier):
            continue
        if isinstance(statement, For | While):
            statement = replace(statement, body=_without_double_barriers(statement.body))
        elif isinstance(statement, If):
            statement = replace(
                statement,
                then=_without_double_barriers(statement.then),
                otherwise=_without_double_barriers(statement.otherwise),
            )
        result.append(statement)
    return tuple(result)
