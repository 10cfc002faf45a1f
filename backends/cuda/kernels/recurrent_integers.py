"""LSTMs of com.microsoft whose weights are bytes, on a GPU: inputs and states become bytes, too.

The input is quantized as a whole, as ONNX Runtime does it, and before each step the state, each row of the batch by
itself (see `backends.cpu.kernels.recurrent_integers`): a warp finds the range of a row and rounds it. Sums are i32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ....ir import functions as f
from ....ir import loops as k
from ....ir import scalars as s
from ....ir.dims import Dim, product, symbol
from ....ir.dtypes import F32, I32, U8, DType, of_numpy
from ....ir.graph import Node
from ....ir.intrinsics import WARP
from ....ir.loops import Define, For, Let, Statement, Store
from ....ir.ops.quantization import dynamic_scale, dynamic_zero, saturated
from ....ir.ops.reduction import reduce_max, reduce_min
from ....ir.scalars import Buffer, Scalar, const, load
from ....ir.target import Target
from ....ir.tensors import Indices, Tensor, buffer_tensor, elementwise, flat_offset, view
from ....passes.regions import Lowered, Region
from ....passes.threads import THREAD, warp_reduction
from ...kernels.operands import joined
from ...kernels.recurrent_cells import Unit
from . import gemm, general
from .groups import where
from .recurrent import GpuLayer


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a recurrent layer of integers; None where its weights are not constants."""
    if not isinstance(region.outputs[0][1].shape[-1], int):
        return None
    layer = IntegerLayer(region)
    known = all(weights.array is not None and weights.scale is not None for weights in (layer.w, layer.r))
    if not known or layer.dtype != F32:
        return None
    return layer.lowered(lambda part: gemm.schedule(part, target) or general.schedule(part, target))


