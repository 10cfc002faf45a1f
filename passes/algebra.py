"""The tables of algebraic rewrites: all exact, or (as ONNX Runtime does it) but for the sign of a zero."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..ir.graph import Graph
from .pipeline import Pass, register
from .rules import Match, Rule, apply_rules, op, rule


@register
@dataclass(frozen=True)
class Rules(Pass):
    """Applies the rules of this file."""

    name = "rules"

    def run(self, graph: Graph) -> Graph:
        return apply_rules(graph, RULES)


def floating(match: Match) -> bool:
    """Whether the result is of a floating-point type."""
    return match.dtype.is_float


def integer(match: Match) -> bool:
    """Whether the result is an integer: sums and products may then be grouped anew."""
    return match.dtype.is_integer


def signed(match: Match) -> bool:
    """Whether the result may be negated."""
    return match.dtype.kind in ("float", "int")


def powers_of_two(match: Match, *names: str) -> bool:
    """Whether multiplying by some of the constants only changes exponents, and not to the limits of the type."""
    for name in names:
        fractions, exponents = np.frexp(np.abs(match.array(name).astype(np.float64)))
        if match.dtype.is_float and np.all(fractions == 0.5) and np.all(np.abs(exponents) < 10):
            return True
    return False


def scalars(match: Match, *names: str) -> bool:
    """Whether the constants are single numbers without axes, as Clip takes them."""
    return all(match.array(name).ndim == 0 for name in names) and match.dtype.kind != "bool"


def in_order(match: Match) -> bool:
    """Whether the bounds c1 and c2 hold something between them."""
    return scalars(match, "c1", "c2") and bool(match.array("c1") <= match.array("c2"))


NEUTRAL: tuple[Rule, ...] = (
    rule("x + 0 => x", lambda x: x + 0, lambda x: x),
    rule("x - 0 => x", lambda x: x - 0, lambda x: x),
    rule("x * 1 => x", lambda x: x * 1, lambda x: x),
    rule("x / 1 => x", lambda x: x / 1, lambda x: x),
    rule("x and true => x", lambda x: op.And(x, True), lambda x: x),
    rule("x or false => x", lambda x: op.Or(x, False), lambda x: x),
    rule("where(true, x, y) => x", lambda x, y: op.Where(True, x, y), lambda x, y: x),
    rule("where(false, x, y) => y", lambda x, y: op.Where(False, x, y), lambda x, y: y),
    rule("where(p, x, x) => x", lambda p, x: op.Where(p, x, x), lambda p, x: x),
)

SIGNS: tuple[Rule, ...] = (
    rule("0 - x => -x", lambda x: 0 - x, lambda x: -x, signed),
    rule("x * -1 => -x", lambda x: x * -1, lambda x: -x, signed),
    rule("x / -1 => -x", lambda x: x / -1, lambda x: -x, signed),
    rule("x + -y => x - y", lambda x, y: x + -y, lambda x, y: x - y),
    rule("x - -y => x + y", lambda x, y: x - -y, lambda x, y: x + y),
    rule("-(x - y) => y - x", lambda x, y: -(x - y), lambda x, y: y - x),
    rule("-x * c => x * -c", lambda x, c: -x * c, lambda x, c: x * -c, signed),
    rule("abs(-x) => abs(x)", lambda x: op.Abs(-x), lambda x: op.Abs(x)),
    rule("abs(abs(x)) => abs(x)", lambda x: op.Abs(op.Abs(x)), lambda x: op.Abs(x)),
    rule("x - c => x + -c", lambda x, c: x - c, lambda x, c: x + -c, floating),
)

POWERS: tuple[Rule, ...] = (
    rule("x ** 1 => x", lambda x: x**1, lambda x: x),
    rule("x ** 2 => x * x", lambda x: x**2, lambda x: x * x),
    rule("x ** 3 => x * x * x", lambda x: x**3, lambda x: x * x * x),
    rule("x ** 0.5 => sqrt(x)", lambda x: x**0.5, lambda x: op.Sqrt(x), floating),
    rule("x ** -1 => 1 / x", lambda x: x**-1, lambda x: op.Reciprocal(x), floating),
    rule("x ** -0.5 => 1 / sqrt(x)", lambda x: x**-0.5, lambda x: op.Reciprocal(op.Sqrt(x)), floating),
    rule("1 / x => reciprocal", lambda x: 1 / x, lambda x: op.Reciprocal(x), floating),
)

GROUPING: tuple[Rule, ...] = (
    rule("x / c => x * (1 / c)", lambda x, c: x / c, lambda x, c: x * (1 / c), lambda m: powers_of_two(m, "c"), c=4),
    rule("(x + c1) + c2 => x + (c1 + c2)", lambda x, c1, c2: (x + c1) + c2, lambda x, c1, c2: x + (c1 + c2), integer),
    rule("(x * c1) * c2 => x * (c1 * c2)", lambda x, c1, c2: (x * c1) * c2, lambda x, c1, c2: x * (c1 * c2), integer),
    rule(
        "(x * c1) * c2 => x * (c1 * c2), one of them a power of two",
        lambda x, c1, c2: (x * c1) * c2,
        lambda x, c1, c2: x * (c1 * c2),
        lambda m: powers_of_two(m, "c1", "c2"),
        c1=0.5,
    ),
)

CLAMPS: tuple[Rule, ...] = (
    rule("relu(relu(x)) => relu(x)", lambda x: op.Relu(op.Relu(x)), lambda x: op.Relu(x)),
    rule("max(x, 0) => relu(x)", lambda x: op.Max(x, 0), lambda x: op.Relu(x), signed),
    rule("max(x, c) => clip", lambda x, c: op.Max(x, c), lambda x, c: op.Clip(x, c), lambda m: scalars(m, "c"), c=0.5),
    rule(
        "min(x, c) => clip", lambda x, c: op.Min(x, c), lambda x, c: op.Clip(x, None, c), lambda m: scalars(m, "c"), c=1
    ),
    rule("clip(x, 0) => relu(x)", lambda x: op.Clip(x, 0), lambda x: op.Relu(x), signed),
    rule("clip(x, 0) => relu(x)", lambda x: op.Clip(x, 0, None), lambda x: op.Relu(x), signed),
    rule(
        "clip(relu(x), c1, c2) => clip(x, max(c1, 0), c2)",
        lambda x, c1, c2: op.Clip(op.Relu(x), c1, c2),
        lambda x, c1, c2: op.Clip(x, op.Max(c1, 0), op.Max(c2, 0)),
        in_order,
        c1=-1,
        c2=2,
    ),
    rule(
        "clip(relu(x), _, c) => clip(x, 0, c)",
        lambda x, c: op.Clip(op.Relu(x), None, c),
        lambda x, c: op.Clip(x, 0, op.Max(c, 0)),
        lambda m: scalars(m, "c"),
        c=1,
    ),
    rule(
        "relu(clip(x, c1, c2)) => clip(x, max(c1, 0), max(c2, 0))",
        lambda x, c1, c2: op.Relu(op.Clip(x, c1, c2)),
        lambda x, c1, c2: op.Clip(x, op.Max(c1, 0), op.Max(c2, 0)),
        in_order,
        c1=-1,
        c2=2,
    ),
    rule(
        "relu(clip(x, _, c)) => clip(x, 0, max(c, 0))",
        lambda x, c: op.Relu(op.Clip(x, None, c)),
        lambda x, c: op.Clip(x, 0, op.Max(c, 0)),
        lambda m: scalars(m, "c"),
        c=1,
    ),
    rule(
        "clip(clip(x, c1), _, c2) => clip(x, c1, c2)",
        lambda x, c1, c2: op.Clip(op.Clip(x, c1), None, c2),
        lambda x, c1, c2: op.Clip(x, c1, c2),
        in_order,
        c1=-1,
        c2=1,
    ),
    rule(
        "clip(clip(x, _, c2), c1) => clip(x, c1, c2)",
        lambda x, c1, c2: op.Clip(op.Clip(x, None, c2), c1),
        lambda x, c1, c2: op.Clip(x, c1, c2),
        in_order,
        c1=-1,
        c2=1,
    ),
    rule(
        "clip(clip(x, c1, c2), c3, c4) => one clip",
        lambda x, c1, c2, c3, c4: op.Clip(op.Clip(x, c1, c2), c3, c4),
        lambda x, c1, c2, c3, c4: op.Clip(x, op.Min(op.Max(c1, c3), c4), op.Min(op.Max(c2, c3), c4)),
        lambda m: in_order(m) and scalars(m, "c3", "c4"),
        c1=-1,
        c2=1,
        c3=0,
        c4=2,
    ),
)

RULES: tuple[Rule, ...] = (*NEUTRAL, *SIGNS, *POWERS, *GROUPING, *CLAMPS)
