"""What the kernels of a program must move and compute at least: by sizes, loops and anchors, not by measuring."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ...ir import loops as k
from ...ir import scalars as s
from ...ir.dims import Dim, Sum, evaluate, product
from ...ir.graph import Graph, Node, Value
from ...ir.intrinsics import INTRINSICS, WARP
from ...ir.loops import Kernel
from ...ir.ops import REGISTRY
from ...ir.ops.contraction import einsum_terms
from ...ir.program import Program, Run
from ...ir.scalars import Scalar

Sizes = Mapping[str, int]
_MATRIX_STEPS = {f"mma_m16n8k{extent}": 2 * 16 * 8 * extent for extent in (8, 16, 32)}
"""Operations of a matrix multiply-accumulate of a whole warp."""


@dataclass(frozen=True)
class Work:
    """One call of a kernel: the ONNX nodes it was made of, the bytes of all that it reads and writes, each counted once
    however often it is read, and the floating-point operations that its anchor (a product or convolution) is defined
    by, 0 where it has none."""

    kernel: str
    origin: tuple[str, ...]
    read: int
    written: int
    flops: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


def work_of(program: Program, graph: Graph) -> list[Work]:
    """Every call of a program whose sizes are all fixed, in order; `graph` is what the program was lowered from.

    What an anchor computes is shared by the kernels of its group as they do arithmetic. KeyError names a symbol that
    only the run binds.
    """
    due: Counter[tuple[str, ...]] = Counter()
    for origin, anchor in _anchors(graph.nodes):
        due[origin] += flops_of(anchor)
    calls = [(run, Traffic.of(program.kernels[run.kernel], sizes)) for run, sizes in _runs(program)]
    done: Counter[tuple[str, ...]] = Counter()
    for run, moved in calls:
        done[run.origin] += moved.operations
    shares = (due[run.origin] * moved.operations // max(done[run.origin], 1) for run, moved in calls)
    return [
        Work(run.kernel, run.origin, moved.read, moved.written, flops)
        for (run, moved), flops in zip(calls, shares, strict=True)
    ]


def _runs(program: Program) -> Iterator[tuple[Run, dict[str, int]]]:
    """The calls of kernels, with the values of the kernels' sizes."""
    for step in (step for segment in program.segments for step in segment):
        if not isinstance(step, Run):
            raise KeyError("what runs is decided by the run itself")
        names = program.kernels[step.kernel].sizes
        yield step, {name: evaluate(size, {}) for name, size in zip(names, step.sizes, strict=True)}


# Bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes of its parameters that a kernel reads and writes, and its floating-point additions and multiplications
    (those of tiles that overhang included).

    Of each parameter as many elements count as there are loads (or stores) in all iterations, at most all it has: a
    kernel that gathers rows of a table reads those rows.
    """

    read: int
    written: int
    operations: int

    @staticmethod
    def of(kernel: Kernel, sizes: Sizes) -> Traffic:
        """Of a kernel with these values of its sizes."""
        counter = _Counter(sizes)
        counter.block(kernel.body, 1)
        room = [(b.name, evaluate(b.size, sizes), b.dtype.bytes) for b in kernel.parameters]
        read = sum(int(min(size, counter.loads[name])) * width for name, size, width in room)
        written = sum(int(min(size, counter.stores[name])) * width for name, size, width in room)
        return Traffic(read, written, int(counter.operations))


class _Counter:
    """Walks statements and counts what they do, multiplied by how often the loops around them run (at most: conditions
    are taken to hold, and a loop of which that is not known runs without end)."""

    def __init__(self, sizes: Sizes) -> None:
        self.loads: Counter[str] = Counter()
        self.stores: Counter[str] = Counter()
        self.operations = 0.0
        # Loops whose extents depend on the indices of others (triangles) are counted at the ends of those.
        self._ends = dict(sizes), dict(sizes)
        self._sources: dict[str, tuple[str, ...]] = {}

    def block(self, block: k.Block, times: float) -> None:
        for statement in block:
            self._statement(statement, times)

    def _statement(self, st: k.Statement, times: float) -> None:
        if isinstance(st, k.For):
            extent = max(self._values(st.extent))
            trips = math.ceil(extent / st.step) if extent < math.inf else extent
            for known, index in zip(self._ends, (0, max(trips - 1, 0) * st.step), strict=True):
                known[st.index] = index  # type: ignore[assignment]  # without end is a float
            self.block(st.body, _product(times, trips))
        elif isinstance(st, k.While):
            self._see(st.condition, math.inf)
            self.block(st.body, math.inf)
        elif isinstance(st, k.If):
            self._see(st.condition, times)
            self.block(st.then, times)
            self.block(st.otherwise, times)
        elif isinstance(st, k.Let):
            values = (math.inf, math.inf) if isinstance(st.value, Scalar) else self._values(st.value)
            for known, value in zip(self._ends, values, strict=True):
                known[st.name] = value  # type: ignore[assignment]
            self._see(st.value, times)
        elif isinstance(st, k.Alias):
            sources = (st.source, *([st.otherwise] if st.otherwise is not None else []))
            self._sources[st.buffer.name] = tuple(name for b in sources for name in self._roots(b.name))
            self._see(st.condition, times)
        elif isinstance(st, k.Store):
            self._count(self.stores, st.buffer.name, st.value.lanes, times)
            for part in (st.value, st.offset, st.predicate):
                self._see(part, times)
        elif isinstance(st, k.Define):
            self._see(st.value, times)
        elif isinstance(st, k.Intrinsic):
            self._intrinsic(st, times)

    def _intrinsic(self, st: k.Intrinsic, times: float) -> None:
        operands = INTRINSICS[st.name]
        moved = int(st.name.rpartition("_")[2]) if st.name.startswith("copy_async_") and operands.reads else 0
        for place, reads, writes in zip(st.places, operands.reads, operands.writes, strict=True):
            scale = moved // place.buffer.dtype.bytes if moved else 1
            self._count(self.loads, place.buffer.name, reads * scale, times)
            self._count(self.stores, place.buffer.name, writes * scale, times)
            self._see(place.offset, times)
        for value in st.values:
            self._see(value, times)
        self._compute(_MATRIX_STEPS.get(st.name.rpartition("_")[0], 0) / WARP, times)

    def _see(self, item: Scalar | Dim | None, times: float) -> None:
        """Counts the loads and the arithmetic of an expression."""
        if item is None or isinstance(item, int):
            return
        for part in s.walk(s.index(item) if isinstance(item, Sum) else item):
            if isinstance(part, s.Load):
                self._count(self.loads, part.buffer.name, part.lanes, times)
            elif part.dtype.is_float and isinstance(part, s.Fma | s.Binary):
                self._compute(part.lanes * (2 if isinstance(part, s.Fma) else 1), times)

    def _count(self, table: Counter[str], name: str, elements: int, times: float) -> None:
        for root in self._roots(name):
            table[root] += _product(elements, times)  # type: ignore[assignment]

    def _compute(self, operations: float, times: float) -> None:
        # What a loop without a known end does counts once: it is only compared with what others do.
        self.operations += operations * (times if times < math.inf else 1)

    def _roots(self, name: str) -> tuple[str, ...]:
        return self._sources.get(name, (name,))

    def _values(self, dim: Dim) -> tuple[float, ...]:
        """What a dim is where all loops begin and where all end; without end where that is not known."""
        found: list[float] = []
        for known in self._ends:
            try:
                found.append(max(0, evaluate(dim, known)))
            except (KeyError, OverflowError, ValueError):
                found.append(math.inf)
        return tuple(math.inf if math.isnan(value) else value for value in found)


def _product(a: float, b: float) -> float:
    """Of numbers that may be without end; nothing so often is nothing."""
    return a * b if a and b else 0


# Floating-point operations


def _anchors(nodes: Iterable[Node]) -> Iterator[tuple[tuple[str, ...], Node]]:
    """The products and convolutions of nodes and of the groups that these are, with the origin of the whole group."""
    for node in nodes:
        inner = node.regions["body"].nodes if node.op == "Fused" else (node,)
        yield from ((node.origin, item) for item in inner if item.op in REGISTRY and REGISTRY[item.op].heavy)


def flops_of(node: Node) -> int:
    """The additions and multiplications that a product or convolution of known sizes is defined by."""
    name, operands = node.op.rpartition(".")[2], node.inputs
    if name in ("MatMul", "MatMulInteger", "QLinearMatMul"):
        return 2 * _size(node.output) * _extents(operands[0])[-1]
    if name in ("Gemm", "FusedMatMul"):
        shape = _extents(operands[0])
        # FusedMatMul's transposed batch has its summed axis elsewhere, first of all.
        summed = 0 if node.attributes.get("transBatchA") else -2
        return 2 * _size(node.output) * shape[summed if node.attributes.get("transA") and len(shape) > 1 else -1]
    if name in ("Conv", "FusedConv", "ConvInteger", "QLinearConv"):
        return 2 * _size(node.output) * math.prod(_extents(operands[3 if name == "QLinearConv" else 1])[1:])
    if name == "ConvTranspose":
        return 2 * _size(operands[0]) * math.prod(_extents(operands[1])[1:])
    if name == "Einsum":
        shapes = [_extents(value) for value in operands]
        terms, _ = einsum_terms(str(node.attributes["equation"]), [len(shape) for shape in shapes])
        extents: Counter[str] = Counter()
        for term, shape in zip(terms, shapes, strict=True):
            extents |= Counter(dict(zip(term, shape, strict=True)))
        return len(shapes) * math.prod(extents.values())
    if name == "Attention":
        keys, width = _extents(operands[2])[-2], _extents(operands[0])[-1]
        *_, channels = _extents(node.output)
        return 2 * (_size(node.output) // max(channels, 1)) * keys * (width + channels)
    return 0


def _extents(value: Value | None) -> list[int]:
    assert value is not None
    return [evaluate(dim, {}) for dim in value.shape]


def _size(value: Value | None) -> int:
    assert value is not None
    return evaluate(product(value.shape), {})
