"""ONNX -> graph: one meaning per operator, every value typed, weights as handles.

Nodes are taken one by one: functions are expanded (`functions`), older forms lifted (`lift`), attributes read and
checked (`nodes`), types computed by the operators' declarations (`ir.infer`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto
from onnx.defs import OpSchema

from ..ir.dtypes import BOOL, BY_ONNX, I64, of_numpy
from ..ir.errors import HostNeeded, LimitError, ModelError, OnnxcError, UnsupportedError, ValueNeeded
from ..ir.graph import Attribute, Graph, Names, Node, TensorType, Type, Value, constant_node
from ..ir.infer import Inference
from ..ir.ops import REGISTRY
from .calls import Body, Call
from .choices import check_choices
from .composites import COMPOSITES
from .dimensions import Symbols, input_types
from .functions import Function, Key, call_to_onnx, domain_of, local_functions, opsets_of, schema_function
from .gradient import GRADIENT, gradient
from .host.kinds import NUMBERS, kind_of_type
from .lift import lift
from .limits import check_node_count, check_types, most_nodes
from .nodes import (
    all_names,
    check_call,
    check_node,
    constant_array,
    declared_types,
    element_type,
    in_order,
    kind_of,
    name_of,
    names_read,
    node_name,
    operator_name,
    read_attribute,
    schema_in,
)  # fmt: skip
from .sequences import Item, ItemCall, is_text, only_values, present, refuse_text, resolved, without_sequences
from .weights import Weights, load_model


class TypeRules(Protocol):
    """What the importer needs of `ir.infer.Inference`."""

    def define(self, value: Value, array: np.ndarray) -> None:
        """Makes the content of a constant known."""

    @property
    def values(self) -> Mapping[str, Sequence[object]]:
        """The elements of values that are known, by name."""

    def outputs(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attributes: Mapping[str, Attribute],
        regions: Mapping[str, Graph] | None = None,
        output_names: Sequence[str] = ("out",),
        origin: Sequence[str] = (),
    ) -> tuple[Type, ...]:
        """The types of a node's outputs."""


