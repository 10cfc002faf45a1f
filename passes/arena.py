"""Byte offsets for buffers in one arena: static memory planning with known lifetimes.

`plan_offsets` places buffers of known sizes, `generalise` turns a plan into a rule that places the same buffers for
any other sizes. Lifetimes are closed intervals of step numbers; two buffers that share a step must not share a byte.

Greedy orders come first (Pisarchyk & Lee 2020, "Efficient memory management for deep neural net inference": by size
and by breadth, best fit). Only where all of them miss the lower bound does a tree search run: canonical solutions in
the order of Moffitt 2023 ("MiniMalloc"), pruned by the not-first rule of disjunctive scheduling. Its effort is counted
in placements tried, never in time, so a plan depends on nothing but its arguments.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from itertools import islice
from math import gcd

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.int64]

DEFAULT_EFFORT = 32
"""Placements tried by the search for each buffer, some 70 microseconds each; most networks need none."""
_SEARCHED_BUFFERS = 500  # more buffers get no more placements, so the search ends after some seconds
_SEARCHED_PAIRS = 10_000  # nor do more overlaps, whose placements cost more each

_PLACED = 1 << 60  # the lowest offset of a buffer that needs none any more: above every real offset


@dataclass(frozen=True)
class Buffer:
    """A value of `size` bytes that is live from step `first` to step `last`, both included."""

    name: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Where each buffer lies: byte `offsets` in the order of the buffers, and the `size` of the arena in bytes.

    `lower_bound` is the largest sum of aligned sizes live at one step: no arena can be smaller.
    """

    offsets: tuple[int, ...]
    size: int
    lower_bound: int


