"""Segments of a program: memory whose size the run itself tells is laid out once that size is known.

A segment ends with the step that makes such a size known. Inside branches and loops there is no such point: what is
used there gets room for the most that its size can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..ir.dims import Atom, Dim, Extremum, Quotient, Sum, Symbol, dim_max, dim_min, product, symbols
from ..ir.errors import UnsupportedError
from ..ir.program import Assign, Bind, Choose, Memory, Repeat, Run, Step, Steps, walk


def cut(steps: Sequence[Step], memories: Mapping[str, Memory]) -> tuple[Steps, ...]:
    """The steps as segments."""
    needed = {x.name for memory in memories.values() for x in symbols(memory.size)}
    segments: list[list[Step]] = [[]]
    for step in steps:
        segments[-1].append(step)
        if needed & set(made_known((step,))):
            segments.append([])
    return tuple(tuple(segment) for segment in segments if segment) or ((),)


def made_known(steps: Steps) -> Iterator[str]:
    """Names of the symbols that steps give values to."""
    for step in walk(steps):
        if isinstance(step, Bind | Assign):
            yield step.symbol
        elif isinstance(step, Repeat) and step.count is not None:
            yield step.count


def settle(memories: Mapping[str, Memory], segments: Sequence[Steps]) -> dict[str, Memory]:
    """The memories with the segments in which they begin, each of a size that is known by then.

    Raises UnsupportedError where a size is not known and has no limit either.
    """
    known_from: dict[str, int] = {}
    first_use: dict[str, int] = {}
    for number, segment in enumerate(segments):
        known_from |= dict.fromkeys(made_known(segment), number + 1)
        for step in walk(segment):
            for place in _places(step):
                first_use.setdefault(place, number)
    limits = {x.name: x.upper for memory in memories.values() for x in symbols(memory.size) if x.upper is not None}

    def begin(size: Dim) -> int:
        return max((known_from.get(x.name, 0) for x in symbols(size)), default=0)

    found: dict[str, Memory] = {}
    for name, memory in memories.items():
        size, wanted = memory.size, first_use.get(name, len(segments))
        late = {x for x, number in known_from.items() if number > wanted}
        limit: Dim | None = size
        while limit is not None and begin(limit) > wanted and memory.role == "arena":
            limit = at_most(limit, {x: limits.get(x) for x in late})
        if limit is None or begin(limit) > wanted:
            raise UnsupportedError(f"%{name} has a size that only a branch or loop tells: {size}")
        found[name] = replace(memory, size=limit, segment=begin(limit))
    return found


def _places(step: Step) -> Iterator[str]:
    if isinstance(step, Run):
        yield from (place.memory for place in step.arguments)
    elif isinstance(step, Bind):
        yield step.place.memory
    elif isinstance(step, Choose) or (isinstance(step, Repeat) and step.condition is not None):
        assert step.condition is not None
        yield step.condition.memory


def at_most(dim: Dim, limits: Mapping[str, Dim | None]) -> Dim | None:
    """The most that a dim can be, for symbols that are at least 0 and at most their limits; None where that is open."""
    if isinstance(dim, int):
        return dim
    total: Dim = 0
    for monomial, coefficient in dim.terms:
        term: Dim = Sum(((monomial, coefficient),)) if monomial else coefficient
        if not any(x.name in limits for x in symbols(term)):
            total = total + term
        elif coefficient > 0:
            factors = [_atom_at_most(atom, limits) for atom in monomial]
            known = [factor for factor in factors if factor is not None]
            if len(known) < len(factors):
                return None
            total = total + product(known) * coefficient
    return total


def _atom_at_most(atom: Atom, limits: Mapping[str, Dim | None]) -> Dim | None:
    if isinstance(atom, Symbol):
        return limits[atom.name] if atom.name in limits else Sum((((atom,), 1),))
    if isinstance(atom, Quotient):
        top = at_most(atom.numerator, limits) if isinstance(atom.denominator, int) else None
        return None if top is None else top // atom.denominator
    if isinstance(atom, Extremum):
        bounds = [at_most(operand, limits) for operand in atom.operands]
        known = [bound for bound in bounds if bound is not None]
        if not known or (atom.kind == "max" and len(known) < len(bounds)):
            return None
        return dim_max(*known) if atom.kind == "max" else dim_min(*known)
    return None
