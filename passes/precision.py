"""Narrow precision: tensors lie in memory as f16 or bf16, kernels compute in f32 and sum in f32.

The pass runs when kernels have been formed, as only what lies between two of them has a form in memory. A group widens
what it reads and rounds what it stores, once; products are formed of narrow operands, as `passes.narrowing` decides.
Inputs, outputs and states of control flow keep the types that the model declares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ir.dtypes import BF16, BY_NAME, F16, F32, DType
from ..ir.errors import OnnxcError
from ..ir.graph import Constant, Graph, Names, Node, TensorType, Value
from ..ir.ops import REGISTRY
from .narrowing import Facts, Scope, is_control, is_f32, moves, result_types
from .pipeline import Pass, register


@register
@dataclass(frozen=True)
class Precision(Pass):
    """Stores f32 tensors as `to`, f16 or bf16; constants that are no factors of products from `large` elements on.

    `sums` "wide" leaves sums that are no factors of products in f32.
    """

    name = "precision"
    to: str = "f16"
    large: int = 4096
    sums: str = "narrow"

    def run(self, graph: Graph) -> Graph:
        dtype = BY_NAME.get(self.to)
        if dtype not in (F16, BF16):
            raise OnnxcError(f"precision{{to={self.to}}}: tensors can be stored as f16 or bf16")
        if self.sums not in ("narrow", "wide"):
            raise OnnxcError(f"precision{{sums={self.sums}}}: sums can be narrow or wide")
        return _Rewrite(Scope(graph, Facts(dtype, self.large, self.sums == "wide")), Names(graph)).run()


class _Rewrite:
    """Writes one graph, or one body of control flow, with the types that its scope decides."""

    def __init__(self, scope: Scope, names: Names, parent: _Rewrite | None = None) -> None:
        self.scope, self.names, self.parent = scope, names, parent
        self.narrow = scope.facts.dtype
        self.nodes: list[Node] = []
        self.forms: dict[tuple[str, DType], Value] = {}
        self.origins: dict[str, tuple[str, ...]] = {}

    def run(self) -> Graph:
        graph = self.scope.graph
        for value in graph.inputs:
            self._made(value, ())
        for node in graph.nodes:
            self._node(node)
        outputs = tuple(self.read(value, F32) for value in graph.outputs)
        used = {value for node in self.nodes for value in node.reads} | set(outputs)
        nodes = tuple(node for node in self.nodes if node.op != "Constant" or node.output in used)
        unchanged = len(nodes) == len(graph.nodes) and all(a is b for a, b in zip(nodes, graph.nodes, strict=True))
        return graph if unchanged and outputs == graph.outputs else replace(graph, nodes=nodes, outputs=outputs)

    # Values.

    def stored(self, value: Value) -> DType:
        """The type that a value of the graph as it was has in memory now."""
        return self.narrow if is_f32(value) and self.scope.is_narrow(value.name) else value.dtype

    def form(self, value: Value, dtype: DType) -> Value | None:
        """The value as that type where there is one; a constant is there in every type."""
        found = self.forms.get((value.name, dtype))
        if found is None and value.name in self.scope.constants:
            return self._constant(value, dtype)
        return found if found is not None or self.parent is None else self.parent.form(value, dtype)

    def read(self, value: Value, dtype: DType) -> Value:
        """The f32 value `value` as that type, converted by a kernel where it must be; other values as they are."""
        if not is_f32(value):
            return value
        return self.form(value, dtype) or self._convert(value, dtype)

    def typed(self, value: Value, dtype: DType, name: str = "") -> Value:
        return Value(name or value.name, TensorType(dtype, value.shape))

    def fresh(self, value: Value, dtype: DType) -> Value:
        return self.typed(value, dtype, self.names.fresh(f"{value.name}.{dtype}"))

    def _convert(self, value: Value, dtype: DType, output: Value | None = None) -> Value:
        """A kernel that converts a value."""
        source = self.form(value, self.narrow if dtype == F32 else F32)
        assert source is not None
        output = output or self.fresh(value, dtype)
        origin = self._origin(value.name)
        inner = self.typed(output, dtype, self.names.fresh(f"{output.name}.inner"))
        body = Graph("body", (), (inner,), (Node("Cast", (source,), (inner,), {"to": dtype}, {}, origin),))
        self.nodes.append(Node("Fused", (source,), (output,), {"kind": "map"}, {"body": body}, origin))
        self.forms[value.name, dtype] = output
        return output

    def _origin(self, name: str) -> tuple[str, ...]:
        found = self.origins.get(name)
        return found if found is not None else self.parent._origin(name) if self.parent is not None else ()

    def _constant(self, value: Value, dtype: DType) -> Value:
        stored = self.stored(value) == dtype
        output = self.typed(value, dtype) if stored else self.fresh(value, dtype)
        array = narrowed(self.scope.constants[value.name], dtype)
        handle = Constant(f"{output.name}.{dtype}" if stored else output.name, array)
        self.nodes.append(Node("Constant", (), (output,), {"value": handle}, {}, self._origin(value.name)))
        self.forms[value.name, dtype] = output
        return output

    def _made(self, value: Value, origin: tuple[str, ...]) -> None:
        """A value that is stored as f32 here, and a narrow copy where products want one."""
        self.origins[value.name] = origin
        if is_f32(value):
            self.forms[value.name, F32] = value
            if self.scope.needs_copy(value.name):
                self._convert(value, self.narrow)

    # Nodes.

    def _node(self, node: Node) -> None:
        self.origins.update((value.name, node.origin) for value in node.outputs)
        if node.op == "Constant":
            if self.stored(node.output) != self.narrow or not is_f32(node.output):
                self.nodes.append(node)
                self.forms[node.output.name, node.output.dtype] = node.output
        elif node.op == "Fused":
            self._group(node)
        elif is_control(node):
            inputs = tuple(value and self.read(value, F32) for value in node.inputs)
            children = {name: self.scope.children[node.outputs[0].name, name] for name in node.regions}
            regions = {name: _Rewrite(child, self.names, self).run() for name, child in children.items()}
            same = inputs == node.inputs and all(regions[name] is region for name, region in node.regions.items())
            self._add(node if same else replace(node, inputs=inputs, regions=regions))
        elif moves(node) and is_f32(node.outputs[0]):
            dtype = self.stored(node.outputs[0])
            inputs = tuple(value and self.read(value, dtype) for value in node.inputs)
            self._add(replaced(node, inputs, tuple(self.typed(value, dtype) for value in node.outputs)), node.outputs)
        elif self.scope.narrows(node):
            self._alone(node)
        else:
            self._add(replaced(node, tuple(value and self.read(value, F32) for value in node.inputs), node.outputs))

    def _add(self, node: Node, before: Sequence[Value] | None = None) -> None:
        self.nodes.append(node)
        for old, new in zip(before or node.outputs, node.outputs, strict=True):
            if is_f32(old) and not is_f32(new):
                self.forms[old.name, new.dtype] = new
            else:
                self._made(old, node.origin)

    def _alone(self, node: Node) -> None:
        """A node with narrow factors that is no group: a recurrent layer, or one before fusion."""
        outputs, node = node.outputs, with_narrow_factors(node, self.read, self.narrow)
        types = zip(outputs, result_types(node), strict=True)
        results = [
            self.typed(value, dtype) if dtype == self.stored(value) else self.fresh(value, dtype)
            for value, dtype in types
        ]
        self._add(replace(node, outputs=tuple(results)), outputs)
        for value, result in zip(outputs, results, strict=True):
            if self.stored(value) != result.dtype:
                self._convert(value, F32, value)

    def _group(self, node: Node) -> None:
        """A fused group: what it reads is widened inside, what it makes is stored as it is to be."""
        body, before = _Body(self), node.regions["body"]
        for inner in before.nodes:
            body.add(inner)
        pairs = list(zip(node.outputs, before.outputs, strict=True))
        copied = [(outer, end) for outer, end in pairs if is_f32(outer) and self.scope.needs_copy(outer.name)]
        ends, copies = [], []
        for pair in pairs:
            ends.append(body.read(pair[1], self.stored(pair[0])))
            copies += [body.rounded(pair[1])] if pair in copied else []
        ends += copies
        outputs = [self.typed(outer, self.stored(outer)) for outer in node.outputs]
        outputs += [self.fresh(outer, self.narrow) for outer, _ in copied]
        origins = [*node.outputs, *(outer for outer, _ in copied)]
        self.forms.update({(old.name, new.dtype): new for old, new in zip(origins, outputs, strict=True)})
        nodes = body.finished(ends)
        if nodes == before.nodes and tuple(outputs) == node.outputs:
            self.nodes.append(node)
            return
        region = replace(before, nodes=nodes, outputs=tuple(ends))
        regions = {**node.regions, "body": region}
        self.nodes.append(replace(node, inputs=region.captures(), outputs=tuple(outputs), regions=regions))


class _Body:
    """Writes the body of one group anew."""

    def __init__(self, around: _Rewrite) -> None:
        self.around, self.narrow = around, around.narrow
        self.nodes: list[Node] = []
        self.forms: dict[tuple[str, DType], Value] = {}
        self.moving: dict[str, Node] = {}
        self.inner: set[str] = set()

    def add(self, node: Node) -> None:
        """A node of the body as it was; what moves elements does so in the types in which its results are read."""
        self.inner.update(value.name for value in node.outputs)
        if moves(node) and is_f32(node.outputs[0]):
            self.moving.update((value.name, node) for value in node.outputs)
            return
        if self.around.scope.narrows(node):
            node = with_narrow_factors(node, self.read, self.narrow)
        else:
            node = replaced(node, tuple(value and self.read(value, F32) for value in node.inputs), node.outputs)
        self.nodes.append(node)
        for value in node.outputs:
            self.forms[value.name, value.dtype] = value

    def read(self, value: Value, dtype: DType) -> Value:
        """The f32 value `value` as that type, converted here where it must be; other values as they are."""
        if not is_f32(value):
            return value
        key = value.name, dtype
        if key not in self.forms and value.name in self.moving:
            self._move(self.moving[value.name], dtype)
        if key not in self.forms:
            self.forms[key] = self._outside(value, dtype) or self._cast(value, dtype)
        return self.forms[key]

    def rounded(self, value: Value) -> Value:
        """The value, which is read as f32 too, in the narrow type: rather converted than moved once more."""
        key = value.name, self.narrow
        if key not in self.forms:
            self.forms[key] = self._cast(value, self.narrow)
        return self.forms[key]

    def _outside(self, value: Value, dtype: DType) -> Value | None:
        if value.name in self.inner:
            return None
        around = self.around
        if value.name in around.scope.owner(value.name).constants and dtype == F32 != around.stored(value):
            return None  # one of many elements that is stored narrow
        return around.form(value, dtype)

    def _cast(self, value: Value, dtype: DType) -> Value:
        other = self.narrow if dtype == F32 else F32
        source = self.forms.get((value.name, other)) or self.around.form(value, other)
        assert source is not None
        output = self.around.fresh(value, dtype)
        self.nodes.append(Node("Cast", (source,), (output,), {"to": dtype}))
        return output

    def _move(self, node: Node, dtype: DType) -> None:
        inputs = tuple(value and self.read(value, dtype) for value in node.inputs)
        taken = any((node.outputs[0].name, other) in self.forms for other in (self.narrow, F32))
        around = self.around
        outputs = [around.fresh(v, dtype) if taken else around.typed(v, dtype) for v in node.outputs]
        self.nodes.append(replaced(node, inputs, tuple(outputs)))
        self.forms.update({(old.name, dtype): new for old, new in zip(node.outputs, outputs, strict=True)})

    def finished(self, ends: Sequence[Value]) -> tuple[Node, ...]:
        """The nodes that the results need. A product that is only rounded is made narrow at once."""
        wanted = set(ends)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if any(value in wanted for value in node.outputs):
                kept.append(node)
                wanted |= set(node.reads)
        readers = Counter(value for node in kept for value in node.reads) + Counter(ends)
        rounded: dict[Value, Node] = {
            node.operands[0]: node for node in kept if node.op == "Cast" and node.output.dtype == self.narrow
        }
        nodes: list[Node] = []
        gone: list[Node] = []
        for node in reversed(kept):
            cast = rounded.get(node.outputs[0]) if "result" in node.attributes and not node.regions else None
            if cast is not None and readers[node.outputs[0]] == 1:
                attributes = {key: value for key, value in node.attributes.items() if key != "result"}
                node = replace(node, outputs=cast.outputs, attributes=attributes)
                gone.append(cast)
            if not any(node is cast for cast in gone):
                nodes.append(node)
        return tuple(nodes)


def replaced(node: Node, inputs: tuple[Value | None, ...], outputs: tuple[Value, ...]) -> Node:
    """The node on other operands, in its regions too."""
    if inputs == node.inputs and outputs == node.outputs:
        return node
    renamed = {old: new for old, new in zip(node.inputs, inputs, strict=True) if old is not None and new is not None}
    regions = {name: region.with_captures(renamed) for name, region in node.regions.items()}
    return replace(node, inputs=inputs, outputs=outputs, regions=regions)


def with_narrow_factors(node: Node, read: Callable[[Value, DType], Value], dtype: DType) -> Node:
    """The node with narrow factors and all else as f32, its result too where it can make that."""
    positions = REGISTRY[node.op].positions(REGISTRY[node.op].products, len(node.inputs))
    inputs = tuple(value and read(value, dtype if i in positions else F32) for i, value in enumerate(node.inputs))
    node = replaced(node, inputs, node.outputs)
    return replace(node, attributes={**node.attributes, "result": F32})


def narrowed(array: np.ndarray, dtype: DType) -> np.ndarray:
    """The array in another type, a finite number beyond its range being the greatest that it has; what lies in memory
    once (an axis that is one element for all) still does."""
    if array.dtype == dtype.numpy:
        return array
    once = array[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)]
    low, high = dtype.limits
    if once.size and not (low <= once.min() and once.max() <= high):
        once = np.where(np.isfinite(once), np.clip(once, low, high), once)
    return np.broadcast_to(once.astype(dtype.numpy), array.shape)
