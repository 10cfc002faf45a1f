"""The schedule for whatever has none of its own: a loop nest by definition."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import scalars as s
from ..ir.dims import Dim, symbol
from ..ir.loops import Block, For, Kernel, Let, Store, free_sizes, walk
from ..ir.scalars import Buffer
from ..ir.target import Target
from .nests import build_nests
from .regions import Call, Lowered, Region


def generic(region: Region, target: Target | None = None) -> Lowered | None:
    """Kernels of a region; None for opaque operators."""
    if any(tensor.kind == "opaque" for _, tensor in region.outputs):
        return None
    buffers, key = region.buffers, region.signature and ("generic", region.signature)
    kernel = region.kernels.get(key) if key is not None else None
    if kernel is None:
        body = build_nests(region.full_outputs())
        written = [buffer for buffer, _ in region.outputs]
        aliases = in_place(body, [t.buffer for t in region.inputs if t.buffer is not None], written)
        names = tuple(buffer.name for buffer in written)
        kernel = Kernel(region.name, buffers, names, free_sizes(body), body, region.origin, aliases)
        if key is not None:
            region.kernels[key] = kernel
    return Lowered((Call(kernel, tuple(b.name for b in buffers), tuple(symbol(n) for n in kernel.sizes)),))


def in_place(body: Block, inputs: Sequence[Buffer], outputs: Sequence[Buffer]) -> tuple[tuple[str, str], ...]:
    """Pairs (input, output) that may be one memory: every element is read only by the store that replaces it.

    Such a kernel is one loop nest of stores, and the one to that output is the last of them.
    """
    stores = [item for item in walk(body) if isinstance(item, Store)]
    if any(not isinstance(item, Store | For | Let) for item in walk(body)):
        return ()
    if len(stores) != len(outputs):
        return ()
    last = stores[-1]
    loads: dict[str, set[Dim]] = {}
    for store in stores:
        for node in s.walk(store.value):
            if isinstance(node, s.Load):
                loads.setdefault(node.buffer.name, set()).add(node.offset)
    return tuple(
        (buffer.name, last.buffer.name)
        for buffer in inputs
        if buffer.size == last.buffer.size
        and buffer.dtype.bytes == last.buffer.dtype.bytes
        and loads.get(buffer.name) == {last.offset}
    )[:1]
