"""Memory planning: where each arena memory of a program lies, for any sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..ir.dims import Dim, evaluate, symbols
from ..ir.program import ALIGNMENT, ArenaPlan, ArenaSlot, Bind, Choose, Memory, Place, Repeat, Run, Steps
from .arena import Buffer, generalise, plan_offsets

HINT = 32
"""The size that a symbol is taken to have where nothing better is known: it only shapes the plan, not its validity."""


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


def plan_arena(memories: Mapping[str, Memory], segments: Sequence[Steps], hints: Mapping[str, int]) -> ArenaPlan:
    """Lays out the arena memories of every segment.

    The layout is made for the sizes in `hints` and kept as an order ("lies above"), from which the offsets follow for any
    sizes: `arena.generalise`.
    """
    alive = lifetimes(segments)
    arena = {name: memory for name, memory in memories.items() if memory.role == "arena" and name in alive}
    names = {x.name for memory in arena.values() for x in symbols(memory.size)}
    values = {name: hints.get(name, HINT) for name in names}
    slots: list[tuple[ArenaSlot, ...]] = []
    offsets: dict[str, int] = {}
    total = bound = 0
    for segment in range(len(segments)):
        own = [memory for memory in arena.values() if memory.segment == segment]
        buffers = [Buffer(m.name, max(_bytes(m.bytes, values), 1), *alive[m.name]) for m in own]
        plan = plan_offsets(buffers, alignment=ALIGNMENT)
        below = generalise(buffers, plan)
        slots.append(tuple(ArenaSlot(m.name, m.bytes, tuple(b)) for m, b in zip(own, below, strict=True)))
        offsets |= {m.name: total + offset for m, offset in zip(own, plan.offsets, strict=True)}
        total += plan.size
        bound += plan.lower_bound
    return ArenaPlan(tuple(slots), total, bound, values, offsets, {n: alive[n] for n in arena})


def _bytes(size: Dim, values: Mapping[str, int]) -> int:
    return evaluate(size, values)
