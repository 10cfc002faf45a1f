"""What a model's graph says about the numbers that an input may hold: bounds of indices, masks, lengths, sizes.

Each input is followed through what only moves, converts or shifts its elements to the operators that give it a meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...ir.dims import Dim, evaluate
from ...ir.dtypes import BOOL
from ...ir.errors import OnnxcError
from ...ir.graph import Graph, Node, TensorType, Value
from ...ir.infer import Inference
from ...ir.ops import REGISTRY

LARGE = 100.0
"""What is multiplied by more than this and added blots something out: it is a mask."""
SIZES = (1, 4)
"""Range of integers that decide sizes: axes to make, iterations, repetitions."""
LISTED = 4096
"""Elements of a constant that are looked at."""
STEPS = 400
"""Uses looked at for one input."""


@dataclass
class Role:
    """What is known of an input's elements: the least and the greatest (None: open), those it is compared with, and
    whether they are 0 and 1 alone (`mask`), add up to a `total`, are corners of `boxes`, or away from zero (`divisor`).

    `columns` are bounds by the position along the last axis.
    """

    low: float | None = None
    high: float | None = None
    choices: list[float] = field(default_factory=list)
    mask: bool = False
    total: int | None = None
    divisor: bool = False
    boxes: bool = False
    columns: dict[int, tuple[float, float]] = field(default_factory=dict)

    def within(self, low: float | None, high: float | None) -> None:
        """Narrows the bounds."""
        if low is not None:
            self.low = low if self.low is None else max(self.low, low)
        if high is not None:
            self.high = high if self.high is None else min(self.high, high)


RANGES: Mapping[str, Mapping[int, tuple[float | None, float | None]]] = {
    "Log": {0: (0.05, None)}, "Sqrt": {0: (0.0, None)}, "Pow": {0: (0.05, 3.0), 1: (-2.0, 3.0)},
    "Acosh": {0: (1.0, None)}, "Asin": {0: (-0.95, 0.95)}, "Acos": {0: (-0.95, 0.95)}, "Atanh": {0: (-0.95, 0.95)},
    "Exp": {0: (-8.0, 8.0)}, "Sinh": {0: (-8.0, 8.0)}, "Cosh": {0: (-8.0, 8.0)}, "Bernoulli": {0: (0.0, 1.0)},
    "Multinomial": {0: (-4.0, 0.0)}, "GridSample": {1: (-1.1, 1.1)}, "BatchNormalization": {4: (0.05, None)},
    "BitShift": {1: (0, 7)}, "NonMaxSuppression": {1: (0.0, 1.0), 2: (1, 5), 3: (0.3, 0.7), 4: (0.0, 0.3)},
    "QuantizeLinear": {1: (0.01, 0.2)}, "DequantizeLinear": {1: (0.01, 0.2)}, "Range": {2: (1, 2)},
    "Dropout": {1: (0.0, 0.9)}, "Tan": {0: (-1.4, 1.4)},
}  # fmt: skip
"""Ranges in which an operand is sensible: (least, greatest) by operator and position."""
BOXES: Mapping[str, int] = {"NonMaxSuppression": 0, "RoiAlign": 1}
LENGTHS: Mapping[str, tuple[int, int]] = {"RNN": (4, 0), "GRU": (4, 0), "LSTM": (4, 0)}
"""Operands that are lengths: (position, the axis of operand 0 that they are along)."""
DIVISORS: Mapping[str, int] = {"Div": 1, "Mod": 1, "Reciprocal": 0}
MOVES = frozenset(
    ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Concat", "Split",
     "Slice", "Gather", "Pad", "DepthToSpace", "SpaceToDepth", "CastLike", "GatherElements", "GatherND", "ScatterND",
     "ScatterElements", "Where", "ReverseSequence", "Trilu", "Clip", "Min", "Max", "MaxPool")
)  # fmt: skip
"""Operators whose results are elements of operand 0 (and of more in FROM_ALL)."""
FROM_ALL = frozenset(("Concat", "Where", "Min", "Max", "ScatterND", "ScatterElements"))
MASKS_OF = {"com.microsoft.Attention": (3,), "com.microsoft.MultiHeadAttention": (4,), "Attention": (3,)}


@dataclass(frozen=True)
class _Reader:
    node: Node
    position: int


class Uses:
    """The roles of a graph's inputs; `graph` has sizes that are numbers, as far as the inputs tell them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.inference = Inference()
        self.readers: dict[str, list[_Reader]] = {}
        self.aliases: dict[str, list[Value]] = {}
        self.guards: dict[str, list[tuple[Dim, Dim, int | None]]] = {}
        self._walk(graph)

    def _walk(self, graph: Graph) -> None:
        for node in graph.nodes:
            for position, value in enumerate(node.inputs):
                if value is not None:
                    self.readers.setdefault(value.name, []).append(_Reader(node, position))
            for region in node.regions.values():
                for outer, inner in _passed(node, region):
                    self.aliases.setdefault(outer.name, []).append(inner)
                self._walk(region)
            try:
                self.inference.node(node)
            except OnnxcError:  # of what is in a loop not all is known here
                continue
            for guard in self.inference.guards:
                if guard.indices.buffer is not None:
                    found = self.guards.setdefault(guard.indices.buffer.name, [])
                    found.append((guard.least, guard.end, guard.column))

    def role(self, value: Value) -> Role:
        """What the graph says of an input."""
        role = Role(mask=isinstance(value.type, TensorType) and value.dtype == BOOL)
        waiting: list[tuple[Value, float, float]] = [(value, 1.0, 0.0)]
        seen: set[str] = set()
        while waiting and len(seen) < STEPS:
            current, scale, offset = waiting.pop(0)
            if current.name in seen:
                continue
            seen.add(current.name)
            self._guarded(role, current, scale, offset)
            waiting += [(inner, scale, offset) for inner in self.aliases.get(current.name, ())]
            for reader in self.readers.get(current.name, ()):
                self._used(role, reader, current, scale, offset)
                waiting += self._moved(reader, current, scale, offset)
        return role

    def _guarded(self, role: Role, value: Value, scale: float, offset: float) -> None:
        """Indices: from 0 on, though operators take negative ones too, as what lies between may not."""
        for least, end, column in self.guards.get(value.name, ()):
            low, high = max(_number(least, 0), 0), max(_number(end, 1) - 1, 0)
            if column is not None:
                role.columns[column] = (low, high)
            elif scale == 1:
                role.within(low - offset, high - offset)

    def _used(self, role: Role, reader: _Reader, value: Value, scale: float, offset: float) -> None:
        node, position = reader.node, reader.position
        if scale != 1 or offset != 0:
            if node.op == "Mul" and abs(self._constant(node.inputs[1 - position]) or 0) >= LARGE:
                role.mask = True
            return
        role.within(*RANGES.get(node.op, {}).get(position, (None, None)))
        role.boxes |= BOXES.get(node.op) == position
        role.divisor |= DIVISORS.get(node.op) == position
        role.mask |= position in MASKS_OF.get(node.op, ())
        length = LENGTHS.get(node.op)
        if length is not None and position == length[0] and node.inputs[0] is not None:
            role.within(1, _number(node.inputs[0].shape[length[1]], 1))
        if node.op == "ReverseSequence" and position == 1:
            role.within(1, None)
        if node.op == "TopK" and position == 1 and node.inputs[0] is not None:
            axis = node.attributes.get("axis", -1)
            role.within(1, _number(node.inputs[0].shape[axis if isinstance(axis, int) else -1], 1))
        elif node.op == "OneHot" and position == 0:
            role.within(0, max(self._constant(node.inputs[1]) or _depth(node), 1) - 1)
        elif node.op == "Loop" and position == 0:
            role.within(*SIZES)
        elif value.dtype.is_integer and (name := self._decides(node, position)):
            self._decided(role, node, name)
        elif node.op == "Equal":
            role.choices += self._elements(node.inputs[1 - position])
        elif node.op == "Cast" and node.output.dtype == BOOL:
            role.mask = True
        elif node.op == "Mul" and value.dtype.is_float and self._was_integer(value):
            role.mask |= self._constant(node.inputs[1 - position]) is None

    def _was_integer(self, value: Value) -> bool:
        producer = self.graph.producers.get(value)
        return producer is not None and producer.op == "Cast" and producer.operands[0].dtype.is_integer

    def _decides(self, node: Node, position: int) -> str:
        """The name of an operand that decides shapes; nothing for any other."""
        operator = REGISTRY.get(node.op)
        return operator.static_positions(len(node.inputs)).get(position, "") if operator is not None else ""

    def _decided(self, role: Role, node: Node, name: str) -> None:
        """Parts of an axis, an axis, or sizes."""
        first, axis = node.inputs[0], node.attributes.get("axis", 0)
        if name == "split" and first is not None:
            role.total = _number(first.shape[axis if isinstance(axis, int) else 0], 1)
        elif name in ("axis", "axes") and first is not None:
            role.within(0, max(first.tensor.rank - 1, 0))
        elif node.op not in ("Slice", "Pad"):
            role.within(*SIZES)

    def _moved(
        self, reader: _Reader, value: Value, scale: float, offset: float
    ) -> Iterator[tuple[Value, float, float]]:
        """Where the elements go from here, as scale * element + offset."""
        node, position = reader.node, reader.position
        if not node.outputs:
            return
        if node.op == "Cast" and node.output.dtype != BOOL:
            yield node.output, scale, offset
        elif (node.op in MOVES and (position == 0) != (node.op == "Where")) or (node.op in FROM_ALL and position):
            yield from ((output, scale, offset) for output in node.outputs)
        elif node.op in ("Add", "Sub", "Mul", "Neg") and len(node.operands) == len(node.inputs):
            other = 0.0 if node.op == "Neg" else self._constant(node.inputs[1 - position])
            if other is None:
                return
            if node.op == "Add":
                yield node.output, scale, offset + other
            elif node.op == "Sub" and position == 0:
                yield node.output, scale, offset - other
            elif node.op == "Mul":
                yield node.output, scale * other, offset * other
            else:
                yield node.output, -scale, other - offset

    def _elements(self, value: Value | None) -> list[float]:
        """The elements of a constant that is not large."""
        array: Any = None if value is None else self.inference.arrays.get(value.name)
        if array is not None and array.dtype != object and array.dtype.kind != "c":
            return [float(x) for x in array.reshape(-1)[:LISTED].tolist()]
        known = None if value is None else self.inference.values.get(value.name)
        return [] if known is None else [float(x) for x in known if isinstance(x, bool | int | float)]

    def _constant(self, value: Value | None) -> float | None:
        """The number that all elements of a constant are."""
        if value is None:
            return None
        elements = self._elements(value)
        if not elements or any(x != elements[0] for x in elements) or not math.isfinite(elements[0]):
            return None
        return elements[0]


def _depth(node: Node) -> int:
    """The depth of a OneHot, as its result has it."""
    axis = node.attributes.get("axis", -1)
    return _number(node.output.shape[axis if isinstance(axis, int) else -1], 1)


def _passed(node: Node, region: Graph) -> Iterator[tuple[Value, Value]]:
    """Operands with the region's inputs that they become."""
    outer = node.inputs[2:] if node.op == "Loop" else node.inputs if node.op == "Scan" else ()
    inner = region.inputs[2:] if node.op == "Loop" else region.inputs
    for a, b in zip(outer, inner, strict=False):
        if a is not None:
            yield a, b


def _number(dim: Dim, otherwise: int) -> int:
    try:
        return evaluate(dim, {})
    except KeyError:
        return otherwise
