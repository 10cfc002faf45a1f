"""Look-ups of bytes in a table of 256, a vector at a time.

AVX512_VBMI picks from two registers of 64 bytes by seven bits of an index: twice that, and the eighth bit chooses.
SSSE3 and AVX2 pick from one of 16 (in each half of a register by itself), or give zero where the index has its highest
bit: an index less 16 k has it after adding 0x70 with saturation unless it is below 16. AArch64 picks from four of 16,
and leaves a lane as it was where the index is beyond them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...ir.target import Target
from .addresses import ModuleText, constant_lanes


class Instructions(Protocol):
    """A function that instructions are appended to."""

    module: ModuleText

    @property
    def target(self) -> Target: ...
    def emit(self, text: str) -> str: ...


def lookup(to: Instructions, index: str, lanes: int, tables: Sequence[str]) -> str:
    """The entries of a table, given as vectors, for `lanes` bytes."""
    wide = 64 if len(tables) == 4 else 32 if to.target.has("avx2") else 16
    parts = [_resized(to, index, lanes, wide, start) for start in range(0, lanes, wide)]
    by_tables = to.target.architecture == "aarch64"
    pick_from = _by_tables if by_tables else _by_permutations if wide == 64 else _by_shuffles
    found = [pick_from(to, part, wide, tables) for part in parts]
    while len(found) > 1:
        pick = constant_lanes(range(2 * wide), "i32")
        found = [
            to.emit(f"shufflevector <{wide} x i8> {a}, <{wide} x i8> {b}, <{2 * wide} x i32> {pick}")
            for a, b in zip(found[::2], found[1::2], strict=True)
        ]
        wide *= 2
    return _resized(to, found[0], wide, lanes, 0)


def _resized(to: Instructions, vector: str, lanes: int, wanted: int, start: int) -> str:
    """Lanes from `start` on, any where there are none."""
    if lanes == wanted:
        return vector
    pick = constant_lanes([min(start + lane, lanes - 1) for lane in range(wanted)], "i32")
    return to.emit(f"shufflevector <{lanes} x i8> {vector}, <{lanes} x i8> poison, <{wanted} x i32> {pick}")


def _call(to: Instructions, name: str, kind: str, *operands: str) -> str:
    to.module.helpers[name] = f"declare {kind} @{name}({', '.join([kind] * len(operands))})\n"
    return to.emit(f"call {kind} @{name}({', '.join(f'{kind} {x}' for x in operands)})")


def _by_permutations(to: Instructions, index: str, wide: int, tables: Sequence[str]) -> str:
    name, kind = "llvm.x86.avx512.vpermi2var.qi.512", f"<{wide} x i8>"
    low, high = (_call(to, name, kind, a, index, b) for a, b in (tables[:2], tables[2:]))
    upper = to.emit(f"icmp slt {kind} {index}, zeroinitializer")
    return to.emit(f"select <{wide} x i1> {upper}, {kind} {high}, {kind} {low}")


def _by_shuffles(to: Instructions, index: str, wide: int, tables: Sequence[str]) -> str:
    name = "llvm.x86.avx2.pshuf.b" if wide == 32 else "llvm.x86.ssse3.pshuf.b.128"
    kind, found = f"<{wide} x i8>", "zeroinitializer"

    def all_lanes(value: int) -> str:
        return "<" + ", ".join([f"i8 {value}"] * wide) + ">"

    for number, table in enumerate(tables):
        if wide == 32:
            pick = constant_lanes([lane % 16 for lane in range(32)], "i32")
            table = to.emit(f"shufflevector <16 x i8> {table}, <16 x i8> poison, <32 x i32> {pick}")
        below = to.emit(f"sub {kind} {index}, {all_lanes(16 * number - 256 * (number > 7))}")
        place = _call(to, f"llvm.uadd.sat.v{wide}i8", kind, below, all_lanes(0x70))
        part = _call(to, name, kind, table, place)
        found = to.emit(f"or {kind} {found}, {part}")
    return found


def _by_tables(to: Instructions, index: str, wide: int, tables: Sequence[str]) -> str:
    kind = f"<{wide} x i8>"
    found = _call(to, "llvm.aarch64.neon.tbl4.v16i8", kind, *tables[:4], index)
    for start in range(4, len(tables), 4):
        below = to.emit(f"sub {kind} {index}, <" + ", ".join([f"i8 {16 * start - 256 * (start > 7)}"] * wide) + ">")
        found = _call(to, "llvm.aarch64.neon.tbx4.v16i8", kind, found, *tables[start : start + 4], below)
    return found
