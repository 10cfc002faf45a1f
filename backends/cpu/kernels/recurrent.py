"""Recurrent layers: LSTM, GRU, RNN.

The products with the inputs are one matrix product over all steps. Then one kernel walks the steps: a block of hidden
units, as wide as a vector, multiplies its slice of the recurrent weights (packed so that a block's gates lie together)
with a few rows of the state, applies the gates and stores the new state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, product, symbol
from ....ir.dtypes import of_numpy
from ....ir.loops import Define, For, If, Let, Statement, Store
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Tensor, compute
from ....passes.lower import generic
from ....passes.nests import build_nests
from ....passes.regions import Lowered, Region
from ...kernels.calls import call
from ...kernels.recurrent import Layer, Phase
from ...kernels.recurrent_cells import Unit
from . import gemm

# Accumulators in flight that hide the latency of a multiply-add.
ACCUMULATORS = 8
# Multiply-adds per step from which the hidden units of one row are worth sharing among threads.
SHARED_STEP = 1 << 18


@dataclass(frozen=True)
class _Phase(Phase):
    """A phase with its recurrent weights as they are packed."""

    packed: Buffer


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a recurrent layer; None where the number of hidden units is not known."""
    return _Layer(region, target).lowered() if isinstance(region.outputs[0][1].shape[-1], int) else None


