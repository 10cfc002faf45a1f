"""Recurrent layers: LSTM, GRU, RNN.

The products with the inputs are one matrix product over all steps. Then one kernel walks the steps: a block of hidden
units, as wide as a vector, multiplies its slice of the recurrent weights (packed so that a block's gates lie together)
with a few rows of the state, applies the gates and stores the new state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, product, symbol
from ....ir.dtypes import F32, DType, of_numpy
from ....ir.loops import Define, For, If, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Tensor, compute
from ....passes.generic import generic
from ....passes.nests import build_nests
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.recurrent import Layer, Phase
from ...kernels.recurrent_cells import Unit
from . import gemm
from .recurrent_inputs import Inputs, Piece, inputs_between

# Accumulators in flight that hide the latency of a multiply-add.
ACCUMULATORS = 8
# Multiply-adds per step from which the hidden units of one row are worth sharing among threads.
SHARED_STEP = 1 << 18
# Rows of the batch that share a load of the weights, at most.
MOST_ROWS = 8


@dataclass(frozen=True)
class WalkPhase(Phase):
    """A phase with its recurrent weights as they are packed, of so many gates `together`: those summed up at once."""

    packed: Buffer
    together: int


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a recurrent layer; None where the number of hidden units is not known."""
    return Walk(region, target).lowered() if isinstance(region.outputs[0][1].shape[-1], int) else None


