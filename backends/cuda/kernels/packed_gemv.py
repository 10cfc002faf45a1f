"""Few rows by weights that stay packed (`onnxc.PackedMatMul`): as fast as memory brings the codes.

A lane reads 16 bytes of codes of each of its columns at once and takes them apart as it multiplies. A code c of b bits
becomes the real 2^b + c by a shift and one operation on the bits, right below the leading one of its mantissa (after
the conversions of Kim et al. 2022, "Who says elephants can't run"): conversions of integers run at a fraction of the
rate. What is too much is taken off once for each block of a scale:

    sum of x * (c - zero) * scale  =  scale * (sum of x * (2^b + c)  -  (2^b + zero) * (sum of x)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim, dim_min, product
from ....ir.dtypes import F32, U32
from ....ir.loops import Statement, Store
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Tensor
from ....passes.regions import Lowered, Region
from ...kernels.calls import attribute, call
from ...kernels.operands import constant_array
from .gemv import READS, FewRows, Multiplied
from .problem import find_problem
from .tiles import CHUNK, counter, unrolled

ROWS = 8
"""Rows up to which the codes are read once."""
_WORDS = CHUNK // 4
_MANTISSA, _ONE = 23, 127
"""Bits of a real's mantissa; the exponent of 1."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernel of a few rows by packed weights that are constants; None where it does not apply."""
    if region.anchor is None or region.anchor.op != "onnxc.PackedMatMul":
        return None
    _, codes, scales, zeros = (*region.operands, None)[:4]
    array = constant_array(region, codes)
    found = find_problem(region)
    if array is None or scales is None or found is None or found[1] is None:
        return None
    sums, left, right = found[1].sums, found[1].left, found[1].right
    bits, block, depth = (int(attribute(region, name)) for name in ("bits", "block_size", "depth"))
    rows, piece, word = sums.rows, 8 * CHUNK // bits, 32 // bits
    known = isinstance(rows, int) and 0 < rows <= ROWS
    block = min(block, depth)
    whole = depth % piece == 0 and block % word == 0 and (block % piece == 0 or piece % block == 0)
    if not known or not whole or sums.batches != 1 or array.shape[1] * 8 // bits != depth:
        return None
    words = np.ascontiguousarray(array).view(np.uint32)
    buffer = Buffer("codes", U32, product(words.shape))
    assert isinstance(rows, int)
    made = PackedRows(region, sums, left, right, rows, target, buffer, scales, zeros, bits, block)
    kernel = call(region, f"{region.name}_{bits}_bits_few_rows", (made.by_depth(),), (buffer,))
    return Lowered((kernel,), packed={buffer.name: words.reshape(-1).copy})


@dataclass(frozen=True)
class PackedRows(FewRows):
    """The kernel for codes of `bits` bits, in words; blocks of a scale are `block` long."""

    codes: Buffer
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int

    @property
    def chunk(self) -> int:
        """Codes that are read at once."""
        return 8 * CHUNK // self.bits

    @property
    def word(self) -> int:
        """Codes of a word."""
        return 32 // self.bits

    def multiplied(self, totals: Buffer, each: int) -> tuple[list[Buffer], Multiplied]:
        rows = self.rows
        run = min(self.block, self.chunk) // self.word  # words of one scale
        weights = Buffer("weights", U32, 2 * max(1, READS // each) * each * _WORDS, "register")
        held = Buffer("inputs", F32, rows * self.word, "register")
        partial, inputs = Buffer("partial", F32, each * rows, "register"), Buffer("input_sums", F32, rows, "register")
        column, row = counter("column_of", each), counter("row_of", rows)
        depth = self.streamed.extents[1]
        assert isinstance(depth, int)

        def here(first: Dim) -> Dim:
            return dim_min(first + column, self.columns - 1)

        def steps(count: int, depth_of: Callable[[Dim], Dim], first: Dim) -> tuple[Statement, ...]:
            which = counter("ahead", count)
            at = (which * each + column) * _WORDS
            place = here(first) * (depth // self.word) + depth_of(which) // self.word
            read = Store(weights, at, load(self.codes, place, _WORDS, aligned=True))
            groups, words = counter("group_of", _WORDS // run), counter("word_of", run)
            number = groups * run + words
            terms: list[Statement] = []
            for element in range(self.word):
                value = load(held, row * self.word + element)
                terms.append(
                    Store(
                        partial,
                        column * rows + row,
                        s.fma(
                            value, self._real(load(weights, at + number), element), load(partial, column * rows + row)
                        ),
                    )
                )
            added = [
                Store(inputs, row, load(inputs, row) + load(held, row * self.word + element))
                for element in range(self.word)
            ]
            multiply = (
                *self.hold(held, depth_of(which) + number * self.word, self.word),
                *unrolled("row_of", rows, added),
                *unrolled("column_of", each, unrolled("row_of", rows, terms)),
            )
            block = (depth_of(which) + groups * (run * self.word)) // self.block
            scale = s.cast(self.scales.at((here(first), block)), F32)
            zero = const(float(1 << (self.bits - 1)), F32)
            if self.zeros is not None:
                zero = s.cast(self.zeros.at((here(first), block)), F32)
            much = zero + const(float(1 << self.bits), F32)
            rest = load(partial, column * rows + row) - much * load(inputs, row)
            finish = Store(totals, column * rows + row, s.fma(scale, rest, load(totals, column * rows + row)))
            group: list[Statement] = [
                *unrolled("row_of", rows, [Store(inputs, row, const(0, F32))]),
                *unrolled(
                    "column_of", each, unrolled("row_of", rows, [Store(partial, column * rows + row, const(0, F32))])
                ),
                *unrolled("word_of", run, multiply),
                *unrolled("column_of", each, unrolled("row_of", rows, [finish])),
            ]
            return (
                *unrolled("ahead", count, unrolled("column_of", each, [read])),
                *unrolled("ahead", count, unrolled("group_of", _WORDS // run, group)),
            )

        return [weights, held, partial, inputs], steps

    def _real(self, word: Scalar, element: int) -> Scalar:
        """2^bits + the code of this number in the word, as a real."""
        place = _MANTISSA - self.bits
        shift = place - element * self.bits
        moved = s.binary("shl" if shift > 0 else "shr", word, const(abs(shift), U32)) if shift else word
        code = s.binary("and", moved, const(((1 << self.bits) - 1) << place, U32))
        return s.bitcast(s.binary("or", code, const((_ONE + self.bits) << _MANTISSA, U32)), F32)
