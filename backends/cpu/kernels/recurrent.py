"""Recurrent layers: LSTM, GRU, RNN.

The products with the inputs are one matrix product over all steps. Then one kernel walks the steps: a block of hidden
units, as wide as a vector, multiplies its slice of the recurrent weights (packed so that a block's gates lie together)
with a few rows of the state, applies the gates and stores the new state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ....ir import functions as f
from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_max, dim_min, product, symbol
from ....ir.dtypes import I64, of_numpy
from ....ir.graph import Node
from ....ir.loops import Define, For, If, Let, Statement, Store
from ....ir.ops import REGISTRY
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Tensor, buffer_tensor, compute, flat_offset
from ....passes.lower import generic
from ....passes.nests import build_nests
from ....passes.regions import Lowered, Region, anchor_tensor
from ...kernels.calls import call
from . import gemm
from .recurrent_cells import Cells, Unit

# Accumulators in flight that hide the latency of a multiply-add.
ACCUMULATORS = 8
# Multiply-adds per step from which the hidden units of one row are worth sharing among threads.
SHARED_STEP = 1 << 18


@dataclass(frozen=True)
class _Phase:
    """One walk over the hidden units: the gates from `first` on whose sums over a state it forms, and their use."""

    first: int
    gates: int
    source: Callable[[Unit], Scalar]
    finish: Callable[[Unit, Sequence[Scalar]], Iterator[Statement]]
    packed: Buffer


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a recurrent layer; None where the number of hidden units is not known."""
    return _Layer(region, target).lowered() if isinstance(region.outputs[0][1].shape[-1], int) else None