class Walk(Layer):
    """The kernels of a layer whose states and weights are multiplied as floats."""

    def __init__(self, region: Region, target: Target) -> None:
        super().__init__(region)
        self.depth = self.hidden
        """Multiply-adds of one sum over a state."""
        self.target, self.rational = target, self.dtype == F32
        self.lanes = max(1, target.lanes(self.dtype.bits))
        self.blocks = -(-self.hidden // self.lanes)
        self.scale = Buffer("scale", self.dtype, self.directions * self.gates * self.hidden)
        self.groups, self.share, self.tile_rows = self._split()
        self.phases = self._phases()
        self.inputs = None if self._shared_step else self._inputs_between()
        """What the walk itself multiplies with the inputs, where that is not a product of its own."""

    def _inputs_between(self) -> Inputs | None:
        return inputs_between(self, self.lanes, self.target)

    @property
    def stored(self) -> DType:
        """The type of packed recurrent weights."""
        return self.dtype if self.r.scale is None or self.r.array is None else of_numpy(self.r.array.dtype)

    def _phases(self) -> list[WalkPhase]:
        found = []
        for phase in self.phases_of_step():
            size = self.directions * self.blocks * self.depth * phase.gates * self.lanes
            packed = Buffer(f"recurrent{phase.first}", self.stored, size)
            together = max(n for n in _divisors(phase.gates) if n == 1 or self.tile_rows * n <= self._room)
            if self.late_reset:  # its sums of the last gate must not come together with the products with the input
                together = phase.gates
            found.append(WalkPhase(phase.first, phase.gates, phase.source, phase.finish, packed, together))
        return found

    def lowered(self) -> Lowered:
        scratch = [self.projection, self.state, self.cell, self.update, self.reset]
        if self.inputs is not None:
            kernels = Lowered((), (), {self.inputs.packed.name: self.inputs.pack})
            scratch.append(self.inputs.packed)
        else:
            kernels = self.products_with_inputs()
        packed = dict(kernels.packed)
        calls = list(kernels.calls)
        for phase in self.phases:
            if self.r.array is not None:
                packed[phase.packed.name] = partial(self.pack, self.r.array, phase)
            else:
                body = build_nests([(phase.packed, self._packed_definition(phase))])
                calls.append(call(self.region, f"{self.region.name}_pack", body, [phase.packed]))
            scratch.append(phase.packed)
        if self.r.scale is not None:
            packed[self.scale.name] = self.r.scale.reshape(-1).copy
            scratch.append(self.scale)
        scratch += self.own_scratch()
        packed |= self.own_constants()
        before = [*self.initial_states(), *(self.inputs.biases() if self.inputs is not None else ())]
        body = (*build_nests(before), *self.preamble(), self._walk(), *build_nests(self.final_states()))
        calls.append(call(self.region, f"{self.dtype}_{self.region.name}_x{self.hidden}", body, scratch))
        used = {name for item in calls for name in getattr(item, "arguments", ())}
        workspaces = [buffer for buffer in scratch if buffer.name in used - packed.keys()]
        return Lowered(
            tuple(calls),
            (*kernels.workspaces, *workspaces),
            {name: make for name, make in packed.items() if name in used},
        )

    def own_scratch(self) -> list[Buffer]:
        """Workspaces, and constants made at compile time, that the walk uses besides."""
        return []

    def own_constants(self) -> Mapping[str, Callable[[], np.ndarray]]:
        """The constants among them."""
        return {}

    def preamble(self) -> Sequence[Statement]:
        """What comes right before the walk."""
        return ()

    # The products with the inputs, and the weights.

    def products_with_inputs(self) -> Lowered:
        """The kernels that make the products with the inputs of all steps."""
        return self.input_product(lambda part: gemm.schedule(part, self.target) or generic(part, self.target))

    def pack(self, weights: np.ndarray, phase: WalkPhase) -> np.ndarray:
        """[directions, blocks, gates / together, hidden (summed), together, lanes]; the last block ends with zeros."""
        directions, hidden = self.directions, self.hidden
        gates = weights.reshape(directions, self.gates, hidden, hidden)[:, phase.first : phase.first + phase.gates]
        padded = np.zeros((directions, phase.gates, self.blocks * self.lanes, hidden), phase.packed.dtype.numpy)
        padded[:, :, :hidden] = gates
        blocks = padded.reshape(directions, -1, phase.together, self.blocks, self.lanes, hidden)
        return np.ascontiguousarray(blocks.transpose(0, 3, 1, 5, 2, 4)).reshape(-1)

    def _packed_definition(self, phase: WalkPhase) -> Tensor:
        apart = phase.gates // phase.together
        shape = (self.directions, self.blocks, apart, self.hidden, phase.together, self.lanes)

        def element(*i: Dim) -> Scalar:
            gate, unit = phase.first + i[2] * phase.together + i[4], i[1] * self.lanes + i[5]
            row = self.r.tensor.at((i[0], gate * self.hidden + unit, i[3]))
            return s.select(s.index(unit) < s.index(self.hidden), row, const(0, self.dtype))

        return compute(shape, self.dtype, element, self.r.tensor)

    # The walk over the steps.

    @property
    def _shared_step(self) -> bool:
        """Whether the threads share the hidden units of each step."""
        large = self.batch == 1 and self.gates * self.hidden**2 >= SHARED_STEP
        return large and self.target.threads > 1 and self.directions == 1

    def _walk(self) -> Statement:
        directions = self.directions
        if self._shared_step:
            step = k.index_symbol("step", self.steps)
            body = list(self.before_step(0, 0, 1, step))
            for phase in self.phases:
                block = k.index_symbol("block", self.blocks)
                whole = tuple(self._tile(phase, block, self.lanes, 0, 0, 1, step))
                last = tuple(self._tile(phase, block, self._left, 0, 0, 1, step))
                if self._left != self.lanes:
                    whole = (If(s.index(block) < self.blocks - 1, whole, last),)
                body.append(For("block", self.blocks, whole, "parallel"))
            return For("step", self.steps, tuple(body))
        groups, share, count = self.groups, self.share, self.tile_rows
        direction, first = k.index_symbol("direction", directions), symbol("first")  # perhaps behind the last row
        task = k.index_symbol("task", directions * groups)
        here: list[Statement] = [Let("direction", task // groups), Let("first", task % groups * share)]
        rows: Dim = self.batch
        if groups > 1 and share * groups != self.batch:
            here.append(Let("rows", dim_max(0, dim_min(share, self.batch - first))))
            rows = symbol("rows", 0, share)
        elif groups > 1:
            rows = share
        if self.inputs is None:
            step = k.index_symbol("step", self.steps)
            tiles = partial(self._rows, direction=direction, first=first, rows=rows, count=count, step=step)
            before = self.before_step(direction, first, rows, step)
            here.append(For("step", self.steps, (*before, *self._step(step, tiles))))
        else:
            here += self._walk_with(self.inputs, direction)
        work = product((self.batch, self.steps, directions, self.gates, self.hidden**2))
        kind = "serial" if isinstance(work, int) and work < SHARED_STEP else "parallel"
        return For("task", directions * groups, tuple(here), kind)

    def before_step(self, direction: Dim, first: Dim, rows: Dim, step: Dim) -> Iterator[Statement]:
        """What a step begins with, for `rows` rows of the batch."""
        return iter(())

    def _walk_with(self, inputs: Inputs, direction: Dim) -> Iterator[Statement]:
        """The walk of one row that makes the products with the inputs, but for those of the first steps."""
        yield from self._blocks(lambda block, valid: inputs.first(direction, block, valid))
        group, within = k.index_symbol("group", inputs.groups - 1), k.index_symbol("within", inputs.rows)
        step = group * inputs.rows + within

        def ahead(phase: WalkPhase, block: Dim, valid: int) -> Iterator[Statement]:
            piece = None
            if phase is self.phases[0]:
                piece = partial(inputs.ahead, direction, group, within, block)
            return self._tile(phase, block, valid, direction, 0, 1, step, piece)

        steps = For("within", inputs.rows, tuple(self._step(step, ahead)))
        yield For("group", inputs.groups - 1, (steps,))
        done = (inputs.groups - 1) * inputs.rows
        step = k.index_symbol("step", inputs.steps - done) + done
        tiles = partial(self._tile, direction=direction, row=0, count=1, step=step)
        yield For("step", inputs.steps - done, tuple(self._step(step, tiles)))

    def _step(self, step: Dim, tiles: Callable[[WalkPhase, Dim, int], Iterator[Statement]]) -> Iterator[Statement]:
        """One step: all blocks of hidden units, phase by phase."""
        for phase in self.phases:
            yield from self._blocks(partial(tiles, phase), step)

    def _blocks(self, tiles: Callable[[Dim, int], Iterator[Statement]], step: Dim | None = None) -> Iterator[Statement]:
        """The tiles of all blocks. With `step` every other one walks backwards, so that it finds in the caches what the
        one before read last."""
        whole = self.hidden // self.lanes
        if whole and step is not None:
            turn, block = k.index_symbol("turn", whole), symbol("block", 0, whole - 1)
            turned = Let("block", turn + step % 2 * (whole - 1 - 2 * turn))
            yield For("turn", whole, (turned, *tiles(block, self.lanes)))
        elif whole:
            yield For("block", whole, tuple(tiles(k.index_symbol("block", whole), self.lanes)))
        if self._left != self.lanes:
            yield from tiles(whole, self._left)

    @property
    def _room(self) -> int:
        """Vectors of sums that registers hold, others besides."""
        return self.target.vector_registers - 8

    def _split(self) -> tuple[int, Dim, int]:
        """(groups, rows of the batch in each, rows of a tile): groups go to threads, tiles share a load of weights."""
        gates = max(phase.gates for phase in self.phases_of_step())
        most = max(1, min(MOST_ROWS, self._room // gates))
        groups = max(1, self.target.threads // self.directions)
        if not isinstance(self.batch, int):
            return groups, ceildiv(self.batch, groups * most) * most, most
        groups = min(groups, max(self.batch, 1))
        share = -(-max(self.batch, 1) // groups)
        # Sums of few gates for more rows, so that the weights are read less often, as long as multiply-adds outnumber
        # the values that they take from memory.
        wider = [min(MOST_ROWS, self._room // together) for together in _divisors(gates) if together > 1]
        tiles = -(-share // max([most, *wider]))
        count = -(-share // tiles)
        return groups, min(tiles * count, share), count

    @property
    def _left(self) -> int:
        """Hidden units in the last block."""
        return self.hidden - (self.blocks - 1) * self.lanes

    def _rows(
        self, phase: WalkPhase, block: Dim, valid: int, *, direction: Dim, first: Dim, rows: Dim, count: int, step: Dim
    ) -> Iterator[Statement]:
        """One block of hidden units for all rows of a task: tiles of `count` rows, then smaller ones."""
        sizes = [count]
        if isinstance(rows, int):
            sizes += [rows % count] if rows % count else []
        else:
            sizes += [1 << bit for bit in reversed(range(4)) if 1 << bit < count]
        done: Dim = 0
        for size in sizes:
            tiles = (rows - done) // size
            row = k.index_symbol("tile", tiles)
            if tiles != 0:
                body = tuple(self._tile(phase, block, valid, direction, first + done + row * size, size, step))
                yield For("tile", tiles, body)
            done = done + tiles * size

    def _tile(
        self, phase: WalkPhase, block: Dim, valid: int, direction: Dim, row: Dim, count: int, step: Dim,
        beside: Callable[[Dim, Dim], Piece] | None = None,
    ) -> Iterator[Statement]:  # fmt: skip
        """One block of hidden units for `count` rows: sums over the state, then the gates. Between them lies what else
        is to be multiplied, `beside`, for a lane and a turn of the loop."""
        lane = k.index_symbol("lane", valid)
        units: list[Unit] = []
        for number in range(count):
            lets, time, active = self.time(direction, row + number, step, str(number))
            yield from lets
            units.append(Unit(direction, row + number, block * self.lanes + lane, step, time, active, str(number)))
        if phase.together == phase.gates:
            body, totals = self._sums(phase, 0, units, block, lane, beside)
            for unit, row_totals in zip(units, totals, strict=True):
                body += phase.finish(unit, row_totals)
            yield For("lane", valid, tuple(body), "vector")
            return
        # Sums of some gates after the other, in memory for the meantime: registers hold those of more rows.
        apart = phase.gates // phase.together
        part = k.index_symbol("part", apart)
        body, totals = self._sums(phase, part, units, block, lane, None)
        for unit, row_totals in zip(units, totals, strict=True):
            for number, total in enumerate(row_totals):
                place = self.projected(unit, phase.first + part * phase.together + number)
                body.append(Store(self.projection, place, load(self.projection, place) + total))
        yield For("part", apart, (For("lane", valid, tuple(body), "vector"),))
        each = row + k.index_symbol("number", count)
        lets, time, active = self.time(direction, each, step, "")
        unit = Unit(direction, each, block * self.lanes + lane, step, time, active, "")
        finish = For("lane", valid, tuple(phase.finish(unit, [None] * phase.gates)), "vector")
        yield For("number", count, (*lets, finish))

    def _sums(
        self, phase: WalkPhase, part: Dim, units: Sequence[Unit], block: Dim, lane: Dim,
        beside: Callable[[Dim, Dim], Piece] | None,
    ) -> tuple[list[Statement], list[list[Scalar]]]:  # fmt: skip
        """The products with the state of the phase's gates from `part * together` on: (statements, sums by row)."""
        piece = None if beside is None else beside(lane, symbol("depth"))
        together, direction = phase.together, units[0].direction
        copies = min(max(1, ACCUMULATORS // (len(units) * together)), self.depth)
        turns = self.depth // copies
        if piece is not None:
            turns = piece.turns
            copies = math.gcd(max(1, ACCUMULATORS // 2 // together), self.depth // turns)
        whole = self.depth // turns
        sums = [
            [[Buffer(f"sum{r}_{g}_{u}", self.sums, 1, "register") for u in range(copies)] for g in range(together)]
            for r in range(len(units))
        ]
        panel = ((direction * self.blocks + block) * (phase.gates // together) + part) * self.depth

        def step_of_sum(depth: Dim, copy: int) -> Iterator[Statement]:
            for g in range(together):
                weight = load(phase.packed, ((panel + depth) * together + g) * self.lanes + lane)
                for unit, row in zip(units, sums, strict=True):
                    total = self.multiplied(phase, unit, depth, weight, load(row[g][copy], 0))
                    yield Store(row[g][copy], 0, total)

        body: list[Statement] = [Define(u, const(0, self.sums)) for row in sums for gate in row for u in gate]
        depth = k.index_symbol("depth", turns) * whole
        inside = [st for u in range(whole) for st in step_of_sum(depth + u, u % copies)]
        if piece is None:
            body.append(For("depth", turns, tuple(inside)))
        else:
            body += [*piece.before, For("depth", turns, tuple(_mixed(inside, piece.inside))), *piece.after]
        for position in range(turns * whole, self.depth):
            body += step_of_sum(position, position % copies)
        first = direction * self.gates + phase.first + part * together
        columns = [(first + g) * self.hidden + units[0].unit for g in range(together)]
        totals = [
            [self.finished(unit, at, _tree([load(u, 0) for u in gate])) for at, gate in zip(columns, row, strict=True)]
            for unit, row in zip(units, sums, strict=True)
        ]
        return body, totals

    @property
    def sums(self) -> DType:
        """The type of sums over a state."""
        return self.dtype

    def multiplied(self, phase: WalkPhase, unit: Unit, depth: Dim, weight: Scalar, total: Scalar) -> Scalar:
        """A sum over the state of a unit's row with the multiply-add number `depth`."""
        return s.fma(phase.source(replace(unit, unit=depth)), s.cast(weight, self.dtype), total)

    def finished(self, unit: Unit, column: Dim, total: Scalar) -> Scalar:
        """What a finished sum means; `column` is its place among those of all directions and gates."""
        return total if self.r.scale is None else total * load(self.scale, column)


def _mixed(one: Sequence[Statement], other: Sequence[Statement]) -> list[Statement]:
    """Both in their order, evenly mixed."""
    keyed = [((i + 0.5) / len(part), st) for part in (one, other) for i, st in enumerate(part)]
    return [st for _, st in sorted(keyed, key=lambda pair: pair[0])]


def _tree(parts: list[Scalar]) -> Scalar:
    """The sum, added in pairs."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
