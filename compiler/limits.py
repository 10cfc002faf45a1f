"""How much memory a model may ask for: when it is compiled, and when it runs.

A model of a few hundred bytes can ask for terabytes: constants that are made large, intermediate values, outputs whose
sizes its data tell. All are measured before anything is allocated, with Python's integers, which do not overflow.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..ir.dims import Dim, evaluate, symbols
from ..ir.errors import LimitError, OnnxcError, ShapeError
from ..ir.graph import TensorType, Type, Value
from ..ir.program import ALIGNMENT, MARK, ArenaSlot, Program, Run, walk

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LARGEST_EXTENT = 1 << 48
"""Elements that no tensor has: beyond, neither memory nor the arithmetic of indices follows."""
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MOST_AXES = 64
"""As many as numpy's arrays have."""
MOST_OPERANDS, LONGEST_NAME = 4096, 1 << 16
_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def parse_bytes(text: str | int) -> int:
    """Bytes as a number, or as a text such as "500M" or "2G" (powers of 1024). OnnxcError for another text."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise OnnxcError(f"{text!r} is no amount of memory: write 500M or 2G")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def format_bytes(size: int) -> str:
    """Bytes as a person reads them."""
    if size >= 1 << 50:
        return f"2^{size.bit_length() - 1} bytes"
    unit, name = next(((u, n) for n, u in reversed(_UNITS.items()) if size >= u), (1, ""))
    return f"{size / unit:.3g} {name}B"


def memory_of_machine() -> int:
    """Bytes of memory that this process can have: the machine's, or what its control group leaves."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _GROUPS:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(found)


def limit_of(wanted: int | str | None) -> int:
    """The limit in bytes: the one that is wanted, else the machine's memory."""
    return memory_of_machine() if wanted is None else parse_bytes(wanted)


def check_types(types: Mapping[str, Type]) -> None:
    """Raises LimitError for tensors, by name, of more elements than can be, empty axes counted as 1."""
    for name, type in types.items():
        if isinstance(type, TensorType):
            _check_extent(name, type)


def _check_extent(name: str, type: TensorType) -> None:
    if type.rank > MOST_AXES:
        raise LimitError(f'"{name}" has {type.rank} axes; at most {MOST_AXES} are compiled')
    if any(isinstance(dim, int) and dim < 0 for dim in type.shape):
        raise ShapeError(f'"{name}" would be of {type}')
    total = 1
    for dim in type.shape:
        total *= max(1, dim) if isinstance(dim, int) else max(1, *(abs(factor) for _, factor in dim.terms))
    if total >= LARGEST_EXTENT:
        raise LimitError(f'"{name}" of {str(type)[:200]} has more elements than any memory holds')


def check_node_count(left: int, node: NodeProto) -> None:
    """Raises LimitError where no more nodes may be imported, or this one has too many operands or outputs."""
    if left < 0:
        raise LimitError("the model's functions and loops expand to too many nodes")
    if max(map(len, (node.name, *node.input, *node.output))) > LONGEST_NAME:
        raise LimitError(f"it has a name of more than {LONGEST_NAME} characters")
    if max(len(node.input), len(node.output)) > MOST_OPERANDS:
        found = f"{len(node.input)} operands and {len(node.output)} outputs"
        raise LimitError(f"it has {found}; at most {MOST_OPERANDS} are compiled")


def most_nodes(model: ModelProto) -> int:
    """How many nodes may be imported of a model, its functions and bodies expanded: functions that call functions
    twice, or loops in loops whose states change shape, make exponentially many of a few."""
    count = 0
    waiting = [model.graph.node, *(function.node for function in model.functions)]
    while waiting:
        for node in waiting.pop():
            count += 1
            waiting += [attribute.g.node for attribute in node.attribute if attribute.HasField("g")]
    return 5_000 + 50 * count


def _refuse(what: str, size: int, most: int) -> LimitError:
    limit = f"the limit is {format_bytes(most)}: max_memory= (--max-memory) sets another"
    return LimitError(f"{what} {format_bytes(size)}; {limit}")


def check_program(program: Program, most: int) -> None:
    """Raises LimitError where constants, or by the sizes that are known a run, take more than `most` bytes; ShapeError
    where nothing tells one of the sizes."""
    steps = [step for segment in program.segments for step in walk(segment)]
    dims: list[Dim] = [dim for step in steps if isinstance(step, Run) for dim in step.sizes]
    dims += [slot.bytes for slots in program.plan.slots for slot in slots]
    dims += [dim for value in program.outputs for dim in value.shape]
    unknown = {symbol.name for dim in dims for symbol in symbols(dim)} - set(program.symbols)
    if unknown:
        names = ", ".join(sorted(name.removeprefix(MARK) for name in unknown))
        raise ShapeError(f"no input and no node tells the size {names}: operands of the model do not fit each other")
    memories = [memory for memory in program.memories.values() if memory.role == "constant"]
    check_constants({memory.name: memory.bytes for memory in memories if isinstance(memory.bytes, int)}, most)
    # Memories whose sizes symbols tell count as nothing here; a run measures them.
    known = {slot.memory: slot for slots in program.plan.slots for slot in slots if isinstance(slot.bytes, int)}
    for slots in program.plan.slots:
        if all(slot.memory in known for slot in slots):
            check_run(slots, [], {}, most)
    for slot in known.values():
        if isinstance(slot.bytes, int) and slot.bytes > most:
            raise _refuse(f"the intermediate value {slot.memory!r} takes", slot.bytes, most)
    check_outputs(program.outputs, [v.shape if v.tensor.static else None for v in program.outputs], most)  # type: ignore[misc]


def check_constants(sizes: Mapping[str, int], most: int) -> None:
    """Raises LimitError where constants of these bytes, by name, take more than `most`."""
    total = sum(sizes.values())
    if total > most:
        raise _refuse(f"the model's constants (the largest: {max(sizes, key=sizes.__getitem__)!r}) take", total, most)


def check_run(slots: Sequence[ArenaSlot], outputs: Sequence[int], bound: Mapping[str, int], most: int) -> int:
    """The bytes of a segment's arena for these values of the symbols.

    Raises LimitError where it takes, with `outputs` (their bytes), more than `most`.
    """
    ends = [0] * len(slots)
    for index in TopologicalSorter({i: slot.below for i, slot in enumerate(slots)}).static_order():
        slot = slots[index]
        size = max(evaluate(slot.bytes, bound), 0)
        if size > most:
            raise _refuse(f"the intermediate value {slot.memory!r} takes", size, most)
        ends[index] = max((ends[lower] for lower in slot.below), default=0) + -(-size // ALIGNMENT) * ALIGNMENT
    arena = max(ends, default=0)
    if arena + sum(outputs) > most:
        raise _refuse("intermediate values and outputs take", arena + sum(outputs), most)
    return arena


def check_outputs(values: Sequence[Value], shapes: Sequence[Sequence[int] | None], most: int) -> list[int]:
    """The bytes of the outputs, 0 for one whose shape is not known yet. Raises LimitError above `most` bytes."""
    found = []
    for value, shape in zip(values, shapes, strict=True):
        size = 0 if shape is None else math.prod(shape) * max(np.dtype(value.dtype.numpy).itemsize, 1)
        if size > most or any(dim >= 1 << 62 for dim in shape or ()):
            raise _refuse(f"the output {value.name!r} takes", max(size, 1), most)
        found.append(size)
    return found
