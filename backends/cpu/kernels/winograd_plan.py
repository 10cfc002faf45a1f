"""Which convolutions are faster by minimal filtering, and how: a cost model of `winograd`'s kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from ....ir.dtypes import BF16, F16, F32
from ....ir.target import Target
from ..dot_products import PAIRS
from .convolution import Convolution
from .filtering import Filtering, exists, filtering
from .register_tile import L2_BYTES_PER_CYCLE, Tile, choose_tile, pieces

OUTPUTS = (2, 3, 4)
"""Of a stretch along an axis with several taps: those to choose from."""
NARROW_OUTPUTS = 2
"""The most where products are of bf16: errors of F(2x2, 3x3) are 1.8 times the definition's, of F(3x3, 3x3) 5 times."""
BLOCKS = (4, 8, 12, 16, 24, 32, 48, 64)
MOST_FREQUENCIES = 81
LARGEST = 255
"""Of pixels and weights less their zero points."""
WORTH = 0.85
"""The share of the direct convolution's time from which on the other way is not worth its error."""
WORTH_EXACT = 0.97
"""That where there is no error."""
STREAMED_PER_CYCLE, L3_PER_CYCLE, MOVED_PER_CYCLE = 12.0, 32.0, 8.0
"""Bytes a cycle of weights, read in order from memory and from the last cache; and of transformed numbers, written to
it and read."""
TILE_CYCLES = 20.0
"""To begin and end a register tile."""
USUAL_EXTENT = 56
"""Of outputs along an axis, to plan for where it is only known at run time."""


def applies(found: Convolution) -> bool:
    """Whether `winograd` could compute the convolution at all."""
    windows = found.windows
    return (
        any(taps != 1 for taps in windows.kernel)
        and set(windows.dilations) == {1}
        and found.channels != 1  # a depthwise one, or with nothing to sum over
        and found.dtype == F32
        and found.input.dtype in (F32, BF16, F16)
        and all(isinstance(pad, int) for pad in windows.before)
    )


@dataclass(frozen=True)
class Plan:
    """The algorithms along both axes, stretches of a block, the register tile of the products, and cycles of it all;
    whether the products are of pairs of bf16."""

    axes: tuple[Filtering, Filtering]
    block: int
    tile: Tile
    cycles: float
    narrow: bool = False

    def __str__(self) -> str:
        return f"{self.axes[0]}x{self.axes[1]}_{self.tile}_{self.block}"


@dataclass(frozen=True)
class Problem:
    """What a plan depends on: outputs and taps along both axes, their strides; whether the image is of bf16, and
    pairs of it are multiplied by one instruction. Of integers (then 8-bit ones, transformed to pairs of i16), the least
    number of bits that hold any result."""

    outputs: tuple[int, int]
    taps: tuple[int, int]
    strides: tuple[int, int]
    images: int
    group: int
    channels: int
    filters: int
    narrow: bool = False
    bits: int = 0


def choose_plan(found: Convolution, target: Target, bits: int = 0) -> Plan | None:
    """The fastest algorithm and block size; None where the definition is about as fast."""
    windows = found.windows
    outputs = [extent if isinstance(extent, int) else USUAL_EXTENT for extent in windows.output]
    problem = Problem(
        (outputs[0], outputs[1]),
        (int(str(windows.kernel[0])), int(str(windows.kernel[1]))),
        (windows.strides[0], windows.strides[1]),
        found.images if isinstance(found.images, int) else 1,
        found.group,
        found.channels,
        found.filters,
        found.input.dtype == BF16 and PAIRS.name in target.dot_products,
        bits,
    )
    if 0 in outputs or problem.images == 0:
        return None
    best = _best(problem, target)
    worth = WORTH_EXACT if bits else WORTH
    return best if best is not None and best.cycles < worth * direct(problem, target) else None


@lru_cache(maxsize=1024)
def _best(problem: Problem, target: Target) -> Plan | None:
    return min(plans(problem, target), key=lambda plan: plan.cycles, default=None)


