"""The generic schedule of a GPU: loop nests by definition, every loop that can be shared among threads."""

from __future__ import annotations

from collections.abc import Sequence

from ....ir import loops as k
from ....ir.dims import Dim, symbol
from ....ir.loops import Kernel, free_sizes
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....ir.tensors import Tensor
from ....passes.lower import in_place
from ....passes.nests import ALWAYS, build_nests
from ....passes.regions import Call, Lowered, Region


def schedule(region: Region, target: Target) -> Lowered | None:
    """A kernel for each shape among the outputs. None where an output has no definition."""
    outputs = region.full_outputs()
    if any(tensor.kind == "opaque" for _, tensor in outputs):
        return None
    by_shape: dict[tuple[Dim, ...], list[tuple[Buffer, Tensor]]] = {}
    for buffer, tensor in outputs:
        by_shape.setdefault(tensor.shape, []).append((buffer, tensor))
    return Lowered(tuple(_call(region, group) for shape, group in by_shape.items() if 0 not in shape))


def _call(region: Region, outputs: Sequence[tuple[Buffer, Tensor]]) -> Call:
    block = build_nests(outputs, ALWAYS)
    buffers = k.used_buffers(block, region.buffers)
    inputs = [t.buffer for t in region.inputs if t.buffer is not None and t.buffer in buffers]
    aliases = in_place(block, inputs, [buffer for buffer, _ in outputs])
    written = tuple(buffer.name for buffer, _ in outputs)
    kernel = Kernel(region.name, buffers, written, free_sizes(block, buffers), block, region.origin, aliases)
    return Call(kernel, tuple(b.name for b in buffers), tuple(symbol(name, None) for name in kernel.sizes))
