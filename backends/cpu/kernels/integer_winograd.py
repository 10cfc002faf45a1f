"""Convolutions of 8-bit images by minimal filtering, with the definition's bits.

With whole numbers for points the transforms of images and of weights are whole numbers, which 16 bits hold; products of
pairs of them are summed by one instruction. Outputs come multiplied by a constant, modulo 2^32: its odd part is taken
off by the factor that is its inverse there, its power of two by a shift, which gives the sums as long as these are that
much smaller than 2^31 (as the weights show). So F(4x4, 3x3) takes a quarter of the multiplications, half of them at a
time, and nothing is rounded.
"""

from __future__ import annotations

import math

import numpy as np

from ....ir import scalars as s
from ....ir.dtypes import I16, I32, U32
from ....ir.scalars import Scalar
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.epilogue import Epilogue, through_memory
from ...kernels.operands import joined
from ..dot_products import DOTS
from .integer_convolution import IntegerConvolution, find_integers
from .winograd import _Winograd
from .winograd_plan import LARGEST, Plan, choose_plan

DOT = DOTS["dot2_i16_i16"]


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernel of a convolution of integers that is faster this way; None for others."""
    if DOT.name not in target.dot_products:
        return None
    found = find_integers(region, target)
    if found is None or not _applies(found):
        return None
    plan = choose_plan(found.whole, target, _bits(found))
    if plan is None:
        return None
    if found.whole.outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    return joined(found.whole.copies, _IntegerWinograd(target, found, found.whole.outputs, plan).lowered())


def _applies(found: IntegerConvolution) -> bool:
    windows = found.whole.windows
    return (
        any(taps != 1 for taps in windows.kernel)
        and set(windows.dilations) == {1}
        and found.whole.channels >= DOT.group * 2
        and found.step == 1
        and bool(np.abs(found.whole.weights).max(initial=0) <= LARGEST)
        and all(isinstance(pad, int) for pad in windows.before)
    )


def _bits(found: IntegerConvolution) -> int:
    """Of a signed number that holds every sum."""
    weights = np.abs(found.whole.weights.reshape(len(found.whole.weights), -1).astype(np.int64)).sum(1)
    return int(weights.max(initial=0) * LARGEST).bit_length() + 1


class _IntegerWinograd(_Winograd):
    def __init__(self, target: Target, integers: IntegerConvolution, outputs: Epilogue, plan: Plan) -> None:
        self.integers = integers
        super().__init__(target, integers.whole, outputs, plan)
        self.zeros, self.fill, self.rims = integers.rim(self.zeros.name, -(-self.deep // 4))

    def lowered(self) -> Lowered:
        convolved = super().lowered()
        if self.fill is None or self.zeros.name not in convolved.packed:
            return convolved
        packed = {name: make for name, make in convolved.packed.items() if name != self.zeros.name}
        return Lowered((self.fill, *convolved.calls), (*convolved.workspaces, self.zeros), packed)

    def _begin(self) -> None:
        self.kept, self.factors, self.dot = I16, U32, DOT
        self.arithmetic, self.sums = I16, I32
        if self.channels > self.lanes:
            self.input_lanes = 2 * self.lanes
        factor = math.prod(axis.factor for axis in self.axes)
        self.twos = (factor & -factor).bit_length() - 1
        self.inverse = pow(factor >> self.twos, -1, 1 << 32)

    @property
    def kind(self) -> str:
        return f"{self.found.input.dtype}_zero{self.integers.known_zero}"

    def _outside(self) -> np.ndarray:
        return self.rims[self.zeros.name]()

    def _pixels(self, loaded: Scalar) -> Scalar:
        """Less the zero point."""
        wide, zero = s.cast(loaded, I16), self.integers.own_zero
        if isinstance(zero, s.Const):
            return wide - s.const(int(zero.value), I16, wide.lanes) if zero.value else wide
        return wide - s.widen(s.cast(zero, I16), wide.lanes)

    def _result(self, value: Scalar) -> Scalar:
        if self.inverse != 1:
            value = value * s.const(self.inverse - (self.inverse >> 31 << 32), I32, value.lanes)
        return s.binary("shr", value, s.const(self.twos, I32, value.lanes)) if self.twos else value
