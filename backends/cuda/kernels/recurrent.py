"""Recurrent layers on a GPU: LSTM, GRU, RNN.

The products with the inputs are one matrix product over all steps. A warp then forms the sums of one hidden unit over
the state, its lanes side by side along the rows of the recurrent weights, for a few rows of the batch; the first lanes
apply the gates, one row each. Where the weights of all units fit the caches of one multiprocessor a block walks all
steps of its rows by itself; where they do not, each step is a launch of its own, spread over the whole GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, ceildiv, dim_min, symbol
from ....ir.dtypes import DType, of_numpy
from ....ir.intrinsics import WARP
from ....ir.loops import Barrier, Define, For, If, Let, Statement, Store
from ....ir.program import ALIGNMENTS
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Tensor, buffer_tensor
from ....passes.regions import Call, Lowered, Region, Repeated
from ....passes.threads import BLOCK, THREAD, warp_reduction
from ...kernels.recurrent import Layer, Phase
from ...kernels.recurrent_cells import Unit
from . import gemm, general
from .groups import call_of, where
from .lanes import Lanes

ONE_BLOCK_BYTES = 256 << 10
"""Recurrent weights up to which one multiprocessor holds them all in its first-level cache."""
WALKING, STEPPING = 512, 256
"""Threads of a block that walks all steps, and of one that makes a single step."""
ROWS, MANY_ROWS = 4, 8
"""Rows of the batch that share a load of the weights; the latter where there are twice as many at least."""
VECTOR = 4
"""Weights of a row that a lane reads at once."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a recurrent layer; None where the number of hidden units is not known."""
    if not isinstance(region.outputs[0][1].shape[-1], int):
        return None
    # What all steps multiply with the inputs is one product.
    return GpuLayer(region).lowered(lambda part: gemm.schedule(part, target) or general.schedule(part, target))


