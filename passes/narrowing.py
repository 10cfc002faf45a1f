"""Which f32 tensors of a fused graph may lie in memory in 16 bits: what reads them and what makes them decides.

Kernels compute in f32 whatever lies in memory, so that all that counts is what happens to a tensor between two of them.
Operators declare which operands must not be rounded (`precise`: angles, coordinates, what is rounded to whole numbers)
and which are multiplied by instructions for 16 bits (`products`). Whatever makes integers or truth values of floats
compares or counts them: it wants them as they are. Three kinds of tensors are found by their origin:
  - side computations, which depend on sizes, indices and masks alone: positions, tables of angles, attention masks;
  - values that a large constant brings in, beyond the narrow type's range or so large that what is added to them is
    lost: -1e4, -1e9 or the least f32 in a mask;
  - squares and other results that soon leave the range (declared as `precise` results), and what is made of them alone.
They stay f32 unless products are all that is formed of them. Where sums may be wide, so do sums of two values that
depend on data, and what is added, if they are no factors of products: such as the residual of a transformer, which each
layer would round once more. A logarithm shows small magnitudes as well as large ones:
the spectrum that it is taken of, which the first products of a model make by sums that cancel, is computed in f32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from ..ir.dtypes import BOOL, F32, DType
from ..ir.graph import Constant, Graph, Node, TensorType, Value
from ..ir.infer import Inference
from ..ir.ops import REGISTRY
from ..ir.ops.declare import SPECTRUM, Operator
from ..ir.scalars import Scalar, const
from ..ir.symbolic import evaluate_scalar
from ..ir.tensors import Tensor
from .access import output_indices
from .nests import all_reductions

PRODUCT, PRECISE, PLAIN = "product", "precise", "plain"
"""How a value is read: as a factor of a sum of products, where it must not be rounded, otherwise."""

STAGES = 2
"""Stages of products, other operators between them, that a spectrum may take: of frames, then of bands."""

LARGE = 1024.0
"""A magnitude above which numbers of 16 bits are a whole one apart, or more."""

USUAL = (-64.0, 1.0, 64.0)
"""Stand-ins for data, from which the reach of a pointwise operator with a large constant is told."""

Place: TypeAlias = "tuple[Scope, str]"
Use: TypeAlias = "str | int | Place"
"""PRECISE, PLAIN, the `id` of a node of which the value is a factor, or a moved form of the value."""


@dataclass
class Facts:
    """Settings, and which places are one memory (a tensor and its views)."""

    dtype: DType
    large: int
    wide_sums: bool = False
    same: dict[Place, Place] = field(default_factory=dict)
    members: dict[Place, list[Place]] = field(default_factory=dict)
    decided: dict[Place, bool] = field(default_factory=dict)
    narrowing: set[int] = field(default_factory=set)

    def root(self, place: Place) -> Place:
        while place in self.same:
            place = self.same[place]
        return place

    def unite(self, a: Place, b: Place) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self.same[b] = a
            self.members.setdefault(a, [a]).extend(self.members.pop(b, [b]))


@dataclass(frozen=True)
class Origin:
    """What is known of a value by what made it; `reach` bounds one that may be large.

    `stage` counts the stages of products behind it; `changed` says that other operators came after the last one.
    """

    side: bool = False
    precise: bool = False
    reach: tuple[float, float] | None = None
    stage: int = 0
    changed: bool = False

    @property
    def delicate(self) -> bool:
        return self.side or self.precise or self.reach is not None


class Scope:
    """A graph, or a region: who reads its f32 values, and their origins.

    The values of a region that is `computed` by one kernel (the body of a fused group) are not stored in memory.
    """

    def __init__(self, graph: Graph, facts: Facts, parent: Scope | None = None, computed: bool = False) -> None:
        self.graph, self.facts, self.parent = graph, facts, parent
        self.children: dict[tuple[str, str], Scope] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.uses: dict[str, list[Use]] = {}
        self.sources: dict[str, list[Place]] = {}
        self.products: dict[str, int] = {}
        self.derived: dict[str, list[Place]] = {}
        self.counted: set[str] = set()
        self.summed: set[str] = set()
        self.kept: set[str] = set()
        self.origins: dict[str, Origin | None] = {}
        self.stored: set[str] = set()
        self.fixed: set[str] = set()
        if computed:
            for value in filter(is_f32, graph.inputs):
                self._define(value, Origin())
            for node in graph.nodes:
                self._node(node)
            return
        for value in graph.inputs:
            self._store(value, fixed=True, origin=Origin(stage=0 if parent is None else STAGES + 1))
        for node in graph.nodes:
            self._visit(node)
        for value in graph.outputs:
            if is_f32(value):
                self._use(value, PLAIN)
                if value.name in self.stored:
                    self.fixed.add(value.name)

    # What the rewrite asks.

    def is_narrow(self, name: str) -> bool:
        """Whether the f32 value of this name is stored in the narrow type."""
        place = self.owner(name), name
        root = self.facts.root(place)
        found = self.facts.decided.get(root)
        if found is None:
            found = self.facts.decided[root] = self._decided(root)
        return found

    def needs_copy(self, name: str) -> bool:
        """Whether the value, stored as f32, is also a factor of products here."""
        return name not in self.constants and not self.is_narrow(name) and PRODUCT in self._kinds(name, False)

    def narrows(self, node: Node) -> bool:
        """Whether the node multiplies narrow operands."""
        return id(node) in self.facts.narrowing

    def owner(self, name: str) -> Scope:
        """The graph that defines a name, this one or one around."""
        scope = self
        while name not in scope.uses and scope.parent is not None:
            scope = scope.parent
        return scope

    # Gathering.

    def _store(self, value: Value, fixed: bool = False, origin: Origin | None = None) -> None:
        if is_f32(value):
            self._define(value, origin)
            self.stored.add(value.name)
            if fixed:
                self.fixed.add(value.name)

    def _define(self, value: Value, origin: Origin | None) -> None:
        self.uses[value.name] = []
        self.origins[value.name] = origin

    def _use(self, value: Value, kind: Use) -> None:
        self.owner(value.name).uses.setdefault(value.name, []).append(kind)

    def _visit(self, node: Node) -> None:
        if node.op == "Constant":
            handle = node.attributes["value"]
            assert isinstance(handle, Constant)
            self._store(node.output)
            self.constants[node.output.name] = handle.array
        elif node.op == "Fused":
            body = Scope(node.regions["body"], self.facts, self, computed=True)
            for outer, value in zip(node.outputs, body.graph.outputs, strict=True):
                if is_f32(outer):
                    self._store(outer, origin=body.origin(value))
                    self.sources[outer.name] = [(body.owner(value.name), value.name)]
                    body._use(value, (self, outer.name))
        elif is_control(node):
            for value in filter(is_f32, node.operands):
                self._use(value, PRECISE)
            for name, region in node.regions.items():
                self.children[node.outputs[0].name, name] = Scope(region, self.facts, self)
            for value in node.outputs:
                self._store(value, fixed=True, origin=Origin(stage=STAGES + 1))
        else:
            self._node(node, alone=not moves(node))
            made = result_types(with_narrow_types(node, self.facts.dtype)) if self.narrows(node) else ()
            native = {value.name for value, dtype in zip(node.outputs, made, strict=bool(made)) if dtype != F32}
            for value in filter(is_f32, node.outputs):
                self.stored.add(value.name)
                if moves(node):
                    for source in factors(node):
                        if source.name not in self.owner(source.name).constants:
                            self.facts.unite((self.owner(source.name), source.name), (self, value.name))
                elif value.name not in native:
                    self.fixed.add(value.name)

    def _node(self, node: Node, alone: bool = False) -> None:
        """A node that computes, in a group or alone: then what is not multiplied is read as it is."""
        operator = REGISTRY[node.op]
        count = len(node.inputs)
        static = operator.static_positions(count)
        products = operator.positions(operator.products, count) if self._can_narrow(node, operator) else ()
        exact = alone or counts(node)
        precise = range(count) if exact else operator.positions(operator.precise, count)
        origin = self._origin(node, operator)
        for output in filter(is_f32, node.outputs):
            self._define(output, origin)
            self.sources[output.name] = [(self.owner(v.name), v.name) for v in node.operands if is_f32(v)]
            if products:
                self.products[output.name] = id(node)
            if self._is_sum(node):
                self.summed.add(output.name)
                for addend in filter(is_f32, node.operands):
                    self.owner(addend.name).summed.add(addend.name)
        for position, value in enumerate(node.inputs):
            if value is None or not is_f32(value):
                continue
            owner = self.owner(value.name)
            if counts(node):
                owner.counted.add(value.name)
            elif operator.pointwise or moves(node):
                results = [(self, output.name) for output in node.outputs if is_f32(output)]
                owner.derived.setdefault(value.name, []).extend(results)
            if position in products:
                self._use(value, id(node))
            elif position in precise or position in static:
                self._use(value, PRECISE)
            elif moves(node):
                for output in filter(is_f32, node.outputs):
                    self._use(value, (self, output.name))
            else:
                self._use(value, PLAIN)
            if position in precise and SPECTRUM in operator.precise:
                self._keep((owner, value.name))
        for region in node.regions.values():
            Scope(region, self.facts, self, computed=True)

    def _is_sum(self, node: Node) -> bool:
        """Whether the node adds up two values that depend on data, or moves such a sum."""
        if moves(node):
            return any(value.name in self.owner(value.name).summed for value in factors(node))
        varying = [v for v in node.operands if is_f32(v) and not self._is_constant(v) and not self.origin(v).side]
        return node.op in _SUMS and len(varying) > 1

    def _keep(self, place: Place) -> None:
        """Leaves a value in f32 and all that the first stages of products make it of."""
        waiting = [place]
        while waiting:
            scope, name = waiting.pop()
            scope.kept.add(name)
            self.facts.narrowing.discard(scope.products.get(name, 0))
            for source, other in scope.sources.get(name, ()):
                origin = source.origins[other]
                if origin is not None and origin.stage <= STAGES and other not in source.kept:
                    waiting.append((source, other))

    def _can_narrow(self, node: Node, operator: Operator) -> bool:
        values = [node.inputs[p] for p in operator.positions(operator.products, len(node.inputs))]
        if not values or not all(value is not None and is_f32(value) for value in values):
            return False
        varying = [value for value in values if value is not None and not self._is_constant(value)]
        least, most = self.facts.dtype.limits
        reaches = [self.origin(value).reach or (0, 0) for value in varying]
        if any(low < least or high > most for low, high in reaches) or not sums(node):
            return False
        self.facts.narrowing.add(id(node))
        return True

    # Origins.

    def origin(self, value: Value) -> Origin:
        """What is known of a value; of a constant, its elements are looked at when this is first asked."""
        scope = self.owner(value.name)
        found = scope.origins.get(value.name)
        if found is None:
            array = scope.constants.get(value.name)
            found = scope.origins[value.name] = Origin(reach=None if array is None else self._reach(array))
        return found

    def _is_constant(self, value: Value) -> bool:
        return value.name in self.owner(value.name).constants

    def _reach(self, array: np.ndarray) -> tuple[float, float] | None:
        """The least and the greatest finite element, where one of them is large."""
        if not array.size or array.dtype != F32.numpy:
            return None
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            finite = array[np.isfinite(array)]
            if not finite.size:
                return None
            low, high = float(finite.min()), float(finite.max())
        return large(low, high)

    def _origin(self, node: Node, operator: Operator) -> Origin:
        static = operator.static_positions(len(node.inputs))
        data = [v for i, v in enumerate(node.inputs) if v is not None and i not in static]
        floats = [v for v in data if isinstance(v.type, TensorType) and v.dtype.is_float]
        varying = [self.origin(v) for v in floats if not self._is_constant(v)]
        beside = bool(varying) and all(o.side for o in varying)
        precise = bool(varying) and all(o.precise for o in varying)
        stage, changed = max((o.stage for o in varying), default=0), any(o.changed for o in varying)
        if moves(node):
            reaches = [reach for reach in (self.origin(v).reach for v in floats) if reach is not None]
            reach = (min(low for low, _ in reaches), max(high for _, high in reaches)) if reaches else None
            return Origin(beside, any(o.precise for o in varying), reach, stage, changed)
        by_elements = operator.pointwise or (bool(operator.products) and not self.narrows(node))
        side = not floats or (by_elements and (beside or (not varying and len(floats) < len(data))))
        square = operator.pointwise and len(data) == 2 and data[0] == data[1]
        precise = "result" in operator.precise or counts(node) or square or (operator.pointwise and precise)
        stage, changed = (stage + changed, False) if operator.products else (stage, True)
        return Origin(side and not node.regions, precise, self._result(node, operator), stage, changed)

    def _result(self, node: Node, operator: Operator) -> tuple[float, float] | None:
        """The reach of a pointwise operator with a large operand, where its result is large too."""
        if not operator.pointwise or not is_f32(node.outputs[0]):
            return None
        reaches = [None if v is None or not is_f32(v) else self.origin(v).reach for v in node.inputs]
        if not any(reaches):
            return None
        samples = [
            [None] if value is None else [_number(value, n) for n in (reach or self._samples(value))]
            for value, reach in zip(node.inputs, reaches, strict=True)
        ]
        found: list[float] = []
        for operands in itertools.product(*samples):
            (result, *_) = operator(operands, node.attributes)
            assert isinstance(result, Tensor)
            try:
                number = evaluate_scalar(result.at(()), lambda *_: None)
            except ArithmeticError:
                continue
            if isinstance(number, float | int) and math.isfinite(number):
                found.append(float(number))
        return large(min(found), max(found)) if found else None

    def _samples(self, value: Value) -> Sequence[float]:
        if value.dtype == BOOL or not value.dtype.is_float:
            return 0, 1
        array = self.owner(value.name).constants.get(value.name)
        return (float(array.min()), float(array.max())) if array is not None and array.size else USUAL

    # Decisions.

    def _kinds(self, name: str, through_memory: bool = True) -> set[str]:
        """How a value is read in the end, moved or not; perhaps only by the groups that read it itself."""
        found: set[str] = set()
        waiting: list[Place] = [(self, name)]
        seen = set(waiting)
        while waiting:
            scope, here = waiting.pop()
            for use in scope.uses[here]:
                if isinstance(use, int):
                    found.add(PRODUCT if use in self.facts.narrowing else PRECISE)
                elif isinstance(use, str):
                    found.add(use)
                elif use not in seen:
                    seen.add(use)
                    if through_memory or use[1] not in use[0].stored:
                        waiting.append(use)
                    else:
                        found.add(PLAIN)
        return found

    def _is_counted(self, name: str) -> bool:
        """Whether a kernel that reads the value counts or compares what it makes of each element."""
        waiting: list[Place] = [(self, name)]
        seen = set(waiting)
        while waiting:
            scope, here = waiting.pop()
            if here in scope.counted:
                return True
            found = {place for place in scope.derived.get(here, ()) if place[1] not in place[0].stored} - seen
            seen |= found
            waiting += found
        return False

    def _holds_sum(self, name: str) -> bool:
        """Whether a stored value is a sum, of this graph or of the group that makes it."""
        return name in self.summed or any(name in scope.summed for scope, name in self.sources.get(name, ()))

    def _decided(self, root: Place) -> bool:
        members = self.facts.members.get(root, [root])
        if any(name in scope.fixed or name in scope.kept for scope, name in members):
            return False
        kinds = set[str]().union(*(scope._kinds(name) for scope, name in members))
        if kinds <= {PRODUCT}:
            return bool(kinds)
        if self.facts.wide_sums and PRODUCT not in kinds and any(scope._holds_sum(name) for scope, name in members):
            return False
        delicate = any(scope.origin(Value(name, _F32)).delicate for scope, name in members)
        if delicate or PRECISE in kinds or any(scope._is_counted(name) for scope, name in members):
            return False
        scope, name = root
        array = scope.constants.get(name)
        return array is None or (array.size >= self.facts.large and not changes_whole_numbers(array, self.facts.dtype))


_F32 = TensorType(F32, ())
_SUMS = ("Add", "Sub", "Sum")


def large(low: float, high: float) -> tuple[float, float] | None:
    """The bounds of a value, where it may be large."""
    least, most = F32.limits
    return (max(low, least), min(high, most)) if low < -LARGE or high > LARGE else None


def is_f32(value: Value | None) -> bool:
    return value is not None and isinstance(value.type, TensorType) and value.type.dtype == F32


def moves(node: Node) -> bool:
    """Whether elements of results are elements of operands."""
    return node.op == "Identity" or (node.op in REGISTRY and REGISTRY[node.op].movement)


def counts(node: Node) -> bool:
    """Whether results are no floats: what compares or counts operands, or quantizes them."""
    return any(isinstance(value.type, TensorType) and not value.dtype.is_float for value in node.outputs)


def is_control(node: Node) -> bool:
    """Whether the node's regions are bodies of control flow."""
    return bool(node.regions) and node.op != "Fused" and not REGISTRY[node.op].heavy


