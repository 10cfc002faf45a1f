"""A program's steps as launches: arguments packed and grids evaluated once for each setting of the sizes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ....ir.dims import Dim, evaluate, symbols
from ....ir.errors import DeviceError, ShapeError
from ....ir.program import Assign, Bind, Choose, Memory, Place, Repeat, Run, Steps
from ..launch import LARGEST_32, Launch
from .driver import Stream

LAUNCHES_KEPT = 4096
"""Launches of a loop that are unrolled into one list at most (some 300 bytes each)."""
SETTINGS_KEPT = 64
"""Settings of the sizes for which a straight part of a program that has branches or loops is kept prepared."""


class Where(NamedTuple):
    """An address: `offset` bytes into a region, which has a number."""

    region: int
    offset: int


@dataclass(frozen=True)
class Kernels:
    """The functions of a program's kernels, as PyCUDA has them, and what launching them takes. `refusal` is what is
    raised where a launch is refused."""

    functions: Mapping[str, Any]
    refusal: type[Exception]
    launches: Mapping[str, Launch]
    sizes: Mapping[str, tuple[str, ...]]
    memories: Mapping[str, Memory]


class _Call(NamedTuple):
    """One launch: grid and block as PyCUDA takes them, and where its arguments lie among all."""

    run: Run
    grid: tuple[int]
    block: tuple[int]
    shared_bytes: int
    start: int
    stop: int


class Launches:
    """Calls in order, with their arguments packed but for the regions' addresses."""

    def __init__(self, kernels: Kernels, calls: Sequence[_Call], words: np.ndarray, pointers: np.ndarray) -> None:
        self._kernels = kernels
        self._calls = calls
        self._words = words
        self._positions, self._regions, offsets = pointers
        self._offsets = offsets.astype(np.uint64)

    def __len__(self) -> int:
        return len(self._calls)

    def queue(self, regions: np.ndarray, stream: Stream) -> None:
        """Launches all on a stream; `regions` are the regions' addresses. DeviceError names the kernel refused."""
        words = self._words.copy()
        words[self._positions] = regions[self._regions] + self._offsets
        content = words.view(np.uint8).data
        functions, queue = self._kernels.functions, stream.pycuda
        for call in self._calls:
            run, grid, block, shared_bytes, start, stop = call
            try:
                functions[run.kernel]._launch_kernel(grid, block, content[start:stop], shared_bytes, queue)
            except self._kernels.refusal as error:
                raise DeviceError(f"{described(call)} cannot be launched: {error}") from error


def described(call: _Call) -> str:
    """A launch, for messages."""
    origin = f" (from {', '.join(call.run.origin)})" if call.run.origin else ""
    return (
        f"kernel {call.run.kernel}{origin} of {call.grid[0]:,} blocks of {call.block[0]} threads with "
        f"{call.shared_bytes:,} bytes of shared memory"
    )