class GpuLayer(Layer):
    """The kernels of a layer of floats; weights may be integers with scales."""

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        own = (self.projection, self.state, self.cell, self.update, self.reset)
        self.packed: dict[str, Callable[[], np.ndarray]] = {}
        self.scale: Tensor | None = None
        self.weights = self.r.tensor
        if self.r.scale is not None and self.r.array is not None:
            # Integers, turned so that what a unit multiplies is one row, as floats are given.
            self.weights = buffer_tensor("recurrent", of_numpy(self.r.array.dtype), self.r.array.shape)
            self.scale = buffer_tensor("scale", self.dtype, self.r.scale.shape)
            self.packed = {
                "recurrent": np.ascontiguousarray(self.r.array).reshape(-1).copy,
                "scale": self.r.scale.reshape(-1).copy,
            }
        constants = [t.buffer for t in (self.weights, self.scale) if t is not None and t.buffer is not None]
        self.scratch = [*own, *(buffer for buffer in constants if buffer.name in self.packed)]
        aligned = dict.fromkeys((*(buffer.name for buffer in self.scratch), "weights"), ALIGNMENTS["cuda"])
        self.region = replace(region, alignments={**region.alignments, **aligned})
        bytes_of_weights = self.gates * self.hidden**2 * self.weights.dtype.bytes
        self.walks = bytes_of_weights <= ONE_BLOCK_BYTES
        self.threads = WALKING if self.walks else STEPPING
        self.rows = 1
        if isinstance(self.batch, int):
            self.rows = MANY_ROWS if self.batch >= 2 * MANY_ROWS else max(1, min(ROWS, self.batch))

    def lowered(self, products: Callable[[Region], Lowered | None]) -> Lowered:
        inputs = self.products_with_inputs(products)
        calls = list(inputs.calls)
        calls += general.lowered(self.region, self.initial_states(), self.scratch).calls
        phases = [replace(phase, source=self.factor(phase.source)) for phase in self.phases_of_step()]
        step = symbol("step", 0, self.steps - 1)
        first = self.before_step(step)
        if self.walks:
            turns = [*([first] if first else []), *(self._all_units(phase, step) for phase in phases)]
            body = [statement for turn in turns for statement in (*turn, Barrier())]
            calls.append(self._launch("walk", [For("step", self.steps, tuple(body))], 1))
        else:
            parts = ceildiv(self.hidden, self.threads // WARP)
            each = [self._launch("before", first, 1)] if first else []
            each += [self._launch("step", self._some_units(phase, step), parts) for phase in phases]
            calls.append(Repeated("step", self.steps, tuple(each)))
        calls += general.lowered(self.region, self.final_states(), self.scratch).calls
        lowered = Lowered(tuple(calls), inputs.workspaces, {**inputs.packed, **self.packed})
        used = {name for call in lowered.kernel_calls for name in call.arguments}
        scratch = tuple(buffer for buffer in self.scratch if buffer.name in used - lowered.packed.keys())
        return replace(lowered, workspaces=(*lowered.workspaces, *scratch))

    # What layers of integers do in their own way.

    @property
    def sums(self) -> DType:
        """The type of the sums over the state."""
        return self.dtype

    def products_with_inputs(self, products: Callable[[Region], Lowered | None]) -> Lowered:
        return self.input_product(products)

    def before_step(self, step: Dim) -> list[Statement]:
        """What a block does to the states of its rows before each step."""
        return []

    def factor(self, source: Callable[[Unit], Scalar]) -> Callable[[Unit], Scalar]:
        """What weights are multiplied by, given where the states of a phase are."""
        return source

    def real(self, total: Scalar, unit: Unit, row: Dim) -> Scalar:
        """A sum over the state of a unit, by the weights of a row, as a real."""
        return total if self.scale is None else total * self.scale.at((unit.direction, row))

    def _launch(self, name: str, body: Sequence[Statement], parts: Dim) -> Call:
        """A kernel whose blocks each have a direction, some rows of the batch and one of `parts` of the units."""
        groups = ceildiv(self.batch, self.rows)
        block = k.index_symbol(BLOCK, self.directions * groups * parts)
        lets = [
            Let("part", block % parts),
            Let("first_row", block // parts % groups * self.rows),
            Let("direction", block // (groups * parts)),
        ]
        used = set(k.free_sizes(tuple(body)))
        threads = For(THREAD, self.threads, (*(let for let in lets if let.name in used), *body), "block")
        grid = For(BLOCK, self.directions * groups * parts, (threads,), "grid")
        written = (*self.scratch, *(buffer for buffer, _ in self.region.outputs))
        return call_of(self.region, (grid,), self._stored(body, written), self.scratch, f"{self.region.name}_{name}")

    @staticmethod
    def _stored(body: Sequence[Statement], buffers: Sequence[Buffer]) -> list[Buffer]:
        names = {statement.buffer.name for statement in k.walk(tuple(body)) if isinstance(statement, Store)}
        return [buffer for buffer in buffers if buffer.name in names]

    def _all_units(self, phase: Phase, step: Dim) -> list[Statement]:
        """Every hidden unit, the block's warps in turn."""
        warps = self.threads // WARP
        turns = -(-self.hidden // warps)
        unit = k.index_symbol("turn", turns) * warps + k.index_symbol(THREAD, self.threads) // WARP
        return [For("turn", turns, tuple(self._guarded(phase, step, unit)))]

    def _some_units(self, phase: Phase, step: Dim) -> list[Statement]:
        """One hidden unit for each warp of the block."""
        warps = self.threads // WARP
        part = symbol("part", 0, -(-self.hidden // warps) - 1)
        return self._guarded(phase, step, part * warps + k.index_symbol(THREAD, self.threads) // WARP)

    def _guarded(self, phase: Phase, step: Dim, unit: Dim) -> list[Statement]:
        inside = s.binary("lt", s.index(unit), s.index(self.hidden))
        return where(inside, [Let("unit", unit), *self._unit(phase, step, symbol("unit", 0, self.hidden - 1))])

    def _unit(self, phase: Phase, step: Dim, unit: Dim) -> list[Statement]:
        """The sums of a unit over the state, by a warp, then the gates, a lane for each row."""
        direction = symbol("direction", 0, self.directions - 1) if self.directions > 1 else 0
        first = symbol("first_row", 0, self.batch - 1) if self.rows != self.batch else 0
        body: list[Statement] = []
        units: list[Unit] = []
        for number in range(self.rows):
            row: Dim = first + number
            if isinstance(self.batch, int) is False or self.batch % self.rows:
                # Behind the last row it is computed again, and not stored.
                body.append(Let(f"row{number}", dim_min(row, self.batch - 1)))
                row = symbol(f"row{number}", 0, self.batch - 1)
            lets, time, active = self.time(direction, row, step, str(number))
            body += lets
            units.append(Unit(direction, row, unit, step, time, active, str(number)))
        sums = [[Buffer(f"sum{r}_{g}", self.sums, 1, "register") for g in range(phase.gates)] for r in range(self.rows)]
        every = [total for row_sums in sums for total in row_sums]
        body += [Define(total, const(0, self.sums)) for total in every]
        body += self._products(phase, units, sums)
        body += warp_reduction([(total, "add") for total in every])
        lane = k.index_symbol(THREAD, self.threads) % WARP
        for number, (own, row_sums) in enumerate(zip(units, sums, strict=True)):
            totals: list[Scalar] = [load(total, 0) for total in row_sums]
            rows = [(phase.first + g) * self.hidden + unit for g in range(phase.gates)]
            totals = [self.real(t, own, row) for t, row in zip(totals, rows, strict=True)]
            mine = s.binary("eq", s.index(lane), s.index(number))
            if own.row != first + number:
                mine = s.binary("and", mine, s.index(first + number) < s.index(self.batch))
            body.append(If(mine, tuple(phase.finish(own, totals))))
        return body

    def _products(self, phase: Phase, units: Sequence[Unit], sums: Sequence[Sequence[Buffer]]) -> list[Statement]:
        """What a lane adds up: its share of the columns of the weights."""
        hidden, unit, direction = self.hidden, units[0].unit, units[0].direction
        lanes = Lanes("depth", VECTOR, frozenset(), self.region.alignment)
        depth = symbol("depth", 0, hidden - 1)
        weights = [self.weights.at((direction, (phase.first + g) * hidden + unit, depth)) for g in range(phase.gates)]
        factors = [s.cast(weight, self.sums) for weight in weights]
        states = [phase.source(replace(own, unit=depth)) for own in units]
        lanes.indices = frozenset(
            name for value in (*factors, *states) for name in value.free if not name.startswith("$")
        )
        if hidden % VECTOR:
            lanes.count = 1
        before, values = lanes.values([*factors, *states])
        adding = [
            Store(total, 0, s.fma(state, factor, load(total, 0)))
            for state, row_sums in zip(values[phase.gates :], sums, strict=True)
            for factor, total in zip(values[: phase.gates], row_sums, strict=True)
        ]
        inner = [*before, *([lanes.each(adding)] if lanes.count > 1 else adding)]
        share = WARP * lanes.count
        turns = -(-hidden // share)
        at = k.index_symbol("stretch", turns) * share + k.index_symbol(THREAD, self.threads) % WARP * lanes.count
        inside = s.binary("lt", s.index(at), s.index(hidden))
        return [For("stretch", turns, tuple(where(inside, [Let("depth", at), *inner])))]
