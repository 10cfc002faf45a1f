"""Operations that a kernel names because no expression of the language means them: one table.

Those of NVIDIA GPUs are instructions of PTX (the PTX ISA's sections on cp.async, ldmatrix and mma give the lanes'
layouts); `wide` ones are executed by all 32 threads of a warp together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .dtypes import BF16, BOOL, F16, F32, I8, I32, I64, U8, U32, DType


@dataclass(frozen=True)
class Operands:
    """What an intrinsic takes: for each address how many elements it reads and writes there, and the types of its
    values (None: that of the first address's elements)."""

    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    values: tuple[DType | None, ...] = ()
    wide: bool = False


_COPY = Operands((0, 1), (1, 0), (BOOL,))
_ATOMIC = Operands((1,), (1,), (None,))

INTRINSICS: Mapping[str, Operands] = {
    # on CPUs: brings the address's line into the caches; it may be outside of the buffer
    "prefetch": Operands((0,), (0,)),
    # target in shared memory, source, whether the source is read: if not, zeros are written. Bytes in the name.
    "copy_async_16": _COPY,
    "copy_async_8": _COPY,
    "copy_async_4": _COPY,
    "copy_async_commit": Operands(),
    "copy_async_wait": Operands(values=(I64,)),  # all but so many of the latest groups of this thread are complete
    "warp_barrier": Operands(wide=True),
    # registers (u32), the row of 16 bytes that this lane names
    **{f"load_matrix_x{n}": Operands((0, 8), (n, 0), wide=True) for n in (1, 2, 4)},
    **{f"load_matrix_x{n}_transposed": Operands((0, 8), (n, 0), wide=True) for n in (1, 2, 4)},
    # accumulators (f32 or i32), operand A, operand B (u32 registers)
    **{f"mma_m16n8k{k}_{kind}": Operands((4, 4, 2), (4, 0, 0), wide=True) for k, kind in (
        (16, "f16"), (16, "bf16"), (8, "tf32"), (32, "s8s8"), (32, "s8u8"), (32, "u8s8"), (32, "u8u8"),
    )},
    **{f"atomic_{op}": _ATOMIC for op in ("add", "min", "max", "mul")},
}  # fmt: skip

MATRIX_OPERANDS: Mapping[tuple[DType, DType], tuple[str, int]] = {
    (F16, F16): ("mma_m16n8k16_f16", 16),
    (BF16, BF16): ("mma_m16n8k16_bf16", 16),
    (F32, F32): ("mma_m16n8k8_tf32", 8),
    (I8, I8): ("mma_m16n8k32_s8s8", 32),
    (I8, U8): ("mma_m16n8k32_s8u8", 32),
    (U8, I8): ("mma_m16n8k32_u8s8", 32),
    (U8, U8): ("mma_m16n8k32_u8u8", 32),
}
"""For the element types of both operands: the intrinsic of a 16 x 8 tile, and its extent of the reduction axis."""

LOOKUP = "lookup_bytes"
"""The expression `Call(LOOKUP, (bytes, *vectors))`: for each byte that with its number of the vectors, end to end."""
WARP = 32
"""Threads of a warp."""
WARP_VALUES: Mapping[str, tuple[DType | None, ...]] = {
    "shuffle_xor": (None, I32),
    "shuffle_down": (None, I32),
    "shuffle_up": (None, I32),
    "shuffle": (None, I32),
    "ballot": (BOOL,),
}
"""Expressions (`scalars.Call`) over values of a whole warp, and the types of their arguments."""
CONVERSIONS: Mapping[str, tuple[DType, ...]] = {
    "f32_to_tf32": (F32, U32),
    "pack_f16": (F32, F32, U32),
    "pack_bf16": (F32, F32, U32),
}
"""Expressions (`scalars.Call`) that round values to the bits which an intrinsic takes: arguments and result."""
