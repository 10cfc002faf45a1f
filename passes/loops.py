"""Loops that say less than they could: states that never change, conditions that only count.

Exporters of while loops hand weights from iteration to iteration and end by comparing a counter with a limit. Here such
states become values of the graph around, which schedules can pack, and such loops get a number of iterations, which
tells the sizes of what they stack up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..ir.dtypes import BOOL, I64
from ..ir.graph import Graph, Node, TensorType, Value, constant_node
from .pipeline import Pass, register
from .rewriting import Rewriter, until_stable

UNLIMITED = 1 << 40
"""A number of iterations of this or more is how exporters write "until the condition fails"."""

_LIMITS: Mapping[str, tuple[int, int]] = {
    "Less": (0, 0),
    "LessOrEqual": (0, 1),
    "Greater": (1, 0),
    "GreaterOrEqual": (1, 1),
}
"""Comparisons that hold while a counter is below a limit: which operand is the counter, and what the limit lacks."""


@register
@dataclass(frozen=True)
class Loops(Pass):
    """Takes states that never change out of loops, and counts the iterations of those that only count."""

    name = "loops"

    def run(self, graph: Graph) -> Graph:
        return until_stable(lambda found: _Loops(found).run(), graph)


class _Loops(Rewriter):
    def visit(self, node: Node) -> None:
        changed = self.counted(self.without_constant_states(node)) if node.op == "Loop" else node
        if changed is not node:
            names = [value.name for value in changed.outputs]
            types = self.inference.outputs(
                changed.op, changed.inputs, changed.attributes, changed.regions, names, changed.origin
            )
            for value, type in zip(changed.outputs, types, strict=True):
                if isinstance(value.type, TensorType) and isinstance(type, TensorType):
                    self.refine(value.shape, type.shape)
        self.add(changed)

    # States that never change.

    def without_constant_states(self, node: Node) -> Node:
        """The loop without the states that the body hands on as they come: its nodes read the initial ones."""
        body = node.regions["body"]
        states = list(zip(node.inputs[2:], body.inputs[2:], body.outputs[1:], node.outputs, strict=False))
        kept = [
            initial is None or _source(body, new) != old or initial.type != old.type for initial, old, new, _ in states
        ]
        if all(kept):
            return node
        inside: dict[Value, Value] = {}
        for keep, (initial, old, _, result) in zip(kept, states, strict=True):
            if not keep and initial is not None:
                inside[old] = initial
                self.forward(Node("Identity", (initial,), (result,), {}, {}, node.origin), initial)
        chosen = [index for index, keep in enumerate(kept) if keep]
        rest = len(states)
        nodes = tuple(item.with_inputs(inside) for item in body.nodes)
        outputs = [inside.get(value, value) for value in body.outputs]
        region = replace(
            body,
            inputs=(*body.inputs[:2], *(body.inputs[2 + k] for k in chosen)),
            outputs=(outputs[0], *(outputs[1 + k] for k in chosen), *outputs[1 + rest :]),
            nodes=nodes,
        )
        return replace(
            node,
            inputs=(*node.inputs[:2], *(node.inputs[2 + k] for k in chosen)),
            outputs=(*(node.outputs[k] for k in chosen), *node.outputs[rest:]),
            regions={"body": region},
        )

    # Conditions that count.

    def counted(self, node: Node) -> Node:
        """The loop with a number of iterations where it runs while a counter, one more each time, is below a limit."""
        body = node.regions["body"]
        limit = self.scalar(node.inputs[0])
        if node.inputs[0] is not None and (limit is None or limit < UNLIMITED):
            return node
        compared = body.producers.get(_source(body, body.outputs[0]))
        if compared is None or compared.op not in _LIMITS or node.inputs[1] is None:
            return node
        position, more = _LIMITS[compared.op]
        counter, end = (_plain(body, compared.operands[k]) for k in (position, 1 - position))
        states = {new: k for k, new in enumerate(body.outputs[1 : len(node.inputs) - 1])}
        if counter not in states or end in body.producers or end in body.inputs or not end.dtype.is_integer:
            return node
        start, old = node.inputs[2 + states[counter]], body.inputs[2 + states[counter]]
        step = body.producers.get(counter)
        if start is None or step is None or step.op != "Add" or not self._adds_one(body, step, old):
            return node
        if not self._same_comparison(node.inputs[1], compared.op, start, end):
            return node
        return replace(
            node,
            inputs=(self._distance(start, end, more, node), None, *node.inputs[2:]),
            regions={"body": _endless(body, self.names.fresh("goes_on"))},
        )

    def _adds_one(self, body: Graph, step: Node, old: Value) -> bool:
        others = [value for value in step.operands if value != old]
        known = body.constant(others[0]) if len(others) == 1 else None
        known = self.array(others[0]) if known is None and others else known
        return known is not None and known.size == 1 and known.reshape(-1)[0] == 1

    def _same_comparison(self, condition: Value, op: str, start: Value, end: Value) -> bool:
        """Whether the loop begins on the condition start < end, or on one that is known to be it."""
        known = self.inference.values.get(condition.name)
        if known is not None and known[0] is True:
            return self.inference.values.get(start.name) == (0,) and self._at_least_one(end)
        node = self.producer(condition)
        if node is None or node.op not in _LIMITS or _LIMITS[node.op][1] != _LIMITS[op][1]:
            return False
        position = _LIMITS[node.op][0]
        return self._equal(node.operands[position], start) and self._equal(node.operands[1 - position], end)

    def _at_least_one(self, value: Value) -> bool:
        known = self.inference.values.get(value.name)
        return known is not None and isinstance(known[0], int) and known[0] >= 1

    def _equal(self, left: Value, right: Value) -> bool:
        """Whether two numbers are one, conversions aside."""
        values = self.inference.values
        while (node := self.made_by(left, "Cast", "Identity")) is not None and node.inputs[0] is not None:
            left = node.inputs[0]
        a, b = values.get(left.name), values.get(right.name)
        return left == right or (a is not None and a == b)

    def _distance(self, start: Value, end: Value, more: int, node: Node) -> Value:
        """max(0, end - start + more), a 64-bit number."""

        def step(op: str, *operands: Value, **attributes: object) -> Value:
            return self.emit(op, operands, attributes, stem=f"{end.name}.iterations", origin=node.origin)  # type: ignore[arg-type]

        first, last = (step("Cast", value, to=I64) if value.dtype != I64 else value for value in (start, end))
        distance = step("Sub", last, first)
        if more:
            distance = step("Add", distance, self.constant(np.array(more, np.int64), "one", node.origin))
        return step("Max", distance, self.constant(np.array(0, np.int64), "zero", node.origin))


def _source(graph: Graph, value: Value) -> Value:
    """The value that `value` is another name of."""
    node = graph.producers.get(value)
    while node is not None and node.op == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = graph.producers.get(value)
    return value


def _plain(graph: Graph, value: Value) -> Value:
    """The integer that `value` is, before conversions that keep its order."""
    value = _source(graph, value)
    node = graph.producers.get(value)
    while node is not None and node.op == "Cast" and node.operands[0].dtype.is_integer and value.dtype != BOOL:
        value = _source(graph, node.operands[0])
        node = graph.producers.get(value)
    return value


def _endless(body: Graph, name: str) -> Graph:
    """The body with a condition that always holds."""
    node = constant_node(name, np.array(True), TensorType(BOOL, ()), ())
    return replace(body, nodes=(*body.nodes, node), outputs=(node.output, *body.outputs[1:]))
