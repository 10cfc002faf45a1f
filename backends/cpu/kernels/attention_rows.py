"""Attention of one query after the other: a step of a decoder, which reads every key and every value once.

Products are sums along the channels of a key, or of many keys side by side where those are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, product, symbol
from ....ir.dtypes import F32, I64
from ....ir.loops import Address, Alias, Alloc, Define, For, If, Intrinsic, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....ir.tensors import unflatten
from ....passes.regions import ANCHOR
from ...kernels.attention_problem import CHANNEL, ROW, Problem, inverse
from ...kernels.attention_scores import KEY, LOWEST, QUERY, base_of, number, power, with_product
from .attention_operands import element_at, memory_of, real, strides_of
from .packing import first_lanes
from .register_tile import Tile, accumulators, multiply_accumulate

KEYS, SHARED_KEYS = 512, 64
"""Keys of a block; of one that several heads share, so that it stays in the first-level cache."""

LINE = 64
"""Bytes of a line of the caches."""
MEMBERS_BYTES = 5 << 10
"""Bytes of stack for the queries and sums of heads that are done together."""
GROUP = "row_group"
"""Symbol of a group of heads."""


def heads_together(problem: Problem) -> tuple[str | None, int]:
    """The axis of the batch, and how many neighbours on it share keys and values, which are read once for all."""
    most = MEMBERS_BYTES // ((problem.queries.channels + problem.values.channels + SHARED_KEYS) * F32.bytes)
    for axis in reversed(problem.axes):
        if not isinstance(axis.extent, int):
            continue
        for count in range(min(axis.extent, most), 1, -1):
            if axis.extent % count:
                continue
            head = symbol(GROUP, 0, axis.extent // count - 1) * count + symbol("member", 0, count - 1)
            rewriter = s.Rewriter(dims={axis.name: head})
            places = [rewriter(matrix.value) for matrix in (problem.keys, problem.values)]
            limits = [bound.limit for bound in (*problem.score.starts, *problem.score.ends)]
            if not any(place.mentions("member") for place in places) and not any(
                axis.name in s.free_symbols(limit) for limit in limits
            ):
                return axis.name, count
    return None, 1


class Rows:
    """Makes the statements of the kernel: every head's queries, each by blocks of keys."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem, self.lanes, self.masked = problem, target.lanes(32), target.has("avx512vl")
        self.most_vectors = target.vector_registers // 2
        self.depth = -(-problem.values.channels // self.lanes)
        self.axis, self.members = heads_together(problem)
        self.member: Dim = symbol("member", 0, self.members - 1) if self.members > 1 else 0
        self.width = -(-problem.queries.channels // self.lanes) * self.lanes
        self.query = Buffer("query_row", F32, self.members * self.width, "stack")
        self.block = KEYS if self.axis is None else SHARED_KEYS
        self.pitch = self.block + self.lanes
        self.scores = Buffer("row_scores", F32, self.members * self.pitch, "stack")
        self.sums = Buffer("row_sums", F32, self.members * self.depth * self.lanes, "stack")
        self.tops, self.totals, self.rescales = (
            Buffer(f"row_{name}", F32, self.members, "stack") for name in ("tops", "totals", "rescales")
        )
        self.top, self.base, self.total, self.rescale = (
            Buffer(f"row_{name}", F32, 1, "register") for name in ("top", "base", "total", "rescale")
        )

    def body(self) -> Iterator[Statement]:
        problem, rows = self.problem, self.problem.queries.rows
        extents = [a.extent // self.members if a.name == self.axis else a.extent for a in problem.axes]
        batches = product(extents)
        task = k.index_symbol("row_task", batches * rows)
        here: list[Statement] = [Let("query_at", task % rows), Let("row_head", task // rows)]
        places = unflatten(symbol("row_head", 0, batches - 1), extents)
        for axis, place in zip(problem.axes, places, strict=True):
            here.append(Let(GROUP if axis.name == self.axis else axis.name, place))
        here += [
            Alloc(buffer) for buffer in (self.query, self.scores, self.sums, self.tops, self.totals, self.rescales)
        ]
        at: Dim = symbol("query_at", 0, rows - 1)
        channel, count, clear = symbol("channel_at", 0), problem.queries.channels, number(0)
        value = s.cast(s.Rewriter(dims={ROW: at, CHANNEL: channel})(problem.queries.value), F32)
        first = self.member * self.width
        start: list[Statement] = [
            For("channel_at", count, (Store(self.query, first + channel, value),), "vector"),
            For("channel_at", self.width - count, (Store(self.query, first + channel + count, clear),), "vector"),
            Store(self.tops, self.member, number(LOWEST)),
            Store(self.totals, self.member, clear),
        ]
        here += self._each(start)
        here += [
            For("channel_at", self.sums.size, (Store(self.sums, channel, clear),), "vector"),
            Let("row_from", problem.score.first_key(at, at)),
            Let("row_end", problem.score.end_key(at, at, problem.keys.rows)),
        ]
        begin, end = symbol("row_from", 0), symbol("row_end", None, problem.keys.rows)
        blocks = ceildiv(dim_max(0, end - begin), self.block)
        from_here = Let("row_start", begin + symbol("row_block", 0, blocks - 1) * self.block)
        here.append(For("row_block", blocks, (from_here, *self._keys(at, end))))
        here += self._each(list(self._result(at)))
        yield For("row_task", batches * rows, tuple(here), "parallel")

    def _each(self, body: list[Statement]) -> list[Statement]:
        """The statements for every head that shares the keys."""
        if self.axis is None:
            return body
        extent = next(axis.extent for axis in self.problem.axes if axis.name == self.axis)
        head = symbol(GROUP, 0, extent // self.members - 1) * self.members + self.member
        return [For("member", self.members, (Let(self.axis, head), *body))]

    def _keys(self, at: Dim, end: Dim) -> Iterator[Statement]:
        """What the keys of a block add to the sums of a query."""
        start = symbol("row_start", 0, self.problem.keys.rows)
        yield Let("row_count", dim_min(self.block, end - start))
        count = symbol("row_count", 0, self.block)
        yield from self._each([*self._products(start, count), *self._softmax(at, start, count)])
        yield from self._each(list(self._weighed(start, count)))

    def _softmax(self, at: Dim, start: Dim, count: Dim) -> Iterator[Statement]:
        """Products to weights, relative to the greatest score so far."""
        score, key = self.problem.score, symbol("key_at", 0, count - 1)
        place = self.member * self.pitch + key
        here = s.load(self.scores, place)
        value = s.Rewriter(dims={QUERY: at, KEY: start + key})(with_product(score.value, here))
        old, held = (Buffer(f"row_{name}", F32, 1, "register") for name in ("old", "held"))
        yield Define(old, s.load(self.tops, self.member))
        yield Define(self.top, s.load(old, 0))
        greatest = s.load(self.top, 0)
        seen: list[Statement] = []
        if value != here:
            seen += [Define(held, value), Store(self.scores, place, s.load(held, 0))]
            value = s.load(held, 0)
        yield For("key_at", count, (*seen, Store(self.top, 0, s.binary("max", greatest, value))), "vector")
        yield Define(self.base, base_of(score, greatest))
        yield Define(self.rescale, power(score, s.load(old, 0), s.load(self.base, 0)))
        yield Store(self.tops, self.member, greatest)
        yield Define(self.total, s.load(self.totals, self.member) * s.load(self.rescale, 0))
        weigh = (
            Define(held, power(score, here, s.load(self.base, 0))),
            Store(self.scores, place, s.load(held, 0)),
            Store(self.total, 0, s.load(self.total, 0) + s.load(held, 0)),
        )
        yield For("key_at", count, weigh, "vector")
        yield Store(self.totals, self.member, s.load(self.total, 0))
        yield Store(self.rescales, self.member, s.load(self.rescale, 0))

    def _products(self, start: Dim, count: Dim) -> Iterator[Statement]:
        """Products of the query with the keys from `start` on."""
        matrix, lanes = self.problem.keys, self.lanes
        strides = strides_of(matrix.value)
        assert strides is not None
        channels, rest = matrix.channels, matrix.channels % lanes
        if strides[1] != 1 or (rest and not self.masked):
            dot, channel = Buffer("row_dot", F32, 1, "register"), symbol("channel_at", 0, channels - 1)
            key = symbol("key_at", 0, count - 1)
            buffer, offset = element_at(matrix, start + key, channel)
            here = real(matrix, s.load(buffer, offset))
            term = s.fma(s.load(self.query, self.member * self.width + channel), here, s.load(dot, 0))
            along = strides[0] == 1
            inner = For("channel_at", channels, (Store(dot, 0, term),), "serial" if along else "vector")
            body = (Define(dot, number(0)), inner, Store(self.scores, self.member * self.pitch + key, s.load(dot, 0)))
            yield For("key_at", count, body, "vector" if along else "serial")
            return
        whole = count // lanes
        group = symbol("group", 0, whole - 1) * lanes
        yield For("group", whole, (*self._dots(start, group, None), *self._fetched(start, group)))
        done: Dim = whole * lanes
        left = count - done
        yield If(s.const(0, I64) < s.index(left), tuple(self._dots(start, done, left)))

    def _dots(self, start: Dim, group: Dim, left: Dim | None) -> Iterator[Statement]:
        """Products of the query with as many keys as a vector has lanes, of which only `left` exist if it is given."""
        matrix, lanes = self.problem.keys, self.lanes
        totals = [Buffer(f"row_dot{i}", F32, 1, "register", lanes) for i in range(lanes)]
        base = memory_of(matrix, "row_key")
        strides = strides_of(matrix.value)
        assert strides is not None
        yield Alias(base, *element_at(matrix, start + group, 0))
        for first in range(0, matrix.channels, lanes):
            query = s.load(self.query, self.member * self.width + first, lanes)
            there = matrix.channels - first
            predicate = first_lanes(there, lanes) if there < lanes else None
            for i, total in enumerate(totals):
                row: Dim = i if left is None else dim_min(i, left - 1)
                here = real(matrix, s.load(base, row * strides[0] + first, lanes, predicate))
                if first:
                    yield Store(total, 0, s.fma(query, here, s.load(total, 0, lanes)))
                else:
                    yield Define(total, query * here)
        statements, dots = lanes_added([s.load(total, 0, lanes) for total in totals], "row_sum")
        yield from statements
        yield Store(self.scores, self.member * self.pitch + group, dots)

    def _fetched(self, start: Dim, group: Dim) -> Iterator[Statement]:
        """Prefetches: some of the keys that come soon, and of the values that belong to those here. Both are new to the
        caches at each step of a decoder; hardware goes on from there, but stops at the end of each page."""
        for matrix, ahead in ((self.problem.keys, 2 * self.lanes), (self.problem.values, 0)):
            strides, line = strides_of(matrix.value), LINE // matrix.value.dtype.bytes
            if strides is not None and strides[1] == 1:
                buffer, offset = element_at(matrix, start + group + ahead, 0)
                for first in range(0, matrix.channels, line):
                    yield Intrinsic("prefetch", (Address(buffer, offset + first),))

    def _weighed(self, start: Dim, count: Dim) -> Iterator[Statement]:
        """Adds to the sums the values, weighed."""
        matrix, lanes = self.problem.values, self.lanes
        strides = strides_of(matrix.value)
        assert strides is not None
        key = symbol("key_at", 0, count - 1)
        for done in range(0, self.depth, self.most_vectors):
            tile = Tile(1, min(self.most_vectors, self.depth - done), lanes)
            right = memory_of(matrix, f"row_values{done}")
            alias = Alias(right, *element_at(matrix, start, done * lanes))

            def weights(i: int) -> Scalar:
                return s.load(self.scores, self.member * self.pitch + key)

            def values(v: int, right: Buffer = right, done: int = done) -> Scalar:
                there = matrix.channels - (done + v) * lanes
                predicate = first_lanes(there, lanes) if there < lanes else None
                return real(matrix, s.load(right, key * strides[0] + v * lanes, lanes, predicate))

            inner: list[Statement] = [alias]
            inner += multiply_accumulate(tile, F32, [("key_at", count)], weights, values)
            for v in range(tile.vectors):
                place = (self.member * self.depth + done + v) * lanes
                scaled = s.load(self.sums, place, lanes) * s.widen(s.load(self.rescales, self.member), lanes)
                inner.append(Store(self.sums, place, scaled + s.load(accumulators(tile, F32), v, lanes)))
            yield For("once", 1, tuple(inner))

    def _result(self, at: Dim) -> Iterator[Statement]:
        problem, result = self.problem, self.problem.result
        factor, channel = Buffer("factor", F32, 1, "register"), symbol(CHANNEL, 0, problem.values.channels - 1)
        total = s.load(self.sums, self.member * self.depth * self.lanes + channel)
        total = total if result.scale is None else total * s.Rewriter(dims={QUERY: at})(result.scale)
        value = s.cast(total * s.load(factor, 0), result.dtype)
        rewriter = s.Rewriter(
            lambda part: value if isinstance(part, s.Element) and part.tensor == ANCHOR else None, {QUERY: at}
        )
        yield Define(factor, inverse(problem, s.load(self.totals, self.member)))
        store = Store(result.buffer, rewriter.dim(result.offset), rewriter(result.value))
        yield For(CHANNEL, problem.values.channels, (store,), "vector")


def lanes_added(vectors: Sequence[Scalar], name: str) -> tuple[list[Statement], Scalar]:
    """A vector of the sums of as many vectors as they have lanes: pairs of vectors become one, in which lanes of both
    alternate that hold half of the sums' parts."""
    lanes = len(vectors)
    statements: list[Statement] = []
    current = list(vectors)
    for step in range(lanes.bit_length() - 1):
        half = 1 << step
        low = tuple(i if not i & half else lanes + i - half for i in range(lanes))
        high = tuple(i + half if not i & half else lanes + i for i in range(lanes))
        pairs: list[Scalar] = []
        for pair, (a, b) in enumerate(zip(current[::2], current[1::2], strict=True)):
            register = Buffer(f"{name}{step}_{pair}", F32, 1, "register", lanes)
            parts = (s.Shuffle(F32, lanes, a, b, pick) for pick in (low, high))
            statements.append(Define(register, s.binary("add", *parts)))
            pairs.append(s.load(register, 0, lanes))
        current = pairs
    return statements, current[0]
