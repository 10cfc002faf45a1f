"""Memory plans as they are made: each is checked, at several sizes, by `plan_checker`, which knows nothing of planning.

When a memory is in use is found anew from the program's steps; two half steps stand for each, as a kernel that may
write over an operand (`Kernel.aliases`) has read it in the first when it writes its result in the second.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
from onnxc.ir.dims import evaluate, symbols
from onnxc.ir.loops import Kernel
from onnxc.ir.program import ALIGNMENT, ArenaPlan, ArenaSlot, Bind, Choose, Memory, Place, Repeat, Run, Steps
from onnxc.passes import lower
from plan_checker import check_plan


class Uses:
    """First and last half step at which each memory is in use, for memories at these offsets."""

    def __init__(self, kernels: Mapping[str, Kernel], offsets: Mapping[str, int]) -> None:
        self.kernels, self.offsets = kernels, offsets
        self.spans: dict[str, tuple[int, int]] = {}
        self.now = 0

    def _touch(self, name: str, first: int, last: int) -> None:
        known = self.spans.get(name, (first, last))
        self.spans[name] = min(known[0], first), max(known[1], last)

    def walk(self, steps: Steps) -> set[str]:
        """Follows steps; the memories that they touch."""
        touched: set[str] = set()
        for step in steps:
            start, inside = self.now, set()
            if isinstance(step, Run):
                inside = self._run(step)
            elif isinstance(step, Bind):
                inside = {step.place.memory}
            elif isinstance(step, Choose):
                self._touch(step.condition.memory, start, start + 1)
                self.now += 2
                touched |= {step.condition.memory} | self.walk(step.then) | self.walk(step.otherwise)
                continue
            elif isinstance(step, Repeat):
                self.now += 2
                inside = self.walk(step.body) | ({step.condition.memory} if step.condition else set())
            if not isinstance(step, Run):
                for name in inside:  # what an iteration leaves is there for the next
                    self._touch(name, start, self.now + 1)
            self.now += 2
            touched |= inside
        return touched

    def _run(self, step: Run) -> set[str]:
        kernel = self.kernels[step.kernel]
        places = {buffer.name: place for buffer, place in zip(kernel.parameters, step.arguments, strict=True)}
        spans = dict.fromkeys((place.memory for place in step.arguments), (self.now, self.now + 1))
        for source, result in kernel.aliases:
            old, new = places[source], places[result]
            if self._is_replaced(old, new) and [p.memory for p in step.arguments].count(old.memory) == 1:
                spans |= {old.memory: (self.now, self.now), new.memory: (self.now + 1, self.now + 1)}
        for name, span in spans.items():
            self._touch(name, *span)
        return set(spans)

    def _is_replaced(self, old: Place, new: Place) -> bool:
        at = self.offsets.get(old.memory)
        return at is not None and at == self.offsets.get(new.memory) and old.offset == new.offset == 0


def offsets_at(slots: Sequence[ArenaSlot], values: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """The offset of each memory of an arena at these sizes, and the arena's bytes."""
    sizes = [max(0, evaluate(slot.bytes, values)) for slot in slots]
    room = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    found: dict[int, int] = {}
    while len(found) < len(slots):
        before = len(found)
        for i, slot in enumerate(slots):
            if i not in found and set(slot.below) <= found.keys():
                found[i] = max((found[j] + room[j] for j in slot.below), default=0)
        assert len(found) > before, "memories lie above themselves"
    places = {slot.memory: found[i] for i, slot in enumerate(slots)}
    return places, max((found[i] + room[i] for i in found), default=0)


def check_arenas(
    plan: ArenaPlan, memories: Mapping[str, Memory], segments: Sequence[Steps], kernels: Mapping[str, Kernel]
) -> None:
    """AssertionError where memories share bytes while both are in use, at the sizes planned for or at others."""
    names = sorted({symbol.name for slots in plan.slots for slot in slots for symbol in symbols(slot.bytes)})
    chance = random.Random(len(names))
    settings = [dict.fromkeys(names, 1), *({name: chance.randint(0, 70) for name in names} for _ in range(2))]
    for values in (dict(plan.hints), *(settings if names else ())):
        values = {**dict.fromkeys(names, 1), **values}
        arenas = [offsets_at(slots, values) for slots in plan.slots]
        placed = {name: offset for offsets, _ in arenas for name, offset in offsets.items()}
        uses = Uses(kernels, placed)
        for steps in segments:
            uses.walk(steps)
        planned = {name for name in uses.spans if memories[name].role == "arena"}
        assert planned == placed.keys(), f"memories in use and memories planned differ: {planned ^ placed.keys()}"
        for offsets, size in arenas:
            room = {name: max(0, evaluate(memories[name].bytes, values)) for name in offsets}
            check_plan([(*uses.spans[name], offset, room[name]) for name, offset in offsets.items()], size)


@contextmanager
def checking_plans() -> Iterator[list[int]]:
    """Inside, every plan that is made is checked; the number of memories in each."""
    original = lower.plan_arena
    seen: list[int] = []

    def plan_arena(
        memories: Mapping[str, Memory],
        segments: Sequence[Steps],
        kernels: Mapping[str, Kernel],
        hints: Mapping[str, int],
    ) -> ArenaPlan:
        plan = original(memories, segments, kernels, hints)
        check_arenas(plan, memories, segments, kernels)
        seen.append(sum(map(len, plan.slots)))
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "plan_arena", plan_arena)
        yield seen
