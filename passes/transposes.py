"""Transposes cancelled, merged and moved to where they cost least: `passes.storage` plans, this pass rewrites."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..ir.dims import Dim
from ..ir.graph import Attribute, Graph, Node, TensorType, Value
from .axes import Attributes, Perm, alike, altered, broadcast_order, carried_operands, compose, is_elementwise, ordered
from .cleanup import without_dead_code
from .pipeline import Pass, register
from .rewriting import Rewriter, until_stable
from .storage import Datum, Storage, plain_order


@register
@dataclass(frozen=True)
class Transposes(Pass):
    """Stores tensors in the orders of axes that leave the least bytes to transpose; layouts of convolutions stay."""

    name = "transposes"

    def run(self, graph: Graph) -> Graph:
        return reordered(graph, choose_layouts=False)


def reordered(graph: Graph, choose_layouts: bool) -> Graph:
    """The graph by the plans of `Storage`, until they gain nothing more."""
    return until_stable(lambda found: without_dead_code(Reordering(found, None, choose_layouts).run()), graph)


class Reordering(Rewriter):
    """Rewrites a graph by the plan of `Storage`; where that gains nothing, only in its regions."""

    def __init__(self, graph: Graph, parent: Reordering | None = None, choose_layouts: bool = False) -> None:
        super().__init__(graph, parent)
        self.choose_layouts: bool = parent.choose_layouts if parent else choose_layouts
        self.plan = Storage(graph, self.choose_layouts)
        self.gains = self.plan.solve()
        self.position = -1
        self.origin: tuple[str, ...] = ()
        self.made: set[str] = set()
        self.stored: dict[Datum, list[tuple[Perm, Value]]] = {}
        self.others: dict[tuple[Value, Perm, tuple[Dim, ...]], Value] = {}
        for value in graph.inputs:
            self.define(value, plain_order(value), value)

    def visit(self, node: Node) -> None:
        self.position += 1
        self.origin = node.origin
        role = self.plan.roles[self.position]
        if not self.gains:
            self.add(node)
        elif role in ("alike", "convolution"):
            order = self.plan.order(self.position)
            attributes = None if order == plain_order(node.outputs[0]) else alike(node, order)
            self.rewrite(node, attributes, order, order)
        elif role == "altered":
            order = self.plan.web_of[node.operands[0]].order
            result = None if order == plain_order(node.operands[0]) else altered(node, order)
            self.rewrite(node, result[0] if result else None, order, result[1] if result else ())
        elif role == "fixed":
            self.rewrite(node, None, (), ())

    def finish(self) -> None:
        for value in self.graph.outputs if self.gains else ():
            found = self.fetch(value, plain_order(value)) if value in self.plan.alias else value
            if found != value:
                self.mapping[value] = found

    def rewrite(self, node: Node, attributes: Attributes | None, order: Perm, result: Perm) -> None:
        """Adds the node with carried operands stored by `order` and results by `result`, or as it is."""
        if attributes is None:
            present = {value: self.fetch(value, plain_order(value)) for value in node.reads if value in self.plan.alias}
            self.add(node.with_inputs(present))
            for result_value in node.outputs:
                plain = plain_order(result_value) if result_value in self.plan.alias else ()
                self.define(result_value, plain, result_value)
            return
        carried = carried_operands(node)
        inputs: list[Value | None] = []
        for place, value in enumerate(node.inputs):
            if value is None:
                inputs.append(None)
            elif place in carried:
                inputs.append(self.fetch(value, order))
            elif is_elementwise(node):
                inputs.append(self.broadcast(value, order))
            else:
                inputs.append(self.fetch(value, plain_order(value)))
        outputs = tuple(self.renamed(value, result) for value in node.outputs)
        self.add(replace(node, inputs=tuple(inputs), outputs=outputs, attributes=attributes))
        for old, new in zip(node.outputs, outputs, strict=True):
            self.define(old, result, new)

    # Values in the orders in which they are wanted.

    def define(self, value: Value, order: Perm, new: Value) -> None:
        """Makes known that `new` holds `value` stored by `order`."""
        self.made.add(new.name)
        if value in self.plan.alias:
            datum, root_order = self.plan.alias[value]
            self.stored.setdefault(datum, []).append((compose(root_order, order), new))

    def renamed(self, value: Value, order: Perm) -> Value:
        """A name and type for `value` stored by `order`: its own where nothing else has that yet."""
        shape = ordered(value.shape, order) if order else value.shape
        if order == plain_order(value) and value.name not in self.made:
            return Value(value.name, TensorType(value.dtype, shape))
        name = self.names.fresh(f"{value.name}.{''.join(map(str, order))}")
        return Value(name, TensorType(value.dtype, shape))

    def fetch(self, value: Value, order: Perm) -> Value:
        """`value` stored by `order`: as it is there already, or by a Reshape or a Transpose of what is there."""
        if value not in self.plan.alias:
            return value if order == plain_order(value) else self.other(value, order, ordered(value.shape, order))
        datum, root_order = self.plan.alias[value]
        wanted = compose(root_order, order)
        there = self.stored[datum]
        for found, holder in there:
            if found == wanted:
                return holder
        output = self.renamed(value, order)
        same = next((holder for found, holder in there if datum.key(found) == datum.key(wanted)), None)
        if same is not None:
            self.emit("Reshape", (same,), reshape_to(output.shape), stem="", origin=self.origin, output=output)
        else:
            found, holder = there[0]
            perm = tuple(found.index(axis) for axis in wanted)
            self.emit("Transpose", (holder,), {"perm": perm}, stem="", origin=self.origin, output=output)
        self.define(value, order, output)
        return output

    def broadcast(self, value: Value, order: Perm) -> Value:
        """An operand of lower rank, so that it broadcasts as before to a result that is stored by `order`."""
        own, shape = broadcast_order(value, order)
        if value not in self.plan.alias:
            return value if shape == value.shape else self.other(value, own, shape)
        found = self.fetch(value, own)
        if found.shape == shape:
            return found
        return self.emit("Reshape", (found,), reshape_to(shape), stem=f"{value.name}.spread", origin=self.origin)

    def other(self, value: Value, order: Perm, shape: tuple[Dim, ...]) -> Value:
        """A constant or a value of a graph around in another order and shape."""
        key = value, order, shape
        if key in self.others:
            return self.others[key]
        array = self.array(value)
        stem = f"{value.name}.{''.join(map(str, order))}"
        if array is not None:
            sizes = [extent for extent in shape if isinstance(extent, int)]
            result = self.constant(np.transpose(array, order).reshape(sizes), stem, self.origin)
        else:
            result = value
            if order != plain_order(value):
                result = self.emit("Transpose", (value,), {"perm": order}, stem=stem, origin=self.origin)
            if result.shape != shape:
                result = self.emit("Reshape", (result,), reshape_to(shape), stem=stem, origin=self.origin)
        self.others[key] = result
        return result


def reshape_to(shape: tuple[Dim, ...]) -> dict[str, Attribute]:
    """The attributes of a canonical Reshape."""
    return {"shape": shape, "allowzero": 1} if 0 in shape else {"shape": shape}
