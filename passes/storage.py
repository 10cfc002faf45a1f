"""In which order of axes each tensor is stored, chosen for the whole graph so that the least bytes are transposed.

Nodes that can work in any order (`passes.axes`) and share values form a web, stored in one order. Values that
transposes lead to from one root are one datum: what is paid for is each order beyond the first in which a datum is
wanted. Convolutions choose their layout. Descent over these choices, from the graph as it is and from all convolutions
channels-last, gives the plan; it is taken only where it costs less than the graph as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..ir.dims import Dim, evaluate, symbols
from ..ir.graph import Graph, Node, TensorType, Value
from ..ir.ops import REGISTRY
from .axes import (
    Perm,
    alike,
    altered,
    broadcast_order,
    carried_operands,
    compose,
    image_orders,
    inverse,
    is_elementwise,
    is_image_operator,
    may_be_alike,
    may_be_altered,
    source_order,
)

GUESSED_SIZE = 32
"""What a symbolic size is taken for when bytes are compared."""
BYTES_PER_PRODUCT = 4
"""A multiplication of a channels-first convolution costs as much as transposing so many bytes: schedules are for
channels-last only, generic loops take about 1 ns for each product, a transpose 0.2 ns for each byte."""
SWEEPS = 8
MOST_CANDIDATES = 5
"""Rounds of descent, and orders that are tried for a web in each: both suffice by far for any network seen."""


def estimate(dims: Iterable[Dim]) -> int:
    """The product of some dims, symbols guessed."""
    total = 1
    for dim in dims:
        if not isinstance(dim, int):
            try:
                dim = max(1, evaluate(dim, {symbol.name: GUESSED_SIZE for symbol in symbols(dim)}))
            except (KeyError, ZeroDivisionError):
                dim = GUESSED_SIZE
        total *= dim
    return total


class Datum:
    """Values that are transposes of one root; it is known in which orders of the root's axes others make or read it."""

    def __init__(self, root: Value) -> None:
        self.root = root
        self.bytes = estimate(root.shape) * root.dtype.bytes
        self.wanted: Counter[Perm] = Counter()
        self._cost: int | None = 0
        self._long = None if 1 not in root.shape else frozenset(i for i, d in enumerate(root.shape) if d != 1)

    def key(self, order: Perm) -> Perm:
        """What orders that differ by axes of extent 1 only have in common: a Reshape leads from one to the other."""
        return order if self._long is None else tuple(axis for axis in order if axis in self._long)

    def count(self, order: Perm, number: int) -> None:
        """One more, or one less, who wants that order."""
        self.wanted[order] += number
        if not self.wanted[order]:
            del self.wanted[order]
        self._cost = None

    @property
    def cost(self) -> int:
        """Bytes for each order beyond the first, and one for a Reshape."""
        if self._cost is None:
            different = len(self.wanted) if self._long is None else len({self.key(order) for order in self.wanted})
            self._cost = self.bytes * (different - 1) + len(self.wanted) - different if self.wanted else 0
        return self._cost


@dataclass(eq=False)
class Web:
    """Nodes (by position) that work in one order, `order`, and the values that they share; or one convolution.

    `around` are the nodes besides that read its values in whatever order they come.
    """

    order: Perm
    values: list[Value] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    around: list[int] = field(default_factory=list)
    penalties: dict[Perm, int] = field(default_factory=dict)
    """For a convolution: the orders that it has, and what each costs besides."""

    @property
    def plain(self) -> Perm:
        return tuple(range(len(self.order)))


