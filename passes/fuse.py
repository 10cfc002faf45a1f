"""Operator fusion: nodes that one loop nest can compute become one `Fused` node with them as its body.

What may join is decided by how definitions read their operands (`passes.access`), never by operator names: chains of
elementwise operators over one domain; reductions over whole axes with what feeds them and what is broadcast back;
elementwise epilogues of contractions; and movement that only re-indexes, which its readers take in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ..ir.dims import Dim, product
from ..ir.graph import Graph, Node, TensorType, Value, unite
from ..ir.infer import Inference
from ..ir.ops import REGISTRY
from .access import Access, AccessAnalysis, view_of
from .pipeline import Pass, register

# A producer whose element costs more than this is not computed again for each element that broadcasting makes of it.
CHEAP = 8
NESTED_GATHERS = 2
"""Gathers in a row that one kernel makes: an expression of the index stands in it at each place where it is used, so
what a kernel computes doubles with each."""
_GATHERS = ("Gather", "GatherElements", "GatherND")


@dataclass(eq=False)
class _Group:
    """Nodes fused so far. `domain` is the shape its loops run over; `rows` its kept axes where it reduces."""

    members: list[int]
    kind: str
    domain: tuple[Dim, ...]
    rows: tuple[bool, ...] = ()
    clones: list[Node] = field(default_factory=list)

    @property
    def row_shape(self) -> tuple[Dim, ...]:
        return tuple(d for d, row in zip(self.domain, self.rows, strict=True) if row and d != 1)


def _same_rows(one: _Group, other: _Group) -> bool:
    """Whether two groups reduce the same rows: a row of one must not be computed for every row of the other."""
    return _reduced(one.domain, one.rows) == _reduced(other.domain, other.rows)


def _reduced(domain: tuple[Dim, ...], rows: tuple[bool, ...]) -> list[tuple[Dim, bool]]:
    """The axes of a domain, and which of them rows are kept along: extents alone do not tell in a square."""
    return [(d, row) for d, row in zip(domain, rows, strict=True) if d != 1]


def _squeezed(shape: Iterable[Dim]) -> tuple[Dim, ...]:
    return tuple(d for d in shape if d != 1)


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """Groups nodes into kernels; every computing node ends up in a `Fused` node, views and control flow stay."""

    name = "fuse"
    max_inputs: int = 24
    max_members: int = 64

    def run(self, graph: Graph) -> Graph:
        return _Fusion(graph, self.max_inputs, self.max_members).run()


class _Fusion:
    def __init__(self, graph: Graph, max_inputs: int, max_members: int, inference: Inference | None = None) -> None:
        self.graph, self.max_inputs, self.max_members = graph, max_inputs, max_members
        self.inference = inference or Inference()
        if inference is None:
            self.inference.graph(graph)
        self.analysis = AccessAnalysis(self.inference)
        self.nodes = list(graph.nodes)
        self.index = {value: i for i, node in enumerate(self.nodes) for value in node.outputs}
        self.group_of: dict[int, _Group] = {}
        self.access: dict[int, Access] = {}
        self.outputs = set(graph.outputs)
        self.waiting: set[int] = set()
        """Nodes that make reals of bytes, until a reader takes them in: bytes are what lies between two kernels."""

    def run(self) -> Graph:
        for i, node in enumerate(self.nodes):
            if node.op == "Constant" or node.op == "Fused":
                continue
            if node.regions:
                node = self.nodes[i] = self._inside(node)
            access = self.access[i] = self.analysis(node)
            if access.kind == "opaque" or self._is_view(node):
                continue
            self._place(i, access)
        for i in sorted(self.waiting):
            value = self.nodes[i].output
            if value in self.outputs or not all(self._is_taken_in(i, n) for n in self.graph.users.get(value, ())):
                self._join_producers(i)
        return self._emit()

    def _inside(self, node: Node) -> Node:
        """Fuses within the bodies of control flow."""
        regions = {
            name: _Fusion(region, self.max_inputs, self.max_members, self.inference).run()
            for name, region in node.regions.items()
        }
        return replace(node, regions=regions)

    def _is_view(self, node: Node) -> bool:
        """Whether the node's result is its operand's memory as it lies."""
        operator = REGISTRY.get(node.op)
        if len(node.outputs) != 1 or not node.operands or operator is None:
            return False
        if not operator.movement and node.op != "Identity":
            return False
        if self.graph.constant(node.operands[0]) is not None:
            return False
        found = self.inference.definition(
            node.op, node.inputs, node.attributes, node.regions, [node.output.name], node.origin
        )[0]
        if isinstance(found, TensorType) or getattr(found, "kind", "opaque") == "opaque":
            return False
        return view_of(found.at, found.shape) is not None  # type: ignore[union-attr]

    # Placing a node into the group of one of its producers, or into a new one.

    def _place(self, i: int, access: Access) -> None:
        node = self.nodes[i]
        group = _Group([i], access.kind, access.domain, access.rows)
        self.group_of[i] = group
        self._absorb_movement(i, access, group)
        if self._widens(node, access) or self._turns_an_image(node, access):
            self.waiting.add(i)
        elif access.kind not in ("heavy", "window"):
            self._join_producers(i)

    def _join_producers(self, i: int) -> None:
        """Merges the group of a node with those of its producers, where they can be one kernel."""
        for producer in sorted(set(self._producers(self.nodes[i])), reverse=True):
            other = self.group_of.get(producer)
            current = self.group_of[i]
            if other is None or other is current:
                continue
            access = self.access[i]
            if self._compatible(current, access, other, producer, i) and self._acyclic(current, other):
                self._merge(other, current, access)
                if producer in self.waiting:
                    self.waiting.remove(producer)
                    if self.nodes[producer].output.shape == self.nodes[i].outputs[0].shape:
                        self._join_producers(producer)

    def _producers(self, node: Node) -> list[int]:
        return [
            self.index[value] for value in node.operands if value in self.index and self.index[value] in self.group_of
        ]

    def _single_use(self, value: Value) -> bool:
        return len(self.graph.users.get(value, ())) == 1 and value not in self.outputs

    def _widens(self, node: Node, access: Access) -> bool:
        """Whether the node makes a number of more bits of each integer of 8 or less, as DequantizeLinear does."""
        source = node.operands[0] if node.operands and access.kind == "map" and len(node.outputs) == 1 else None
        if source is None or not source.dtype.is_integer or source.dtype.bits > 8 or node.output.dtype.bits <= 8:
            return False
        return source.shape == node.output.shape and access.aligned(source) and access.cost <= CHEAP

    def _turns_an_image(self, node: Node, access: Access) -> bool:
        """Whether the node stores an image with other axes last for a convolution, which can read it as it was."""
        operator = REGISTRY.get(node.op)
        if operator is None or not operator.movement or not access.affine or not self._single_use(node.outputs[0]):
            return False
        (reader,) = self.graph.users[node.outputs[0]]
        into = REGISTRY.get(reader.op)
        turned = not _is_permutation(access)
        return into is not None and into.spatial and into.heavy and reader.inputs[0] == node.outputs[0] and turned

    def _is_repeated(self, node: Node, access: Access) -> bool:
        """Whether each of several readers makes these reals anew."""
        return self._widens(node, access) and not self._single_use(node.output)

    def _is_taken_in(self, i: int, reader: Node) -> bool:
        """Whether the reader makes the node's result itself."""
        group = self.group_of.get(self.index[reader.outputs[0]]) if reader.outputs else None
        return group is not None and self.nodes[i] in group.clones

    def _absorb_movement(self, i: int, access: Access, group: _Group) -> None:
        """Clones into its reader movement that only re-indexes, and what makes reals of bytes for several readers: the
        tensor need not exist for this one."""
        wanted = list(self.nodes[i].operands)
        while wanted:
            value = wanted.pop()
            producer = self.index.get(value)
            if producer is None or self.access.get(producer) is None or producer not in self.group_of:
                continue
            source = self.access[producer]
            node = self.nodes[producer]
            operator = REGISTRY.get(node.op)
            if operator is None or source.kind != "map":
                continue
            if operator.movement and not source.affine:
                continue
            taken = self._is_repeated(node, source) or (access.kind == "window" and self._widens(node, source))
            if not operator.movement and (access.kind == "heavy" or not taken):
                continue
            if len(self.group_of[producer].members) > 1 or not node.operands:
                continue
            if any(clone is node for clone in group.clones) or self._binds_inside([producer, *group.members]):
                continue
            if access.kind == "heavy" and not _keeps_last_axis(source):
                continue
            group.clones.append(node)
            wanted += node.operands

    def _compatible(self, group: _Group, access: Access, other: _Group, producer: int, i: int) -> bool:
        node = self.nodes[i]
        if len(group.members) + len(other.members) > self.max_members:
            return False
        if "map" not in (group.kind, other.kind) and (group.kind, other.kind) != ("rows", "rows"):
            return False
        if len(self._inputs(group.members + other.members)) > self.max_inputs:
            return False
        if (group.kind, other.kind) == ("rows", "rows") and not _same_rows(group, other):
            return False
        if self._nested_gathers(group.members + other.members) > NESTED_GATHERS:
            return False
        shared = [value for value in node.operands if self.index.get(value) == producer]
        if self._binds_inside(group.members + other.members, group.clones + other.clones):
            return False
        if any(value in node.operands for clone in group.clones for value in clone.outputs if value in shared):
            return False
        shape = node.outputs[0].shape
        if other.kind == "heavy":
            return self._epilogue_fits(access, other, shared, shape)
        if access.kind == "rows":
            return self._rows_fit(access, other, shared)
        return self._map_fits(access, other, shared, shape)

    def _epilogue_fits(self, access: Access, other: _Group, shared: list[Value], shape: tuple[Dim, ...]) -> bool:
        if access.kind != "map":
            return False
        same = shape == other.domain
        if same and all(access.aligned(value) for value in shared):
            return True
        # A permutation that leaves the last axis alone is only another place to store to.
        return (
            len(other.members) >= 1
            and all(self._single_use(value) for value in shared)
            and all(value.shape == other.domain for value in shared)
            and access.affine
            and _is_permutation(access)
        )

    def _rows_fit(self, access: Access, other: _Group, shared: list[Value]) -> bool:
        domain = access.domain
        if other.kind == "window":
            return False
        for value in shared:
            if value.shape != domain and _squeezed(value.shape) != access_rows(access):
                return False
        if other.kind == "rows":
            return _reduced(other.domain, other.rows) == _reduced(domain, access.rows)
        return other.domain == domain

    def _map_fits(self, access: Access, other: _Group, shared: list[Value], shape: tuple[Dim, ...]) -> bool:
        if other.kind == "window":
            return all(access.aligned(v) and v.shape == shape for v in shared) and shape == other.domain
        if other.kind == "rows":
            full, rows = _squeezed(other.domain), other.row_shape
            if _squeezed(shape) not in (full, rows) or not all(access.aligned(v) for v in shared):
                # Adding or dropping axes of extent 1 keeps every element in its place.
                return all(self._only_ones_change(access, v) for v in shared) and _squeezed(shape) in (full, rows)
            return True
        if shape == other.domain and all(access.aligned(v) and v.shape == shape for v in shared):
            return True
        single = all(self._single_use(value) for value in shared)
        producer_cost = max(self.access[m].cost for m in other.members)
        if not single:
            return False
        grows = product(shape) != product(other.domain)
        return producer_cost <= CHEAP or not grows

    def _only_ones_change(self, access: Access, value: Value) -> bool:
        where = access.reads.get(value.name, [])
        own = [d for d in access_indices(access) if d != 0]
        return bool(where) and all([d for d in found if d != 0] == own for found in where)

    def _merge(self, other: _Group, group: _Group, access: Access) -> None:
        """Moves the members of `group` into `other`; what reduces or contracts decides the domain of both."""
        if other.kind == "map" and group.kind != "map":
            other.kind, other.domain, other.rows = group.kind, group.domain, group.rows
        elif group.kind == "map" and access.kind == "map" and other.kind in ("map", "heavy", "window"):
            other.domain = self.nodes[group.members[-1]].outputs[0].shape
        other.members = sorted(other.members + group.members)
        other.clones += [clone for clone in group.clones if clone not in other.clones]
        for member in group.members:
            self.group_of[member] = other

    def _binds_inside(self, members: list[int], clones: Iterable[Node] = ()) -> bool:
        """Whether a node decides a shape by a value that another member computes: it must be known before."""
        nodes = [*(self.nodes[m] for m in members), *clones]
        computed = {value for node in nodes for value in node.outputs}
        for node in nodes:
            operator = REGISTRY[node.op]
            for position in operator.static_positions(len(node.inputs)):
                value = node.inputs[position]
                if value in computed and value is not None and value.name not in self.inference.values:
                    return True
        return False

    def _nested_gathers(self, members: list[int]) -> int:
        """How many gathers in a row read at places that the one before gave, all within these nodes."""
        depths: dict[Value, int] = {}
        for member in sorted(members):
            node = self.nodes[member]
            found = [0 if value is None else depths.get(value, 0) for value in node.inputs]
            if node.op in _GATHERS:
                found[1] += 1
            depths.update(dict.fromkeys(node.outputs, max(found, default=0)))
        return max(depths.values(), default=0)

    def _inputs(self, members: list[int]) -> set[Value]:
        inside = {value for m in members for value in self.nodes[m].outputs}
        return {value for m in members for value in self.nodes[m].operands if value not in inside}

    def _acyclic(self, a: _Group, b: _Group) -> bool:
        """Whether merging two groups leaves no path from the pair out and back in."""
        together = {id(a), id(b)}
        lowest = min(a.members + b.members)
        stack = [self.index[v] for group in (a, b) for v in self._group_reads(group) if v in self.index]
        first_level = True
        seen: set[object] = set()
        stack = [p for p in stack if id(self.group_of.get(p)) not in together]
        while stack:
            p = stack.pop()
            group = self.group_of.get(p)
            key: object = id(group) if group is not None else ("node", p)
            if key in seen:
                continue
            seen.add(key)
            if group is not None and id(group) in together:
                return False
            reads = self._group_reads(group) if group is not None else set(self.nodes[p].reads)
            stack += [self.index[v] for v in reads if v in self.index and self._reachable_from(self.index[v], lowest)]
            first_level = False
        del first_level
        return True

    def _reachable_from(self, p: int, lowest: int) -> bool:
        group = self.group_of.get(p)
        return (max(group.members) if group is not None else p) >= lowest

    def _group_reads(self, group: _Group) -> set[Value]:
        inside = {value for m in group.members for value in self.nodes[m].outputs}
        inside |= {value for clone in group.clones for value in clone.outputs}
        reads = {value for m in group.members for value in self.nodes[m].reads}
        reads |= {value for clone in group.clones for value in clone.operands}
        return reads - inside

    # Writing the groups down.

    def _emit(self) -> Graph:
        needed_outside = self._live_values()
        units: list[tuple[list[int], Node]] = []
        done: set[int] = set()
        for i, node in enumerate(self.nodes):
            group = self.group_of.get(i)
            if group is None:
                units.append(([i], node))
            elif id(group) not in done:
                done.add(id(group))
                fused = self._fused_node(group, needed_outside)
                if fused is not None:
                    units.append((group.members, fused))
        return replace(self.graph, nodes=tuple(_ordered(units)))

    def _live_values(self) -> set[Value]:
        """Values that some group reads from outside itself, or that leave the graph."""
        live = set(self.outputs)
        groups: dict[int, _Group] = {id(g): g for g in self.group_of.values()}
        pending = True
        # A movement node whose every reader cloned it is dead; so is what only it read.
        while pending:
            pending = False
            found = set(self.outputs)
            for i, node in enumerate(self.nodes):
                if i not in self.group_of:
                    found |= set(node.reads)
            for group in groups.values():
                if any(v in live for m in group.members for v in self.nodes[m].outputs) or not pending:
                    found |= self._group_reads(group)
            found_groups = {
                key: g for key, g in groups.items() if any(v in found for m in g.members for v in self.nodes[m].outputs)
            }
            pending = len(found_groups) != len(groups)
            groups, live = found_groups, found
        return live

    def _fused_node(self, group: _Group, live: set[Value]) -> Node | None:
        nodes = [*group.clones, *(self.nodes[m] for m in group.members)]
        nodes.sort(key=lambda node: self.index[node.outputs[0]])
        defined = [value for m in group.members for value in self.nodes[m].outputs]
        outputs = tuple(value for value in defined if value in live)
        if not outputs:
            return None
        nodes = _needed(nodes, outputs)
        # Inside, every value has a name of its own, so that no name is defined twice.
        inner = {value: Value(f"{value.name}.inner", value.type) for node in nodes for value in node.outputs}
        body = tuple(replace(node.with_inputs(inner), outputs=tuple(inner[v] for v in node.outputs)) for node in nodes)
        region = Graph("body", (), tuple(inner[v] for v in outputs), body)
        return Node(
            "Fused",
            region.captures(),
            outputs,
            {"kind": group.kind},
            {"body": region},
            unite(*(node.origin for node in nodes)),
        )


