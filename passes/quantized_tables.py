"""Functions of one tensor of bytes as tables of 256 entries, computed by ONNX's reference, so exact.

The elementwise operators between a tensor of 8 bits and a QuantizeLinear that depends on no other tensor, quantizations
between them included, are one function of a byte (as in ONNX Runtime and TFLite): an activation, a gate x * sigmoid(x),
a change of scale. It is looked up where it costs more than that. Such functions also move in front of a transpose or a
reshape, so that they join what makes the bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..ir.dims import symbol
from ..ir.dtypes import I32, U8, DType
from ..ir.export import to_onnx
from ..ir.graph import Graph, Node, TensorType, Value, constant_node, unite
from ..ir.ops import REGISTRY
from ..ir.tensors import Tensor
from .axes import is_elementwise
from .nests import cost
from .quantized_values import QuantizedRewriter

LOOKUP = 30
"""Scalar operations from which on a look-up takes less time. A change of scale has 23: it takes five times as long as
looking up where a vector of bytes can do that, half as long where it cannot."""
LONGEST = 64
"""Operators of one function."""
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Function:
    """Nodes, in order, that make a tensor of bytes of the tensor `source`, element by element."""

    source: Value
    nodes: tuple[Node, ...]


class Tables(QuantizedRewriter):
    """The sweep that finds functions of bytes."""

    def __init__(self, graph: Graph, parent: Tables | None = None) -> None:
        super().__init__(graph, parent)
        self.order: dict[str, int] = parent.order if parent else {}

    def add(self, node: Node) -> Node:
        for value in node.outputs:
            self.order[value.name] = len(self.order)
        return super().add(node)

    def visit(self, node: Node) -> None:
        if node.op != "QuantizeLinear" or not is_byte(node.output.dtype) or not self.rewritten(node):
            self.add(node)

    def rewritten(self, node: Node) -> bool:
        """Adds a node's function of one tensor in front of movement, or one of bytes as a look-up; whether it did."""
        found = list(self.functions(node))
        if any(self.raised(node, function) for function in found):
            return True
        longest = [function for function in found if is_byte(function.source.dtype)][-1:]
        return any(self.looked_up(node, function) for function in longest)

    # What is a function of one tensor.

    def functions(self, node: Node) -> Iterator[Function]:
        """The functions of one tensor that end with the node, the shortest first."""
        inside: dict[str, Node] = {}
        leaves: dict[str, Value] = {}
        pending = node
        while len(inside) < LONGEST and self.is_step(pending) and pending.output.shape == node.output.shape:
            inside[pending.output.name] = pending
            for value in pending.operands:
                if self.array(value) is None:
                    leaves[value.name] = value
            source = next(iter(leaves.values()), node.output)
            if len(leaves) == 1 and source.shape == node.output.shape:
                nodes = sorted(inside.values(), key=lambda n: self.order.get(n.output.name, len(self.order)))
                yield Function(source, tuple(nodes))
            # The leaf that was made last: all that reads it is inside by then.
            last = max(leaves.values(), key=lambda value: self.order.get(value.name, -1), default=None)
            maker = self.producer(last)
            if last is None or maker is None or len(maker.outputs) != 1:
                break
            del leaves[last.name]
            pending = maker

    def is_step(self, node: Node) -> bool:
        """Whether a node computes each element of its result of the same element of its operands."""
        if node.op in CONVERSIONS:
            return node.inputs[1] is not None and self.is_parameter(node.inputs[1])
        known = [array for value in node.operands if (array := self.array(value)) is not None]
        if node.op == "Gather":
            return len(known) == 1 and known[0].shape == (256,) and self.array(node.inputs[0]) is known[0]
        return is_elementwise(node) and all(array.size == 1 for array in known)

    def is_parameter(self, value: Value) -> bool:
        """Whether it is a constant number."""
        array = self.array(value)
        return array is not None and array.size == 1

    def price(self, found: Function) -> int:
        """Scalar operations for one element."""
        total = 0
        for node in found.nodes:
            if node.op == "Gather":
                total += LOOKUP
                continue
            made = self.inference.definition(
                node.op, node.inputs, node.attributes, {}, [value.name for value in node.outputs], node.origin
            )[0]
            if isinstance(made, Tensor) and made.kind != "opaque":
                total += cost(made.at([symbol(f"~{axis}") for axis in range(made.rank)]))
        return total

    # What becomes of it.

    def looked_up(self, node: Node, found: Function) -> bool:
        """Adds a look-up where the function costs more."""
        array = self.table(found) if self.price(found) >= LOOKUP else None
        if array is None:
            return False
        origin = unite(*(inner.origin for inner in found.nodes))
        table = self.constant(array, f"{node.output.name}.table", origin)
        index, stem = found.source, f"{node.output.name}.index"
        if index.dtype != U8:
            index = self.emit("Cast", (index,), {"to": U8}, stem=stem, origin=origin)
        index = self.emit("Cast", (index,), {"to": I32}, stem=stem, origin=origin)
        self.emit("Gather", (table, index), {"axis": 0}, stem="", origin=origin, output=node.output)
        return True

    def table(self, found: Function) -> np.ndarray | None:
        """The results for all bytes, in the order of their bits as a number; None where the reference has none."""
        from onnx.reference import ReferenceEvaluator

        def flat(value: Value) -> Value:
            return Value(value.name, TensorType(value.dtype, (256,)))

        constants: dict[str, Node] = {}
        nodes = []
        for node in found.nodes:
            for value in node.operands:
                array = self.array(value)
                if array is not None and value.name not in constants:
                    shaped = array.reshape(() if array.size == 1 else array.shape)
                    type = TensorType(value.dtype, shaped.shape)
                    constants[value.name] = constant_node(value.name, shaped, type)
            inputs = [
                value if value is None else constants[value.name].output if value.name in constants else flat(value)
                for value in node.inputs
            ]
            nodes.append(replace(node, inputs=tuple(inputs), outputs=(flat(node.output),)))
        graph = Graph("table", (flat(found.source),), nodes[-1].outputs, (*constants.values(), *nodes))
        values = np.arange(256, dtype=np.uint8).view(found.source.dtype.numpy)
        try:
            with np.errstate(all="ignore"):
                (result,) = ReferenceEvaluator(to_onnx(graph)).run(None, {found.source.name: values})
        except Exception as error:  # the reference raises whatever its numpy code meets
            logging.getLogger(__name__).debug("%s has no table: %s", found.nodes[-1].where, error)
            return None
        array = np.ascontiguousarray(result)
        return array if array.shape == (256,) and array.dtype == found.nodes[-1].output.dtype.numpy else None

    def raised(self, node: Node, found: Function) -> bool:
        """Adds the function in front of movement, where that lies between it and what makes the source."""
        mover = self.made_by(found.source, "Reshape", "Transpose")
        if mover is None or not self.is_private(found) or not self.is_made_by_a_kernel(mover):
            return False
        made: dict[Value, Value] = {found.source: mover.operands[0]}
        for inner in found.nodes:
            inputs = [value if value is None else made.get(value) or self.number(value) for value in inner.inputs]
            result = self.emit(
                inner.op, inputs, inner.attributes, stem=f"{inner.output.name}.early", origin=inner.origin
            )  # fmt: skip
            made[inner.output] = result
        self.emit(
            mover.op, (made[node.output], *mover.inputs[1:]), mover.attributes, stem="", origin=mover.origin,
            output=node.output,
        )  # fmt: skip
        return True

    def is_private(self, found: Function) -> bool:
        """Whether nothing else reads what lies between the source and the result, or the source."""
        between = [found.source, *(node.output for node in found.nodes[:-1])]
        inside = {node.output for node in found.nodes}
        return not any(
            value in self.graph.outputs or any(n.outputs[0] not in inside for n in self.graph.users.get(value, ()))
            for value in between
        )

    def is_made_by_a_kernel(self, mover: Node) -> bool:
        """Whether what is moved, by nothing but movement, is computed by a node before, which may take more in."""
        value = mover.operands[0]
        maker = self.producer(value)
        if maker is None or self.readers(value) > 1:
            return False
        operator = REGISTRY.get(maker.op)
        if maker.op in ("Reshape", "Transpose"):
            return self.is_made_by_a_kernel(maker)
        return operator is not None and not operator.movement and maker.op != "Constant"

    def number(self, value: Value) -> Value:
        """A parameter of rank 0, which broadcasts to every shape; a table as it is."""
        return value if value.shape == (256,) else self.scalar_of(value, ())


def is_byte(dtype: DType) -> bool:
    """Whether it is an integer of 8 bits."""
    return dtype.is_integer and dtype.bits == 8
