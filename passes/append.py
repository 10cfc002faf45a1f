"""Caches that a caller donates: what a model appends to an input is written into the room behind it.

A decoder's step gives its keys and values back as Concat(past, new), which copies all of the past. Where the caller
donates the past, an array with room along that axis, the step writes the new rows there and the output is that array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..ir.dims import Dim, as_symbol, symbol, symbols
from ..ir.dtypes import U8
from ..ir.errors import ModelError
from ..ir.graph import Attribute, Graph, Names, Node, TensorType, Value
from ..ir.tensors import normalize_axis

SPARE = "spare"
"""The symbol of how many rows more a donated array has room for after a run."""
ALL = "*"


@dataclass(frozen=True)
class Donation:
    """An input and the Concat that appends to it along `axis`, whose result is an output of the graph."""

    past: Value
    concat: Node
    axis: int


def donations(graph: Graph) -> tuple[tuple[str, str], ...]:
    """The pairs (output, input) of a graph that `with_donations` made, which must be one memory."""
    appended = [node for node in graph.nodes if node.op == "onnxc.Append"]
    return tuple((node.output.name, node.operands[0].name) for node in appended if node.output in graph.outputs)


def with_donations(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with what it appends to the named inputs (ALL: to all that it can) written in place.

    An input [.., past, ..] becomes one of [.., past + new + spare, ..] elements, and so does the output: the array
    after the run. Where no other input tells how many elements are the past, one that is named after the past's symbol
    does, of the shape [past, 0]. Raises ModelError for an input of that name that the graph does not append to.
    """
    found = {item.past.name: item for item in _donations(graph)}
    wanted = list(found) if ALL in names else list(dict.fromkeys(names))
    for name in wanted:
        if name not in found:
            known = ", ".join(found) or "none"
            raise ModelError(
                f"input {name!r} cannot be donated: only inputs can that nothing but a Concat reads, as its first "
                f"operand, and whose result is an output of the model; here {known}"
            )
    if not wanted:
        raise ModelError("no input can be donated: no output of the model is a Concat of an input with something")
    return _Rewriter(graph, [found[name] for name in wanted]).run()


def _donations(graph: Graph) -> list[Donation]:
    found: list[Donation] = []
    for node in graph.nodes:
        past = node.inputs[0] if node.op == "Concat" else None
        if past is None or past not in graph.inputs or node.output not in graph.outputs or past in graph.outputs:
            continue
        axis = normalize_axis(int(str(node.attributes["axis"])), past.tensor.rank)
        alone = list(graph.users.get(past, ())) == [node] and list(node.inputs).count(past) == 1
        if alone and len(node.inputs) > 1 and graph.outputs.count(node.output) == 1:
            found.append(Donation(past, node, axis))
    return found


class _Rewriter:
    def __init__(self, graph: Graph, donations: Sequence[Donation]) -> None:
        self.graph, self.names = graph, Names(graph)
        self.by_concat = {item.concat.output: item for item in donations}
        taken = {found.name for found in graph.symbols()}
        name = SPARE
        while name in taken:
            name += "_"
        self.spare = symbol(name)
        self.views: dict[Value, Value] = {}
        self.inputs: dict[Value, Value] = {}
        self.outputs: dict[Value, Value] = {}

    def run(self) -> Graph:
        nodes: list[Node] = []
        for node in self.graph.nodes:
            item = self.by_concat.get(node.output) if len(node.outputs) == 1 else None
            if item is None:
                nodes.append(node.with_inputs(self.views))
            else:
                nodes += self._appended(item)
        inputs = [self.inputs.get(value, value) for value in self.graph.inputs]
        told = {s.name for v in self.graph.inputs if v not in self.inputs for d in v.shape for s in symbols(d)}
        pasts = dict.fromkeys(item.past.shape[item.axis] for item in self.by_concat.values())
        for past in pasts:
            single = as_symbol(past)
            if single is not None and single.name not in told:
                inputs.append(Value(self.names.fresh(single.name), TensorType(U8, (past, 0))))
        outputs = tuple(self.outputs.get(value, value) for value in self.graph.outputs)
        return replace(self.graph, inputs=tuple(inputs), outputs=outputs, nodes=tuple(nodes))

    def _appended(self, item: Donation) -> list[Node]:
        node, axis, past = item.concat, item.axis, item.past
        nodes: list[Node] = []
        operands = [self.views.get(value, value) for value in node.operands[1:]]
        start = past.shape[axis]
        new = operands[0]
        if len(operands) > 1:
            extent: Dim = sum((value.shape[axis] for value in operands), 0)
            new = Value(self.names.fresh(f"{node.output.name}.new"), _with_axis(new, axis, extent))
            nodes.append(Node("Concat", tuple(operands), (new,), {"axis": axis}, origin=node.origin))
        end = start + new.shape[axis]
        room = _with_axis(past, axis, end + self.spare)
        self.inputs[past] = roomy = Value(past.name, room)
        whole = Value(node.output.name, room)
        self.outputs[node.output] = whole
        at: dict[str, Attribute] = {"axis": axis, "start": (start,)}
        nodes.append(Node("onnxc.Append", (roomy, new), (whole,), at, origin=node.origin))
        if self.graph.users.get(node.output):
            view = Value(self.names.fresh(f"{node.output.name}.filled"), _with_axis(past, axis, end))
            bounds: dict[str, Attribute] = {"starts": (0,), "ends": (end,), "axes": (axis,), "steps": (1,)}
            nodes.append(Node("Slice", (whole,), (view,), bounds, origin=node.origin))
            self.views[node.output] = view
        return nodes


def _with_axis(value: Value, axis: int, extent: Dim) -> TensorType:
    shape = (*value.shape[:axis], extent, *value.shape[axis + 1 :])
    return TensorType(value.dtype, shape)
