"""The program language: what runs, in order, over memory that is laid out beforehand.

A program is compiled too; nothing interprets it. Its memories are inputs, outputs, constants and arena buffers; sizes
and offsets are dims over the program's symbols, most of them bound by the shapes of the inputs, some by values that the
run itself computes (`Bind`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .dims import Dim, Sum, substitute, symbol, symbols
from .dtypes import DType
from .graph import Value

if TYPE_CHECKING:
    from .loops import Kernel

ALIGNMENT = 64
ALIGNMENTS = {"cpu": ALIGNMENT, "cuda": 256}
"""Bytes to which runtimes align constants and arena memory, by kind of target."""
MARK = "$"
"""Begins the names of all symbols of programs and kernels, so that no loop index can be one of them."""


def dim_text(dim: Dim) -> str | int:
    """A dim over the model's own names of the symbols, as files hold it."""
    plain = {s.name: symbol(s.name.removeprefix(MARK), None) for s in symbols(dim)}
    return dim if isinstance(dim, int) else str(substitute(dim, plain))


@dataclass(frozen=True)
class Memory:
    """A block of `size` elements. `role` is "input", "output", "constant", "arena" or "fault" (what checks write);
    `segment` is the first segment of the program at whose start the size is known."""

    name: str
    dtype: DType
    size: Dim
    role: str
    segment: int = 0

    @property
    def bytes(self) -> Dim:
        return self.size * self.dtype.bytes


@dataclass(frozen=True)
class Place:
    """An address: `offset` elements into a memory."""

    memory: str
    offset: Dim = 0

    def __str__(self) -> str:
        return self.memory if self.offset == 0 else f"{self.memory}+{self.offset}"


@dataclass(frozen=True)
class Run:
    """Calls a kernel; `sizes` are the values of the kernel's size symbols."""

    kernel: str
    arguments: tuple[Place, ...]
    sizes: tuple[Dim, ...]
    origin: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bind:
    """From here on `symbol` is the integer that lies at `place`; it must not be below `least`."""

    symbol: str
    place: Place
    dtype: DType
    least: int = 0


@dataclass(frozen=True)
class Assign:
    """From here on `symbol` is a size that other symbols tell (the size that the branch taken gave an output)."""

    symbol: str
    value: Dim


@dataclass(frozen=True)
class Choose:
    """One of two blocks, by a bool in memory."""

    condition: Place
    then: Steps
    otherwise: Steps


@dataclass(frozen=True)
class Repeat:
    """The block for index = 0, 1, ... while index < trips (None: no limit) and the bool at `condition` (if any) holds.

    After the loop the symbol `count` (if any) is the number of iterations made.
    """

    index: str
    trips: Dim | None
    condition: Place | None
    body: Steps
    count: str | None = None


Step: TypeAlias = "Run | Bind | Assign | Choose | Repeat"
Steps: TypeAlias = "tuple[Step, ...]"


@dataclass(frozen=True)
class ArenaSlot:
    """Where an arena memory lies: above every memory in `below` (indices of slots of the same segment)."""

    memory: str
    bytes: Dim
    below: tuple[int, ...]


@dataclass(frozen=True)
class ArenaPlan:
    """The layout of all arenas, one per segment, valid for any sizes.

    `size` and `lower_bound` are bytes at the sizes in `hints` (the symbols' values it was made for). `lifetimes` are
    first and last step of each memory; one that takes over another's place in it has none of its own.
    """

    slots: tuple[tuple[ArenaSlot, ...], ...]
    size: int
    lower_bound: int
    hints: Mapping[str, int] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)
    lifetimes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """Everything that a backend compiles and a runtime needs; `results` names the memory of each output.

    `checks` are messages: where the word of the memory of role "fault" that a check writes is not 0, its message holds.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    results: tuple[str, ...]
    memories: Mapping[str, Memory]
    segments: tuple[Steps, ...]
    kernels: Mapping[str, Kernel]
    constants: Mapping[str, Callable[[], np.ndarray]]
    plan: ArenaPlan
    assumptions: tuple[tuple[Dim, Dim], ...] = ()
    checks: tuple[str, ...] = ()

    @property
    def symbols(self) -> tuple[str, ...]:
        """All symbols: those of the inputs' shapes, then those bound by the run, in order."""
        found: dict[str, None] = {}
        for value in self.inputs:
            for dim in value.shape:
                found.update(dict.fromkeys(s.name for s in symbols(dim)))
        for step in walk(step for segment in self.segments for step in segment):
            if isinstance(step, Bind | Assign):
                found[step.symbol] = None
            elif isinstance(step, Repeat):
                found[step.index] = None
                if step.count is not None:
                    found[step.count] = None
        return tuple(found)

    def __str__(self) -> str:
        return print_program(self)


def walk(steps: Iterator[Step] | Steps) -> Iterator[Step]:
    """Every step, those inside branches and loops included."""
    for step in steps:
        yield step
        if isinstance(step, Choose):
            yield from walk(step.then)
            yield from walk(step.otherwise)
        elif isinstance(step, Repeat):
            yield from walk(step.body)


def _print_steps(steps: Steps, indent: str) -> Iterator[str]:
    for step in steps:
        if isinstance(step, Run):
            arguments = ", ".join(map(str, (*step.arguments, *step.sizes)))
            origin = f"   // from {', '.join(step.origin)}" if step.origin else ""
            yield f"{indent}{step.kernel}({arguments}){origin}"
        elif isinstance(step, Bind):
            yield f"{indent}bind {step.symbol} = {step.dtype} {step.place}"
        elif isinstance(step, Assign):
            yield f"{indent}{step.symbol} = {step.value}"
        elif isinstance(step, Choose):
            yield f"{indent}if {step.condition}:"
            yield from _print_steps(step.then, indent + "  ")
            yield f"{indent}else:"
            yield from _print_steps(step.otherwise, indent + "  ")
        else:
            limit = "" if step.trips is None else f" < {step.trips}"
            condition = "" if step.condition is None else f" while {step.condition}"
            yield f"{indent}for {step.index}{limit}{condition}:"
            yield from _print_steps(step.body, indent + "  ")


def print_program(program: Program) -> str:
    """The text of a program, as `onnxc dump --stage program` shows it."""
    inputs = ", ".join(f"%{value.name}: {value.type}" for value in program.inputs)
    outputs = ", ".join(f"%{value.name}: {value.type}" for value in program.outputs)
    lines = [f"program @{program.name}({inputs}) -> ({outputs}):"]
    for memory in program.memories.values():
        if memory.role in ("arena", "constant", "fault"):
            offset = program.plan.offsets.get(memory.name)
            where = f" at {offset}" if offset is not None and not isinstance(memory.size, Sum) else ""
            lines.append(f"  {memory.role} {memory.name}: {memory.dtype}[{memory.size}]{where}")
    for number, segment in enumerate(program.segments):
        if len(program.segments) > 1:
            lines.append(f"  segment {number}:")
        lines += _print_steps(segment, "  ")
    return "\n".join(lines) + "\n"