def plan_offsets(buffers: Sequence[Buffer], *, alignment: int = 64, effort: int = DEFAULT_EFFORT) -> Plan:
    """Offsets, multiples of `alignment` bytes, at which no two buffers overlap, in an arena as small as can be found.

    Every size is rounded up to `alignment`; a buffer of no bytes gets offset 0. `effort` bounds the search that runs
    where the greedy orders miss the lower bound (see DEFAULT_EFFORT); 0 turns it off.
    Raises ValueError where `alignment` is not positive, a size is negative, or a buffer ends before it starts.
    """
    if alignment < 1:
        raise ValueError(f"alignment must be at least 1 byte, not {alignment}")
    for buffer in buffers:
        if buffer.size < 0 or buffer.last < buffer.first:
            raise ValueError(f"{buffer}: a buffer needs a size of at least 0 and a last step not before its first")
    indices = [index for index, buffer in enumerate(buffers) if buffer.size]
    if not indices:
        return Plan((0,) * len(buffers), 0, 0)
    aligned = [_round_up(buffers[index].size, alignment) for index in indices]
    unit = gcd(*aligned)  # every offset that matters is a sum of sizes, so a multiple of this
    instance = _region(
        np.arange(len(indices)),
        np.array([buffers[index].first for index in indices]),
        np.array([buffers[index].last for index in indices]),
        np.array([size // unit for size in aligned]),
    )
    lower_bound = int(instance.total.max())
    best, height = _greedy(instance, lower_bound)
    if height > lower_bound:
        best, height = _improve(instance, best, height, lower_bound, effort)
    offsets = [0] * len(buffers)
    for index, offset in zip(indices, best, strict=True):
        offsets[index] = offset * unit
    return Plan(tuple(offsets), height * unit, lower_bound * unit)


def generalise(buffers: Sequence[Buffer], plan: Plan) -> tuple[tuple[int, ...], ...]:
    """For each buffer the indices of those directly below it: the plan as a rule for any sizes.

    With offset(b) = max(offset(a) + size(a) for a in below[b]), 0 if there are none, no two buffers overlap whatever
    the sizes are, and with the sizes that were planned no offset is larger than in `plan`. Sizes in the rule are
    rounded up to the alignment. Every buffer live together with b and lower than it is reached through `below`;
    those that are reached through another one are left out (transitive reduction).
    """
    # Where two start at one offset, at least one is empty: it goes below, so that it lifts nothing.
    order = sorted(range(len(buffers)), key=lambda index: (plan.offsets[index], buffers[index].size > 0, index))
    position = [0] * len(buffers)
    for rank, index in enumerate(order):
        position[index] = rank
    neighbours = _neighbours(np.array([b.first for b in buffers]), np.array([b.last for b in buffers]))
    below: list[tuple[int, ...]] = [()] * len(buffers)
    reached = [0] * len(buffers)  # bit i: buffer i lies below, directly or not
    for index in order:
        lower = (other for other in neighbours[index] if position[other] < position[index])
        direct = []
        for other in sorted(lower, key=position.__getitem__, reverse=True):
            if not reached[index] >> other & 1:
                direct.append(other)
                reached[index] |= reached[other] | 1 << other
        below[index] = tuple(sorted(direct))
    return tuple(below)


def offsets_for(below: Sequence[Sequence[int]], sizes: Sequence[int], *, alignment: int = 64) -> tuple[int, ...]:
    """Evaluate the rule of `generalise`: byte offsets for `sizes` in bytes, each rounded up to `alignment`."""
    offsets = [0] * len(sizes)
    for index in TopologicalSorter(dict(enumerate(below))).static_order():
        ends = (offsets[lower] + _round_up(sizes[lower], alignment) for lower in below[index])
        offsets[index] = max(ends, default=0)
    return tuple(offsets)


def _round_up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _neighbours(first: _Array, last: _Array) -> list[list[int]]:
    """For each buffer those that are live at one of its steps, itself among them."""
    return [np.flatnonzero((first <= end) & (last >= begin)).tolist() for begin, end in zip(first, last, strict=True)]


@dataclass(frozen=True, slots=True)
class _Region:
    """Buffers to be placed, and the sections of their time: the maximal sets of buffers live together.

    Per buffer [n]: its index in the whole instance, first and last step, size, the first of its sections and the one
    after the last. Per pair of a section and a buffer in it, by section [k]: the buffer, the section, the size.
    Per section [s]: its first pair, and the sum of its sizes.
    """

    indices: _Array
    first: _Array
    last: _Array
    size: _Array
    begin: _Array
    end: _Array
    pair_buffer: _Array
    pair_section: _Array
    pair_size: _Array
    section_start: _Array
    total: _Array


def _region(indices: _Array, first: _Array, last: _Array, size: _Array) -> _Region:
    # A section is maximal where some buffer starts after the last end: only those steps need to be looked at.
    ends = np.unique(last)
    started = np.searchsorted(np.sort(first), ends, side="right")
    steps = ends[np.diff(started, prepend=0) > 0]
    begin, end = np.searchsorted(steps, first), np.searchsorted(steps, last, side="right")
    length = end - begin
    buffer = np.repeat(np.arange(len(size)), length)
    section = np.arange(len(buffer)) + np.repeat(end - np.cumsum(length), length)
    by_section = np.argsort(section, kind="stable")
    buffer, section = buffer[by_section], section[by_section]
    start = np.searchsorted(section, np.arange(len(steps)))
    total = np.add.reduceat(size[buffer], start)
    return _Region(indices, first, last, size, begin, end, buffer, section, size[buffer], start, total)


def _reordered(region: _Region, order: _Array) -> _Region:
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    per_buffer = {name: getattr(region, name)[order] for name in ("indices", "first", "last", "size", "begin", "end")}
    return replace(region, **per_buffer, pair_buffer=rank[region.pair_buffer])


def _section_peak(region: _Region) -> _Array:
    """Per buffer, the largest total of a section that it is in."""
    peak = np.zeros(len(region.size), np.int64)
    np.maximum.at(peak, region.pair_buffer, region.total[region.pair_section])
    return peak


def _neighbour_count(region: _Region) -> _Array:
    ended = np.searchsorted(np.sort(region.last), region.first)
    not_started = len(region.size) - np.searchsorted(np.sort(region.first), region.last, side="right")
    return len(region.size) - ended - not_started


# What buffers are sorted by, the largest first.
_CRITERIA: dict[str, Callable[[_Region], _Array]] = {
    "size": lambda region: region.size,
    "lifetime": lambda region: region.last - region.first + 1,
    "area": lambda region: region.size * (region.last - region.first + 1),
    "peak": _section_peak,
    "neighbours": _neighbour_count,
    "start": lambda region: region.begin,
    "end": lambda region: region.end,
    "earliest": lambda region: -region.begin,
}
_GREEDY_ORDERS = (
    ("peak", "size"),
    ("size", "lifetime"),
    ("earliest", "size"),
    ("peak", "lifetime", "area"),
)
_BRANCHING_ORDERS = (
    ("peak", "lifetime", "area"),
    ("end", "lifetime", "area"),
    ("peak", "area", "lifetime"),
    ("neighbours", "peak", "area"),
    ("peak", "lifetime", "start"),
)


def _sorted(region: _Region, criteria: Iterable[str]) -> _Array:
    keys = [-_CRITERIA[criterion](region) for criterion in criteria]
    return np.lexsort([region.indices, *reversed(keys)])


def _greedy(region: _Region, lower_bound: int) -> tuple[list[int], int]:
    """Offsets and height of the lowest greedy plan. Each buffer goes into the smallest gap that holds it."""
    size = region.size.tolist()
    neighbours = _neighbours(region.first, region.last)
    best: list[int] = []
    best_height = _PLACED
    for criteria in _GREEDY_ORDERS:
        offsets = [-1] * len(size)
        for index in _sorted(region, criteria).tolist():
            taken = sorted((offsets[other], size[other]) for other in neighbours[index] if offsets[other] >= 0)
            free, smallest, chosen = 0, _PLACED, -1
            for offset, extent in taken:
                if size[index] <= offset - free < smallest:
                    smallest, chosen = offset - free, free
                free = max(free, offset + extent)
            offsets[index] = free if chosen < 0 else chosen
        height = max(map(sum, zip(offsets, size, strict=True)))
        if height < best_height:
            best, best_height = offsets, height
        if height == lower_bound:
            break
    return best, best_height


def _improve(region: _Region, best: list[int], height: int, lower_bound: int, effort: int) -> tuple[list[int], int]:
    """Search for a plan as low as the lower bound with half of `effort`, then bisect the height with the rest."""
    left = effort * min(len(best), _SEARCHED_BUFFERS) * _SEARCHED_PAIRS // max(_SEARCHED_PAIRS, len(region.pair_size))
    budget, capacity = left // 2, lower_bound
    too_low = lower_bound - 1  # the largest capacity at which the search gave up
    while left >= len(best) and too_low + 1 < height:
        found, used = _solve(region, capacity, min(budget, left))
        left -= used
        if found is None:
            too_low = capacity
        else:
            best, height = found, max(map(sum, zip(found, region.size.tolist(), strict=True)))
        budget, capacity = max(left // 4, 4 * len(best)), (too_low + height) // 2
    return best, height


def _solve(region: _Region, capacity: int, effort: int) -> tuple[list[int] | None, int]:
    """Offsets within `capacity`, or None, and the placements tried: all branching orders take turns.

    An order that suits an instance ends after about two placements a buffer, another one may never end; which one
    does differs from instance to instance.
    """
    searches = [_search(region, capacity, criteria) for criteria in _BRANCHING_ORDERS]
    used = 0
    while used < effort:
        for search in searches:
            turn = min(2 * len(region.size), effort - used)
            tried = 0
            for found in islice(search, turn):
                tried += 1
                if found is not None:
                    return found, used + tried
            used += max(tried, 1)
            if tried < turn or used >= effort:  # every order searches all solutions: where one ends, there is none
                return None, used
    return None, used


@dataclass(slots=True)
class _Node:
    """A node of the search tree: a region some of whose buffers are placed.

    `low` [n] is the top of what lies below each buffer, `bound` [n] >= low an offset below which it cannot be in any
    solution under this node; both are _PLACED for placed buffers. `total` [s] is the size of the buffers to come.
    `candidates` are the (offset, buffer) still to be tried here, the best last; `parts` the regions still to be
    solved for the last one tried.
    """

    region: _Region
    low: _Array
    bound: _Array
    total: _Array
    candidates: list[tuple[int, int]]
    parts: list["_Node"]


def _search(region: _Region, capacity: int, criteria: tuple[str, ...]) -> Iterator[list[int] | None]:
    """Depth-first search for offsets that need at most `capacity`: yields None for every placement tried, then those.

    Buffers are placed by increasing offset, each on top of what is placed already ("canonical"), so no partial
    solution is met twice. Where the buffers that remain fall into parts that never live together, each part is solved
    by itself.
    """
    offsets = [0] * len(region.size)
    parts = _parts(region, np.zeros_like(region.size), criteria, capacity)
    nodes = [] if parts is None else [_Node(region, region.size, region.size, region.total, [], parts)]
    solved = parts is not None
    while nodes:
        node = nodes[-1]
        if solved:
            if node.parts:
                nodes.append(node.parts.pop())
                solved = False
            else:
                nodes.pop()
        elif not node.candidates:
            nodes.pop()
        else:
            yield None
            offset, buffer = node.candidates.pop()
            offsets[node.region.indices[buffer]] = offset
            parts = _place(node, offset, buffer, criteria, capacity)
            if parts is not None:
                node.parts, solved = parts, True
    if solved:
        yield offsets


def _place(node: _Node, offset: int, buffer: int, criteria: tuple[str, ...], capacity: int) -> list[_Node] | None:
    """The parts that remain once `buffer` lies at `offset`, or None where they cannot all fit into `capacity`."""
    region = node.region
    size = int(region.size[buffer])
    top = offset + size
    if top > capacity:
        return None
    low = node.low.copy()
    low[buffer] = _PLACED
    above = (low < _PLACED) & (region.first <= region.last[buffer]) & (region.last >= region.first[buffer])
    low[above] = np.maximum(low[above], top)
    if not above.any():
        node.candidates.clear()  # no other offset for this buffer, which carries nothing, can help the others
    remaining = np.flatnonzero(low < _PLACED)
    if not remaining.size:
        return []
    first, last = region.first[remaining], region.last[remaining]
    order = np.argsort(first)
    if (first[order][1:] > np.maximum.accumulate(last[order])[:-1]).any():
        return _parts(region, low, criteria, capacity)
    total = node.total.copy()
    total[region.begin[buffer] : region.end[buffer]] -= size
    bound = np.maximum(np.maximum(node.bound, low), offset)
    blocked = np.flatnonzero((low < offset) | ((low == offset) & (np.arange(len(low)) < buffer)))
    if blocked.size:  # they were passed over at their lowest offset, so a neighbour comes below each of them
        free = low < _PLACED
        free[blocked] = False
        if not free.any():
            return None
        bound[blocked] = np.maximum(bound[blocked], (bound + region.size)[free].min())
        top_of = bound + region.size
        beside = (region.first <= region.last[blocked, None]) & (region.last >= region.first[blocked, None])
        beside[np.arange(len(blocked)), blocked] = False
        bound[blocked] = np.maximum(bound[blocked], np.where(beside, top_of, _PLACED).min(axis=1))
    child = _open(region, low, bound, total, capacity)
    return None if child is None else [child]


def _parts(region: _Region, low: _Array, criteria: tuple[str, ...], capacity: int) -> list[_Node] | None:
    """A node for each set of the unplaced buffers of `region` that is connected in time; None where one cannot fit."""
    unplaced = np.flatnonzero(low < _PLACED)
    unplaced = unplaced[np.argsort(region.first[unplaced], kind="stable")]
    reach = np.maximum.accumulate(region.last[unplaced])
    gaps = np.flatnonzero(region.first[unplaced][1:] > reach[:-1]) + 1
    nodes = []
    for members in np.split(unplaced, gaps):
        part = _region(region.indices[members], region.first[members], region.last[members], region.size[members])
        order = _sorted(part, criteria)
        part = _reordered(part, order)
        node = _open(part, low[members][order], low[members][order], part.total, capacity)
        if node is None:
            return None
        nodes.append(node)
    return nodes


def _open(region: _Region, low: _Array, bound: _Array, total: _Array, capacity: int) -> _Node | None:
    """A node with its candidates, or None where the bounds show that `capacity` is too little.

    The not-first rule: in a section, a buffer whose bound plus all that is to come there exceeds the capacity cannot
    be the lowest, so it lies above the lowest top of those that can.
    """
    bound = bound.copy()
    latest = np.where(total > 0, capacity - total, _PLACED)
    latest_of_pair = latest[region.pair_section]
    while True:
        of_pair = bound[region.pair_buffer]
        if (np.minimum.reduceat(of_pair, region.section_start) > latest).any():
            return None
        lowest_top = np.minimum.reduceat(
            np.where(of_pair <= latest_of_pair, of_pair + region.pair_size, _PLACED), region.section_start
        )[region.pair_section]
        raised = np.flatnonzero((of_pair > latest_of_pair) & (of_pair < lowest_top))
        if not raised.size:
            break
        np.maximum.at(bound, region.pair_buffer[raised], lowest_top[raised])
    if (bound[bound < _PLACED] + region.size[bound < _PLACED] > capacity).any():
        return None
    # At a higher offset there would be room below for a buffer still to come, or too little room for all of them.
    highest = min(int((low + region.size).min()) - 1, capacity - int(total.max()))
    candidates, seen = [], set()
    for buffer in np.flatnonzero((low == bound) & (low <= highest)).tolist():
        twin = region.first[buffer], region.last[buffer], region.size[buffer]
        if twin not in seen:
            candidates.append((int(low[buffer]), buffer))
            seen.add(twin)
    return _Node(region, low, bound, total, sorted(candidates, reverse=True), [])