class _Layer(Cells):
    def __init__(self, region: Region, target: Target) -> None:
        super().__init__(region)
        self.target = target
        self.lanes = max(1, target.lanes(self.dtype.bits))
        self.blocks = -(-self.hidden // self.lanes)
        self.scale = Buffer("scale", self.dtype, self.directions * self.gates * self.hidden)
        self.phases = self._phases()

    def _phases(self) -> list[_Phase]:
        def phase(first: int, gates: int, source: Callable[[Unit], Scalar], finish: object) -> _Phase:
            size = self.directions * self.blocks * self.hidden * gates * self.lanes
            stored = self.dtype if self.r.scale is None or self.r.array is None else of_numpy(self.r.array.dtype)
            packed = Buffer(f"recurrent{first}", stored, size)
            return _Phase(first, gates, source, finish, packed)  # type: ignore[arg-type]

        if self.op == "LSTM":
            return [phase(0, 4, self.previous, self.lstm)]
        if self.op == "RNN":
            return [phase(0, 1, self.previous, self.rnn)]
        if self.late_reset:
            return [phase(0, 3, self.previous, self.gru)]
        return [
            phase(0, 2, self.previous, self.gru_gates),
            phase(2, 1, lambda at: load(self.reset, self.offset(at)), self.gru_candidate),
        ]

    def lowered(self) -> Lowered:
        kernels = self._input_product()
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
        body = (*self._initial(), self._walk(), *self._final())
        calls.append(call(self.region, f"{self.dtype}_{self.region.name}_x{self.hidden}", body, scratch))
        used = {name for item in calls for name in getattr(item, "arguments", ())}
        workspaces = [buffer for buffer in scratch if buffer.name in used - packed.keys()]
        return Lowered(
            tuple(calls),
            (*kernels.workspaces, *workspaces),
            {name: make for name, make in packed.items() if name in used},
        )

    # The products with the inputs, and the weights.

    def _input_product(self) -> Lowered:
        """projection[d, ..., n] = x . w[d, n] + biases, the axes between in the order of the input's."""
        region, bias = self.region, self.bias
        columns = self.gates * self.hidden
        x, w = f.cast(self.x, self.dtype), self.w.tensor
        if self.w.scale is not None:
            w = buffer_tensor("weights", self.dtype, w.shape)
            region = replace(region, inputs=(*region.inputs, w), constants={"weights": self.w.floats()})
        node = Node("Einsum", (), (), {"equation": "abi,dni->dabn"})
        (products,) = REGISTRY[node.op]((x, w), node.attributes)
        assert isinstance(products, Tensor)
        shape = products.shape

        def biased(sums: Tensor) -> list[tuple[Buffer, Tensor]]:
            def element(*i: Dim) -> Scalar:
                total = sums.at(i)
                if bias is not None:
                    total = total + s.cast(bias.at((i[0], i[3])), self.dtype)
                    if not self.late_reset:
                        total = total + s.cast(bias.at((i[0], i[3] + columns)), self.dtype)
                return total

            return [(self.projection, compute(shape, self.dtype, element, sums))]

        part = replace(
            region,
            name=f"{region.name}_input",
            outputs=tuple(biased(anchor_tensor(shape, products))),
            anchor=node,
            operands=(x, w),
            anchor_output=products,
            inline=lambda: biased(products),
        )
        found = gemm.schedule(part, self.target) or generic(part, self.target)
        assert found is not None
        if any("weights" in getattr(item, "arguments", ()) for item in found.calls):
            found = replace(found, packed={**found.packed, "weights": self.w.floats})
        return found

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

    # The states before the first step and after the last one.

    def _initial(self) -> k.Block:
        def state(initial: Tensor | None, *i: Dim) -> Scalar:
            if initial is None:
                return const(0, self.dtype)
            return s.cast(initial.at((i[1], i[0], i[2]) if self.layout else i), self.dtype)

        outputs = [(self.state, compute((2, *self.states), self.dtype, lambda *i: state(self.initial_h, *i[1:])))]
        if self.op == "LSTM":
            outputs.append((self.cell, compute(self.states, self.dtype, lambda *i: state(self.initial_c, *i))))
        return build_nests(outputs)

    def _final(self) -> k.Block:
        def read(buffer: Buffer, start: Dim, *i: Dim) -> Scalar:
            direction, row = (i[1], i[0]) if self.layout else (i[0], i[1])
            offset = start + flat_offset((direction, row, i[2]), self.states)
            return s.cast(load(buffer, offset), self.x.dtype)

        starts = [(self.state, self.steps % 2 * product(self.states)), (self.cell, 0)]
        return build_nests(
            [
                (buffer, compute(tensor.shape, tensor.dtype, partial(read, *source)))
                for (buffer, tensor), source in zip(self.region.outputs[1:], starts, strict=False)
            ]
        )

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
                block = k.index_symbol("block", whole_blocks)
                inside.append(For("block", whole_blocks, tuple(tiles(block, self.lanes))))
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
            lets, time, active = self._time(direction, row + number, step, str(number))
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

    def _time(self, direction: Dim, row: Dim, step: Dim, tag: str) -> tuple[list[Statement], Dim, Scalar | None]:
        """Which element of a row's sequence a step sees, and whether there is one; it names lengths by statements."""
        if self.lengths is None:
            turned = self.steps - 1 - step
            if self.direction == "bidirectional":
                return [], step + direction * (turned - step), None
            return [], turned if self.direction == "reverse" else step, None
        length = symbol(f"length{tag}", 0, self.steps)
        given = s.cast(self.lengths.at((row,)), I64)
        lets: list[Statement] = [Let(f"length{tag}", f.minimum(f.maximum(given, 0), s.index(self.steps)))]
        active = s.index(step) < s.index(length)
        if self.direction == "forward":
            return lets, step, active
        turned = length - 1 - step
        time = turned if self.direction == "reverse" else step + direction * (turned - step)
        lets.append(Let(f"time{tag}", s.select(active, s.index(time), s.index(step))))
        return lets, symbol(f"time{tag}", 0, self.steps - 1), active


def _tree(parts: list[Scalar]) -> Scalar:
    """The sum, added in pairs."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return parts[0]
