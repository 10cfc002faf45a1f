"""Epilogues that end in bytes, for sums that lie in the order in which bytes were interleaved: packing restores it.

What an epilogue reads beside the sums are constants with one number for each column, which are packed in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ....ir import scalars as s
from ....ir.dims import Dim, symbol
from ....ir.dtypes import I8, I32, U8
from ....ir.loops import Store
from ....ir.scalars import Buffer, Load, Rewriter, Scalar, free_symbols
from ....passes.regions import Region
from ....passes.rounding_steps import saturating
from ...kernels.epilogue import Epilogue, Result
from ..packs import pack
from .packing import first_lanes


@dataclass(frozen=True)
class PackedOutputs:
    """`wholes` gives the integers, i32, of which the bytes that are stored in `buffer` at `offset` are the saturation;
    without `limited` the epilogue has brought them into the range. `constants` are in the columns' own order."""

    buffer: Buffer
    offset: Dim
    wholes: Epilogue
    constants: Mapping[Buffer, np.ndarray]
    limited: bool

    def store(self, dims: Mapping[str, Dim], column: Dim, place: Dim, totals: list[Scalar], left: int | None) -> Store:
        """The bytes of columns from `column` on, `left` of which exist, whose constants lie at `place`.

        Raises NotVectorizable where the epilogue is no vector expression."""
        lanes = totals[0].lanes
        parts = [
            store.value
            for v, total in enumerate(totals)
            for store in self.wholes.stores(dims, place + v * lanes, lanes, total)
        ]
        offset = Rewriter(dims={**dims, self.wholes.column: column}).dim(self.offset)
        predicate = None if left is None else first_lanes(left, len(totals) * lanes)
        return Store(self.buffer, offset, pack(self.buffer.dtype, parts), predicate)


def packed_outputs(region: Region, outputs: Epilogue, most: float, fma: bool, padded: int) -> PackedOutputs | None:
    """The outputs in that form, of sums of magnitudes up to `most`; None where they have none. Constants become buffers
    of `padded` elements."""
    if len(outputs.results) != 1:
        return None
    (result,) = outputs.results
    column, sizes, constants = symbol(outputs.column), dict[bytes, float](), dict[Buffer, np.ndarray]()
    if result.buffer.dtype not in (I8, U8) or outputs.column in free_symbols(result.offset - column):
        return None
    for node in s.walk(result.value, into_dims=False):
        if not isinstance(node, Load):
            continue
        if node.buffer.name == "accumulator":
            sizes[node.digest] = most
        elif outputs.column in free_symbols(node.offset):
            array = region.constants.get(node.buffer.name)
            if array is None or str(node.offset) != str(column) or node.predicate is not None or node.stride != 1:
                return None
            constants[ordered(node.buffer, padded)] = array.reshape(-1)
            finite = np.isfinite(array).all() if array.dtype.kind == "f" else True
            sizes[node.digest] = float(np.abs(array.astype(np.float64)).max()) if finite else np.inf
    found = saturating(result.value, fma, sizes)
    if found is None:
        return None
    value, limited = found

    def reordered(node: Scalar) -> Scalar | None:
        there = ordered(node.buffer, padded) if isinstance(node, Load) else None
        return replace(node, buffer=there) if isinstance(node, Load) and there in constants else None

    whole = Result(Buffer("wholes", I32), column, Rewriter(reordered)(value))
    wholes = replace(outputs, results=(whole,), patterns={})
    return PackedOutputs(result.buffer, result.offset, wholes, constants, limited)


def ordered(constant: Buffer, padded: int) -> Buffer:
    """What holds a constant in the order of sums."""
    return Buffer(f"{constant.name}_ordered", constant.dtype, padded)
