"""Dot-product instructions: `Call(name, (accumulator, a, b))` adds to each 32-bit lane the products of 4 or 2 pairs.

Lane i of the result is accumulator[i] + sum of a[g*i + j] * b[g*i + j] for j < g; `a` and `b` have g times the lanes,
or are u32 that hold the g elements of a lane, the first one in the low bits (of `dot2_u7_i8` those of two lanes of 16
bits, with left elements below 128, so that nothing saturates). Sums of integers wrap, so that they are the same in
whatever order: where there is no instruction for four 8-bit elements, two for pairs of i16 are exact too.

Of bf16 the second product is added first, each rounded once: what VDPBF16PS does ("Intel 64 and IA-32 Architectures
Software Developer's Manual", volume 2), which also takes subnormal operands and results for zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...ir import scalars as s
from ...ir.dtypes import BF16, F32, I8, I16, I32, U8, U32, DType
from ...ir.scalars import Scalar
from ...ir.target import Target


@dataclass(frozen=True)
class Dot:
    """A sum of products of `group` neighbours of `left` and `right` elements, added to a number of type `sums`."""

    name: str
    group: int
    left: DType
    right: DType
    sums: DType

    @property
    def accumulates(self) -> bool:
        """Whether the instructions add to the sums themselves."""
        return all(entry.accumulates for entry in INSTRUCTIONS if entry.product == self.name)

    def __call__(self, total: Scalar, a: Scalar, b: Scalar) -> Scalar:
        """`total` and the products of two operands' groups, each group one u32."""
        return s.Call(self.sums, total.lanes, self.name, (total, a, b))


PAIRS = Dot("dot2_bf16_bf16", 2, BF16, BF16, F32)
DOTS = {
    dot.name: dot
    for dot in (
        PAIRS,
        Dot("dot4_u8_i8", 4, U8, I8, I32),
        Dot("dot4_i8_i8", 4, I8, I8, I32),
        Dot("dot4_u8_u8", 4, U8, U8, I32),
        Dot("dot2_i16_i16", 2, I16, I16, I32),
        Dot("dot2_u7_i8", 2, U8, I8, I16),
    )
}


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
    DotInstruction("dot2_u7_i8", 32, ("avx512bw",), "x86.avx512.pmaddubs.w.512", "<64 x i8>", False),
    DotInstruction("dot2_u7_i8", 16, ("avx2",), "x86.avx2.pmadd.ub.sw", "<32 x i8>", False),
    DotInstruction("dot2_u7_i8", 8, ("ssse3",), "x86.ssse3.pmadd.ub.sw.128", "<16 x i8>", False),
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
    dot = DOTS[call.name]
    total, a, b = call.arguments
    if dot.sums == I16:  # a group is half of a u32
        a, b = (s.Bitcast(kind, dot.group * call.lanes, part) for kind, part in ((dot.left, a), (dot.right, b)))
    group = a.lanes // call.lanes
    narrower = [entry.lanes for entry in INSTRUCTIONS if entry.product == call.name and entry.lanes < call.lanes]
    if not any(find(s.Call(call.dtype, lanes, call.name, ()), target) for lanes in narrower):
        if call.dtype == F32:
            for part in (1, 0):
                total = s.fma(_float(a, part, call.lanes), _float(b, part, call.lanes), total)
            return total
        if dot.group == 4 and "dot2_i16_i16" in target.dot_products:
            return _by_pairs(dot, total, _grouped(a, call.lanes), _grouped(b, call.lanes))
        for part in range(dot.group):
            product = _element(a, dot.left, part, call.lanes) * _element(b, dot.right, part, call.lanes)
            total = total + s.cast(product, dot.sums)
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


def _grouped(value: Scalar, lanes: int) -> Scalar:
    return value if value.dtype == U32 else s.Bitcast(U32, lanes, value)


def _by_pairs(dot: Dot, total: Scalar, a: Scalar, b: Scalar) -> Scalar:
    """The even and the odd bytes of groups of four, widened to pairs of i16."""
    pairs = DOTS["dot2_i16_i16"]
    for part in (0, 1):
        total = pairs(total, _widened(a, dot.left, part), _widened(b, dot.right, part))
    return total


def _widened(groups: Scalar, dtype: DType, part: int) -> Scalar:
    """Bytes `part` and `part` + 2 of each u32, as two i16 in a u32."""
    lanes = groups.lanes
    if dtype == U8:
        shifted = s.binary("shr", groups, s.const(8, U32, lanes)) if part else groups
        return shifted & s.const(0x00FF00FF, U32, lanes)
    halves: Scalar = s.Bitcast(I16, 2 * lanes, groups)
    eight = s.const(8, I16, 2 * lanes)
    halves = halves if part else s.binary("shl", halves, eight)
    return s.Bitcast(U32, lanes, s.binary("shr", halves, eight))


def _element(groups: Scalar, dtype: DType, part: int, lanes: int) -> Scalar:
    """One element of each group, as i32."""
    if groups.dtype != U32:
        pick = tuple(range(part, groups.lanes, groups.lanes // lanes))
        return s.cast(s.Shuffle(groups.dtype, lanes, groups, groups, pick), I32)
    left = s.const(32 - dtype.bits * (part + 1), U32, lanes)
    top = s.binary("shl", groups, left)
    if dtype.kind == "int":
        top = s.bitcast(top, I32)
    return s.cast(s.binary("shr", top, s.const(32 - dtype.bits, top.dtype, lanes)), I32)


def _float(pairs: Scalar, part: int, lanes: int) -> Scalar:
    """The first or the second of pairs of bf16, as f32."""
    if pairs.dtype == BF16:
        return s.cast(s.Shuffle(BF16, lanes, pairs, pairs, tuple(range(part, pairs.lanes, 2))), F32)
    bits = pairs & s.const(0xFFFF0000, U32, lanes) if part else s.binary("shl", pairs, s.const(16, U32, lanes))
    return s.bitcast(bits, F32)
