"""How a model is divided between compiled code and Python.

Nodes that touch tensors of numbers alone form segments, as large as the order of the nodes allows; each other node is a
step of its own: an operator that Python runs, or control flow whose bodies are divided in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ...ir.errors import ModelError, OnnxcError
from ..functions import domain_of, opsets_of
from ..nodes import check_node, free_names, in_order, node_name, operator_name, schema_in
from ..weights import Weights
from .control import CONTROL
from .kinds import (
    NUMBERS,
    STEPS,
    TEXT,
    attributes_of,
    element,
    has_text_attribute,
    kind_of_type,
    operator_of,
    output_kinds,
)
from .operators import described, function_of
from .segment import Compile, Segment


class Step(Protocol):
    """A part of a plan: what it reads and writes, by name."""

    @property
    def name(self) -> str: ...
    @property
    def operator(self) -> str: ...
    @property
    def reads(self) -> tuple[str, ...]: ...
    @property
    def writes(self) -> tuple[str, ...]: ...
    def lines(self) -> list[str]:
        """The description, for people."""

    def run(self, values: Mapping[str, Any]) -> Sequence[Any]:
        """What it writes."""


@dataclass(frozen=True)
class Plan:
    """The steps of a graph in order; `constants` are those that steps or outputs read.

    `captures` are names of the graphs around this one.
    """

    graph: GraphProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kinds: tuple[str, ...]
    steps: tuple[Step, ...]
    constants: Mapping[str, np.ndarray]
    captures: tuple[str, ...]

    @property
    def host_steps(self) -> list[Step]:
        """The steps that Python runs, those inside bodies included."""
        found: list[Step] = []
        for step in self.steps:
            if not isinstance(step, Segment):
                found.append(step)
            if isinstance(step, HostStep):
                for plan in step.bodies.values():
                    found += plan.host_steps
        return found

    @property
    def whole(self) -> bool:
        """Whether one piece of code can do it all."""
        return len(self.steps) < 2 and not self.host_steps

    @property
    def segments(self) -> list[Segment]:
        """The compiled segments, those inside bodies included."""
        found: list[Segment] = []
        for step in self.steps:
            if isinstance(step, Segment):
                found.append(step)
            elif isinstance(step, HostStep):
                for plan in step.bodies.values():
                    found += plan.segments
        return found

    @cached_property
    def _dead(self) -> list[tuple[str, ...]]:
        """For each step the names that nobody reads behind it."""
        last = {name: index for index, step in enumerate(self.steps) for name in (*step.writes, *step.reads)}
        kept = {*self.outputs, *self.constants}
        return [
            tuple(name for name, index in last.items() if index == place and name not in kept)
            for place in range(len(self.steps))
        ]

    def run(self, inputs: Sequence[Any], outside: Mapping[str, Any]) -> list[Any]:
        """The outputs, for inputs in order and the values of the graphs around."""
        values = {name: outside[name] for name in self.captures}
        values |= self.constants
        values.update(zip(self.inputs, inputs, strict=True))
        for step, dead in zip(self.steps, self._dead, strict=True):
            values.update(zip(step.writes, step.run(values), strict=True))
            for name in dead:
                values.pop(name, None)
        return [values[name] for name in self.outputs]

    def lines(self, indent: str = "") -> Iterator[str]:
        """The plan as text."""
        for step in self.steps:
            yield from (indent + line for line in step.lines())
            for name, plan in step.bodies.items() if isinstance(step, HostStep) else ():
                yield f"{indent}  {name}({', '.join(plan.inputs)}) -> ({', '.join(plan.outputs)}):"
                yield from plan.lines(indent + "    ")


@dataclass(frozen=True)
class HostStep:
    """A node that Python runs; `bodies` are the plans of its graphs, `run_node` gets its operands and the values there
    are, and gives its outputs."""

    node: NodeProto
    reads: tuple[str, ...]
    run_node: Callable[[Sequence[Any], Mapping[str, Any]], Sequence[Any]]
    bodies: Mapping[str, Plan] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def operator(self) -> str:
        return operator_name(self.node)

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(filter(None, self.node.output))

    def lines(self) -> list[str]:
        given, made = ", ".join(self.node.input), ", ".join(self.node.output)
        return [f'python   ({given}) -> ({made}): "{self.name}" ({self.operator})']

    def run(self, values: Mapping[str, Any]) -> Sequence[Any]:
        """What the node writes. Raises OnnxcError with the node's name where Python fails."""
        inputs = [values[name] if name else None for name in self.node.input]
        where = f'node "{self.name}" ({self.operator})'
        try:
            found = self.run_node(inputs, values)
            if len(found) < len(self.node.output):
                raise ValueError(f"it gives {len(found)} outputs, {len(self.node.output)} are read")
        except OnnxcError as error:
            operands = "" if self.bodies else f" on ({', '.join(map(described, inputs))})"
            raise type(error)(f"{where}{operands}: {error}") from error
        except Exception as error:  # whatever numpy or the reference has to say about these operands
            operands = ", ".join(map(described, inputs))
            raise OnnxcError(f"{where} on ({operands}): {error or type(error).__name__}") from error
        return [value for value, name in zip(found, self.node.output, strict=False) if name]


