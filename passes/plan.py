"""Memory planning: where each arena memory of a program lies, for any sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..ir.dims import Dim, evaluate, symbols
from ..ir.loops import Kernel
from ..ir.program import ALIGNMENT, ArenaPlan, ArenaSlot, Bind, Choose, Memory, Place, Repeat, Run, Step, Steps
from .arena import Buffer, generalise, plan_offsets

HINT = 32
"""The size that a symbol is taken to have where nothing better is known: it only shapes the plan, not its validity."""


_MOST = 1 << 46
"""Bytes that no buffer has: larger ones are refused before they are allocated, and planned as if they had so many."""


def places_of(steps: Steps) -> Iterator[tuple[Place, ...]]:
    """The places that each step touches, in order of execution; a loop's are repeated as one group at its end."""
    for step in steps:
        if isinstance(step, Run):
            yield step.arguments
        elif isinstance(step, Bind):
            yield (step.place,)
        elif isinstance(step, Choose):
            yield (step.condition,)
            yield from places_of(step.then)
            yield from places_of(step.otherwise)
        elif isinstance(step, Repeat):
            inside = list(places_of(step.body))
            carried = tuple(place for group in inside for place in group)
            condition = (step.condition,) if step.condition is not None else ()
            # What a loop touches must stay where it is from before its first iteration to after its last.
            yield condition + carried
            yield from inside
            yield condition + carried


def lifetimes(segments: Sequence[Steps]) -> dict[str, tuple[int, int]]:
    """First and last step (counted over all segments) at which each memory is touched."""
    found: dict[str, tuple[int, int]] = {}
    position = 0
    for segment in segments:
        for group in places_of(segment):
            for place in group:
                first, _ = found.get(place.memory, (position, position))
                found[place.memory] = (first, position)
            position += 1
    return found


def in_place(
    memories: Mapping[str, Memory],
    segments: Sequence[Steps],
    kernels: Mapping[str, Kernel],
    alive: Mapping[str, tuple[int, int]],
) -> dict[str, str]:
    """For each memory that takes another's place: the other. A kernel may write over an input that dies with it."""
    taken: dict[str, str] = {}
    position = -1
    for segment in segments:
        for step, depth in _flat(segment):
            position += 1
            if not isinstance(step, Run) or depth:
                continue
            kernel = kernels[step.kernel]
            names = {buffer.name: place for buffer, place in zip(kernel.parameters, step.arguments, strict=True)}
            for source, result in kernel.aliases:
                old, new = memories[names[source].memory], memories[names[result].memory]
                whole = names[source].offset == 0 and names[result].offset == 0 and old.bytes == new.bytes
                once = sum(place.memory == old.name for place in step.arguments) == 1
                both = old.role == new.role == "arena" and old.segment == new.segment and old.name != new.name
                if both and whole and once and alive[old.name][1] == position == alive[new.name][0]:
                    taken[new.name] = old.name
    return taken


def _flat(steps: Steps, depth: int = 0) -> Iterator[tuple[Step | None, int]]:
    """Each position that `lifetimes` counts, with the step that is there and how deep in branches and loops it lies."""
    for step in steps:
        if isinstance(step, Run | Bind):
            yield step, depth
        elif isinstance(step, Choose):
            yield None, depth
            yield from _flat(step.then, depth + 1)
            yield from _flat(step.otherwise, depth + 1)
        elif isinstance(step, Repeat):
            yield None, depth
            yield from _flat(step.body, depth + 1)
            yield None, depth


def plan_arena(
    memories: Mapping[str, Memory],
    segments: Sequence[Steps],
    kernels: Mapping[str, Kernel],
    hints: Mapping[str, int],
) -> ArenaPlan:
    """Lays out the arena memories of every segment.

    The layout is made for the sizes in `hints` and kept as an order ("lies above"), from which the offsets follow for
    any sizes: `arena.generalise`. Memories that follow one another in place are one buffer.
    """
    alive = lifetimes(segments)
    arena = {name: memory for name, memory in memories.items() if memory.role == "arena" and name in alive}
    values = {n: hints.get(n, HINT) for n in (x.name for memory in arena.values() for x in symbols(memory.size))}
    taken = in_place(memories, segments, kernels, alive)

    def root(name: str) -> str:
        while name in taken:
            name = taken[name]
        return name

    spans: dict[str, tuple[int, int]] = {}
    for name in arena:
        first, last = spans.get(root(name), alive[name])
        spans[root(name)] = (min(first, alive[name][0]), max(last, alive[name][1]))
    slots: list[tuple[ArenaSlot, ...]] = []
    offsets: dict[str, int] = {}
    total = bound = 0
    for segment in range(len(segments)):
        own = [memory for memory in arena.values() if memory.segment == segment and memory.name not in taken]
        buffers = [Buffer(m.name, max(_bytes(m.bytes, values), 1), *spans[m.name]) for m in own]
        plan = plan_offsets(buffers, alignment=ALIGNMENT)
        below = generalise(buffers, plan)
        offsets |= {m.name: total + offset for m, offset in zip(own, plan.offsets, strict=True)}
        placed = [ArenaSlot(m.name, m.bytes, tuple(b)) for m, b in zip(own, below, strict=True)]
        position = {slot.memory: slot for slot in placed}
        for name, memory in arena.items():
            if name in taken and memory.segment == segment:
                placed.append(ArenaSlot(name, memory.bytes, position[root(name)].below))
                offsets[name] = offsets[root(name)]
        slots.append(tuple(placed))
        total += plan.size
        bound += plan.lower_bound
    return ArenaPlan(tuple(slots), total, bound, values, offsets, spans)


def _bytes(size: Dim, values: Mapping[str, int]) -> int:
    return min(evaluate(size, values), _MOST)
