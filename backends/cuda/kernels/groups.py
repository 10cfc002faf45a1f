"""Outputs of one shape as expressions over named axes, and what kernels made of them are launched and called by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, known_le, product, symbol
from ....ir.dtypes import BF16, BOOL, F16, U8, U16, DType
from ....ir.intrinsics import WARP
from ....ir.loops import Block, For, If, Kernel, Statement, Store, free_sizes
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import Tensor, flat_offset
from ....passes.generic import in_place
from ....passes.nests import Axis, Output, all_reductions, collapse
from ....passes.regions import Call, Region
from ....passes.threads import BLOCK, THREAD

THREADS = 256
"""Threads of a block where nothing speaks for another number."""
NAMES = ("volume", "plane", "row", "column")
"""What axes are called, the last of them last; the only one is `element`."""


@dataclass(frozen=True)
class Group:
    """Outputs over the same axes, outermost first; none has extent 1, and neighbours are one axis where they can be."""

    axes: tuple[Axis, ...]
    outputs: tuple[Output, ...]

    @property
    def values(self) -> tuple[Scalar, ...]:
        return tuple(output.value for output in self.outputs)

    @property
    def total(self) -> Dim:
        """The number of elements of each output."""
        return product(axis.extent for axis in self.axes)

    @property
    def indices(self) -> frozenset[str]:
        """Names of all that is no size: the axes', and those of ranges that values combine."""
        ranges = (name for value in self.values for reduce in all_reductions(value) for name, _ in reduce.ranges)
        return frozenset((*(axis.name for axis in self.axes), *ranges))


def axis_names(count: int) -> list[str]:
    """Names of so many axes."""
    if count <= 1:
        return ["element"][:count]
    return [*(f"axis{i}" for i in range(count - len(NAMES))), *NAMES[-count:]]


def group_of(outputs: Sequence[tuple[Buffer, Tensor]]) -> Group:
    """Outputs of one shape, which is not empty."""
    shape = outputs[0][1].shape
    extents = [(a, extent) for a, extent in enumerate(shape) if extent != 1]
    names = axis_names(len(extents))
    axes = [Axis(name, extent) for name, (_, extent) in zip(names, extents, strict=True)]
    where: list[Dim] = [0] * len(shape)
    for (a, _), axis in zip(extents, axes, strict=True):
        where[a] = axis.index
    values = [tensor.at(where) for _, tensor in outputs]
    offset = flat_offset(where, shape)
    axes, values, (offset,) = collapse(axes, values, [offset], "")
    if len(axes) != len(names):
        renamed = [Axis(name, axis.extent) for name, axis in zip(axis_names(len(axes)), axes, strict=True)]
        # Names are reused: by way of ones that nothing is called by.
        for old, new in ((axes, [Axis(f"?{a.name}", a.extent) for a in renamed]), (None, renamed)):
            before = old if old is not None else [Axis(f"?{a.name}", a.extent) for a in renamed]
            rewriter = s.Rewriter(dims={o.name: n.index for o, n in zip(before, new, strict=True)})
            values, offset = [rewriter(value) for value in values], rewriter.dim(offset)
        axes = renamed
    return Group(tuple(axes), tuple(Output(b, offset, value) for (b, _), value in zip(outputs, values, strict=True)))


_BITS: Mapping[DType, DType] = {F16: U16, BF16: U16, BOOL: U8}
"""Types that registers hold in another form than memory, and integers of the same width."""


def moved_as_bits(group: Group) -> Group:
    """A group that only moves elements, moving them as they lie in memory; any other group as it is."""
    values = [_bits(output.value) for output in group.outputs]
    found = [
        Output(replace(output.buffer, dtype=value.dtype), output.offset, value)
        for output, value in zip(group.outputs, values, strict=True)
        if value is not None
    ]
    return replace(group, outputs=tuple(found)) if len(found) == len(values) else group


def _bits(value: Scalar) -> Scalar | None:
    """The bits of an element that is only moved; None of one that is computed."""
    dtype = _BITS.get(value.dtype)
    if dtype is None:
        return None
    if isinstance(value, s.Load) and value.buffer.space == "parameter":
        return replace(value, dtype=dtype, buffer=replace(value.buffer, dtype=dtype))
    if isinstance(value, s.Const):
        return s.const(int(np.asarray(value.value, value.dtype.numpy).view(dtype.numpy)), dtype)
    if isinstance(value, s.Select):
        yes, no = _bits(value.yes), _bits(value.no)
        return None if yes is None or no is None else s.select(value.condition, yes, no)
    return None


def by_shape(outputs: Iterable[tuple[Buffer, Tensor]]) -> list[list[tuple[Buffer, Tensor]]]:
    """Outputs that are not empty, those of one shape together."""
    found: dict[tuple[Dim, ...], list[tuple[Buffer, Tensor]]] = {}
    for buffer, tensor in outputs:
        if 0 not in tensor.shape:
            found.setdefault(tensor.shape, []).append((buffer, tensor))
    return list(found.values())


def aliases_of(region: Region, group: Group) -> tuple[tuple[str, str], ...]:
    """Pairs (input, output) that may be one memory where each thread reads its elements before it stores them."""
    naive = tuple(Store(output.buffer, output.offset, output.value) for output in group.outputs)
    if any(all_reductions(value) for value in group.values):
        return ()
    inputs = [tensor.buffer for tensor in region.inputs if tensor.buffer is not None]
    return in_place(naive, inputs, [output.buffer for output in group.outputs])


def blocks_of(blocks: Dim, threads: int, body: Sequence[Statement], names: Sequence[Statement] = ()) -> Block:
    """A grid of so many blocks of threads; `names` stand between."""
    return (For(BLOCK, blocks, (*names, For(THREAD, threads, tuple(body), "block")), "grid"),)


def block_index(blocks: Dim) -> Dim:
    return k.index_symbol(BLOCK, blocks)


def thread_index(threads: int) -> Dim:
    return k.index_symbol(THREAD, threads)


def threads_for(count: Dim, most: int = THREADS) -> int:
    """Threads of a block for so many turns in all: whole warps, no more than are wanted."""
    return min(most, -(-count // WARP) * WARP) if isinstance(count, int) and count > 0 else most


def where(condition: Scalar, block: Sequence[Statement], otherwise: Sequence[Statement] = ()) -> list[Statement]:
    """A block under a condition, which may be known."""
    if isinstance(condition, s.Const):
        return list(block if condition.value else otherwise)
    return [If(condition, tuple(block), tuple(otherwise))]


def below(index: Dim, limit: Dim, name: str | None = None, more: int = 0) -> Scalar:
    """index < limit; what is known of them decides it where it can. `name` is the index, but for `more`, by name."""
    if known_le(index + 1, limit):
        return s.const(True, BOOL)
    return s.binary("lt", s.index(index if name is None else symbol(name) + more), s.index(limit))


def call_of(
    region: Region,
    body: Block,
    outputs: Sequence[Buffer],
    scratch: Sequence[Buffer] = (),
    name: str | None = None,
    aliases: tuple[tuple[str, str], ...] = (),
) -> Call:
    """A call of the kernel with this body on the region's buffers and the `scratch` that it uses."""
    buffers = k.used_buffers(body, (*region.buffers, *scratch))
    written = {buffer.name for buffer in outputs}
    kernel = Kernel(
        name or region.name,
        buffers,
        tuple(buffer.name for buffer in buffers if buffer.name in written),
        free_sizes(body, buffers),
        body,
        region.origin,
        aliases,
    )
    return Call(kernel, tuple(b.name for b in buffers), tuple(symbol(name, None) for name in kernel.sizes))