@dataclass
class Scope:
    """The names of one ONNX graph or function body, and how its nodes are read.

    `names` gives the name in our graph for values that must have a certain one, `prefix` stands before all others of a
    function; `read` holds the names that are read at all; `arguments` are a function's attributes.
    """

    opsets: Mapping[str, int]
    read: frozenset[str]
    outer: Scope | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    origin: tuple[str, ...] = ()
    arguments: Mapping[str, AttributeProto] | None = None
    values: dict[str, Item] = field(default_factory=dict)
    declared: Mapping[str, int] = field(default_factory=dict)

    def find(self, name: str) -> Item:
        """What a name stands for here."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        raise ModelError(
            f'it reads "{name}", which no node, input or initializer before it defines; export the model again'
        )


class Importer:
    """Builds the graph of one model."""

    def __init__(self, model: ModelProto, weights: Weights, rules: TypeRules, operators: Iterable[str]) -> None:
        self._model = model
        self._weights = weights
        self._rules = rules
        self._operators = frozenset(operators)
        self._functions: Mapping[Key, Function] = local_functions(model)
        self._expanding: list[str] = []
        self._symbols = Symbols()
        self._names = Names()
        self._names.reserve(all_names(model.graph))
        self._defined: set[str] = set()
        self._values: dict[str, Value] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._nodes: list[Node] = []
        self._nodes_left = most_nodes(model)

    def graph(
        self, dims: Mapping[str, int] | None, shapes: Mapping[str, Sequence[int | None]] | None, smallest: int = 0
    ) -> Graph:
        """The model's graph, its inputs specialised as `input_types` tells."""
        proto = self._model.graph
        constants = {tensor.name for tensor in proto.initializer} | {t.values.name for t in proto.sparse_initializer}
        # An initializer that is an input too is a default value; it is taken as the constant of IR version 3.
        inputs = [value for value in proto.input if value.name not in constants]
        for value in inputs:
            if kind_of_type(value.type) != NUMBERS:
                raise HostNeeded(f'the input "{value.name}" is a {kind_of_type(value.type)}')
        types = input_types(inputs, self._symbols, dims, shapes, smallest)
        check_types(types)
        _refuse_twins([value.name for value in inputs], "inputs")
        _refuse_twins([value.name for value in proto.output], "outputs")
        scope = Scope(opsets_of(self._model), frozenset(), declared=declared_types(proto))
        values = tuple(Value(self._define(name), type) for name, type in types.items())
        scope.values.update(zip(types, values, strict=True))
        items = self._body(proto, scope)
        named = [self._renamed(*pair, ()) for pair in zip(items, (v.name for v in proto.output), strict=True)]
        outputs = only_values(named, proto)
        return Graph(name_of(proto, "graph"), values, outputs, tuple(self._nodes))

    # What lifts may do (`lift.Builder`).

    def constant(self, array: np.ndarray, stem: str, origin: tuple[str, ...] = ()) -> Value:
        """Adds a constant under a name of its own."""
        return self._constant(array, self._names.fresh(stem or "constant"), origin)

    def known(self, value: Value | None) -> np.ndarray | None:
        """The array of a value that is a constant."""
        return None if value is None else self._arrays.get(value.name)

    def settled(self, value: Value) -> bool:
        """Whether each element is known: a constant, or what the types of other values tell."""
        return value.name in self._arrays or value.name in self._rules.values

    def region(self, name: str, types: Sequence[Type], fill: Callable[[tuple[Value, ...]], Sequence[Value]]) -> Graph:
        """A region with inputs of its own names."""
        values = tuple(Value(self._names.fresh(f"{name}.in{i}"), type) for i, type in enumerate(types))
        with self._collecting() as nodes:
            outputs = tuple(fill(values))
        return Graph(name, values, outputs, tuple(nodes))

    def emit(self, call: Call) -> tuple[Value, ...]:
        """Adds the nodes for a call in its newest form: itself, or the body that its schema gives."""
        check_call(call)
        stem = next(filter(None, call.outputs), call.origin[0] if call.origin else "value")
        names = [name or self._names.fresh(f"{stem}.{call.op.lower()}") for name in call.outputs]
        refuse_text(call)
        if call.op not in self._operators:
            return self._expand_schema(replace(call, outputs=tuple(names)))
        regions = self._regions(call)
        wanted = (names[0], *call.outputs[1:])
        types = self._rules.outputs(call.op, call.inputs, call.attributes, regions, wanted)
        if len(types) < len(names):
            raise UnsupportedError(f"{call.op} gives {len(types)} outputs, but {len(names)} are read")
        check_types(dict(zip(names, types, strict=False)))
        values = tuple(map(Value, names, types))
        if any(map(is_text, values)):
            raise HostNeeded(f"{call.op} gives text")
        self._nodes.append(Node(call.op, call.inputs, values, call.attributes, regions, call.origin))
        self._values.update((value.name, value) for value in values)
        return values

    # Names and constants.

    def _define(self, name: str) -> str:
        """`name` for its first definition; another one where an inner graph defines it again."""
        if not isinstance(name, str):
            raise ModelError(f"the name {name!r} is no UTF-8 text; the file is damaged")
        if name in self._defined:
            return self._names.fresh(name)
        self._defined.add(name)
        return name

    def _constant(self, array: np.ndarray, name: str, origin: tuple[str, ...]) -> Value:
        node = constant_node(name, array, TensorType(of_numpy(array.dtype), tuple(map(int, array.shape))), origin)
        self._nodes.append(node)
        self._arrays[name] = array
        self._values[name] = node.output
        self._rules.define(node.output, array)
        return node.output

    @contextmanager
    def _collecting(self) -> Iterator[list[Node]]:
        """Nodes that are added meanwhile go to a list of their own."""
        outer, self._nodes = self._nodes, []
        try:
            yield self._nodes
        finally:
            self._nodes = outer

    # Graphs and nodes.

    def _body(self, proto: GraphProto, scope: Scope) -> tuple[Item, ...]:
        """Adds a graph's constants and nodes; what its outputs stand for."""
        scope.read = frozenset(names_read(proto.node)) | {value.name for value in proto.output}
        tensors = [(tensor.name, partial(self._weights.array, tensor)) for tensor in proto.initializer]
        tensors += [(t.values.name, partial(self._weights.dense, t)) for t in proto.sparse_initializer]
        _refuse_twins([name for name, _ in tensors], "initializers")
        for name, array in tensors:
            if name in scope.read:
                scope.values[name] = self._constant(array(), self._define(name), (name,))
        self._import(proto.node, scope)
        with _located("", "the graph's outputs"):
            return tuple(scope.find(value.name) for value in proto.output)

    def _import(self, nodes: Sequence[NodeProto], scope: Scope) -> None:
        for index, node in in_order(nodes):
            with _located(node_name(node, index)[:200], operator_name(node)[:200]):
                for name in filter(None, node.output):
                    if name in scope.values:
                        raise ModelError(
                            f'it defines "{name}", which an input or an initializer of the graph defines too'
                        )
                self._node(node, index, scope)

    def _node(self, node: NodeProto, index: int, scope: Scope) -> None:
        name = node_name(node, index)
        self._nodes_left -= 1
        check_node_count(self._nodes_left, node)
        origin = scope.origin or (f"{scope.prefix}{name}",)
        attributes = _resolved(node, scope)
        items = tuple(scope.find(text) if text else None for text in node.input)
        read = _outputs_read(node, scope)
        outputs = tuple(self._output_name(text, scope) if text else "" for text in read)
        found: tuple[Item, ...] | None
        function = self._functions.get((domain_of(node.domain), node.op_type, node.overload))
        if function is not None:
            given = {attribute.name: attribute for attribute in attributes}
            found = self._expand(function, items, outputs, given, f"{origin[0]}/", ())
        else:
            call = self._call(node, attributes, without_sequences(items), outputs, origin, scope)
            found = self._resolved(call, items, scope)
            if found is None:
                if call.op == "Constant":
                    self._constant(constant_array(call.attributes), outputs[0] or self._names.fresh(name), origin)
                else:
                    refuse_text(call)
                    lifted = lift(call, self)
                    if lifted is not None:
                        self.emit(lifted)
                found = tuple(self._values.get(output) for output in outputs)
        for text, item in zip(read, found, strict=False):
            if text:
                if isinstance(item, Value):
                    self._check_declared(text, item, scope)
                scope.values[text] = item

    def _resolved(self, call: Call, items: tuple[Item, ...], scope: Scope) -> tuple[Item, ...] | None:
        """What a node gives that makes or takes sequences and optionals, or that is an If whose condition is known:
        the branch that is not taken may not even fit the types; and gradients. None for all other nodes."""
        if call.op == GRADIENT:
            return gradient(call, self, scope.find, self._nodes, self._rules.values, self._expand_schema)
        if call.op != "If":
            body = call.graphs.get("body")
            inlined = None if body is None else partial(self._inlined, body, scope)
            return resolved(ItemCall(call, items, self, self._rules.values, inlined))
        value = call.input(0)
        condition = None if value is None else self._rules.values.get(value.name)
        if not condition or not isinstance(condition[0], bool | int):
            return None
        branch = call.graphs.get("then_branch" if condition[0] else "else_branch")
        if branch is None:
            raise ModelError("it lacks a branch")
        found = self._inlined(branch, scope, ())
        if len(found) != len(call.outputs):
            raise ModelError(f"the branch has {len(found)} outputs, its node {len(call.outputs)}")
        return tuple(self._renamed(*pair, call.origin) for pair in zip(found, call.outputs, strict=True))

    def _renamed(self, item: Item, name: str, origin: tuple[str, ...]) -> Item:
        if not isinstance(item, Value) or not name or item.name == name:
            return item
        return self.emit(Call("Identity", (item,), {}, (name,), origin=origin))[0]

    def _output_name(self, text: str, scope: Scope) -> str:
        if text in scope.names:
            return scope.names[text]
        return self._names.fresh(scope.prefix + text) if scope.prefix else self._define(text)

    def _call(
        self, node: NodeProto, attributes: Sequence[AttributeProto], inputs: tuple[Value | None, ...],
        outputs: tuple[str, ...], origin: tuple[str, ...], scope: Scope,
    ) -> Call:  # fmt: skip
        schema = schema_in(node, scope.opsets)
        if schema is not None:
            check_node(node, attributes, schema)
            check_choices(node.op_type, attributes)
        elif operator_name(node) not in COMPOSITES and (
            not domain_of(node.domain) or operator_name(node) not in self._operators
        ):
            raise UnsupportedError(
                "neither ONNX nor onnxc knows this operator, and the model brings no function for it; "
                "`onnxc ops` lists those there are: export the model without it"
            )
        graphs = {a.name: a.g for a in attributes if kind_of(a) == AttributeProto.GRAPH}
        plain: dict[str, Attribute] = {}
        for attribute in attributes:
            if attribute.name not in graphs:
                handle = f"{next(filter(None, outputs), origin[0])}.{attribute.name}"
                value = read_attribute(attribute, handle, self._weights, self._symbols)
                typed = None if value is None else element_type(node, attribute.name, value)
                if typed is not None:
                    plain[attribute.name] = typed
        bodies = {key: self._body_of(graph, scope) for key, graph in graphs.items()}
        version = schema.since_version if schema is not None else 1
        return Call(operator_name(node), inputs, plain, outputs, version, bodies, graphs, origin)

    def _check_declared(self, name: str, value: Value, scope: Scope) -> None:
        dtype = BY_ONNX.get(scope.declared.get(name, 0))
        if dtype is not None and isinstance(value.type, TensorType) and value.dtype != dtype:
            raise ModelError(
                f'"{name}" is declared as {dtype}, but the operator gives {value.dtype}; export the model again'
            )

    # Regions.

    def _body_of(self, proto: GraphProto, outer: Scope) -> Body:
        def make(types: Sequence[Type]) -> Graph:
            inner = _inner_scope(proto, outer, len(types))
            values = []
            for declared, type in zip(proto.input, types, strict=True):
                value = Value(self._output_name(declared.name, inner), _as_declared(declared, type))
                self._check_declared(declared.name, value, inner)
                inner.values[declared.name] = value
                values.append(value)
            with self._collecting() as nodes:
                outputs = only_values(self._body(proto, inner), proto)
            return Graph(name_of(proto, "body"), tuple(values), outputs, tuple(nodes))

        return make

    def _inlined(self, proto: GraphProto, outer: Scope, items: Sequence[Item]) -> tuple[Item, ...]:
        """Adds the nodes of an inner graph to those around it; what its outputs stand for."""
        inner = _inner_scope(proto, outer, len(items))
        inner.values.update(zip((value.name for value in proto.input), items, strict=True))
        return self._body(proto, inner)

    def _regions(self, call: Call) -> dict[str, Graph]:
        if not call.bodies:
            return {}
        types = [None if value is None else value.type for value in call.inputs]
        if call.op == "If":
            return {name: body(()) for name, body in call.bodies.items()}
        if call.op == "Loop":
            return {"body": self._loop_body(call.bodies["body"], _allpresent(types[2:]), call.origin)}
        if call.op == "Scan":
            return {"body": call.bodies["body"](_scan_types(call, _allpresent(types)))}
        raise UnsupportedError("only If, Loop and Scan may have graphs as attributes")

    def _loop_body(self, body: Body, state: list[Type], origin: tuple[str, ...]) -> Graph:
        """The body for a state that may change its shape from one iteration to the next: such sizes are symbols."""
        widened: set[tuple[int, int]] = set()
        while True:
            saved = copy.deepcopy(self._names), set(self._defined)
            region = body([TensorType(I64, ()), TensorType(BOOL, ()), *state])
            changed = False
            for position, value in enumerate(region.outputs[1 : len(state) + 1]):
                before, after = state[position], value.type
                if not isinstance(before, TensorType) and type(before) is type(after):
                    continue
                if (
                    not isinstance(before, TensorType)
                    or not isinstance(after, TensorType)
                    or before.dtype != after.dtype
                ):
                    raise ModelError(
                        f"the loop's state {position} enters an iteration as {before}, but leaves as {after}"
                    )
                if before.rank != after.rank:
                    # Named to the driver: no other form of the loop can be compiled.
                    reason = f"the loop's state {position} changes its rank from {before} to {after}"
                    raise HostNeeded(reason, origin)
                shape = list(before.shape)
                for axis, (old, new) in enumerate(zip(before.shape, after.shape, strict=True)):
                    if old != new and (position, axis) not in widened:
                        widened.add((position, axis))
                        shape[axis] = self._symbols.fresh(f"{region.inputs[position + 2].name}_{axis}")
                        changed = True
                state[position] = TensorType(before.dtype, tuple(shape))
            if not changed:
                return region
            self._names, self._defined = saved

    # Functions.

    def _expand_schema(self, call: Call) -> tuple[Value, ...]:
        node = call_to_onnx(call)
        function = schema_function(call, node)
        if function is None:
            raise UnsupportedError("onnxc does not compile this operator; `onnxc ops` lists those that it does")
        given = {attribute.name: attribute for attribute in node.attribute}
        found = self._expand(function, call.inputs, call.outputs, given, f"{call.outputs[0]}.", call.origin)
        return tuple(present(item, name) for item, name in zip(found, call.outputs, strict=True))

    def _expand(
        self, function: Function, inputs: tuple[Item, ...], outputs: tuple[str, ...],
        attributes: Mapping[str, AttributeProto], prefix: str, origin: tuple[str, ...],
    ) -> tuple[Item, ...]:  # fmt: skip
        """Adds the nodes of a function's body for the given operands; its outputs, under the given names."""
        proto, key = function.proto, f"{function.name}:{function.proto.overload}"
        if key in self._expanding:
            chain = " -> ".join([*self._expanding, key]).replace(":", "")
            raise ModelError(f"the function {function.name} calls itself: {chain}; ONNX has no recursion")
        if len(inputs) > len(proto.input) or len(outputs) > len(proto.output):
            raise ModelError(
                f"the function {function.name} has {len(proto.input)} inputs and {len(proto.output)} outputs, "
                f"the node gives {len(inputs)} and takes {len(outputs)}"
            )
        given = (*inputs, *[None] * (len(proto.input) - len(inputs)))
        names = {inner: name for inner, name in zip(proto.output, outputs, strict=False) if name}
        scope = Scope(
            function.opsets, frozenset(names_read(proto.node)) | frozenset(names), None, names, prefix, origin,
            {**function.defaults, **attributes}, dict(zip(proto.input, given, strict=True)),
        )  # fmt: skip
        self._expanding.append(key)
        self._import(proto.node, scope)
        self._expanding.pop()
        pairs = zip(proto.output, outputs, strict=False)
        return tuple(self._renamed(scope.find(inner), name, origin or (prefix.rstrip("/"),)) for inner, name in pairs)


