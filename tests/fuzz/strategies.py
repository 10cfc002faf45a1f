"""Hypothesis strategy of whole cases: a model, its inputs, and what the reference gives."""

from __future__ import annotations

from hypothesis import assume
from hypothesis import strategies as st

from fuzz.compare import quiet
from fuzz.graphs import Builder, Case, Rejected, case_of
from fuzz.operators import DRAWN, add_node

SIZES = (1, 1, 1, 2, 2, 3, 4, 6, 8, 12, 16, 30)
"""Nodes of a graph: half of the cases show one operator in all its ways, the other half how operators meet."""
MARGIN = 4
"""Attempts at a node, for each node of the graph."""


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[int, ...] = SIZES, operators: tuple[str, ...] = DRAWN) -> Case:
    """A case of some nodes out of `operators`."""
    size = draw(st.sampled_from(sizes))
    builder = Builder(draw, draw(st.sampled_from((1, 1, 2))), special=draw(st.integers(0, 9)) == 9)
    builder.huge = size < 3 and draw(st.integers(0, 19)) == 19
    for _ in range(MARGIN * size + 4):
        kept = len(builder.values)
        try:
            with quiet():
                add_node(builder, draw(st.sampled_from(operators)))
        except Rejected:
            del builder.values[kept:]
        if len(builder.nodes) >= size:
            break
    assume(builder.nodes)
    try:
        return case_of(builder)
    except Rejected:
        assume(False)
        raise
