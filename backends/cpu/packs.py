"""Vectors of i32 packed into one of bytes, with saturation: `Call("pack_u8" | "pack_i8", (a, b, c, d))`.

Within each block of 16 bytes of the result stand four elements of `a`, then of `b`, `c` and `d`, as the instructions
for two steps of it leave them: PACKSSDW, then PACKUSWB or PACKSSWB ("Intel 64 and IA-32 Architectures Software
Developer's Manual", volume 2). The interleaving of bytes by PUNPCK is the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...ir import scalars as s
from ...ir.dtypes import I8, I32, U8, DType
from ...ir.scalars import Scalar
from ...ir.target import Target

PACKS: Mapping[str, DType] = {"pack_u8": U8, "pack_i8": I8}
PIECE = 4
"""Elements of each vector that lie together in the result."""

INSTRUCTIONS: Mapping[int, tuple[str, str, str, str]] = {
    16: ("avx512bw", "x86.avx512.packssdw.512", "x86.avx512.packuswb.512", "x86.avx512.packsswb.512"),
    8: ("avx2", "x86.avx2.packssdw", "x86.avx2.packuswb", "x86.avx2.packsswb"),
    4: ("sse2", "x86.sse2.packssdw.128", "x86.sse2.packuswb.128", "x86.sse2.packsswb.128"),
}
"""For the lanes of an operand: a feature, and the instructions to i16, from there to u8 and to i8."""


def pack(dtype: DType, vectors: Sequence[Scalar]) -> Scalar:
    """Four vectors of i32 as one of `dtype`."""
    return s.Call(dtype, len(vectors) * vectors[0].lanes, f"pack_{dtype}", tuple(vectors))


def instructions(call: s.Call, target: Target) -> tuple[str, str] | None:
    """What packs to i16, and from there to bytes; None where the target has no such instructions."""
    entry = INSTRUCTIONS.get(call.arguments[0].lanes)
    if entry is None or target.architecture != "x86_64" or not target.has(entry[0]):
        return None
    return entry[1], entry[2] if call.dtype == U8 else entry[3]


def spelt_out(call: s.Call) -> Scalar:
    """The same by minima, maxima and shuffles."""
    lanes = call.arguments[0].lanes
    low, high = (s.const(int(limit), I32, lanes) for limit in call.dtype.limits)
    parts = [s.cast(s.binary("min", s.binary("max", x, low), high), call.dtype) for x in call.arguments]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    first, second = (s.Shuffle(call.dtype, 2 * lanes, a, b, tuple(range(2 * lanes))) for a, b in pairs)
    order = tuple(
        vector * lanes + piece * PIECE + lane
        for piece in range(lanes // PIECE)
        for vector in range(len(parts))
        for lane in range(PIECE)
    )
    return s.Shuffle(call.dtype, call.lanes, first, second, order)
