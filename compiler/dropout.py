"""Dropout in training: elements that random numbers choose are zero, the others are scaled to keep the mean."""

from __future__ import annotations

from ..ir.dtypes import F32
from ..ir.graph import Attribute, Value
from .expand import Nodes


def dropout(
    n: Nodes, x: Value, ratio: Value | None = None, training_mode: Value | None = None, *, seed: int | None = None
) -> tuple[Value, Value]:
    """The result and the mask of what was kept. An element is kept where a number in [0, 1) is at least the ratio; with
    a seed, and a shape that the model fixes, these are the reference's numbers (`passes.fold`)."""
    given: dict[str, Attribute] = {} if seed is None else {"seed": float(seed)}
    sizes = tuple(d for d in x.shape if isinstance(d, int))
    if len(sizes) == x.tensor.rank:
        chance = n("RandomUniform", shape=sizes, dtype=F32, **given)
    else:
        chance = n("RandomUniformLike", x, dtype=F32, **given)
    limit = n.like(0.5, chance) if ratio is None else n.cast(n.reshape(ratio), F32)
    share = n("Sub", 1, limit)
    mask = n("GreaterOrEqual", chance, limit)
    if training_mode is not None and n.known(training_mode) is None:
        training = n.reshape(training_mode)
        mask = n("Or", n("Not", training), mask)
        share = n("Where", training, share, n.like(1, share))
    wide = x if x.dtype.bits >= 32 else n.cast(x, F32)
    scaled = n.cast(n("Div", wide, n.cast(share, wide.dtype)), x.dtype)
    return n("Where", mask, scaled, n.like(0, x)), mask