def with_narrow_types(node: Node, dtype: DType) -> Node:
    """The node as it is with factors of the narrow type, its results as wide as it can make them."""
    positions = REGISTRY[node.op].positions(REGISTRY[node.op].products, len(node.inputs))
    inputs = list(node.inputs)
    for position in positions:
        value = inputs[position]
        assert value is not None
        inputs[position] = Value(value.name, TensorType(dtype, value.shape))
    return replace(node, inputs=tuple(inputs), attributes={**node.attributes, "result": F32})


def result_types(node: Node) -> tuple[DType, ...]:
    """The element types of a node's results."""
    names = [value.name for value in node.outputs]
    found = Inference().definition(node.op, node.inputs, node.attributes, node.regions, names, node.origin)
    return tuple(tensor.dtype for tensor in found[: len(names)] if isinstance(tensor, Tensor))


def factors(node: Node) -> Iterator[Value]:
    """The f32 operands that a node moves or computes with, those left out that decide shapes."""
    static = REGISTRY[node.op].static_positions(len(node.inputs))
    for position, value in enumerate(node.inputs):
        if value is not None and position not in static and is_f32(value):
            yield value


def sums(node: Node) -> bool:
    """Whether the node adds products up, where it might only multiply: an outer product is no work for tensor cores."""
    names = [value.name for value in node.outputs]
    first = Inference().definition(node.op, node.inputs, node.attributes, node.regions, names, node.origin)[0]
    if not isinstance(first, Tensor) or first.kind == "opaque":
        return True
    return bool(all_reductions(first.at(output_indices(first.shape))))


def _number(value: Value, number: float) -> Tensor:
    def element(_: object) -> Scalar:
        return const(number, value.dtype)

    return Tensor((), value.dtype, element)


def changes_whole_numbers(array: np.ndarray, dtype: DType) -> bool:
    """Whether all elements are whole numbers or halves (positions, counts) and rounding would change one."""
    for part in (array.reshape(-1)[:64], array):
        doubled = part * np.float32(2)
        if not np.array_equal(doubled, np.rint(doubled)):
            return False
    return not np.array_equal(array.astype(dtype.numpy).astype(F32.numpy), array)
