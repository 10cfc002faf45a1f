"""ai.onnx.preview.training.Gradient: reverse-mode differentiation of the nodes that are there, on import.

From the last node to the first, each node's rule adds nodes that take the gradient of its outputs to that of its
operands (Griewank & Walther 2008). Pointwise operators have theirs from their declarations (`derivatives`), operators
that move elements by a scatter of the places that they read, and others by rules below, or by what they are made of:
ONNX's functions, or a few nodes given here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..ir.dims import Dim, product
from ..ir.errors import ModelError, UnsupportedError
from ..ir.graph import Node, Value
from ..ir.ops import REGISTRY
from .calls import Builder, Call
from .convolution_gradient import conv, max_pool, numbers_of
from .derivatives import Pointwise, is_float, is_pointwise
from .expand import Nodes

GRADIENT = "ai.onnx.preview.training.Gradient"
Gradients: TypeAlias = Sequence["Value | None"]
Rule: TypeAlias = "Callable[[Nodes, Node, Gradients, Known], Gradients]"
Known: TypeAlias = "Callable[[Value | None], tuple[Any, ...] | None]"
"""The elements of a small value, numbers or sizes, where they are known."""


def summed_to(n: Nodes, gradient: Value, x: Value) -> Value:
    """The gradient for an operand that was broadcast: summed over the axes along which it was repeated."""
    added = gradient.tensor.rank - x.tensor.rank
    axes = [*range(added)]
    axes += [a + added for a, extent in enumerate(x.shape) if extent == 1 and gradient.shape[a + added] != 1]
    if axes:
        gradient = n("ReduceSum", gradient, n.dims(*axes), keepdims=1)
    return n.reshape(gradient, *x.shape)


def _pointwise(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    (gradient,), expression = gradients, Pointwise(n, node)
    found: list[Value | None] = []
    for position, x in enumerate(node.inputs):
        slope = expression.slope(position) if x is not None and is_float(x) else None
        if x is None or slope is None or gradient is None:
            found.append(None)
            continue
        part = n("Mul", n.cast(gradient, slope.dtype), slope)
        wide = n.expand(part, *gradient.shape) if part.shape != gradient.shape else part
        found.append(n.cast(summed_to(n, wide, x), x.dtype))
    return found


# Movement.


def _moved(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    """The same movement of the elements' numbers, 0 where the result has no element of operand 0; then a scatter."""
    x = node.operands[0]
    size = product(x.shape)
    numbers = n.reshape(n("Range", n.size(1), n.size(size + 1), n.size(1)), *x.shape)
    others = (*node.inputs[1:2], None, *node.inputs[3:]) if node.op == "Pad" else node.inputs[1:]
    while others and others[-1] is None:
        others = others[:-1]
    total: Value | None = None
    moved = n.several(node.op, (numbers, *others), len(node.outputs), **node.attributes)
    for gradient, places in zip(gradients, moved, strict=True):
        if gradient is not None:
            start = n.expand(n.like(0, gradient), size + 1) if total is None else total
            flat = (n.reshape(places, product(places.shape)), n.reshape(gradient, product(places.shape)))
            total = n("ScatterElements", start, *flat, axis=0, reduction="add")
    assert total is not None
    return [n.reshape(n.slice(total, 0, 1, size + 1), *x.shape)]


