"""The graph language: immutable SSA over tensors.

Operators keep their ONNX names and the meaning of the newest opset; an operator of another domain is written with its
domain in front (`com.microsoft.FusedMatMul`). A value is a name with a type. Passes build new graphs; nothing here is
changed in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np

from .atoms import lazy
from .dims import Dim, Symbol, substitute, symbols
from .dtypes import DType


@dataclass(frozen=True)
class TensorType:
    """Element type and shape; every dimension is an int or a symbolic expression."""

    dtype: DType
    shape: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def static(self) -> bool:
        """Whether every dimension is a number."""
        return all(isinstance(dim, int) for dim in self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class SequenceType:
    """A list of tensors of one type."""

    element: Type

    def __str__(self) -> str:
        return f"seq({self.element})"


@dataclass(frozen=True)
class OptionalType:
    """A value that may be absent."""

    element: Type

    def __str__(self) -> str:
        return f"optional({self.element})"


Type: TypeAlias = TensorType | SequenceType | OptionalType


@dataclass(frozen=True)
class Value:
    """An SSA value: a name that is unique within its graph and the regions around it, and a type."""

    name: str
    type: Type

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return f"%{self.name}: {self.type}"

    @property
    def tensor(self) -> TensorType:
        """The type, which must be a tensor's."""
        assert isinstance(self.type, TensorType), f"%{self.name} is a {self.type}, not a tensor"
        return self.type

    @property
    def dtype(self) -> DType:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.tensor.shape


@dataclass(frozen=True, eq=False)
class Constant:
    """A handle on an array that the model holds; the array may be memory-mapped and is never copied into the IR."""

    name: str
    array: np.ndarray

    @cached_property
    def digest(self) -> str:
        """A hash of the bytes, dtype and shape; read once, on demand."""
        contiguous = np.ascontiguousarray(self.array)
        head = f"{self.array.dtype}{self.array.shape}".encode()
        text = hashlib.blake2b(head, digest_size=16)
        text.update(
            repr(contiguous.tolist()).encode() if contiguous.dtype == object else contiguous.reshape(-1).view("u1").data
        )
        return text.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return NotImplemented
        mine, theirs = (
            (self.name, self.array.shape, self.array.dtype),
            (other.name, other.array.shape, other.array.dtype),
        )
        return self is other or (mine == theirs and (self.array is other.array or self.digest == other.digest))

    def __hash__(self) -> int:
        return hash(self.name)


Attribute: TypeAlias = "int | float | str | bytes | Dim | DType | Constant | Symbol | tuple[Attribute, ...]"


def _handles(attribute: Attribute) -> Iterator[Constant]:
    if isinstance(attribute, Constant):
        yield attribute
    elif isinstance(attribute, tuple):
        for item in attribute:
            yield from _handles(item)


@dataclass(frozen=True)
class Node:
    """One operator applied to values; absent optional inputs are None.

    `regions` hold the bodies of control flow and of fused groups; a region may use values of the graphs around it.
    `origin` names the ONNX nodes that this node came from; `remark` says what a pass left undone, and why.
    """

    op: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    regions: Mapping[str, Graph] = field(default_factory=dict)
    origin: tuple[str, ...] = ()
    remark: str = field(default="", compare=False)

    def __hash__(self) -> int:
        return hash((self.op, self.outputs))

    @property
    def output(self) -> Value:
        """The only output."""
        assert len(self.outputs) == 1, f"{self.op} has {len(self.outputs)} outputs"
        return self.outputs[0]

    @lazy
    def operands(self) -> tuple[Value, ...]:
        """The inputs that are present."""
        return tuple([value for value in self.inputs if value is not None])

    def with_inputs(self, mapping: Mapping[Value, Value]) -> Node:
        """This node reading `mapping[v]` in place of each input v, in its regions too."""
        if not self.regions and mapping.keys().isdisjoint(self.operands):
            return self
        inputs = tuple(None if value is None else mapping.get(value, value) for value in self.inputs)
        regions = {name: region.with_captures(mapping) for name, region in self.regions.items()}
        return replace(self, inputs=inputs, regions=regions)

    def captures(self) -> tuple[Value, ...]:
        """Values of the graphs around that the regions use and that are not listed as inputs."""
        found: dict[Value, None] = {}
        for region in self.regions.values():
            found.update(dict.fromkeys(region.captures()))
        return tuple(value for value in found if value not in self.operands)

    @lazy
    def reads(self) -> tuple[Value, ...]:
        """Every value that must exist before this node can run."""
        return self.operands + self.captures() if self.regions else self.operands

    @property
    def where(self) -> str:
        """For messages: the operator with the ONNX nodes it came from."""
        names = ", ".join(f'"{name}"' for name in self.origin[:4])
        return f"{self.op} ({names})" if names else self.op


