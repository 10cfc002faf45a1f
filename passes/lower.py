"""Lowering: a fused graph becomes a program of kernel calls over memories."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..ir import scalars as s
from ..ir.dims import Dim, dim_factor, dim_max, product, substitute, symbol, symbols
from ..ir.dtypes import BOOL, I64, DType
from ..ir.errors import UnsupportedError
from ..ir.graph import Graph, Node, TensorType, Value
from ..ir.guards import Guard
from ..ir.infer import Inference
from ..ir.loops import Kernel
from ..ir.ops import REGISTRY
from ..ir.program import ALIGNMENTS, MARK, Assign, Bind, Choose, Memory, Place, Program, Repeat, Run, Step, Steps
from ..ir.scalars import Buffer
from ..ir.target import Target
from ..ir.tensors import Tensor, buffer_tensor
from .access import literal_tensor, view_of
from .bands import lower_pair
from .checks import Checks
from .complex_types import without_complex_types
from .control import lower_loop, lower_scan
from .draws import STATE, advance, has_draws, state_operand
from .literals import Literals, body_of, with_literals
from .narrow_types import without_narrow_types
from .plan import plan_arena
from .regions import BindSymbol, Call, Region, Repeated, Schedule, anchor_tensor
from .rewriting import substitute_graph, symbol_names, type_symbols
from .segments import cut, settle

ALIGNED_PORT = 16
"""Bytes to which runtimes of GPUs align what callers pass: the widest access."""


def lower(
    graph: Graph,
    schedule: Schedule,
    target: Target,
    hints: Mapping[str, int] | None = None,
    tell: Callable[[str, Kernel], None] | None = None,
) -> Program:
    """The program of a fused graph; `schedule` makes the kernels of each region, `hints` are sizes to plan memory for,
    `tell` is given kernels as soon as they are known.

    Raises UnsupportedError, with the node, where no schedule applies.
    """
    # Kernels and programs mark the graph's symbols, so that no name of a loop can be one of theirs.
    names = {name for name in symbol_names(graph) | {x.name for x in graph.symbols()} if not name.startswith(MARK)}
    seen = {x.name: x for value in _values(graph) for x in type_symbols(value.type)}
    lower = {name: seen[name].lower if name in seen else 0 for name in names}
    open_ended = {name: symbol(f"{MARK}{name}", lower[name]) for name in names}
    limits = {name: substitute(x.upper, open_ended) for name, x in seen.items() if x.upper is not None}
    marked = substitute_graph(
        graph, {name: symbol(f"{MARK}{name}", lower[name], limits.get(name)) for name in open_ended}
    )
    return Lowering(marked, schedule, target, tell).program(
        {f"{MARK}{name}": size for name, size in (hints or {}).items()}
    )


def _values(graph: Graph) -> Iterator[Value]:
    """All values of a graph and of its regions."""
    yield from graph.inputs
    for node in graph.nodes:
        yield from node.outputs
        for region in node.regions.values():
            yield from _values(region)


@dataclass
class Lowering:
    """Gathers memories, kernels and steps while it walks a graph and the regions in it."""

    graph: Graph
    schedule: Schedule
    target: Target
    tell: Callable[[str, Kernel], None] | None = None
    inference: Inference = field(default_factory=lambda: Inference(MARK))
    memories: dict[str, Memory] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)
    constants: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    shared: dict[object, Kernel] = field(default_factory=dict)
    count: int = 0
    literals: Literals = field(init=False)
    _arguments: dict[str, Place] = field(default_factory=dict)
    _guards: list[tuple[Node, Guard]] = field(default_factory=list)
    _anchor: tuple[Tensor | None, tuple[Tensor | None, ...]] = (None, ())

    def program(self, hints: Mapping[str, int]) -> Program:
        graph = self.graph
        self.inference.graph(graph)
        self.literals = Literals(graph, self.target)
        self.checks.begin()
        for value in graph.inputs:
            if not isinstance(value.type, TensorType):
                raise UnsupportedError(f"input %{value.name} is a {value.type}; only tensors can be passed")
            self.memories[value.name] = Memory(value.name, value.dtype, product(value.shape), "input")
            self.places[value.name] = Place(value.name)
        results: list[Place] = []
        for position, value in enumerate(graph.outputs):
            if not isinstance(value.type, TensorType):
                raise UnsupportedError(f"output %{value.name} is a {value.type}; only tensors can be returned")
            name = value.name if value.name not in self.memories else f"{value.name}.out{position}"
            self.memories[name] = Memory(name, value.dtype, product(value.shape), "output")
            results.append(Place(name))
        steps = [*self.region(graph, results), *advance(self, graph, 0)]
        self.checks.finish()
        for memory, make in self.literals.memories():
            self.memories[memory.name], self.constants[memory.name] = memory, make
        segments = cut(steps, self.memories)
        self.memories = settle(self.memories, segments)
        plan = plan_arena(self.memories, segments, self.kernels, hints)
        # What makes a constant may hold this object by a closure; it holds the arrays that it needs by itself.
        constants, self.constants, self.arrays = self.constants, {}, {}
        return Program(
            name=graph.name,
            inputs=graph.inputs,
            outputs=graph.outputs,
            results=tuple(place.memory for place in results),
            memories=self.memories,
            segments=segments,
            kernels=self.kernels,
            constants=constants,
            plan=plan,
            assumptions=tuple(self.inference.assumptions),
            checks=tuple(self.checks.texts),
        )

    # Graphs and regions

    def region(self, graph: Graph, results: Sequence[Place]) -> list[Step]:
        """Steps that compute a graph whose inputs have places, its outputs ending up at `results`."""
        views = self._views(graph)
        claimed: dict[str, Place] = {}
        own = {value.name for node in graph.nodes for value in node.outputs}
        for value, place in zip(graph.outputs, results, strict=True):
            root = value.name
            offset: Dim = 0
            while root in views:
                root, step = views[root]
                offset = offset + step
            computed = root in own and root not in self.arrays
            sizes = {
                v.name: product(v.shape) for node in graph.nodes for v in node.outputs if isinstance(v.type, TensorType)
            }
            if computed and offset == 0 and root not in claimed and sizes.get(root) == product(value.shape):
                claimed[root] = place
        steps: list[Step] = []
        self.checks.depth += 1
        together: Node | None = None
        for position, node in enumerate(graph.nodes):
            banded = lower_pair(self, graph, position, claimed) if node is not together else None
            if banded is not None:
                together, both = banded
                steps += both
            elif node is not together:
                made = self._node(node, views, claimed)
                steps += [*made, *self.checks.sizes(node, made)]
        self.checks.depth -= 1
        for value, place in zip(graph.outputs, results, strict=True):
            if self._place(value) != place:
                steps += self.copy(value, place)
        return steps

    def _views(self, graph: Graph) -> dict[str, tuple[str, Dim]]:
        """For each value that is another's memory: that value and the offset in elements."""
        found: dict[str, tuple[str, Dim]] = {}
        for node in graph.nodes:
            operator = REGISTRY.get(node.op)
            if node.op == "Constant":
                array = graph.constant(node.output)
                assert array is not None
                self.arrays[node.output.name] = array
            elif operator is not None and (operator.movement or node.op == "Identity") and len(node.outputs) == 1:
                tensor = self._definition(node, {})[0]
                if tensor.kind != "opaque":
                    view = view_of(tensor.at, tensor.shape)
                    if view is not None and not self.inference.guards:
                        found[node.output.name] = view
        return found

    def _definition(self, node: Node, operands: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        names = [value.name for value in node.outputs]
        found = self.inference.definition(
            node.op, node.inputs, node.attributes, node.regions, names, node.origin, operands
        )
        for tensor in found[: len(node.outputs)]:
            if not isinstance(tensor, Tensor):
                raise UnsupportedError(f"{node.where}: values of type {tensor} are not compiled")
        return found[: len(node.outputs)]  # type: ignore[return-value]

    def _node(self, node: Node, views: Mapping[str, tuple[str, Dim]], claimed: Mapping[str, Place]) -> list[Step]:
        if node.op == "Constant":
            return []
        for value in node.outputs:
            if not isinstance(value.type, TensorType):
                raise UnsupportedError(f"{node.where}: values of type {value.type} are not compiled")
        if len(node.outputs) == 1 and node.output.name in views:
            source, offset = views[node.output.name]
            base = self.place_of(source)
            self.places[node.output.name] = Place(base.memory, base.offset + offset)
            return self._bindings(node)
        for value in node.outputs:
            place = claimed.get(value.name)
            # What a branch or loop makes of a size is known only after it: an output of that size is copied to then.
            late = (
                node.regions and node.op != "Fused" and {s.name for d in value.shape for s in symbols(d)} - self.known
            )
            if place is None or (late and self.memories[place.memory].role == "output"):
                place = self.arena(value.name, value.dtype, product(value.shape))
            self.places[value.name] = place
        if node.op == "If":
            return self._choose(node)
        if node.op == "Loop":
            return lower_loop(self, node)
        if node.op == "Scan":
            return lower_scan(self, node)
        steps = self._bindings(node)
        region, guards = self._region_of(node), tuple(self._guards)
        steps += self.checks.indices(node, region, guards)
        return steps + self.emit(region, [self.places[v.name] for v in node.outputs])

    def _choose(self, node: Node) -> list[Step]:
        results = [self.places[value.name] for value in node.outputs]
        branches: list[Steps] = []
        shapes: list[list[tuple[Dim, ...]]] = []
        for name in ("then_branch", "else_branch"):
            body = node.regions[name]
            steps = self.region(body, results)
            for value, inner in zip(node.outputs, body.outputs, strict=True):
                for outer_dim, inner_dim in zip(value.shape, inner.shape, strict=True):
                    if outer_dim != inner_dim and len(symbols(outer_dim)) == 1:
                        steps.append(Assign(symbols(outer_dim)[0].name, inner_dim))
            branches.append(tuple(steps))
            shapes.append([value.shape for value in body.outputs])
        for position, place in enumerate(results):
            # The sizes of the branches are known before it is known which one runs: room for both.
            size = dim_max(product(shapes[0][position]), product(shapes[1][position]))
            memory = self.memories[place.memory]
            if memory.role == "arena":
                self.memories[place.memory] = replace(memory, size=size)
        condition = node.inputs[0]
        assert condition is not None
        return [Choose(self._place(condition), *branches)]

    def _bindings(self, node: Node) -> list[Step]:
        """Binds the symbols of shape operands whose elements only the run tells, where first used."""
        steps: list[Step] = []
        readers = [node, *(inner for region in node.regions.values() for inner in region.walk())]
        for reader in readers:
            operator = REGISTRY.get(reader.op)
            if operator is None:
                continue
            for position in operator.static_positions(len(reader.inputs)):
                value = reader.inputs[position]
                if value is None or value.name in self.inference.values or value.name in self.arrays:
                    continue
                if reader is not node and value.name not in self.places:
                    continue  # Made inside the region: bound there.
                for name, (source, element) in self.inference.bindings.items():
                    if source == value.name and name not in self._bound:
                        self._bound.add(name)
                        place = self.place_of(source)
                        steps.append(Bind(name, Place(place.memory, place.offset + element), value.dtype, -(1 << 62)))
        return steps

    @cached_property
    def _kinds(self) -> set[str]:
        """Kinds of the element types in the graph that no machine has: narrow ones, complex ones."""
        dtypes = {value.dtype for value in _values(self.graph) if isinstance(value.type, TensorType)}
        return {"complex" if t.kind == "complex" else "narrow" for t in dtypes if t.is_narrow or t.kind == "complex"}

    @cached_property
    def checks(self) -> Checks:
        """The checks of indices and sizes that only the run tells."""
        return Checks(self)

    @property
    def _bound(self) -> set[str]:
        return self.__dict__.setdefault("_bound_symbols", set())  # type: ignore[no-any-return]

    # Memory

    @property
    def known(self) -> set[str]:
        """Symbols that the inputs' shapes bind."""
        return {symbol.name for symbol in self.graph.symbols()}

    def bind(self, value: Value, steps: list[Step]) -> Dim:
        """The run-time integer in a value of one element, bound by a step that is added."""
        name = self.fresh_symbol("".join(c if c.isalnum() else "_" for c in value.name))
        steps.append(Bind(name, self._place(value), value.dtype))
        return symbol(name)

    def fresh_symbol(self, stem: str) -> str:
        """A name for a symbol of the program's own."""
        self.count += 1
        return f"{MARK}{stem}_{self.count}"

    def resize(self, place: Place, size: Dim) -> None:
        """Gives an arena memory room for `size` elements, a limit known before its actual size is."""
        memory = self.memories[place.memory]
        if memory.role == "arena":
            self.memories[place.memory] = replace(memory, size=size)

    def fill_bool(self, place: Place, value: Value | None) -> list[Step]:
        """Steps that write a condition to memory: a value's, or true."""
        if value is not None and value.name not in self.arrays:
            return self.copy(value, place)
        true = value is None or bool(self.arrays[value.name].all())
        self._arguments = {}
        tensor = Tensor((), BOOL, lambda i: s.const(true, BOOL))
        return self.emit(Region("condition", (), ((Buffer("y0", BOOL, 1), tensor),)), [place])

    def arena(self, name: str, dtype: DType, size: Dim) -> Place:
        """A new arena memory; the name is made unique."""
        while name in self.memories:
            self.count += 1
            name = f"{name}.{self.count}"
        self.memories[name] = Memory(name, dtype, size, "arena")
        return Place(name)

    def _place(self, value: Value) -> Place:
        return self.place_of(value.name)

    def place_of(self, name: str) -> Place:
        """Where a value lies; a constant is given memory when it is first asked for."""
        found = self.places.get(name)
        if found is None:
            array = self.arrays[name]  # held alone: with `self` every array would stay until the last one is taken
            found = self.places[name] = self.constant(name, lambda: array, array.dtype)
        return found

    def constant(self, name: str, make: Callable[[], np.ndarray], dtype: np.dtype[np.generic] | None = None) -> Place:
        """Memory for an array that the artifact holds; `make` gives it when the artifact is built."""
        from ..ir.dtypes import of_numpy

        while name in self.memories:
            self.count += 1
            name = f"{name}.{self.count}"
        array = self.arrays.get(name)
        element = of_numpy(dtype) if dtype is not None else of_numpy(make().dtype)
        size = array.size if array is not None else 0
        self.memories[name] = Memory(name, element, size, "constant")
        self.constants[name] = make
        return Place(name)

    # Kernels

    def _region_of(self, node: Node) -> Region:
        """What a schedule needs to know of a node: a fused group, or one that has no group (an opaque operator)."""
        body, member, literals = body_of(node), self.literals.of(node), dict[str, Tensor]()
        if member is not None:
            body, literals = with_literals(body, member)
        ends = node.regions["body"].outputs if node.op == "Fused" else node.outputs
        inputs: list[Tensor] = []
        operands: dict[str, Tensor] = {**literals}
        constants: dict[str, np.ndarray] = {}
        self._arguments, self._guards = {}, []
        inner = {value for item in body for value in item.outputs}
        static = self._static_only(body)
        for value in dict.fromkeys(v for item in body for v in item.operands):
            if value in inner or value in static or not isinstance(value.type, TensorType) or value.name in literals:
                continue
            array = self.arrays.get(value.name)
            if array is not None and array.size == 1 and value.dtype.kind not in ("complex", "string"):
                operands[value.name] = literal_tensor(value, array)
                continue
            tensor = buffer_tensor(f"x{len(inputs)}", value.dtype, value.shape)
            if array is not None:
                constants[f"x{len(inputs)}"] = array
            inputs.append(tensor)
            operands[value.name] = tensor
            self._arguments[f"x{len(inputs) - 1}"] = self._lazy_place(value)
        if has_draws(body):
            inputs.append(state_operand(self, name := f"x{len(inputs)}", self.checks.depth))
            self._arguments[name] = Place(STATE)
        anchors = [item for item in body if item.op in REGISTRY and REGISTRY[item.op].heavy]
        anchor = anchors[0] if anchors else None

        def define(with_anchor: bool) -> list[tuple[Buffer, Tensor]]:
            env = dict(operands)
            self._anchor = (None, ())
            for item in body:
                found = self._definition(item, env)
                self._guards += [(item, guard) for guard in self.inference.guards]
                if item is anchor and with_anchor:
                    reads = tuple(None if v is None else env.get(v.name) for v in item.inputs)
                    self._anchor = (found[0], reads)
                    found = (anchor_tensor(found[0].shape, found[0]),)
                env.update({value.name: t for value, t in zip(item.outputs, found, strict=False)})
            return [(Buffer(f"y{i}", v.dtype, product(v.shape)), env[v.name]) for i, v in enumerate(ends)]

        outputs = define(anchor is not None)
        anchor_output, reads = self._anchor
        if anchor is None and len(body) == 1:
            anchor = body[0]
            reads = tuple(None if v is None else operands.get(v.name) for v in anchor.inputs)

        def compose(name: str, *given: Tensor) -> tuple[Tensor, ...]:
            assert anchor is not None
            outside = {v.name: tensor for v, tensor in zip(anchor.inputs, reads, strict=True) if v and tensor}
            return self.inference.compose(anchor.regions[name], given, outside)

        names = [re.sub(r"\W", "", item.op.split(".")[-1]).lower() for item in body if item.op != "Constant"]
        stem = "_".join(names[:4]) + (f"_and_{len(names) - 4}_more" if len(names) > 4 else "")
        return Region(
            name=stem,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            anchor=anchor,
            operands=reads,
            anchor_output=anchor_output,
            constants=constants,
            origin=node.origin,
            static=self._static_values(anchor),
            inline=lambda: define(False),
            alignments=self._alignments(node),
            compose=compose,
            kernels=self.shared,
            member=None if member is None else member.number,
        )

    def _alignments(self, node: Node) -> dict[str, int]:
        """Of the operands and results of a node's region, the bytes to which their places are aligned."""
        aligned = ALIGNMENTS[self.target.kind]
        places = dict(self._arguments)
        places.update(
            {f"y{i}": self.places[value.name] for i, value in enumerate(node.outputs) if value.name in self.places}
        )
        found: dict[str, int] = {}
        for name, place in places.items():
            if place.memory.startswith("?"):
                found[name] = aligned
                continue
            memory = self.memories[place.memory]
            base = ALIGNED_PORT if memory.role in ("input", "output") else aligned
            found[name] = math.gcd(base, dim_factor(place.offset) * memory.dtype.bytes)
        return found

    def _static_values(self, anchor: Node | None) -> dict[str, tuple[Any, ...]]:
        """What the anchor's operands (or attributes in their place) say that decides shapes, by operand."""
        operator = None if anchor is None else REGISTRY.get(anchor.op)
        if anchor is None or operator is None:
            return {}
        found: dict[str, Any] = {name: anchor.attributes[name] for name in operator.static if name in anchor.attributes}
        for position, name in operator.static_positions(len(anchor.inputs)).items():
            value = anchor.inputs[position]
            if value is not None:
                found[name] = self.inference.static(value)
        return found

    def argument(self, name: str) -> Place:
        """Where an operand of the region that was made last lies."""
        return self._resolved(self._arguments[name])

    def _lazy_place(self, value: Value) -> Place:
        return self.places.get(value.name) or Place(f"?{value.name}")

    def _static_only(self, body: Sequence[Node]) -> set[Value]:
        """Operands of the nodes that only decide shapes: no kernel reads them."""
        static: set[Value] = set()
        data: set[Value] = set()
        for item in body:
            operator = REGISTRY.get(item.op)
            positions = operator.static_positions(len(item.inputs)) if operator is not None else {}
            for position, value in enumerate(item.inputs):
                if value is not None:
                    (static if position in positions else data).add(value)
        return static - data

    def emit(self, region: Region, results: Sequence[Place]) -> list[Step]:
        """The kernel calls of a region."""
        arguments = dict(self._arguments)
        arguments.update({f"y{i}": place for i, place in enumerate(results)})
        lowered = self.schedule(region, self.target)
        if lowered is None:
            names = ", ".join(region.origin)
            raise UnsupportedError(f"{region.name} ({names}): the target {self.target.name} has no schedule for it")
        for buffer in lowered.workspaces:
            arguments[buffer.name] = self.arena(f"{region.name}.{buffer.name}", buffer.dtype, buffer.size)
        for name, make in lowered.packed.items():
            pairs = (pair for c in lowered.kernel_calls for pair in zip(c.kernel.parameters, c.arguments, strict=True))
            read = next((parameter for parameter, argument in pairs if argument == name), None)
            if read is None:
                continue  # no kernel reads it: of a transposed convolution, outputs that no tap reaches
            while (unique := f"{region.name}.{name}.{self.count}") in self.memories:
                self.count += 1
            self.memories[unique] = Memory(unique, read.dtype, read.size, "constant")
            self.constants[unique] = make
            arguments[name] = Place(unique)
        steps: list[Step] = []
        for call in lowered.calls:
            if isinstance(call, BindSymbol):
                buffer_dtype = self.memories[arguments[call.buffer].memory].dtype
                base = arguments[call.buffer]
                steps.append(Bind(call.symbol, Place(base.memory, base.offset + call.element), buffer_dtype))
            elif isinstance(call, Repeated):
                index = self.fresh_symbol(call.index)
                at = {call.index: symbol(index, 0, call.trips - 1)}
                body = tuple(self.run(inner, arguments, region, at) for inner in call.calls)
                steps.append(Repeat(index, call.trips, None, body))
            else:
                steps.append(self.run(call, arguments, region))
        return steps

    def run(
        self, call: Call, arguments: Mapping[str, Place], region: Region, values: Mapping[str, Dim] | None = None
    ) -> Run:
        places = tuple(self._resolved(arguments[name]) for name in call.arguments)
        sizes = tuple(substitute(size, values or {}) for size in call.sizes)
        kernel = call.kernel
        if region.member is not None:
            kernel, tables = self.literals.finished(kernel, region.member)
            places += tables
        if "complex" in self._kinds:
            kernel = without_complex_types(kernel)
        if self._kinds:
            kernel = without_narrow_types(kernel)
        return Run(self._shared(kernel), places, sizes, region.origin)

    def _resolved(self, place: Place) -> Place:
        return self.place_of(place.memory[1:]) if place.memory.startswith("?") else place

    def _shared(self, kernel: Kernel) -> str:
        """The name under which the kernel is known; equal kernels have one."""
        digest = kernel.digest
        found = self.digests.get(digest)
        if found is None:
            found = self.digests[digest] = f"{kernel.name}_{digest}"
            self.kernels[found] = replace(kernel, name=found)
            if self.tell is not None:
                self.tell(found, self.kernels[found])
        return found

    def in_place(self, region: Region, place: Place) -> list[Step]:
        """The kernel calls of a region whose only operand x0 is its result too."""
        self._arguments = {"x0": place}
        return self.emit(region, [place])

    def copy(self, value: Value, place: Place, source: Place | None = None) -> list[Step]:
        """Steps that copy a value to another place."""
        count = product(value.shape)
        x = buffer_tensor("x0", value.dtype, (count,))
        y = Buffer("y0", value.dtype, count)
        same = Tensor((count,), value.dtype, lambda i: x.at(i), "map", (x,))
        self._arguments = {"x0": source or self._place(value)}
        return self.emit(Region("copy", (x,), ((y, same),)), [place])

    def store_index(self, index: Dim, place: Place) -> list[Step]:
        """Steps that write a size or loop index as an i64 in memory."""
        y = Buffer("y0", I64, 1)
        tensor = Tensor((), I64, lambda i: s.index(index))
        self._arguments = {}
        return self.emit(Region("index", (), ((y, tensor),)), [place])