@contextmanager
def _located(name: str, op: str) -> Iterator[None]:
    """Puts node and operator in front of errors; faults that no check has met become ModelErrors."""
    where = f'node "{name}" ({op})' if name else op
    try:
        yield
    except OnnxcError as error:
        located = type(error)(f"{where}: {error}")
        if isinstance(located, ValueNeeded) and isinstance(error, ValueNeeded):
            located.nodes = error.nodes or (name,)
        raise located from error
    except RecursionError:
        raise
    except Exception as error:  # a malformed model reached code that trusts its input
        raise ModelError(
            f"{where} is malformed ({type(error).__name__}: {error}); onnx.checker may tell more"
        ) from error


def _inner_scope(proto: GraphProto, outer: Scope, given: int) -> Scope:
    """The scope of a graph inside another one, for so many inputs."""
    if given != len(proto.input):
        raise ModelError(f'the graph "{proto.name}" has {len(proto.input)} inputs, its node gives {given}')
    _refuse_twins([value.name for value in proto.input], "inputs")
    inner = Scope(outer.opsets, frozenset(), outer, prefix=outer.prefix, origin=outer.origin)
    inner.arguments, inner.declared = outer.arguments, declared_types(proto)
    return inner


def _allpresent(types: Sequence[Type | None]) -> list[Type]:
    if any(type is None for type in types):
        raise ModelError("a state or sequence operand is absent")
    return [type for type in types if type is not None]