@dataclass
class _Scope:
    """What is known of the names of a graph and of those around it."""

    kinds: dict[str, str]
    constants: dict[str, TensorProto | np.ndarray]
    sizes: dict[str, tuple[int | None, ...]]

    def inner(self) -> _Scope:
        return _Scope(dict(self.kinds), dict(self.constants), dict(self.sizes))


@dataclass(frozen=True)
class Planner:
    """Divides the graphs of one model.

    `loops` are the names of those that Python has to repeat, None for all; before nodes named in `cuts` a segment ends:
    what they read has to be known when they are compiled.
    """

    model: ModelProto
    compile: Compile
    weights: Weights
    loops: frozenset[str] | None = frozenset()
    cuts: frozenset[str] = frozenset()

    def plan(self) -> Plan:
        """The plan of the model. Raises UnsupportedError where neither code nor Python can run a node."""
        kinds = [kind_of_type(value.type) for value in _inputs(self.model.graph)]
        return self._graph(self.model.graph, _Scope({}, {}, {}), kinds)

    @cached_property
    def _opsets(self) -> Mapping[str, int]:
        return opsets_of(self.model)

    def _graph(self, graph: GraphProto, outer: _Scope, kinds: Sequence[str]) -> Plan:
        scope = outer.inner()
        inputs = [value.name for value in _inputs(graph)]
        for name in inputs:
            scope.constants.pop(name, None)
        scope.kinds.update(zip(inputs, kinds, strict=True))
        for value in (*graph.input, *graph.value_info):
            scope.sizes[value.name] = _sizes(value.type)
        for tensor in graph.initializer:
            scope.constants[tensor.name] = tensor
            scope.kinds[tensor.name] = TEXT if tensor.data_type == TensorProto.STRING else NUMBERS
        for sparse in graph.sparse_initializer:
            scope.constants[sparse.values.name] = numpy_helper.from_array(self.weights.dense(sparse))
            scope.kinds[sparse.values.name] = NUMBERS
        own = set(inputs)
        nodes: list[tuple[NodeProto, HostStep | None]] = []
        for index, node in in_order(graph.node):
            for part in _named(node, index):
                if (constant := _constant(part)) is not None:
                    scope.constants[part.output[0]] = constant
                    text = isinstance(constant, np.ndarray) or constant.data_type == TensorProto.STRING
                    scope.kinds[part.output[0]] = TEXT if text else NUMBERS
                else:
                    nodes.append((part, self._located_step(part, scope)))
                    own.update(part.output)
                    for name in part.output:
                        scope.constants.pop(name, None)
        outputs = tuple(value.name for value in graph.output)
        steps = self._steps(_alive(nodes, outputs), scope, outputs)
        read = {name for step in steps for name in step.reads} | set(outputs)
        constants = {name: self._array(scope.constants[name]) for name in sorted(read & set(scope.constants))}
        captures = tuple(sorted(read - own - set(constants)))
        found = [_defined(name, scope) for name in outputs]
        return Plan(graph, tuple(inputs), outputs, tuple(found), tuple(steps), constants, captures)

    def _located_step(self, node: NodeProto, scope: _Scope) -> HostStep | None:
        where = f'node "{node.name}" ({operator_name(node)})'
        try:
            return self._host_step(node, scope)
        except OnnxcError as error:
            raise type(error)(f"{where}: {error}") from error
        except RecursionError:
            raise
        except Exception as error:  # a malformed model reached code that trusts its input
            raise ModelError(f"{where} is malformed ({type(error).__name__}: {error})") from error

    def _array(self, constant: TensorProto | np.ndarray) -> np.ndarray:
        """A constant as steps read it; it cannot be written."""
        array = (constant if isinstance(constant, np.ndarray) else self.weights.array(constant)).view()
        array.flags.writeable = False
        return array

    def _host_step(self, node: NodeProto, scope: _Scope) -> HostStep | None:
        """The step for a node that Python has to run, None for others; notes the kinds of what it gives."""
        operator = operator_of(node)
        for name in free_names(node):
            _defined(name, scope)
        kinds = [scope.kinds[name] if name else None for name in node.input]
        bodies = {
            attribute.name: self._graph(attribute.g, scope, _body_kinds(node, attribute.g, kinds))
            for attribute in node.attribute
            if attribute.HasField("g")
        }
        opset = self._opsets.get(node.domain, 1)
        order = ("then_branch", "else_branch") if operator == "If" else tuple(bodies)
        given = output_kinds(node, opset, kinds, [bodies[name].kinds for name in order])
        scope.kinds.update(zip(node.output, given, strict=False))
        touched = [*given, *(scope.kinds[name] for name in free_names(node))]
        inside = any(not plan.whole for plan in bodies.values())
        repeated = operator in ("Loop", "Scan") if self.loops is None else node.name in self.loops
        named = operator in STEPS or repeated or has_text_attribute(attributes_of(node))
        if not (inside or named or any(kind != NUMBERS for kind in touched)):
            return None
        schema = schema_in(node, self._opsets)
        if schema is not None:
            check_node(node, node.attribute, schema)
        captured = (name for plan in bodies.values() for name in plan.captures)
        reads = tuple(dict.fromkeys([*filter(None, node.input), *captured]))
        if bodies:
            return HostStep(node, reads, CONTROL[operator](node, bodies), bodies)
        function = function_of(node, self._opsets)
        return HostStep(node, reads, lambda inputs, values: function(inputs))

    def _steps(
        self, nodes: Sequence[tuple[NodeProto, HostStep | None]], scope: _Scope, outputs: Sequence[str]
    ) -> list[Step]:
        """The nodes as steps: all that can be compiled before the next step of Python is one segment."""
        waiting = [(node, step, free_names(node)) for node, step in nodes]
        missing = {name for node, _ in nodes for name in node.output if name}
        steps: list[Step] = []
        while waiting:
            for compiled in (True, False):
                taken, left = [], []
                made: set[str] = set()
                for part in waiting:
                    early = part[0].name in self.cuts and made & part[2]
                    if (part[1] is None) == compiled and not missing & part[2] and not early:
                        taken.append(part)
                        missing.difference_update(part[0].output)
                        made.update(filter(None, part[0].output))
                    else:
                        left.append(part)
                waiting = left
                if compiled and taken:
                    later = set(outputs).union(*(reads for _, _, reads in waiting))
                    steps.append(self._segment([node for node, _, _ in taken], scope, later))
                else:
                    steps += [step for _, step, _ in taken if step is not None]
        return steps

    def _segment(self, nodes: Sequence[NodeProto], scope: _Scope, later: set[str]) -> Segment:
        """The nodes as a segment; `later` are the names that are read behind it."""
        made = [name for node in nodes for name in node.output if name]
        writes = [name for name in made if name in later]
        read = dict.fromkeys(name for node in nodes for name in sorted(free_names(node)) if name not in made)
        constants = {name: _tensor(scope.constants[name], name) for name in read if name in scope.constants}
        reads = [name for name in read if name not in constants]
        return Segment(self.model, nodes, constants, reads, writes, scope.sizes, self.compile)


