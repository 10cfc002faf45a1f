"""Which block tile for which product: a model of the time that each of a few dozen takes.

Rates are per multiprocessor and clock. Tensor cores, after NVIDIA's white papers of GA100 and GH100: 1024 products of
16 bits by `mma`, half as many of tf32, twice as many of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ....ir.cuda_devices import DEVICES, Device
from ....ir.dims import Dim, evaluate, symbols
from ....ir.dtypes import F32, F64, DType
from ....ir.intrinsics import MATRIX_OPERANDS
from ....ir.target import Target
from .tiles import Loader, Tile

USUAL_SIZE = 512
"""What a size is taken for that only the run tells."""
_SHARED_RATE = 128.0  # bytes
_L2_RATE = 28.0  # bytes: of 5 TB/s the share of a multiprocessor
_MEMORY_RATE = 2000.0  # bytes, of the whole GPU
_START = 1200.0  # clocks until the first stage has come from memory
_STAGE = 40.0  # clocks of a barrier and what stands around it
_LAUNCH = 2500.0  # clocks of another kernel in a graph
_COPY_ISSUE, _VALUE_ISSUE = 4.0, 14.0  # issue slots of a piece that is copied, an element that is computed
_SHAPES: tuple[tuple[int, int, int, tuple[int, int, int]], ...] = (
    # rows, columns, bytes of depth in a stage, warps
    (256, 128, 64, (4, 2, 1)), (128, 256, 64, (2, 4, 1)), (256, 128, 128, (4, 2, 1)), (128, 256, 128, (2, 4, 1)),
    (128, 128, 64, (2, 2, 1)), (128, 128, 128, (2, 4, 1)),
    (128, 64, 128, (2, 2, 1)), (64, 128, 128, (2, 2, 1)), (128, 32, 128, (4, 1, 1)), (32, 128, 128, (1, 4, 1)),
    (64, 64, 128, (2, 2, 1)), (64, 64, 128, (2, 2, 2)), (64, 32, 128, (2, 1, 2)), (32, 64, 128, (1, 2, 2)),
    (32, 32, 256, (1, 1, 4)), (32, 64, 256, (1, 1, 4)), (64, 32, 256, (1, 1, 4)),
    (16, 64, 256, (1, 1, 4)), (16, 64, 256, (1, 2, 4)), (16, 32, 256, (1, 1, 4)), (16, 32, 512, (1, 1, 8)),
    (16, 128, 128, (1, 4, 1)), (128, 16, 128, (4, 1, 1)), (64, 16, 256, (1, 1, 4)),
)  # fmt: skip
_LANE_SHAPES: tuple[tuple[int, int, int, tuple[int, int, int]], ...] = (
    (128, 128, 64, (4, 2, 1)), (128, 64, 64, (4, 1, 1)), (64, 128, 64, (2, 2, 1)), (64, 64, 64, (2, 1, 1)),
    (64, 64, 128, (2, 1, 2)), (64, 64, 64, (2, 2, 1)), (32, 64, 128, (1, 1, 4)), (32, 32, 128, (1, 1, 4)),
    (64, 32, 128, (2, 1, 2)), (16, 64, 128, (1, 1, 4)), (16, 32, 128, (1, 1, 4)), (16, 32, 256, (1, 1, 8)),
)  # fmt: skip
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Plan:
    """How a product is computed: the block tile, by tensor cores or lane by lane, the depth in so many parts."""

    tile: Tile
    tensor: bool
    splits: int = 1


@dataclass(frozen=True)
class Shape:
    """The sizes of a product, symbols taken for what they usually are; bytes of an element of the outputs, together;
    how often each element of the left operand occurs in its rows."""

    batches: int
    rows: int
    columns: int
    depth: int
    output_bytes: int = 4
    repeated: int = 1


def ceildiv(count: int, size: int) -> int:
    return -(-count // size)


def usual(dim: Dim) -> int:
    """The size, its symbols taken for usual ones."""
    if isinstance(dim, int):
        return dim
    try:
        found = evaluate(dim, {symbol.name: USUAL_SIZE for symbol in symbols(dim)})
    except KeyError:
        return USUAL_SIZE
    return max(1, min(found, 8 * USUAL_SIZE))


def uses_tensor_cores(operands: tuple[DType, DType], sums: DType, target: Target) -> bool:
    """Whether products of these types may be left to tensor cores."""
    if operands == (F32, F32):
        return sums == F32 and target.products == "tf32"
    return operands in MATRIX_OPERANDS and (sums.bits == 32) and sums.is_float == operands[0].is_float


def types_of(loaders: tuple[Loader, Loader]) -> tuple[DType, DType]:
    """The types of both operands' elements."""
    return loaders[0].dtype, loaders[1].dtype


def choose(shape: Shape, loaders: tuple[Loader, Loader], sums: DType, target: Target) -> Plan:
    """The plan that the model finds fastest."""
    device = DEVICES[target.cpu]
    tensor = uses_tensor_cores(types_of(loaders), sums, target)
    plans = list(_plans(shape, loaders, tensor, sums, target, device))
    assert plans, f"no tile for {loaders[0].dtype}"
    return min(plans, key=lambda plan: clocks(plan, shape, loaders, sums, device))