def _scan_types(call: Call, types: list[Type]) -> list[Type]:
    """States as they are, sequences without the axis that is scanned."""
    scans = call.integer("num_scan_inputs", 0)
    states = len(types) - scans
    axes = call.attributes.get("scan_input_axes", ())
    result = types[:states]
    for position, type in enumerate(types[states:]):
        axis = axes[position] if isinstance(axes, tuple) and axes else 0
        if not isinstance(type, TensorType) or not isinstance(axis, int) or not -type.rank <= axis < type.rank:
            raise ModelError(f"sequence {position} of type {type} has no axis {axis!r}")
        shape = list(type.shape)
        del shape[axis]
        result.append(TensorType(type.dtype, tuple(shape)))
    return result


def _as_declared(declared: ValueInfoProto, type: Type) -> Type:
    """Iteration number and condition of a loop may be declared with one element instead of as scalars."""
    dims = declared.type.tensor_type.shape.dim
    if isinstance(type, TensorType) and type.dtype in (I64, BOOL) and type.rank == 0 and len(dims) == 1:
        return TensorType(type.dtype, (1,))
    return type


def _resolved(node: NodeProto, scope: Scope) -> list[AttributeProto]:
    """The node's attributes, those that refer to an attribute of the function replaced by it."""
    result = []
    names: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in names:
            raise ModelError(f'it has the attribute "{attribute.name}" twice')
        names.add(attribute.name)
        if not attribute.ref_attr_name:
            result.append(attribute)
        elif scope.arguments is None:
            raise ModelError(f'its attribute "{attribute.name}" refers to a function\'s, but it is in no function')
        elif attribute.ref_attr_name in scope.arguments:
            found = AttributeProto()
            found.CopyFrom(scope.arguments[attribute.ref_attr_name])
            found.name = attribute.name
            result.append(found)
    return result


