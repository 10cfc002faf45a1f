"""How the operands of an anchor lie in memory, and copies of those that lie in no way that a schedule can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...ir import scalars as s
from ...ir.dims import Dim, linear, symbol
from ...ir.ops import REGISTRY
from ...ir.scalars import Buffer, Load
from ...ir.tensors import Tensor, buffer_tensor
from ...passes.nests import build_nests
from ...passes.regions import Call, Lowered, Region
from .calls import call


@dataclass(frozen=True)
class Affine:
    """Element i of a tensor is `buffer[start + sum(strides * i)]`."""

    buffer: Buffer
    start: Dim
    strides: tuple[Dim, ...]


def affine(tensor: Tensor) -> Affine | None:
    """How the tensor lies in a buffer, or None where its elements are no plain loads at linear offsets."""
    if tensor.kind == "opaque":
        return None
    names = [f"i{a}" for a in range(tensor.rank)]
    read = tensor.at([0 if d == 1 else symbol(n, 0, d - 1) for n, d in zip(names, tensor.shape, strict=True)])
    if not isinstance(read, Load) or read.predicate is not None:
        return None
    start, strides = read.offset, []
    for name in names:
        split = linear(start, name)
        if split is None or s.free_symbols(split[0]) & set(names):
            return None
        strides.append(split[0])
        start = split[1]
    return Affine(read.buffer, start, tuple(strides))


def constant_array(region: Region, tensor: Tensor | None) -> np.ndarray | None:
    """The elements of an operand that is a constant, or a view of one; None where it is not."""
    found = None if tensor is None or 0 in tensor.shape else affine(tensor)
    array = None if found is None else region.constants.get(found.buffer.name)
    if tensor is None or found is None or array is None or not isinstance(found.start, int):
        return None
    flat = np.ascontiguousarray(array).reshape(-1)[found.start :]
    shape, strides = [int(str(d)) for d in tensor.shape], [int(str(d)) * flat.itemsize for d in found.strides]
    return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)


def copied(region: Region, positions: Sequence[int]) -> tuple[Region, Lowered]:
    """The region with some operands of its anchor replaced by copies, and the kernels that make the copies."""
    assert region.anchor is not None
    operands, inputs = list(region.operands), list(region.inputs)
    calls: list[Call] = []
    workspaces: list[Buffer] = []
    for position in positions:
        tensor = operands[position]
        assert tensor is not None
        copy = buffer_tensor(f"operand{position}", tensor.dtype, tensor.shape)
        assert copy.buffer is not None
        calls.append(call(region, f"copy_{position}", build_nests([(copy.buffer, tensor)]), (copy.buffer,)))
        workspaces.append(copy.buffer)
        operands[position] = copy
        inputs.append(copy)
    (definition, *_) = REGISTRY[region.anchor.op](operands, region.anchor.attributes)
    assert isinstance(definition, Tensor)
    changed = replace(region, inputs=tuple(inputs), operands=tuple(operands), anchor_output=definition, inline=None)
    return changed, Lowered(tuple(calls), tuple(workspaces))


def joined(first: Lowered, second: Lowered | None) -> Lowered | None:
    """The kernels of the first and then the second."""
    if second is None:
        return None
    packed = {**first.packed, **second.packed}
    return Lowered((*first.calls, *second.calls), (*first.workspaces, *second.workspaces), packed)
