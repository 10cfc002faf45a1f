"""Tree ensembles as ONNX's own operators: every row takes one step in all trees at once, as often as trees are deep."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from .export_sizes import Sizes
from .graph import Node

_COMBINED = {
    "add": ("ReduceSum", "add", 0.0),
    "min": ("ReduceMin", "min", np.inf),
    "max": ("ReduceMax", "max", -np.inf),
}


def trees_to_onnx(node: Node, sizes: Sizes) -> list[NodeProto]:
    """Nodes that compute what an onnxc.TreeEnsemble is."""
    operands = [None if value is None else value.name for value in node.inputs]
    x, feature, threshold, children, trees, weight, first, target, missing = (operands + [None] * 9)[:9]
    depth, targets = node.attributes["depth"], node.attributes.get("targets", 1)
    reduce, reduction, start = _COMBINED[str(node.attributes.get("aggregate", "add"))]
    assert isinstance(depth, int) and isinstance(targets, int) and weight is not None and x is not None
    nodes: list[NodeProto] = []

    def add(op: str, *inputs: str | None, **attributes: Any) -> str:
        name = f"{node.output.name}~trees{len(nodes)}"
        nodes.append(onnx.helper.make_node(op, [i or "" for i in inputs], [name], **attributes))
        return name

    def constant(*numbers: int) -> str:
        name = f"{node.output.name}~ints{len(nodes)}"
        nodes.append(onnx.helper.make_node("Constant", [], [name], value_ints=list(numbers)))
        return name

    def whole(value: str) -> str:
        return add("Cast", value, to=onnx.TensorProto.INT64)

    roots = whole(add("Squeeze", add("Gather", trees, constant(0), axis=1), constant(1)))
    at = add("Expand", roots, add("Concat", add("Shape", x, end=1), constant(1), axis=0))
    flat = add("Reshape", children, constant(-1))
    for _ in range(depth):
        value = add("GatherElements", x, whole(add("Gather", feature, at)), axis=1)
        goes = add("LessOrEqual", value, add("Gather", threshold, at))
        if missing is not None:
            goes = add("Or", goes, add("And", add("IsNaN", value), add("Gather", missing, at)))
        at = whole(add("Gather", flat, add("Add", add("Mul", at, constant(2)), whole(goes))))
    if first is None or target is None:
        found = add(reduce, add("Gather", weight, at), constant(1), keepdims=1)
    else:
        # The entries' nodes from where each node's begin: then a table of all nodes and targets.
        ends = add("Slice", first, constant(1), constant(1 << 40))
        ones = add("Add", add("Mul", whole(target), constant(0)), constant(1))
        numbers = add("Cast", add("CumSum", ones, add("Squeeze", constant(0))), to=onnx.TensorProto.INT32)
        before = add("Less", add("Unsqueeze", ends, constant(0)), add("Unsqueeze", numbers, constant(1)))
        owner = add("ReduceSum", whole(before), constant(1), keepdims=1)
        places = add("Concat", owner, add("Unsqueeze", whole(target), constant(1)), axis=1)
        shape = add("Concat", add("Shape", feature), constant(targets), axis=0)
        name = f"{node.output.name}~start"
        sizes.constant(np.array([start], node.output.dtype.numpy), name)
        table = add("ScatterND", add("Expand", name, shape), places, weight, reduction=reduction)
        found = add(reduce, add("Gather", table, at), constant(1), keepdims=0)
    nodes.append(onnx.helper.make_node("Identity", [found], [node.output.name]))
    return [*sizes.take(), *nodes]