def _outputs_read(node: NodeProto, scope: Scope) -> list[str]:
    """The outputs' names, "" for those that nobody reads; trailing ones are dropped unless their number counts."""
    read = [text if text in scope.read else "" for text in node.output]
    schema = schema_in(node, scope.opsets)
    if schema is not None and schema.outputs and schema.outputs[-1].option != OpSchema.FormalParameterOption.Variadic:
        while len(read) > max(schema.min_output, 1) and not read[-1]:
            read.pop()
    return read


def _refuse_twins(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        twin = next(name for index, name in enumerate(names) if name in names[:index])
        raise ModelError(f'two {what} of a graph have the name "{twin}"; export the model again')


def import_model(
    model: str | os.PathLike[str] | bytes | ModelProto,
    *,
    dims: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    folder: str | os.PathLike[str] | None = None,
    smallest: int = 0,
    max_memory: int | None = None,
) -> Graph:
    """The graph of an ONNX model, given as a path, as the file's bytes, or parsed.

    `dims` gives numbers to symbolic dimensions by name, `shapes` shapes to inputs (None leaves an axis as it is), and
    the axes that stay symbols of their own are taken to be `smallest` or larger; `folder` holds external data
    where it does not lie beside the model. The graph's constants are views of the file: they are read-only, may be
    unaligned, and may be mapped into memory (so the file must not change while the graph is in use).

    Raises ModelError for a broken model, UnsupportedError for what onnxc cannot compile, ShapeError where `dims`,
    `shapes` or operands contradict each other; the message names the file, the node and its operator.
    """
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else "the model"
    try:
        proto, weights = load_model(model, folder, max_memory)
        return Importer(proto, weights, Inference(probing=True), REGISTRY).graph(dims, shapes, smallest)
    except OnnxcError as error:
        raise type(error)(f"{name}: {error}") from error
    except RecursionError as error:
        raise LimitError(f"{name}: graphs are nested too deeply") from error
    except MemoryError as error:
        raise LimitError(f"{name}: a tensor does not fit in memory") from error