class _Layer(Layer):
    def __init__(self, region: Region, target: Target) -> None:
        super().__init__(region)
        self.target = target
        self.lanes = max(1, target.lanes(self.dtype.bits))
        self.blocks = -(-self.hidden // self.lanes)
        self.scale = Buffer("scale", self.dtype, self.directions * self.gates * self.hidden)
        self.phases = self._phases()

    def _phases(self) -> list[_Phase]:
        stored = self.dtype if self.r.scale is None or self.r.array is None else of_numpy(self.r.array.dtype)
        found = []
        for phase in self.phases_of_step():
            size = self.directions * self.blocks * self.hidden * phase.gates * self.lanes
            packed = Buffer(f"recurrent{phase.first}", stored, size)
            found.append(_Phase(phase.first, phase.gates, phase.source, phase.finish, packed))
        return found

    def lowered(self) -> Lowered:
        kernels = self.input_product(lambda part: gemm.schedule(part, self.target) or generic(part, self.target))
        packed = dict(kernels.packed)
        calls = list(kernels.calls)
        scratch = [self.projection, self.state, self.cell, self.update, self.reset]
        for phase in self.phases:
            if self.r.array is not None:
                packed[phase.packed.name] = partial(self._pack, self.r.array, phase)
            else:
                body = build_nests([(phase.packed, self._packed_definition(phase))])
                calls.append(call(self.region, f"{self.region.name}_pack", body, [phase.packed]))
            scratch.append(phase.packed)
        if self.r.scale is not None:
            packed[self.scale.name] = self.r.scale.reshape(-1).copy
            scratch.append(self.scale)
        body = (*build_nests(self.initial_states()), self._walk(), *build_nests(self.final_states()))
        calls.append(call(self.region, f"{self.dtype}_{self.region.name}_x{self.hidden}", body, scratch))
        used = {name for item in calls for name in getattr(item, "arguments", ())}
        workspaces = [buffer for buffer in scratch if buffer.name in used - packed.keys()]
        return Lowered(
            tuple(calls),
            (*kernels.workspaces, *workspaces),
            {name: make for name, make in packed.items() if name in used},
        )

    # The products with the inputs, and the weights.

    def _pack(self, weights: np.ndarray, phase: _Phase) -> np.ndarray:
        """[directions, blocks, hidden (summed), gates, lanes], the last block filled up with zeros."""
        directions, hidden = self.directions, self.hidden
        gates = weights.reshape(directions, self.gates, hidden, hidden)[:, phase.first : phase.first + phase.gates]
        padded = np.zeros((directions, phase.gates, self.blocks * self.lanes, hidden), phase.packed.dtype.numpy)
        padded[:, :, :hidden] = gates
        blocks = padded.reshape(directions, phase.gates, self.blocks, self.lanes, hidden)
        return np.ascontiguousarray(blocks.transpose(0, 2, 4, 1, 3)).reshape(-1)

    def _packed_definition(self, phase: _Phase) -> Tensor:
        shape = (self.directions, self.blocks, self.hidden, phase.gates, self.lanes)

        def element(*i: Dim) -> Scalar:
            unit = i[1] * self.lanes + i[4]
            row = self.r.tensor.at((i[0], (i[3] + phase.first) * self.hidden + unit, i[2]))
            return s.select(s.index(unit) < s.index(self.hidden), row, const(0, self.dtype))

        return compute(shape, self.dtype, element, self.r.tensor)

    # The walk over the steps.

    def _walk(self) -> Statement:
        step, directions = k.index_symbol("step", self.steps), self.directions
        single = self.batch == 1 and self.gates * self.hidden**2 >= SHARED_STEP and self.target.threads > 1
        if single and directions == 1:
            body: list[Statement] = []
            for phase in self.phases:
                block = k.index_symbol("block", self.blocks)
                whole = tuple(self._tile(phase, 0, 0, 1, step, block, self.lanes))
                last = tuple(self._tile(phase, 0, 0, 1, step, block, self._left))
                if self._left != self.lanes:
                    whole = (If(s.index(block) < self.blocks - 1, whole, last),)
                body.append(For("block", self.blocks, whole, "parallel"))
            return For("step", self.steps, tuple(body))
        groups, share, count = self._split()
        direction, first = k.index_symbol("direction", directions), symbol("first")  # perhaps behind the last row
        task = k.index_symbol("task", directions * groups)
        here: list[Statement] = [Let("direction", task // groups), Let("first", task % groups * share)]
        rows: Dim = self.batch
        if groups > 1 and share * groups != self.batch:
            here.append(Let("rows", dim_max(0, dim_min(share, self.batch - first))))
            rows = symbol("rows", 0, share)
        elif groups > 1:
            rows = share
        inside: list[Statement] = []
        for phase in self.phases:
            tiles = partial(self._rows, phase, direction, first, rows, count, step)
            whole_blocks = self.hidden // self.lanes
            if whole_blocks:
                turn, block = k.index_symbol("turn", whole_blocks), symbol("block", 0, whole_blocks - 1)
                # Every other step walks backwards, so that it finds in the caches what the last one read last.
                turned = Let("block", turn + step % 2 * (whole_blocks - 1 - 2 * turn))
                inside.append(For("turn", whole_blocks, (turned, *tiles(block, self.lanes))))
            if self._left != self.lanes:
                inside += tiles(whole_blocks, self._left)
        work = product((self.batch, self.steps, directions, self.gates, self.hidden**2))
        kind = "serial" if isinstance(work, int) and work < SHARED_STEP else "parallel"
        return For("task", directions * groups, (*here, For("step", self.steps, tuple(inside))), kind)

    def _split(self) -> tuple[int, Dim, int]:
        """(groups, rows of the batch in each, rows of a tile): groups go to threads, tiles share a load of weights."""
        most = max(1, min(8, (self.target.vector_registers - 8) // max(p.gates for p in self.phases)))
        groups = max(1, self.target.threads // self.directions)
        if not isinstance(self.batch, int):
            return groups, ceildiv(self.batch, groups * most) * most, most
        groups = min(groups, max(self.batch, 1))
        share = -(-max(self.batch, 1) // groups)
        tiles = -(-share // most)
        count = -(-share // tiles)
        return groups, min(tiles * count, share), count

    @property
    def _left(self) -> int:
        """Hidden units in the last block."""
        return self.hidden - (self.blocks - 1) * self.lanes

    def _rows(
        self, phase: _Phase, direction: Dim, first: Dim, rows: Dim, count: int, step: Dim, block: Dim, valid: int
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
                body = tuple(self._tile(phase, direction, first + done + row * size, size, step, block, valid))
                yield For("tile", tiles, body)
            done = done + tiles * size

    def _tile(
        self, phase: _Phase, direction: Dim, row: Dim, count: int, step: Dim, block: Dim, valid: int
    ) -> Iterator[Statement]:
        """One block of hidden units for `count` rows: sums over the state, then the gates."""
        lane = k.index_symbol("lane", valid)
        units: list[Unit] = []
        for number in range(count):
            lets, time, active = self.time(direction, row + number, step, str(number))
            yield from lets
            units.append(Unit(direction, row + number, block * self.lanes + lane, step, time, active, str(number)))
        copies = max(1, ACCUMULATORS // (count * phase.gates))
        sums = {
            (r, g, u): Buffer(f"sum{r}_{g}_{u}", self.dtype, 1, "register")
            for r in range(count)
            for g in range(phase.gates)
            for u in range(copies)
        }
        panel = (direction * self.blocks + block) * self.hidden

        def step_of_sum(depth: Dim, copy: int) -> Iterator[Statement]:
            for g in range(phase.gates):
                weight = load(phase.packed, ((panel + depth) * phase.gates + g) * self.lanes + lane)
                weight = s.cast(weight, self.dtype)
                for r in range(count):
                    total = sums[r, g, copy]
                    value = phase.source(replace(units[r], unit=depth))
                    yield Store(total, 0, s.fma(value, weight, load(total, 0)))

        body: list[Statement] = [Define(total, const(0, self.dtype)) for total in sums.values()]
        whole, rest = divmod(self.hidden, copies)
        depth = k.index_symbol("depth", whole) * copies
        if whole:
            body.append(For("depth", whole, tuple(st for u in range(copies) for st in step_of_sum(depth + u, u))))
        for position in range(rest):
            body += step_of_sum(whole * copies + position, position)
        for r, unit in enumerate(units):
            totals = [_tree([load(sums[r, g, u], 0) for u in range(copies)]) for g in range(phase.gates)]
            if self.r.scale is not None:
                rows = [(direction * self.gates + phase.first + g) * self.hidden for g in range(phase.gates)]
                totals = [t * load(self.scale, row + unit.unit) for t, row in zip(totals, rows, strict=True)]
            body += phase.finish(unit, totals)
        yield For("lane", valid, tuple(body), "vector")


def _tree(parts: list[Scalar]) -> Scalar:
    """The sum, added in pairs."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]
