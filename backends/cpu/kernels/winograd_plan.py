"""Which convolutions are faster by minimal filtering, and how: a cost model of `winograd`'s kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from ....ir.dtypes import F32
from ....ir.target import Target
from .convolution import Convolution
from .filtering import Filtering, exists, filtering, operations
from .register_tile import L2_BYTES_PER_CYCLE, L3_BYTES_PER_CYCLE, Tile, choose_tile, pieces

OUTPUTS = (1, 2, 3, 4)
"""Of a stretch along an axis: those to choose from."""
BLOCKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 196)
MOST_FREQUENCIES = 81
WORTH = 0.85
"""The share of the direct convolution's time from which on the other way is not worth its error."""
USUAL_EXTENT = 56
"""Of outputs along an axis, to plan for where it is only known at run time."""


def applies(found: Convolution) -> bool:
    """Whether `winograd` could compute the convolution at all."""
    windows = found.windows
    return (
        any(taps != 1 for taps in windows.kernel)
        and set(windows.dilations) == {1}
        and found.dtype == found.input.dtype == F32
        and all(isinstance(pad, int) for pad in windows.before)
    )


@dataclass(frozen=True)
class Plan:
    """The algorithms along both axes, stretches of a block, the register tile of the products, and cycles of it all."""

    axes: tuple[Filtering, Filtering]
    block: int
    tile: Tile
    cycles: float

    def __str__(self) -> str:
        return f"{self.axes[0]}x{self.axes[1]}_{self.tile}_{self.block}"


@dataclass(frozen=True)
class Problem:
    """What a plan depends on: outputs and taps along both axes, their strides."""

    outputs: tuple[int, int]
    taps: tuple[int, int]
    strides: tuple[int, int]
    images: int
    group: int
    channels: int
    filters: int


def choose_plan(found: Convolution, target: Target) -> Plan | None:
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
    )
    if 0 in outputs or problem.images == 0:
        return None
    best = _best(problem, target)
    return best if best is not None and best.cycles < WORTH * direct(problem, target) else None


@lru_cache(maxsize=1024)
def _best(problem: Problem, target: Target) -> Plan | None:
    return min(plans(problem, target), key=lambda plan: plan.cycles, default=None)


def plans(problem: Problem, target: Target) -> Iterator[Plan]:
    """All that there is to choose from."""
    axes = [
        [filtering(m, taps, stride) for m in OUTPUTS if m == 1 or (taps != 1 and exists(m, taps, stride))]
        for taps, stride in zip(problem.taps, problem.strides, strict=True)
    ]
    for down, along in product(*axes):
        if down.outputs * along.outputs == 1 or down.products * along.products > MOST_FREQUENCIES:
            continue
        stretches = -(-problem.outputs[0] // down.outputs) * -(-problem.outputs[1] // along.outputs) * problem.images
        for block in sorted({min(stretches, block) for block in BLOCKS}):
            yield _plan(problem, target, (down, along), block, stretches)


@lru_cache(maxsize=1024)
def _tile(rows: int, filters: int, channels: int, target: Target) -> Tile:
    return choose_tile(rows, filters, channels, F32, target)


def _plan(problem: Problem, target: Target, axes: tuple[Filtering, Filtering], block: int, stretches: int) -> Plan:
    """What blocks of this size cost: arithmetic, and each step's traffic to the cache in which it finds its data."""
    channels, filters = problem.channels, problem.filters
    tile = _tile(block, filters, channels, target)
    frequencies = axes[0].products * axes[1].products
    blocks = problem.group * -(-stretches // block)
    deep, broad = -(-channels // tile.lanes), -(-filters // tile.lanes)
    vector = tile.lanes * F32.bytes
    weights = frequencies * channels * broad * vector
    inside = frequencies * block * (deep + broad) * vector
    tiles = list(product(pieces(block, tile.rows), pieces(broad, tile.vectors)))
    sums = sum(
        n * m * (channels * _step(rows, vectors, target) + rows * vectors * _store(target) + 20)
        for (rows, n), (vectors, m) in tiles
    )
    near = weights + inside <= target.l2_bytes * 3 // 4
    streamed = weights / (L2_BYTES_PER_CYCLE if near else L3_BYTES_PER_CYCLE)
    # Written and read once each.
    moved = 2 * inside / (L2_BYTES_PER_CYCLE if inside <= target.l2_bytes * 3 // 4 else L3_BYTES_PER_CYCLE)
    transforms = block * (deep * _into(axes, target) + broad * _from(axes, target))
    # With several threads, blocks that cannot be shared evenly leave some idle.
    turns = -(-blocks // target.threads) * target.threads / blocks
    # Weights arrive while others are multiplied, but not all of the time.
    products = math.hypot(frequencies * sums, streamed)
    return Plan(axes, block, tile, blocks * turns * (products + moved + transforms))


def _step(rows: int, vectors: int, target: Target) -> float:
    """Cycles of a register tile for one channel: multiply-adds, and two loads a cycle."""
    return max(rows * vectors / target.multiply_adds, (rows + vectors) / 2) + 0.25


def _store(target: Target) -> float:
    """Cycles of a vector's store: a core that multiplies vectors in halves stores them so."""
    return 2 / target.multiply_adds


def _into(axes: tuple[Filtering, Filtering], target: Target) -> float:
    """Cycles of the transform of one vector of a stretch's inputs."""
    down, along = axes
    sums = down.inputs * operations(along.data) + along.products * operations(down.data)
    return sums / target.multiply_adds + down.products * along.products * _store(target)


def _from(axes: tuple[Filtering, Filtering], target: Target) -> float:
    """Cycles of the transform of one vector of products."""
    down, along = axes
    sums = along.products * operations(down.results) + down.outputs * operations(along.results)
    outputs = down.outputs * along.outputs
    return (sums + 2 * outputs) / target.multiply_adds + outputs * _store(target)


def direct(problem: Problem, target: Target) -> float:
    """Cycles of the direct convolution, at the speed that it reaches on most images."""
    pixels = problem.images * problem.outputs[0] * problem.outputs[1] * problem.group
    depth = problem.channels * problem.taps[0] * problem.taps[1]
    return 1.06 * pixels * depth * -(-problem.filters // target.lanes(32)) / target.multiply_adds
