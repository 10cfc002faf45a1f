"""Matrix products of bytes where no instruction multiplies four of them: of pairs of i16, each less its zero point.

PMADDWD adds the products of two pairs exactly, while PMADDUBSW, which takes bytes, saturates. The left operand is
copied, widened, before; constant right operands are packed so. A byte less its zero point takes nine bits: nothing is
left to be added to the sums.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ....ir import scalars as s
from ....ir.dims import product, symbol
from ....ir.dtypes import I16, U16, DType
from ....ir.scalars import Scalar
from ....ir.target import Target
from ....passes.regions import Region
from ...kernels.epilogue import Epilogue
from ..dot_products import DOTS
from .grouped_gemm import GroupedGemm
from .integers import Integers, is_zero
from .packing import matrices
from .product import flattened

PAIRS = DOTS["dot2_i16_i16"]
LEAST_ROWS = 4
"""Rows from which on it pays to read twice the bytes for weights: they are multiplied by more than one tile."""


def pairs_only(target: Target) -> bool:
    """Whether a target multiplies pairs of i16 but no groups of bytes."""
    by_bytes = any(name.startswith("dot4") for name in target.dot_products)
    return PAIRS.name in target.dot_products and not by_bytes


def applies(found: Integers, target: Target) -> bool:
    """Whether a target multiplies pairs of i16 only, and there are rows enough."""
    rows = product(axis.extent for axis in found.whole.rows)
    return pairs_only(target) and not (isinstance(rows, int) and rows < LEAST_ROWS)


class WidenedPairs(GroupedGemm):
    """The product over pairs of differences of bytes."""

    def __init__(self, region: Region, target: Target, found: Integers, outputs: Epilogue) -> None:
        self.integers = found
        super().__init__(region, target, found.whole, outputs, found.array, PAIRS, widened=True)

    @property
    def kind(self) -> str:
        return f"{self.whole.left.dtype}_{self.whole.right.dtype}_pairs"

    def _packer(self, array: np.ndarray) -> Callable[[], np.ndarray]:
        zeros = self.integers.right_zero
        zero = np.asarray(zeros.value if isinstance(zeros, s.Const) else zeros, np.int16)

        def pack() -> np.ndarray:
            elements = matrices(self.whole, array).astype(np.int16)
            return self._panels(elements - (zero[:, None, :] if zero.ndim else zero))

        return pack

    def _memory(self, operand: int) -> DType:
        return (self.whole.left if operand == 0 else self.whole.right).dtype

    def _bits(self, element: Scalar, operand: int) -> Scalar:
        return s.bitcast(self._difference(element, operand), U16)

    def _difference(self, element: Scalar, operand: int) -> Scalar:
        """An element less its zero point, as i16."""
        zero = self.integers.left_zero if operand == 0 else self.integers.right_zero
        assert isinstance(zero, Scalar)
        wide = s.cast(element, I16)
        if is_zero(zero):
            return wide
        if isinstance(zero, s.Const):
            return wide - s.const(int(zero.value), I16)
        where = {**self._batch(), **flattened(self.found.rows, symbol("row", 0, self.rows - 1))}
        return wide - s.cast(s.Rewriter(dims=where)(zero), I16)
