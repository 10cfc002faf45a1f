"""The generic schedule of a GPU: one thread per element of the outputs, whatever defines it."""

from __future__ import annotations

from collections.abc import Sequence

from ....ir import loops as k
from ....ir.dims import Dim, symbol
from ....ir.loops import Kernel, Statement, Store, free_sizes
from ....ir.scalars import Buffer
from ....ir.target import Target
from ....ir.tensors import Indices, Tensor, flat_offset
from ....passes.lower import in_place
from ....passes.nests import Axis, collapse, lower_reductions
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
    shape = outputs[0][1].shape
    axes = [Axis(f"i{a}", extent) for a, extent in enumerate(shape) if extent != 1]
    indices: Indices = tuple(Axis(f"i{a}", extent).index if extent != 1 else 0 for a, extent in enumerate(shape))
    values = [tensor.at(indices) for _, tensor in outputs]
    offsets = [flat_offset(indices, shape) for _ in outputs]
    axes, values, offsets = collapse(axes, values, offsets, "")
    body: list[Statement] = []
    for (buffer, _), offset, value in zip(outputs, offsets, values, strict=True):
        lowered = lower_reductions(value, body)
        body.append(Store(buffer, offset, lowered))
    for axis in reversed(axes):
        body = [k.loop(axis.name, axis.extent, body, "parallel")]
    block = tuple(body)
    buffers = k.used_buffers(block, region.buffers)
    inputs = [t.buffer for t in region.inputs if t.buffer is not None and t.buffer in buffers]
    aliases = in_place(block, inputs, [buffer for buffer, _ in outputs])
    written = tuple(buffer.name for buffer, _ in outputs)
    kernel = Kernel(region.name, buffers, written, free_sizes(block, buffers), block, region.origin, aliases)
    return Call(kernel, tuple(b.name for b in buffers), tuple(symbol(name, None) for name in kernel.sizes))
