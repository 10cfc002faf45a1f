"""A memory plan for people: its size beside the lower bound, a map of the arena over time, and the largest buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from rich.text import Text

from ..ir.dims import evaluate
from ..ir.program import Program, Run, walk
from ..passes.lower import MARK

COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green", "bright_yellow",
           "bright_blue", "bright_magenta", "bright_cyan")  # fmt: skip
WIDEST_STEP = 6
"""Characters of a step on the map, at most."""
LETTERS = ascii_uppercase + ascii_lowercase


@dataclass(frozen=True)
class Buffer:
    """An arena memory: bytes, offset in bytes, and the first and the last step that touch it."""

    name: str
    bytes: int
    offset: int
    first: int
    last: int


@dataclass(frozen=True)
class PlanView:
    """A program's plan at the sizes it was made for. `peak` is the step with the largest sum of live bytes, `in_place`
    the number of memories that take over the place of another."""

    size: int
    lower_bound: int
    sizes: dict[str, int]
    buffers: tuple[Buffer, ...]
    steps: int
    peak: int
    peak_origin: tuple[str, ...]
    in_place: int

    @staticmethod
    def of(program: Program) -> PlanView:
        plan = program.plan
        buffers = []
        slots = [slot for segment in plan.slots for slot in segment]
        for slot in slots:
            if slot.memory not in plan.lifetimes:
                continue
            size = evaluate(slot.bytes, plan.hints)
            buffers.append(Buffer(slot.memory, size, plan.offsets[slot.memory], *plan.lifetimes[slot.memory]))
        buffers.sort(key=lambda buffer: (-buffer.bytes, buffer.first))
        steps = 1 + max((last for _, last in plan.lifetimes.values()), default=-1)
        live = [sum(b.bytes for b in buffers if b.first <= step <= b.last) for step in range(steps)]
        peak = max(range(steps), key=lambda step: live[step], default=0)
        runs = list(walk(step for segment in program.segments for step in segment))
        at = runs[peak] if len(runs) == steps and peak < steps else None  # a loop's steps count anew
        origin = at.origin if isinstance(at, Run) else ()
        sizes = {name.removeprefix(MARK): size for name, size in plan.hints.items()}
        return PlanView(
            plan.size, plan.lower_bound, sizes, tuple(buffers), steps, peak, origin, len(slots) - len(buffers)
        )

    @property
    def ratio(self) -> float:
        """Size over lower bound."""
        return self.size / self.lower_bound if self.lower_bound else 1.0

    def record(self) -> dict[str, Any]:
        """All of it, for a script."""
        return {
            "arena_bytes": self.size,
            "lower_bound_bytes": self.lower_bound,
            "ratio": self.ratio,
            "symbols": self.sizes,
            "sum_of_buffers_bytes": sum(buffer.bytes for buffer in self.buffers),
            "steps": self.steps,
            "written_in_place": self.in_place,
            "peak_step": self.peak,
            "peak_nodes": list(self.peak_origin),
            "buffers": [vars(buffer) for buffer in self.buffers],
        }

    def letters(self) -> dict[str, str]:
        """The letters by which the map shows the largest buffers."""
        return {buffer.name: letter for buffer, letter in zip(self.buffers, LETTERS, strict=False)}


def bytes_text(count: int) -> str:
    """A size as people read it."""
    for unit, width in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= width:
            return f"{count / width:.3f} {unit}"
    return f"{count} B"


def arena_map(view: PlanView, width: int, height: int) -> list[Text]:
    """The arena as lines of characters: steps from left to right, offsets from bottom to top.

    A cell shows the buffer that fills most of it, by its letter (`view.letters`), "-" for a smaller one, "." for none.
    """
    letters, position = view.letters(), {buffer.name: i for i, buffer in enumerate(view.buffers)}
    extent = max(view.size, 1)
    repeat = max(1, min(width // view.steps, WIDEST_STEP))
    edges = [i * view.steps // min(width, view.steps) for i in range(min(width, view.steps) + 1)]
    lines = []
    for row in reversed(range(height)):
        low, high = row * extent / height, (row + 1) * extent / height
        line = Text()
        for start, end in pairwise(edges):
            found = _fills_most(view.buffers, low, high, start, end)
            if found is None:
                line.append("." * repeat, "dim")
            else:
                line.append(letters.get(found.name, "-") * repeat, COLOURS[position[found.name] % len(COLOURS)])
        lines.append(line)
    return lines


def _fills_most(buffers: Sequence[Buffer], low: float, high: float, start: int, end: int) -> Buffer | None:
    """The buffer with the greatest part of the area between two offsets and two steps; None where half is empty."""
    best, most, total = None, 0.0, 0.0
    for buffer in buffers:
        across = min(end, buffer.last + 1) - max(start, buffer.first)
        along = min(high, buffer.offset + buffer.bytes) - max(low, buffer.offset)
        if across > 0 and along > 0:
            total += across * along
            if across * along > most:
                best, most = buffer, across * along
    return best if total >= (high - low) * (end - start) / 2 else None
