"""The kernel of attention: a block makes the result for some queries of one head, tile after tile of the keys.

Softmax goes along: each row keeps the greatest score so far and the sum of exponentials relative to it, and what is
summed is rescaled when a greater one comes (Milakov & Gimelshein 2018; Dao 2023). Where several blocks or warps share
the keys of a row, each has such a partial result, and these are combined in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, floordiv, symbol
from ....ir.dtypes import BOOL, F32, I32, I64, U32
from ....ir.loops import Address, Alias, Alloc, Barrier, Block, Define, For, If, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....passes.threads import THREAD
from ...kernels.attention_problem import CHANNEL, Matrix, Problem, inverse
from ...kernels.attention_scores import KEY, LOG2_E, LOWEST, QUERY, base_of, number, power, with_product
from .attention_rows import SPLIT, Partial, combined, store_result, stores
from .attention_warps import Shared, Tile, Warps
from .tiles import counter, unrolled

LARGEST_POWER = 8
"""Weights are at most 2 to this power: what 16 bits hold as well as smaller ones."""


class BlockKernel:
    """Makes the statements of the kernel."""

    def __init__(self, problem: Problem, tile: Tile, warps: Warps, partial: Partial | None) -> None:
        self.problem, self.tile, self.warps, self.partial = problem, tile, warps, partial
        self.top = Buffer("top", F32, warps.rows, "register")
        self.total = Buffer("total", F32, warps.rows, "register")
        self.first_query = symbol("first_query", 0)

    def body(self) -> Block:
        """All of the kernel."""
        blocks = ceildiv(self.problem.queries.rows, self.tile.rows)
        inside: Block = (For(THREAD, self.tile.threads, tuple(self.thread(blocks)), "block"),)
        inside = (For("query_block", blocks, inside, "grid"),)
        if self.partial is not None:
            inside = (For(SPLIT, self.partial.splits, inside, "grid"),)
        for axis in reversed(self.problem.axes):
            inside = (For(axis.name, axis.extent, inside, "grid"),)
        return inside

    def thread(self, blocks: Dim) -> list[Statement]:
        """What one thread does."""
        warps, stages = self.warps, self.tile.stages
        opening = counter("stage", stages - 1)
        first, turn = symbol("first_turn", 0), symbol("turn", 0)
        ahead = turn + (stages - 1)
        body = [
            Let("slot", turn % stages),
            *self.wait(stages - 2),
            *self.fetch(ahead % stages, first + ahead),
            Let("first_key", (first + turn) * self.tile.keys),
            *self.scores(symbol("slot", 0, stages - 1)),
            *self.softmax(),
            *warps.multiply_values(symbol("slot", 0, stages - 1)),
        ]
        kept = warps.keep_queries()
        return [
            Let("first_query", symbol("query_block", 0, blocks - 1) * self.tile.rows),
            *self.turns(),
            *(Alloc(part.buffer) for part in warps.shared),
            *self.copy(self.problem.queries, warps.queries_tile, 0, self.first_query),
            Intrinsic("copy_async_commit"),
            *unrolled("stage", stages - 1, self.fetch(opening, first + opening)),
            *warps.declare(),
            Alloc(self.top),
            Alloc(self.total),
            *self.each_row([self.set(self.top, LOWEST), self.set(self.total, 0)]),
            *self.fill(warps.sums),
            *([*self.wait(stages - 1), *kept] if kept else []),
            For("turn", symbol("turns", 0), tuple(body)),
            *self.wait(0),
            *self.finish(),
        ]

    def turns(self) -> list[Statement]:
        """Which tiles of keys the block goes through: those that some of its queries may see, or its share of them."""
        first, last = self.first_query, self.first_query + (self.tile.rows - 1)
        score, keys = self.problem.score, self.tile.keys
        begin = floordiv(score.first_key(first, last), keys)
        end = ceildiv(dim_max(0, score.end_key(first, last, self.problem.keys.rows)), keys)
        if self.partial is None:
            found: list[Statement] = [Let("first_turn", begin), Let("end_turn", end)]
        else:
            share = ceildiv(dim_max(0, symbol("end", 0) - symbol("begin", 0)), self.partial.splits)
            found = [
                Let("begin", begin),
                Let("end", end),
                Let("share", share),
                Let("first_turn", symbol("begin", 0) + symbol(SPLIT, 0) * symbol("share", 0)),
                Let("end_turn", dim_min(symbol("end", 0), symbol("first_turn", 0) + symbol("share", 0))),
            ]
        return [*found, Let("turns", dim_max(0, symbol("end_turn", 0) - symbol("first_turn", 0)))]

    # Copies to shared memory

    @staticmethod
    def wait(pending: int) -> list[Statement]:
        """All but so many groups of copies are there, for all threads."""
        return [Intrinsic("copy_async_wait", (), (s.const(pending, I64),)), Barrier()]

    def fetch(self, slot: Dim, turn: Dim) -> list[Statement]:
        """Starts the copies of a tile of keys and values, if there is one."""
        warps, first = self.warps, turn * self.tile.keys
        copies = [
            *self.copy(self.problem.keys, warps.keys_tile, slot, first),
            *self.copy(self.problem.values, warps.values_tile, slot, first),
        ]
        return [If(s.index(turn) < s.index(symbol("end_turn", 0)), tuple(copies)), Intrinsic("copy_async_commit")]

    def copy(self, matrix: Matrix, shared: Shared, slot: Dim, first: Dim) -> list[Statement]:
        """Rows of an operand, from `first` on, to a stage; zeros beyond its rows and channels."""
        threads = self.tile.threads
        elements = matrix.copied // shared.dtype.bytes or 1
        in_row = shared.channels // elements
        pieces = shared.rows * in_row
        count = -(-pieces // threads)
        piece = counter("piece", count) * threads + symbol(THREAD, 0, threads - 1)
        row, channel = (
            (piece % shared.rows, piece // shared.rows) if matrix.by_rows else (piece // in_row, piece % in_row)
        )
        channel = channel * elements
        valid: Scalar = s.const(True, BOOL)
        if not (isinstance(matrix.rows, int) and matrix.rows % shared.rows == 0):
            valid = s.index(first + row) < s.index(matrix.rows)
        if shared.channels != matrix.channels:
            valid = s.binary("and", valid, s.index(channel) < s.index(matrix.channels))
        place = {"row": first + row, CHANNEL: channel}
        to = Address(shared.buffer, shared.at(slot, row, channel))
        if matrix.copied and matrix.buffer is not None:
            source = Address(matrix.buffer, s.Rewriter(dims=place).dim(matrix.offset))
            move: Statement = Intrinsic(f"copy_async_{matrix.copied}", (to, source), (valid,))
        else:
            value = s.cast(s.Rewriter(dims=place)(matrix.value), shared.dtype)
            move = Store(to.buffer, to.offset, s.select(valid, value, s.const(0, shared.dtype)))
        body: list[Statement] = [move]
        if pieces % threads:
            body = [If(s.index(piece) < s.index(pieces), (move,))]
        return unrolled("piece", count, body)

    # Registers

    @property
    def line(self) -> Dim:
        return counter("line", self.warps.rows)

    def each_row(self, body: Sequence[Statement]) -> list[Statement]:
        """For each of the lane's queries, by the index `line`."""
        return unrolled("line", self.warps.rows, body)

    def set(self, target: Buffer, value: float) -> Statement:
        return Store(target, self.line, number(value))

    @staticmethod
    def fill(target: Buffer) -> list[Statement]:
        """Zeros."""
        assert isinstance(target.size, int)
        return unrolled("element", target.size, [Store(target, counter("element", target.size), number(0))])

    # A tile of scores

    def scores(self, slot: Dim) -> list[Statement]:
        """The scores of a tile of keys; -inf beyond the last key."""
        warps, score, keys, queries = self.warps, self.problem.score, self.problem.keys.rows, self.problem.queries.rows
        line, across = self.line, counter("across", warps.keys)
        place, first_key = warps.score(line, across), symbol("first_key", 0)
        query, key = self.first_query + warps.row(line), first_key + warps.key(across)
        # What is read by the place of a score is read for one that exists.
        if QUERY in score.reads and not _is_multiple(queries, self.tile.rows):
            query = dim_min(query, queries - 1)
        clamped = dim_min(key, keys - 1) if KEY in score.reads and not _is_multiple(keys, self.tile.keys) else key
        result = [*self.fill(warps.scores), *warps.multiply_keys(slot)]
        first, last, end = self.first_query, self.first_query + (self.tile.rows - 1), first_key + self.tile.keys

        def mapped(value: Scalar) -> list[Statement]:
            if isinstance(value, s.Element):
                return []
            store = Store(warps.scores, place, with_product(value, s.load(warps.scores, place)))
            inner: list[Statement] = [Let(KEY, clamped), store]
            return self.each_row([Let(QUERY, query), *unrolled("across", warps.keys, inner)])

        if score.seen is None:
            result += mapped(score.value)
        else:
            hidden = s.unary("not", score.is_seen(first, last, first_key, end))
            result.append(If(hidden, tuple(mapped(score.value)), tuple(mapped(score.seen))))
        if not _is_multiple(keys, self.tile.keys):
            there = s.index(symbol(KEY, 0)) < s.index(keys)
            store = Store(warps.scores, place, s.select(there, s.load(warps.scores, place), number(LOWEST)))
            inner = unrolled("across", warps.keys, [Let(KEY, key), *self.each_row([store])])
            beyond = s.index(keys) < s.index(first_key + self.tile.keys)
            result.append(If(beyond, tuple(inner)))
        return result

    def softmax(self) -> list[Statement]:
        """Scores become weights relative to a score of the row, its greatest one when the warp last rescaled its sums:
        that is put off until some row has one that is much greater, as its weights do not overflow before."""
        warps, line = self.warps, self.line
        best, base, total = (Buffer(name, F32, 1, "register") for name in ("best", "base", "row_total"))
        tops, grown = Buffer("tops", F32, warps.rows, "register"), Buffer("grown", BOOL, 1, "register")
        across, out = counter("across", warps.keys), counter("out", warps.channels)
        score, place = warps.score(line, across), warps.sum(line, out)
        here, old, new = s.load(best, 0), s.load(self.top, line), s.load(tops, line)
        shifts = [
            Store(best, 0, s.binary("max", here, s.Call(F32, 1, "shuffle_xor", (here, s.const(distance, I32)))))
            for distance in warps.lanes
        ]
        # Of a row that has no score yet, the difference is infinite or, if it has none now, not a number.
        outgrown = number(LARGEST_POWER / (self.problem.score.scale * LOG2_E)) < here - old
        found = [
            Define(best, s.load(warps.scores, warps.score(line, 0))),
            *unrolled("across", warps.keys, [Store(best, 0, s.binary("max", here, s.load(warps.scores, score)))]),
            *shifts,
            Store(grown, 0, s.binary("or", s.load(grown, 0), outgrown)),
            Store(tops, line, s.binary("max", here, old)),
        ]
        rescale = Buffer("rescale", F32, 1, "register")
        again = [
            Define(rescale, power(self.problem.score, old, base_of(self.problem.score, new))),
            Store(self.total, line, s.load(self.total, line) * s.load(rescale, 0)),
            *unrolled(
                "out", warps.channels, [Store(warps.sums, place, s.load(warps.sums, place) * s.load(rescale, 0))]
            ),
            Store(self.top, line, new),
        ]
        weigh = [
            Store(warps.scores, score, power(self.problem.score, s.load(warps.scores, score), s.load(base, 0))),
            Store(total, 0, s.load(total, 0) + s.load(warps.scores, score)),
        ]
        some = s.Call(U32, 1, "ballot", (s.load(grown, 0),))
        return [
            Define(grown, s.const(False, BOOL)),
            Alloc(tops),
            *self.each_row(found),
            If(s.unary("not", some.equal(0)), tuple(self.each_row(again))),
            *self.each_row(
                [
                    Define(base, base_of(self.problem.score, old)),
                    Define(total, s.load(self.total, line)),
                    *unrolled("across", warps.keys, weigh),
                    Store(self.total, line, s.load(total, 0)),
                ]
            ),
        ]

    # The result

    def finish(self) -> list[Statement]:
        """The lanes' sums, divided by their totals, to where the result goes."""
        warps, line = self.warps, self.line
        value = s.load(self.total, line)
        add = [
            Store(self.total, line, value + s.Call(F32, 1, "shuffle_xor", (value, s.const(distance, I32))))
            for distance in warps.lanes
        ]
        result = self.each_row(add)
        if self.tile.warps[1] > 1:
            return [*result, *self.combine_warps()]
        runs = warps.channels // warps.run
        first = counter("run", runs) * warps.run
        values = [s.load(warps.sums, warps.sum(line, first + j)) for j in range(warps.run)]
        channel = warps.channel(first)
        direct = [
            Define(Buffer("inverse", F32, 1, "register"), self.inverse(value)),
            *unrolled(
                "run", runs, self.store(channel, [v * s.load(Buffer("inverse", F32, 1, "register"), 0) for v in values])
            ),
        ]
        partial = self.store_partial(
            unrolled("run", runs, self.store_sums(channel, values)), s.load(self.top, line), value, self.is_first_lane()
        )
        query = self.first_query + warps.row(line)
        there = s.index(symbol(QUERY, 0)) < s.index(self.problem.queries.rows)
        return [
            *result,
            *self.each_row([Let(QUERY, query), If(there, tuple(self.either(direct, partial)))]),
        ]

    def is_first_lane(self) -> Scalar:
        """Whether the lane is the first of those that share a row."""
        name = "quad" if "quad" in self.warps.names else "lane_column"
        return s.index(self.warps.names[name]).equal(s.const(0, I64))

    def either(self, direct: Sequence[Statement], partial: Sequence[Statement]) -> Sequence[Statement]:
        """The result itself, or a part of it where other blocks have the rest."""
        if self.partial is None:
            return direct
        if isinstance(self.partial.splits, int):
            return partial
        return [If(s.index(self.partial.splits) <= s.index(1), tuple(direct), tuple(partial))]

    def inverse(self, total: Scalar) -> Scalar:
        return inverse(self.problem, total)

    def store(self, channel: Dim, values: Sequence[Scalar]) -> list[Statement]:
        return store_result(self.problem, channel, values, self.warps.depth)

    def store_sums(self, channel: Dim, values: Sequence[Scalar]) -> list[Statement]:
        """Neighbouring sums to the memory of partial results."""
        if self.partial is None:
            return []
        row = self.partial.row(symbol(SPLIT, 0), symbol(QUERY, 0))
        channels = self.problem.values.channels
        pieces = [(row * channels + channel + j, value) for j, value in enumerate(values)]
        return stores(self.partial.sums, pieces, channel, channels, self.warps.depth, 4)

    def store_partial(self, sums: Sequence[Statement], top: Scalar, total: Scalar, first: Scalar) -> list[Statement]:
        """The sums, and once for each row what they are relative to."""
        if self.partial is None:
            return []
        row = self.partial.row(symbol(SPLIT, 0), symbol(QUERY, 0)) * 2
        rows = self.partial.rows
        return [*sums, If(first, (Store(rows, row, top), Store(rows, row + 1, total)))]

    def combine_warps(self) -> list[Statement]:
        """Warps that have other keys of the same queries put their sums into shared memory, where all are added up."""
        warps, tile = self.warps, self.tile
        parts, pitch = tile.warps[1], warps.depth + 4
        size = parts * tile.rows * pitch
        sums = Buffer("all_sums", F32, size, "shared")
        rows = Buffer("all_rows", F32, parts * tile.rows * 2, "shared")
        over = warps.values_tile
        assert over.size * over.slots * over.dtype.bytes >= size * 4, "sums take the place of values"
        place = Alias(sums, over.buffer, 0)
        runs = warps.channels // warps.run
        first = counter("run", runs) * warps.run
        own = counter("warp_key", parts) * tile.rows + warps.row(self.line)
        values = s.Vector(
            F32, warps.run, tuple(s.load(warps.sums, warps.sum(self.line, first + j)) for j in range(warps.run))
        )
        keep = [
            *unrolled("run", runs, [Store(sums, own * pitch + warps.channel(first), values, aligned=True)]),
            If(
                self.is_first_lane(),
                (
                    Store(rows, own * 2, s.load(self.top, self.line)),
                    Store(rows, own * 2 + 1, s.load(self.total, self.line)),
                ),
            ),
        ]
        across = warps.depth // 4
        pieces = tile.rows * across
        count = -(-pieces // tile.threads)
        piece = counter("piece", count) * tile.threads + symbol(THREAD, 0, tile.threads - 1)
        row, channel = piece // across, piece % across * 4
        at, here = symbol("row", 0, tile.rows - 1), symbol(CHANNEL, 0)
        found = combined(
            self.problem.score,
            parts,
            lambda part: (rows, (part * tile.rows + at) * 2),
            lambda part: (sums, (part * tile.rows + at) * pitch + here),
        )
        direct = self.store(here, [value * self.inverse(found.total) for value in found.sums])
        partial = self.store_partial(
            self.store_sums(here, found.sums), found.top, found.total, s.index(here).equal(s.const(0, I64))
        )
        there = s.index(symbol(QUERY, 0)) < s.index(self.problem.queries.rows)
        if pieces % tile.threads:
            there = s.binary("and", s.index(piece) < s.index(pieces), there)
        body: list[Statement] = [
            Let("row", row),
            Let(CHANNEL, channel),
            Let(QUERY, self.first_query + at),
            If(there, (*found.statements, *self.either(direct, partial))),
        ]
        return [place, Alloc(rows), *self.each_row(keep), Barrier(), *unrolled("piece", count, body)]


def _is_multiple(extent: Dim, of: int) -> bool:
    return isinstance(extent, int) and extent % of == 0
