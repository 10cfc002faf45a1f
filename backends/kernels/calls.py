"""What explicit kernels share: a body made into a call, loops over the indices of a shape, registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir import loops as k
from ...ir import scalars as s
from ...ir.dims import Dim, product, symbol
from ...ir.dtypes import I64, DType
from ...ir.errors import UnsupportedError
from ...ir.loops import Define, For, Kernel, Let, Statement, Store, free_sizes, used_buffers
from ...ir.ops import REGISTRY
from ...ir.scalars import Buffer, Scalar, ScalarLike
from ...ir.target import Target
from ...ir.tensors import Indices, Tensor, unflatten
from ...passes.regions import Call, Region

# Elements below which sharing a loop among threads costs more than it saves.
PARALLEL_ELEMENTS = 16384


def attribute(region: Region, name: str) -> Any:
    """An attribute of the region's anchor; its declared default where the model gives none."""
    assert region.anchor is not None
    found = region.anchor.attributes.get(name)
    return REGISTRY[region.anchor.op].attributes[name].default if found is None else found


def operand(region: Region, position: int) -> Tensor | None:
    """An operand of the region's anchor, None where it is absent."""
    return region.operands[position] if position < len(region.operands) else None


def present(region: Region, position: int) -> Tensor:
    """An operand that cannot be absent."""
    found = operand(region, position)
    assert found is not None, f"{region.name} lacks its operand {position}"
    return found


def call(
    region: Region, name: str, body: Iterable[Statement], scratch: Sequence[Buffer] = (), shared: bool = False
) -> Call:
    """A call of the kernel with this body, on the region's buffers and the `scratch` that it uses.

    `shared` says that the body follows from the target, the region's signature, the name and the scratch buffers:
    regions alike have one kernel then, and of an iterator the body is made only once.
    """
    key = (region.signature, name, tuple(scratch)) if shared and region.signature is not None else None
    kernel = region.kernels.get(key) if key is not None else None
    if kernel is None:
        kernel = _kernel(region, name, tuple(body), scratch)
    if key is not None:
        region.kernels[key] = kernel
    return Call(kernel, tuple(p.name for p in kernel.parameters), tuple(symbol(n, None) for n in kernel.sizes))


def _kernel(region: Region, name: str, block: tuple[Statement, ...], scratch: Sequence[Buffer]) -> Kernel:
    parameters = used_buffers(block, tuple({b.name: b for b in (*region.buffers, *scratch)}.values()))
    written = {statement.buffer.name for statement in k.walk(block) if isinstance(statement, Store)}
    pointers = {st.buffer.name: st.source.name for st in k.walk(block) if isinstance(st, k.Alias)}
    while behind := {pointers[name] for name in written & pointers.keys()} - written:
        written |= behind
    outputs = tuple(p.name for p in parameters if p.name in written)
    return Kernel(name, parameters, outputs, free_sizes(block, parameters), block, region.origin)


def over(
    shape: Sequence[Dim],
    body: Callable[[Indices], Sequence[Statement]],
    stem: str,
    work: Dim | None = None,
    target: Target | None = None,
) -> Statement:
    """The body for every index tuple of a shape, in row-major order, by one loop.

    With `work`, the elements that one turn handles, the turns are independent, and threads share them where that pays:
    on a GPU always.
    """
    total = product(shape)
    flat = k.index_symbol(f"{stem}_at", total)
    indices: list[Dim] = []
    lets: list[Statement] = []
    for axis, index in enumerate(unflatten(flat, shape)):
        if isinstance(index, int) or shape[axis] == 1:
            indices.append(0)
            continue
        lets.append(Let(f"{stem}_{axis}", index))
        indices.append(k.index_symbol(f"{stem}_{axis}", shape[axis]))
    size = None if work is None else total * work
    least = PARALLEL_ELEMENTS if target is None or target.kind == "cpu" else 0
    shared = size is not None and total != 1 and not (isinstance(size, int) and size < least)
    return For(f"{stem}_at", total, (*lets, *body(tuple(indices))), "parallel" if shared else "serial")


@dataclass(frozen=True)
class Variable:
    """A scalar in a register that statements change."""

    name: str
    dtype: DType = I64

    @property
    def buffer(self) -> Buffer:
        return Buffer(self.name, self.dtype, 1, "register")

    @property
    def value(self) -> Scalar:
        return s.load(self.buffer, 0)

    def index(self, upper: Dim | None = None, lower: int | None = 0) -> Dim:
        """The value as an index; what is stated of it must hold wherever the index is used."""
        return s.as_dim(self.value, lower, upper)

    def define(self, value: ScalarLike) -> Statement:
        return Define(self.buffer, s.as_scalar(value, self.dtype))

    def set(self, value: ScalarLike) -> Statement:
        return Store(self.buffer, 0, s.as_scalar(value, self.dtype))

    def add(self, value: ScalarLike) -> Statement:
        return self.set(self.value + value)


def arithmetic_type(region: Region, dtype: DType) -> DType:
    """`dtype` where the kernels can compute with it; UnsupportedError for text."""
    if dtype.kind != "string":
        return dtype
    assert region.anchor is not None
    raise UnsupportedError(f"{region.anchor.where}: elements of type {dtype} are not compiled")