def plans(problem: Problem, target: Target) -> Iterator[Plan]:
    """All that there is to choose from."""
    whole = problem.bits != 0
    axes = [
        [filtering(m, taps, stride, whole) for m in (OUTPUTS if taps != 1 else (1,)) if exists(m, taps, stride, whole)]
        for taps, stride in zip(problem.taps, problem.strides, strict=True)
    ]
    for down, along in product(*axes):
        if down.products * along.products > MOST_FREQUENCIES:
            continue
        if whole and not fits(down, along, problem.bits):
            continue
        stretches = -(-problem.outputs[0] // down.outputs) * -(-problem.outputs[1] // along.outputs) * problem.images
        narrow = problem.narrow and max(down.outputs, along.outputs) <= NARROW_OUTPUTS
        even = {-(-stretches // (target.threads * turns)) for turns in (1, 2, 3)} if target.threads > 1 else set()
        for block in sorted(even | {min(stretches, block) for block in BLOCKS}):
            for pairs in (True,) if whole else (False, True) if narrow else (False,):
                yield _plan(problem, target, (down, along), block, stretches, pairs)


def fits(down: Filtering, along: Filtering, bits: int) -> bool:
    """Whether transformed images and weights are i16, and results of so many bits are left when what they are
    multiplied by is taken off sums of 32 bits."""
    data, weights = (
        math.prod(max(sum(map(abs, row)) for row in rows) for rows in both)
        for both in ((down.data, along.data), (down.weights, along.weights))
    )
    factor = down.factor * along.factor
    twos = (factor & -factor).bit_length() - 1
    return max(data, weights) * LARGEST < 1 << 15 and bits + twos <= 32


@lru_cache(maxsize=1024)
def _tile(rows: int, filters: int, channels: int, target: Target) -> Tile:
    return choose_tile(rows, filters, channels, F32, target)


def _plan(
    problem: Problem,
    target: Target,
    axes: tuple[Filtering, Filtering],
    block: int,
    stretches: int,
    pairs: bool = False,
) -> Plan:
    tile = _tile(block, problem.filters, problem.channels, target)
    full, rest = divmod(stretches, block)
    first = _block(problem, target, axes, tile, block, pairs, True)
    other, last = (_block(problem, target, axes, tile, count, pairs, False) for count in (block, rest))
    blocks = problem.group * (full + (rest != 0))
    if target.threads == 1:
        cycles = problem.group * (first + (full - 1) * other + last)
    else:  # As long as the thread with the most blocks, which reads the weights first, too.
        cycles = target.threads * (first + (-(-blocks // target.threads) - 1) * other)
    return Plan(axes, block, tile, cycles, pairs)


def _block(
    problem: Problem,
    target: Target,
    axes: tuple[Filtering, Filtering],
    tile: Tile,
    stretches: int,
    pairs: bool,
    first: bool,
) -> float:
    """Cycles of one block: arithmetic, and each step's traffic to the cache in which it finds its data."""
    if stretches == 0:
        return 0
    channels, frequencies = problem.channels, axes[0].products * axes[1].products
    deep, broad = -(-channels // tile.lanes), -(-problem.filters // tile.lanes)
    depth = -(-channels // (1 + pairs))
    vector = tile.lanes * F32.bytes
    weights = frequencies * depth * broad * vector
    inside = frequencies * stretches * (deep / (1 + pairs) + broad) * vector
    sums = sum(
        n * m * (depth * _step(rows, vectors, target) + rows * vectors * _store(target) + TILE_CYCLES)
        for (rows, n), (vectors, m) in product(pieces(stretches, tile.rows), pieces(broad, tile.vectors))
    )
    if first or weights > target.l3_bytes * 3 // 4:
        rate = STREAMED_PER_CYCLE
    else:
        rate = L2_BYTES_PER_CYCLE if weights + inside <= target.l2_bytes * 3 // 4 else L3_PER_CYCLE
    # Weights arrive while others are multiplied, but not all of the time.
    products = math.hypot(frequencies * sums, weights / rate)
    # Written and read once each, the first time in memory that no cache holds.
    near = inside <= target.l2_bytes * 3 // 4
    moved = 2 * inside / (L2_BYTES_PER_CYCLE if near else MOVED_PER_CYCLE) + first * 2 * inside / STREAMED_PER_CYCLE
    # Of integers, twice as many are transformed by an instruction.
    into = _into(axes, target) / (1 + (problem.bits != 0))
    return products + moved + stretches * (deep * into + broad * _from(axes, target))


def _step(rows: int, vectors: int, target: Target) -> float:
    """Cycles of a register tile for one channel: multiply-adds, and two loads a cycle."""
    return max(rows * vectors / target.multiply_adds, (rows + vectors) / 2) + 0.25


def _store(target: Target) -> float:
    """Cycles of a vector's store: a core that multiplies vectors in halves stores them so."""
    return 2 / target.multiply_adds


def _into(axes: tuple[Filtering, Filtering], target: Target) -> float:
    """Cycles of the transform of one vector of a stretch's inputs."""
    down, along = axes
    sums = down.inputs * along.data_operations + along.products * down.data_operations
    return sums / target.multiply_adds + down.products * along.products * _store(target)


def _from(axes: tuple[Filtering, Filtering], target: Target) -> float:
    """Cycles of the transform of one vector of products."""
    down, along = axes
    sums = along.products * down.results_operations + down.outputs * along.results_operations
    outputs = down.outputs * along.outputs
    return (sums + 2 * outputs) / target.multiply_adds + outputs * _store(target)


def direct(problem: Problem, target: Target) -> float:
    """Cycles of the direct convolution, at the speed that it reaches on most images."""
    pixels = problem.images * problem.outputs[0] * problem.outputs[1] * problem.group
    depth = -(-problem.channels // (4 if problem.bits else 1 + problem.narrow)) * problem.taps[0] * problem.taps[1]
    return 1.06 * pixels * depth * -(-problem.filters // target.lanes(32)) / target.multiply_adds
