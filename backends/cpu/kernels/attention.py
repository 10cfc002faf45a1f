"""Attention on a CPU, the scores never stored: queries in blocks, or where they are few one after the other."""

from __future__ import annotations

from dataclasses import replace

from ....ir import scalars as s
from ....ir.loops import If, Statement
from ....ir.target import Target
from ....passes.regions import Lowered, Region
from ...kernels.attention_problem import Problem, problem_of
from ...kernels.calls import call
from ...kernels.epilogue import through_memory
from .attention_blocks import Blocks
from .attention_operands import readable
from .attention_quantized import unscaled
from .attention_rows import Rows

ROW_CYCLES = 12
"""Cycles for a key of one query besides its products: their sum across the lanes, and its weight."""
VECTOR_CYCLES = 12
"""Cycles for the weights of a key in a vector of queries."""


def schedule(region: Region, target: Target) -> Lowered | None:
    """The kernels of an attention; None where its operands are not such as this schedule takes."""
    found = problem_of(region)
    if found is None:
        return through_memory(region, lambda alone: _lowered(alone, target))
    return _lowered(region, target)


def _lowered(region: Region, target: Target) -> Lowered | None:
    found = problem_of(region)
    if found is None:
        return None
    problem = unscaled(found[0])
    keys, key_copy = readable(region, problem, problem.keys, "keys", False, target)
    values, value_copy = readable(region, problem, problem.values, "values", True, target)
    copies = [copy for copy in (key_copy, value_copy) if copy is not None]
    scratch = tuple(buffer for _, buffer in copies)
    problem = replace(problem, keys=keys, values=values)
    body, name = _body(problem, target)
    made = call(region, f"attention_{name}", body, scratch)
    return Lowered((*(copy for copy, _ in copies), made), scratch)


def _body(problem: Problem, target: Target) -> tuple[tuple[Statement, ...], str]:
    """The statements, and what the kernel is called by; where only the run tells how many queries there are, both."""
    rows, most = problem.queries.rows, few(problem, target)
    one_by_one, blocks = Rows(problem, target), Blocks(problem, target)
    width = f"{problem.queries.channels}_"
    if isinstance(rows, int):
        single = rows <= most
        return tuple((one_by_one if single else blocks).body()), f"{width}1" if single else f"{width}{blocks}"
    condition = s.index(rows) <= s.index(most)
    return (If(condition, tuple(one_by_one.body()), tuple(blocks.body())),), f"{width}{blocks}"


def few(problem: Problem, target: Target) -> int:
    """Queries up to which those one by one take less time than a vector whose lanes they fill in part."""
    width = problem.queries.channels + problem.values.channels
    alone = width / target.lanes(32) + ROW_CYCLES
    return int((width + VECTOR_CYCLES) / alone)
