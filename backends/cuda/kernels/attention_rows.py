"""Rows of an attention's result: what weights are relative to, parts of a row combined, and where it is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, product, symbol
from ....ir.dtypes import F32
from ....ir.loops import Alloc, Block, Define, For, If, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.tensors import flat_offset, unflatten
from ....passes.regions import ANCHOR
from ....passes.threads import THREAD
from ...kernels.attention_problem import CHANNEL, Problem, inverse
from ...kernels.attention_scores import LOWEST, QUERY, Score, base_of, number, power

COMBINING_THREADS = 128
SPLIT = "split"
"""Symbol of the block's place among those that share keys."""


@dataclass(frozen=True)
class Partial:
    """Memory for the results of `splits` blocks that share the keys of a row: sums [batch, splits, query, channel], and
    for each row the greatest score and the sum of the exponentials."""

    problem: Problem
    splits: Dim

    @property
    def shape(self) -> tuple[Dim, ...]:
        return (*(axis.extent for axis in self.problem.axes), self.splits, self.problem.queries.rows)

    @property
    def sums(self) -> Buffer:
        return Buffer("partial_sums", F32, product(self.shape) * self.problem.values.channels)

    @property
    def rows(self) -> Buffer:
        return Buffer("partial_rows", F32, product(self.shape) * 2)

    def row(self, split: Dim, query: Dim) -> Dim:
        return flat_offset((*(axis.index for axis in self.problem.axes), split, query), self.shape)


def store_result(problem: Problem, channel: Dim, values: Sequence[Scalar], padded: int) -> list[Statement]:
    """Neighbouring elements of the anchor to where the result goes, for the query that QUERY names."""
    result = problem.result

    def piece(at: Dim, value: Scalar) -> tuple[Dim, Scalar]:
        made = s.cast(value, result.dtype)
        rewriter = s.Rewriter(
            lambda part: made if isinstance(part, s.Element) and part.tensor == ANCHOR else None, {CHANNEL: at}
        )
        return rewriter.dim(result.offset), rewriter(result.value)

    pieces = [piece(channel + j, value) for j, value in enumerate(values)]
    return stores(result.buffer, pieces, channel, problem.values.channels, padded, result.neighbours)


def stores(
    buffer: Buffer, pieces: Sequence[tuple[Dim, Scalar]], channel: Dim, channels: int, padded: int, neighbours: int
) -> list[Statement]:
    """Values at offsets, from a channel on, of which `padded` are computed and `channels` exist."""
    together = math.gcd(neighbours, len(pieces), channels)
    found: list[Statement] = []
    for start in range(0, len(pieces), together):
        parts = pieces[start : start + together]
        value = parts[0][1]
        if together > 1:
            value = s.Vector(value.dtype, together, tuple(part for _, part in parts))
        store: Statement = Store(buffer, parts[0][0], value, aligned=together > 1)
        found.append(store if channels == padded else If(s.index(channel + start) < s.index(channels), (store,)))
    return found


@dataclass(frozen=True)
class Combination:
    """Statements after which `top`, `total` and `sums` are those of several partial results together."""

    statements: tuple[Statement, ...]
    top: Scalar
    total: Scalar
    sums: tuple[Scalar, ...]


Place = Callable[[Dim], tuple[Buffer, Dim]]


def combined(score: Score, parts: Dim, row: Place, sum: Place, neighbours: int = 4) -> Combination:
    """Adds up neighbouring sums of `parts` partial results; a part's greatest score and total lie at `row`, its sums at
    `sum`."""
    top, base, total, weight = (Buffer(f"all_{n}", F32, 1, "register") for n in ("top", "base", "total", "weight"))
    sums = Buffer("all_sum", F32, neighbours, "register")
    part = symbol("part", 0)
    (tops, at), (values, start) = row(part), sum(part)
    scaled = s.load(weight, 0)

    def loop(body: Sequence[Statement]) -> Statement:
        return For("part", parts, tuple(body), "unrolled" if isinstance(parts, int) and parts <= 8 else "serial")

    parts_here = s.load(values, start, neighbours, aligned=neighbours > 1)
    add = Store(sums, 0, s.fma(s.widen(scaled, neighbours), parts_here, s.load(sums, 0, neighbours)))
    statements: list[Statement] = [
        Define(top, number(LOWEST)),
        loop([Store(top, 0, s.binary("max", s.load(top, 0), s.load(tops, at)))]),
        Define(base, base_of(score, s.load(top, 0))),
        Define(total, number(0)),
        Alloc(sums),
        *(Store(sums, j, number(0)) for j in range(neighbours)),
        loop(
            [
                Define(weight, power(score, s.load(tops, at), s.load(base, 0))),
                Store(total, 0, s.fma(scaled, s.load(tops, at + 1), s.load(total, 0))),
                add,
            ]
        ),
    ]
    found = tuple(s.load(sums, j) for j in range(neighbours))
    return Combination(tuple(statements), s.load(top, 0), s.load(total, 0), found)


def combine_blocks(partial: Partial) -> Block:
    """The kernel that adds up what several blocks have of each row: a thread for some neighbouring channels."""
    problem, splits = partial.problem, partial.splits
    channels = problem.values.channels
    neighbours = math.gcd(4, channels)
    extents = (*(axis.extent for axis in problem.axes), problem.queries.rows, channels // neighbours)
    total = product(extents)
    piece = symbol("piece", 0)
    *batch, query, group = unflatten(piece, extents)
    here = symbol(CHANNEL, 0)
    found = combined(
        problem.score,
        splits,
        lambda part: (partial.rows, partial.row(part, symbol(QUERY, 0)) * 2),
        lambda part: (partial.sums, partial.row(part, symbol(QUERY, 0)) * channels + here),
        neighbours,
    )
    values = [value * inverse(problem, found.total) for value in found.sums]
    body = (
        *(Let(axis.name, index) for axis, index in zip(problem.axes, batch, strict=True)),
        Let(QUERY, query),
        Let(CHANNEL, group * neighbours),
        *found.statements,
        *store_result(problem, here, values, channels),
    )
    blocks = ceildiv(total, COMBINING_THREADS)
    at = symbol("group_block", 0, blocks - 1) * COMBINING_THREADS + symbol(THREAD, 0, COMBINING_THREADS - 1)
    thread = (Let("piece", at), If(s.index(piece) < s.index(total), body))
    inside: Block = (For(THREAD, COMBINING_THREADS, thread, "block"),)
    inside = (For("group_block", blocks, inside, "grid"),)
    # A single part is the result already: there are no blocks then.
    return inside if isinstance(splits, int) else (For("again", dim_min(1, splits - 1), inside, "grid"),)
