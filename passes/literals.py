"""Kernels that differ in a few numbers alone become one kernel, which reads these from a table.

What quantization made of a model has a scale and a zero point for every tensor. As literals they would make the kernels
of twelve equal layers twelve kernels, to be scheduled and compiled each. Here nodes are grouped whose bodies are alike
but for such numbers; where a number differs within a group it is a `scalars.Varying` while kernels are made: a literal,
known to every analysis, of as many values as the group has nodes. What is computed from literals alone stays one. The
finished kernel reads each from a table, of which every node has its row: one broadcast from memory, as of a literal.

Numbers stay in the code where all nodes of a group agree on them, and where their value chooses a form of the code:
only the operands in FREE may differ, and then neither in sign nor in whether they are 0, 1 or half the range of bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..ir import loops
from ..ir import scalars as s
from ..ir.dims import Dim
from ..ir.dtypes import F32, I8, I16, I32, U8, U16, DType
from ..ir.graph import Graph, Node, Value
from ..ir.loops import Alias, Block, For, If, Kernel, Statement, Store, While
from ..ir.ops import REGISTRY
from ..ir.program import MARK, Memory, Place
from ..ir.scalars import Buffer, Rewriter, Scalar
from ..ir.target import Target
from ..ir.tensors import Indices, Tensor
from .rounding_steps import round_in_steps
from .turned_tiles import turn_tiles
from .vectorize import Vectors, vectorize

FREE: Mapping[str, tuple[int, ...]] = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "Add": (0, 1),
    "Mul": (0, 1),
    "MatMulInteger": (2,),
}
"""Operands, by position, whose numbers no schedule asks for: they are read where elements are computed, or go into what
sums of products start with."""
FREE_BESIDE_DATA: Mapping[str, tuple[int, ...]] = {"MatMulInteger": (3,)}
"""Such operands where the one two positions before is no constant: by zero points of weights these are packed."""
TABLES = F32, I32
"""The types of tables, and of what is read from them; narrower integers are wide in the second."""
HALF = 128
"""The zero point that is 0 when the bytes of a product change their sign."""
MANY = 16
"""Vectors of sums from which on no registers are left for literals."""
NAMES = {F32: "literals", I32: "whole_literals"}


def scheduled(kernel: Kernel, target: Target) -> Kernel:
    """A kernel with explicit lanes, its roundings in steps."""
    return round_in_steps(vectorize(turn_tiles(kernel, target.vector_bits), Vectors.of(target)), target.fma)


@dataclass(frozen=True)
class Member:
    """A node of a group: its number there, and the literals of its body by (node, operand)."""

    number: int
    operators: tuple[str, ...]
    literals: Mapping[tuple[int, int], Scalar]


class Literals:
    """The groups of a graph, and the tables of its program."""

    def __init__(self, graph: Graph, target: Target) -> None:
        self.target = target
        self.members: dict[str, Member] = {}
        self.rows: dict[DType, list[s.Number]] = {dtype: [] for dtype in TABLES}
        self._finished: dict[int, tuple[Kernel, Kernel, dict[DType, list[tuple[s.Number, ...]]]]] = {}
        self._places: dict[tuple[DType, tuple[s.Number, ...]], Place] = {}
        if target.kind == "cpu":
            self._group(graph)

    # Groups

    def _group(self, graph: Graph) -> None:
        groups: dict[object, list[tuple[Node, list[tuple[int, int]], list[np.ndarray]]]] = {}
        for owner, node in _nodes(graph):
            found = _pattern(owner, node)
            if found is not None:
                key, where, numbers = found
                groups.setdefault(key, []).append((node, where, numbers))
        for members in groups.values():
            first, places, _ = members[0]
            literals: dict[tuple[int, int], Scalar] = {}
            for (number, position), found in zip(places, zip(*(m[2] for m in members), strict=True), strict=True):
                value = body_of(first)[number].inputs[position]
                assert value is not None
                literal = s.varying([item.item() for item in found], value.dtype)
                if isinstance(literal, s.Varying):
                    literals[number, position] = literal
            if literals:
                for number, (node, _, _) in enumerate(members):
                    operators = tuple(item.op for item in body_of(node))
                    self.members[node.outputs[0].name] = Member(number, operators, literals)

    def of(self, node: Node) -> Member | None:
        """A node's place in its group, where it has one."""
        found = self.members.get(node.outputs[0].name) if node.outputs else None
        return found if found is not None and found.operators == tuple(item.op for item in body_of(node)) else None

    # Tables

    def finished(self, kernel: Kernel, member: int) -> tuple[Kernel, tuple[Place, ...]]:
        """A kernel that reads its literals from tables, and where those of a member of its group lie."""
        known = self._finished.get(id(kernel))
        if known is None:
            known = self._finished[id(kernel)] = (kernel, *_with_tables(kernel, self.target))
        _, result, columns = known
        return result, tuple(self._row(dtype, [values[member] for values in found]) for dtype, found in columns.items())

    def _row(self, dtype: DType, numbers: Sequence[s.Number]) -> Place:
        key = dtype, tuple(numbers)
        if key not in self._places:
            self._places[key] = Place(f"{MARK}{NAMES[dtype]}", len(self.rows[dtype]))
            self.rows[dtype] += numbers
        return self._places[key]

    def memories(self) -> Iterator[tuple[Memory, Callable[[], np.ndarray]]]:
        """The tables, when all kernels are finished."""
        for dtype, rows in self.rows.items():
            if rows:
                make = partial(np.array, rows, dtype.numpy)
                yield Memory(f"{MARK}{NAMES[dtype]}", dtype, len(rows), "constant"), make


