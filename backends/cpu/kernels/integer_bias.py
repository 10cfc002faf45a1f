"""A bias of integers, which sums may start with as well as end with: an instruction less for each vector of results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ....ir import scalars as s
from ....ir.dims import symbol
from ....ir.dtypes import I32
from ....ir.scalars import Load, Rewriter, Scalar
from ....passes.regions import Region
from ...kernels.epilogue import Epilogue


def without_bias(region: Region, outputs: Epilogue) -> tuple[Epilogue, np.ndarray | None]:
    """The epilogue without the constant that it adds to every sum, one number for each column; and that constant, None
    where sums are read otherwise too."""
    adds = {
        node.digest: bias
        for result in outputs.results
        for node in s.walk(result.value)
        if (bias := _bias(node, region, outputs)) is not None
    }
    if len(adds) != 1:
        return outputs, None
    (digest,), (bias,) = adds, adds.values()

    def taken(node: Scalar) -> Scalar | None:
        if node.digest != digest:
            return None
        assert isinstance(node, s.Binary)
        return node.left if _is_sum(node.left) else node.right

    def zeroed(node: Scalar) -> Scalar | None:
        return s.const(0, I32) if node.digest == digest else None

    if any(_is_sum(part) for result in outputs.results for part in s.walk(Rewriter(zeroed)(result.value))):
        return outputs, None
    results = tuple(replace(result, value=Rewriter(taken)(result.value)) for result in outputs.results)
    return replace(outputs, results=results, patterns={}), region.constants[bias.buffer.name].reshape(-1)


def _is_sum(node: Scalar) -> bool:
    return isinstance(node, Load) and node.buffer.name == "accumulator"


def _bias(node: Scalar, region: Region, outputs: Epilogue) -> Load | None:
    """The constant, one number for each column, that a node adds to the sum."""
    if not (isinstance(node, s.Binary) and node.op == "add" and node.dtype == I32):
        return None
    for one, other in ((node.left, node.right), (node.right, node.left)):
        if _is_sum(one) and isinstance(other, Load) and other.predicate is None and other.stride == 1:
            array, column = region.constants.get(other.buffer.name), symbol(outputs.column)
            if array is not None and array.dtype == np.int32 and str(other.offset) == str(column):
                return other
    return None
