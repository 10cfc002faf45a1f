"""How a node reads its operands, found by probing its definition with symbolic indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..ir import scalars as s
from ..ir.dims import Dim, Opaque, Quotient, as_symbol, atoms, product, symbol
from ..ir.graph import Node, TensorType, Value
from ..ir.infer import Inference
from ..ir.ops import REGISTRY
from ..ir.tensors import Indices, Tensor, flat_offset
from .nests import all_reductions, cost


def output_indices(shape: Sequence[Dim], stem: str = "i") -> Indices:
    """A symbol per axis; 0 where the extent is 1."""
    return tuple(0 if d == 1 else symbol(f"{stem}{a}", 0, d - 1) for a, d in enumerate(shape))


def probe_tensor(value: Value) -> Tensor:
    """A stand-in for a value whose elements show by which indices they were asked for."""

    def element(indices: Indices) -> s.Scalar:
        return s.Element(value.dtype, 1, value.name, indices)

    return Tensor(value.shape, value.dtype, element, "buffer")


def literal_tensor(value: Value, array: np.ndarray) -> Tensor:
    """A constant of one element as a literal of whatever reads it."""
    number = array.reshape(-1)[0].item()

    def element(indices: Indices) -> s.Scalar:
        return s.const(number, value.dtype)

    return Tensor(value.shape, value.dtype, element, "map")


@dataclass(frozen=True)
class Access:
    """What probing a node told.

    `kind` is "map" (no reduction), "rows" (reductions over whole axes of operands of shape `domain`, the axes with
    `rows` true being kept), "window" (other reductions), "heavy" (a contraction with schedules), or "opaque".
    """

    node: Node
    kind: str
    values: tuple[s.Scalar, ...] = ()
    domain: tuple[Dim, ...] = ()
    rows: tuple[bool, ...] = ()
    reads: dict[str, list[Indices]] = field(default_factory=dict)

    @cached_property
    def cost(self) -> int:
        """Scalar operations for one element of the first output."""
        return max((cost(value) for value in self.values), default=0)

    @cached_property
    def affine(self) -> bool:
        """Whether every operand is read at indices without divisions or run-time values, and without conditions."""
        indices = [dim for found in self.reads.values() for where in found for dim in where]
        plain = not any(isinstance(atom, Quotient | Opaque) for dim in indices for atom in atoms(dim))
        return plain and all(isinstance(value, s.Element) for value in self.values)

    def aligned(self, value: Value) -> bool:
        """Whether the element at i needs of `value` only the element at i (0 where its extent is 1)."""
        shape = self.node.outputs[0].shape
        own = output_indices(shape)
        skip = len(shape) - len(value.shape)
        if skip < 0:
            return False
        wanted = tuple(0 if d == 1 else i for i, d in zip(own[skip:], value.shape, strict=True))
        return all(found == wanted for found in self.reads.get(value.name, []))


class AccessAnalysis:
    """Probes nodes of one graph; `inference` must know the graph."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference

    def __call__(self, node: Node) -> Access:
        operator = REGISTRY.get(node.op)
        tensors = all(isinstance(v.type, TensorType) for v in (*node.operands, *node.outputs))
        if operator is None or operator.alone or node.regions or not tensors:
            return Access(node, "opaque")
        if operator.heavy:
            return Access(node, "heavy", domain=node.outputs[0].shape)
        probes = {value.name: probe_tensor(value) for value in node.operands}
        names = [value.name for value in node.outputs]
        found = self.inference.definition(
            node.op, node.inputs, node.attributes, node.regions, names, node.origin, operands=probes
        )[: len(node.outputs)]
        if any(not isinstance(t, Tensor) or t.kind == "opaque" for t in found):
            return Access(node, "opaque")
        values = tuple(t.at(output_indices(t.shape)) for t in found if isinstance(t, Tensor))
        reads: dict[str, list[Indices]] = {}
        seen: set[bytes] = set()
        for value in values:
            for part in s.walk(value, seen):
                if isinstance(part, s.Element):
                    reads.setdefault(part.tensor, []).append(part.indices)
        if not any(all_reductions(value) for value in values):
            return Access(node, "map", values, node.outputs[0].shape, (), reads)
        return self._reducing(node, values, reads)

    def _reducing(self, node: Node, values: tuple[s.Scalar, ...], reads: dict[str, list[Indices]]) -> Access:
        """Tells reductions over whole axes from those over windows."""
        shapes = {value.name: value.shape for value in node.operands}
        domain: tuple[Dim, ...] = ()
        for name in reads:
            if product(shapes[name]) != 1 and len(shapes[name]) >= len(domain) and _covers(shapes[name], domain):
                domain = shapes[name]
        rows = [True] * len(domain)
        for name, found in reads.items():
            if len(shapes[name]) != len(domain):
                if any(_is_reduced(dim) for where in found for dim in where):
                    return Access(node, "window", values, node.outputs[0].shape, (), reads)
                continue
            for where in found:
                for axis, dim in enumerate(where):
                    if not isinstance(dim, int) and as_symbol(dim) is None:
                        return Access(node, "window", values, node.outputs[0].shape, (), reads)
                    if _is_reduced(dim):
                        rows[axis] = False
        for value in values:
            for reduce in all_reductions(value):
                # Every reduced axis must be covered from 0 to its extent by one index of its own.
                if any(_is_reduced(symbol(name)) for name in reduce.free):
                    return Access(node, "window", values, node.outputs[0].shape, (), reads)
        reduced_extents = [d for d, row in zip(domain, rows, strict=True) if not row]
        for value in values:
            for reduce in all_reductions(value):
                if [e for _, e in reduce.ranges if e != 1] != [e for e in reduced_extents if e != 1]:
                    return Access(node, "window", values, node.outputs[0].shape, (), reads)
        return Access(node, "rows", values, domain, tuple(rows), reads)


def _is_reduced(dim: Dim) -> bool:
    return any(name.startswith("r") and "_" in name for name in s.free_symbols(dim))


def _covers(shape: Sequence[Dim], other: Sequence[Dim]) -> bool:
    return not other or len(shape) > len(other) or sum(d != 1 for d in shape) >= sum(d != 1 for d in other)


def view_of(value_of: Callable[[Indices], s.Scalar], shape: Sequence[Dim]) -> tuple[str, Dim] | None:
    """(buffer, offset) where the tensor is a contiguous piece of one buffer in row-major order, else None."""
    indices = output_indices(shape)
    value = value_of(indices)
    if not isinstance(value, s.Load) or value.predicate is not None:
        return None
    offset = value.offset - flat_offset(indices, shape)
    if s.free_symbols(offset) & {f"i{a}" for a in range(len(shape))}:
        return None
    if not isinstance(offset, int) and any(not hasattr(atom, "name") for atom in atoms(offset)):
        return None
    return value.buffer.name, offset
