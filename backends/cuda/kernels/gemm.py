"""Matrix products on a GPU: MatMul, Gemm, contractions by Einsum and whatever else is a sum of products."""

from __future__ import annotations

from ....ir.dtypes import F32
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.epilogue import through_memory
from ...kernels.operands import joined
from . import gemv
from .choose import Plan, choose, uses_tensor_cores
from .contraction import Loaders, lowered, shape_of
from .loaders import loader_of
from .problem import Problem, find_problem
from .tiles import CHUNK, Loader
from .weights import pack


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region whose anchor sums products; None for any other."""
    found = find_problem(region)
    if found is None:
        return None
    problem = found[1]
    if problem is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    few = few_rows(region, problem, target)
    if few is not None:
        return few
    region, loaders, made = operands(region, problem, target)
    return joined(made, lowered(region, problem.sums, loaders, plan_of(problem, loaders, target)))


def few_rows(region: Region, problem: Problem, target: Target) -> Lowered | None:
    """The kernel of a product of which one operand is small; None for others."""
    sums = problem.sums
    for held, streamed in ((problem.left, problem.right), (problem.right, problem.left)):
        if not gemv.applies(sums, held, streamed, target):
            continue
        if not gemv.along_depth(region, streamed):
            packed = pack(region, streamed, sums.batches, False)
            if packed is not None:
                region, streamed, made = packed
                return joined(made, gemv.lowered(region, sums, held, streamed, target))
        return gemv.lowered(region, sums, held, streamed, target)
    return None


def plan_of(problem: Problem, loaders: Loaders, target: Target) -> Plan:
    """The plan that suits the target."""
    return choose(shape_of(problem.sums), loaders, problem.sums.dtype, target)


def operands(region: Region, problem: Problem, target: Target) -> tuple[Region, Loaders, Lowered]:
    """How both operands come to shared memory: constants that cannot be copied as they are lie in another order, and
    are rounded where they are multiplied as tf32. The region may have got inputs that the last result makes."""
    made = Lowered(())
    tensor = uses_tensor_cores((problem.left.dtype, problem.right.dtype), problem.sums.dtype, target)
    loaders: list[Loader] = []
    for matrix in (problem.left, problem.right):
        dtype = matrix.dtype
        narrow = dtype.bytes == 1 or (dtype.bytes < 4 and not tensor)
        loader = loader_of(matrix, region.alignment, narrow)
        rounded = tensor and dtype == F32
        whole = loader.asynchronous and loader.elements * dtype.bytes == CHUNK
        packed = pack(region, matrix, problem.sums.batches, rounded) if rounded or not whole else None
        if packed is not None:
            region, matrix, more = packed
            made = joined(made, more) or made
            loader = loader_of(matrix, region.alignment, narrow)
            loader.rounded = rounded
        loaders.append(loader)
    return region, (loaders[0], loaders[1]), made
