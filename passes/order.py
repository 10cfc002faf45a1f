"""An order of steps that keeps few bytes alive: list scheduling for memory.

A value is live from the step that writes it to the last step that reads it; while a step runs, what it reads and what
it writes is live together. `order_steps` looks for the topological order whose largest sum of live bytes is small.

The graph is cut at the steps that every other step comes before or after; between two cuts lies a region that can be
ordered by itself. A region that matters for the peak is solved by dynamic programming over its downsets, the sets of
steps that can have run (Ahn et al. 2020, "Ordering Chaos"), exactly where they fit into the width of the beam. Work is
counted in moves, never in time, so the order depends on nothing but the arguments.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

_BEAM_WIDTHS = (4, 32, 256)
_MOVES = 20_000  # at least this many moves are looked at, at some 1.5 microseconds each
_MOVES_PER_STEP = 40


def order_steps(
    count: int,
    reads: Sequence[Sequence[int]],
    writes: Sequence[Sequence[int]],
    sizes: Sequence[int],
    keep: Set[int] = frozenset(),
) -> list[int]:
    """A topological order of the steps 0 .. count - 1, which are given in one, with a low peak of live bytes.

    `reads[step]` and `writes[step]` are value numbers, `sizes[value]` their bytes (0 for what lies elsewhere: constants
    and inputs); values in `keep` stay live to the end. The order given is returned unless a better one is found.
    Raises ValueError where a value is written twice, or is read before the step that writes it.
    """
    writer: dict[int, int] = {}
    for step in range(count):
        for value in writes[step]:
            if value in writer:
                raise ValueError(f"value {value} is written by step {writer[value]} and again by step {step}")
            writer[value] = step
    needed = [{writer[value] for value in reads[step] if value in writer} for step in range(count)]
    for step in range(count):
        if any(before >= step for before in needed[step]):
            raise ValueError(f"step {step} reads a value that is not written before it")

    readers: dict[int, set[int]] = {value: set() for value in writer}
    for step in range(count):
        for value in reads[step]:
            if value in writer:
                readers[value].add(step)
    graph = _Graph(needed, reads, writes, sizes, writer, readers, keep)
    ancestors, descendants = _closures(needed)
    floor = _lower_bound(graph, ancestors, descendants)
    before, during = _live_bytes(graph)

    cuts = [step for step in range(count) if ancestors[step].bit_count() + descendants[step].bit_count() + 1 == count]
    ends = [*(step + 1 for step in cuts), *([] if cuts and cuts[-1] == count - 1 else [count])]
    slices = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False) if end - begin > 1]
    order = list(range(count))
    moves = max(_MOVES, _MOVES_PER_STEP * count)
    # A region below what another one needs anyway cannot lower the peak, so the highest come first.
    for steps in sorted(slices, key=lambda steps: -max(during[steps.start : steps.stop])):
        if max(during[steps.start : steps.stop]) > floor:
            region = _region(graph, steps, before[steps.start])
            local, moves = _best_order(region, floor, moves)
            floor = max(floor, _peak(region, local))
            order[steps.start : steps.stop] = [steps.start + step for step in local]
    return order


def peak_bytes(
    order: Sequence[int],
    reads: Sequence[Sequence[int]],
    writes: Sequence[Sequence[int]],
    sizes: Sequence[int],
    keep: Set[int] = frozenset(),
) -> int:
    """The largest sum of the bytes live at one step when the steps run in `order`."""
    last_use = {value: step for step in order for value in (*writes[step], *reads[step])}
    written: set[int] = set()
    live = peak = 0
    for step in order:
        written.update(writes[step])
        live += sum(sizes[value] for value in writes[step])
        peak = max(peak, live)
        used = {*reads[step], *writes[step]} & written
        live -= sum(sizes[value] for value in used if last_use[value] == step and value not in keep)
    return peak


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _closures(needed: Sequence[Set[int]]) -> tuple[list[int], list[int]]:
    """For each step the steps that must come before it and after it, as bit sets."""
    ancestors, descendants = [0] * len(needed), [0] * len(needed)
    for step, direct in enumerate(needed):
        for before in direct:
            ancestors[step] |= ancestors[before] | 1 << before
    for step in reversed(range(len(needed))):
        for before in needed[step]:
            descendants[before] |= descendants[step] | 1 << step
    return ancestors, descendants


@dataclass(frozen=True, slots=True)
class _Graph:
    """The steps in the order given: which steps each needs, and by value the step that writes it and its readers."""

    needed: Sequence[Set[int]]
    reads: Sequence[Sequence[int]]
    writes: Sequence[Sequence[int]]
    sizes: Sequence[int]
    writer: dict[int, int]
    readers: dict[int, set[int]]
    keep: Set[int]


def _lower_bound(graph: _Graph, ancestors: Sequence[int], descendants: Sequence[int]) -> int:
    """The largest sum of bytes live at one step in every order: written at or before it, read at or after it."""
    count = len(graph.needed)
    forced = np.zeros(count, np.int64)
    for value, step in graph.writer.items():
        if graph.sizes[value]:
            until = (1 << count) - 1 if value in graph.keep else 1 << step
            for reader in graph.readers[value]:
                until |= ancestors[reader] | 1 << reader
            held = ((descendants[step] | 1 << step) & until).to_bytes(-(-count // 8), "little")
            steps = np.unpackbits(np.frombuffer(held, np.uint8), count=count, bitorder="little").view(np.bool_)
            forced[steps] += graph.sizes[value]
    return int(forced.max(initial=0))


def _live_bytes(graph: _Graph) -> tuple[list[int], list[int]]:
    """Bytes live before and during each step in the order given."""
    count = len(graph.needed)
    change = [0] * (count + 1)
    ends = [0] * (count + 1)
    for value, step in graph.writer.items():
        change[step] += graph.sizes[value]
        ends[count if value in graph.keep else max(graph.readers[value], default=step)] += graph.sizes[value]
    before, during = [], []
    live = 0
    for step in range(count):
        before.append(live)
        live += change[step]
        during.append(live)
        live -= ends[step]
    return before, during


@dataclass(frozen=True, slots=True)
class _Region:
    """Consecutive steps, numbered from 0, between two cuts, and the bytes live before the first of them.

    Per step: the bit set of steps it needs and the list of steps that need it, the bytes that it writes, those of
    them that nobody reads, and for each value that it reads and that can die here, its bytes and the bit set of its
    readers.
    """

    live: int
    needed: list[int]
    needed_by: list[list[int]]
    written: list[int]
    unread: list[int]
    read: list[list[tuple[int, int]]]


def _region(graph: _Graph, steps: range, live: int) -> _Region:
    begin = steps.start
    inside = [[before - begin for before in graph.needed[step] if before >= begin] for step in steps]
    needed_by: list[list[int]] = [[] for _ in steps]
    for step, direct in enumerate(inside):
        for before in direct:
            needed_by[before].append(step)
    unread = [0] * len(steps)
    read: list[list[tuple[int, int]]] = [[] for _ in steps]
    for value in sorted({value for step in steps for value in (*graph.reads[step], *graph.writes[step])}):
        step, size = graph.writer.get(value, steps.stop), graph.sizes[value]
        outlives = value in graph.keep or any(reader >= steps.stop for reader in graph.readers.get(value, ()))
        if step >= steps.stop or not size or outlives:
            continue
        here = [reader - begin for reader in graph.readers[value] if reader >= begin]
        mask = sum(1 << reader for reader in here)
        for reader in here:
            read[reader].append((size, mask))
        if not here:
            unread[step - begin] += size
    return _Region(
        live,
        [sum(1 << before for before in direct) for direct in inside],
        needed_by,
        [sum(graph.sizes[value] for value in graph.writes[step]) for step in steps],
        unread,
        read,
    )


def _peak(region: _Region, order: Sequence[int]) -> int:
    live = peak = region.live
    ran = 0
    for step in order:
        live += region.written[step]
        peak = max(peak, live)
        ran |= 1 << step
        live -= region.unread[step] + sum(size for size, readers in region.read[step] if readers & ran == readers)
    return peak


def _best_order(region: _Region, floor: int, moves: int) -> tuple[list[int], int]:
    """The lowest order found, the given one where it is as good or not above `floor`; and the moves that are left."""
    best = list(range(len(region.written)))
    peak = _peak(region, best)
    if peak <= floor:
        return best, moves
    candidate = _depth_first(region)
    if _peak(region, candidate) < peak:
        best, peak = candidate, _peak(region, candidate)
    for width in _BEAM_WIDTHS:
        if peak <= floor or moves <= 0:
            break
        found, moves, exact = _beam(region, floor, peak, width, moves)
        if found is not None:
            best, peak = found, _peak(region, found)
        if exact:
            break
    return best, moves


def _depth_first(region: _Region) -> list[int]:
    """What is needed goes right before what needs it; the branch whose peak exceeds its result by most goes first.

    Optimal among such orders where the region is a tree (Liu 1986).
    """
    count = len(region.written)
    need = [0] * count

    def by_need(steps: list[int]) -> list[int]:
        return sorted(steps, key=lambda step: (region.written[step] - need[step], step))

    for step in range(count):
        held = 0
        for before in by_need(list(_bits(region.needed[step]))):
            need[step] = max(need[step], held + need[before])
            held += region.written[before]
        need[step] = max(need[step], held + region.written[step])

    order: list[int] = []
    ran = 0
    stack = by_need([step for step in range(count) if not region.needed_by[step]])[::-1]
    while stack:
        step = stack[-1]
        missing = region.needed[step] & ~ran
        if missing:
            stack.extend(by_need(list(_bits(missing)))[::-1])
            continue
        stack.pop()
        if not ran >> step & 1:
            order.append(step)
            ran |= 1 << step
    return order


_Trail = tuple[int, "_Trail"] | None  # the last step and the trail before it


def _beam(region: _Region, floor: int, limit: int, width: int, moves: int) -> tuple[list[int] | None, int, bool]:
    """Dynamic programming over downsets, at most `width` of each size: an order whose peak is below `limit`, or None.

    Also the moves that are left, and whether nothing was left out, which makes the result the best there is.
    """
    count = len(region.written)
    ready = sum(1 << step for step in range(count) if not region.needed[step])
    # By the set of steps that ran: peak so far, live bytes, steps that can run, and how it was reached.
    states: dict[int, tuple[int, int, int, _Trail]] = {0: (region.live, region.live, ready, None)}
    exact = True
    for _ in range(count):
        following: dict[int, tuple[int, int, int, int, _Trail]] = {}
        for ran, (peak, live, ready, trail) in states.items():
            options = []
            for step in _bits(ready):
                moves -= 1
                top = live + region.written[step]
                if top >= limit:
                    continue
                after = ran | 1 << step
                left = top - region.unread[step]
                for size, readers in region.read[step]:
                    if readers & after == readers:
                        left -= size
                option = (after, max(peak, top), left, ready, step)
                # A step that leaves no more than it found, without a new peak, is best taken at once: it
                # would leave no less later, and whatever runs in between has the more room.
                if left <= live and top <= max(peak, floor):
                    options = [option]
                    break
                options.append(option)
            for after, new_peak, left, ready, step in options:
                known = following.get(after)
                if known is None or new_peak < known[0]:
                    following[after] = (new_peak, left, ready, step, trail)
        if moves <= 0 or not following:
            return None, moves, exact and moves > 0
        kept = list(following.items())
        if len(kept) > width:
            kept = sorted(kept, key=lambda item: (max(item[1][0], floor), item[1][1]))[:width]
            exact = False
        states = {}
        for after, (peak, live, ready, step, trail) in kept:
            ready ^= 1 << step
            for other in region.needed_by[step]:
                if region.needed[other] & after == region.needed[other]:
                    ready |= 1 << other
            states[after] = (peak, live, ready, (step, trail))
    ((_, _, _, trail),) = states.values()
    order = []
    while trail is not None:
        step, trail = trail
        order.append(step)
    return order[::-1], moves, exact
