"""Recurrent layers of com.microsoft whose weights are integers of 8 bits: inputs and states become such, too.

As ONNX Runtime does it, the whole input is quantized with one scale and zero point (DynamicQuantizeLinear), and each
step the state, here each row of the batch by itself, so that no row depends on its neighbours or on how many threads
there are (ONNX Runtime quantizes the rows of one thread together). Sums are i32 and the same on every target; the four
or two elements that a dot product multiplies at once lie together, in the packed weights and in the quantized state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, product
from ....ir.dtypes import F32, I8, I16, I32, U8, U32, DType
from ....ir.graph import Node
from ....ir.loops import Alias, Define, For, Statement, Store
from ....ir.ops import REGISTRY
from ....ir.ops.quantization import dynamic_scale, dynamic_zero, saturated
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Indices, Tensor, buffer_tensor, flat_offset, view
from ....passes.generic import generic
from ....passes.nests import build_nests
from ....passes.regions import Lowered, Region
from ...kernels.calls import call, operand, present
from ...kernels.recurrent_cells import Unit
from ..dot_products import DOTS, Dot
from . import integer_gemm
from .recurrent import Walk, WalkPhase
from .recurrent_inputs import Inputs

MIDDLE = 128


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a recurrent layer of integers; None where its recurrent weights are not constants."""
    if not isinstance(region.outputs[0][1].shape[-1], int):
        return None
    layer = IntegerWalk(region, target)
    return layer.lowered() if layer.exact else None


def dot_of(fits: bool, target: Target) -> Dot:
    """The dot product of states and weights, which may be i8: of four bytes where that is one instruction."""
    dot, _ = integer_gemm.choose_dot(U8, target)
    return dot if fits and dot.name in target.dot_products else DOTS["dot2_i16_i16"]


