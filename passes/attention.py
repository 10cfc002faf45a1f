"""Attention found in a graph: a softmax over products, scaled, biased and masked, and the product of it with values.

What counts is what definitions say, not how an exporter spells it: between the first product and the softmax may stand
anything that maps each score by itself; what moves queries, keys, values and the result about (heads split off, keys
transposed, heads repeated for groups of queries) is read or written in place. Each attention becomes a `Fused` group
around one `onnxc.Attention`, which a schedule can make without storing the scores (Dao 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ir import scalars as s
from ..ir.dims import Dim, as_symbol, linear, product
from ..ir.dtypes import BF16, F16, F32, I8, U8, DType
from ..ir.graph import Attribute, Graph, Names, Node, TensorType, Value, unite
from ..ir.infer import Inference
from ..ir.ops import REGISTRY
from ..ir.ops.attention import ZERO
from ..ir.tensors import Tensor, flat_offset
from .access import literal_tensor, output_indices, probe_tensor
from .bodies import Body, Masks
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .products import as_matrix_products

TYPES = (F16, BF16, F32)


@register
@dataclass(frozen=True)
class Attention(Pass):
    """Makes one group of every attention whose queries, keys and values have at most `max_width` channels a head.

    Scores in 16 bits, which a group keeps in f32 where the definition rounds them, are grouped where `narrow` is 1.
    Keys and values that are dequantized from 8 bits are read so where `bytes` is 1.
    """

    name = "attention"
    max_width: int = 256
    narrow: int = 1
    bytes: int = 0

    def run(self, graph: Graph) -> Graph:
        plain = as_matrix_products(graph)
        inference = Inference()
        inference.graph(plain)
        types = TYPES if self.narrow else (F32,)
        found = _Finder(plain, inference, Names(plain), self.max_width, types, bool(self.bytes)).run()
        return graph if found is plain else without_dead_code(found)


@dataclass(frozen=True)
class _Weights:
    """From a softmax to the product with the values: the nodes between, which make rows zero that have no scores
    (`empty_rows`) or for which the condition of the node `chosen` holds."""

    nodes: tuple[Node, ...]
    product: Node
    empty_rows: bool = False
    chosen: Node | None = None


class _Finder:
    """Looks through one graph and its regions."""

    def __init__(
        self,
        graph: Graph,
        inference: Inference,
        names: Names,
        max_width: int,
        types: tuple[DType, ...],
        bytes: bool,
    ) -> None:
        self.graph, self.inference, self.names, self.max_width, self.types = graph, inference, names, max_width, types
        self.bytes = bytes
        self.outputs = set(graph.outputs)
        self.masks = Masks(graph, inference, names)

    def run(self) -> Graph:
        groups: dict[Value, list[Node]] = {}
        for node in self.graph.nodes:
            if node.op == "Softmax":
                found = self.attention(node)
                constants = self.masks.take()
                if found is not None:
                    groups[found.output] = [*constants, found]
        nodes: list[Node] = []
        for node in self.graph.nodes:
            nodes += groups[node.outputs[0]] if node.outputs and node.outputs[0] in groups else [self._inside(node)]
        same = len(nodes) == len(self.graph.nodes) and all(map(lambda a, b: a is b, nodes, self.graph.nodes))
        return self.graph if same else replace(self.graph, nodes=tuple(nodes))

    def _inside(self, node: Node) -> Node:
        if not node.regions or node.op == "Fused":
            return node
        regions = {
            name: _Finder(region, self.inference, self.names, self.max_width, self.types, self.bytes).run()
            for name, region in node.regions.items()
        }
        return node if all(regions[n] is r for n, r in node.regions.items()) else replace(node, regions=regions)

    # Finding the parts.

    def producer(self, value: Value | None) -> Node | None:
        return self.graph.producers.get(value) if value is not None else None

    def only_reader(self, value: Value) -> Node | None:
        readers = self.graph.users.get(value, ())
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def attention(self, softmax: Node) -> Node | None:
        """The group that makes what a softmax is part of; None where that is no attention, or none that fits."""
        scores, axis = softmax.operands[0], softmax.attributes.get("axis", -1)
        if scores.tensor.rank < 2 or axis not in (-1, scores.tensor.rank - 1) or scores.dtype not in self.types:
            return None
        weights = self.weights(softmax)
        for first in self.products_before(scores) if weights is not None else ():
            inner = self.between(first.output, scores)
            if weights is not None and inner is not None and self.fits(first, weights.product, scores):
                made = self.group(first, inner, softmax, weights)
                if made is not None:
                    return made
        return None

    def weights(self, softmax: Node) -> _Weights | None:
        """What follows a softmax up to the product with the values, where it leaves the weights as they are."""
        value, empty = softmax.output, False
        nodes: list[Node] = []
        chosen: Node | None = None
        while True:
            readers = self.graph.users.get(value, ())
            if len(readers) == 2 and readers[0].op == "IsNaN" and self.only_reader(readers[0].output) is readers[1]:
                readers = readers[1:]
            if len(readers) != 1 or value in self.outputs:
                return None
            (node,) = readers
            if node.op == "MatMul" and not node.attributes:
                whole = node.inputs[0] == value and node.inputs[1] != value and node.operands[1].tensor.rank > 1
                whole = whole and (chosen is None or chosen.output.dtype == node.output.dtype)
                return _Weights(tuple(nodes), node, empty, chosen) if whole else None
            keeps_rows = len(node.outputs) == 1 and node.output.shape[-2:] == value.shape[-2:]
            test = node.inputs[0]
            if node.op == "Where" and test is not None and self.is_zero(node.inputs[1]) and keeps_rows:
                if self.tells_empty_rows(test, value, softmax.operands[0]):
                    empty = True
                elif chosen is None and test.shape[-1:] == (1,):
                    chosen = node
                else:
                    return None
            elif not (node.op == "Cast" or (node.op == "Reshape" and chosen is None and keeps_rows)):
                return None
            nodes.append(node)
            value = node.output

    def is_zero(self, value: Value | None) -> bool:
        array = self.graph.constant(value)
        return array is not None and array.size == 1 and not array.any()

    def tells_empty_rows(self, test: Value, weights: Value, scores: Value) -> bool:
        """Whether a condition holds for rows that have no score but -inf: their weights are NaN, or -inf is the
        greatest of what is added to the scores."""
        node, added = self.producer(test), self.producer(scores)
        if node is None or node.op == "IsNaN":
            return node is not None and node.operands[0] == weights
        while added is not None and added.op == "Cast":
            added = self.producer(added.operands[0])
        for greatest, limit in (node.operands, node.operands[::-1]) if node.op == "Equal" else ():
            array, row = self.graph.constant(limit), self.producer(greatest)
            if array is None or array.size != 1 or array.reshape(-1)[0] != -np.inf or row is None or added is None:
                continue
            last = ((-1,), (row.operands[0].tensor.rank - 1,))
            if row.op == "ReduceMax" and row.attributes.get("axes") in last and added.op == "Add":
                return row.operands[0] in added.operands
        return False

    def products_before(self, scores: Value) -> list[Node]:
        """Products that scores may be made of, the nearest first."""
        waiting, seen, found = [scores], {scores}, []
        while waiting:
            value = waiting.pop(0)
            node = self.producer(value)
            if node is None or len(node.outputs) != 1 or node.regions or value.dtype not in TYPES:
                continue
            if (
                node.op == "MatMul"
                and not node.attributes
                and min(operand.tensor.rank for operand in node.operands) > 1
            ):
                found.append(node)
            elif node.op in REGISTRY and not REGISTRY[node.op].heavy:
                fresh = [v for v in node.operands if v not in seen and isinstance(v.type, TensorType)]
                waiting += fresh
                seen.update(fresh)
        return found

    def between(self, start: Value, end: Value) -> list[Node] | None:
        """The nodes on the ways from one value to another, in order; None where others read what is on them."""
        on_way, inner = {start}, []
        first = self.graph.nodes.index(self.graph.producers[start])
        for node in self.graph.nodes[first + 1 :]:
            if end in on_way:
                break
            if any(value in on_way for value in node.reads):
                inner.append(node)
                on_way.update(node.outputs)
        inside = {reader for value in on_way - {end} for reader in self.graph.users.get(value, ())}
        closed = end in on_way and inside <= set(inner) and not on_way & self.outputs
        return inner if closed and len(self.graph.users.get(end, ())) == 1 else None

    def fits(self, first: Node, second: Node, scores: Value) -> bool:
        """Whether types and sizes are such as schedules take."""
        operands = (*first.operands, second.operands[1])
        widths = (first.operands[0].shape[-1], second.output.shape[-1])
        return (
            len({value.dtype for value in operands}) == 1
            and all(isinstance(width, int) and 0 < width <= self.max_width for width in widths)
            and self.alike(first.output.shape[-2:], scores.shape[-2:])
        )

    def alike(self, one: Sequence[Dim], other: Sequence[Dim]) -> bool:
        """Whether sizes are the same, or are taken to be where one is broadcast to the other."""
        taken = self.inference.assumptions
        pairs = list(zip(one, other, strict=False))
        return len(one) == len(other) and all(a == b or (a, b) in taken or (b, a) in taken for a, b in pairs)

    # Making the group.

    def group(self, first: Node, inner: list[Node], softmax: Node, weights: _Weights) -> Node | None:
        """The group, where the operands can be read and the scores mapped as a schedule wants it."""
        scores = softmax.operands[0]
        batch, second = scores.shape[:-2], weights.product
        body = Body(self.names, self.inference)
        operands: list[Value] = []
        scales: list[tuple[str, Value]] = []
        for node, value in ((first, first.operands[0]), (first, first.operands[1]), (second, second.operands[1])):
            same = self.alike(node.output.shape[:-2], batch)
            whole = value.shape[:-2] == node.output.shape[:-2] and product(value.shape[:-2]) == product(batch)
            if not same and not whole:
                return None
            found, factors = self.operand(body, value, node is first)
            operands.append(found if same else body.reshaped(found, (*batch, *value.shape[-2:])))
            scales += factors
        region = self.scores(first, inner, scores, scales)
        if region is None:
            return None
        type = TensorType(second.output.dtype, (*batch, *second.output.shape[-2:]))
        result = Value(self.names.fresh(f"{second.output.name}.inner"), type)
        inputs = (*operands, *(value for value in region.captures() if value not in operands))
        attributes: dict[str, Attribute] = {"empty_rows": ZERO} if weights.empty_rows else {}
        body.nodes.append(Node("onnxc.Attention", inputs, (result,), attributes, {"scores": region}))
        self.inference.node(body.nodes[-1])
        last, trailing = self.finish(body, result, weights)
        graph = Graph("body", (), (body.nodes[-1].output,), tuple(body.nodes))
        covered = [first, *inner, softmax, *weights.nodes, second, *trailing]
        origin = unite(*(node.origin for node in covered))
        return Node("Fused", graph.captures(), (last,), {"kind": "heavy"}, {"body": graph}, origin)

    def operand(self, body: Body, value: Value, scalable: bool) -> tuple[Value, list[tuple[str, Value]]]:
        """An operand read through what moves or scales it, with the factors of all of it."""
        steps: list[Node] = []
        kept, current = 0, value
        while (node := self.producer(current)) is not None:
            if scalable and self.factor(node, current) is not None:
                steps.append(node)
                kept = len(steps) if kept == len(steps) - 1 else kept
            elif self.moves(node) or self.dequantizes(node):
                steps.append(node)
                if self.reads_matrices(steps, value, node.operands[0]):
                    kept = len(steps)
            else:
                break
            current = node.operands[0]
        mapping: dict[Value, Value] = {}
        factors: list[tuple[str, Value]] = []
        for node in reversed(steps[:kept]):
            if self.moves(node):
                body.clone(node, mapping)
            elif self.dequantizes(node):
                zeros = self.graph.constant(node.operands[2]) if len(node.operands) > 2 else None
                plain = zeros is not None and not zeros.any()
                body.clone(replace(node, inputs=node.inputs[:2]) if plain else node, mapping)
            else:
                factors.append((node.op, node.operands[1]))
                mapping[node.output] = mapping.get(node.operands[0], node.operands[0])
        return mapping.get(value, value), factors

    @staticmethod
    def factor(node: Node, result: Value) -> Value | None:
        """The single number by which a node multiplies or divides its first operand."""
        if node.op not in ("Mul", "Div") or node.operands[0].type != result.type:
            return None
        return node.operands[1] if product(node.operands[1].shape) == 1 else None

    def dequantizes(self, node: Node) -> bool:
        """Whether a node makes f32 of what is computed in 8 bits, with one scale for all or one for each channel (or
        whatever lies along an axis)."""
        if not self.bytes or node.op not in ("DequantizeLinear", "Cast", "Mul") or node.output.dtype != F32:
            return False
        source = node.operands[0]
        if node.op == "Mul":  # spelt out: the integers as reals, times what is the same for all keys
            real, scale = self.producer(source), node.operands[1]
            keys = scale.shape[-2:-1] in ((), (1,)) and source.shape == node.output.shape
            return keys and real is not None and real.op == "Cast" and self.dequantizes(real)
        if source.dtype not in (I8, U8) or self.graph.constant(source) is not None:
            return False
        if node.op == "Cast":
            return True
        scale = node.operands[1]
        return product(scale.shape) == 1 or len(scale.shape) == 1

    def moves(self, node: Node) -> bool:
        """Whether a node only moves elements of its first operand, in a way that is known now."""
        operator = REGISTRY.get(node.op)
        if operator is None or not node.operands or node.inputs[0] is None:
            return False
        if node.op == "Gather":
            array = self.graph.constant(node.operands[1])
            return array is not None and array.size == 1
        return operator.movement and len(node.operands) == 1

    def reads_matrices(self, steps: Sequence[Node], value: Value, source: Value) -> bool:
        """Whether, read through nodes that move elements, the last two axes of a value are evenly spaced in memory."""
        tensor = self.moved(steps[::-1], value, source)
        at = output_indices(tensor.shape)
        found = tensor.at(at)
        if not isinstance(found, s.Element):
            return False
        offset = flat_offset(found.indices, source.shape)
        names = {symbol.name for index in at if (symbol := as_symbol(index)) is not None}
        for axis in at[-2:]:
            name = as_symbol(axis)
            split = linear(offset, name.name) if name is not None else (0, offset)
            if split is None or s.free_symbols(split[0]) & names:
                return False
        return True

    def moved(self, steps: Sequence[Node], value: Value, source: Value) -> Tensor:
        """A value by definition over a stand-in for the source that the nodes, in order, lead from to it."""
        found = {source.name: probe_tensor(source)}
        for node in steps:
            if not self.moves(node):
                found[node.output.name] = found[node.operands[0].name]
                continue
            names = [output.name for output in node.outputs]
            arrays = {value: self.graph.constant(value) for value in node.operands[1:]}
            found.update({v.name: literal_tensor(v, array) for v, array in arrays.items() if array is not None})
            made = self.inference.definition(node.op, node.inputs, node.attributes, {}, names, node.origin, found)
            found.update({n: tensor for n, tensor in zip(names, made, strict=False) if isinstance(tensor, Tensor)})
        return found[value.name]

    def scores(
        self, first: Node, inner: list[Node], scores: Value, scales: Sequence[tuple[str, Value]]
    ) -> Graph | None:
        """The region that maps products to scores; None where a score depends on more than its own product."""
        shape = (*scores.shape[:-2], *first.output.shape[-2:])
        products = Value(self.names.fresh(f"{first.output.name}.inner"), TensorType(first.output.dtype, shape))
        body = Body(self.names, self.inference)
        value = products
        for op, factor in scales:
            value = body.add(op, (value, factor), first.output.name)
        mapping = {first.output: body.reshaped(value, first.output.shape)}
        for node in inner:
            for operand in node.operands:
                self.masks.absorb(body, operand, mapping)
            body.clone(node, mapping)
        region = Graph("scores", (products,), (body.reshaped(mapping[scores], scores.shape),), tuple(body.nodes))
        (tensor,) = self.inference.compose(region, [probe_tensor(products)], {})
        at = output_indices(tensor.shape)
        parts = list(s.walk(tensor.at(at)))
        own = [part for part in parts if isinstance(part, s.Element) and part.tensor == products.name]
        alone = all(part.indices == at for part in own) and not any(isinstance(part, s.Reduce) for part in parts)
        return region if own and alone else None

    # The result.

    def finish(self, body: Body, result: Value, weights: _Weights) -> tuple[Value, list[Node]]:
        """Adds what follows the second product and can be written in place; returns the value that the group makes,
        and the nodes."""
        last, value = weights.product.output, body.reshaped(result, weights.product.output.shape)
        if weights.chosen is not None:
            test, zero, _ = weights.chosen.operands
            value = body.add("Where", (test, zero, value), last.name)
        steps: list[Node] = []
        kept = 0
        current = last
        while (node := self.only_reader(current)) is not None and self.moves(node) and len(node.outputs) == 1:
            steps.append(node)
            current = node.output
            if self.writes_matrices(steps, last, current):
                kept = len(steps)
        while kept and steps[kept - 1].op == "Reshape":  # a view costs nothing, and others can do more with it
            kept -= 1
        mapping = {last: value}
        for node in steps[:kept]:
            body.clone(node, mapping)
        return (steps[kept - 1].output if kept else last), steps[:kept]

    def writes_matrices(self, steps: Sequence[Node], source: Value, value: Value) -> bool:
        """Whether nodes that move elements only permute them, rows and columns of the matrices by whole axes."""
        tensor = self.moved(steps, value, source)
        at = output_indices(tensor.shape)
        found = tensor.at(at)
        if not isinstance(found, s.Element) or product(source.shape) != product(value.shape):
            return False
        *outer, row, column = found.indices
        own = {name for index in (row, column) for name in s.free_symbols(index)}
        plain = all(index == 0 or index in at for index in (row, column))
        return plain and (row != column or row == 0) and not any(s.free_symbols(index) & own for index in outer)
