"""Sequences and optionals that are known while a model is read: lists of values and values, which the code never sees.

An item is what a name stands for: a value of the graph, a tuple of items for a sequence of known length, None for an
optional without a value. What the run alone can tell (a length, a position among elements of several types) raises
HostNeeded: Python runs the operator then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import numpy as np
from onnx import GraphProto

from ..ir.dims import Dim
from ..ir.dtypes import STRING
from ..ir.errors import HostNeeded, ModelError, ShapeError
from ..ir.graph import Attribute, TensorType, Value
from .calls import Builder, Call
from .host.kinds import NUMBERS, STEPS, has_text_attribute, kind_of_type

Item: TypeAlias = "Value | tuple[Item, ...] | None"

MOST_TRIPS = 32
"""Iterations of a loop over sequences that are written out."""


@dataclass(frozen=True)
class ItemCall:
    """A node that makes or takes apart sequences and optionals; `body` gives what its graph makes of some items,
    `values` are the elements of values as far as they are known."""

    call: Call
    items: tuple[Item, ...]
    build: Builder
    values: Mapping[str, Sequence[object]]
    body: Callable[[Sequence[Item]], tuple[Item, ...]] | None = None

    def item(self, position: int) -> Item:
        return self.items[position] if position < len(self.items) else None

    def sequence(self, position: int = 0) -> tuple[Item, ...]:
        found = self.item(position)
        if not isinstance(found, tuple):
            raise ModelError(f"operand {position} is {_what(found)}, where {self.call.op} takes a sequence")
        return found

    def value(self, position: int) -> Value:
        found = self.item(position)
        if not isinstance(found, Value):
            raise ModelError(f"operand {position} is {_what(found)}, where {self.call.op} takes a tensor")
        return found

    def known(self, value: Value) -> int | None:
        """The number or truth in a value; None where only the run tells it."""
        known = self.values.get(value.name)
        return known[0] if known and isinstance(known[0], int) else None

    def index(self, position: int, count: int, last: int) -> int | None:
        """An operand that says a place among `count`, from the front; None where only the run tells it."""
        known = self.known(self.value(position))
        if known is None:
            return None
        if not -count <= known <= last:
            raise ShapeError(f"position {known} in a sequence of {count} elements")
        return known + count if known < 0 else known

    def emit(self, op: str, *inputs: Value, name: str = "", **attributes: Attribute) -> Value:
        return self.build.emit(Call(op, inputs, attributes, (name,), origin=self.call.origin))[0]

    def split(self, value: Value, sizes: Sequence[int], axis: int) -> tuple[Value, ...]:
        """The parts of a tensor along an axis."""
        lengths = self.numbers(sizes)
        call = Call("Split", (value, lengths), {"axis": axis}, ("",) * len(sizes), origin=self.call.origin)
        return self.build.emit(call) if sizes else ()

    def numbers(self, numbers: Sequence[int]) -> Value:
        return self.build.constant(np.array(numbers, np.int64), f"{self.call.outputs[0]}.numbers", self.call.origin)


Rule: TypeAlias = Callable[[ItemCall], tuple[Item, ...]]


def resolved(call: ItemCall) -> tuple[Item, ...] | None:
    """What a node gives, where it is one of these operators; None where it is none that takes or gives sequences.

    Raises HostNeeded where only the run can tell, ModelError and ShapeError for operands that do not fit.
    """
    special = any(isinstance(item, tuple) for item in call.items)
    if call.call.op == "Identity" and not isinstance(call.item(0), Value):
        return call.items
    rule = _unrolled if call.call.op == "Loop" and special else RULES.get(call.call.op)
    if rule is None and special:
        raise HostNeeded("it takes a sequence")
    return None if rule is None else rule(call)


def _what(item: Item) -> str:
    return "absent" if item is None else "a sequence" if isinstance(item, tuple) else f"the tensor {item.type}"


def _all_values(items: Sequence[Item]) -> TypeGuard[Sequence[Value]]:
    return all(isinstance(item, Value) for item in items)


def _construct(call: ItemCall) -> tuple[Item, ...]:
    if _all_values(call.items) and len({value.dtype for value in call.items}) > 1:
        raise ModelError(f"the elements are of several types: {', '.join(str(value.type) for value in call.items)}")
    return (tuple(call.items),)


def _insert(call: ItemCall) -> tuple[Item, ...]:
    found = call.sequence()
    place = len(found) if call.item(2) is None else call.index(2, len(found), len(found))
    if place is None:
        raise HostNeeded("only the run tells the position")
    return ((*found[:place], call.item(1), *found[place:]),)


def _erase(call: ItemCall) -> tuple[Item, ...]:
    found = call.sequence()
    place = len(found) - 1 if call.item(1) is None else call.index(1, len(found), len(found) - 1)
    if place is None or not found:
        raise HostNeeded("only the run tells the position")
    return ((*found[:place], *found[place + 1 :]),)


def _at(call: ItemCall) -> tuple[Item, ...]:
    found = call.sequence()
    place = call.index(1, len(found), len(found) - 1)
    if place is not None:
        return (found[place],)
    if not found or not _all_values(found) or any(value.type != found[0].type for value in found):
        raise HostNeeded("only the run tells the position")
    # Elements of one type: one tensor, indexed by the run.
    rows = [call.emit("Unsqueeze", value, call.numbers([0])) for value in found]
    whole = call.emit("Concat", *rows, axis=0)
    scalar = call.emit("Reshape", call.value(1), call.numbers([]))
    return (call.emit("Gather", whole, scalar, axis=0, name=call.call.outputs[0]),)


def _length(call: ItemCall) -> tuple[Item, ...]:
    return (call.build.constant(np.array(len(call.sequence()), np.int64), call.call.outputs[0], call.call.origin),)


def _concat(call: ItemCall) -> tuple[Item, ...]:
    found = call.sequence()
    if not found or not _all_values(found):
        raise ShapeError("a sequence without elements cannot be joined")
    axis, parts = call.call.integer("axis", 0), list(found)
    if call.call.integer("new_axis", 0):
        parts = [call.emit("Unsqueeze", value, call.numbers([axis])) for value in found]
    return (call.emit("Concat", *parts, axis=axis, name=call.call.outputs[0]),)


def _split(call: ItemCall) -> tuple[Item, ...]:
    value, axis = call.value(0), call.call.integer("axis", 0)
    if not -value.tensor.rank <= axis < value.tensor.rank:
        raise ShapeError(f"{value.type} has no axis {axis}")
    length: Dim = value.shape[axis]
    lengths = call.value(1) if call.item(1) is not None else None
    known = [1] if lengths is None else call.values.get(lengths.name)
    if not isinstance(length, int) or known is None or not all(isinstance(size, int) for size in known):
        raise HostNeeded(f"only the run tells into how many parts {value.type} falls")
    sizes = [int(size) for size in known if isinstance(size, int)]
    if lengths is None or not lengths.tensor.rank:
        if sizes[0] < 1:
            raise ShapeError(f"parts of size {sizes[0]} are asked for")
        whole, rest = divmod(length, sizes[0])
        sizes = sizes * whole + [rest] * bool(rest)
    if sum(sizes) != length or min(sizes, default=0) < 0:
        raise ShapeError(f"parts of the sizes {sizes} do not make up axis {axis} of {value.type}")
    parts = call.split(value, sizes, axis)
    if lengths is None and not call.call.integer("keepdims", 1):
        parts = tuple(call.emit("Squeeze", part, call.numbers([axis])) for part in parts)
    return (parts,)


def _map(call: ItemCall) -> tuple[Item, ...]:
    count = len(call.sequence())
    if any(isinstance(item, tuple) and len(item) != count for item in call.items):
        raise ShapeError(
            f"the sequences have {', '.join(str(len(i)) for i in call.items if isinstance(i, tuple))} elements"
        )
    assert call.body is not None
    rows = [
        call.body([item[position] if isinstance(item, tuple) else item for item in call.items])
        for position in range(count)
    ]
    return tuple(zip(*rows, strict=True)) if rows else ((),) * len(call.call.outputs)


def _unrolled(call: ItemCall) -> tuple[Item, ...]:
    """A loop over sequences that runs a known number of times: its body so many times over."""
    trips = None if call.item(0) is None else call.known(call.value(0))
    if trips is None or trips > MOST_TRIPS:
        raise HostNeeded("only the run tells how long the loop's sequences get")
    assert call.body is not None
    iteration, condition = (len(v.type.tensor_type.shape.dim) for v in call.call.graphs["body"].input[:2])
    goes_on = call.item(1) is None or call.known(call.value(1))
    states, rows = call.items[2:], list[tuple[Item, ...]]()
    for count in range(trips):
        if goes_on is None:
            raise HostNeeded("only the run tells how often the loop runs")
        if not goes_on:
            break
        head = (np.full((1,) * iteration, count), np.full((1,) * condition, True))
        constants = [call.build.constant(array, f"{call.call.outputs[0]}.{count}", call.call.origin) for array in head]
        first, *found = call.body([*constants, *states])
        goes_on = call.known(first) if isinstance(first, Value) else None
        states, row = tuple(found[: len(states)]), tuple(found[len(states) :])
        rows.append(row)
    if not rows and len(call.call.graphs["body"].output) > 1 + len(states):
        raise HostNeeded("the loop gives nothing to stack")
    return (*states, *(_stacked(call, values) for values in zip(*rows, strict=True)))


def _stacked(call: ItemCall, values: Sequence[Item]) -> Item:
    if not _all_values(values):
        raise HostNeeded("the loop stacks sequences")
    return call.emit("Concat", *(call.emit("Unsqueeze", value, call.numbers([0])) for value in values), axis=0)


def _optional(call: ItemCall) -> tuple[Item, ...]:
    return (call.item(0),)


def _element(call: ItemCall) -> tuple[Item, ...]:
    if call.item(0) is None:
        raise HostNeeded("the optional has no value")
    return (call.item(0),)


def _has_element(call: ItemCall) -> tuple[Item, ...]:
    present = np.array(call.item(0) is not None)
    return (call.build.constant(present, call.call.outputs[0], call.call.origin),)


RULES: Mapping[str, Rule] = {
    "SequenceConstruct": _construct,
    "SequenceEmpty": lambda call: ((),),
    "SequenceInsert": _insert,
    "SequenceErase": _erase,
    "SequenceAt": _at,
    "SequenceLength": _length,
    "SequenceMap": _map,
    "ConcatFromSequence": _concat,
    "SplitToSequence": _split,
    "Optional": _optional,
    "OptionalGetElement": _element,
    "OptionalHasElement": _has_element,
}
"""Operators that are resolved where lengths and positions are known."""


# What code can hold


def present(item: Item, name: str) -> Value:
    """An output of a graph in the code: a tensor of numbers. Raises HostNeeded for text and sequences."""
    if isinstance(item, tuple):
        raise HostNeeded(f'the output "{name}" is a sequence')
    if item is None:
        raise ModelError(f'the output "{name}" is an operand that is absent')
    if is_text(item):
        raise HostNeeded(f'the output "{name}" is text')
    return item


def only_values(items: Sequence[Item], graph: GraphProto) -> tuple[Value, ...]:
    """A graph's outputs, which the code has as tensors. Raises HostNeeded for all else."""
    for item, output in zip(items, graph.output, strict=True):
        if item is None and kind_of_type(output.type) != NUMBERS:
            raise HostNeeded(f'the output "{output.name}" is a {kind_of_type(output.type)}')
    return tuple(present(item, output.name) for item, output in zip(items, graph.output, strict=True))


def without_sequences(items: Sequence[Item]) -> tuple[Value | None, ...]:
    """Operands as calls have them, for operators whose rules take the items themselves."""
    return tuple(None if isinstance(item, tuple) else item for item in items)


def refuse_text(call: Call) -> None:
    """HostNeeded for an operator that only Python runs, and for any on text."""
    text = call.attributes.get("to") == STRING or has_text_attribute(call.attributes)
    if call.op in STEPS or text or any(map(is_text, call.inputs)):
        raise HostNeeded(f"{call.op} on {', '.join(str(v.type) for v in call.inputs if v) or 'nothing'}")


def is_text(value: Value | None) -> bool:
    return value is not None and isinstance(value.type, TensorType) and value.dtype == STRING