def body_of(node: Node) -> tuple[Node, ...]:
    """The nodes that a kernel computes together."""
    return node.regions["body"].nodes if node.op == "Fused" else (node,)


def literal_operand(literal: Scalar, shape: tuple[Dim, ...]) -> Tensor:
    """A literal as an operand of one element."""

    def element(indices: Indices) -> Scalar:
        return literal

    return Tensor(shape, literal.dtype, element, "map")


def with_literals(body: Sequence[Node], member: Member) -> tuple[tuple[Node, ...], dict[str, Tensor]]:
    """A body whose literals have names of their own, and these as operands."""
    operands: dict[str, Tensor] = {}
    nodes = list(body)
    for (number, position), literal in member.literals.items():
        inputs = list(nodes[number].inputs)
        old = inputs[position]
        assert old is not None
        inputs[position] = Value(f"{MARK}literal.{number}.{position}", old.type)
        operands[f"{MARK}literal.{number}.{position}"] = literal_operand(literal, old.shape)
        nodes[number] = replace(nodes[number], inputs=tuple(inputs))
    return tuple(nodes), operands


def _nodes(graph: Graph) -> Iterator[tuple[Graph, Node]]:
    """What becomes kernels, with the graph that it is a node of."""
    for node in graph.nodes:
        if node.op == "Fused" or not node.regions:
            yield graph, node
        else:
            for region in node.regions.values():
                yield from _nodes(region)


def _pattern(graph: Graph, node: Node) -> tuple[object, list[tuple[int, int]], list[np.ndarray]] | None:
    """What a node has in common with others of its group; where in its body the free literals are, and which."""
    body = body_of(node)
    if not any(item.op in FREE for item in body) or any(item.regions for item in body):
        return None
    names: dict[Value, int] = {}
    where: list[tuple[int, int]] = []
    numbers: list[np.ndarray] = []
    key: list[object] = [node.op]
    for number, item in enumerate(body):
        static = REGISTRY[item.op].static_positions(len(item.inputs)) if item.op in REGISTRY else {}
        key += [item.op, repr(sorted((name, str(value)) for name, value in item.attributes.items()))]
        for position, value in enumerate(item.inputs):
            array = None if value is None else graph.constant(value)
            if value is None or array is None:
                key.append(None if value is None else (names.setdefault(value, len(names)), str(value.type)))
            elif array.size == 1 and position not in static:
                only = array.reshape(-1)[0]
                if _is_free(graph, item, position, value.dtype):
                    where.append((number, position))
                    numbers.append(only)
                    plain = only == 1 if value.dtype == F32 else item.op in FREE_BESIDE_DATA and abs(int(only)) == HALF
                    key.append((str(value.type), float(np.sign(only)), bool(plain), bool(np.isfinite(only))))
                else:
                    key.append((str(value.type), only.tobytes()))
            else:
                key.append((str(value.type), array.tobytes() if position in static else None))
        key.append([(names.setdefault(value, len(names)), str(value.type)) for value in item.outputs])
    return (repr(key), where, numbers) if where else None


