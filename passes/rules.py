"""Rewrites as data: a title, a pattern and a replacement, each of the latter two an expression over values.

    rule("x * 1 => x", lambda x: x * 1, lambda x: x)
    rule("max(x, 0) => Relu", lambda x: op.Max(x, 0), lambda x: op.Relu(x))

The lambdas are traced: their parameters stand for values, those named c, c1, ... for constants; a number in a pattern
for a constant of that number alone, in a replacement for such a constant. Operands of operators that commute match in
either order. A rule applies where the result keeps its type, and `when`, if given, holds of the match.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from ..ir.dtypes import DType
from ..ir.graph import Attribute, Graph, Node, Value, unite
from .cleanup import without_dead_code
from .fold import evaluate
from .rewriting import Rewriter, until_stable

COMMUTATIVE = frozenset(("Add", "Mul", "Min", "Max", "And", "Or", "Xor", "Equal"))


@dataclass(frozen=True)
class Expression:
    """A traced expression; Python's operators apply ONNX's."""

    def __add__(self, other: Operand) -> Apply:
        return op.Add(self, other)

    def __sub__(self, other: Operand) -> Apply:
        return op.Sub(self, other)

    def __mul__(self, other: Operand) -> Apply:
        return op.Mul(self, other)

    def __truediv__(self, other: Operand) -> Apply:
        return op.Div(self, other)

    def __pow__(self, other: Operand) -> Apply:
        return op.Pow(self, other)

    def __neg__(self) -> Apply:
        return op.Neg(self)

    def __radd__(self, other: Operand) -> Apply:
        return op.Add(other, self)

    def __rsub__(self, other: Operand) -> Apply:
        return op.Sub(other, self)

    def __rmul__(self, other: Operand) -> Apply:
        return op.Mul(other, self)

    def __rtruediv__(self, other: Operand) -> Apply:
        return op.Div(other, self)


@dataclass(frozen=True)
class Variable(Expression):
    """Any value, or any constant where the name begins with c; the same one wherever the name occurs."""

    name: str

    @property
    def is_constant(self) -> bool:
        return self.name.startswith("c")


@dataclass(frozen=True)
class Apply(Expression):
    """An operator of operands (None for one that is absent), with exactly these attributes."""

    operator: str
    operands: tuple[Operand, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


Operand: TypeAlias = Expression | int | float | bool | None


class _Operators:
    """`op.Relu(x)` is Relu applied to x."""

    def __getattr__(self, name: str) -> Callable[..., Apply]:
        return lambda *operands, **attributes: Apply(name, operands, attributes)


op = _Operators()


@dataclass(frozen=True)
class Match:
    """What the variables of a pattern stand for, and the nodes that it covers."""

    values: Mapping[str, Value]
    nodes: tuple[Node, ...]
    array_of: Callable[[Value], np.ndarray | None]

    def array(self, name: str) -> np.ndarray:
        """The array of a constant."""
        array = self.array_of(self.values[name])
        assert array is not None
        return array

    @property
    def dtype(self) -> DType:
        """The element type of the result."""
        return self.nodes[0].output.dtype


@dataclass(frozen=True)
class Rule:
    """A rewrite; `examples` are constants by which tests show that it applies, where not any will do."""

    title: str
    pattern: Apply
    replacement: Operand
    when: Callable[[Match], bool] | None = None
    examples: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """The names in the pattern."""
        return tuple(dict.fromkeys(part.name for part in walk(self.pattern) if isinstance(part, Variable)))


def walk(expression: Operand) -> Iterator[Operand]:
    """The expression and all its parts."""
    yield expression
    if isinstance(expression, Apply):
        for operand in expression.operands:
            yield from walk(operand)


def rule(
    title: str,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    when: Callable[[Match], bool] | None = None,
    **examples: object,
) -> Rule:
    """Traces the two lambdas, which have the same parameters."""
    names = list(inspect.signature(pattern).parameters)
    assert names == list(inspect.signature(replacement).parameters), title
    variables = [Variable(name) for name in names]
    return Rule(title, pattern(*variables), replacement(*variables), when, examples)


class Applying(Rewriter):
    """Applies rules, the first that fits to each node."""

    def __init__(self, graph: Graph, parent: Applying | None = None, rules: Sequence[Rule] = ()) -> None:
        super().__init__(graph, parent)
        self.by_operator: dict[str, list[Rule]] = dict(parent.by_operator) if parent else {}
        for item in rules:
            self.by_operator.setdefault(item.pattern.operator, []).append(item)

    def visit(self, node: Node) -> None:
        for item in self.by_operator.get(node.op, ()):
            match = self.match(item, node)
            if match is not None and self.applied(item, node, match):
                return
        self.add(node)

    # Matching.

    def match(self, item: Rule, node: Node) -> Match | None:
        """How the pattern fits the node, None where it does not."""
        for values, nodes in self._fits(item.pattern, node, {}):
            found = Match(values, nodes, self.array)
            if item.when is None or item.when(found):
                return found
        return None

    def _fits(
        self, pattern: Apply, node: Node, bound: Mapping[str, Value]
    ) -> Iterator[tuple[Mapping[str, Value], tuple[Node, ...]]]:
        if node.op != pattern.operator or dict(node.attributes) != dict(pattern.attributes) or len(node.outputs) != 1:
            return
        inputs = node.inputs + (None,) * (len(pattern.operands) - len(node.inputs))
        if len(inputs) != len(pattern.operands):
            return
        orders = [inputs, inputs[::-1]] if node.op in COMMUTATIVE and len(inputs) == 2 else [inputs]
        for order in orders:
            yield from self._operands_fit(list(zip(pattern.operands, order, strict=True)), bound, (node,))

    def _operands_fit(
        self, pairs: list[tuple[Operand, Value | None]], bound: Mapping[str, Value], nodes: tuple[Node, ...]
    ) -> Iterator[tuple[Mapping[str, Value], tuple[Node, ...]]]:
        if not pairs:
            yield bound, nodes
            return
        (pattern, value), *rest = pairs
        if pattern is None or value is None:
            if pattern is None and value is None:
                yield from self._operands_fit(rest, bound, nodes)
        elif isinstance(pattern, Variable):
            known = bound.get(pattern.name, value)
            if known == value and not (pattern.is_constant and self.array(value) is None):
                yield from self._operands_fit(rest, {**bound, pattern.name: value}, nodes)
        elif isinstance(pattern, Apply):
            node = self.producer(value)
            if node is not None:
                for inner, covered in self._fits(pattern, node, bound):
                    yield from self._operands_fit(rest, inner, nodes + covered)
        elif self._is_number(value, pattern):
            yield from self._operands_fit(rest, bound, nodes)

    def _is_number(self, value: Value, number: object) -> bool:
        array = self.array(value)
        if array is None or not array.size or array.dtype.kind in "OUSc":
            return False
        return bool(array.reshape(-1)[0] == number) and bool(np.all(array == number))

    # Replacing.

    def applied(self, item: Rule, node: Node, match: Match) -> bool:
        """Replaces the node where the result keeps its type; whether it did."""
        origin = unite(*(covered.origin for covered in match.nodes))
        if isinstance(item.replacement, Variable):
            value = match.values[item.replacement.name]
            if value.type != node.output.type:
                return False
            self.forward(node, value)
            return True
        count = len(self.nodes)
        value = self.build(item.replacement, match, node, origin)
        if value.type != node.output.type:
            del self.nodes[count:]
            return False
        last = self.nodes.pop()
        self.add(Node(last.op, last.inputs, node.outputs, last.attributes, {}, origin))
        return True

    def build(self, expression: Operand, match: Match, node: Node, origin: tuple[str, ...]) -> Value:
        """The value of a replacement's expression; what is constant is computed."""
        stem = f"{node.output.name}.{node.op.lower()}"
        if isinstance(expression, Variable):
            return match.values[expression.name]
        if not isinstance(expression, Apply):
            return self.constant(np.array(expression, match.dtype.numpy), stem, origin)
        operands = [None if part is None else self.build(part, match, node, origin) for part in expression.operands]
        value = self.emit(expression.operator, operands, expression.attributes, stem=stem, origin=origin)
        arrays = {operand.name: self.array(operand) for operand in operands if operand is not None}
        if all(array is not None for array in arrays.values()):
            made = self.nodes.pop()
            (array,) = evaluate(made, {name: array for name, array in arrays.items() if array is not None})
            return self.constant(array, stem, origin)
        return value


def apply_rules(graph: Graph, rules: Sequence[Rule]) -> Graph:
    """The graph with rules applied until none fits."""
    return until_stable(lambda found: without_dead_code(Applying(found, rules=rules).run()), graph)