@dataclass(frozen=True)
class Graph:
    """Nodes in an order in which every value is defined before it is used."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        from .text import print_graph

        return print_graph(self)

    def __hash__(self) -> int:
        return hash((self.name, self.inputs, self.outputs, len(self.nodes)))

    @cached_property
    def producers(self) -> Mapping[Value, Node]:
        """The node that defines each value."""
        return {value: node for node in self.nodes for value in node.outputs}

    @cached_property
    def users(self) -> Mapping[Value, tuple[Node, ...]]:
        """The nodes of this graph that read each value, once each; graph outputs are not counted."""
        found: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.reads):
                found.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in found.items()}

    def captures(self) -> tuple[Value, ...]:
        """Values used here that are defined outside, for a region."""
        return self._captures

    @lazy
    def _captures(self) -> tuple[Value, ...]:
        defined = set(self.inputs)
        found: dict[Value, None] = {}
        for node in self.nodes:
            found.update(dict.fromkeys(value for value in node.reads if value not in defined))
            defined.update(node.outputs)
        found.update(dict.fromkeys(value for value in self.outputs if value not in defined))
        return tuple(found)

    def with_captures(self, mapping: Mapping[Value, Value]) -> Graph:
        """This region using `mapping[v]` in place of each outer value v."""
        nodes = tuple(node.with_inputs(mapping) for node in self.nodes)
        return replace(self, nodes=nodes, outputs=tuple(mapping.get(value, value) for value in self.outputs))

    def walk(self) -> Iterator[Node]:
        """All nodes, those inside regions included."""
        for node in self.nodes:
            yield node
            for region in node.regions.values():
                yield from region.walk()

    @cached_property
    def constants(self) -> Mapping[str, Constant]:
        """Handles of all constants by name, those inside regions included."""
        found: dict[str, Constant] = {}
        for node in self.walk():
            for attribute in node.attributes.values():
                found.update((handle.name, handle) for handle in _handles(attribute))
        return found

    def constant(self, value: Value | None) -> np.ndarray | None:
        """The array of a value that a Constant node of this graph defines, else None."""
        node = self.producers.get(value) if value is not None else None
        if node is None or node.op != "Constant":
            return None
        handle = node.attributes["value"]
        assert isinstance(handle, Constant)
        return handle.array

    def symbols(self) -> tuple[Symbol, ...]:
        """The symbols in the shapes of the inputs, in order of appearance."""
        found: dict[Symbol, None] = {}
        for value in self.inputs:
            if isinstance(value.type, TensorType):
                for dim in value.type.shape:
                    found.update(dict.fromkeys(symbols(dim)))
        return tuple(found)


def constant_node(name: str, array: np.ndarray, type: TensorType, origin: tuple[str, ...] = ()) -> Node:
    """A node that defines %name as the given array."""
    return Node("Constant", (), (Value(name, type),), {"value": Constant(name, array)}, origin=origin)


def unite(*origins: Iterable[str]) -> tuple[str, ...]:
    """The distinct origins of several nodes, in order."""
    return tuple(dict.fromkeys(name for origin in origins for name in origin))


def substitute_type(type: Type, values: Mapping[str, Dim]) -> Type:
    """`type` with the symbols of its shape replaced."""
    if isinstance(type, TensorType):
        return TensorType(type.dtype, tuple(substitute(dim, values) for dim in type.shape))
    return replace(type, element=substitute_type(type.element, values))


class Names:
    """Makes names that are unique in a graph and in all its regions."""

    def __init__(self, graph: Graph | None = None) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}
        if graph is not None:
            self.reserve(value.name for value in graph.inputs)
            for node in graph.walk():
                self.reserve(value.name for value in node.outputs)
                for region in node.regions.values():
                    self.reserve(value.name for value in region.inputs)

    def reserve(self, names: Iterable[str]) -> None:
        self._taken.update(names)

    def fresh(self, stem: str) -> str:
        """`stem` itself if it is free, else with the least number behind it that makes it so."""
        name, number = stem, self._next.get(stem, 0)
        while name in self._taken:
            number += 1
            name = f"{stem}.{number}"
        self._next[stem] = number
        self._taken.add(name)
        return name