def _is_free(graph: Graph, node: Node, position: int, dtype: DType) -> bool:
    if dtype not in (*TABLES, I8, U8, I16, U16):
        return False
    if position in FREE.get(node.op, ()):
        return True
    if position not in FREE_BESIDE_DATA.get(node.op, ()):
        return False
    data = node.inputs[position - 2]
    return data is not None and graph.constant(data) is None


def _with_tables(kernel: Kernel, target: Target) -> tuple[Kernel, dict[DType, list[tuple[s.Number, ...]]]]:
    """A kernel, and which literals it reads from each table, in order."""
    columns: dict[DType, dict[tuple[s.Number, ...], int]] = {}

    def collect(node: Scalar) -> Scalar | None:
        if isinstance(node, s.Varying):
            found = columns.setdefault(_table(node), {})
            found.setdefault(node.values, len(found))
        return None

    if not any(isinstance(part, s.Varying) for part in loops.parts(kernel.body)):
        return kernel, {}
    kernel = scheduled(kernel, target)
    loops.rebuild(kernel.body, Rewriter(collect))
    buffers = {dtype: Buffer(NAMES[dtype], dtype, len(found)) for dtype, found in columns.items()}

    def read(node: Scalar) -> Scalar | None:
        if not isinstance(node, s.Varying):
            return None
        dtype = _table(node)
        return s.cast(s.load(buffers[dtype], columns[dtype][node.values]), node.dtype)

    body = loops.rebuild(kernel.body, Rewriter(read))
    if _has_many_registers(body):
        body = _read_at_stores(body, {buffer.name: buffer for buffer in buffers.values()})
    result = replace(kernel, parameters=(*kernel.parameters, *buffers.values()), body=body)
    return result, {dtype: list(found) for dtype, found in columns.items()}


def _has_many_registers(body: Block) -> bool:
    """Whether a kernel fills the registers with sums, so that what is kept beside them is spilled: 64 bytes are loaded
    then in the place of 4, at half the rate."""
    sums = (statement.buffer for statement in loops.walk(body) if isinstance(statement, loops.Alloc))
    return any(isinstance(b.size, int) and b.size >= MANY for b in sums if b.space == "register" and b.lanes > 1)


def _read_at_stores(body: Block, tables: Mapping[str, Buffer]) -> Block:
    """A block whose stores read the tables where they stand."""
    result: list[Statement] = []
    for statement in body:
        if isinstance(statement, For | While):
            statement = replace(statement, body=_read_at_stores(statement.body, tables))
        elif isinstance(statement, If):
            branches = (_read_at_stores(block, tables) for block in (statement.then, statement.otherwise))
            statement = If(statement.condition, *branches)
        elif isinstance(statement, Store) and statement.buffer.space != "register":
            loads = [node for node in s.walk(statement.value, into_dims=False) if isinstance(node, s.Load)]
            read = {node.buffer.name for node in loads} & tables.keys()
            here = {name: replace(tables[name], name=f"{name}_here") for name in sorted(read)}
            result += [Alias(buffer, tables[name], 0, fresh=True) for name, buffer in here.items()]
            if here:
                statement = replace(statement, value=_Renamed(here)(statement.value))
        result.append(statement)
    return tuple(result)


class _Renamed(Rewriter):
    """Loads from other buffers."""

    def __init__(self, buffers: Mapping[str, Buffer]) -> None:
        super().__init__()
        self.buffers = buffers

    def rebuild(self, scalar: Scalar) -> Scalar:
        result = super().rebuild(scalar)
        known = isinstance(result, s.Load) and result.buffer.name in self.buffers
        return replace(result, buffer=self.buffers[result.buffer.name]) if known else result  # type: ignore


def _table(literal: s.Varying) -> DType:
    return F32 if literal.dtype == F32 else I32
