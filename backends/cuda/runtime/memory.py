"""Memory of a program on a GPU: where its buffers lie, and what is kept from one call to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter

from ....ir.dims import evaluate
from ....ir.errors import ShapeError
from ....ir.program import ALIGNMENTS, ArenaSlot
from .driver import Block, Device

ALIGNMENT = ALIGNMENTS["cuda"]
"""Bytes to which buffers are aligned, as the driver aligns what it allocates."""
LARGEST = 1 << 46
"""Bytes that no memory has: sizes beyond come from senseless data."""
SPARE_BLOCKS = 32
"""Blocks that a pool keeps for new arrays at most."""


def rounded(size: int, unit: int = ALIGNMENT) -> int:
    """The least multiple of `unit` from `size` up."""
    return -(-size // unit) * unit


def checked_bytes(size: int, what: str, bound: Mapping[str, int]) -> int:
    """`size`; ShapeError where no memory is that large."""
    if size >= LARGEST:
        raise ShapeError(f"{what} would take {size:,} bytes; the sizes are {dict(bound)}")
    return max(size, 0)


class Arena:
    """The layout of one segment's arena: each slot lies above those that it names."""

    def __init__(self, slots: Sequence[ArenaSlot]) -> None:
        self._slots = slots
        self._order = tuple(TopologicalSorter({i: slot.below for i, slot in enumerate(slots)}).static_order())

    def at(self, bound: Mapping[str, int]) -> tuple[dict[str, int], int]:
        """The offset of each memory and the bytes of all, in bytes, for these values of the symbols."""
        offsets, ends = [0] * len(self._slots), [0] * len(self._slots)
        for index in self._order:
            slot = self._slots[index]
            offsets[index] = max((ends[lower] for lower in slot.below), default=0)
            size = checked_bytes(evaluate(slot.bytes, bound), f"the intermediate value {slot.memory!r}", bound)
            ends[index] = offsets[index] + rounded(size)
        total = checked_bytes(max(ends, default=0), "the intermediate values", bound)
        return {slot.memory: offset for slot, offset in zip(self._slots, offsets, strict=True)}, total


def size_class(size: int) -> int:
    """The size of the block that holds `size` bytes: up to an eighth more, so that what grows from call to call finds
    its blocks again."""
    return rounded(max(size, 1), max(ALIGNMENT, 1 << max(0, size.bit_length() - 4)))


class Pool:
    """Blocks for the arrays that calls give away, given back when those are collected, for later work of one stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        # Only operations that need no lock: arrays are collected at any time, on any thread.
        self._spare: deque[tuple[Block, bool]] = deque(maxlen=SPARE_BLOCKS)
        device.keeps_spare(self)

    def take(self, size: int, purpose: str) -> Block:
        """A block that nothing uses but earlier work of the pool's stream."""
        wanted = size_class(size)
        for _ in range(len(self._spare)):
            try:
                block, foreign = self._spare.popleft()
            except IndexError:  # trimmed meanwhile
                break
            if block.size == wanted:
                if foreign:
                    self._device.synchronize()
                return block
            self._spare.append((block, foreign))
        return self._device.allocate(wanted, purpose)

    def give_back(self, block: Block, foreign: bool) -> None:
        """Keeps a block, in place of the oldest where there are many; other streams may still use a `foreign` one."""
        self._spare.append((block, foreign))

    def trim(self) -> None:
        """Gives up what is kept."""
        self._spare.clear()