def _plans(
    shape: Shape, loaders: tuple[Loader, Loader], tensor: bool, sums: DType, target: Target, device: Device
) -> Iterator[Plan]:
    size = loaders[0].dtype.bytes
    for rows, columns, deep, warps in _SHAPES if tensor else _LANE_SHAPES:
        depth = deep // size
        for stages in (4, 3, 2):
            tile = Tile(rows, columns, depth, warps, stages)
            if stages * (rows + columns) * deep <= target.shared_bytes and _fits(tile, loaders, tensor, sums):
                break
        else:
            continue
        for splits in _SPLITS:
            if splits == 1 or shape.depth >= 2 * splits * depth:
                yield Plan(tile, tensor, splits)


def registers(tile: Tile, loaders: tuple[Loader, Loader], tensor: bool, sums: DType) -> int:
    """What a thread needs, roughly."""
    wide = max(1, sums.bytes // 4)
    held = tile.warp_rows * tile.warp_columns // 32 * wide
    held += (tile.warp_rows + tile.warp_columns) // 2 if tensor else tile.warp_rows + tile.warp_columns // 2
    for loader, positions in zip(loaders, (tile.rows, tile.columns), strict=True):
        pieces = ceildiv(positions * tile.depth, tile.threads * loader.elements)
        held += max(pieces * loader.held, pieces - 8)  # addresses of more pieces than constants of instructions reach
    return held + 40


def _fits(tile: Tile, loaders: tuple[Loader, Loader], tensor: bool, sums: DType) -> bool:
    """Whether the tile is one that a multiplier can take, without spilling registers."""
    size = loaders[0].dtype.bytes
    if tensor:
        step = MATRIX_OPERANDS[types_of(loaders)][1]
        steps = tile.depth // step // tile.warps[2]
        whole = tile.warp_rows % 16 == 0 and tile.warp_columns % 16 == 0 and (steps == 1 or steps in range(2, 65, 2))
        return whole and registers(tile, loaders, tensor, sums) <= 240
    chunk = 16 // size
    aligned = tile.warp_rows // 4 % max(4, chunk) == 0 and tile.warp_columns // 8 % min(4, chunk) == 0
    whole = aligned and tile.depth % (chunk * tile.warps[2]) == 0 and tile.depth >= chunk * tile.warps[2]
    return whole and tile.columns * size >= 16 and registers(tile, loaders, tensor, sums) <= 220


def _rate(operand: DType, tensor: bool, device: Device) -> float:
    """Products of a multiprocessor in a clock."""
    if tensor:
        return 2048.0 / operand.bytes
    if operand == F64:
        return 64.0 if device.capability in (90, 100) else 32.0 if device.capability == 80 else 2.0
    return 64.0 if device.capability == 80 or not operand.is_float else 128.0


def clocks(plan: Plan, shape: Shape, loaders: tuple[Loader, Loader], sums: DType, device: Device) -> float:
    """The model: waves of blocks, each the longest of what its stages take of multipliers, shared memory and L2."""
    tile, size = plan.tile, loaders[0].dtype.bytes
    tiles = ceildiv(shape.rows, tile.rows) * ceildiv(shape.columns, tile.columns)
    blocks = tiles * shape.batches * plan.splits
    stages = ceildiv(ceildiv(shape.depth, tile.depth), plan.splits)
    multiply = tile.rows * tile.columns * tile.depth / _rate(loaders[0].dtype, plan.tensor, device)
    warps = tile.warps[0] * tile.warps[1]
    shared = warps * (tile.warp_rows + tile.warp_columns) * tile.depth * size / _SHARED_RATE
    l2 = (tile.rows + tile.columns) * tile.depth * size / _L2_RATE
    issue = 0.0
    for loader, positions in zip(loaders, (tile.rows, tile.columns), strict=True):
        slots = _COPY_ISSUE if loader.asynchronous else _VALUE_ISSUE
        issue += positions * tile.depth / loader.elements / 32 * slots / 4
    busy = max(multiply, shared, l2) + issue
    alone = max(multiply * max(1.0, 4 / (warps * tile.warps[2])), shared, l2) + issue + _STAGE
    memory_bytes = tile.stages * (tile.rows + tile.columns) * tile.depth * size
    needed = registers(tile, loaders, plan.tensor, sums)
    together = max(1, device.occupancy(tile.threads, min(needed, 255), memory_bytes).blocks)
    finish = tile.rows * tile.columns * (shape.output_bytes if plan.splits == 1 else 4) / _L2_RATE + 200

    def wave(resident: int) -> float:
        return _START + stages * max(busy * resident, alone) + finish * resident

    whole, rest = divmod(blocks, device.multiprocessors * together)
    total = whole * wave(together) + (wave(ceildiv(rest, device.multiprocessors)) if rest else 0)
    results = shape.batches * shape.rows * shape.columns
    traffic = size * shape.batches * shape.depth * (shape.rows / shape.repeated + shape.columns)
    traffic += results * shape.output_bytes
    total = max(total, traffic / _MEMORY_RATE)
    if plan.splits > 1:
        total += _LAUNCH + results * (4 * plan.splits + shape.output_bytes) / _MEMORY_RATE
    return total