def _reshaped(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    assert gradients[0] is not None
    return [n.reshape(gradients[0], *node.operands[0].shape)]


def _transpose(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    assert gradients[0] is not None
    rank = gradients[0].tensor.rank
    order = node.attributes.get("perm", tuple(reversed(range(rank))))
    assert isinstance(order, tuple)
    return [n.transpose(gradients[0], *(order.index(axis) for axis in range(rank)))]


def _expand(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    assert gradients[0] is not None
    return [summed_to(n, gradients[0], node.operands[0])]


def _concat(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    axis = node.attributes["axis"]
    assert isinstance(axis, int) and gradients[0] is not None
    return n.split(gradients[0], [v.shape[axis] for v in node.operands], axis)


def _split(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    axis = node.attributes.get("axis", 0)
    assert isinstance(axis, int)
    x = node.operands[0]
    parts = [
        n.expand(n.like(0, x), *value.shape) if gradient is None else gradient
        for value, gradient in zip(node.outputs, gradients, strict=True)
    ]
    return [n.concat(parts, axis)]


# Reductions.


def _axes(node: Node, known: Known) -> tuple[int, ...]:
    x = node.operands[0]
    given = known(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if len(node.inputs) > 1 and node.inputs[1] is not None and given is None:
        raise UnsupportedError(f"{node.where}: the gradient of a reduction whose axes only the run tells")
    if not given:
        return () if node.attributes.get("noop_with_empty_axes") else tuple(range(x.tensor.rank))
    return tuple(sorted(int(axis) % x.tensor.rank for axis in given))


def _kept(n: Nodes, node: Node, value: Value, known: Known) -> Value:
    """A reduction's result, or its gradient, with the reduced axes as ones."""
    axes, x = _axes(node, known), node.operands[0]
    return n.reshape(value, *(1 if axis in axes else extent for axis, extent in enumerate(x.shape)))


def _reduce_sum(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    assert gradients[0] is not None
    x, gradient = node.operands[0], _kept(n, node, gradients[0], known)
    if node.op == "ReduceMean":
        count: Dim = product(x.shape[axis] for axis in _axes(node, known))
        gradient = n("Div", gradient, n.cast(n.size(count), x.dtype))
    return [n.expand(gradient, *x.shape)]


def _reduce_extreme(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    """The gradient goes to the elements that are the extreme, in equal parts."""
    assert gradients[0] is not None
    x, axes = node.operands[0], _axes(node, known)
    hit = n.cast(n("Equal", x, _kept(n, node, node.output, known)), x.dtype)
    count = n("ReduceSum", hit, n.dims(*axes)) if axes else hit
    return [n("Div", n("Mul", hit, _kept(n, node, gradients[0], known)), count)]


def _reduce_product(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    """For each element the product of the others: of all that are not zero, unless another one is."""
    assert gradients[0] is not None
    x, axes = node.operands[0], _axes(node, known)
    zero = n("Equal", x, 0)
    rest = n("ReduceProd", n("Where", zero, n.like(1, x), x), n.dims(*axes))
    zeros = n("ReduceSum", n.cast(zero, x.dtype), n.dims(*axes))
    others = n("Where", zero, rest, n("Div", rest, n("Where", zero, n.like(1, x), x)))
    mine = n("Sub", zeros, n.cast(zero, x.dtype))
    return [n("Mul", n("Where", n("Equal", mine, 0), others, n.like(0, x)), _kept(n, node, gradients[0], known))]


# Contractions.


def _matmul(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    (a, b), gradient = node.operands, gradients[0]
    assert gradient is not None
    wide_a = n.reshape(a, 1, *a.shape) if a.tensor.rank == 1 else a
    wide_b = n.reshape(b, *b.shape, 1) if b.tensor.rank == 1 else b
    shape = list(gradient.shape)
    shape += [1] if b.tensor.rank == 1 else []
    if a.tensor.rank == 1:
        shape.insert(len(shape) - 1, 1)
    gradient = n.reshape(gradient, *shape)

    def turned(x: Value) -> Value:
        rank = x.tensor.rank
        return n.transpose(x, *range(rank - 2), rank - 1, rank - 2)

    first = summed_to(n, n("MatMul", gradient, turned(wide_b)), wide_a)
    second = summed_to(n, n("MatMul", turned(wide_a), gradient), wide_b)
    return [n.reshape(first, *a.shape), n.reshape(second, *b.shape)]


def _einsum(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    """The operand's place taken by the gradient; an index that nothing else has is a sum, repeated along its axis."""
    text = str(node.attributes["equation"]).replace(" ", "")
    left, _, right = text.partition("->")
    terms = left.split(",")
    if "->" not in text or "." in text or any(len(set(term)) < len(term) for term in terms):
        raise UnsupportedError(f"{node.where}: the gradient of the equation {text!r}")
    found: list[Value | None] = []
    for position, (x, term) in enumerate(zip(node.operands, terms, strict=True)):
        others = [k for k in range(len(terms)) if k != position]
        there = set(right).union(*(terms[k] for k in others))
        kept = "".join(index for index in term if index in there)
        equation = f"{','.join([right, *(terms[k] for k in others)])}->{kept}"
        part = n("Einsum", gradients[0], *(node.operands[k] for k in others), equation=equation)
        part = n.reshape(part, *(d if index in there else 1 for index, d in zip(term, x.shape, strict=True)))
        found.append(n.expand(part, *x.shape))
    return found


def _softmax(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    axis, y, gradient = node.attributes.get("axis", -1), node.output, gradients[0]
    assert isinstance(axis, int) and gradient is not None
    if node.op == "LogSoftmax":
        return [n("Sub", gradient, n("Mul", n("Exp", y), n("ReduceSum", gradient, n.dims(axis))))]
    part = n("Mul", gradient, y)
    return [n("Sub", part, n("Mul", y, n("ReduceSum", part, n.dims(axis))))]


def _cumulated(n: Nodes, node: Node, gradients: Gradients, known: Known) -> Gradients:
    turned = dict(node.attributes) | {"reverse": 1 - int(bool(node.attributes.get("reverse", 0)))}
    return [n("CumSum", gradients[0], node.inputs[1], **turned)]


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshaped),
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    **dict.fromkeys(("ReduceSum", "ReduceMean"), _reduce_sum),
    **dict.fromkeys(("ReduceMax", "ReduceMin"), _reduce_extreme),
    "ReduceProd": _reduce_product,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Conv": conv,
    "MaxPool": max_pool,
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "CumSum": _cumulated,
    "Softplus": lambda n, node, gradients, known: [n("Mul", gradients[0], n("Sigmoid", node.operands[0]))],
}
"""By operator: the gradients of the operands from those of the outputs, as far as both are wanted."""


# What operators are made of.


def _gemm(n: Nodes, node: Node) -> Value:
    a, b = (
        n.transpose(x, 1, 0) if node.attributes.get(f"trans{side}") else x
        for side, x in zip("AB", node.operands, strict=False)
    )
    alpha, beta = _number(node, "alpha", 1.0), _number(node, "beta", 1.0)
    result = n("MatMul", a, b)
    result = result if alpha == 1 else n("Mul", result, alpha)
    c = node.inputs[2] if len(node.inputs) > 2 else None
    return result if c is None else n("Add", result, c if beta == 1 else n("Mul", c, beta))


def _normalised(n: Nodes, x: Value, axes: Sequence[int], epsilon: float) -> Value:
    centred = n("Sub", x, n("ReduceMean", x, n.dims(*axes)))
    return n("Div", centred, n("Sqrt", n("Add", n("ReduceMean", n("Mul", centred, centred), n.dims(*axes)), epsilon)))


def _epsilon(node: Node) -> float:
    return _number(node, "epsilon", 1e-5)


def _number(node: Node, name: str, default: float) -> float:
    value = node.attributes.get(name, default)
    assert isinstance(value, int | float)
    return float(value)


def _along_channels(n: Nodes, value: Value, x: Value) -> Value:
    return n.reshape(value, value.shape[0], *(1,) * (x.tensor.rank - 2))


def _batch_normalization(n: Nodes, node: Node) -> Value:
    x, *others = node.operands
    scale, bias, mean, variance = (_along_channels(n, value, x) for value in others)
    if node.attributes.get("training_mode"):
        centred = _normalised(n, x, [a for a in range(x.tensor.rank) if a != 1], _epsilon(node))
    else:
        centred = n("Div", n("Sub", x, mean), n("Sqrt", n("Add", variance, _epsilon(node))))
    return n("Add", n("Mul", centred, scale), bias)


def _instance_normalization(n: Nodes, node: Node) -> Value:
    x, scale, bias = node.operands
    centred = _normalised(n, x, range(2, x.tensor.rank), _epsilon(node))
    return n("Add", n("Mul", centred, _along_channels(n, scale, x)), _along_channels(n, bias, x))


def _layer_normalization(n: Nodes, node: Node) -> Value:
    x, others = node.operands[0], node.inputs[1:]
    axis = node.attributes.get("axis", -1)
    assert isinstance(axis, int)
    axes = range(axis % x.tensor.rank, x.tensor.rank)
    if node.op == "LayerNormalization":
        result = _normalised(n, x, axes, _epsilon(node))
    else:
        squares = n("ReduceMean", n("Mul", x, x), n.dims(*axes))
        result = n("Div", x, n("Sqrt", n("Add", squares, _epsilon(node))))
    result = n("Mul", result, others[0])
    return n("Add", result, others[1]) if len(others) > 1 and others[1] is not None else result


def _lp_normalization(n: Nodes, node: Node) -> Value:
    x, axis = node.operands[0], node.attributes.get("axis", -1)
    assert isinstance(axis, int)
    return n("Div", x, n("ReduceL1" if node.attributes.get("p", 2) == 1 else "ReduceL2", x, n.dims(axis)))


def _global_pool(n: Nodes, node: Node) -> Value:
    x = node.operands[0]
    return n("ReduceMean" if "Average" in node.op else "ReduceMax", x, n.dims(*range(2, x.tensor.rank)))


def _average_pool(n: Nodes, node: Node) -> Value:
    """The sum over each window, by a convolution with ones, over the number of elements in it."""
    x, given = node.operands[0], dict(node.attributes)
    if given.pop("ceil_mode", 0):
        raise UnsupportedError(f"{node.where}: the gradient of AveragePool with ceil_mode")
    padded, kernel = given.pop("count_include_pad", 0), numbers_of(node, "kernel_shape", ())
    ones = n.expand(n.like(1, x), 1, 1, *kernel)
    single = n.reshape(x, x.shape[0] * x.shape[1], 1, *x.shape[2:])
    total = n("Conv", single, ones, **given)
    count = n.like(math.prod(kernel), x)
    if not padded:
        count = n("Conv", n.expand(n.like(1, x), 1, 1, *x.shape[2:]), ones, **given)
    return n.reshape(n("Div", total, count), *node.output.shape)


MADE_OF: Mapping[str, Callable[[Nodes, Node], Value]] = {
    "Gemm": _gemm,
    "Mish": lambda n, node: n("Mul", node.operands[0], n("Tanh", n("Softplus", node.operands[0]))),
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _instance_normalization,
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _layer_normalization),
    "LpNormalization": _lp_normalization,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    "AveragePool": _average_pool,
}


class Reverse:
    """One sweep back over nodes. `emitted` is the list that `build` adds nodes to, `expanded` adds what ONNX makes an
    operator of."""

    def __init__(
        self,
        n: Nodes,
        emitted: list[Node],
        known: Known,
        expanded: Callable[[Call], Sequence[Any]],
    ) -> None:
        self.n, self.emitted, self.known, self.expanded = n, emitted, known, expanded
        self.gradients: dict[Value, Value] = {}

    def reach(self, nodes: Sequence[Node], start: set[Value]) -> set[Value]:
        """All values that the starting ones decide, as far as they are floats."""
        found = set(start)
        for node in nodes:
            captured = {v for region in node.regions.values() for inner in region.walk() for v in inner.operands}
            if found & ({*node.operands} | captured):
                found |= {value for value in node.outputs if is_float(value) and value not in start}
        return found

    def sweep(self, nodes: Sequence[Node], reached: set[Value], ends: set[Value]) -> None:
        """Adds gradients of what `reached` nodes read, from the last node to the first; nothing behind `ends`."""
        for node in reversed(nodes):
            gradients = [self.gradients.get(value) for value in node.outputs]
            if all(g is None for g in gradients) or ends & set(node.outputs):
                continue
            wanted = [v if v in reached and is_float(v) else None for v in node.inputs]
            captured = {v for region in node.regions.values() for inner in region.walk() for v in inner.operands}
            if not any(wanted) and not captured & reached:
                continue
            self.through(node, gradients, wanted, reached, ends)

    def through(
        self, node: Node, gradients: Gradients, wanted: Gradients, reached: set[Value], ends: set[Value]
    ) -> None:
        """Takes gradients through one node, or through what it is made of."""
        operator = REGISTRY.get(node.op)
        rule = RULES.get(node.op)
        if rule is None and node.op not in MADE_OF and is_pointwise(node):
            rule = _pointwise
        elif rule is None and operator is not None and operator.movement:
            rule = _moved
        if rule is not None:
            for value, gradient in zip(wanted, rule(self.n, node, gradients, self.known), strict=False):
                if value is not None and gradient is not None:
                    self.add(value, gradient)
            return
        first = len(self.emitted)
        if node.op in MADE_OF:
            results: Sequence[Any] = [MADE_OF[node.op](self.n, node)]
        elif node.regions:
            raise UnsupportedError(f"{node.where}: the gradient of {node.op} is not compiled")
        else:
            # Every output up to the last one that counts gets a name of its own.
            used = max(k for k, g in enumerate(gradients) if g is not None) + 1
            names = tuple(f"{value.name}.again{first}" for value in node.outputs[:used])
            try:
                results = self.expanded(Call(node.op, node.inputs, node.attributes, names, origin=node.origin))
            except UnsupportedError as error:
                raise UnsupportedError(f"{node.where}: the gradient of {node.op} is not compiled") from error
        nodes = self.emitted[first:]
        for result, gradient in zip(results, gradients, strict=False):
            if gradient is not None and isinstance(result, Value):
                self.add(result, gradient)
        self.sweep(nodes, reached | self.reach(nodes, {v for v in node.operands if v in reached}), ends)

    def add(self, value: Value, gradient: Value) -> None:
        before = self.gradients.get(value)
        self.gradients[value] = gradient if before is None else self.n("Add", before, gradient)


def gradient(
    call: Call,
    build: Builder,
    find: Callable[[str], Any],
    emitted: list[Node],
    values: Mapping[str, Sequence[Any]],
    expanded: Callable[[Call], Sequence[Any]],
) -> tuple[Value | None, ...]:
    """The outputs of a Gradient node: of attribute `y` by each of `xs`, zeros where it does not depend on one.

    `find` gives what a name stands for, `emitted` are the nodes that there are, to which `build` adds. Where the node's
    operands are other values than `xs` and `zs`, the nodes between are computed again for them. Raises UnsupportedError
    where an operator on the way has no derivative that is known, ModelError where `y` is not a tensor of floats.
    """
    n = Nodes(call, build)
    y, xs, others = (_names(call, key) for key in ("y", "xs", "zs"))
    named: list[Value] = [_tensor(find(name)) for name in xs] + [_tensor(find(name), False) for name in others]
    (target,), variables = (_tensor(find(name)) for name in y), named[: len(xs)]
    if len(call.inputs) != len(named):
        raise ModelError(f"it has {len(call.inputs)} operands, but xs and zs name {len(named)} tensors")

    def known(value: Value | None) -> tuple[Any, ...] | None:
        found = None if value is None else values.get(value.name)
        array = None if value is None else build.known(value)
        return tuple(found) if found is not None else None if array is None else tuple(array.reshape(-1).tolist())

    reverse = Reverse(n, emitted, known, expanded)
    nodes, changed = list(emitted), {a: b for a, b in zip(named, call.inputs, strict=True) if b is not None and a != b}
    if changed:
        nodes, again = _again(build, nodes, changed)
        target, variables = again.get(target, target), [again.get(x, x) for x in variables]
    reverse.add(target, n.expand(n.like(1, target), *target.shape))
    ends = set(variables)
    reverse.sweep(nodes, reverse.reach(nodes, ends), ends)
    found = [reverse.gradients.get(x) or n.expand(n.like(0, x), *x.shape) for x in variables]
    return tuple(
        build.emit(Call("Identity", (v,), {}, (name,), origin=call.origin))[0] if name else v
        for v, name in zip(found, call.outputs, strict=False)
    )


def _names(call: Call, key: str) -> list[str]:
    found = call.attributes.get(key, ())
    return list(map(str, found)) if isinstance(found, tuple) else [str(found)]


def _tensor(item: Any, differentiable: bool = True) -> Value:
    if not isinstance(item, Value) or (differentiable and not is_float(item)):
        raise ModelError("it differentiates tensors of floats")
    return item


def _again(
    build: Builder, nodes: Sequence[Node], changed: Mapping[Value, Value]
) -> tuple[list[Node], dict[Value, Value]]:
    """Nodes that depend on what changed, computed for the new values; and what every value has become."""
    found, result = dict(changed), []
    for node in nodes:
        if not any(v in found for v in node.operands) or any(v in changed for v in node.outputs):
            continue
        if node.regions:
            raise UnsupportedError(f"{node.where}: the gradient of {node.op} is not compiled")
        inputs = tuple(None if v is None else found.get(v, v) for v in node.inputs)
        names = tuple("" for _ in node.outputs)
        outputs = build.emit(Call(node.op, inputs, node.attributes, names, origin=node.origin))
        result.append(Node(node.op, inputs, outputs, node.attributes, {}, node.origin))
        found.update(zip(node.outputs, outputs, strict=True))
    return result, found
