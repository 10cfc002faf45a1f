"""ai.onnx.preview.training: steps of optimisers, of a rate, a step number, then parameters, gradients and states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...ir.dtypes import I64
from ...ir.errors import ModelError
from ...ir.graph import Value
from ..expand import Expansions, Nodes

declare = Expansions()


def _each(operands: Sequence[Value], kinds: int, step: Callable[..., tuple[Value, ...]]) -> tuple[Value, ...]:
    """step(parameter, gradient, *states) for each parameter; its results sorted by kind, as ONNX sorts operands."""
    if not operands or len(operands) % kinds:
        raise ModelError(f"it has {len(operands)} tensors, which is no multiple of {kinds}")
    count = len(operands) // kinds
    groups = [operands[kind * count : (kind + 1) * count] for kind in range(kinds)]
    results = [step(*tensors) for tensors in zip(*groups, strict=True)]
    return tuple(value for kind in zip(*results, strict=True) for value in kind)


@declare("ai.onnx.preview.training.Adagrad")
def adagrad(
    n: Nodes,
    rate: Value,
    number: Value,
    *operands: Value,
    decay_factor: float = 0.0,
    epsilon: float = 0.0,
    norm_coefficient: float = 0.0,
) -> tuple[Value, ...]:
    """Duchi, Hazan & Singer 2011."""

    def step(x: Value, gradient: Value, squares: Value) -> tuple[Value, ...]:
        scale = n("Add", n("Mul", n.cast(number, rate.dtype), decay_factor), 1)
        slope = n("Add", n("Mul", x, norm_coefficient), gradient)
        squares = n("Add", squares, n("Mul", slope, slope))
        change = n(
            "Div", n("Mul", n.cast(n("Div", rate, scale), x.dtype), slope), n("Add", n("Sqrt", squares), epsilon)
        )
        return n("Sub", x, change), squares

    return _each(operands, 3, step)


@declare("ai.onnx.preview.training.Adam")
def adam(
    n: Nodes,
    rate: Value,
    number: Value,
    *operands: Value,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 0.0,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> tuple[Value, ...]:
    """Kingma & Ba 2014."""

    def step(x: Value, gradient: Value, mean: Value, squares: Value) -> tuple[Value, ...]:
        slope = n("Add", n("Mul", x, norm_coefficient), gradient)
        mean = n("Add", n("Mul", mean, alpha), n("Mul", slope, 1 - alpha))
        squares = n("Add", n("Mul", squares, beta), n("Mul", n("Mul", slope, slope), 1 - beta))
        count = n.cast(number, rate.dtype)
        # At step 0 nothing is corrected.
        short = [n("Sub", 1, n("Pow", n.like(decay, rate), count)) for decay in (beta, alpha)]
        corrected = n("Div", n("Mul", rate, n("Sqrt", short[0])), short[1])
        corrected = n("Where", n("Greater", n.cast(number, I64), 0), corrected, rate)
        change = n("Div", n("Mul", n.cast(corrected, x.dtype), mean), n("Add", n("Sqrt", squares), epsilon))
        return n("Mul", n("Sub", x, change), 1 - norm_coefficient_post), mean, squares

    return _each(operands, 4, step)


@declare("ai.onnx.preview.training.Momentum")
def momentum(
    n: Nodes,
    rate: Value,
    number: Value,
    *operands: Value,
    alpha: float,
    beta: float,
    mode: str,
    norm_coefficient: float,
) -> tuple[Value, ...]:
    """Gradient descent with momentum, plain or by Nesterov 1983."""

    def step(x: Value, gradient: Value, momentum: Value) -> tuple[Value, ...]:
        slope = n("Add", n("Mul", x, norm_coefficient), gradient)
        # At step 0 the slope counts in full.
        weight = n("Where", n("Greater", n.cast(number, I64), 0), n.like(beta, x), n.like(1, x))
        momentum = n("Add", n("Mul", momentum, alpha), n("Mul", slope, weight))
        direction = n("Add", slope, n("Mul", momentum, alpha)) if mode == "nesterov" else momentum
        return n("Sub", x, n("Mul", n.cast(rate, x.dtype), direction)), momentum

    return _each(operands, 3, step)
