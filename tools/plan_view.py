"""A memory plan for people: its size beside the lower bound, a map of the arena over time, and the largest buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from rich.text import Text

from ..compiler.compiled import Buffer, MemoryPlan
from ..ir.program import Bind, Program, Run, walk

COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green", "bright_yellow",
           "bright_blue", "bright_magenta", "bright_cyan")  # fmt: skip
WIDEST_STEP = 6
"""Characters of a step on the map, at most."""
LETTERS = ascii_uppercase + ascii_lowercase


@dataclass(frozen=True)
class PlanView:
    """A memory plan with what its numbers come from.

    `buffers` are the largest first; `peak` is the step with the largest sum of live bytes, `peak_origin` the ONNX nodes
    computed there, `in_place` the number of results that take over the place of another buffer.
    """

    plan: MemoryPlan
    buffers: tuple[Buffer, ...]
    steps: int
    peak: int
    peak_origin: tuple[str, ...]
    in_place: int

    @staticmethod
    def of(plan: MemoryPlan, program: Program | None = None) -> PlanView:
        """The view of a plan; the program tells the nodes at the peak."""
        buffers = tuple(sorted(plan.buffers, key=lambda buffer: (-buffer.bytes, buffer.first)))
        steps = 1 + max((buffer.last for buffer in buffers), default=-1)
        live = [sum(b.bytes for b in buffers if b.first <= step <= b.last) for step in range(steps)]
        peak = max(range(steps), key=live.__getitem__, default=0)
        runs = list(walk(step for segment in program.segments for step in segment)) if program else []
        at = runs[peak] if peak < len(runs) else None
        plain = all(isinstance(step, Run | Bind) for step in runs)  # steps of branches and loops are counted anew
        origin = at.origin if plain and isinstance(at, Run) else ()
        slots = sum(map(len, plan.layout.slots))
        return PlanView(plan, buffers, steps, peak, origin, slots - len(buffers))

    @property
    def ratio(self) -> float:
        """Size over lower bound."""
        return self.plan.arena_bytes / self.plan.lower_bound if self.plan.lower_bound else 1.0

    def record(self) -> dict[str, Any]:
        """All of it, for a script."""
        return {
            "arena_bytes": self.plan.arena_bytes,
            "lower_bound_bytes": self.plan.lower_bound,
            "ratio": self.ratio,
            "symbols": dict(self.plan.sizes),
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
    extent = max(view.plan.arena_bytes, 1)
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
