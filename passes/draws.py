"""Random operators without a seed: a few words that a program keeps from one run to the next.

Word 0 is a number that is another one in each run, word k one that is another in each iteration of a loop k deep. The
words stay as they are while a graph's nodes run, so that what two kernels compute anew is the same number in both; a
step at the end of the program, and of each iteration, changes them. They lie behind the constants, as the one of these
that is written; who runs the program starts them (`started`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..ir.dtypes import U64
from ..ir.graph import Graph, Node
from ..ir.ops.random import is_drawn
from ..ir.program import Memory, Place, Step
from ..ir.run_state import STATE as STATE
from ..ir.run_state import WORDS
from ..ir.scalars import Buffer
from ..ir.tensors import Tensor, buffer_tensor
from .regions import Region

if TYPE_CHECKING:
    from .lower import Lowering


def has_draws(nodes: Sequence[Node]) -> bool:
    """Whether any of these nodes, or of those in their regions, gives other numbers in each run."""
    inner = (item for node in nodes for region in node.regions.values() for item in region.walk())
    return any(is_drawn(item.op, item.attributes) for item in (*nodes, *inner))


def state_operand(lowering: Lowering, name: str, depth: int) -> Tensor:
    """The words as an operand of a kernel, `depth` regions deep; from here on definitions draw by them."""
    words = buffer_tensor(name, U64, (WORDS,))
    lowering.memories[STATE] = Memory(STATE, U64, WORDS, "constant")
    lowering.constants[STATE] = lambda: np.zeros(WORDS, np.uint64)
    lowering.inference.draw = tuple(words.at((k,)) for k in range(max(1, min(depth, WORDS))))
    return words


def advance(lowering: Lowering, graph: Graph, depth: int) -> list[Step]:
    """The step that changes the words when the nodes of a graph have run once."""
    if not has_draws(graph.nodes):
        return []
    place = Place(STATE, min(depth, WORDS - 1))
    old = buffer_tensor("x0", U64, (1,))
    new = Tensor((1,), U64, lambda i: old.at(i) + 1, "map", (old,))
    return lowering.in_place(Region("advance", (old,), ((Buffer("y0", U64, 1), new),)), place)
