"""Dot-product instructions: `Call(name, (accumulator, a, b))` adds to each 32-bit lane the products of 4 or 2 pairs.

Lane i of the result is accumulator[i] + sum of a[g*i + j] * b[g*i + j] for j < g; `a` and `b` have g times the lanes,
or are u32 that hold the g elements of a lane, the first one in the low bits.

Of bf16 the second product is added first, each rounded once: what VDPBF16PS does ("Intel 64 and IA-32 Architectures
Software Developer's Manual", volume 2), which also takes subnormal operands and results for zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir import scalars as s
from ...ir.dtypes import BF16, F32, U32
from ...ir.scalars import Scalar
from ...ir.target import Target


@dataclass(frozen=True)
class DotInstruction:
    """One instruction of LLVM: what it needs, how wide it is, and how its operands are typed.

    `accumulates` is false where the sum with the accumulator is a second instruction.
    """

    product: str
    lanes: int
    any_of: tuple[str, ...]
    intrinsic: str
    operand: str
    accumulates: bool = True


_VPDPBUSD = "x86.avx512.vpdpbusd"
INSTRUCTIONS = (
    DotInstruction("dot4_u8_i8", 16, ("avx512vnni",), f"{_VPDPBUSD}.512", "<16 x i32>"),
    DotInstruction("dot4_u8_i8", 8, ("avxvnni", "avx512vnni"), f"{_VPDPBUSD}.256", "<8 x i32>"),
    DotInstruction("dot4_u8_i8", 4, ("avxvnni", "avx512vnni"), f"{_VPDPBUSD}.128", "<4 x i32>"),
    DotInstruction("dot4_u8_i8", 4, ("i8mm",), "aarch64.neon.usdot.v4i32.v16i8", "<16 x i8>"),
    DotInstruction("dot4_i8_i8", 4, ("dotprod",), "aarch64.neon.sdot.v4i32.v16i8", "<16 x i8>"),
    DotInstruction("dot4_u8_u8", 4, ("dotprod",), "aarch64.neon.udot.v4i32.v16i8", "<16 x i8>"),
    DotInstruction("dot2_i16_i16", 16, ("avx512bw",), "x86.avx512.pmaddw.d.512", "<32 x i16>", False),
    DotInstruction("dot2_i16_i16", 8, ("avx2",), "x86.avx2.pmadd.wd", "<16 x i16>", False),
    DotInstruction("dot2_i16_i16", 4, ("sse2",), "x86.sse2.pmadd.wd", "<8 x i16>", False),
    DotInstruction("dot2_bf16_bf16", 16, ("avx512bf16",), "x86.avx512bf16.dpbf16ps.512", "<32 x bfloat>"),
    DotInstruction("dot2_bf16_bf16", 8, ("avx512bf16",), "x86.avx512bf16.dpbf16ps.256", "<16 x bfloat>"),
    DotInstruction("dot2_bf16_bf16", 4, ("avx512bf16",), "x86.avx512bf16.dpbf16ps.128", "<8 x bfloat>"),
)


def find(call: s.Call, target: Target) -> DotInstruction | None:
    """The instruction that makes the whole call on this target."""
    for entry in INSTRUCTIONS:
        if entry.product == call.name and entry.lanes == call.lanes and target.enabled.intersection(entry.any_of):
            return entry
    return None


def split(call: s.Call, target: Target) -> Scalar:
    """A call that is no instruction: two halves, down to one lane, where it is a sum of products."""
    assert any(entry.product == call.name for entry in INSTRUCTIONS), f"no intrinsic {call.name}"
    total, a, b = call.arguments
    group = a.lanes // call.lanes
    narrower = [entry.lanes for entry in INSTRUCTIONS if entry.product == call.name and entry.lanes < call.lanes]
    if not any(find(s.Call(call.dtype, lanes, call.name, ()), target) for lanes in narrower):
        if call.dtype == F32:
            for part in (1, 0):
                total = s.fma(_float(a, part, call.lanes), _float(b, part, call.lanes), total)
            return total
        for part in range(group):
            pick = tuple(range(part, a.lanes, group))
            x, y = (s.cast(s.Shuffle(v.dtype, call.lanes, v, v, pick), call.dtype) for v in (a, b))
            total = total + x * y
        return total
    half = call.lanes // 2

    def piece(value: Scalar, start: int, lanes: int) -> Scalar:
        return s.Shuffle(value.dtype, lanes, value, value, tuple(range(start, start + lanes)))

    low, high = (
        s.Call(
            call.dtype,
            half,
            call.name,
            (piece(total, at, half), piece(a, at * group, half * group), piece(b, at * group, half * group)),
        )
        for at in (0, half)
    )
    return s.Shuffle(call.dtype, call.lanes, low, high, tuple(range(call.lanes)))


def _float(pairs: Scalar, part: int, lanes: int) -> Scalar:
    """The first or the second of pairs of bf16, as f32."""
    if pairs.dtype == BF16:
        return s.cast(s.Shuffle(BF16, lanes, pairs, pairs, tuple(range(part, pairs.lanes, 2))), F32)
    bits = pairs & s.const(0xFFFF0000, U32, lanes) if part else s.binary("shl", pairs, s.const(16, U32, lanes))
    return s.bitcast(bits, F32)
