"""Kernels as CUDA C: one function each, over the functions of the prelude and nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ...ir import loops as k
from ...ir import scalars as s
from ...ir.dtypes import I8, U8
from ...ir.loops import Alloc, Kernel
from .expressions import Variable
from .launch import is_launchable, launch_of, nest_of, shared_layout
from .names import memory_type, plain_name
from .statements import StatementRenderer

INDEX_TYPES = {32: "int", 64: "i64"}
MUCH_SHARED = 16 << 10
"""Bytes of shared memory from which it, not registers, limits the blocks of a multiprocessor."""


@cache
def prelude() -> str:
    """The functions that kernels call, as the GPU has them."""
    return Path(__file__).with_name("prelude.cuh").read_text()


def function_name(kernel: Kernel) -> str:
    """The name of the kernel's function."""
    return plain_name(kernel.name)


def is_quantizing(kernel: Kernel) -> bool:
    """Whether the kernel rounds reals to bytes. ONNX defines those exactly: no product is contracted with a sum."""
    stores = (st for st in k.walk(kernel.body) if isinstance(st, k.Store) and st.buffer.dtype in (I8, U8))
    values = (node for store in stores for node in s.walk(store.value))
    return any(isinstance(node, s.Cast) and node.operand.dtype.is_float for node in values)


def render_kernel(kernel: Kernel) -> str:
    """The function of a kernel, `extern "C" __global__`: its parameters, then its sizes."""
    launch, nest = launch_of(kernel), nest_of(kernel)
    places, shared_bytes = shared_layout(kernel)
    index_type = INDEX_TYPES[launch.index_bits]
    written = {buffer.name for buffer in kernel.parameters if buffer.name in kernel.outputs}
    private = {st.buffer.name for st in k.walk(kernel.body) if isinstance(st, Alloc)}
    renderer = StatementRenderer(index_type, frozenset(written | private), places, is_quantizing(kernel))
    aliased = {name for pair in kernel.aliases for name in pair}
    parameters = []
    for buffer in kernel.parameters:
        name = renderer.unique(buffer.name)
        renderer.frames[0].buffers[buffer.name] = Variable(name)
        constant = "" if buffer.name in written else "const "
        restrict = "" if buffer.name in aliased else " __restrict__"
        parameters.append(f"{constant}{memory_type(buffer.dtype)}*{restrict} {name}")
    for size in kernel.sizes:
        renderer.frames[0].symbols[size] = renderer.unique(size)
        parameters.append(f"{index_type} {renderer.frames[0].symbols[size]}")
    if shared_bytes:
        renderer.write("unsigned char* const shared = shared_memory();")
    for statement in nest.outer:
        renderer.statement(statement)
    if nest.grid:
        _grid(renderer, nest.grid)
    for statement in nest.inner:
        renderer.statement(statement)
    if nest.threads is not None:
        thread = renderer.unique(nest.threads.index)
        renderer.frames[0].symbols[nest.threads.index] = thread
        renderer.write(f"const int {thread} = threadIdx.x;")
    for statement in nest.body:
        renderer.statement(statement)
    origin = "// from " + ", ".join(f'"{name}"' for name in kernel.origin).replace("\n", " ") if kernel.origin else ""
    # One block at once is enough where shared memory limits them: else ptxas spills registers to make room for more.
    bounds = f"{launch.threads}, 1" if shared_bytes >= MUCH_SHARED else f"{launch.threads}"
    head = f'extern "C" __global__ void __launch_bounds__({bounds})\n'
    head += f"{function_name(kernel)}({', '.join(parameters)})\n{{"
    return "\n".join([*([origin] if origin else []), head, *renderer.lines, "}\n"])


def _grid(renderer: StatementRenderer, loops: tuple[k.For, ...]) -> None:
    """The indices of the grid loops by the number of the block, the last one fastest."""
    kind = renderer.index_type
    if len(loops) == 1 and loops[0].step == 1:
        name = renderer.frames[0].symbols[loops[0].index] = renderer.unique(loops[0].index)
        renderer.write(f"const {kind} {name} = blockIdx.x;")
        return
    rest = renderer.unique("block_index")
    renderer.write(f"const {kind} {rest} = blockIdx.x;")
    for position, loop in enumerate(reversed(loops)):
        name = renderer.unique(loop.index)
        renderer.frames[0].symbols[loop.index] = name
        renderer.begin()
        count = renderer.dim((loop.extent + (loop.step - 1)) // loop.step)
        last = position == len(loops) - 1
        step = "" if loop.step == 1 else f" * {loop.step}"
        text = rest if last else f"{rest} % ({count})"
        renderer.write(f"const {kind} {name} = {f'({text}){step}' if step and not last else text + step};")
        if not last:
            following = renderer.unique("block_index")
            renderer.write(f"const {kind} {following} = {rest} / ({count});")
            rest = following


def render_kernels(kernels: tuple[Kernel, ...]) -> str:
    """The functions of several kernels."""
    assert all(is_launchable(kernel) or launch_of(kernel).threads == 1 for kernel in kernels)
    return "\n".join(render_kernel(kernel) for kernel in kernels)
