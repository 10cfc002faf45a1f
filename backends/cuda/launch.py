"""How a kernel is launched: read off its grid and block loops and its shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir import loops as k
from ...ir.dims import Dim, product
from ...ir.loops import Alloc, For, Kernel, Let, Statement

SHARED_ALIGNMENT = 128
"""Bytes to which every shared buffer is aligned: more than any access asks for, and one row of the banks."""
LARGEST_32 = (1 << 31) - (1 << 24)
"""Elements up to which 32-bit indices reach all of a buffer; threads behind its end count further without overflow."""


@dataclass(frozen=True)
class Launch:
    """`grid` blocks (over the kernel's size symbols; none are launched for 0) of `threads` threads with `shared_bytes`
    of dynamic shared memory. Sizes are passed as integers of `index_bits` bits; where those are 32, no buffer may have
    2^31 elements."""

    grid: Dim
    threads: int
    shared_bytes: int
    index_bits: int


@dataclass(frozen=True)
class Nest:
    """A kernel's body taken apart: what stands before the grid loops' innermost body, those loops, the loop over
    threads (None: one thread) and its body."""

    outer: tuple[Statement, ...]
    grid: tuple[For, ...]
    inner: tuple[Statement, ...]
    threads: For | None
    body: k.Block


def nest_of(kernel: Kernel) -> Nest:
    """The parts of a kernel in the form that GPUs run. AssertionError for another form."""
    grid: list[For] = []
    outer: list[Statement] = []
    inner: list[Statement] = []
    block = kernel.body
    while True:
        loops = [st for st in block if isinstance(st, For) and st.kind in ("grid", "block")]
        if not loops:
            assert not grid and not outer, f"{kernel.name}: grid loops without a loop over the block's threads"
            return Nest((), (), (), None, block)
        (loop,) = loops
        before = block[: block.index(loop)]
        assert block[-1] is loop, f"{kernel.name}: statements behind the loop over {loop.index}"
        assert all(isinstance(st, Let | Alloc) for st in before), f"{kernel.name}: statements before {loop.index}"
        (inner if grid else outer).extend(before)
        if loop.kind == "block":
            return Nest(tuple(outer), tuple(grid), tuple(inner), loop, loop.body)
        grid.append(loop)
        block = loop.body


def is_launchable(kernel: Kernel) -> bool:
    """Whether a kernel is in the form that GPUs run already."""
    return any(isinstance(st, For) and st.kind in ("grid", "block") for st in k.walk(kernel.body))


def shared_layout(kernel: Kernel) -> tuple[dict[str, int], int]:
    """Where each shared buffer begins, and the bytes of all."""
    places: dict[str, int] = {}
    end = 0
    for statement in k.walk(kernel.body):
        if isinstance(statement, Alloc) and statement.buffer.space == "shared":
            buffer = statement.buffer
            assert isinstance(buffer.size, int), f"{kernel.name}: shared {buffer} has no constant size"
            places[buffer.name] = end
            end += -(-buffer.size * buffer.dtype.bytes // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
    return places, end


def index_bits(kernel: Kernel) -> int:
    """32 where every buffer of known size can be reached by 32-bit indices."""
    sizes = [buffer.size for buffer in kernel.parameters if isinstance(buffer.size, int)]
    return 64 if any(size > LARGEST_32 for size in sizes) else 32


def launch_of(kernel: Kernel) -> Launch:
    """How the kernel is launched."""
    nest = nest_of(kernel)
    threads = 1
    if nest.threads is not None:
        assert isinstance(nest.threads.extent, int), f"{kernel.name}: the number of threads must be constant"
        threads = nest.threads.extent
    blocks = product((loop.extent + (loop.step - 1)) // loop.step for loop in nest.grid)
    return Launch(blocks, threads, shared_layout(kernel)[1], index_bits(kernel))