def _defined(name: str, scope: _Scope) -> str:
    """The kind of what a name stands for. ModelError where it stands for nothing."""
    if name not in scope.kinds:
        raise ModelError(f'"{name}" is read, which no node, input or initializer before it defines; export it again')
    return scope.kinds[name]


def _inputs(graph: GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are no initializers."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def _sizes(type: onnx.TypeProto) -> tuple[int | None, ...]:
    dims = type.tensor_type.shape.dim if type.HasField("tensor_type") else ()
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def _alive(
    nodes: Sequence[tuple[NodeProto, HostStep | None]], outputs: Iterable[str]
) -> list[tuple[NodeProto, HostStep | None]]:
    """The nodes that the outputs need."""
    needed, found = set(outputs), []
    for node, step in reversed(nodes):
        if needed & set(node.output):
            needed |= free_names(node)
            found.append((node, step))
    return found[::-1]


def _body_kinds(node: NodeProto, graph: GraphProto, kinds: Sequence[str | None]) -> list[str]:
    """The kinds of a body's inputs, by those of its node's operands."""
    if node.op_type == "If":
        return []
    if node.op_type == "Loop":
        return [NUMBERS, NUMBERS, *(kind or NUMBERS for kind in kinds[2:])]
    if node.op_type == "SequenceMap":
        return [element(kind or NUMBERS) for kind in kinds]
    return [kind or NUMBERS for kind in kinds[-len(graph.input) :]]


def _named(node: NodeProto, index: int) -> list[NodeProto]:
    """The node with a name; a classifier whose labels are text as one that numbers them, and what names the numbers."""
    classifier = operator_of(node) in _CLASSIFIERS
    if node.name and not classifier and node.domain == domain_of(node.domain):
        return [node]
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name, copy.domain = node_name(node, index), domain_of(node.domain)
    labels = attributes_of(node).get("classlabels_strings") if classifier else None
    if not labels:
        return [copy]
    kept = [attribute for attribute in node.attribute if attribute.name != "classlabels_strings"]
    del copy.attribute[:]
    copy.attribute.extend(kept)
    name, numbers = f"classlabels_{_CLASSIFIERS[operator_of(node)]}", list(range(len(labels)))
    copy.attribute.append(onnx.helper.make_attribute(name, numbers))
    if not node.output[0]:
        return [copy]
    copy.output[0] = f"{node.output[0]}.number"
    naming = onnx.helper.make_node(
        "CategoryMapper", [copy.output[0]], [node.output[0]], f"{copy.name}.labels", domain="ai.onnx.ml",
        cats_int64s=numbers, cats_strings=labels,
    )  # fmt: skip
    return [copy, naming]


_CLASSIFIERS = {
    "ai.onnx.ml.LinearClassifier": "ints",
    "ai.onnx.ml.SVMClassifier": "ints",
    "ai.onnx.ml.TreeEnsembleClassifier": "int64s",
}
"""Classifiers, and how their labels are called that are numbers."""


def _constant(node: NodeProto) -> TensorProto | np.ndarray | None:
    """What a Constant node holds, text as an array; None for other nodes."""
    if operator_of(node) != "Constant":
        return None
    ((name, value),) = attributes_of(node).items()
    if name in ("value_string", "value_strings"):
        array = np.empty(len(value) if isinstance(value, list) else (), object)
        array[...] = value
        return array
    if isinstance(value, TensorProto):
        return value
    if name.startswith("value_"):
        dtype = np.float32 if name.startswith("value_float") else np.int64
        return numpy_helper.from_array(np.array(value, dtype), node.output[0])
    return None


def _tensor(constant: TensorProto | np.ndarray, name: str) -> TensorProto:
    """A constant of numbers under the name that nodes read it by."""
    assert isinstance(constant, TensorProto)
    if constant.name == name:
        return constant
    copy = TensorProto()
    copy.CopyFrom(constant)
    copy.name = name
    return copy
