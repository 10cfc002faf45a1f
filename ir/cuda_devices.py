"""NVIDIA's GPUs by architecture: the facts that schedules are sized by, and how many blocks share a multiprocessor.

The limits of a multiprocessor are those of the CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; the calculation of occupancy is that of the toolkit's `cuda_occupancy.h`. How many multiprocessors there
are and how large the L2 cache is depends on the product, not on the architecture: the table has those of the product
that it names, which is what code is planned for ahead of time. A runtime asks the device itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

WARP = 32
THREADS_PER_BLOCK = 1024
REGISTERS_PER_SM = 65536
REGISTERS_PER_THREAD = 255
_SHARED_RESERVED = 1024  # of each block, by the driver
_SHARED_GRANULARITY = 128
_REGISTER_GRANULARITY = 256  # registers, of a warp
_PARTITIONS = 4  # of a multiprocessor, each with a quarter of its registers


@dataclass(frozen=True)
class Occupancy:
    """Blocks of a kernel that are on a multiprocessor at once, their warps, and what keeps more away."""

    blocks: int
    warps: int
    share: float
    """Of the warps that the multiprocessor has room for, 0 to 1."""
    limit: str
    """ "threads", "blocks", "registers" or "shared memory"."""


@dataclass(frozen=True)
class Device:
    """An architecture and the product that stands for it. Memory is in bytes, registers have 32 bits."""

    name: str
    capability: int
    product: str
    multiprocessors: int
    l2_bytes: int
    threads_per_sm: int
    blocks_per_sm: int
    shared_per_sm: int
    registers_per_sm: int = REGISTERS_PER_SM

    @property
    def shared_per_block(self) -> int:
        """What a block has of it, if it asks for that at launch."""
        return self.shared_per_sm - _SHARED_RESERVED

    @property
    def is_specific(self) -> bool:
        """Whether its machine code runs on exactly this compute capability, as it uses what no other has ("sm_90a")."""
        return self.name.endswith("a")

    def occupancy(self, threads: int, registers: int, shared_bytes: int) -> Occupancy:
        """How blocks of `threads` threads, each with `registers` registers, share a multiprocessor.

        `shared_bytes` is the block's shared memory, static and dynamic. A block that does not fit has 0 blocks.
        """
        warps_per_block = _over(threads, WARP)
        warps = self.threads_per_sm // WARP
        registers_per_warp = _up(max(registers, 1) * WARP, _REGISTER_GRANULARITY)
        warps_by_registers = self.registers_per_sm // _PARTITIONS // registers_per_warp * _PARTITIONS
        limits = {
            "threads": warps // warps_per_block,
            "blocks": self.blocks_per_sm,
            "registers": warps_by_registers // warps_per_block,
            "shared memory": self.shared_per_sm // _up(shared_bytes + _SHARED_RESERVED, _SHARED_GRANULARITY),
        }
        if threads > THREADS_PER_BLOCK:
            limits["threads"] = 0
        # A launch is refused where the block's warps, as many in each partition, do not find registers.
        if registers > REGISTERS_PER_THREAD or _up(warps_per_block, _PARTITIONS) > warps_by_registers:
            limits["registers"] = 0
        if shared_bytes > self.shared_per_block:
            limits["shared memory"] = 0
        limit = min(limits, key=limits.__getitem__)
        blocks = limits[limit]
        return Occupancy(blocks, blocks * warps_per_block, blocks * warps_per_block / warps, limit)


def _over(count: int, size: int) -> int:
    return -(-count // size)


def _up(count: int, size: int) -> int:
    return _over(count, size) * size


_KIB, _MIB = 1 << 10, 1 << 20
_TABLE = (
    # name, capability, product, multiprocessors, L2; threads, blocks and shared memory of a multiprocessor
    ("sm_80", 80, "A100", 108, 40 * _MIB, 2048, 32, 164 * _KIB),
    ("sm_86", 86, "RTX 3090", 82, 6 * _MIB, 1536, 16, 100 * _KIB),
    ("sm_87", 87, "Jetson AGX Orin", 16, 4 * _MIB, 1536, 16, 164 * _KIB),
    ("sm_89", 89, "RTX 4090", 128, 72 * _MIB, 1536, 24, 100 * _KIB),
    ("sm_90", 90, "H100 SXM", 132, 50 * _MIB, 2048, 32, 228 * _KIB),
    ("sm_90a", 90, "H100 SXM", 132, 50 * _MIB, 2048, 32, 228 * _KIB),
    ("sm_100", 100, "B200", 148, 126 * _MIB, 2048, 32, 228 * _KIB),
    ("sm_103", 103, "B300", 148, 126 * _MIB, 2048, 32, 228 * _KIB),
    ("sm_120", 120, "RTX 5090", 170, 96 * _MIB, 1536, 24, 100 * _KIB),
)
DEVICES: Mapping[str, Device] = MappingProxyType({row[0]: Device(*row) for row in _TABLE})
"""By architecture, as NVRTC calls it; machine code also runs on later minor versions of the same major one."""
