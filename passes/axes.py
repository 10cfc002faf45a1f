"""What becomes of an operator when its operands are stored with their axes in another order.

`perm` is that order: a tensor stored by it has the extent and the content of its axis perm[k] at axis k, as ONNX's
Transpose has it. Two tables say what operators do: those of `ALIKE` give results stored by the same order, those of
`ALTERED` have results of another rank, whose order follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import TypeAlias

from ..ir.dims import Dim
from ..ir.graph import Attribute, Node, TensorType, Value
from ..ir.ops import REGISTRY
from ..ir.ops.declare import CHANNELS_LAST
from ..ir.tensors import matching_groups

Perm: TypeAlias = tuple[int, ...]
Attributes: TypeAlias = Mapping[str, Attribute]
Alike: TypeAlias = Callable[[Node, Perm], Attributes | None]
Altered: TypeAlias = Callable[[Node, Perm], tuple[Attributes, Perm] | None]


def compose(first: Perm, second: Perm) -> Perm:
    """The order that storing by `second` gives to what is stored by `first` already."""
    return tuple(first[axis] for axis in second)


def inverse(perm: Perm) -> Perm:
    """The order that undoes `perm`."""
    return tuple(perm.index(axis) for axis in range(len(perm)))


def channels_last(rank: int) -> Perm:
    """Images [N, C, *spatial] stored as [N, *spatial, C]."""
    return (0, *range(2, rank), 1)


def ordered(shape: Sequence[Dim], perm: Perm) -> tuple[Dim, ...]:
    """A shape with its axes in that order."""
    return tuple(shape[axis] for axis in perm)


def is_image_operator(node: Node) -> bool:
    """Whether the node may store its images channels-last."""
    operator = REGISTRY.get(node.op)
    return operator is not None and operator.spatial and len(node.outputs) == 1 and node.operands[0].tensor.rank > 2


def carried_operands(node: Node) -> tuple[int, ...]:
    """The positions of the operands that are stored as the results are; elementwise ones of lower rank are not."""
    if is_lookup(node):
        return (1,)
    if is_elementwise(node) or node.op == "Concat":
        rank = node.outputs[0].tensor.rank
        return tuple(i for i, v in enumerate(node.inputs) if v is not None and v.tensor.rank == rank)
    return (0, 3) if node.op in QUANTIZED_ELEMENTWISE else (0,)


QUANTIZED_ELEMENTWISE = ("com.microsoft.QLinearAdd", "com.microsoft.QLinearMul")
"""Operators of two tensors, each with its scale and zero point behind it."""


def is_elementwise(node: Node) -> bool:
    """Whether operands broadcast to the shape of the result."""
    operator = REGISTRY.get(node.op)
    return operator is not None and (operator.pointwise or node.op in ("Min", "Max", "Sum", "Mean"))


def is_lookup(node: Node) -> bool:
    """Whether each element of the result is that of a list at the place that one element of another operand says."""
    table, places = (*node.inputs, None)[:2]
    return node.op == "Gather" and table is not None and places is not None and table.tensor.rank == 1


def may_be_alike(node: Node) -> bool:
    """Whether some other order might do for operands and results alike."""
    rank = node.outputs[0].tensor.rank
    if not all(isinstance(value.type, TensorType) and value.tensor.rank == rank for value in node.outputs):
        return False
    if is_elementwise(node) or is_lookup(node):
        return True
    known = node.op in ALIKE or is_image_operator(node)
    return known and node.inputs[0] is not None and node.inputs[0].tensor.rank == rank


def alike(node: Node, perm: Perm) -> Attributes | None:
    """The attributes with which the node gives its results stored by `perm` from such operands; None: it cannot."""
    if is_elementwise(node) or is_lookup(node):
        return node.attributes
    return _image(node, perm) if is_image_operator(node) else ALIKE[node.op](node, perm)


def may_be_altered(node: Node) -> bool:
    """Whether the node has one carried operand and one result of another shape."""
    return node.op in ALTERED and len(node.outputs) == 1 and len(node.operands) <= 2 and not is_lookup(node)


def altered(node: Node, perm: Perm) -> tuple[Attributes, Perm] | None:
    """For an operand stored by `perm`: the attributes, and the order in which the result comes; None: it cannot."""
    return ALTERED[node.op](node, perm)


def source_order(node: Node, result: Perm) -> Perm | None:
    """The order of the operand for which a Reshape gives its result stored by `result`; None where there is none."""
    if node.op != "Reshape" or len(node.operands) != 1:
        return None
    back = replace(node, inputs=node.outputs, outputs=node.operands)
    found = _reshape(back, result)
    return None if found is None else found[1]


# Attributes that name axes, or hold something for each axis.


def _with(node: Node, **changes: Attribute) -> Attributes:
    return {**node.attributes, **changes}


def _ints(node: Node, name: str) -> tuple[int, ...] | None:
    """A list of numbers, None where the attribute is absent or symbolic."""
    value = node.attributes.get(name)
    return value if isinstance(value, tuple) and all(isinstance(item, int) for item in value) else None  # type: ignore[return-value]


def _one_axis(default: int) -> Alike:
    def rule(node: Node, perm: Perm) -> Attributes:
        axis = node.attributes.get("axis", default)
        assert isinstance(axis, int)
        return _with(node, axis=perm.index(axis % len(perm)))

    return rule


def _listed_axes(node: Node, perm: Perm, default: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """The attribute `axes` for the new order; None where there is none."""
    axes = _ints(node, "axes")
    if axes is None and default is not None:
        axes = tuple(default)
    return None if axes is None else tuple(perm.index(axis % len(perm)) for axis in axes)


def _reduce(node: Node, perm: Perm) -> Attributes | None:
    if not node.attributes.get("keepdims", 1) or len(node.operands) > 1:
        return None
    axes = _listed_axes(node, perm)
    return _with(node, axes=axes) if axes else node.attributes


def _extremum_position(node: Node, perm: Perm) -> Attributes | None:
    return _one_axis(0)(node, perm) if node.attributes.get("keepdims", 1) else None


def _slice(node: Node, perm: Perm) -> Attributes | None:
    starts = node.attributes.get("starts")
    if "axes" not in node.attributes and (len(node.inputs) > 3 or not isinstance(starts, tuple)):
        return None
    axes = _listed_axes(node, perm, None if "axes" in node.attributes else range(len(starts)))  # type: ignore[arg-type]
    return None if axes is None else _with(node, axes=axes)


def _pad(node: Node, perm: Perm) -> Attributes | None:
    if "axes" in node.attributes:
        axes = _listed_axes(node, perm)
        return None if axes is None else _with(node, axes=axes)
    pads = node.attributes.get("pads")
    if not isinstance(pads, tuple) or len(pads) != 2 * len(perm):
        return None
    return _with(node, pads=(*compose(pads, perm), *compose(pads[len(perm) :], perm)))  # type: ignore[arg-type]


def _per_axis(*names: str) -> Alike:
    """Each attribute holds something for each axis, and no operand stands for it."""

    def rule(node: Node, perm: Perm) -> Attributes | None:
        changes: dict[str, Attribute] = {}
        for name in names:
            entries = node.attributes.get(name)
            if isinstance(entries, tuple) and len(entries) == len(perm):
                changes[name] = tuple(entries[axis] for axis in perm)
            elif entries is not None:
                return None
        return _with(node, **changes) if len(node.operands) == 1 and changes else None

    return rule


def _resize(node: Node, perm: Perm) -> Attributes | None:
    if "roi" in node.attributes:
        return None
    if "axes" in node.attributes:
        axes = _listed_axes(node, perm)
        return None if axes is None else _with(node, axes=axes)
    return _per_axis("scales", "sizes")(node, perm)


def _cumulative(node: Node, perm: Perm) -> Attributes | None:
    axis = _ints(node, "axis")
    return None if axis is None else _with(node, axis=(perm.index(axis[0] % len(perm)),))


def _gather(node: Node, perm: Perm) -> Attributes | None:
    indices = node.inputs[1]
    return _one_axis(0)(node, perm) if indices is not None and indices.tensor.rank == 1 else None


def _fixed_from(first: Callable[[Node, int], int]) -> Alike:
    """The axes from a certain one on must stay where they are."""

    def rule(node: Node, perm: Perm) -> Attributes | None:
        start = first(node, len(perm))
        return node.attributes if perm[start:] == tuple(range(start, len(perm))) else None

    return rule


def _normalised_axis(node: Node, rank: int) -> int:
    axis = node.attributes.get("axis", -1)
    assert isinstance(axis, int)
    return axis % rank


def _matmul(node: Node, perm: Perm) -> Attributes | None:
    right = node.inputs[1]
    return _fixed_from(lambda _, rank: rank - 1)(node, perm) if right is not None and right.tensor.rank == 2 else None


def _both(node: Node, perm: Perm) -> Attributes | None:
    other = node.inputs[3]
    return node.attributes if other is not None and other.tensor.rank == len(perm) else None


def _quantize(node: Node, perm: Perm) -> Attributes | None:
    scale = node.inputs[1]
    if scale is None or scale.tensor.rank > 1:
        return None
    return node.attributes if scale.tensor.rank == 0 else _one_axis(1)(node, perm)


def _image(node: Node, perm: Perm) -> Attributes | None:
    for order, attributes in image_orders(node).items():
        if order == perm:
            return attributes
    return None


def image_orders(node: Node) -> dict[Perm, Attributes]:
    """The orders in which a node may have its images, and its attributes with each: channels last and first, and where
    windows are single pixels, spatial axes in any order."""
    rank = node.operands[0].tensor.rank
    plain = {name: value for name, value in node.attributes.items() if name != "layout"}
    last = {**plain, "layout": CHANNELS_LAST}
    spatial = list(permutations(range(2, rank))) if _single_pixels(node) else [tuple(range(2, rank))]
    orders: dict[Perm, Attributes] = {}
    for axes in spatial:
        orders[(0, *axes, 1)] = last
        orders[(0, 1, *axes)] = plain
    if "layout" in node.attributes:
        back = inverse(channels_last(rank))
        orders = {compose(back, order): attributes for order, attributes in orders.items()}
    return orders


def _single_pixels(node: Node) -> bool:
    """Whether a convolution computes each pixel from that pixel alone."""
    if node.op not in ("Conv", "ConvInteger") or any(extent != 1 for extent in node.operands[1].shape[2:]):
        return False
    strides, pads = node.attributes.get("strides", ()), node.attributes.get("pads", ())
    assert isinstance(strides, tuple) and isinstance(pads, tuple)
    return all(stride == 1 for stride in strides) and not any(pads)


_REDUCTIONS = (
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip

ALIKE: Mapping[str, Alike] = {
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("ArgMax", "ArgMin"), _extremum_position),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "TopK", "LpNormalization"), _one_axis(-1)),
    **dict.fromkeys(("Concat", "Split"), _one_axis(0)),
    **dict.fromkeys(("CumSum", "CumProd"), _cumulative),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantize),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _fixed_from(_normalised_axis)),
    **dict.fromkeys(QUANTIZED_ELEMENTWISE, _both),
    "Slice": _slice, "Pad": _pad, "Expand": _per_axis("shape"), "Tile": _per_axis("repeats"), "Resize": _resize,
    "Gather": _gather, "MatMul": _matmul, "Trilu": _fixed_from(lambda _, rank: rank - 2),
    "Dropout": lambda node, _: node.attributes,
    "MeanVarianceNormalization": lambda node, perm: _with(node, axes=_listed_axes(node, perm, (0, 2, 3)) or ()),
}  # fmt: skip
"""Operators whose results are stored as their (first) operand is."""


# Results of another rank.


def _reshape(node: Node, perm: Perm) -> tuple[Attributes, Perm] | None:
    """A reshape that only joins and splits axes that stay neighbours; axes of extent 1 lie anywhere."""
    if len(node.operands) != 1:
        return None
    old, new = node.operands[0].shape, node.output.shape
    if 0 in old or 0 in new:
        return None
    long_old, long_new = ([axis for axis, d in enumerate(shape) if d != 1] for shape in (old, new))
    kept = [axis for axis in perm if old[axis] != 1]
    order: list[int] = []
    done = 0
    runs = {
        a: (a, b, c, d)
        for (a, b), (c, d) in matching_groups(ordered(old, tuple(long_old)), ordered(new, tuple(long_new)))
    }
    while done < len(kept):
        run = runs.get(long_old.index(kept[done]))
        if run is None or kept[done : done + run[1] - run[0]] != long_old[run[0] : run[1]]:
            return None
        order += long_new[run[2] : run[3]]
        done += run[1] - run[0]
    if len(order) != len(long_new):
        return None
    for axis, extent in enumerate(new):
        if extent == 1:
            # Behind the axis that it follows in the result, so that an order that changes nothing stays one.
            order.insert(order.index(axis - 1) + 1 if axis else 0, axis)
    result = tuple(order)
    return _with(node, shape=ordered(new, result)), result


def _without(perm: Perm, removed: Sequence[int]) -> Perm:
    """The order of the axes that are left, counted anew."""
    kept = [axis for axis in range(len(perm)) if axis not in removed]
    return tuple(kept.index(axis) for axis in perm if axis in kept)


def _reduce_away(node: Node, perm: Perm) -> tuple[Attributes, Perm] | None:
    axes = _ints(node, "axes")
    if node.attributes.get("keepdims", 1) or len(node.operands) > 1:
        return None
    if not axes:  # all of them
        every = not node.attributes.get("noop_with_empty_axes") and "axes" not in node.attributes
        return (node.attributes, ()) if every else None
    renamed = tuple(perm.index(axis % len(perm)) for axis in axes)
    return _with(node, axes=renamed), _without(perm, [axis % len(perm) for axis in axes])


def _position_away(node: Node, perm: Perm) -> tuple[Attributes, Perm] | None:
    axis = node.attributes.get("axis", 0)
    assert isinstance(axis, int)
    if node.attributes.get("keepdims", 1):
        return None
    return _one_axis(0)(node, perm) or {}, _without(perm, [axis % len(perm)])


def _pick(node: Node, perm: Perm) -> tuple[Attributes, Perm] | None:
    axis, indices = node.attributes.get("axis", 0), node.inputs[1]
    assert isinstance(axis, int)
    if indices is None or indices.tensor.rank != 0:
        return None
    return _one_axis(0)(node, perm) or {}, _without(perm, [axis % len(perm)])


ALTERED: Mapping[str, Altered] = {
    **dict.fromkeys(_REDUCTIONS, _reduce_away),
    **dict.fromkeys(("ArgMax", "ArgMin"), _position_away),
    "Reshape": _reshape,
    "Gather": _pick,
}
"""Operators with one operand that is carried and a result of another shape."""


def broadcast_order(operand: Value, perm: Perm) -> tuple[Perm, tuple[Dim, ...]]:
    """For an elementwise operand of lower rank where the result is stored by `perm`: the order of its own axes, and
    the shape in which it then broadcasts."""
    missing = len(perm) - operand.tensor.rank
    own = tuple(axis - missing for axis in perm if axis >= missing)
    shape = [1 if axis < missing else operand.shape[axis - missing] for axis in perm]
    while len(shape) > operand.tensor.rank and shape[0] == 1:
        shape.pop(0)
    return own, tuple(shape)
