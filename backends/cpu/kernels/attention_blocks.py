"""Attention by blocks of queries and keys, the softmax kept up as keys come (Rabe & Staats 2021; Dao et al. 2022).

The queries of a block lie across the lanes of vectors, transposed once. So the first product reads keys where they lie,
one number at a time for all queries; what softmax takes the greatest of and adds up are whole vectors; and the weights
lie as the second product wants them, which reads values where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, known_le, product, symbol
from ....ir.dtypes import F32
from ....ir.loops import Alias, Alloc, Define, For, If, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar
from ....ir.target import Target
from ....ir.tensors import unflatten
from ....passes.regions import ANCHOR
from ...kernels.attention_problem import CHANNEL, ROW, Problem, inverse
from ...kernels.attention_scores import KEY, LOWEST, QUERY, base_of, number, power, with_product
from ..llvm import STACK_LIMIT
from .attention_operands import element_at, memory_of, real, strides_of
from .packing import first_lanes
from .register_tile import MAX_ROWS, Tile, accumulators, fits, multiply_accumulate

KEYS = 128
"""Keys of a block: its scores, and the values that they weigh, share the first two levels of cache."""


class Blocks:
    """Makes the statements of the kernel: of all heads, each by blocks of `width` queries and `block` keys."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem, self.target, self.lanes = problem, target, target.lanes(32)
        queries, keys = problem.queries, problem.keys.rows
        self.depth = -(-problem.values.channels // self.lanes)
        self.padded = self.depth * self.lanes
        self.key_rows: int = max(1, min(MAX_ROWS, keys)) if isinstance(keys, int) else MAX_ROWS
        self.vectors = 2
        while not fits(self.key_rows, self.vectors, target) and self.key_rows > 4:
            self.key_rows -= 1
        blocks = -(-keys // KEYS) if isinstance(keys, int) else 0
        per_block = -(-keys // max(blocks, 1)) if isinstance(keys, int) else KEYS
        self.block = max(1, -(-per_block // self.key_rows)) * self.key_rows
        room = STACK_LIMIT * 7 // 8 // F32.bytes
        rows_in_use = queries.rows if isinstance(queries.rows, int) else self.vectors * self.lanes
        while self.vectors > 1 and (
            self._stack(self.vectors * self.lanes) > room or rows_in_use <= (self.vectors - 1) * self.lanes
        ):
            self.vectors -= 1
        self.width = self.vectors * self.lanes
        self.single = blocks == 1

    def __str__(self) -> str:
        return f"{self.width}x{self.key_rows}"

    def _stack(self, width: int) -> int:
        return width * (self.problem.queries.channels + self.padded + self.block + 2 * self.key_rows + 3)

    def _memory(self, name: str, size: int) -> Buffer:
        return Buffer(name, F32, size, "stack")

    def body(self) -> Iterator[Statement]:
        problem, rows = self.problem, self.problem.queries.rows
        full, rest = divmod(rows, self.width) if isinstance(rows, int) else (ceildiv(rows, self.width), 0)
        blocks = full + (1 if rest else 0)
        batches = product(axis.extent for axis in problem.axes)
        task = k.index_symbol("task", batches * blocks)
        here: list[Statement] = [Let("queries_block", task % blocks), Let("head_at", task // blocks)]
        places = unflatten(symbol("head_at", 0, batches - 1), [axis.extent for axis in problem.axes])
        here += [Let(axis.name, place) for axis, place in zip(problem.axes, places, strict=True)]
        block = symbol("queries_block", 0, blocks - 1)
        first = block * self.width
        self.queries = self._memory("queries", self.width * problem.queries.channels)
        self.scores = self._memory("scores", self.width * (self.block + 2 * self.key_rows))
        self.sums = self._memory("sums", self.width * self.padded)
        self.top, self.total, self.rescale = (self._memory(n, self.width) for n in ("top", "total", "rescale"))
        here += [Alloc(b) for b in (self.queries, self.scores, self.sums, self.top, self.total, self.rescale)]
        if isinstance(rows, int):
            last = tuple(self._queries(-(-rest // self.lanes) * self.lanes, first, rest)) if rest else ()
            whole = tuple(self._queries(self.width, first, self.width)) if full else ()
            here += [If(s.index(block) < s.index(full), whole, last)] if whole and last else [*whole, *last]
        else:
            here.append(Let("valid", dim_min(self.width, rows - first)))
            here += self._queries(self.width, first, symbol("valid", 0, self.width))
        yield For("task", batches * blocks, tuple(here), "parallel")

    # A block of queries.

    def _queries(self, width: int, first: Dim, valid: Dim) -> Iterator[Statement]:
        """All that is done for the queries from `first` on, of which `valid` exist, in `width` lanes."""
        problem, score = self.problem, self.problem.score
        yield from self._transposed(width, first, valid)
        keys, lane = problem.keys.rows, symbol("lane", 0, width - 1)
        if self.single:
            yield from self._keys(width, first, valid, 0, score.end_key(first, first + valid - 1, keys))
        else:
            row = symbol("row_at", 0, width - 1)
            zero = Store(self.sums, row * self.padded + symbol("column", 0), number(0))
            yield For("row_at", width, (For("column", self.padded, (zero,), "vector"),))
            clear = (Store(self.top, lane, number(LOWEST)), Store(self.total, lane, number(0)))
            yield For("lane", width, clear, "vector")
            yield Let("keys_from", score.first_key(first, first + valid - 1))
            yield Let("keys_end", score.end_key(first, first + valid - 1, keys))
            start, end = symbol("keys_from", 0, keys), symbol("keys_end", None, keys)
            count = ceildiv(dim_max(0, end - start), self.block)
            at = start + symbol("keys_block", 0, count - 1) * self.block
            yield Let("keys_blocks", count)
            inner = (Let("key_start", at), *self._keys(width, first, valid, symbol("key_start", 0, keys), end))
            yield For("keys_block", symbol("keys_blocks", 0), inner)
        yield from self._results(first, valid)

    def _transposed(self, width: int, first: Dim, valid: Dim) -> Iterator[Statement]:
        """Queries to [channel][query], zeros for those that do not exist."""
        matrix, lanes = self.problem.queries, self.lanes
        strides = strides_of(matrix.value)
        whole = matrix.channels // lanes if strides is not None and strides[1] == 1 else 0
        if whole:
            square = symbol("square", 0, whole - 1) * lanes
            for group in range(0, width, lanes):
                rows: list[Scalar] = []
                for lane in range(group, group + lanes):
                    exists = s.index(lane) < s.index(valid)
                    buffer, offset = element_at(matrix, first + lane, square)
                    if isinstance(exists, s.Const):
                        rows.append(s.load(buffer, offset, lanes) if exists.value else s.const(0, F32, lanes))
                    else:
                        rows.append(s.load(buffer, offset, lanes, s.widen(exists, lanes)))
                statements, columns = lanes_transposed(rows, f"g{group}")
                stores = [Store(self.queries, (square + c) * width + group, column) for c, column in enumerate(columns)]
                yield For("square", whole, (*statements, *stores))
        done = whole * lanes
        left = matrix.channels - done
        if left:
            channel, lane_at = symbol("channel_at", 0, left - 1) + done, symbol("lane", 0, width - 1)
            value = s.cast(s.Rewriter(dims={ROW: first + lane_at, CHANNEL: channel})(matrix.value), F32)
            value = s.select(s.index(lane_at) < s.index(valid), value, number(0))
            store = Store(self.queries, channel * width + lane_at, value)
            yield For("channel_at", left, (For("lane", width, (store,), "vector"),))

    # A block of keys.

    def _keys(self, width: int, first: Dim, valid: Dim, start: Dim, end: Dim) -> Iterator[Statement]:
        """Scores of the keys from `start` on, not beyond `end`, and what they add to the sums."""
        count = dim_min(self.block, end - start)
        if not isinstance(count, int):
            yield Let("keys_here", dim_max(0, count))
            count = symbol("keys_here", 0, self.block)
        yield from self._products(width, start, count)
        yield from self._softmax(width, first, valid, start, count)
        yield from self._weighed(width, start, count)

    def _products(self, width: int, start: Dim, count: Dim) -> Iterator[Statement]:
        """Products of keys and queries, as [key][query]."""
        problem, rows = self.problem, self.key_rows
        matrix, keys = problem.keys, problem.keys.rows
        tile = Tile(rows, width // self.lanes, self.lanes)
        group = symbol("group", 0, ceildiv(count, rows) - 1) * rows
        strides = strides_of(matrix.value)
        assert strides is not None
        depth = symbol("depth", 0, matrix.channels - 1)
        statements: list[Statement] = []
        if known_le(rows, keys) and isinstance(strides[0], int):
            # Where fewer are left, the last keys are done twice; what is not of this block lies before its scores.
            if not isinstance(count, int) or count % rows:
                statements.append(Let("group_at", dim_max(dim_min(group, count - rows), -start)))
                group = symbol("group_at", -rows, self.block)
            left = memory_of(matrix, "key_rows")
            statements.append(Alias(left, *element_at(matrix, start + group, 0)))
            step = strides[0]

            def read(i: int) -> Scalar:
                return real(matrix, s.load(left, depth * strides[1] + i * step))
        else:
            pointers = [memory_of(matrix, f"key_row{i}") for i in range(rows)]
            for i, pointer in enumerate(pointers):
                statements.append(Alias(pointer, *element_at(matrix, dim_min(start + group + i, keys - 1), 0)))

            def read(i: int) -> Scalar:
                return real(matrix, s.load(pointers[i], depth * strides[1]))

        def queries(v: int) -> Scalar:
            return s.load(self.queries, depth * width + v * self.lanes, self.lanes)

        statements += multiply_accumulate(tile, F32, [("depth", matrix.channels)], read, queries)
        statements += [
            Store(self.scores, (group + (rows + i)) * width + v * self.lanes, total) for i, v, total in totals(tile)
        ]
        yield For("group", ceildiv(count, rows), tuple(statements))

    def _softmax(self, width: int, first: Dim, valid: Dim, start: Dim, count: Dim) -> Iterator[Statement]:
        """Products to weights, relative to the greatest score so far."""
        score, single = self.problem.score, self.single
        lane, key = symbol("lane", 0, width - 1), symbol("key_at", 0, count - 1)
        place = (key + self.key_rows) * width + lane
        here = s.load(self.scores, place)
        value = s.Rewriter(dims={QUERY: first + lane, KEY: start + key})(with_product(score.value, here))
        top, base, total = (Buffer(f"lane_{n}", F32, 1, "register") for n in ("top", "base", "total"))
        old = number(LOWEST) if single else s.load(self.top, lane)
        body: list[Statement] = [Define(top, old)]
        greatest = s.load(top, 0)
        seen: list[Statement] = []
        if value != here:
            held = Buffer("lane_score", F32, 1, "register")
            seen += [Define(held, value), Store(self.scores, place, s.load(held, 0))]
            value = s.load(held, 0)
        seen.append(Store(top, 0, s.select(greatest < value, value, greatest)))
        body += [For("key_at", count, tuple(seen)), Define(base, base_of(score, greatest))]
        if single:
            body.append(Define(total, number(0)))
        else:
            scale = Buffer("lane_scale", F32, 1, "register")
            body += [
                Define(scale, power(score, old, s.load(base, 0))),
                Store(self.rescale, lane, s.load(scale, 0)),
                Store(self.top, lane, greatest),
                Define(total, s.load(self.total, lane) * s.load(scale, 0)),
            ]
        weight = Buffer("lane_weight", F32, 1, "register")
        weigh = (
            Define(weight, power(score, here, s.load(base, 0))),
            Store(self.scores, place, s.load(weight, 0)),
            Store(total, 0, s.load(total, 0) + s.load(weight, 0)),
        )
        body += [For("key_at", count, weigh), Store(self.total, lane, s.load(total, 0))]
        yield For("lane", valid, tuple(body), "vector")

    def _weighed(self, width: int, start: Dim, count: Dim) -> Iterator[Statement]:
        """Adds to the sums [query][channel] the values, weighed."""
        matrix = self.problem.values
        strides = strides_of(matrix.value)
        assert strides is not None
        key = symbol("key_at", 0, count - 1)
        done = 0
        rows, vectors = self._value_tile(width)
        group = symbol("group", 0, width // rows - 1) * rows
        columns: list[Statement] = []
        while done < self.depth:
            tile = Tile(rows, min(vectors, self.depth - done), self.lanes)
            right = memory_of(matrix, f"value_rows{done}")
            columns.append(Alias(right, *element_at(matrix, start, done * self.lanes)))

            def weights(i: int) -> Scalar:
                return s.load(self.scores, (key + self.key_rows) * width + group + i)

            def values(v: int, right: Buffer = right, done: int = done) -> Scalar:
                there = matrix.channels - (done + v) * self.lanes
                some = None if there >= self.lanes or matrix.value.buffer.name == "values_copy" else there  # type: ignore[attr-defined]
                predicate = None if some is None else first_lanes(some, self.lanes)
                return real(matrix, s.load(right, key * strides[0] + v * self.lanes, self.lanes, predicate))

            inner: list[Statement] = list(multiply_accumulate(tile, F32, [("key_at", count)], weights, values))
            for i, v, total in totals(tile):
                place = (group + i) * self.padded + (done + v) * self.lanes
                if not self.single:
                    scale = s.widen(s.load(self.rescale, group + i), self.lanes)
                    total = s.fma(s.load(self.sums, place, self.lanes), scale, total)
                inner.append(Store(self.sums, place, total))
            columns.append(For("once", 1, tuple(inner)))
            done += tile.vectors
        yield For("group", width // rows, tuple(columns))

    def _value_tile(self, width: int) -> tuple[int, int]:
        """(queries, vectors of channels) of a register tile: the one that reads the least for what it multiplies."""
        tiles = [
            (rows, vectors)
            for rows in range(1, min(MAX_ROWS, width) + 1)
            for vectors in range(1, self.depth + 1)
            if width % rows == 0 and fits(rows, vectors, self.target)
        ]
        return min(tiles, key=lambda tile: (-(-self.depth // tile[1]) * (tile[0] + tile[1] + 1) / tile[0], -tile[0]))

    def _results(self, first: Dim, valid: Dim) -> Iterator[Statement]:
        """Sums over the weights' totals to where the result goes."""
        problem, result = self.problem, self.problem.result
        row = symbol("row_at", 0, self.width - 1)
        factor = Buffer("factor", F32, 1, "register")
        channel = symbol(CHANNEL, 0, problem.values.channels - 1)
        total = s.load(self.sums, row * self.padded + channel)
        total = total if result.scale is None else total * s.Rewriter(dims={QUERY: first + row})(result.scale)
        value = s.cast(total * s.load(factor, 0), result.dtype)
        rewriter = s.Rewriter(
            lambda part: value if isinstance(part, s.Element) and part.tensor == ANCHOR else None, {QUERY: first + row}
        )
        store = Store(result.buffer, rewriter.dim(result.offset), rewriter(result.value))
        yield For(
            "row_at",
            valid,
            (
                Define(factor, inverse(problem, s.load(self.total, row))),
                For(CHANNEL, problem.values.channels, (store,), "vector"),
            ),
        )


def totals(tile: Tile) -> list[tuple[int, int, Scalar]]:
    """(row, vector, sum) of a register tile."""
    sums = accumulators(tile, F32)
    places = [(i, v) for i in range(tile.rows) for v in range(tile.vectors)]
    return [(i, v, s.load(sums, i * tile.vectors + v, tile.lanes)) for i, v in places]


def lanes_transposed(rows: Sequence[Scalar], name: str) -> tuple[list[Statement], list[Scalar]]:
    """A square of vectors transposed in registers, by exchanging halves of pairs of rows that lie 1, 2, 4... apart."""
    lanes, dtype = len(rows), rows[0].dtype
    statements: list[Statement] = []

    def held(value: Scalar, number: str) -> Scalar:
        register = Buffer(f"{name}_{number}", dtype, 1, "register", lanes)
        statements.append(Define(register, value))
        return s.load(register, 0, lanes)

    current = [held(row, f"r{i}") for i, row in enumerate(rows)]
    for step in range(lanes.bit_length() - 1):
        half = 1 << step
        mixed = list(current)
        low = tuple(i if not i & half else lanes + i - half for i in range(lanes))
        high = tuple(i + half if not i & half else lanes + i for i in range(lanes))
        for lane in range(lanes):
            if not lane & half:
                for to, pick in ((lane, low), (lane + half, high)):
                    mixed[to] = held(
                        s.Shuffle(dtype, lanes, current[lane], current[lane + half], pick), f"t{step}_{to}"
                    )
        current = mixed
    return statements, current
