"""Matrix products of bf16 operands, summed in f32: two neighbours along the depth are one element of 32 bits.

They are multiplied by an instruction that adds the products of both (VDPBF16PS), or by two multiply-adds in the same
order.
"""

from __future__ import annotations

from ....ir.dims import product
from ....ir.dtypes import BF16, F32
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.epilogue import epilogue, through_memory
from ..dot_products import PAIRS
from .grouped_gemm import GroupedGemm
from .product import find_product
from .strassen import Strassen, choose_plan


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region whose anchor sums products of bf16 in f32; None for any other."""
    found = find_product(region)
    if found is None or found.left.dtype != BF16 or found.dtype != F32 or not found.depth:
        return None
    outputs = epilogue(region, found.indices, found.shape, found.element, found.column.name, found.dtype)
    if outputs is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    array = region.constants.get(found.right.buffer.name)
    if not all(isinstance(axis.extent, int) for axis in (*found.batch, *found.depth, found.column)):
        array = None
    if array is None and product(axis.extent for axis in found.rows) == 1:
        return None
    plan = choose_plan(found, target, target.strassen) if array is not None and target.strassen else None
    if array is not None and plan is not None:
        return Strassen(region, found, outputs, array, plan).lowered()
    return GroupedGemm(region, target, found, outputs, array, PAIRS).lowered()
