"""Whole cases: a model, its inputs, and what the reference gives; drawn by a seed, or as a hypothesis strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from fuzz.compare import quiet
from fuzz.graphs import Builder, Case, Rejected, case_of
from fuzz.operators import DRAWN, add_node
from hypothesis import assume
from hypothesis import strategies as st

SIZES = (1, 1, 1, 1, 1, 2, 2, 3, 4, 6, 10, 20)
"""Nodes of a graph: half of the cases show one operator in all its ways, the other half how operators meet."""
ATTEMPTS = 200
"""Graphs that are begun for a case; without end an operator that nobody can run would never be told."""
MARGIN = 4
"""Attempts at a node, for each node of the graph."""


def grow(integer: Callable[[int, int], int], sizes: Sequence[int] = SIZES, operators: Sequence[str] = DRAWN) -> Case:
    """A case of some nodes out of `operators`, by numbers from `integer`. Raises Rejected where none came about."""
    size = sizes[integer(0, len(sizes) - 1)]
    builder = Builder(integer, (1, 1, 2)[integer(0, 2)], special=integer(0, 9) == 9)
    builder.alone = size == 1
    builder.huge = size < 3 and integer(0, 19) == 19
    for _ in range(MARGIN * size + 4):
        kept = len(builder.values)
        try:
            with quiet():
                add_node(builder, operators[integer(0, len(operators) - 1)])
        except Rejected:
            del builder.values[kept:]
        if len(builder.nodes) >= size:
            break
    return case_of(builder)


def case_by(seed: int, sizes: Sequence[int] = SIZES, operators: Sequence[str] = DRAWN) -> Case:
    """The case of a seed: independent of those of all others, as hypothesis's examples are not."""
    random = np.random.default_rng(seed)
    for _ in range(ATTEMPTS):
        try:
            return grow(lambda low, high: int(random.integers(low, high, endpoint=True)), sizes, operators)
        except Rejected:
            continue
    raise Rejected(f"no case of {', '.join(operators)} in {ATTEMPTS} attempts")


@st.composite
def cases(draw: st.DrawFn, sizes: Sequence[int] = SIZES, operators: Sequence[str] = DRAWN) -> Case:
    """The same as a strategy, which hypothesis shrinks."""
    try:
        return grow(lambda low, high: draw(st.integers(low, high)), sizes, operators)
    except Rejected:
        assume(False)
        raise