class IntegerWalk(Walk):
    """The kernels of a layer of integers."""

    def __init__(self, region: Region, target: Target) -> None:
        super().__init__(region, target)
        array = self.r.array
        self.exact = self.dtype == F32 and array is not None and self.r.scale is not None
        self.dot = dot_of(array is not None and array.dtype == np.int8, target)
        self.moved = MIDDLE if self.dot.left == I8 else 0
        """What bytes of states are less than they mean."""
        self.depth = -(-self.hidden // self.dot.group)
        rows = product((self.directions, self.batch))
        self.elements = Buffer("state_elements", self.dot.left, rows * self.depth * self.dot.group)
        self.state_groups = Buffer("state_groups", U32, rows * self.depth)
        self.state_scale, self.state_zero = Buffer("state_scale", F32, rows), Buffer("state_zero", I32, rows)
        self.column_sums = Buffer("column_sums", I32, self.directions * self.gates * self.hidden)
        self.phases = self._phases()

    def _inputs_between(self) -> Inputs | None:
        return None

    @property
    def stored(self) -> DType:
        return U32

    @property
    def sums(self) -> DType:
        return I32

    def own_scratch(self) -> list[Buffer]:
        return [self.elements, self.state_scale, self.state_zero, self.column_sums]

    def own_constants(self) -> Mapping[str, Callable[[], np.ndarray]]:
        return {self.column_sums.name: self._column_sums}

    def preamble(self) -> Sequence[Statement]:
        return [Alias(self.state_groups, self.elements, 0)]

    def _column_sums(self) -> np.ndarray:
        assert self.r.array is not None
        return np.sum(self.r.array, axis=2, dtype=np.int32).reshape(-1)

    def pack(self, weights: np.ndarray, phase: WalkPhase) -> np.ndarray:
        """[directions, blocks, gates / together, groups, together, lanes] of groups, filled up with zeros."""
        directions, hidden, group = self.directions, self.hidden, self.dot.group
        kind = np.dtype(self.dot.right.numpy)
        gates = weights.reshape(directions, self.gates, hidden, hidden)[:, phase.first : phase.first + phase.gates]
        padded = np.zeros((directions, phase.gates, self.blocks * self.lanes, self.depth * group), kind)
        padded[:, :, :hidden, :hidden] = gates
        blocks = padded.reshape(directions, -1, phase.together, self.blocks, self.lanes, self.depth, group)
        return np.ascontiguousarray(blocks.transpose(0, 3, 1, 5, 2, 4, 6)).reshape(-1).view(np.uint32)

    # The products with the inputs

    def products_with_inputs(self) -> Lowered:
        """projection[d, ..., n] = ((x - zero) . (w - zeros)) * scales + biases, `x` quantized as a whole."""
        region = self.region
        quantized = (
            Buffer("input_elements", U8, self.x.size),
            Buffer("input_scale", F32, 1),
            Buffer("input_zero", U8, 1),
        )
        definitions = REGISTRY["DynamicQuantizeLinear"]((self.x,), {})
        assert isinstance(definitions, tuple)
        tensors = [tensor for tensor in definitions if isinstance(tensor, Tensor)]
        first = call(
            region, f"{region.name}_quantize", build_nests(list(zip(quantized, tensors, strict=True))), quantized
        )
        x = buffer_tensor(quantized[0].name, U8, self.x.shape)
        scale, zero = (buffer_tensor(b.name, b.dtype, ()) for b in quantized[1:])
        w, w_scale, w_zero = present(region, 1), present(region, 8), operand(region, 9)
        directions, depth, columns = w.shape

        def spread(x: Tensor) -> Tensor:
            """One for each direction, or each of its columns, over [directions, 1, 1, columns]."""
            shape = (directions, 1, 1, columns if x.rank == 2 else 1)
            return view(x, shape, lambda *i: (i[0],) if x.rank == 1 else (i[0], i[3] if x.shape[1] != 1 else 0))

        weights = view(w, (directions, 1, depth, columns), lambda *i: (i[0], i[2], i[3]))
        operands = x, weights, zero, None if w_zero is None else spread(w_zero)
        scales = spread(w_scale)

        def real(total: Scalar, i: Indices) -> Scalar:
            column = (i[0], 0, 0, i[3] if scales.shape[3] != 1 else 0)
            return s.cast(total, F32) * (scale.at(()) * scales.at(column))

        given = replace(region, inputs=(*region.inputs, x, scale, zero))
        part = self.input_region(given, Node("MatMulInteger", (), (), {}), operands, real)
        found = integer_gemm.schedule(part, self.target) or generic(part, self.target)
        assert found is not None
        return replace(found, calls=(first, *found.calls), workspaces=(*quantized, *found.workspaces))

    # The walk

    def _at(self, direction: Dim, row: Dim) -> Dim:
        return flat_offset((direction, row), (self.directions, self.batch))

    def before_step(self, direction: Dim, first: Dim, rows: Dim, step: Dim) -> Iterator[Statement]:
        """The states of some rows, quantized."""
        row = first + k.index_symbol("quantized", rows)
        yield For("quantized", rows, tuple(self._quantize(direction, row, step)))

    def _quantize(self, direction: Dim, row: Dim, step: Dim) -> Iterator[Statement]:
        unit = k.index_symbol("unit", self.hidden)
        value = self.previous(Unit(direction, row, unit, step, 0, None, ""))
        low, high, scale = (Buffer(f"state_{name}", F32, 1, "register") for name in ("low", "high", "step"))
        zero = Buffer("state_point", U8, 1, "register")
        yield Define(low, const(0, F32))
        yield Define(high, const(0, F32))
        combine = tuple(Store(to, 0, s.binary(op, load(to, 0), value)) for to, op in ((low, "min"), (high, "max")))
        yield For("unit", self.hidden, combine, "vector")
        yield Define(scale, dynamic_scale(load(low, 0), load(high, 0)))
        yield Define(zero, dynamic_zero(load(low, 0), load(scale, 0)))
        element = saturated(value / load(scale, 0), load(zero, 0), U8)
        if self.dot.left == I16:
            element = s.cast(element, I16) - s.cast(load(zero, 0), I16)
        elif self.dot.left == I8:
            element = s.bitcast(element ^ const(MIDDLE, U8), I8)
        place = self._at(direction, row) * (self.depth * self.dot.group) + unit
        yield For("unit", self.hidden, (Store(self.elements, place, element),), "vector")
        yield Store(self.state_scale, self._at(direction, row), load(scale, 0))
        yield Store(self.state_zero, self._at(direction, row), s.cast(load(zero, 0), I32) - self.moved)

    def multiplied(self, phase: WalkPhase, unit: Unit, depth: Dim, weight: Scalar, total: Scalar) -> Scalar:
        groups = load(self.state_groups, self._at(unit.direction, unit.row) * self.depth + depth)
        return self.dot(total, groups, weight)

    def finished(self, unit: Unit, column: Dim, total: Scalar) -> Scalar:
        at = self._at(unit.direction, unit.row)
        if self.dot.left != I16:
            total = total - load(self.state_zero, at) * load(self.column_sums, column)
        return s.cast(total, F32) * (load(self.state_scale, at) * load(self.scale, column))
