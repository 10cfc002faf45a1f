"""Matrix products on a GPU: MatMul, Gemm, contractions by Einsum and whatever else is a sum of products."""

from __future__ import annotations

from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.epilogue import through_memory
from .choose import Plan, choose, uses_tensor_cores
from .contraction import Loaders, lowered, shape_of
from .loaders import loader_of
from .problem import Problem, find_problem


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of a region whose anchor sums products; None for any other."""
    found = find_problem(region)
    if found is None:
        return None
    problem = found[1]
    if problem is None:
        return through_memory(region, lambda alone: schedule(alone, target))
    loaders = loaders_of(region, problem, target)
    return lowered(region, problem.sums, loaders, plan_of(problem, loaders, target))


def plan_of(problem: Problem, loaders: Loaders, target: Target) -> Plan:
    """The plan that suits the target."""
    return choose(shape_of(problem.sums), loaders, problem.sums.dtype, target)


def loaders_of(region: Region, problem: Problem, target: Target) -> Loaders:
    """How both operands come to shared memory."""
    dtype = problem.left.dtype
    narrow = dtype.bytes == 1 or (dtype.bytes < 4 and not uses_tensor_cores(dtype, problem.sums.dtype, target))
    left, right = (loader_of(matrix, region.alignment, narrow) for matrix in (problem.left, problem.right))
    return left, right
