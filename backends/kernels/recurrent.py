"""Recurrent layers, as far as targets share them: LSTM, GRU, RNN.

The products with the inputs are one matrix product over all steps; the states are laid out before the first step and
read off after the last; between them each target walks the steps in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ...ir import functions as f
from ...ir import scalars as s
from ...ir.dims import Dim, product, symbol
from ...ir.dtypes import I64, DType
from ...ir.graph import Node
from ...ir.loops import Let, Statement
from ...ir.ops import REGISTRY
from ...ir.scalars import Buffer, Scalar, const, load
from ...ir.tensors import Indices, Tensor, buffer_tensor, compute, flat_offset
from ...passes.regions import Lowered, Region, anchor_tensor
from .recurrent_cells import Cells, Unit

Definition = tuple[Buffer, Tensor]


@dataclass(frozen=True)
class Phase:
    """One walk over the hidden units: the gates from `first` on whose sums over a state it forms, and their use."""

    first: int
    gates: int
    source: Callable[[Unit], Scalar]
    finish: Callable[[Unit, Sequence[Scalar | None]], Iterator[Statement]]


class Layer(Cells):
    """What a layer computes apart from the walk over its steps."""

    def phases_of_step(self) -> list[Phase]:
        """What a step does, one after the other: each needs all of what the one before stored."""
        if self.op == "LSTM":
            return [Phase(0, 4, self.previous, self.lstm)]
        if self.op == "RNN":
            return [Phase(0, 1, self.previous, self.rnn)]
        if self.late_reset:
            return [Phase(0, 3, self.previous, self.gru)]
        return [
            Phase(0, 2, self.previous, self.gru_gates),
            Phase(2, 1, lambda at: load(self.reset, self.offset(at)), self.gru_candidate),
        ]

    def input_product(self, schedule: Callable[[Region], Lowered | None]) -> Lowered:
        """projection[d, ..., n] = x . w[d, n] + biases, the axes between in the order of the input's."""
        region = self.region
        x, w = f.cast(self.x, self.dtype), self.w.tensor
        if self.w.scale is not None:
            w = buffer_tensor("weights", self.dtype, w.shape)
            region = replace(region, inputs=(*region.inputs, w), constants={"weights": self.w.floats()})
        node = Node("Einsum", (), (), {"equation": "abi,dni->dabn"})
        part = self.input_region(region, node, (x, w), lambda total, _: total)
        found = schedule(part)
        assert found is not None
        if any("weights" in getattr(item, "arguments", ()) for item in found.calls):
            found = replace(found, packed={**found.packed, "weights": self.w.floats})
        return found

    def input_region(
        self,
        region: Region,
        node: Node,
        operands: Sequence[Tensor | None],
        real: Callable[[Scalar, Indices], Scalar],
    ) -> Region:
        """The part of a region that multiplies inputs by weights, [directions, *axes of the input, columns]: of a sum
        and its indices `real` makes the product that it stands for, to which the biases are added."""
        (products,) = REGISTRY[node.op](operands, node.attributes)
        assert isinstance(products, Tensor)
        shape = products.shape

        def biased(sums: Tensor) -> list[Definition]:
            def element(*i: Dim) -> Scalar:
                total, bias = real(sums.at(i), i), self.input_bias(i[0], i[3])
                return total if bias is None else total + bias

            return [(self.projection, compute(shape, self.dtype, element, sums))]

        return replace(
            region,
            name=f"{self.region.name}_input",
            outputs=tuple(biased(anchor_tensor(shape, products))),
            anchor=node,
            operands=tuple(operands),
            anchor_output=products,
            inline=lambda: biased(products),
        )

    def input_bias(self, direction: Dim, column: Dim) -> Scalar | None:
        """What is added to a product with the input: the biases, but for a GRU's that its reset gate multiplies."""
        if self.bias is None:
            return None
        columns = self.gates * self.hidden
        bias = s.cast(self.bias.at((direction, column)), self.dtype)
        return bias if self.late_reset else bias + s.cast(self.bias.at((direction, column + columns)), self.dtype)

    def initial_states(self) -> list[Definition]:
        """What the states are before the first step."""

        def state(initial: Tensor | None, *i: Dim) -> Scalar:
            if initial is None:
                return const(0, self.dtype)
            return s.cast(initial.at((i[1], i[0], i[2]) if self.layout else i), self.dtype)

        outputs = [(self.state, compute((2, *self.states), self.dtype, lambda *i: state(self.initial_h, *i[1:])))]
        if self.op == "LSTM":
            outputs.append((self.cell, compute(self.states, self.dtype, lambda *i: state(self.initial_c, *i))))
        return outputs

    def final_states(self) -> list[Definition]:
        """The outputs that are the states after the last step."""

        def read(dtype: DType, buffer: Buffer, start: Dim, *i: Dim) -> Scalar:
            direction, row = (i[1], i[0]) if self.layout else (i[0], i[1])
            offset = start + flat_offset((direction, row, i[2]), self.states)
            return s.cast(load(buffer, offset), dtype)

        starts = [(self.state, self.steps % 2 * product(self.states)), (self.cell, 0)]
        return [
            (buffer, compute(tensor.shape, tensor.dtype, partial(read, tensor.dtype, *source)))
            for (buffer, tensor), source in zip(self.region.outputs[1:], starts, strict=False)
        ]

    def time(self, direction: Dim, row: Dim, step: Dim, tag: str) -> tuple[list[Statement], Dim, Scalar | None]:
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