class Storage:
    """The plan for one graph; convolutions choose their layout where `choose_layouts`."""

    def __init__(self, graph: Graph, choose_layouts: bool) -> None:
        self.graph = graph
        self.alias: dict[Value, tuple[Datum, Perm]] = {}
        self.roles: list[str] = []
        self.web_of: dict[Value, Web] = {}
        self.web_at: dict[int, Web] = {}
        self._ports: dict[tuple[int, Perm], tuple[tuple[Datum, Perm], ...]] = {}
        self._collect(choose_layouts)
        for position in range(len(graph.nodes)):
            self._count(position, 1)
        for value in (*graph.inputs, *graph.outputs):
            if value in self.alias:
                datum, order = self.alias[value]
                datum.count(order, 1)

    # What there is: data, webs, and what each node is to them.

    def _collect(self, choose_layouts: bool) -> None:
        leader: dict[Value, Value] = {}

        def find(value: Value) -> Value:
            while leader.setdefault(value, value) != value:
                leader[value] = value = leader[leader[value]]
            return value

        for value in self.graph.inputs:
            self._new_datum(value)
        for node in self.graph.nodes:
            if node.op == "Transpose" and "perm" in node.attributes and node.operands[0] in self.alias:
                datum, order = self.alias[node.operands[0]]
                self.alias[node.output] = datum, compose(order, node.attributes["perm"])  # type: ignore[arg-type]
                self.roles.append("transpose")
                continue
            if node.op != "Constant":
                for value in node.outputs:
                    self._new_datum(value)
            self.roles.append(self._role(node, choose_layouts))
            if self.roles[-1] == "alike":
                for value in self._shared(node):
                    leader[find(value)] = find(node.outputs[0])
        webs: dict[Value, Web] = {}
        for value in self.alias:
            web = self.web_of[value] = webs.setdefault(find(value), Web(plain_order(value)))
            web.values.append(value)
        for position, (node, role) in enumerate(zip(self.graph.nodes, self.roles, strict=True)):
            if role == "alike":
                self.web_at[position] = self.web_of[node.outputs[0]]
                self.web_at[position].nodes.append(position)
            elif role == "altered":
                self.web_of[node.operands[0]].around.append(position)
            elif role == "convolution":
                self.web_at[position] = _convolution(node, position)
        found = dict.fromkeys([*self.web_at.values(), *(web for web in webs.values() if web.around)])
        self.webs = sorted(found, key=lambda web: min(*web.nodes[:1], *web.around[:1], len(self.roles)))

    def _new_datum(self, value: Value) -> None:
        if isinstance(value.type, TensorType) and value.tensor.rank > 1:
            self.alias[value] = Datum(value), plain_order(value)

    def _role(self, node: Node, choose_layouts: bool) -> str:
        if not node.operands or node.regions or not all(isinstance(v.type, TensorType) for v in node.operands):
            return "fixed"
        if node.op in REGISTRY and REGISTRY[node.op].heavy and is_image_operator(node):
            return "convolution" if choose_layouts and node.operands[0] in self.alias else "fixed"
        if all(value in self.alias for value in node.outputs) and may_be_alike(node):
            return (
                "alike" if any(value in self.alias for value in self._shared(node)[: -len(node.outputs)]) else "fixed"
            )
        return "altered" if may_be_altered(node) and node.operands[0] in self.alias else "fixed"

    def _shared(self, node: Node) -> list[Value]:
        """The operands and results of a node that are stored in one order."""
        carried = [node.inputs[position] for position in carried_operands(node)]
        return [value for value in carried if value is not None and value in self.alias] + list(node.outputs)

    # What nodes want.

    def order(self, position: int) -> Perm:
        """The order in which a node works."""
        node, web = self.graph.nodes[position], self.web_at[position]
        fits = web.order == web.plain or web.penalties or alike(node, web.order) is not None
        return web.order if fits else web.plain

    def ports(self, position: int) -> tuple[tuple[Datum, Perm], ...]:
        """The data that a node reads and makes, and in which orders of the roots' axes."""
        web = self._governing(position)
        key = position, web.order if web is not None else ()
        if key not in self._ports:
            wanted = self._wanted(position, web)
            self._ports[key] = tuple(
                (datum, compose(root_order, order))
                for value, order in wanted.items()
                for datum, root_order in (self.alias[value],)
            )
        return self._ports[key]

    def _governing(self, position: int) -> Web | None:
        """The web whose order decides how a node works."""
        if self.roles[position] == "altered":
            return self.web_of[self.graph.nodes[position].operands[0]]
        return self.web_at.get(position)

    def _wanted(self, position: int, web: Web | None) -> dict[Value, Perm]:
        """The values that a node reads and makes, and in which orders of their axes."""
        node, role = self.graph.nodes[position], self.roles[position]
        if role == "transpose":
            return {}
        found: dict[Value, Perm] = {}
        if role in ("alike", "convolution"):
            order = self.order(position)
            carried = carried_operands(node)
            for place, value in enumerate(node.inputs):
                if value is not None and value in self.alias and place in carried:
                    found[value] = order
                elif value is not None and value in self.alias and is_elementwise(node):
                    found[value] = broadcast_order(value, order)[0]
            found.update(dict.fromkeys(node.outputs, order))
        elif role == "altered" and web is not None and (result := altered(node, web.order)) is not None:
            found = {node.operands[0]: web.order, node.output: result[1]}
        for value in (*node.reads, *node.outputs):
            found.setdefault(value, plain_order(value) if value in self.alias else ())
        return {value: order for value, order in found.items() if value in self.alias}

    def _count(self, position: int, number: int) -> None:
        for datum, order in self.ports(position):
            datum.count(order, number)

    # The choice.

    def solve(self) -> bool:
        """Chooses the orders; whether that costs less than the graph as it is."""
        present = self.cost()
        self._descend()
        descended, orders = self.cost(), [web.order for web in self.webs]
        self._propagate()
        self._descend()
        if self.cost() >= descended:
            for web, order in zip(self.webs, orders, strict=True):
                self._set(web, order)
        return self.cost() < present

    def cost(self) -> int:
        """Bytes to transpose, and what convolutions cost besides."""
        data = {id(datum): datum for datum, _ in self.alias.values()}
        return sum(datum.cost for datum in data.values()) + sum(web.penalties.get(web.order, 0) for web in self.webs)

    def _propagate(self) -> None:
        """Orders chosen one web after the other along the graph, looking only at what has been chosen before: where
        several webs must change for any to gain, descent from here finds it."""
        for web in self.webs:
            self._count_all(web, -1)
            web.order = web.plain
            if web.penalties:
                web.order = min(web.penalties, key=lambda order: web.penalties[order])
                self._count_all(web, 1)
        for web in self.webs:
            if not web.penalties:
                self._count_all(web, 1)
                self._improve(web, eager=True)

    def _descend(self) -> None:
        for sweep in range(SWEEPS):
            changes = [self._improve(web) for web in (self.webs if sweep % 2 else reversed(self.webs))]
            if not any(changes):
                break

    def _improve(self, web: Web, eager: bool = False) -> bool:
        """Sets the order of least cost; among equal ones that of the graph as it is, or another one where `eager`."""
        before = web.order
        if not eager and before == web.plain and not web.penalties and not self._cost_around(web):
            return False
        candidates = self._candidates(web)
        if len(candidates) == 1:
            return False
        costs = {order: self._set(web, order) for order in candidates}
        best = min(candidates, key=lambda order: (costs[order], (order == web.plain) == eager, order != before))
        self._set(web, best)
        return best != before

    def _candidates(self, web: Web) -> list[Perm]:
        """The orders to try: the present one, and those in which others make or read the values."""
        if web.penalties:
            return list(web.penalties)
        found: Counter[Perm] = Counter({web.plain: 0, web.order: 0})
        for value in web.values:
            datum, root_order = self.alias[value]
            back = inverse(root_order)
            for order in datum.wanted:
                found[compose(back, order)] += datum.bytes
        for position in web.around:
            result = self.graph.nodes[position].outputs[0]
            if result not in self.alias:
                continue
            datum, root_order = self.alias[result]
            back = inverse(root_order)
            for order in datum.wanted:
                source = source_order(self.graph.nodes[position], compose(back, order))
                if source is not None:
                    found[source] += datum.bytes
        return list(dict.fromkeys([*(order for order, _ in found.most_common(MOST_CANDIDATES)), web.plain]))

    def _set(self, web: Web, order: Perm) -> int:
        """Sets the order of a web; the cost of all that touches it."""
        if order != web.order:
            self._count_all(web, -1)
            web.order = order
            self._count_all(web, 1)
        return self._cost_around(web)

    def _count_all(self, web: Web, number: int) -> None:
        for position in (*web.nodes, *web.around):
            self._count(position, number)

    def _cost_around(self, web: Web) -> int:
        touched = {datum for position in (*web.nodes, *web.around) for datum, _ in self.ports(position)}
        return sum(datum.cost for datum in touched) + web.penalties.get(web.order, 0)


def plain_order(value: Value) -> Perm:
    """The order of the axes as they are."""
    return tuple(range(value.tensor.rank))


def _convolution(node: Node, position: int) -> Web:
    rank = node.operands[0].tensor.rank
    plain = tuple(range(rank))
    filters = node.operands[3 if node.op == "QLinearConv" else 1].shape
    images = node.operands[0] if node.op == "ConvTranspose" else node.output
    products = estimate(images.shape) * estimate(filters[1:]) * BYTES_PER_PRODUCT
    orders = image_orders(node)
    penalties = {order: 0 if "layout" in attributes else products for order, attributes in orders.items()}
    return Web(plain, [], [position], [], penalties)
