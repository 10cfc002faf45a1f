"""The products of a recurrent layer with its inputs, made between the multiply-adds of its walk over the steps.

Where a step has one row the recurrent weights pass through the core once a step, from the second-level cache: a vector
each two multiply-adds on most CPUs, so that half of these have nothing to do. They make the products with the inputs of
the steps to come: a piece, which belongs to one block of hidden units, multiplies a part of the weights of one gate
with `rows` inputs; a block's pieces in `rows` steps are all its gates and parts, and the next `rows` steps are ready.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim
from ....ir.loops import Define, For, Statement, Store
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import compute, flat_offset
from ...kernels.operands import Affine, affine
from ...kernels.recurrent import Definition, Layer

MOST_STATEMENTS = 128
"""Multiply-adds in the body of the loop, at most."""
OTHER_REGISTERS = 3
"""Vectors besides sums: weights and a state."""
GAIN = 0.7
"""The time of the products, relative to a product of their own, from which on it is not worth while."""


@dataclass(frozen=True)
class Piece:
    """What goes before, into each of the turns of a loop, and behind it."""

    before: Sequence[Statement]
    turns: int
    inside: Sequence[Statement]
    after: Sequence[Statement]


@dataclass(frozen=True)
class Inputs:
    """Products with the inputs in pieces: `rows` steps at a time, the depth in `parts`."""

    layer: Layer
    source: Affine
    steps: int
    depth: int
    lanes: int
    rows: int
    parts: int
    turns: int
    registers: int

    @property
    def groups(self) -> int:
        """How often there are `rows` steps."""
        return self.steps // self.rows

    @property
    def blocks(self) -> int:
        return -(-self.layer.hidden // self.lanes)

    @property
    def packed(self) -> Buffer:
        layer = self.layer
        size = layer.directions * self.blocks * layer.gates * self.depth * self.lanes
        return Buffer("inputs", layer.dtype, size)

    def pack(self) -> np.ndarray:
        """[directions, blocks, parts, gates, depth of a part, lanes], the last block filled up with zeros."""
        layer, directions, gates, hidden = self.layer, self.layer.directions, self.layer.gates, self.layer.hidden
        padded = np.zeros((directions, gates, self.blocks * self.lanes, self.depth), layer.dtype.numpy)
        padded[:, :, :hidden] = layer.w.floats().reshape(directions, gates, hidden, self.depth)
        blocks = padded.reshape(directions, gates, self.blocks, self.lanes, self.parts, self.depth // self.parts)
        return np.ascontiguousarray(blocks.transpose(0, 2, 4, 1, 5, 3)).reshape(-1)

    def biases(self) -> list[Definition]:
        """What the sums of products are before the first of them."""
        layer = self.layer
        shape = (layer.directions, self.steps, layer.gates * layer.hidden)

        def element(*i: Dim) -> Scalar:
            bias = layer.input_bias(i[0], i[2])
            return const(0, layer.dtype) if bias is None else bias

        return [(layer.projection, compute(shape, layer.dtype, element))]

    def first(self, direction: Dim, block: Dim, valid: int) -> Iterator[Statement]:
        """The products of the first `rows` steps of a block, and of those which are left behind the last group."""
        left = self.steps - self.groups * self.rows
        first, last = self._times(direction, 0, self.rows), self._times(direction, self.groups * self.rows, left)
        together = len(first) + len(last) + OTHER_REGISTERS <= self.registers
        part, gate = k.index_symbol("part", self.parts), k.index_symbol("gate", self.layer.gates)
        lane, count = k.index_symbol("lane", valid), self.depth // self.parts
        for times in [[*first, *last]] if together else filter(None, [first, last]):
            piece = self._piece(direction, times, part, gate, block, lane, k.index_symbol("depth", count), 1)
            body = (*piece.before, For("depth", count, tuple(piece.inside)), *piece.after)
            gates = For("gate", self.layer.gates, (For("lane", valid, body, "vector"),))
            yield For("part", self.parts, (gates,))

    def ahead(self, direction: Dim, group: Dim, within: Dim, block: Dim, lane: Dim, turn: Dim) -> Piece:
        """The piece of a block in step `within` of a group: for the group that follows."""
        gate, part = within % self.layer.gates, within // self.layer.gates
        times = self._times(direction, (group + 1) * self.rows, self.rows)
        return self._piece(direction, times, part, gate, block, lane, turn, self.depth // self.parts // self.turns)

    def _piece(
        self, direction: Dim, times: Sequence[Dim], part: Dim, gate: Dim, block: Dim, lane: Dim, turn: Dim, count: int
    ) -> Piece:
        """A part of the depth for one gate of a block, of the inputs at some times; each turn adds `count` products."""
        layer, length = self.layer, self.depth // self.parts
        column = gate * layer.hidden + block * self.lanes + lane
        sums = [Buffer(f"input{row}", layer.dtype, 1, "register") for row in range(len(times))]
        shape = (layer.directions, self.steps, layer.gates * layer.hidden)
        places = [flat_offset((direction, time, column), shape) for time in times]
        before = [Define(total, load(layer.projection, at)) for total, at in zip(sums, places, strict=True)]
        panel = ((direction * self.blocks + block) * self.parts + part) * layer.gates + gate
        inside: list[Statement] = []
        for depth in (turn * count + number for number in range(count)):
            weight = load(self.packed, (panel * length + depth) * self.lanes + lane)
            for time, total in zip(times, sums, strict=True):
                value = self._input(time, part * length + depth)
                inside.append(Store(total, 0, s.fma(value, weight, load(total, 0))))
        after = [Store(layer.projection, at, load(total, 0)) for total, at in zip(sums, places, strict=True)]
        return Piece(before, self.turns, inside, after)

    def _times(self, direction: Dim, step: Dim, count: int) -> list[Dim]:
        """The times of `count` steps from `step` on, from the least: their distances are numbers either way."""
        first, turned = step, self.steps - count - step
        if self.layer.direction == "bidirectional":
            first = step + direction * (turned - step)
        elif self.layer.direction == "reverse":
            first = turned
        return [first + row for row in range(count)]

    def _input(self, time: Dim, depth: Dim) -> Scalar:
        strides = self.source.strides
        offset = self.source.start + time * strides[1 if self.layer.layout else 0] + depth * strides[2]
        return s.cast(load(self.source.buffer, offset), self.layer.dtype)


def inputs_between(layer: Layer, lanes: int, target: Target) -> Inputs | None:
    """How to make the products with the inputs between those of the walk; None where that is not worth while."""
    steps, depth, batch = layer.steps, layer.x.shape[2], layer.batch
    source = affine(layer.x)
    if not (isinstance(steps, int) and isinstance(depth, int) and batch == 1 and layer.lengths is None):
        return None
    if source is None or layer.w.array is None or layer.gates * layer.hidden**2 * layer.dtype.bytes <= target.l1_bytes:
        return None
    phase = layer.phases_of_step()[0]
    found: list[Inputs] = []
    for parts in (parts for parts in range(1, depth + 1) if depth % parts == 0):
        rows, turns = parts * layer.gates, math.gcd(depth // parts, layer.hidden)
        small = (depth // parts * rows + layer.hidden * phase.gates) // turns <= MOST_STATEMENTS
        if small and steps >= 2 * rows and rows + phase.gates + OTHER_REGISTERS <= target.vector_registers:
            found.append(Inputs(layer, source, steps, depth, lanes, rows, parts, turns, target.vector_registers))
    best = min(found, key=_cost, default=None)
    return best if best is not None and _cost(best) < GAIN * steps else None


def _cost(inputs: Inputs) -> float:
    """Time, that of the multiply-adds of one step being 1: of the steps before the walk, and to read the weights once
    for `rows` steps, a vector in the time of two multiply-adds."""
    return inputs.rows + inputs.steps % inputs.rows + 2 * inputs.steps / inputs.rows