class IntegerLayer(GpuLayer):
    """The kernels of a layer of integers."""

    def __init__(self, region: Region) -> None:
        super().__init__(region)
        rows = product((self.directions, self.batch))
        self.elements = Buffer("state_elements", U8, product(self.states))
        self.state_scale, self.state_zero = Buffer("state_scale", F32, rows), Buffer("state_zero", U8, rows)
        self.scratch += [self.elements, self.state_scale, self.state_zero]

    @property
    def sums(self) -> DType:
        return I32

    # The products with the inputs

    def products_with_inputs(self, products: Callable[[Region], Lowered | None]) -> Lowered:
        """projection[d, ..., n] = (x . w[d, n] - zero * (sum of w[d, n])) * scales[d, n] + biases."""
        array, scales = self.w.array, self.w.scale
        assert array is not None and scales is not None
        before, (x, scale, zero) = self._quantized_input()
        directions, columns, depth = array.shape
        constants = {
            "input_weights": (of_numpy(array.dtype), array),
            "input_sums": (I32, array.sum(2, dtype=np.int32)),
            "input_scales": (F32, scales),
        }
        tensors = [buffer_tensor(name, dtype, held.shape) for name, (dtype, held) in constants.items()]
        turned = view(tensors[0], (directions, 1, depth, columns), lambda d, _, i, n: (d, n, i))

        def real(total: Scalar, i: Indices) -> Scalar:
            own = (i[0], i[3])
            total = total - s.cast(zero.at(()), I32) * tensors[1].at(own)
            return s.cast(total, F32) * (scale.at(()) * tensors[2].at(own))

        region = replace(
            self.region,
            inputs=(*self.region.inputs, x, scale, zero, *tensors),
            constants={"input_weights": array},
        )
        part = self.input_region(region, Node("MatMulInteger", (), (), {}), (x, turned), real)
        found = products(part)
        assert found is not None
        used = {name for call in found.kernel_calls for name in call.arguments}
        held = {name: np.ascontiguousarray(array).reshape(-1).copy for name, (_, array) in constants.items()}
        packed = {**found.packed, **{name: make for name, make in held.items() if name in used}}
        result = joined(before, replace(found, packed=packed))
        assert result is not None
        return result

    def _quantized_input(self) -> tuple[Lowered, tuple[Tensor, Tensor, Tensor]]:
        """The kernels that quantize the input as a whole; its bytes, their scale and zero point."""
        axes = tuple(range(self.x.rank))
        ranges = [buffer_tensor(name, F32, ()) for name in ("input_low", "input_high")]
        found = [
            f.minimum(reduce_min(self.x, axes, keepdims=False), 0),
            f.maximum(reduce_max(self.x, axes, keepdims=False), 0),
        ]
        scale, zero = buffer_tensor("input_scale", F32, ()), buffer_tensor("input_zero", U8, ())
        x = buffer_tensor("input_elements", U8, self.x.shape)
        stages = (
            list(zip(ranges, found, strict=True)),
            [(scale, elementwise(dynamic_scale, *ranges))],
            [(zero, elementwise(dynamic_zero, ranges[0], scale))],
            [(x, elementwise(lambda v, unit, point: saturated(v / unit, point, U8), self.x, scale, zero))],
        )
        buffers = [t.buffer for t in (*ranges, scale, zero, x) if t.buffer is not None]
        result = Lowered((), tuple(buffers))
        for stage in stages:
            outputs = [(tensor.buffer, definition) for tensor, definition in stage if tensor.buffer is not None]
            made = general.lowered(self.region, outputs, buffers)
            result = replace(
                result, calls=(*result.calls, *made.calls), workspaces=(*result.workspaces, *made.workspaces)
            )
        return result, (x, scale, zero)

    # The states

    def _at(self, direction: Dim, row: Dim) -> Dim:
        return flat_offset((direction, row), (self.directions, self.batch))

    def before_step(self, step: Dim) -> list[Statement]:
        """The states of the block's rows, quantized: a row by a warp."""
        direction = symbol("direction", 0, self.directions - 1) if self.directions > 1 else 0
        first = symbol("first_row", 0, self.batch - 1) if self.rows != self.batch else 0
        thread = k.index_symbol(THREAD, self.threads)
        warp, lane = thread // WARP, thread % WARP
        turns = -(-self.rows // (self.threads // WARP))
        number = k.index_symbol("turn", turns) * (self.threads // WARP) + warp
        row = symbol("row", 0, self.batch - 1)
        body = [Let("row", first + number), *self._quantize(direction, row, lane, step)]
        inside = s.binary("lt", s.index(number), s.index(self.rows))
        if self.rows != self.batch:
            inside = s.binary("and", inside, s.index(first + number) < s.index(self.batch))
        return [For("turn", turns, tuple(where(inside, body)))]

    def _quantize(self, direction: Dim, row: Dim, lane: Dim, step: Dim) -> list[Statement]:
        stretches = -(-self.hidden // WARP)
        unit = k.index_symbol("stretch", stretches) * WARP + lane
        inside = s.index(unit) < s.index(self.hidden)
        value = self.previous(Unit(direction, row, symbol("unit", 0, self.hidden - 1), step, 0, None, ""))
        low, high, scale = (Buffer(f"state_{name}", F32, 1, "register") for name in ("low", "high", "step"))
        zero = Buffer("state_point", U8, 1, "register")
        own = Let("unit", unit)
        combine = [Store(to, 0, s.binary(op, load(to, 0), value)) for to, op in ((low, "min"), (high, "max"))]
        element = saturated(value / load(scale, 0), load(zero, 0), U8)
        place = flat_offset((direction, row, symbol("unit", 0, self.hidden - 1)), self.states)
        at = self._at(direction, row)
        return [
            Define(low, const(0, F32)),
            Define(high, const(0, F32)),
            For("stretch", stretches, tuple(where(inside, [own, *combine]))),
            *warp_reduction([(low, "min"), (high, "max")]),
            Define(scale, dynamic_scale(load(low, 0), load(high, 0))),
            Define(zero, dynamic_zero(load(low, 0), load(scale, 0))),
            For("stretch", stretches, tuple(where(inside, [own, Store(self.elements, place, element)]))),
            *where(
                s.index(lane).equal(s.index(0)),
                [Store(self.state_scale, at, load(scale, 0)), Store(self.state_zero, at, load(zero, 0))],
            ),
        ]

    def factor(self, source: Callable[[Unit], Scalar]) -> Callable[[Unit], Scalar]:
        def element(unit: Unit) -> Scalar:
            point = load(self.state_zero, self._at(unit.direction, unit.row))
            return s.cast(load(self.elements, self.offset(unit)), I32) - s.cast(point, I32)

        return element

    def real(self, total: Scalar, unit: Unit, row: Dim) -> Scalar:
        assert self.scale is not None
        scale = load(self.state_scale, self._at(unit.direction, unit.row))
        return s.cast(total, F32) * (scale * self.scale.at((unit.direction, row)))