def access_rows(access: Access) -> tuple[Dim, ...]:
    """The extents of the kept axes, those of 1 left out."""
    return tuple(d for d, row in zip(access.domain, access.rows, strict=True) if row and d != 1)


def access_indices(access: Access) -> tuple[Dim, ...]:
    from .access import output_indices

    return output_indices(access.node.outputs[0].shape)


def _keeps_last_axis(access: Access) -> bool:
    """Re-indexing that reads with a fixed stride along every axis, which contractions can do in place."""
    return access.affine


def _is_permutation(access: Access) -> bool:
    """Whether the node only permutes axes and leaves the last one where it is."""
    own = access_indices(access)
    for where in access.reads.values():
        for found in where:
            if sorted(map(str, found)) != sorted(map(str, own)) or not found or found[-1] != own[-1]:
                return False
    return len(access.reads) == 1


def _needed(nodes: list[Node], outputs: tuple[Value, ...]) -> list[Node]:
    wanted = set(outputs)
    kept: list[Node] = []
    for node in reversed(nodes):
        if any(value in wanted for value in node.outputs):
            kept.append(node)
            wanted |= set(node.operands)
    return kept[::-1]


def _ordered(units: list[tuple[list[int], Node]]) -> list[Node]:
    """A topological order of the units, close to the original one."""
    producer = {value: position for position, (_, node) in enumerate(units) for value in node.outputs}
    visited: set[int] = set()
    result: list[Node] = []
    for start in sorted(range(len(units)), key=lambda position: units[position][0][-1]):
        stack = [(start, False)]
        while stack:
            position, expanded = stack.pop()
            if expanded:
                result.append(units[position][1])
                continue
            if position in visited:
                continue
            visited.add(position)
            stack.append((position, True))
            for value in units[position][1].reads:
                if value in producer and producer[value] not in visited:
                    stack.append((producer[value], False))
    return result