def prepare(
    kernels: Kernels,
    runs: Iterable[tuple[Run, Mapping[str, int]]],
    places: Mapping[str, Where],
    most: float = math.inf,
) -> Launches | None:
    """Launches of kernels, each with the symbols' values at it; `places` tells where every memory lies.

    None where there are more than `most`. ShapeError where a kernel's 32-bit indices do not reach all of a buffer, or
    its grid is too large.
    """
    calls: list[_Call] = []
    words: list[np.ndarray] = []
    pointers: list[tuple[int, int, int]] = []
    end = 0
    for run, bound in runs:
        launch, memories = kernels.launches[run.kernel], kernels.memories
        sizes = [evaluate(size, bound) for size in run.sizes]
        grid = evaluate(launch.grid, dict(zip(kernels.sizes[run.kernel], sizes, strict=True)))
        if grid <= 0:
            continue
        if len(calls) >= most:
            return None
        if launch.index_bits == 32:
            largest = [evaluate(memories[place.memory].size, bound) for place in run.arguments]
            if max(largest + sizes, default=0) > LARGEST_32:
                raise ShapeError(
                    f"{', '.join(run.origin) or run.kernel}: {max(largest + sizes):,} elements are more than its "
                    "32-bit indices reach: fix the sizes by dims=... and compile, so that they get 64 bits"
                )
        if grid > LARGEST_32:
            raise ShapeError(f"{', '.join(run.origin) or run.kernel}: these sizes take {grid:,} blocks, too many")
        for number, place in enumerate(run.arguments):
            region, offset = places[place.memory]
            offset += evaluate(place.offset, bound) * memories[place.memory].dtype.bytes
            pointers.append((end + number, region, offset))
        packed = np.array(sizes, np.int32 if launch.index_bits == 32 else np.int64).tobytes()
        stop = 8 * (end + len(run.arguments)) + len(packed)
        calls.append(_Call(run, (grid,), (launch.threads,), launch.shared_bytes, 8 * end, stop))
        words.append(np.zeros(len(run.arguments), np.uint64))
        words.append(np.frombuffer(packed + bytes(-len(packed) % 8), np.uint64))
        end = -(-stop // 8)
    table = np.array(pointers, np.int64).reshape(-1, 3).T
    return Launches(kernels, calls, np.concatenate([np.zeros(0, np.uint64), *words]), table)


# The form of a program


@dataclass
class Batch:
    """Runs without anything between them that the host decides; prepared once for each setting of the sizes."""

    runs: tuple[Run, ...]
    symbols: tuple[str, ...]
    prepared: OrderedDict[tuple[int | None, ...], Launches]

    def launches(self, kernels: Kernels, bound: Mapping[str, int], places: Mapping[str, Where]) -> Launches:
        key = tuple(bound.get(name) for name in self.symbols)
        found = self.prepared.get(key)
        if found is None:
            found = prepare(kernels, ((run, bound) for run in self.runs), places)
            assert found is not None
            self.prepared[key] = found
            if len(self.prepared) > SETTINGS_KEPT:
                self.prepared.popitem(last=False)
        return found


@dataclass(frozen=True)
class Branch:
    """A `Choose` of batches."""

    condition: Place
    then: tuple[Part, ...]
    otherwise: tuple[Part, ...]


@dataclass(frozen=True)
class Loop:
    """A `Repeat` of batches."""

    index: str
    trips: Dim | None
    condition: Place | None
    body: tuple[Part, ...]
    count: str | None


Part = Batch | Bind | Assign | Branch | Loop


def parts_of(steps: Steps, layout: frozenset[str], memories: Mapping[str, Memory]) -> tuple[Part, ...]:
    """Steps with the runs between others joined; `layout` are the symbols on which places depend."""
    parts: list[Part] = []
    waiting: list[Run] = []

    def flush() -> None:
        if waiting:
            names = dict.fromkeys(sorted(layout | {name for run in waiting for name in _used(run, memories)}))
            parts.append(Batch(tuple(waiting), tuple(names), OrderedDict()))
            waiting.clear()

    for step in steps:
        if isinstance(step, Run):
            waiting.append(step)
            continue
        flush()
        if isinstance(step, Choose):
            branches = [parts_of(block, layout, memories) for block in (step.then, step.otherwise)]
            parts.append(Branch(step.condition, *branches))
        elif isinstance(step, Repeat):
            body = parts_of(step.body, layout, memories)
            parts.append(Loop(step.index, step.trips, step.condition, body, step.count))
        else:
            parts.append(step)
    flush()
    return tuple(parts)


def _used(run: Run, memories: Mapping[str, Memory]) -> Iterator[str]:
    dims = [*run.sizes, *(place.offset for place in run.arguments)]
    dims += [memories[place.memory].size for place in run.arguments]
    for dim in dims:
        yield from (symbol.name for symbol in symbols(dim))


def is_fixed(steps: Steps) -> bool:
    """Whether the sizes alone decide what runs."""
    return all(
        isinstance(step, Run | Assign)
        or (isinstance(step, Repeat) and step.condition is None and step.trips is not None and is_fixed(step.body))
        for step in steps
    )


def unrolled(steps: Steps, bound: dict[str, int]) -> Iterator[tuple[Run, Mapping[str, int]]]:
    """The runs of steps that sizes alone decide, each with the symbols' values at it."""
    for step in steps:
        if isinstance(step, Run):
            yield step, bound
        elif isinstance(step, Assign):
            bound[step.symbol] = evaluate(step.value, bound)
        elif isinstance(step, Repeat):
            assert step.trips is not None
            trips = max(0, evaluate(step.trips, bound))
            for index in range(trips):
                bound[step.index] = index
                yield from unrolled(step.body, bound)
            bound[step.index] = trips
            if step.count is not None:
                bound[step.count] = trips
