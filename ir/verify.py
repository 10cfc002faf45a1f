"""The rules that every graph keeps, checked: SSA, agreement of types, constants, attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from .dims import Dim, Sum, Symbol, bounds
from .dtypes import DType, of_numpy
from .errors import VerifierError
from .graph import Attribute, Constant, Graph, Node, OptionalType, SequenceType, TensorType, Type, Value

TypeRule = Callable[[Node], Sequence[Type]]
"""What infers the types of a node's outputs from its inputs and attributes."""
_SCALARS = (int, float, str, bytes, Sum, DType, Constant, Symbol, TensorType, SequenceType, OptionalType)


def verify_graph(graph: Graph, outer: Iterable[Value] = (), check_types: TypeRule | None = None) -> None:
    """Raises VerifierError, which names the graph, the node and the fault, where `graph` breaks a rule:

    - a value is defined once, before its use, and read with the type of its definition;
    - no name is defined twice in a graph, its regions and the graphs around it (two regions may share names);
    - a graph output is defined, in the graph or around it;
    - a Constant node holds an array of the type of its output; a handle's name stands for one array;
    - attributes are of the kinds that the language has, sizes are not negative.

    `outer` are the values of the graphs around a region. With `check_types`, the types that it infers must not
    contradict those of the outputs: other kind, element type or rank, or sizes that can never be equal.
    """
    visible = {value.name: value for value in outer}
    _Verifier(check_types).graph(graph, visible, dict.fromkeys(visible, "a graph around"))


class _Verifier:
    def __init__(self, check_types: TypeRule | None) -> None:
        self._check_types = check_types
        self._constants: dict[str, Constant] = {}

    def graph(self, graph: Graph, outer: Mapping[str, Value], around: Mapping[str, Node | str]) -> None:
        """`outer` are the values around that may be read here; `around` says who defines each name there, if later."""
        visible = dict(outer)
        definers: dict[str, Node | str] = {**around, **{value.name: "an input" for value in graph.inputs}}
        for node in graph.nodes:
            definers.update((value.name, node) for value in node.outputs)
        for value in graph.inputs:
            self._define(value, visible, around, f"@{graph.name}: input")
        for node in graph.nodes:
            where = _At(graph, node)
            for value in node.operands:
                self._read(value, visible, definers, where)
            for name, attribute in node.attributes.items():
                self._attribute(attribute, where, name)
            for region in node.regions.values():
                self.graph(region, visible, definers)
            for value in node.outputs:
                self._define(value, visible, around, where)
            if node.op == "Constant":
                _check_constant(node, where)
            if self._check_types is not None:
                _compare(node, self._check_types(node), where)
        for value in graph.outputs:
            self._read(value, visible, definers, f"@{graph.name}: output")

    def _define(self, value: Value, visible: dict[str, Value], around: Mapping[str, object], where: object) -> None:
        if value.name in visible or value.name in around:
            _fail(where, f"%{value.name} is already defined{' in a graph around' if value.name in around else ''}")
        visible[value.name] = value
        if not _is_plain(value.type):
            _check_type(value.type, f"{where}: %{value.name}")

    def _read(
        self, value: Value, visible: Mapping[str, Value], definers: Mapping[str, Node | str], where: object
    ) -> None:
        found = visible.get(value.name)
        if found is value:
            return
        if found is None:
            definer = definers.get(value.name)
            definer = definer.where if isinstance(definer, Node) else definer
            _fail(where, f"%{value.name} is " + (f"used before {definer} defines it" if definer else "not defined"))
        if found.type != value.type:
            _fail(where, f"%{value.name} is read as {value.type} but defined as {found.type}")

    def _attribute(self, attribute: Attribute, where: object, name: str) -> None:
        if attribute.__class__ in (int, float, str):
            return
        if isinstance(attribute, tuple):
            for item in attribute:
                self._attribute(item, where, name)
        elif not isinstance(attribute, _SCALARS):
            kind = attribute.__class__.__name__
            _fail(f"{where}: attribute {name}", f"{attribute!r} is a {kind}, which the graph language does not have")
        elif isinstance(attribute, Constant) and self._constants.setdefault(attribute.name, attribute) != attribute:
            _fail(f"{where}: attribute {name}", f'the name @"{attribute.name}" stands for two different arrays')


@dataclass(frozen=True)
class _At:
    """A node as messages name it: spelt only where there is one."""

    graph: Graph
    node: Node

    def __str__(self) -> str:
        first = f", which defines %{self.node.outputs[0].name}" if self.node.outputs else ""
        return f"@{self.graph.name}: {self.node.where}{first}"


def _is_plain(type: Type) -> bool:
    """Whether a type is a tensor's with known sizes, as most are."""
    return isinstance(type, TensorType) and all(isinstance(dim, int) and dim >= 0 for dim in type.shape)


def _check_type(type: Type, where: str) -> None:
    if not isinstance(type, TensorType):
        _check_type(type.element, where)
        return
    for dim in type.shape:
        if not isinstance(dim, int | Sum):
            _fail(where, f"a size of {type} is a {dim.__class__.__name__}, no dimension")
        if isinstance(dim, int) and dim < 0:
            _fail(where, f"a size of {type} is negative")


def _check_constant(node: Node, where: object) -> None:
    handle = node.attributes.get("value")
    if not isinstance(handle, Constant) or node.inputs or len(node.outputs) != 1:
        _fail(where, "a Constant has no inputs, one output and an array as its attribute `value`")
    try:
        found = TensorType(of_numpy(handle.array.dtype), handle.array.shape)
    except TypeError as error:
        _fail(where, str(error))
    if found != node.output.type:
        _fail(where, f'the array @"{handle.name}" is {found}, the value {node.output.type}')


def _compare(node: Node, inferred: Sequence[Type], where: object) -> None:
    if len(inferred) != len(node.outputs):
        _fail(where, f"{len(inferred)} types inferred for {len(node.outputs)} outputs")
    for value, type in zip(node.outputs, inferred, strict=True):
        reason = _contradiction(type, value.type)
        if reason is not None:
            _fail(where, f"%{value.name} is recorded as {value.type} but inferred as {type}: {reason}")


def _contradiction(a: Type, b: Type) -> str | None:
    """Why no value can have both types, or None."""
    if a.__class__ is not b.__class__:
        return "another kind of type"
    if not isinstance(a, TensorType) or not isinstance(b, TensorType):
        return _contradiction(a.element, b.element)  # type: ignore[union-attr]
    if a.dtype != b.dtype:
        return "another element type"
    if a.rank != b.rank:
        return "another rank"
    for axis, (left, right) in enumerate(zip(a.shape, b.shape, strict=True)):
        if _never_equal(left, right):
            return f"axis {axis} cannot be both {left} and {right}"
    return None


def _never_equal(left: Dim, right: Dim) -> bool:
    low, high = bounds(left - right)
    return (low is not None and low > 0) or (high is not None and high < 0)


def _fail(where: object, fault: str) -> NoReturn:
    raise VerifierError(f"{where}: {fault}")
