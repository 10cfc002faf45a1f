"""What lowering hands to a schedule, and what it gets back.

A region is one fused group of nodes. Its outputs are defined over its input buffers, and, where the group has an anchor
(a contraction with schedules of its own), over `Element("anchor", indices)`, which the schedule provides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from ..ir import scalars as s
from ..ir.dims import Dim
from ..ir.graph import Node
from ..ir.loops import Kernel, index_symbol
from ..ir.rounding import converted
from ..ir.scalars import Buffer, Const, Element, Scalar
from ..ir.target import Target
from ..ir.tensors import Indices, Tensor

ANCHOR = "anchor"


@dataclass(frozen=True)
class Region:
    """One fused group.

    `inputs` are buffer tensors x0, x1, ... and `outputs` pairs of a buffer y0, y1, ... with its definition. `operands`
    define what the anchor reads, over the inputs: a transpose, slice or pad before it is composed in. `constants` holds
    the arrays of inputs that the model fixes; `static` the anchor's shape operands by name.
    `alignments` are of the buffers' addresses, where more is known than the element type tells. `compose(name, ...)`
    gives the outputs of a region of the anchor, by definition, for tensors as its inputs. `kernels` are those that
    regions of the same graph share, by what they follow from. `member` is the region's number among those that differ
    in literals alone (`passes.literals`).
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[tuple[Buffer, Tensor], ...]
    anchor: Node | None = None
    operands: tuple[Tensor | None, ...] = ()
    anchor_output: Tensor | None = None
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    origin: tuple[str, ...] = ()
    inline: Callable[[], Sequence[tuple[Buffer, Tensor]]] | None = None
    static: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    alignments: Mapping[str, int] = field(default_factory=dict)
    compose: Callable[..., Sequence[Tensor]] = field(default=lambda name, *tensors: ())
    kernels: dict[object, Kernel] = field(default_factory=dict, repr=False, compare=False)
    member: int | None = None

    @cached_property
    def signature(self) -> bytes | None:
        """Equal for regions that compute the same on buffers of the same names, whatever the elements of constants are
        and wherever the region comes from. None where that cannot be told."""
        anchor = self.anchor
        tensors = (*self.inputs, *(tensor for _, tensor in self.outputs), *self.operands, self.anchor_output)
        unknown = any(tensor is not None and (tensor.kind == "opaque" or 0 in tensor.shape) for tensor in tensors)
        if unknown or (anchor is not None and anchor.regions):
            return None
        state = hashlib.blake2b(digest_size=16)

        def add(*items: object) -> None:
            state.update("".join(f"{item!s};" for item in items).encode())

        add(self.name, [(b.name, b.dtype, b.size) for b, _ in self.outputs], sorted(self.alignments.items()))
        for tensor in tensors:
            add("next")
            if tensor is not None:
                add(tensor.kind, tensor.dtype, tensor.shape, tensor.lower, tensor.upper)
                add(tensor.buffer and (tensor.buffer.name, tensor.buffer.size))
                indices = tuple(index_symbol(f"axis{axis}", extent) for axis, extent in enumerate(tensor.shape))
                state.update(tensor.at(indices).digest)
        if anchor is not None:
            add(anchor.op, len(anchor.inputs), len(anchor.outputs))
        for name, value in (*(anchor.attributes if anchor is not None else {}).items(), *self.static.items()):
            add(name, value.tobytes() if isinstance(value, np.ndarray) else repr(value))
        for name, array in sorted(self.constants.items()):
            add(name, array.dtype, array.shape)
        return state.digest()

    def alignment(self, buffer: str) -> int:
        """The bytes, a power of two, of which the address of element 0 of a buffer is surely a multiple."""
        return self.alignments.get(buffer, 1)

    def full_outputs(self) -> Sequence[tuple[Buffer, Tensor]]:
        """The outputs defined over the inputs alone, the anchor's own definition composed in."""
        return self.outputs if self.inline is None else self.inline()

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All buffers, inputs first."""
        found = [tensor.buffer for tensor in self.inputs if tensor.buffer is not None]
        return (*found, *(buffer for buffer, _ in self.outputs))

    def constant(self, tensor: Tensor | None) -> np.ndarray | None:
        """The array of an operand that is a constant buffer as it is, else None."""
        if tensor is None or tensor.buffer is None:
            return None
        array = self.constants.get(tensor.buffer.name)
        return None if array is None else array.reshape([int(str(d)) for d in tensor.shape])

    def number(self, literal: Scalar) -> s.Number | None:
        """What a literal is in this region, None of what is no literal: for what is packed, not for the code."""
        if isinstance(literal, s.Varying):
            assert self.member is not None, f"{self.name} is no member of a group"
            return literal.values[self.member]
        return literal.value if isinstance(literal, Const) else None

    def elements(self, tensor: Tensor) -> np.ndarray | None:
        """The array of an operand that is a constant, the literal that one of a single element has become included."""
        if tensor.buffer is not None:
            return self.constant(tensor)
        value = tensor.at((0,) * tensor.rank)
        return np.full([1] * tensor.rank, value.value, tensor.dtype.numpy) if isinstance(value, Const) else None


@dataclass(frozen=True)
class Call:
    """A kernel applied to buffers, by name: the region's own, or workspaces and packed constants of the same result.

    `arguments` are in the order of the kernel's parameters; `sizes` give the kernel's size symbols.
    """

    kernel: Kernel
    arguments: tuple[str, ...]
    sizes: tuple[Dim, ...]


@dataclass(frozen=True)
class BindSymbol:
    """From here on the size `symbol` is the integer that a kernel before this wrote to a buffer."""

    symbol: str
    buffer: str
    element: int = 0


@dataclass(frozen=True)
class Repeated:
    """Calls made in turn for index = 0, 1, ... while index < trips; their sizes may name the index."""

    index: str
    trips: Dim
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Lowered:
    """The kernels of a region in order, the scratch memory between them, and constants in the form they want.

    `packed` maps a new buffer's name to a function that makes its array (run once, at compile time).
    """

    calls: tuple[Call | BindSymbol | Repeated, ...]
    workspaces: tuple[Buffer, ...] = ()
    packed: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)

    @property
    def kernel_calls(self) -> tuple[Call, ...]:
        """All calls of kernels, repeated ones once."""
        found: list[Call] = []
        for item in self.calls:
            found += item.calls if isinstance(item, Repeated) else [item] if isinstance(item, Call) else []
        return tuple(found)


Schedule: TypeAlias = Callable[[Region, Target], Lowered | None]
"""Makes the kernels of a region, or None where it does not apply and another schedule must."""


def anchor_tensor(shape: Sequence[Dim], like: Tensor) -> Tensor:
    """The anchor's result as an operand of its epilogue: its elements come from the schedule, not yet rounded."""

    def element(indices: Indices) -> Scalar:
        return converted(Element(like.dtype, 1, ANCHOR, indices))

    return Tensor(tuple(shape), like.dtype, element, "anchor", like.sources)
