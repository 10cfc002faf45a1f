"""Checks of integers that only the run tells: indices that operators are given, sizes that a run computes.

Kernels take an index outside its axis to the border, so that none reads or writes elsewhere. That one was met is found
by small kernels of their own, which leave the loops that move data as they are: each compares the least and the
greatest of a tensor's indices (or a size) with their limits, and writes a record to a memory of the program if they do
not fit. A record has three words: whether it was written, the number found, and the limit; a word in front of all
records says whether any was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..ir import scalars as s
from ..ir.dims import Dim, dim_max, known_le, product, symbol, symbols
from ..ir.dtypes import I64
from ..ir.errors import IndexRangeError
from ..ir.graph import Node, TensorType
from ..ir.guards import Guard
from ..ir.program import MARK, Memory, Place, Step
from ..ir.run_state import RECORD, message, words_of
from ..ir.scalars import Buffer, Const
from ..ir.tensors import Tensor, buffer_tensor, reshaped
from .regions import Region
from .segments import made_known

if TYPE_CHECKING:
    from .lower import Lowering

CHECK_INDEX, CHECK_SIZE = "onnxc.CheckIndex", "onnxc.CheckSize"
_NAMES = ("count", "least", "end", "limit", "value")
COUNT, LEAST, END, LIMIT, VALUE = (symbol(f"{MARK}{name}", None) for name in _NAMES)
"""What the kernels are told: elements, the range [least, end) of each, the limit to report, and a size to check."""


@dataclass
class Checks:
    """The checks of a program that is being lowered; `texts` are their messages, with {value} and {limit} in them."""

    lowering: Lowering
    texts: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    waiting: list[tuple[Dim, Dim]] = field(default_factory=list)
    done: set[object] = field(default_factory=set)
    depth: int = 0

    def begin(self) -> None:
        """After inference: which assumptions the shapes of inputs cannot prove."""
        self.told = set(self.lowering.known)
        self.waiting = [pair for pair in self.lowering.inference.assumptions if self._depends_on_run(*pair)]

    def finish(self) -> None:
        """Gives the records their memory."""
        if self.texts:
            self.lowering.memories[self.memory] = Memory(self.memory, I64, words_of(len(self.texts)), "fault")

    @property
    def memory(self) -> str:
        return f"{MARK}faults"

    # Indices

    def indices(self, node: Node, region: Region, guards: Sequence[tuple[Node, Guard]]) -> list[Step]:
        """Steps that check the indices that a region's nodes are given, before it runs."""
        steps: list[Step] = []
        made: dict[int, Place] = {}
        for item, guard in guards:
            if guard.holds or guard.indices.size == 0:
                continue
            where = _where(item, node)
            text = f"{where}: index {{value}} is out of range for {guard.what} of {{limit}}"
            known = _elements(region, guard)
            if known is not None:
                steps += self._constants(known, guard, text, node.origin)
            else:
                steps += self._run_time(region, guard, text, made)
        return steps

    def _constants(self, known: np.ndarray, guard: Guard, text: str, origin: tuple[str, ...]) -> list[Step]:
        steps: list[Step] = []
        for number in sorted({int(known.min()), int(known.max())}) if known.size else ():
            if known_le(guard.least, number) and known_le(number + 1, guard.end):
                continue
            limit = guard.end
            if isinstance(guard.least, int) and isinstance(limit, int) and self.depth == 1:
                raise IndexRangeError(message(text, number, limit))
            steps += self._size(number, guard.least, limit, text, origin)
        return steps

    def _run_time(self, region: Region, guard: Guard, text: str, made: dict[int, Place]) -> list[Step]:
        lowering = self.lowering
        shape, depth = guard.indices.shape, 1
        if guard.column is not None:
            *outer, last = shape
            assert isinstance(last, int)
            shape, depth = tuple(outer), last
        count = product(shape)
        source = guard.indices.buffer
        steps: list[Step] = []
        if source is not None:
            place = lowering.argument(source.name)
        elif id(guard.indices) in made:
            place = made[id(guard.indices)]
        else:
            # What the group itself computes is computed once more, into memory.
            flat = reshaped(guard.indices, (guard.indices.size,))
            loads = {part.buffer.name for part in s.walk(flat.at((symbol("element", 0),))) if isinstance(part, s.Load)}
            inputs = tuple(tensor for tensor in region.inputs if tensor.buffer and tensor.buffer.name in loads)
            result = Buffer("y0", guard.indices.dtype, guard.indices.size)
            place = lowering.arena(f"{region.name}.indices", guard.indices.dtype, guard.indices.size)
            steps += lowering.emit(Region("indices", inputs, ((result, flat),), origin=region.origin), [place])
            made[id(guard.indices)] = place
        key = (str(place), guard.column, guard.least, guard.end, text)
        if self.depth == 1 and source is not None:
            if key in self.done:
                return []
            self.done.add(key)
        flat = buffer_tensor("x0", guard.indices.dtype, (COUNT * depth,))
        small = isinstance(count, int) and count <= SMALL
        attributes = {"depth": depth, "column": guard.column or 0, "small": int(small)}
        values: dict[Dim, Dim] = {COUNT: count, LEAST: guard.least, END: guard.end, LIMIT: guard.end}
        return steps + self._emit(CHECK_INDEX, attributes, (flat,), {"x0": place}, values, text, region.origin)

    # Sizes

    def sizes(self, node: Node, made: Sequence[Step]) -> list[Step]:
        """Steps that check, after a node has run, what is assumed of sizes that are known by now."""
        self.told |= set(made_known(tuple(made)))
        for value in node.outputs:
            for size in value.shape if isinstance(value.type, TensorType) else ():
                if not known_le(0, size) and self._depends_on_run(size):
                    self.waiting.append((dim_max(size, 0), size))
        ready = [pair for pair in self.waiting if self._is_told(*pair)]
        self.waiting = [pair for pair in self.waiting if pair not in ready]
        steps: list[Step] = []
        inside = (
            [item for item in node.regions["body"].nodes if item.op != "Constant"] if node.op == "Fused" else [node]
        )
        where = _where(inside[0] if len(inside) == 1 else node, node)
        for a, b in dict.fromkeys(ready):
            left, right = (str(dim).replace(MARK, "") for dim in (a, b))
            text = f"{where}: the model needs {left} = {right}: they differ by {{value}}"
            if a == dim_max(b, 0):
                text = f"{where}: {right} is {{value}}: a size cannot be negative"
                steps += self._size(b, 0, b + 1, text, node.origin)  # no other end: indices of GPUs have 32 bits
            else:
                steps += self._size(a - b, 0, 1, text, node.origin)
        return steps

    def _depends_on_run(self, *dims: Dim) -> bool:
        known = self.lowering.known
        return any(x.name not in known for dim in dims for x in symbols(dim))

    def _is_told(self, *dims: Dim) -> bool:
        return all(x.name in self.told for dim in dims for x in symbols(dim))

    def _size(self, value: Dim, least: Dim, end: Dim, text: str, origin: tuple[str, ...]) -> list[Step]:
        values: dict[Dim, Dim] = {VALUE: value, LEAST: least, END: end, LIMIT: end}
        return self._emit(CHECK_SIZE, {}, (), {}, values, text, origin)

    def _emit(
        self,
        op: str,
        attributes: dict[str, int],
        inputs: tuple[Tensor, ...],
        arguments: dict[str, Place],
        values: Mapping[Dim, Dim],
        text: str,
        origin: tuple[str, ...],
    ) -> list[Step]:
        lowering = self.lowering
        records = [("record", RECORD, 1 + RECORD * len(self.texts)), ("flag", 1, 0)]
        self.texts.append(text)
        lowering.memories[self.memory] = Memory(self.memory, I64, 1, "fault")  # its size is told when all are known
        nothing = Tensor((0,), I64, lambda i: s.const(0, I64))
        outputs = tuple((Buffer(name, I64, size), nothing) for name, size, _ in records)
        name = op.split(".")[-1].lower()
        region = Region(name, inputs, outputs, Node(op, (), (), attributes), origin=origin)
        lowered = lowering.schedule(region, lowering.target)
        assert lowered is not None, f"{lowering.target.name} has no schedule for {op}"
        places = arguments | {name: Place(self.memory, offset) for name, _, offset in records}
        named = {str(dim): value for dim, value in values.items()}
        return [lowering.run(call, places, region, named) for call in lowered.kernel_calls]


SMALL = 1 << 14
"""Indices that one thread looks at: it takes some microseconds."""


def _where(item: Node, node: Node) -> str:
    return (item if item.origin else Node(item.op, item.inputs, item.outputs, origin=node.origin)).where


def _elements(region: Region, guard: Guard) -> np.ndarray | None:
    """The indices where the model fixes them."""
    buffer, rank = guard.indices.buffer, guard.indices.rank
    if buffer is None:
        first = guard.indices.at((0,) * rank)
        single = all(extent == 1 for extent in guard.indices.shape)
        return np.full(1, int(first.value)) if isinstance(first, Const) and single else None
    array = region.constants.get(buffer.name)
    return array if array is None or guard.column is None else array[..., guard.column]
